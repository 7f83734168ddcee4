"""Settings: what is refused and how, presets, schedules, and the way to config.json and back."""

import dataclasses
import json
import typing
from collections.abc import Callable

import pytest

from checks import parse_schedule
from config import (
    PRESETS,
    Config,
    ConfigError,
    CriticConfig,
    DataConfig,
    EvalConfig,
    LogConfig,
    MethodConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
    differences,
    override,
    preset,
)

GROUPS = typing.get_type_hints(Config)
INFINITE = float("inf")

# (group, settings, what the error must name: flag, value, way out)
REFUSED: list[tuple[type, dict, str, str, str]] = [
    (RunConfig, {"name": "a/b"}, "run.name", "'a/b'", "plain folder name"),
    (RunConfig, {"name": ".."}, "run.name", "'..'", "plain folder name"),
    (RunConfig, {"name": "run "}, "run.name", "'run '", "plain folder name"),
    (RunConfig, {"threads": -1}, "run.threads", "-1", "0 (all cores)"),
    (RunConfig, {"device": "gpu"}, "run.device", "'gpu'", "auto, cpu, cuda"),
    (RunConfig, {"dtype": "float16"}, "run.dtype", "'float16'", "float32 or bfloat16"),
    (RunConfig, {"compile": True}, "run.compile", "True", "auto or on or off"),
    (DataConfig, {"val_fraction": 0.0}, "data.val-fraction", "0.0", "between 0 and 1"),
    (DataConfig, {"val_fraction": 1.0}, "data.val-fraction", "1.0", "between 0 and 1"),
    (DataConfig, {"train_start": 0.5, "train_stop": 0.5}, "data.train-start", "(0.5, 0.5)", "start < stop"),
    (DataConfig, {"train_stop": 1.5}, "data.train-stop", "1.5", "<= 1"),
    (DataConfig, {"bpe_vocab": 256}, "data.bpe-vocab", "256", "257 to 65536"),
    (DataConfig, {"bpe_vocab": 65537}, "data.bpe-vocab", "65537", "257 to 65536"),
    (DataConfig, {"tokenizer": "word"}, "data.tokenizer", "'word'", "char or bpe or gpt2"),
    (ModelConfig, {"n_layer": 0}, "model.n-layer", "0", "positive"),
    (ModelConfig, {"n_head": 0}, "model.n-head", "0", "positive"),
    (ModelConfig, {"block_size": 0}, "model.block-size", "0", "positive"),
    (ModelConfig, {"n_embd": 100, "n_head": 12}, "model.n-embd", "100", "try 96"),
    (ModelConfig, {"n_embd": 12, "n_head": 4, "position": "rope"}, "model.position", "'rope'", "even head width"),
    (ModelConfig, {"position": "alibi"}, "model.position", "'alibi'", "learned or rope"),
    (ModelConfig, {"dropout": 1.0}, "model.dropout", "1.0", "below 1"),
    (CriticConfig, {"kind": "gpt"}, "critic.kind", "'gpt'", "model or ngram or mixed or suffix or self or ensemble"),
    (CriticConfig, {"ngram_context": 17}, "critic.ngram-context", "17", "0 to 16"),
    (CriticConfig, {"ngram_discount": 1.0}, "critic.ngram-discount", "1.0", "(0, 1)"),
    (CriticConfig, {"ema_decay": 1.0}, "critic.ema-decay", "1.0", "[0, 1)"),
    (CriticConfig, {"ring_size": 0}, "critic.ring-size", "0", "positive"),
    (CriticConfig, {"ring_every": 0}, "critic.ring-every", "0", "positive"),
    (CriticConfig, {"kind": "self", "cache": True}, "critic.cache", "True", "kind model, ngram, mixed or suffix"),
    (CriticConfig, {"kind": "ensemble", "cache": True}, "critic.cache", "True", "kind model, ngram, mixed or suffix"),
    (CriticConfig, {"kind": "ensemble", "ensemble": "mixed:1"}, "critic.ensemble", "mixed:1", "two members or more"),
    (CriticConfig, {"kind": "ensemble", "ensemble": "mixed:1,gpt:1"}, "critic.ensemble", "gpt", "is no critic"),
    (CriticConfig, {"kind": "ensemble", "ensemble": "mixed:1,mixed:2"}, "critic.ensemble", "mixed:1", "named twice"),
    (CriticConfig, {"kind": "ensemble", "ensemble": "mixed:1,self:0"}, "critic.ensemble", "self:0", "above 0"),
    (CriticConfig, {"kind": "ensemble", "past": "twin"}, "critic.past", "twin", "use ema or ring in an ensemble"),
    (CriticConfig, {"mixed_context": 0}, "critic.mixed-context", "0", "use 1 to 16 tokens"),
    (CriticConfig, {"suffix_context": 0}, "critic.suffix-context", "0", "1 token or more"),
    (CriticConfig, {"cache_top": -1}, "critic.cache-top", "-1", "twice method.top-k"),
    (MethodConfig, {"top_k": 0}, "method.top-k", "0", "positive"),
    (MethodConfig, {"epsilon": 0.0}, "method.epsilon", "0.0", "between 0 and 1"),
    (MethodConfig, {"epsilon": 1.0}, "method.epsilon", "1.0", "between 0 and 1"),
    (MethodConfig, {"epsilon": float("nan")}, "method.epsilon", "nan", "finite"),
    (MethodConfig, {"reality_weight": -0.1}, "method.reality-weight", "-0.1", "0 or more"),
    (MethodConfig, {"critic_weight": INFINITE}, "method.critic-weight", "inf", "finite"),
    (MethodConfig, {"critic_weight_schedule": "0:1,1:-1"}, "method.critic-weight-schedule", "-1.0", "0 or more"),
    (MethodConfig, {"entropy_coef_schedule": "0:inf"}, "method.entropy-coef-schedule", "inf", "finite"),
    (MethodConfig, {"epsilon_schedule": "0:0.5,1:0"}, "method.epsilon-schedule", "0.0", "between 0 and 1"),
    (MethodConfig, {"top_k_schedule": "0:4,1:17"}, "method.top-k-schedule", "17", "from 1 to 16"),
    (MethodConfig, {"student_context_share": 1.5}, "method.student-context-share", "1.5", "from 0 to 1"),
    (MethodConfig, {"sparsify": "mean"}, "method.sparsify", "'mean'", "above_mean or none"),
    (MethodConfig, {"normalize": "max"}, "method.normalize", "'max'", "cap or sum"),
    (MethodConfig, {"reward_scale": 0.0}, "method.reward-scale", "0.0", "positive"),
    (MethodConfig, {"reward_cap": 0.0}, "method.reward-cap", "0.0", "positive"),
    (MethodConfig, {"clip_ratio": 0.0}, "method.clip-ratio", "0.0", "such as 0.2"),
    (MethodConfig, {"inner_epochs": 0}, "method.inner-epochs", "0", "positive"),
    (MethodConfig, {"inner_epochs": 2}, "method.inner-epochs", "2", "--method.advantage group"),
    (MethodConfig, {"advantage": "group"}, "method.advantage", "'group'", "--method.policy-weighting expected"),
    (OptimConfig, {"name": "sgd"}, "optim.name", "'sgd'", "adamw or muon"),
    (OptimConfig, {"lr": 0.0}, "optim.lr", "0.0", "positive"),
    (OptimConfig, {"lr": INFINITE}, "optim.lr", "inf", "finite"),
    (OptimConfig, {"muon_lr": -1.0}, "optim.muon-lr", "-1.0", "positive"),
    (OptimConfig, {"beta2": 1.0}, "optim.beta2", "1.0", "[0, 1)"),
    (OptimConfig, {"weight_decay": -0.1}, "optim.weight-decay", "-0.1", "negative"),
    (OptimConfig, {"warmup_steps": -1}, "optim.warmup-steps", "-1", "negative"),
    (OptimConfig, {"grad_clip": -1.0}, "optim.grad-clip", "-1.0", "negative"),
    (OptimConfig, {"min_lr_ratio": 1.1}, "optim.min-lr-ratio", "1.1", "from 0 to 1"),
    (TrainConfig, {"objective": "pretrain"}, "train.objective", "'pretrain'", "avatarl or cross-entropy"),
    (TrainConfig, {"steps": 0}, "train.steps", "0", "positive"),
    (TrainConfig, {"keep": 0}, "train.keep", "0", "positive"),
    (TrainConfig, {"batch_size": 12, "grad_accum": 5}, "train.grad-accum", "5", "divide train.batch-size = 12"),
    (TrainConfig, {"objective": "cross-entropy", "label_smoothing": 1.0}, "train.label-smoothing", "1.0", "[0, 1)"),
    (TrainConfig, {"label_smoothing": 0.1}, "train.label-smoothing", "0.1", "--train.objective cross-entropy"),
    (TrainConfig, {"checkpoint_every": -1}, "train.checkpoint-every", "-1", "0 or more"),
    (EvalConfig, {"every": -1}, "eval.every", "-1", "negative"),
    (EvalConfig, {"ece_bins": 0}, "eval.ece-bins", "0", "positive"),
    (EvalConfig, {"prompt": ""}, "eval.prompt", "''", "at least one character"),
    (LogConfig, {"every": 0}, "log.every", "0", "positive"),
    (LogConfig, {"wandb": "on"}, "log.wandb", "'on'", "disabled or offline or online"),
]


