"""The environment: what gymnasium asks of one, and rewards that mean what they say."""

import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

import surgery.env
from checks import ConfigError
from surgery.env import BatchedSurgeryVecEnv, SurgeryEnv, library
from surgery.theater import SurgicalTheater
from tests.surgery.patients import bits, unchanged
from tests.surgery.tasks import TEXT, some_actions, task


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("reward", ["text", "one_token"])
def test_gymnasium_accepts_it(reward):
    """Catches spaces, types or seeds that gymnasium's own checker refuses."""
    check_env(SurgeryEnv(task(reward=reward)), skip_render_check=True)


def test_an_episode_is_one_step():
    """Catches an episode that is truncated instead of terminated, terms that are not told, a step without a reset."""
    env = SurgeryEnv(task())
    with pytest.raises(RuntimeError, match="reset"):
        env.step(env.action_space.sample())
    seen, _ = env.reset(seed=1)
    assert seen.shape == (16,) and seen.dtype == np.float32
    assert float(seen.mean()) == pytest.approx(0, abs=1e-5) and float(seen.std()) == pytest.approx(1, abs=1e-3)
    _, reward, terminated, truncated, terms = env.step(some_actions(1, 6)[0])
    assert terminated and not truncated
    total = terms["likelihood"] + 0.5 * terms["diversity"] - 0.5 * terms["repetition"]
    assert reward == pytest.approx(total, abs=1e-9)


@pytest.mark.parametrize("reward", ["text", "one_token"])
def test_the_batch_is_the_candidates_one_by_one(reward):
    """Catches rewards that are handed to the wrong candidate, and random numbers that differ between candidates."""
    one = task(reward=reward)
    envs, env = BatchedSurgeryVecEnv(one, 5), SurgeryEnv(one)
    envs.key = [7, 3]
    seen = envs.reset()
    actions = some_actions(5, one.size)
    envs.step_async(actions)
    _, rewards, dones, _ = envs.step_wait()
    assert dones.all() and len(set(rewards.round(6))) > 1
    for action, reward_in_batch in zip(actions, rewards, strict=True):
        alone, _ = env.reset(options={"scene": envs.scene})
        assert np.allclose(alone, seen[0], atol=1e-6)
        assert env.step(action)[1] == pytest.approx(float(reward_in_batch), abs=1e-5)


@pytest.mark.parametrize("reward", ["text", "one_token"])
def test_the_zero_action_is_worth_exactly_nothing(reward):
    """Catches other random numbers than the unoperated model's, dropout in a reward, a correction that adds noise."""
    one = task(reward=reward, dropout=0.5)
    actions = some_actions(4, one.size)
    actions[[0, 2]] = 0
    found = one.evaluate(one.draw([1]), actions)
    assert found.rewards[0] == found.rewards[2] == 0.0
    assert found.rewards[1] != 0 and found.rewards[3] != 0
    assert all(term[0] == term[2] == 0.0 for term in found.terms.values())
    assert one.model.training, "the mode it was in is given back"


def test_a_reward_is_the_operated_models_text_minus_the_others():
    """Catches a reward with the wrong sign or scale: by hand, operating in place."""
    one = task(prompts=2)
    assert one.judge is not None
    scene, actions = one.draw([5]), some_actions(1, one.size, seed=3)
    judged = []
    for surgery_of in (np.zeros_like(actions), actions):
        with SurgicalTheater(one.model, one.layers):
            one.operator.apply(one.surgeries(surgery_of)[0])
            idle = np.zeros_like(actions)  # candidates that do nothing, beside weights that were operated on in place
            texts = surgery.env.batched_generate(
                one.model, one.operator, one.surgeries(np.repeat(idle, 2, 0)), scene.prompts, 6,
                seed=scene.seed, streams=[0, 1], temperature=0.8,
            )  # fmt: skip
        judged.append(float(one.judge.quality(scene.prompts, texts).total.mean()))
    assert one.evaluate(scene, actions).rewards[0] == pytest.approx(judged[1] - judged[0], abs=1e-6)
    assert judged[1] != judged[0]


def test_looking_and_evaluating_change_no_weight():
    """Catches a candidate that stays in the model, in phase 2 for good."""
    one = task()
    before = bits(one.model)
    scene = one.draw([0])
    one.observe(scene)
    one.evaluate(scene, some_actions(3, one.size))
    assert unchanged(one.model, before)


def test_scenes_are_keyed():
    """Catches scenes that depend on anything but their key, or not on it; and gold that is not the next token."""
    one = task()
    a, b, c = one.draw([1, 2]), one.draw([1, 2]), one.draw([1, 3])
    assert torch.equal(a.prompts, b.prompts) and a.seed == b.seed
    assert not torch.equal(a.prompts, c.prompts) and a.seed != c.seed
    windows = {tuple(TEXT[i : i + 5]) for i in range(len(TEXT) - 4)}
    assert {(*row, g) for row, g in zip(a.prompts.tolist(), a.gold.tolist(), strict=True)} <= windows


def test_actions_reach_the_limit_and_no_further():
    """Catches an action of 1 that is not a tenth, and one beyond that is not cut there."""
    one = task()
    found = one.surgeries(np.array([[1, -1, 0.5, 0, 2, -3]], dtype=np.float32))
    assert found.shape == (1, 2, 3)
    assert found.flatten().tolist() == pytest.approx([0.1, -0.1, 0.05, 0, 0.1, -0.1])


def test_what_does_not_fit_is_refused():
    """Catches settings that would die in the middle of phase 2."""
    with pytest.raises(ConfigError, match=r"surgery.prompt-tokens.*fit into the model's context of 12"):
        task(new_tokens=9)
    with pytest.raises(ConfigError, match=r"surgery.layers = 3"):
        task(layers=(1, 3))
    with pytest.raises(ConfigError, match=r"rank = 17"):
        task(rank=17)
    with pytest.raises(AttributeError):
        surgery.env.NoSuchEnv  # noqa: B018


def test_a_missing_library_is_one_line(monkeypatch):
    """Catches an ImportError with a trace where a line with the command would do."""
    monkeypatch.setattr(surgery.env.importlib, "import_module", lambda name: (_ for _ in ()).throw(ImportError(name)))
    with pytest.raises(ConfigError, match="pip install stable-baselines3"):
        library("stable_baselines3.common.vec_env")
