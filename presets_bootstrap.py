"""Presets of the bootstrapping experiments: learning from nothing, character by character (DESIGN section 8).

    PRESETS_BOOTSTRAP[name] = (what it is, the preset it starts from or None, {group: {field: value}})

All but the last read 8 characters, as the experiments that the project grew from, and show what their authors saw.
"""

from presets import SMALL, Groups, merge

# Contexts of 8 characters, 2,048 decisions a step, GPT-2's learned positions.
EIGHT: Groups = {
    "model": {"n_layer": 3, "n_head": 4, "n_embd": 128, "block_size": 8, "bias": False},
    "train": {"objective": "bootstrap", "batch_size": 256, "steps": 500},
    "optim": {"lr": 1e-3, "beta2": 0.99, "warmup_steps": 50},
    # What collapses is at its best within the first steps.
    "eval": {"every": 100, "also_at": "25,50", "batch_size": 1024},
    "log": {"every": 20},
}

PRESETS_BOOTSTRAP: dict[str, tuple[str, str | None, Groups]] = {
    "bootstrap-sampled": (
        "Samples at eight temperatures, guided by bigrams, learned from by GRPO",
        None,
        merge(
            EIGHT,
            {
                "bootstrap": {
                    "rollout": "sampled",
                    "samples": 8,
                    "temperature_low": 0.6,
                    "temperature_high": 1.4,
                    # A random policy is hardly ever right: the bigram shows it where rewards are.
                    "guidance_schedule": "0:0.5,0.5:0",
                    "ngram_weight": 0.5,
                    # Weaker, and rewards for one character of the group end in certainty.
                    "kl_coef_schedule": "0:2,1:1",
                    "entropy_low": 0.5,
                    "entropy_high": 3.0,
                    "entropy_bonus": 0.1,
                    "entropy_penalty": 0.1,
                    "mask_entropy": 0.01,
                }
            },
        ),
    ),
    "bootstrap-exhaustive": (
        "All V characters judged, gold alone rewarded, the exact policy gradient: it collapses",
        None,
        merge(EIGHT, {"bootstrap": {"policy_weighting": "expected"}}),
    ),
    "bootstrap-confidence": (
        "A bonus for being sure and right that grows through training",
        None,
        merge(
            EIGHT,
            {
                "bootstrap": {
                    "policy_weighting": "expected",
                    "ngram_weight": 0.5,
                    "confidence_weight_schedule": "0:0,1:2",
                    "entropy_low": 0.5,
                    "entropy_bonus": 0.2,
                }
            },
        ),
    ),
    "bootstrap-curriculum": (
        "Five stages: frequencies, bigrams, words, punctuation, the corpus's own patterns",
        None,
        merge(
            EIGHT,
            {
                # Four stages of at most 300 steps, and at least as many for the fifth.
                "train": {"steps": 1500},
                "bootstrap": {
                    "stage_max_steps": 300,
                    "stages": "frequencies,bigrams,words,punctuation,patterns",
                    "exact_weight_schedule": "0:0,1:1",
                },
            },
        ),
    ),
    "bootstrap-selfplay": (
        "Paid for what it brings over its own past, a ring of snapshots",
        None,
        merge(
            EIGHT,
            {
                "bootstrap": {"opponent": "ring", "opponent_weight": 0.5, "ngram_weight": 0.2},
                "critic": {"ring_size": 4, "ring_every": 50},
            },
        ),
    ),
    "bootstrap-best": (
        "Gold and n-grams only, past every rung of the n-gram ladder: all actions, every position, weights free of π",
        None,
        merge(
            SMALL,
            {
                "train": {"objective": "bootstrap", "batch_size": 16, "steps": 900},
                "optim": {"warmup_steps": 20},
                # The start of the curve decides when the first rungs are passed.
                "eval": {"every": 200, "also_at": "25,50,75,100,150"},
                "log": {"every": 20},
                "bootstrap": {
                    "soft": "mixed",
                    "soft_context": 8,
                    "exact_weight_schedule": "0:0.1,1:0.6",
                    "soft_weight_schedule": "0:0.9,1:0.4",
                },
            },
        ),
    ),
}