@pytest.mark.parametrize(("group", "settings", "flag", "value", "fix"), REFUSED, ids=lambda x: str(x)[:40])
def test_a_bad_value_is_refused_with_a_way_out(group, settings, flag, value, fix):
    """Catches a value that would fail an hour later, and an error without the flag, the value or the fix."""
    with pytest.raises(ConfigError) as error:
        group(**settings)
    message = str(error.value)
    assert flag in message and value in message and fix in message and "\n" not in message


@pytest.mark.parametrize(
    ("group", "settings"),
    [
        (DataConfig, {"train_start": 0.5, "train_stop": 1.0}),
        (ModelConfig, {"n_head": 1, "n_embd": 2, "position": "rope"}),
        (CriticConfig, {"ngram_context": 0}),
        (CriticConfig, {"ema_decay": 0.0}),
        (MethodConfig, {"reality_weight": 0.0, "critic_weight": 0.0, "entropy_coef": 0.0}),
        (MethodConfig, {"advantage": "group", "policy_weighting": "expected", "inner_epochs": 4}),
        (MethodConfig, {"top_k": 4, "top_k_schedule": "0:1,1:4", "student_context_share_schedule": "0:0,1:1"}),
        (OptimConfig, {"warmup_steps": 0, "grad_clip": 0.0, "min_lr_ratio": 0.0}),
        (TrainConfig, {"batch_size": 12, "grad_accum": 12, "checkpoint_every": 0}),
        (EvalConfig, {"every": 0, "ladder": 0, "sample_tokens": 0}),
    ],
    ids=str,
)
def test_the_edges_are_allowed(group, settings):
    """Catches a check that is too strict: these mean something."""
    built = group(**settings)
    assert all(getattr(built, name) == value for name, value in settings.items())


