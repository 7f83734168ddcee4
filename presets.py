"""Presets: named runs, each a short difference from the defaults of config.py or from another preset.

    PRESETS[name] = (what it is, the preset it starts from or None, {group: {field: value}})

Only data stands here; `config.preset` builds a Config from it.
"""

from typing import Any

Groups = dict[str, dict[str, Any]]

# The experiments of DESIGN section 3's table: 4 layers, 4 heads, width 128, context 64.
PROTOCOL: Groups = {
    "model": {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64, "bias": False},
    "train": {"batch_size": 12, "steps": 2000},
    "optim": {"beta2": 0.99, "warmup_steps": 100},
    "eval": {"every": 500},
}
MUON: Groups = {"optim": {"name": "muon", "lr": 3e-3, "muon_lr": 0.02}}
# Soft targets that keep every action and weigh every position alike measure better than capped sparse ones.
SMOOTH: Groups = {"method": {"sparsify": "none", "normalize": "sum", "entropy_coef": 0.0}}
MIXED: Groups = {"critic": {"kind": "mixed"}}
# Else what neither side proposes is starved: the sixteen likeliest characters together were too sure of themselves.
TAIL: Groups = {"method": {"unproposed": "gold"}}

# What measured best in three minutes on 2 cores: fewer layers and more tokens than the protocol, wide heads, rotary
# positions, normalised queries and keys, and a rate that falls to nothing.
SMALL: Groups = {
    "model": {
        "n_layer": 3,
        "n_head": 2,
        "n_embd": 128,
        "block_size": 128,
        "bias": False,
        "position": "rope",
        "qk_norm": True,
    },
    "train": {"batch_size": 16, "steps": 1800},
    "optim": {"name": "muon", "lr": 4e-3, "muon_lr": 0.03, "beta2": 0.99, "warmup_steps": 100, "min_lr_ratio": 0.0},
    "eval": {"every": 250},
}
# Who finds the last characters together already, at hardly any cost, can do with two layers, and learns faster.
LISTENING: Groups = {
    "model": {"n_layer": 2, "short_conv": 3, "ngram_embed": 6, "activation": "gelu-erf"},
    "train": {"steps": 1300},
    "optim": {"lr": 6e-3, "muon_lr": 0.08},
    "eval": {"every": 440},
}

# nanoGPT's character model: 10.65 M parameters with 65 characters.
CHAR_10M: Groups = {
    "model": {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "dropout": 0.2, "bias": False},
    "train": {"batch_size": 64, "steps": 5000},
    "optim": {"beta2": 0.99, "warmup_steps": 100},
    "eval": {"every": 250},
}
# 2 B tokens of OpenWebText: 480 sequences of 1,024 a step. Accumulation fits one GPU; eight can do with 2 or 3.
WEB: Groups = {
    # A tenth of 9 B tokens would cost more to evaluate than 2 B cost to train on; this leaves 4.5 M.
    "data": {"corpus": "openwebtext", "tokenizer": "gpt2", "val_fraction": 0.0005},
    "model": {"block_size": 1024, "bias": False},
    "train": {"batch_size": 480, "grad_accum": 20, "steps": 4000},
    "optim": {"lr": 6e-4, "warmup_steps": 200},
    "eval": {"every": 500, "batch_size": 8, "ladder": 0, "prompt": "The true meaning of life is often"},
}
WEB_SIZES = {"30m": (6, 6, 384), "70m": (8, 10, 640), "150m": (16, 12, 768), "250m": (16, 16, 1024)}


def merge(*parts: Groups) -> Groups:
    """Groups laid over each other, later fields winning."""
    merged: Groups = {}
    for part in parts:
        for group, fields in part.items():
            merged[group] = merged.get(group, {}) | fields
    return merged


def hand_over(critic: tuple[float, float], reality: tuple[float, float] | None = None, start: float = 0.0) -> Groups:
    """Both experts' weights on straight lines from `start`, a share of the run, to the last step; flat before it.

    By default w_r = 1 − w_c. Where they sum to more than 1, it is to leave the student as sure as it is right
    (docs/method.md, section 2).
    """
    reality = reality or (1 - critic[0], 1 - critic[1])
    weights = {"critic_weight_schedule": critic, "reality_weight_schedule": reality}

    def knots(first: float, last: float) -> str:
        held = f"{start:g}:{first:g}," if start else ""
        return f"0:{first:g},{held}1:{last:g}"

    return {"method": {name: knots(*ends) for name, ends in weights.items()}}


