"""The objective of the bootstrapping experiments: rollout, rewards, loss (DESIGN section 8).

No critic model: rewards come from the corpus, its statistics, and in self-play from a comparison with an opponent.
Every experiment is a setting of this one module:

    exhaustive   −Σ_a r(a) log π(a), or the exact −Σ_a π(a) r(a), or group advantages over all V actions
    sampled      −mean_g min(ρ_g Â_g, clip(ρ_g) Â_g), advantages inside a context's group of G samples
    always       + κ KL(π ‖ bigram) + what the entropy costs outside its band

Decisions last one step (or, with a horizon, H steps whose rewards are summed up to the end): no value network.
Shapes: N contexts, g rows of a context (1, or G with a horizon above 1), V vocabulary, G samples.
"""

from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from avatarl.critics import Autocast, PastCritic
from bootstrap import grpo, metrics, rewards, rollouts, selfplay
from bootstrap.curriculum import Curriculum, frequency_kl
from bootstrap.health import HealthMonitor, measure
from bootstrap.metrics import Metrics
from bootstrap.ngrams import NgramTables
from bootstrap.rollouts import Acting, Decisions
from config_bootstrap import BootstrapConfig
from data.batches import Batch
from model import GPT


class Schedules:
    """The scheduled fields of BootstrapConfig, tabulated once on the run's device."""

    def __init__(self, settings: BootstrapConfig, steps: int, device: torch.device | str) -> None:
        progress, columns = np.linspace(0.0, 1.0, steps), []
        for name in settings.SCHEDULED:
            at, values = zip(*settings.knots(name), strict=True)
            columns.append(np.interp(progress, at, values).astype(np.float32))
        self._names, self._rows = settings.SCHEDULED, torch.from_numpy(np.stack(columns, 1)).to(device)

    def at(self, step: int) -> dict[str, Tensor]:
        """{field: 0-d float32} at `step`; past the end, the last values."""
        return dict(zip(self._names, self._rows[min(step, len(self._rows) - 1)].unbind(), strict=True))