def test_a_warm_up_must_end():
    """Catches a schedule whose warm-up outlasts the run: it would never reach its rate."""
    with pytest.raises(ConfigError, match=r"optim.warmup-steps = 100: .*at most train.steps = 50"):
        override(Config(), train={"steps": 50})


def test_a_cache_must_serve_the_method():
    """Catches contexts that no cache ever saw, and fewer cached tokens than the critic has to propose."""
    with pytest.raises(ConfigError, match=r"critic.cache = True: .*--method.context student"):
        override(Config(), critic={"cache": True}, method={"context": "student"})
    with pytest.raises(ConfigError, match=r"critic.cache-top = 15: .*method.top-k = 16"):
        override(Config(), critic={"cache_top": 15})
    assert override(Config(), critic={"cache": True, "cache_top": 16}).critic.cache


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_builds(name):
    """Catches a preset with a misspelt field or a value that its own check refuses."""
    assert isinstance(preset(name), Config)
    description, base, groups = PRESETS[name]
    assert description and (base is None or base in PRESETS)
    for group, fields in groups.items():
        assert set(fields) <= {f.name for f in dataclasses.fields(GROUPS[group])}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_names_real_critics(name):
    """Catches a critic preset that does not exist, or reads other tokens than the student."""
    config = preset(name)
    if config.critic.preset:
        critic = preset(config.critic.preset)
        assert critic.train.objective == "cross-entropy"
        assert critic.data.tokenizer == config.data.tokenizer
        assert critic.model.block_size >= config.model.block_size


def test_presets_are_what_the_design_says():
    """Catches a preset that drifted from the experiment it stands for."""
    sizes = {
        name: (c.model.n_layer, c.model.n_head, c.model.n_embd, c.model.block_size)
        for name in PRESETS
        if (c := preset(name)).data.tokenizer == "gpt2"
    }
    shapes = {"30m": (6, 6, 384), "70m": (8, 10, 640), "150m": (16, 12, 768), "250m": (16, 16, 1024)}
    assert sizes == {
        f"{kind}-{size}": (*shape, 1024) for size, shape in shapes.items() for kind in ("avatarl", "pretrain")
    }
    for name in ("avatarl-classic", "avatarl-30m", "avatarl-250m"):
        assert preset(name).method == MethodConfig()
        assert preset(name).critic.kind == "model"
    arms = differences(preset("protocol-avatarl"), preset("protocol-pretrain"))
    assert {field.split(".")[0] for field in arms} == {"critic", "method", "train"}
    assert arms["train.objective"] == ("avatarl", "cross-entropy")
    assert [field for field in arms if field.startswith("train.")] == ["train.objective"]


def test_a_preset_may_start_from_another():
    """Catches a base that is ignored: avatarl-classic is its critic's recipe with another objective."""
    found = differences(preset("pretrain-char"), preset("avatarl-classic"))
    assert set(found) == {"train.objective", "critic.preset"}


def test_an_unknown_preset_suggests_the_near_one():
    """Catches a bare KeyError for a typo."""
    with pytest.raises(ConfigError, match=r"'avatarl-chr': did you mean avatarl-char\? There are .*pretrain-250m"):
        preset("avatarl-chr")
    with pytest.raises(ConfigError, match="unknown preset 'zzz': There are"):
        preset("zzz")