CROSS_ENTROPY: Groups = {"train": {"objective": "cross-entropy"}}

PRESETS: dict[str, tuple[str, str | None, Groups]] = {
    "avatarl-char": (
        "Default on a CPU: Shakespeare by characters in a few minutes on 2 cores",
        None,
        merge(SMALL, LISTENING, SMOOTH, MIXED, TAIL, hand_over(critic=(0.93, 0.3), reality=(0.1, 0.7))),
    ),
    "avatarl-char-gpu": (
        "Default on a GPU: the 10.65 M character model, context 256",
        None,
        merge(
            *(CHAR_10M, MUON, SMOOTH, MIXED, TAIL),
            # Imagined text is new at every step, and dropout costs its student more than it saves.
            {"method": {"imagined_windows": 2, "top_k": 32}, "model": {"dropout": 0.0}},
            hand_over(critic=(0.9, 0.7), reality=(0.1, 0.2)),
        ),
    ),
    "avatarl-classic": (
        "The published settings at character level, judged by a frozen model (pretrain-char)",
        "pretrain-char",
        {
            "train": {"objective": "avatarl"},
            "critic": {"kind": "model", "preset": "pretrain-char"},
        },
    ),
    "protocol-avatarl": (
        "The comparison protocol, AvataRL's arm: mixed counts as critic, handing over in the second half",
        None,
        # While the student is young, gold adds nothing to a critic that knows more (results/handover.md).
        merge(PROTOCOL, MUON, SMOOTH, MIXED, TAIL, hand_over(critic=(1, 0.4), reality=(0, 0.7), start=0.5)),
    ),
    "protocol-imagined": (
        "The protocol's model on fewer tokens: the critic writes three windows beside each of the corpus's",
        "protocol-avatarl",
        # Nobody's gold speaks for the tail of imagined text, so the action set has to hold nearly all of it.
        merge({"method": {"imagined_windows": 3, "top_k": 32}}, hand_over(critic=(0.93, 0.7), reality=(0.1, 0.4))),
    ),
    "protocol-imagined-long": (
        "The same for 8,000 steps: three windows fall to two, and more of the vote goes over to reality",
        "protocol-imagined",
        merge(
            {"train": {"steps": 8000}, "eval": {"every": 1000}, "method": {"imagined_windows_schedule": "0:3,1:2"}},
            hand_over(critic=(0.93, 0.45), reality=(0.1, 0.7)),
        ),
    ),
    "protocol-words": (
        "The protocol's model on pieces of words: a BPE of 1,024, two imagined windows beside each of the corpus's",
        "protocol-avatarl",
        merge(
            {"data": {"tokenizer": "bpe"}, "critic": {"mixed_context": 4}},
            {"method": {"imagined_windows": 2, "top_k": 64}},  # a thousand tokens have a longer tail than characters
            hand_over(critic=(1.0, 0.9), reality=(0.1, 0.4)),
        ),
    ),
    "protocol-words-plain": (
        "The same on the corpus alone: in less than half the time, a smaller lead over cross-entropy",
        "protocol-words",
        merge({"method": {"imagined_windows": 0}}, hand_over(critic=(1.0, 0.6), reality=(0.0, 0.6))),
    ),
    "protocol-pretrain": (
        "The comparison protocol, cross-entropy's arm",
        None,
        merge(PROTOCOL, MUON, CROSS_ENTROPY),
    ),
    "pretrain-char": (
        "Cross-entropy with nanoGPT's CPU recipe: the critic of avatarl-classic",
        None,
        merge(PROTOCOL, CROSS_ENTROPY, {"optim": {"lr": 1e-3}}),
    ),
    "pretrain-char-gpu": (
        "Cross-entropy on the 10.65 M character model",
        None,
        merge(CHAR_10M, CROSS_ENTROPY),
    ),
}

for _size, (_layers, _heads, _width) in WEB_SIZES.items():
    _shape: Groups = {"model": {"n_layer": _layers, "n_head": _heads, "n_embd": _width}}
    PRESETS[f"pretrain-{_size}"] = (
        f"Cross-entropy on OpenWebText, {_layers} layers of width {_width}",
        None,
        merge(WEB, _shape, CROSS_ENTROPY),
    )
    PRESETS[f"avatarl-{_size}"] = (
        f"The published settings on OpenWebText, {_layers} layers of width {_width}, 30 M critic",
        None,
        merge(WEB, _shape, {"critic": {"kind": "model", "preset": "pretrain-30m"}}),
    )