class Bootstrap(nn.Module):
    """Learning from nothing: next-character prediction paid by the corpus and its statistics (DESIGN section 8).

    `tables` hold the n-grams that partial credit, guidance and KL need, `soft` gives the soft signal, `curriculum`
    the stages' rewards. Opponents: `past` copies of the student, or a `twin` that learns by the same rules. Past,
    twin and curriculum are part of the checkpoint.
    """

    def __init__(
        self,
        student: GPT,
        settings: BootstrapConfig,
        *,
        steps: int,
        seed: int,
        tables: NgramTables | None = None,
        soft: rewards.FullCritic | None = None,
        curriculum: Curriculum | None = None,
        past: PastCritic | None = None,
        twin: GPT | None = None,
        autocast: Autocast = nullcontext,
    ) -> None:
        super().__init__()
        self.student, self.past, self.twin, self.curriculum = student, past, twin, curriculum
        self.settings, self.seed, self.tables, self.autocast = settings, seed, tables, autocast
        self._soft, self._credit = soft, None
        if tables is not None and settings.ever("ngram_weight"):
            self._credit = rewards.credit_table(tables, settings.order_weights, settings.credit)
        self.inner_epochs, self.monitor = settings.inner_epochs, HealthMonitor()
        device = student.wte.weight.device
        self.schedules = Schedules(settings, steps, device)
        self.temperatures = rollouts.temperatures(
            settings.temperature_low, settings.temperature_high, settings.samples, device
        )
        self._stage_reward, self._stage_batches = torch.zeros((), device=device), 0
        # Equal on all processes as they are, and some lie on the host whatever the device: DDP need not send them.
        self._ddp_params_and_buffers_to_ignore = [name for name, _ in self.named_buffers()]

    def forward(self, batch: Batch, step: int, rollout: dict[str, Any], measure: bool) -> tuple[Tensor, Metrics]:
        """Loss and metrics of one micro-batch; `rollout` keeps what later inner epochs need of the first."""
        if self.past is not None:
            self.past.step = step
        if self.twin is None:
            return self.learn(self.student, None, batch, step, rollout, measure)
        mine, theirs = rollout.setdefault("student", {}), rollout.setdefault("twin", {})
        loss, measured = self.learn(self.student, self.twin, batch, step, mine, measure)
        twin_loss, _ = self.learn(self.twin, self.student, batch, step, theirs, False)
        return loss + twin_loss, measured

    def learn(
        self, player: GPT, rival: GPT | None, batch: Batch, step: int, rollout: dict[str, Any], measuring: bool
    ) -> tuple[Tensor, Metrics]:
        """One player's loss. The first inner epoch acts and is judged; later ones learn from the same actions."""
        now = self.schedules.at(step)
        acting = Acting(self.temperatures, now["guidance"])
        if not rollout:
            rollout["decisions"], rollout["actions"] = self.explore(player, batch, step, acting)
        decisions: Decisions = rollout["decisions"]
        log_pi = rollouts.log_policy(player, decisions.arrange(rollouts.read(player, decisions.rows)))  # (N, g, V)
        measured: Metrics = {}
        if "reward" not in rollout:
            rollout["bigram"] = self.log_bigram(decisions)  # (N, g, V)
            terms, found = self.judge(decisions, log_pi.detach(), now, player, rival)
            rollout["reward"] = found["reward"]
            if self.settings.rollout == "sampled" and rollout["actions"] is None:
                draws = rollouts.uniform_draws(self.seed, step, batch, self.settings.samples).flatten(0, 1)
                rollout["actions"] = rollouts.sample(log_pi.detach(), rollout["bigram"], acting, draws)  # (N, G)
            if measuring:
                measured = self.measured(log_pi.detach(), terms, found, rollout)
        return self.loss(log_pi, rollout, acting, now["kl_coef"]), measured

    def explore(self, player: GPT, batch: Batch, step: int, acting: Acting) -> tuple[Decisions, Tensor | None]:
        """Where decisions are taken, and with a horizon above 1 the actions (N, G) taken there.

        With a horizon of 1 the actions are drawn from the very pass that learns from them.
        """
        s = self.settings
        if s.horizon == 1:
            return Decisions(batch.tokens, batch.targets, batch.positions), None
        start = rollouts.starts(batch, player.config.block_size, s.horizon, s.samples, self.seed, step)
        went = rollouts.continue_contexts(player, start, acting, self.after)
        several = [t if t is None else t.repeat_interleave(s.samples, 0) for t in (start.targets, start.positions)]
        assert several[0] is not None
        decisions = Decisions(went.rows, several[0], several[1], start.context - 1, s.samples)
        return decisions, went.actions.transpose(1, 2).flatten(0, 1)

    def after(self, tokens: Tensor) -> Tensor | None:
        """The bigram reference's log-probabilities after tokens (N,): (N, V); None where nothing needs it."""
        return None if self.tables is None else self.tables.log_reference(tokens[:, None])

    def log_bigram(self, decisions: Decisions) -> Tensor | None:
        """The same at every decision: (N, g, V)."""
        places = decisions.arrange(decisions.rows)  # (N, g)
        found = self.after(places.flatten())
        return None if found is None else found.unflatten(0, places.shape)

    @torch.no_grad()
    def judge(
        self, decisions: Decisions, log_pi: Tensor, now: dict[str, Tensor], player: GPT, rival: GPT | None
    ) -> tuple[Metrics, Metrics]:
        """The weighted terms of the reward, and {"reward": what is learned from, …}: each (N, g, V)."""
        s, gold = self.settings, decisions.arrange(decisions.targets)  # (N, g)
        terms: Metrics = {}
        if s.ever("exact_weight"):
            terms["exact"] = now["exact_weight"] * rewards.exact_match(gold, log_pi.shape[-1])
        if s.ever("confidence_weight"):
            terms["confidence"] = now["confidence_weight"] * rewards.confidence_bonus(gold, log_pi.exp())
        if self._credit is not None:
            credit = self._credit.for_sequence(decisions.rows, self._credit.longest)
            terms["ngram"] = now["ngram_weight"] * decisions.arrange(credit)
        if self._soft is not None:
            soft = rewards.soft_signal(self._soft, decisions.rows, decisions.positions)
            terms["soft"] = now["soft_weight"] * decisions.arrange(soft)
        if self.curriculum is not None:
            free = s.rollout == "exhaustive" and s.policy_weighting == "reinforce"
            average = None if free else log_pi.exp().mean((0, 1))  # of this micro-batch alone
            terms["stage"] = s.stage_weight * decisions.arrange(self.curriculum.rewards(decisions.rows, average))
            own = decisions.arrange(self.curriculum.own_rewards(decisions.rows, average))
            self._stage_reward += selfplay.value_of(log_pi, own).mean()
            self._stage_batches += 1
        found = {"reward": sum(terms.values(), torch.zeros(()))}
        opponent = rival if rival is not None else selfplay.judging_copy(self.past) if self.past is not None else None
        if opponent is not None:
            theirs = decisions.arrange(rollouts.log_policy_of(opponent, decisions.rows, self.autocast))
            found["value"] = selfplay.value_of(log_pi, found["reward"])  # (N, g)
            found["opponent"] = selfplay.value_of(theirs, found["reward"])
            found["reward"] = selfplay.beating(found["reward"], found["opponent"], now["opponent_weight"])
        return terms, found

    def loss(self, log_pi: Tensor, rollout: dict[str, Any], acting: Acting, kl_coef: Tensor) -> Tensor:
        """The mean over decisions of minus the gain, plus KL and band; log π (N, g, V) → 0-d."""
        s, reward = self.settings, rollout["reward"]
        if not s.uses_ratio:
            gain = grpo.exhaustive_gain(log_pi, reward, s.policy_weighting)  # (N, g)
        else:
            if s.rollout == "sampled":
                now = rollouts.acting_log_probs(log_pi, rollout["bigram"], rollout["actions"], acting)  # (N, G)
            else:
                now = log_pi
            if "old" not in rollout:  # the policy that acted is the one that this pass computes
                rollout["old"], rollout["advantages"] = now.detach(), self.advantages(reward, rollout["actions"])
            gain = grpo.clipped_gain(now, rollout["old"], rollout["advantages"], s.clip_ratio)
            if s.rollout == "exhaustive":
                gain = (rollout["old"].exp() * gain).sum(-1)  # (N, g)
        if s.mask_entropy:
            if "kept" not in rollout:
                rollout["kept"] = grpo.entropy_of(log_pi.detach()) >= s.mask_entropy
            gain = gain * rollout["kept"]
        loss = -gain.mean()
        if s.ever("kl_coef"):
            loss = loss + kl_coef * grpo.kl_to(log_pi, rollout["bigram"]).mean()
        if s.entropy_bonus or s.entropy_penalty:
            entropy = grpo.entropy_of(log_pi)  # (N, g)
            cost = grpo.outside_band(entropy, s.entropy_low, s.entropy_high, s.entropy_bonus, s.entropy_penalty)
            loss = loss + cost.mean()
        return loss

    def advantages(self, reward: Tensor, actions: Tensor | None) -> Tensor:
        """Inside every context's group: of its samples (N, G), or of all V actions (N, 1, V)."""
        if actions is None:
            return grpo.group_advantages(reward)
        return grpo.group_advantages(self.sampled_rewards(reward, actions))

    def sampled_rewards(self, reward: Tensor, actions: Tensor) -> Tensor:
        """What the samples brought, up to their ends: reward (N, g, V) of actions (N, G) → (N, G)."""
        if reward.shape[1] == 1:
            return reward[:, 0].gather(-1, actions)
        brought = reward.gather(-1, actions[..., None])[..., 0]  # (M H, G)
        by_sample = brought.unflatten(0, (-1, self.settings.horizon)).transpose(1, 2)  # (M, G, H)
        return rewards.returns_to_go(by_sample, self.settings.discount).transpose(1, 2).flatten(0, 1)

    def measured(self, log_pi: Tensor, terms: Metrics, found: Metrics, rollout: dict[str, Any]) -> Metrics:
        """What is logged of a step whose actions were just judged."""
        decisions: Decisions = rollout["decisions"]
        gold = decisions.arrange(decisions.targets)  # (N, g)
        said = metrics.of_rewards(log_pi, terms, found["reward"])
        said |= metrics.of_policy(log_pi, gold, rollout["bigram"], self.settings)
        said |= measure(log_pi.flatten(0, 1), gold.flatten())
        if rollout["actions"] is not None:
            brought = self.sampled_rewards(found["reward"], rollout["actions"])
            said |= metrics.of_samples(rollout["actions"], gold, brought)
        if "opponent" in found:
            said |= metrics.of_selfplay(found["value"], found["opponent"])
        if self.curriculum is not None:
            said["bootstrap/stage"] = self.curriculum.stage.float()
            said["bootstrap/frequency_kl"] = frequency_kl(log_pi.flatten(0, 1), self.curriculum.statistics)
        return said

    def after_step(self, step: int) -> None:
        """Let the opponent follow the student, and the curriculum see how its stage went, after `step` steps."""
        if self.past is not None:
            self.past.follow(self.student, step)
        if self.curriculum is not None and self._stage_batches:
            mean = self._stage_reward / self._stage_batches
            if dist.is_initialized():
                dist.all_reduce(mean)
                mean = mean / dist.get_world_size()
            self.curriculum.observe(mean)
            self._stage_reward, self._stage_batches = torch.zeros_like(mean), 0

    def flops_per_token(self) -> float:
        """Matrix-product FLOPs of a training step per token of a row, opponents' forward passes included."""
        players, per_player = rollouts.passes_per_token(self.settings, self.student.config.block_size)
        return players * sum(per_player) * self.student.flops_per_token()

    def rates(self, tokens_per_second: float) -> dict[str, float]:
        """What is logged of the speed, besides tokens a second."""
        return {"bootstrap/decisions_per_second": tokens_per_second * self.decisions_per_token()}

    def decisions_per_token(self) -> float:
        """Decisions that a step judges for each token of a row; every player's count."""
        return rollouts.decisions_per_token(self.settings, self.student.config.block_size)
