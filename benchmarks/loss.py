"""The loss alone, forward and backward: AvataRL's against cross-entropy's, from logits and from hidden states.

The critic's log-probabilities (N, V) are given, made outside of the timing; what AvataRL does with them is not: both
top-k, the consensus, the rewards. Shapes: N decisions, V vocabulary, D width, k proposals of each side.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from avatarl.critics import DenseOpinion
from avatarl.loss import LossSettings, fused_avatarl_loss, judge, reinforce_loss
from avatarl.objective import CHUNK_ELEMENTS
from benchmarks.table import Table
from benchmarks.timing import Arm, Conditions, forget_compiled, measure, settle

VOCABULARIES = (65, 1024, 50304)
LARGEST_ERROR = 1e-4  # of a gradient in float32, relative to its largest element


@dataclass(frozen=True)
class Problem:
    """Sizes of one loss."""

    n: int = 1024
    vocab: int = 50304
    width: int = 768
    k: int = 16
    dtype: torch.dtype = torch.float32
    """Of the products from hidden states; logits are float32."""

    def __str__(self) -> str:
        return f"N {self.n:,}, V {self.vocab:,}, k {self.k}"


class Inputs:
    """Random hidden states, unembedding, logits, gold and critic, the same for the same seed."""

    def __init__(self, problem: Problem, conditions: Conditions) -> None:
        device, p = conditions.device, problem
        self.problem = problem
        draw = torch.Generator(device).manual_seed(conditions.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, device=device, generator=draw)

        self.hidden = normal(p.n, p.width).to(p.dtype).requires_grad_()  # (N, D)
        self.unembedding = (normal(p.vocab, p.width) * p.width**-0.5).requires_grad_()  # (V, D)
        self.gold = torch.randint(p.vocab, (p.n,), device=device, generator=draw)  # (N,)
        self.critic = (2 * normal(p.n, p.vocab)).log_softmax(-1)  # (N, V)
        self.mixed = p.dtype != torch.float32
        self.device = device

    def autocast(self) -> AbstractContextManager:
        """The precision of the products, as in training: weights stay float32."""
        return torch.autocast(self.device.type, dtype=self.problem.dtype) if self.mixed else nullcontext()

    def settings(self, entropy_coef: float) -> LossSettings:
        """The published settings, with that β."""
        return LossSettings(
            top_k=self.problem.k,
            reality_weight=0.7,
            critic_weight=0.3,
            epsilon=0.1,
            sparsify="above_mean",
            normalize="cap",
            reward_scale=100.0,
            reward_cap=1.5,
            entropy_coef=entropy_coef,
            policy_weighting="reinforce",
            use_entropy=entropy_coef > 0,
        )

    def leaf_logits(self) -> Tensor:
        """The logits that hidden states and unembedding give, as if they came from elsewhere: (N, V) float32."""
        with torch.no_grad():
            return (self.hidden.float() @ self.unembedding.T).requires_grad_()

    def of_logits(self, logits: Tensor, entropy_coef: float) -> Tensor:
        """AvataRL's loss from logits (N, V)."""
        settings = self.settings(entropy_coef)
        actions, _, reward = judge(logits.detach(), DenseOpinion(self.critic), self.gold, settings)
        return reinforce_loss(
            logits, actions, reward, entropy_coef=entropy_coef, policy_weighting=settings.policy_weighting
        )

    def definition(self, logits: Tensor, entropy_coef: float) -> Tensor:
        """The same, written out for autograd as DESIGN section 3, step 5 has it: what the others must equal."""
        actions, _, reward = judge(logits.detach(), DenseOpinion(self.critic), self.gold, self.settings(entropy_coef))
        log_pi = logits.log_softmax(-1)  # (N, V)
        gain = (reward * actions.valid * log_pi.gather(-1, actions.ids)).sum(-1)  # (N,)
        entropy = -(log_pi.exp() * log_pi).sum(-1)  # (N,)
        return -(gain + entropy_coef * entropy).mean()

    def fused(self, entropy_coef: float) -> Tensor:
        """AvataRL's loss as training takes it, from hidden states."""
        with self.autocast():
            loss, _ = fused_avatarl_loss(
                self.hidden,
                self.unembedding,
                DenseOpinion(self.critic),
                self.gold,
                settings=self.settings(entropy_coef),
                chunk_size=max(1, CHUNK_ELEMENTS[self.device.type] // self.problem.vocab),
                measure=False,
            )
        return loss

    def cross_entropy(self) -> Tensor:
        """Cross-entropy as training takes it, from hidden states."""
        with self.autocast():
            return F.cross_entropy((self.hidden @ self.unembedding.T).float(), self.gold)


def both_ways(loss: Callable[[], Tensor], leaves: list[Tensor]) -> Callable[[], None]:
    """A call that makes the loss and its gradients, and drops both."""

    def run() -> None:
        loss().backward()
        for leaf in leaves:
            leaf.grad = None

    return run


def tables(
    conditions: Conditions, vocabularies: Sequence[int] = VOCABULARIES, n: int = 1024, width: int = 768, k: int = 16
) -> Iterator[Table]:
    """For each vocabulary: from logits, and from hidden states in float32 and bfloat16."""
    _, precision = settle(conditions, dtype="float32")
    share = 1 / (3 * len(vocabularies))
    for vocab in vocabularies:
        forget_compiled()
        problem = Problem(n, vocab, width, k)
        yield from_logits(Inputs(problem, conditions), conditions, share)
        for dtype in (torch.float32, torch.bfloat16):
            yield from_hidden(Inputs(Problem(n, vocab, width, k, dtype), conditions), conditions, share, precision)


def from_logits(inputs: Inputs, conditions: Conditions, share: float) -> Table:
    """Cross-entropy and AvataRL on the same float32 logits."""
    logits = inputs.leaf_logits()
    ce = "F.cross_entropy"
    arms = [
        Arm(ce, both_ways(lambda: F.cross_entropy(logits, inputs.gold), [logits])),
        Arm("AvataRL, β = 0.01", both_ways(lambda: inputs.of_logits(logits, 0.01), [logits]), [ce]),
        Arm("AvataRL, β = 0", both_ways(lambda: inputs.of_logits(logits, 0.0), [logits]), [ce]),
    ]
    table = measure(f"Loss and backward from logits, {inputs.problem}", arms, conditions, share=share)
    return described(table, inputs, "peak memory: above logits, gold and the critic's log-probabilities")


def from_hidden(inputs: Inputs, conditions: Conditions, share: float, precision: str) -> Table:
    """Head and loss: logits with cross-entropy, and the fused loss. `precision` is that of float32 products."""
    p, leaves = inputs.problem, [inputs.hidden, inputs.unembedding]
    kind = str(p.dtype).removeprefix("torch.")
    flops, ce = 6.0 * p.n * p.vocab * p.width, "head + F.cross_entropy"

    def arm(name: str, loss: Callable[[], Tensor], *baselines: str) -> Arm:
        return Arm(name, both_ways(loss, leaves), list(baselines), flops, p.dtype, precision)

    arms = [
        arm(ce, inputs.cross_entropy),
        arm("fused AvataRL, β = 0.01", lambda: inputs.fused(0.01), ce),
        arm("fused AvataRL, β = 0", lambda: inputs.fused(0.0), ce),
    ]
    error = errors(inputs, 0.01)
    title = f"Head, loss and backward from hidden states, {p}, D {p.width}, {kind}"
    table = measure(title, arms, conditions, share=share)
    table.facts["errors"] = error
    said = ", ".join(f"{name} {value:.1e}" for name, value in error.items())
    if p.dtype == torch.float32 and not all(value <= LARGEST_ERROR for value in error.values()):
        table.failed = f"the fused loss is not its definition: {said}, more than {LARGEST_ERROR:g}"
    note = "peak memory: above hidden states, unembedding, gold and the critic's log-probabilities"
    table = described(table, inputs, note)
    table.notes.append(f"largest error of the fused loss against its definition in float32, relative: {said}")
    return table


def errors(inputs: Inputs, entropy_coef: float) -> dict[str, float]:
    """How far the fused loss and its gradients are from the definition in float32, relative to the largest element."""
    leaves = [inputs.hidden, inputs.unembedding]
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    exact = [leaf.detach().float().requires_grad_() for leaf in leaves]
    reference = inputs.definition(exact[0] @ exact[1].T, entropy_coef)
    wanted = [reference.detach(), *torch.autograd.grad(reference, exact)]
    loss = inputs.fused(entropy_coef)
    found = [loss.detach(), *torch.autograd.grad(loss, leaves)]
    torch.set_float32_matmul_precision(before)
    names = ("loss", "gradient of hidden", "gradient of unembedding")
    return {
        name: ((ours.float() - theirs).abs().max() / theirs.abs().max()).item()
        for name, ours, theirs in zip(names, found, wanted, strict=True)
    }


def described(table: Table, inputs: Inputs, note: str) -> Table:
    """The table with its sizes."""
    table.unit, table.work = "decisions", inputs.problem.n
    table.facts |= asdict(inputs.problem) | {"dtype": str(inputs.problem.dtype).removeprefix("torch.")}
    table.notes.append(note)
    return table
