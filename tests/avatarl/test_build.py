"""From a config to an objective: every judge that can be asked for is wired up."""

from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch

from avatarl.build import build_objective
from avatarl.critics import model_opinion
from avatarl.objective import CrossEntropy
from config import Config, ConfigError, override
from model import GPT
from tests.avatarl.builders import random_batch, tiny_gpt

V = 11


def tiny_config(**groups) -> Config:
    """A config of the tiny model with k = 3."""
    model = {"n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": 8}
    return override(Config(), **({"model": model, "method": {"top_k": 3}} | groups))


def built(config: Config, frozen: list[GPT] | None = None) -> Any:
    """The objective of a config over a short random corpus."""
    corpus = np.random.default_rng(0).integers(0, V, 400)
    return build_objective(tiny_gpt(), config, corpus, frozen or [], nullcontext)


@pytest.mark.parametrize(
    ("critic", "frozen"),
    [
        ({"kind": "model"}, 1),
        ({"kind": "model", "cross_fit": True}, 2),
        ({"kind": "ngram", "ngram_context": 2}, 0),
        ({"kind": "self", "past": "ema"}, 0),
        ({"kind": "self", "past": "ring"}, 0),
        ({"kind": "self", "past": "twin"}, 0),
        ({"kind": "mixed", "mixed_context": 2}, 0),
        ({"kind": "suffix", "suffix_context": 4}, 0),
        ({"kind": "ensemble", "ensemble": "mixed:0.5,model:1,self:0.25", "mixed_context": 2}, 1),
        ({"kind": "ensemble", "ensemble": "ngram:1,self:1", "past": "ring"}, 0),
    ],
    ids=str,
)
def test_every_kind_of_critic_is_built(critic, frozen):
    """Catches a kind of critic that the config offers and nobody wires up."""
    objective = built(tiny_config(critic=critic), [tiny_gpt(seed=2 + i) for i in range(frozen)])
    loss, metrics = objective(random_batch(), 0, {}, True)
    assert loss.isfinite() and metrics and all(value.isfinite() for value in metrics.values())


@pytest.mark.parametrize("kind", ["mixed", "ensemble"])
def test_critics_of_words_learn_what_tokens_stand_for(kind):
    """Catches strings that are lost on the way, so that words and lines are silently left out."""
    config = tiny_config(critic={"kind": kind, "ensemble": "mixed:1,self:1", "mixed_context": 2})
    corpus = np.random.default_rng(0).integers(0, V, 400)
    strings = list("aA bB.'\ncde")
    tokens, ids = random_batch(rows=2).tokens, torch.arange(V).expand(16, V)
    found = []
    for spelled in ([], strings):
        objective: Any = build_objective(tiny_gpt(), config, corpus, [], nullcontext, None, spelled)
        found.append(objective.ask(tokens, torch.tensor([100, 200])).log_probs(ids))
    assert (found[0] - found[1]).abs().max() > 0.01


def test_cross_fitting_is_wired_to_the_other_half():
    """Catches each critic set to judge the half that it was trained on."""
    first, second = tiny_gpt(seed=2), tiny_gpt(seed=3)
    objective = built(tiny_config(critic={"kind": "model", "cross_fit": True}), [first, second])
    tokens, ids = random_batch(rows=2).tokens, torch.arange(V).expand(16, V)
    found = objective.ask(tokens, torch.tensor([199, 200])).log_probs(ids)  # the corpus has 400 tokens
    for half, judge_of_half in ((slice(8), second), (slice(8, 16), first)):
        wanted = model_opinion(judge_of_half, tokens).log_probs(ids)
        torch.testing.assert_close(found[half], wanted[half])


def test_an_ensemble_multiplies_its_members():
    """Catches weights that reach the wrong member, a product that is not normalised, and a past that stands still."""
    model = tiny_gpt(seed=2)
    critic = {"kind": "ensemble", "ensemble": "model:0.5,self:2", "ema_decay": 0.5}
    objective = built(tiny_config(critic=critic), [model])
    drift = torch.ones_like(objective.student.wte.weight)
    with torch.no_grad():
        objective.student.wte.weight += drift
    objective.after_step(1)
    torch.testing.assert_close(objective.past.copies[0].wte.weight, objective.student.wte.weight - 0.5 * drift)
    tokens = random_batch(rows=2).tokens
    opinions = [model_opinion(m, tokens) for m in (model, objective.past.copies[0])]
    everything = torch.arange(V).expand(16, V)
    score = 0.5 * opinions[0].log_probs(everything) + 2 * opinions[1].log_probs(everything)
    found = objective.ask(tokens, None)
    torch.testing.assert_close(found.log_probs(everything), score.log_softmax(-1))
    torch.testing.assert_close(found.top_ids(3), score.topk(3).indices)
    torch.testing.assert_close(found.rows(5, 9).log_probs(everything[5:9]), score.log_softmax(-1)[5:9])
    assert any(key.startswith("past.") for key in objective.state_dict())  # its past is saved, the frozen model is not
    assert not any("critic" in key for key in objective.state_dict())
    assert objective.flops_per_token() == (3 + 2) * objective.student.flops_per_token()


def test_a_twin_starts_elsewhere():
    """Catches a twin that is a copy and teaches nothing, and one that moves the run's random numbers."""
    config = tiny_config(critic={"kind": "self", "past": "twin"})
    student = tiny_gpt()
    state = torch.get_rng_state()
    built_twice: list[Any] = [build_objective(student, config, np.zeros(0), [], nullcontext) for _ in range(2)]
    twins = [objective.twin for objective in built_twice]
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(*(twin.unembedding for twin in twins))
    assert not torch.isclose(twins[0].unembedding, student.unembedding).any()


def test_cross_entropy_is_built():
    """Catches a critic that is asked for in a run that has none."""
    assert isinstance(built(tiny_config(train={"objective": "cross-entropy"})), CrossEntropy)


def test_k_beyond_the_vocabulary_is_refused():
    """Catches a k that would fail in the middle of the first step."""
    with pytest.raises(ConfigError, match=r"method.top-k = 12: .*only 11 tokens; use k <= 11"):
        built(tiny_config(critic={"kind": "ngram"}, method={"top_k": 12}))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_smoothed_labels_reach_the_loss(smoothing):
    """Catches a share that is lost on the way, or spread over the wrong tokens: over all V, gold's own among them."""
    config = tiny_config(train={"objective": "cross-entropy", "label_smoothing": smoothing})
    objective, batch = built(config), random_batch()
    log_p = objective.student(batch.tokens).log_softmax(-1)
    gold = log_p.gather(-1, batch.targets[..., None])[..., 0]
    wanted = -((1 - smoothing) * gold + smoothing * log_p.mean(-1)).mean()
    torch.testing.assert_close(objective(batch, 0, {}, False)[0], wanted)
