"""Surgery as a reinforcement-learning environment: one decision, one reward (DESIGN section 9).

    task = SurgeryTask(model, judge, train_tokens, settings)
    env = SurgeryEnv(task)                          # a gymnasium.Env: one candidate a step
    envs = BatchedSurgeryVecEnv(task, 16)           # a VecEnv of stable-baselines3: 16 candidates in one batch

An episode is one step: see pieces of training text through the model's final hidden states, choose how much to scale
the leading singular values of some QKV weights, get the difference that this makes. The difference is to the
unoperated model on the same prompts with the same random numbers, so that the zero action's reward is exactly 0.
Everything runs in evaluation mode: no dropout mask is part of a reward.

gymnasium and stable-baselines3 are imported when one of the two classes is first asked for.
Shapes: M candidates, L layers, r singular values of each, P prompts, n tokens of a prompt, D width, V vocabulary.
"""

import functools
import importlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from checks import ConfigError, require
from model import GPT
from surgery.corrections import batched_generate, batched_logits, evaluating
from surgery.judge import TextJudge
from surgery.operation import LIMIT, Operator
from surgery.settings import SurgeryConfig

INSTALL = {"gymnasium": "gymnasium", "stable_baselines3": "stable-baselines3"}


def library(name: str) -> ModuleType:
    """An optional library of the surgeon. Raises ConfigError where it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError:
        package = INSTALL[name.partition(".")[0]]
        raise ConfigError(f"the surgeon needs {package}: run `.venv/bin/pip install {package}`") from None


class Scene(NamedTuple):
    """What an episode is about: the same for all candidates of a round."""

    prompts: Tensor
    """(P, n) tokens."""
    gold: Tensor
    """(P,): the token that followed each in the corpus."""
    seed: int
    """Of the random numbers that all candidates write with."""


class Evaluation(NamedTuple):
    """What M candidates got; `terms` are differences to the unoperated model, (M,) each."""

    rewards: np.ndarray
    terms: dict[str, np.ndarray]


class SurgeryTask:
    """Draws scenes, shows them, and evaluates candidate surgeries of `model` on them.

    tokens (L,): the text that prompts are drawn from. An action has `size` = layers · rank numbers in [−1, 1], ±1
    being the largest surgery that is allowed, ±LIMIT of a singular value. Raises ConfigError where the prompts and
    what is written after them do not fit into the model's context.
    """

    def __init__(
        self,
        model: GPT,
        judge: TextJudge | None,
        tokens: np.ndarray,
        settings: SurgeryConfig,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        length = settings.prompt_tokens + (settings.new_tokens if settings.reward == "text" else 0)
        require(
            length <= model.config.block_size,
            "surgery.prompt-tokens, surgery.new-tokens",
            length,
            f"together they must fit into the model's context of {model.config.block_size}",
        )
        require(len(tokens) > length, "surgery.prompt-tokens", length, f"the text has only {len(tokens)} tokens")
        if settings.reward == "text" and judge is None:
            raise ValueError("a reward for texts needs a judge")
        self.model, self.judge, self.settings, self.autocast = model, judge, settings, autocast
        self.layers = settings.operated(model.config.n_layer)
        self.operator = Operator(model, self.layers, settings.rank)
        self.size = len(self.layers) * settings.rank
        self._tokens = tokens

    def draw(self, key: Sequence[int]) -> Scene:
        """The scene of `key` (whole numbers from 0 on): the same for the same key."""
        random = np.random.default_rng(tuple(key))
        n = self.settings.prompt_tokens
        starts = random.integers(len(self._tokens) - n, size=self.settings.prompts)
        windows = np.stack([np.asarray(self._tokens[s : s + n + 1], dtype=np.int64) for s in starts])  # (P, n + 1)
        whole = torch.from_numpy(windows).to(self.model.wte.weight.device)
        return Scene(whole[:, :-1], whole[:, -1], int(random.integers(2**62)))

    @torch.no_grad()
    def observe(self, scene: Scene) -> np.ndarray:
        """Final hidden states, averaged over prompts and positions, with mean 0 and variance 1: (D,) float32."""
        with evaluating(self.model), self.autocast():
            hidden = GPT.hidden(self.model, scene.prompts)  # (P, n, D), past a compiled `hidden`
        pooled = hidden.float().mean((0, 1))
        centred = pooled - pooled.mean()
        return (centred / (centred.square().mean().sqrt() + 1e-6)).cpu().numpy().astype(np.float32)

    def surgeries(self, actions: np.ndarray) -> Tensor:
        """Actions (M, size) in [−1, 1] as shares of the singular values: (M, L, r), within ±LIMIT."""
        shares = torch.from_numpy(np.clip(actions, -1, 1).astype(np.float32)) * LIMIT
        return shares.view(-1, len(self.layers), self.settings.rank).to(self.model.wte.weight.device)

    @torch.no_grad()
    def evaluate(self, scene: Scene, actions: np.ndarray) -> Evaluation:
        """Rewards of actions (M, size), all in one batch with the unoperated model."""
        candidates = self.surgeries(actions)
        with_none = torch.cat((torch.zeros_like(candidates[:1]), candidates))  # (M + 1, L, r)
        with evaluating(self.model), self.autocast():
            text = self.settings.reward == "text"
            terms = self._text(scene, with_none) if text else self._one_token(scene, with_none)
        differences = {name: (term - term[:1])[1:].cpu().numpy() for name, term in terms.items()}
        return Evaluation(differences.pop("total"), differences)

    def _one_token(self, scene: Scene, candidates: Tensor) -> dict[str, Tensor]:
        """Mean log-probability of the token that followed each prompt: (M + 1,)."""
        count, prompts = len(candidates), len(scene.prompts)
        rows = candidates.repeat_interleave(prompts, 0)
        logits = batched_logits(self.model, self.operator, rows, scene.prompts.repeat(count, 1), last_only=True)
        log_pi = logits.double().log_softmax(-1)
        likelihood = log_pi.gather(-1, scene.gold.repeat(count)[:, None]).view(count, prompts).mean(1)
        return {"total": likelihood, "likelihood": likelihood}

    def _text(self, scene: Scene, candidates: Tensor) -> dict[str, Tensor]:
        """The quality of what each candidate writes after the prompts, averaged over them: (M + 1,) each."""
        assert self.judge is not None
        count, prompts, s = len(candidates), len(scene.prompts), self.settings
        texts = batched_generate(
            self.model,
            self.operator,
            candidates.repeat_interleave(prompts, 0),
            scene.prompts.repeat(count, 1),
            s.new_tokens,
            seed=scene.seed,
            streams=list(range(prompts)) * count,
            temperature=s.temperature,
        )
        quality = self.judge.quality(scene.prompts.repeat(count, 1), texts)
        return {name: term.view(count, prompts).mean(1) for name, term in quality._asdict().items()}


def spaces_of(task: SurgeryTask) -> tuple[Any, Any]:
    """Observations and actions as spaces of gymnasium."""
    box = library("gymnasium").spaces.Box
    width = task.model.config.n_embd
    bound = float(width) ** 0.5  # no standardised number of D is larger
    return box(-bound, bound, (width,), np.float32), box(-1.0, 1.0, (task.size,), np.float32)


@functools.cache
def single_env_class() -> type:
    """Build SurgeryEnv, now that gymnasium is needed."""
    gymnasium = library("gymnasium")

    class SurgeryEnv(gymnasium.Env):  # type: ignore[name-defined,misc]
        """One candidate surgery a step, one step an episode (DESIGN section 9)."""

        metadata: ClassVar[dict[str, Any]] = {"render_modes": []}

        def __init__(self, task: SurgeryTask) -> None:
            self.task = task
            self.observation_space, self.action_space = spaces_of(task)
            self.scene: Scene | None = None

        def reset(
            self, *, seed: int | None = None, options: dict[str, Any] | None = None
        ) -> tuple[np.ndarray, dict[str, Any]]:
            """Draw a scene; options {"scene": …} gives one instead."""
            super().reset(seed=seed)
            given = (options or {}).get("scene")
            self.scene = self.task.draw([int(self.np_random.integers(2**31))]) if given is None else given
            return self.task.observe(self.scene), {}

        def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
            """The reward of one action; the episode is over."""
            if self.scene is None:
                raise RuntimeError("reset the environment first: an episode is one step")
            found = self.task.evaluate(self.scene, np.asarray(action)[None])
            terms = {name: float(values[0]) for name, values in found.terms.items()}
            return self.task.observe(self.scene), float(found.rewards[0]), True, False, terms

    return SurgeryEnv


@functools.cache
def batched_env_class() -> type:
    """Build BatchedSurgeryVecEnv, now that stable-baselines3 is needed."""
    vec_env = library("stable_baselines3.common.vec_env")

    class BatchedSurgeryVecEnv(vec_env.VecEnv):  # type: ignore[name-defined,misc]
        """M environments that share a scene and are evaluated in one batch.

        `key` decides the next reset's scene. Rewards are multiplied by `reward_scale`; `latest` keeps the actions
        and what they got unscaled.
        """

        def __init__(self, task: SurgeryTask, count: int, reward_scale: float = 1.0) -> None:
            self.task, self.reward_scale, self.key = task, reward_scale, [0]
            self.scene: Scene | None = None
            self.latest: tuple[np.ndarray, Evaluation] | None = None
            self.render_mode = None
            super().__init__(count, *spaces_of(task))

        def reset(self) -> np.ndarray:
            """Draw the scene of `key`: its observation, once for each candidate."""
            self.scene = self.task.draw(self.key)
            self.seen = np.repeat(self.task.observe(self.scene)[None], self.num_envs, 0)
            return self.seen

        def step_async(self, actions: np.ndarray) -> None:
            assert self.scene is not None
            self.latest = np.array(actions), self.task.evaluate(self.scene, actions)

        def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]:
            assert self.latest is not None
            rewards = (self.reward_scale * self.latest[1].rewards).astype(np.float32)
            infos = [{"terminal_observation": seen} for seen in self.seen]
            return self.seen, rewards, np.ones(self.num_envs, dtype=bool), infos

        def close(self) -> None:
            """Nothing is open."""

        def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
            return [getattr(self, attr_name)] * len(list(self._get_indices(indices)))

        def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
            setattr(self, attr_name, value)

        def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
            return [getattr(self, method_name)(*args, **kwargs)] * len(list(self._get_indices(indices)))

        def env_is_wrapped(self, wrapper_class: type, indices: Any = None) -> list[bool]:
            return [False] * len(list(self._get_indices(indices)))

    return BatchedSurgeryVecEnv


def __getattr__(name: str) -> Any:
    """SurgeryEnv and BatchedSurgeryVecEnv: subclasses of optional libraries, made when first asked for."""
    makers = {"SurgeryEnv": single_env_class, "BatchedSurgeryVecEnv": batched_env_class}
    if name in makers:
        return makers[name]()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
