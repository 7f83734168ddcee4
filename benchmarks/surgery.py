"""Evaluating candidate surgeries: one batch, in place in a theatre, and on clones; time and memory.

The model is GPT-2's shape with random weights. Every arm evaluates the same candidates and gets the same numbers, with
the singular vectors at hand; only the last position goes through the head.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.memory import held_bytes
from benchmarks.table import Table, quartiles
from benchmarks.timing import Arm, Conditions, measure, settle
from benchmarks.trainers import new_model
from config import ModelConfig
from generation import next_logits
from model import GPT
from reporting.numbers import fixed
from surgery.corrections import batched_generate, batched_logits, corrected
from surgery.operation import LIMIT, Operator
from surgery.theater import SurgicalTheater

CLONE, IN_PLACE, BATCH = "clone, operate, discard", "operate in place, in a theatre", "one batch"
LARGEST_ERROR = 1e-5  # of a reward in float32, relative to the largest
FEWEST_EQUAL = 0.9  # of the texts: where two tokens' draws lie within rounding, one may part


@dataclass(frozen=True)
class Case:
    """What is evaluated."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """GPT-2 with 124 M parameters."""
    vocab: int = 50257
    layers: tuple[int, ...] = (10, 11)
    rank: int = 8
    candidates: int = 32
    context: int = 32
    """Tokens of each context."""
    new: int = 8
    """Tokens that each candidate writes."""

    def flops(self, shared: bool, batch: bool) -> float:
        """FLOPs of the products with the blocks' weights; one batch shares those in front for equal contexts."""
        alone = min(self.layers) if shared and batch else 0  # blocks that run on one context for all
        passes = alone + (self.model.n_layer - alone) * self.candidates
        return 2.0 * 12 * self.model.n_embd**2 * self.context * passes


class Ward:
    """A model, its operator, and what the candidates are to be evaluated on."""

    def __init__(self, case: Case, conditions: Conditions) -> None:
        hardware, self.precision = settle(conditions, dtype="float32", compile="off")
        self.case, self.device, self.seed = case, conditions.device, conditions.seed
        self.model = new_model(case.model, case.vocab, conditions.seed, hardware).eval()
        self.operator = Operator(self.model, case.layers, case.rank)
        self.operator.directions()
        draw = torch.Generator().manual_seed(conditions.seed)
        shape = (case.candidates, *self.operator.shape)
        self.actions = (LIMIT * (2 * torch.rand(shape, generator=draw) - 1)).to(self.device)  # (M, L, r)
        window = torch.randint(case.vocab, (case.candidates, case.context + 1), generator=draw).to(self.device)
        self.tokens, self.gold = window[:, :-1], window[:, -1]  # (M, T), (M,)

    def contexts(self, shared: bool) -> tuple[Tensor, Tensor]:
        """A context and its gold token for every candidate: (M, T), (M,)."""
        rows = torch.zeros_like(self.gold) if shared else torch.arange(len(self.gold), device=self.device)
        return self.tokens[rows], self.gold[rows]

    @torch.no_grad()
    def cloned(self, evaluate: Callable[[GPT, int], Tensor]) -> Tensor:
        """Each candidate on a model of its own."""
        found = []
        for i, action in enumerate(self.actions):
            twin = self.model.clone()
            self.operator.of(twin).apply(action)
            found.append(evaluate(twin, i))
        return torch.cat(found)

    @torch.no_grad()
    def in_place(self, evaluate: Callable[[GPT, int], Tensor]) -> Tensor:
        """Each candidate in the model itself, which is restored after each."""
        found = []
        for i, action in enumerate(self.actions):
            with SurgicalTheater(self.model, self.operator.layers):
                self.operator.apply(action)
                found.append(evaluate(self.model, i))
        return torch.cat(found)

    def held(self) -> dict[str, int | None]:
        """Bytes held while candidates are evaluated, beside the model; corrections with their singular vectors."""

        @contextlib.contextmanager
        def corrections() -> Iterator[object]:
            operator = Operator(self.model, self.operator.layers, self.operator.rank)
            with corrected(operator, self.actions):
                yield operator

        ways: dict[str, Callable[[], Any]] = {
            CLONE: lambda: contextlib.nullcontext(self.model.clone()),
            IN_PLACE: lambda: SurgicalTheater(self.model, self.operator.layers),
            BATCH: corrections,
        }
        return {name: held_bytes(way, self.device) for name, way in ways.items()}


def log_likelihood(logits: Tensor, gold: Tensor) -> Tensor:
    """The reward for a next token: log π of gold, (M, V), (M,) → (M,)."""
    return logits.log_softmax(-1).gather(-1, gold[:, None])[:, 0]


def tables(conditions: Conditions, case: Case | None = None) -> Iterator[Table]:
    """The next token after one context for all and after one for each, then whole texts."""
    ward = Ward(case or Case(), conditions)
    yield next_token(ward, conditions, shared=True)
    yield next_token(ward, conditions, shared=False)
    yield text(ward, conditions)


