"""The surgeon: an agent of stable-baselines3 that proposes surgeries and learns from what they did; and its control.

    surgeon = Surgeon("sac", task, settings, candidates=16, seed=1)
    found = surgeon.round()             # 16 proposals, evaluated in one batch; then it learns
    surgeon.save(folder)                # networks, optimisers, replay buffer, counters

SAC tunes the weight of its entropy itself (Haarnoja et al., 2018). TD3 and DDPG, which are deterministic, explore
with Gaussian noise; PPO and A2C learn on policy, from the round alone. An episode is one step, so discounts and
bootstrapping never matter.

All draws of a round are keyed by (seed, round): a resumed surgeon needs no saved generator to go on bit for bit.
"""

import contextlib
import json
import random
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from checks import ConfigError
from files import write_json
from surgery.env import Evaluation, SurgeryTask, batched_env_class, library
from surgery.operation import LIMIT
from surgery.settings import AgentConfig

OFF_POLICY = ("sac", "td3", "ddpg")
PHASE_KEYS = {"train/ent_coef": "alpha", "train/critic_loss": "critic_loss", "train/actor_loss": "actor_loss"}
"""Numbers that stable-baselines3 logs, and what they are called here."""


class Round(NamedTuple):
    """Proposals of a round (M, size) in [−1, 1], what they got, and numbers for the log."""

    actions: np.ndarray
    evaluation: Evaluation
    metrics: dict[str, float]

    @property
    def best(self) -> int:
        """Which proposal the judge likes best; of equals the first."""
        return int(self.evaluation.rewards.argmax())


def round_metrics(actions: np.ndarray, evaluation: Evaluation, seconds: float) -> dict[str, float]:
    """What a round is logged as, whoever proposed: `surgery/…`."""
    rewards = evaluation.rewards
    return {
        "surgery/reward": float(rewards.mean()),
        "surgery/reward_best": float(rewards.max()),
        "surgery/reward_std": float(rewards.std()),
        **{f"surgery/{name}": float(values.mean()) for name, values in evaluation.terms.items()},
        "surgery/action_size": LIMIT * float(np.abs(actions).mean()),
        "surgery/seconds": seconds,
    }


class Surgeon:
    """An agent of stable-baselines3, driven a round at a time.

    `name` is one of settings.AGENTS. Raises ConfigError where the library is missing.
    """

    def __init__(self, name: str, task: SurgeryTask, settings: AgentConfig, *, candidates: int, seed: int) -> None:
        self.name, self.task, self.seed, self.rounds = name, task, seed, 0
        self.env = batched_env_class()(task, candidates, settings.reward_scale)
        with keyed_generators(seed, 0):
            self.agent = build_agent(name, self.env, settings, seed)
        self._silence()

    def round(self) -> Round:
        """Propose, evaluate and learn once."""
        start = time.perf_counter()
        key = [self.seed, self.rounds]
        self.env.key = key
        with keyed_generators(self.seed, self.rounds + 1):
            self.agent.action_space.seed(int(np.random.randint(2**31)))
            self.agent.set_env(self.env)  # the next `learn` then resets it: another scene, perhaps another student
            self.agent.learn(self.env.num_envs, log_interval=None, reset_num_timesteps=False)
        self.rounds += 1
        actions, evaluation = self.env.latest
        metrics = round_metrics(actions, evaluation, time.perf_counter() - start)
        return Round(actions, evaluation, metrics | self._learning())

    def _learning(self) -> dict[str, float]:
        """What the agent says of its own learning: entropy weight, losses, Q-values of the latest actions."""
        logged = self.agent.logger.name_to_value
        found = {f"surgery/{ours}": float(logged[key]) for key, ours in PHASE_KEYS.items() if key in logged}
        if self.name in OFF_POLICY:
            actions, device = self.env.latest[0], self.agent.device
            with torch.no_grad():
                seen = torch.from_numpy(self.env.seen).to(device)
                q = torch.cat(self.agent.critic(seen, torch.from_numpy(actions).to(device)), dim=1)  # (M, critics)
            found["surgery/q_value"] = float(q.amin(1).mean()) / self.env.reward_scale
        return found

    def save(self, folder: Path) -> None:
        """Write everything that `load` needs into `folder`, which must not hold a surgeon yet."""
        folder.mkdir(parents=True, exist_ok=True)
        self.agent.save(folder / "agent.zip", exclude=["replay_buffer", "rollout_buffer", "_logger"])
        if self.name in OFF_POLICY:
            self.agent.save_replay_buffer(folder / "replay.pkl")
        write_json(folder / "surgeon.json", {"agent": self.name, "seed": self.seed, "rounds": self.rounds})

    def load(self, folder: Path) -> None:
        """Continue from what `save` wrote. Raises ConfigError for another agent's folder or one that is broken."""
        self.rounds = read_rounds(folder, self.name)
        try:
            with keyed_generators(self.seed, 0), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.agent = type(self.agent).load(folder / "agent.zip", env=self.env, device=self.agent.device)
                if self.name in OFF_POLICY:
                    self.agent.load_replay_buffer(folder / "replay.pkl")
        except (OSError, ValueError, RuntimeError, KeyError, EOFError) as error:
            raise ConfigError(f"{folder}: the surgeon cannot be read ({error})") from None
        self._silence()

    def _silence(self) -> None:
        """A logger without outputs: its numbers are read after every round."""
        self.agent.set_logger(library("stable_baselines3.common.logger").Logger(folder=None, output_formats=[]))


