"""The surgeon: any agent of stable-baselines3 with continuous actions, learning, resumable bit for bit."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from checks import ConfigError
from surgery.env import Evaluation
from surgery.operation import LIMIT
from surgery.settings import AGENTS, AgentConfig, HybridConfig
from surgery.surgeon import RandomSurgeon, Surgeon
from tests.surgery.tasks import AGENT, task


def surgeon(name: str = "sac", settings: AgentConfig = AGENT, seed: int = 1, **options) -> Surgeon:
    return Surgeon(name, task(**options), settings, candidates=4, seed=seed)


def rounds(one: Surgeon | RandomSurgeon, count: int) -> list[tuple[list[float], list[float]]]:
    found = [one.round() for _ in range(count)]
    return [(f.actions.flatten().tolist(), f.evaluation.rewards.tolist()) for f in found]


@pytest.mark.parametrize("name", AGENTS)
def test_every_agent_proposes_learns_and_goes_on(name, tmp_path):
    """Catches agents that crash, that never learn, that propose the same for all candidates, or outside the range,

    and state that is not saved: networks, optimisers, replay buffer, counters, exploration.
    """
    whole, broken = surgeon(name), surgeon(name)
    before = {k: v.clone() for k, v in whole.agent.policy.state_dict().items()}
    expected = rounds(whole, 6)
    assert any(not torch.equal(v, before[k]) for k, v in whole.agent.policy.state_dict().items())
    for actions, _ in expected:
        assert len(set(actions)) > 6 and max(map(abs, actions)) <= 1
    assert rounds(broken, 3) == expected[:3]
    broken.save(tmp_path / "saved")
    resumed = surgeon(name, seed=1)
    resumed.load(tmp_path / "saved")
    assert resumed.rounds == 3
    assert rounds(resumed, 3) == expected[3:]
    after, again = whole.agent.policy.state_dict(), resumed.agent.policy.state_dict()
    assert all(torch.equal(after[k], again[k]) for k in after)


def test_what_a_round_says():
    """Catches numbers that the issue asks for and that are missing, and actions in another unit."""
    one = surgeon()
    found = [one.round() for _ in range(4)][-1]
    names = (
        "reward reward_best reward_std likelihood diversity repetition action_size alpha q_value critic_loss seconds"
    )
    assert {f"surgery/{name}" for name in names.split()} <= found.metrics.keys()
    assert found.metrics["surgery/action_size"] == pytest.approx(LIMIT * np.abs(found.actions).mean())
    assert found.metrics["surgery/reward"] == pytest.approx(found.evaluation.rewards.mean())
    assert found.best == int(found.evaluation.rewards.argmax())
    assert not {"surgery/alpha", "surgery/q_value"} & surgeon("ppo").round().metrics.keys()


def test_sac_tunes_its_entropy():
    """Catches a fixed entropy weight where "auto" was asked for, and a tuned one where a number was."""
    tuned, fixed = surgeon(), surgeon(settings=replace(AGENT, entropy="0.3"))
    alphas = [[one.round().metrics.get("surgery/alpha") for _ in range(5)] for one in (tuned, fixed)]
    assert len(set(alphas[0][2:])) > 1 and alphas[1][2:] == pytest.approx([0.3] * 3)


def test_sac_learns_what_is_rewarded(monkeypatch):
    """Catches rewards that reach the agent with another sign, or beside another candidate's action.

    The task is replaced by one that pays for the first number of the action; chance alone would keep its mean near 0.
    """
    one = surgeon(
        settings=AgentConfig(learning_rate=1e-2, learning_starts=16, width=16, gradient_steps=8, batch_size=32)
    )
    paid = lambda scene, actions: Evaluation(0.05 * actions[:, 0].astype(float), {})  # noqa: E731
    monkeypatch.setattr(one.task, "evaluate", paid)
    firsts = [one.round().actions[:, 0].mean() for _ in range(25)]
    assert np.mean(firsts[-5:]) > 0.5 > abs(np.mean(firsts[:4]))


def test_the_generators_of_others_are_left_alone():
    """Catches a surgeon that changes what anyone else draws from numpy or random."""
    np.random.seed(5)
    random.seed(5)
    one = surgeon()
    expected = np.random.RandomState(5).rand(3), random.Random(5).random()
    one.round()
    assert (np.random.rand(3) == expected[0]).all() and random.random() == expected[1]


def test_chance_is_uniform_keyed_and_never_learns(tmp_path):
    """Catches a control that is narrower than the surgeon's range, repeats itself, or cannot be resumed."""
    one = RandomSurgeon(task(), candidates=40, seed=3)
    first, second = rounds(one, 2)
    assert first != second
    assert np.mean(np.abs(first[0])) == pytest.approx(0.5, abs=0.08)  # 240 numbers: 4 standard errors
    one.save(tmp_path / "saved")
    again = RandomSurgeon(task(), candidates=40, seed=3)
    again.load(tmp_path / "saved")
    assert rounds(again, 1) == rounds(one, 1)


def test_the_control_sees_the_surgeons_scenes(monkeypatch):
    """Catches arms that are compared on other prompts."""
    keys: list[list[int]] = []
    for one in (surgeon(), RandomSurgeon(task(), candidates=4, seed=1)):
        draw = one.task.draw

        def noted(key, draw=draw):
            keys.append(list(key))
            return draw(key)

        monkeypatch.setattr(one.task, "draw", noted)
        rounds(one, 3)
    assert keys[:3] == keys[3:] == [[1, 0], [1, 1], [1, 2]]


def test_another_agents_folder_is_refused(tmp_path):
    """Catches a resumed run that silently swaps its surgeon."""
    surgeon("td3").save(tmp_path / "td3")
    with pytest.raises(ConfigError, match=r"'td3'.*'sac'"):
        surgeon().load(tmp_path / "td3")
    with pytest.raises(ConfigError, match="no surgeon can be read"):
        surgeon().load(tmp_path)
    (tmp_path / "td3" / "agent.zip").write_bytes(b"torn")
    with pytest.raises(ConfigError, match="cannot be read"):
        surgeon("td3").load(tmp_path / "td3")


def test_an_unknown_agent_is_named_with_its_neighbours():
    """Catches an AttributeError from the depths where the choices would help; and discrete DQN."""
    with pytest.raises(ConfigError, match="surgeon = 'sacc': did you mean sac"):
        HybridConfig(surgeon="sacc")
    with pytest.raises(ConfigError, match="surgeon = 'dqn'"):
        HybridConfig(surgeon="dqn")
