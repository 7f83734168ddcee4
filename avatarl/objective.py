"""Objectives: what a training step minimises, as modules whose forward returns the loss.

An objective holds the student (and whatever else trains or travels in a checkpoint beside it), so that DDP or
FSDP2 can wrap it and see every parameter used. The loop calls `forward` once per micro-batch and `after_step`
once per optimiser step, and knows nothing else. CrossEntropy is for critics and baselines.
"""

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avatarl.cache import CachedOpinion
from avatarl.contexts import keyed_uniform, replace_context, sample_actions
from avatarl.critics import Autocast, Critic, CriticOpinion, PastCritic, model_opinion
from avatarl.imagination import Imagination
from avatarl.loss import LossSettings, fused_avatarl_loss, group_loss, judge
from avatarl.metrics import MetricSums, policy_metrics
from avatarl.schedules import Schedules
from avatarl.trust import Trust
from config import MethodConfig
from data.batches import Batch
from model import GPT

# Logits of one chunk of the fused loss: 32 MB in float32 on a CPU; on a GPU fewer, larger launches.
CHUNK_ELEMENTS = {"cpu": 2**23, "cuda": 2**27}


class CrossEntropy(nn.Module):
    """Pretraining: the mean negative log-likelihood of the token that came next.

    `label_smoothing`, in [0, 1), spreads that share of each target evenly over the vocabulary.
    """

    inner_epochs = 1

    def __init__(self, student: GPT, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.student, self.label_smoothing = student, label_smoothing

    def forward(
        self, batch: Batch, step: int, rollout: dict[str, Any], measure: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        logits, gold = self.student(batch.tokens).flatten(0, 1).float(), batch.targets.flatten()  # (N, V), (N,)
        loss = F.cross_entropy(logits, gold, label_smoothing=self.label_smoothing)
        return loss, policy_metrics(logits.detach(), gold) if measure else {}

    def after_step(self, step: int) -> None:
        """Nothing follows the student here."""

    def flops_per_token(self) -> float:
        """Matrix-product FLOPs of a training step, per token."""
        return 3 * self.student.flops_per_token()


class AvataRL(nn.Module):
    """Next-token prediction as a game: action set, consensus, reward, REINFORCE (DESIGN section 3).

    `critic` judges, at `critic_flops` per token; without one, `past` (the student's EMA or ring) or `twin` (a
    second student, which learns by the same rules with the first as its critic) does. A `past` beside a critic is
    a member of that ensemble, and follows the student. `trust` lowers the critic's weight where it is known to be
    poor. Past and twin are part of the checkpoint; a frozen critic and its trust are not.
    """

    def __init__(
        self,
        student: GPT,
        method: MethodConfig,
        *,
        steps: int,
        seed: int,
        critic: Critic | None = None,
        past: PastCritic | None = None,
        twin: GPT | None = None,
        critic_flops: float | None = None,
        autocast: Autocast = nullcontext,
        trust: Trust | None = None,
        imagination: Imagination | None = None,
    ) -> None:
        super().__init__()
        if critic_flops is None:
            critic_flops = student.flops_per_token() if critic is None else 0.0
        critic = past if critic is None else critic
        if (critic is None) == (twin is None):
            raise ValueError("AvataRL needs either a critic (the student's past is one) or a twin")
        self.student, self.past, self.twin = student, past, twin
        self.method, self.seed, self.autocast, self.trust = method, seed, autocast, trust
        self.imagination = imagination
        self._critics, self._critic_flops = (critic,), critic_flops  # in a tuple: `past` is not registered twice
        self.inner_epochs = method.inner_epochs
        device = student.wte.weight.device
        self.schedules = Schedules(method, steps, device)
        self.chunk_size = max(1, CHUNK_ELEMENTS.get(device.type, 2**23) // student.vocab_size)

    def settings(self, step: int) -> LossSettings:
        """The loss's settings at `step`, scheduled weights as 0-d tensors."""
        return self.schedules.settings(step, self.trust)

    def forward(
        self, batch: Batch, step: int, rollout: dict[str, Any], measure: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of one micro-batch; `rollout` keeps what later inner epochs need of the first."""
        if self.past is not None:
            self.past.step = step
        if self.twin is not None:
            mine, theirs = rollout.setdefault("student", {}), rollout.setdefault("twin", {})
            loss, metrics = self.learn(self.student, self.twin, batch, step, mine, measure)
            twin_loss, _ = self.learn(self.twin, self.student, batch, step, theirs, False)
            return loss + twin_loss, metrics
        return self.learn(self.student, None, batch, step, rollout, measure)

    def learn(
        self,
        player: GPT,
        rival: GPT | None,
        batch: Batch,
        step: int,
        rollout: dict[str, Any],
        measure: bool,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """One player's loss, judged on the contexts that it reads by its rival; None: by the run's critic."""
        settings, tokens, gold = self.settings(step), batch.tokens, batch.targets.flatten()
        if self.method.context == "student":
            if "tokens" not in rollout:
                rollout["tokens"] = self.student_context(player, rival, batch, settings, step)
            tokens = rollout["tokens"]
        opinion = None if "judged" in rollout else self.ask(tokens, batch.positions, rival, batch.judged)
        if self.imagination is not None and (count := self.schedules.imagined_windows(step)):
            return self.with_imagined(player, opinion, batch, count, settings, measure)
        hidden = player.hidden(tokens).flatten(0, 1)  # (N, D)
        if self.method.advantage == "group":
            return self.group(hidden @ player.unembedding.T, opinion, gold, settings, rollout, measure)
        return self.scored(hidden, player, opinion, gold, settings, measure)

    def scored(
        self,
        hidden: Tensor,
        player: GPT,
        opinion: CriticOpinion | None,
        gold: Tensor,
        settings: LossSettings,
        measure: bool,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean loss of a player's hidden states (N, D), and its metrics."""
        return fused_avatarl_loss(
            hidden,
            player.unembedding,
            opinion,
            gold,
            settings=settings,
            chunk_size=self.chunk_size,
            measure=measure,
        )

    def with_imagined(
        self,
        player: GPT,
        opinion: CriticOpinion | None,
        batch: Batch,
        count: int,
        settings: LossSettings,
        measure: bool,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean loss over the batch's windows and `count` imagined ones beside each; metrics of the batch's own."""
        assert self.imagination is not None
        length = batch.tokens.shape[1]
        imagined = self.imagination.windows(batch.first, batch.indices, count, length)
        hidden = player.hidden(torch.cat((batch.tokens, imagined.tokens))).flatten(0, 1)  # ((1 + count) · N, D)
        real, other = hidden.split((batch.tokens.numel(), imagined.tokens.numel()))
        loss, metrics = self.scored(real, player, opinion, batch.targets.flatten(), settings, measure)
        if self.method.imagined_judge == "critic":
            settings = settings._replace(reality_weight=0.0, critic_weight=1.0, trust=None)
        beside, seen = self.scored(other, player, imagined.opinion, imagined.written.flatten(), settings, measure)
        if measure:
            metrics["imagination/critic_kl"] = seen["train/critic_kl"]
        return (loss + count * beside) / (1 + count), metrics

    def ask(
        self,
        tokens: Tensor,
        positions: Tensor | None,
        rival: GPT | None = None,
        judged: tuple[Tensor, Tensor] | None = None,
    ) -> CriticOpinion:
        """The opinion on tokens (B, T) of `rival`, or of whoever judges this run; `judged` is what a cache sent."""
        if rival is not None:
            return model_opinion(rival, tokens, self.autocast)
        if judged is not None:
            return CachedOpinion(judged[0].flatten(0, 1), judged[1].flatten(0, 1), self.student.vocab_size)
        critic = self._critics[0]
        assert critic is not None  # the constructor saw to it; twins are rivals
        return critic.opinion(tokens, positions)

    @torch.no_grad()
    def student_context(
        self, player: GPT, rival: GPT | None, batch: Batch, settings: LossSettings, step: int
    ) -> Tensor:
        """The batch's tokens (B, T) with a share of them replaced by what the player would have picked."""
        opinion = self.ask(batch.tokens, batch.positions, rival)
        logits = player(batch.tokens).flatten(0, 1).float()  # (N, V)
        torch.clear_autocast_cache()  # older PyTorch would reuse weights that were cast here, without their gradient
        actions, _, _ = judge(logits, opinion, batch.targets.flatten(), settings)
        log_pi_a = logits.log_softmax(-1).gather(-1, actions.ids)  # (N, K)
        length = batch.tokens.shape[1]
        draws = [keyed_uniform(self.seed, step, batch.indices, length, stream) for stream in (0, 1)]
        picks = sample_actions(log_pi_a, actions, draws[0].flatten()).view_as(batch.tokens)
        share = self.schedules.at(step)["student_context_share"]
        return replace_context(batch.tokens, picks, draws[1] < share)

    def group(
        self,
        logits: Tensor,
        opinion: CriticOpinion | None,
        gold: Tensor,
        settings: LossSettings,
        rollout: dict[str, Any],
        measure: bool,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """GRPO: actions, rewards and π_old stay those of the first inner epoch, the only one with an opinion."""
        log_pi = logits.float().log_softmax(-1)  # (N, V)
        if opinion is not None:
            actions, critic, reward = judge(log_pi.detach(), opinion, gold, settings)
            old = log_pi.detach().gather(-1, actions.ids)  # (N, K)
            rollout["judged"] = (actions, critic, reward, old)
        actions, critic, reward, old = rollout["judged"]
        now = log_pi.gather(-1, actions.ids)
        loss = group_loss(now, old, reward, actions.valid, clip_ratio=self.method.clip_ratio)
        entropy = -(log_pi.exp() * log_pi).sum(-1).mean()
        metrics = {}
        if measure:
            sums = MetricSums()
            sums.add(log_pi.detach(), actions, critic, reward, settings)
            metrics = sums.means()
        return loss - settings.entropy_coef * entropy, metrics

    def after_step(self, step: int) -> None:
        """Let the student's past follow it after `step` optimiser steps."""
        if self.past is not None:
            self.past.follow(self.student, step)

    def flops_per_token(self) -> float:
        """Matrix-product FLOPs of a training step, per token, the critic's forward included."""
        forward = self.student.flops_per_token()
        looks = 2 if self.method.context == "student" else 1
        players = (1 if self.twin is None else 2) * (1 + self.schedules.mean_imagined_windows)
        return players * ((3 * self.method.inner_epochs + looks - 1) * forward + looks * self._critic_flops)