class RandomSurgeon:
    """The control: proposals drawn uniformly, evaluated alike, never learnt from."""

    name = "random"

    def __init__(self, task: SurgeryTask, *, candidates: int, seed: int) -> None:
        self.task, self.candidates, self.seed, self.rounds = task, candidates, seed, 0

    def round(self) -> Round:
        """Propose and evaluate once, on the scene that the surgeon of this round would see."""
        start = time.perf_counter()
        key = [self.seed, self.rounds]
        actions = np.random.default_rng([*key, 1]).uniform(-1, 1, (self.candidates, self.task.size))
        actions = actions.astype(np.float32)
        evaluation = self.task.evaluate(self.task.draw(key), actions)
        self.rounds += 1
        return Round(actions, evaluation, round_metrics(actions, evaluation, time.perf_counter() - start))

    def save(self, folder: Path) -> None:
        """Write how many rounds there were."""
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "surgeon.json", {"agent": self.name, "seed": self.seed, "rounds": self.rounds})

    def load(self, folder: Path) -> None:
        """Continue from what `save` wrote."""
        self.rounds = read_rounds(folder, self.name)


def read_rounds(folder: Path, name: str) -> int:
    """How many rounds the surgeon in `folder` has done. Raises ConfigError where it is another agent's."""
    try:
        told = json.loads((folder / "surgeon.json").read_text())
        agent, rounds = str(told["agent"]), int(told["rounds"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{folder}: no surgeon can be read there ({error})") from None
    if agent != name:
        raise ConfigError(f"{folder}: it holds a surgeon of the kind {agent!r}, and this run's is {name!r}")
    return rounds


def build_agent(name: str, env: Any, settings: AgentConfig, seed: int) -> Any:
    """An untrained agent of stable-baselines3 for `env`."""
    sb3, s = library("stable_baselines3"), settings
    common: dict[str, Any] = {
        "learning_rate": s.learning_rate,
        "policy_kwargs": {"net_arch": [s.width, s.width]},
        "seed": seed,
        "device": "cpu",  # networks of this size are slower on a GPU
    }
    if name in ("ppo", "a2c"):
        on_policy: dict[str, Any] = {"n_steps": 1, "gae_lambda": 1.0}
        if name == "ppo":
            on_policy["batch_size"] = env.num_envs
        return getattr(sb3, name.upper())("MlpPolicy", env, **common, **on_policy)
    off_policy: dict[str, Any] = {
        "buffer_size": s.buffer_size,
        "learning_starts": s.learning_starts,
        "batch_size": s.batch_size,
        "gradient_steps": s.gradient_steps,
        "train_freq": 1,
    }
    if name == "sac":
        off_policy["ent_coef"] = s.entropy if s.entropy.startswith("auto") else float(s.entropy)
    else:
        size = env.task.size
        noise = library("stable_baselines3.common.noise").NormalActionNoise
        off_policy["action_noise"] = noise(np.zeros(size), np.full(size, s.noise))
    return getattr(sb3, name.upper())("MlpPolicy", env, **common, **off_policy)


@contextlib.contextmanager
def keyed_generators(*key: int) -> Any:
    """Within the block the global generators that stable-baselines3 draws from start at `key`; then as before.

    torch's is left where it ends: the training loop keys it anew at every step.
    """
    numpy_state, python_state = np.random.get_state(), random.getstate()
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    np.random.seed(seed)
    random.seed(seed)
    torch.manual_seed(seed)
    try:
        yield
    finally:
        np.random.set_state(numpy_state)
        random.setstate(python_state)