@pytest.mark.parametrize(
    ("text", "knots"),
    [
        ("", ()),
        (" ", ()),
        ("0:0.8", ((0.0, 0.8),)),
        ("0:0.8,1:0.1", ((0.0, 0.8), (1.0, 0.1))),
        (" 0 : 1e-2 , 0.5 : 3 ,", ((0.0, 0.01), (0.5, 3.0))),
    ],
)
def test_schedules_are_read(text, knots):
    """Catches a parser that stumbles over blanks, and one that swaps progress and value."""
    assert parse_schedule(text, "method.epsilon-schedule") == knots


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("0.8", "'0.8' is no knot"),
        ("0:0.8:1", "is no knot"),
        ("a:0.8", "is no knot"),
        ("0:0.8,1:", "'1:' is no knot"),
        ("1:0.8,0:0.1", "rise strictly"),
        ("0:0.8,0:0.1", "rise strictly"),
        ("-0.1:0.8", "within 0 and 1"),
        ("0:0.8,100:0.1", "within 0 and 1"),
        ("nan:0.8", "within 0 and 1"),
    ],
)
def test_a_bad_schedule_is_refused(text, complaint):
    """Catches steps given where progress is meant, and knots out of order."""
    with pytest.raises(ConfigError, match=complaint) as error:
        MethodConfig(epsilon_schedule=text)
    assert "method.epsilon-schedule" in str(error.value) and repr(text) in str(error.value)


def test_a_schedule_overrides_its_constant():
    """Catches a constant that is checked, or used, although a schedule replaces it."""
    assert MethodConfig(epsilon_schedule="0:0.5,1:0.2").knots("epsilon") == ((0.0, 0.5), (1.0, 0.2))
    assert MethodConfig(epsilon=0.25).knots("epsilon") == ((0.0, 0.25),)
    assert MethodConfig(top_k=8).knots("top_k") == ((0.0, 8.0),)


@pytest.mark.parametrize("name", PRESETS)
def test_a_config_survives_config_json(name):
    """Catches a field that is lost or changed on its way through JSON: resume would train something else."""
    config = preset(name)
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_config_of_another_version_is_refused():
    """Catches a setting that is dropped in silence, and a value that no longer passes its check."""
    with pytest.raises(ConfigError, match=r"method.topk = .*no such setting in this version"):
        Config.from_dict({"method": {"topk": 3}})
    with pytest.raises(ConfigError, match=r"surgery = .*no such group of settings in this version"):
        Config.from_dict({"surgery": {}})
    with pytest.raises(ConfigError, match=r"critic.kind = 'oracle'"):
        Config.from_dict({"critic": {"kind": "oracle"}})


def test_differences():
    """Catches a difference that is missed, invented, or told the wrong way round."""
    one = Config()
    other = override(one, model={"n_layer": 4}, method={"sparsify": "none"})
    assert differences(one, one) == {}
    assert differences(one, other) == {"model.n_layer": (12, 4), "method.sparsify": ("above_mean", "none")}


def test_override():
    """Catches an override that resets the rest of a group, changes the original, or takes any name."""
    one = override(Config(), model={"n_layer": 4})
    other = override(one, model={"n_head": 6}, run={"seed": 1})
    assert (other.model.n_layer, other.model.n_head, other.run.seed) == (4, 6, 1)
    assert (one.model.n_head, one.run.seed) == (12, 1337)
    with pytest.raises(ConfigError, match=r"model.n-layer"):
        override(one, model={"n_layer": 0})
    with pytest.raises(TypeError):
        override(one, model={"layers": 4})


def test_the_defaults_are_the_published_settings():
    """Catches a default that was tuned: what measures better is a preset."""
    m = MethodConfig()
    assert (m.top_k, m.epsilon, m.reality_weight, m.critic_weight) == (16, 0.1, 0.7, 0.3)
    assert (m.sparsify, m.normalize, m.reward_scale, m.reward_cap) == ("above_mean", "cap", 100.0, 1.5)
    assert (m.entropy_coef, m.policy_weighting, m.advantage, m.context) == (0.01, "reinforce", "none", "gold")


@pytest.mark.parametrize("group", GROUPS)
def test_every_knob_is_a_frozen_field(group):
    """Catches an attribute without annotation, which would be no field, no flag, and shared by all."""
    kind = GROUPS[group]
    fields = {f.name for f in dataclasses.fields(kind)}
    methods = property | Callable
    plain = {n for n, value in vars(kind).items() if not n.startswith("_") and not isinstance(value, methods)}
    assert plain - fields <= {"SCHEDULED"}
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(kind(), next(iter(fields)), None)