def next_token(ward: Ward, conditions: Conditions, shared: bool) -> Table:
    """Rewards for the next token, three ways."""
    case, (tokens, gold) = ward.case, ward.contexts(shared)

    def one(model: GPT, i: int) -> Tensor:
        return log_likelihood(next_logits(model, tokens[i : i + 1], None), gold[i : i + 1])

    def batch() -> Tensor:
        given = tokens[:1] if shared else tokens
        return log_likelihood(batched_logits(ward.model, ward.operator, ward.actions, given, last_only=True), gold)

    what = "one context for all" if shared else "a context for each"
    title = f"Surgery, {case.candidates} candidates, next token after {case.context}: {what}"
    ways = {CLONE: lambda: ward.cloned(one), IN_PLACE: lambda: ward.in_place(one), BATCH: batch}
    timed, latest = arms(ward, ways)
    for arm in timed:
        arm.flops = case.flops(shared, arm.name == BATCH)
    table = measure(title, timed, conditions, share=0.35)
    if any(row.failed for row in table.rows):
        table.failed = "a way to evaluate did not run"
        return described(table, case)
    error = ((latest[BATCH] - latest[IN_PLACE]).abs().max() / latest[IN_PLACE].abs().max()).item()
    if not error <= LARGEST_ERROR:
        table.failed = f"one batch is not what operating one by one gives: relative error {error:.1e}"
    start = min(case.layers) if shared else 0
    table.notes.append(f"largest error of a reward against operating in place, relative: {error:.1e}")
    if start:
        table.notes.append(f"one batch computes the {start} blocks in front of the first operated one once for all")
    table.notes += held_notes(ward, table) if shared else [bound_note(table)]
    return described(table, case)


def bound_note(table: Table) -> str:
    """How fast one batch could be at best: contexts that differ leave nothing to share but the weights."""
    batch, in_place = table.row(BATCH), table.row(IN_PLACE)
    least = batch.flops / batch.peak
    bound = quartiles(in_place.seconds)[1] / least
    return (
        f"every way multiplies {batch.flops / 1e9:,.0f} GFLOP: at this machine's measured peak {fixed(least, 2)} s, so "
        f"that nothing which does could be more than {fixed(bound, 1)} times as fast as: {IN_PLACE}"
    )


def text(ward: Ward, conditions: Conditions) -> Table:
    """Texts with the same random numbers, in place and in one batch."""
    case, nothing = ward.case, torch.zeros_like(ward.actions[:1])
    prompt = ward.tokens[:1]

    def one(model: GPT, i: int) -> Tensor:  # the zero action: as it stands
        return batched_generate(model, ward.operator, nothing, prompt, case.new, seed=ward.seed)

    def batch() -> Tensor:
        return batched_generate(ward.model, ward.operator, ward.actions, prompt, case.new, seed=ward.seed)

    title = f"Surgery, {case.candidates} candidates write {case.new} tokens after {case.context}"
    timed, latest = arms(ward, {IN_PLACE: lambda: ward.in_place(one), BATCH: batch})
    table = measure(title, timed, conditions, share=0.3)
    if any(row.failed for row in table.rows):
        table.failed = "a way to evaluate did not run"
        return described(table, case)
    equal = (latest[BATCH] == latest[IN_PLACE]).all(-1).double().mean().item()
    if equal < FEWEST_EQUAL:
        table.failed = f"only {equal:.0%} of the texts are those of operating one by one"
    table.notes.append(f"{equal:.0%} of the texts are equal")
    table.unit, table.work = "tokens", case.candidates * case.new
    return described(table, case)


def arms(ward: Ward, ways: dict[str, Callable[[], Tensor]]) -> tuple[list[Arm], dict[str, Tensor]]:
    """Arms of one table, and what each came to in its latest call; one batch is compared with every other."""
    latest: dict[str, Tensor] = {}

    def kept(name: str) -> Callable[[], None]:
        def unit() -> None:
            latest[name] = ways[name]()

        return unit

    others = [name for name in ways if name != BATCH]
    baselines = {name: others[:1] if name != others[0] else [] for name in others} | {BATCH: others}
    return [Arm(name, kept(name), baselines[name], precision=ward.precision) for name in ways], latest


def held_notes(ward: Ward, table: Table) -> list[str]:
    """What an evaluation holds, as a share of what a clone does."""
    held = ward.held()
    table.facts["held"] = held
    clone = held[CLONE]
    if clone is None:
        return ["what is held for an evaluation is not told by this system"]
    notes = [f"held for an evaluation, measured: a clone {clone / 1e6:,.1f} MB"]
    for name, what in ((IN_PLACE, "a theatre's copies"), (BATCH, "all corrections, singular vectors included,")):
        count = held[name] or 0
        notes.append(f"held for an evaluation, measured: {what} {count / 1e6:,.3f} MB, {count / clone:.3%} of a clone")
    return notes


def described(table: Table, case: Case) -> Table:
    """The table with its sizes, and how many times as fast one batch is."""
    for name in table.row(BATCH).baselines:
        _, ratio, _ = quartiles(table.ratios(BATCH, name))
        table.notes.append(f"one batch is {fixed(1 / ratio, 1)} times as fast as: {name}")
    table.facts |= asdict(case)
    return table
