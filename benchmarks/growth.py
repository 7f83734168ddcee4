"""How the cost grows: the fused loss over V, N and k, the whole step over the model's size, as ratio and in ms.

The loss is the one from hidden states, in the type that training chooses here; the step is that of the n-gram critic
on tinyshakespeare.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from benchmarks.loss import Inputs, Problem, both_ways
from benchmarks.step import step_arm
from benchmarks.table import Table
from benchmarks.timing import Arm, Conditions, forget_compiled, measure, settle
from benchmarks.trainers import Shape, read_text, trainer

ENTROPY, OURS = "cross-entropy", "AvataRL"
VOCABULARY, DECISIONS, PROPOSALS, PARAMETERS = (
    "vocabulary V",
    "decisions N",
    "proposals k",
    "parameters",
)


@dataclass(frozen=True)
class Grid:
    """The values of each axis; the loss's others stay those of `problem`."""

    problem: Problem = Problem(vocab=8192)  # noqa: RUF009 - frozen
    vocabularies: Sequence[int] = (65, 1024, 8192, 50304)
    decisions: Sequence[int] = (256, 1024, 4096)
    proposals: Sequence[int] = (1, 4, 16, 64)
    shapes: Sequence[Shape] = (
        Shape(2, 64, 2, 128, 8),
        Shape(4, 128, 4, 128, 8),
        Shape(4, 256, 4, 128, 8),
        Shape(6, 384, 6, 128, 8),
    )
    corpus: str = "tinyshakespeare"

    @property
    def problems(self) -> list[tuple[str, int, Problem]]:
        """(axis, value, sizes) of every loss."""
        over_v = [(VOCABULARY, v, replace(self.problem, vocab=v)) for v in self.vocabularies]
        over_n = [(DECISIONS, n, replace(self.problem, n=n)) for n in self.decisions]
        over_k = [(PROPOSALS, k, replace(self.problem, k=k)) for k in self.proposals]
        return over_v + over_n + over_k


def tables(conditions: Conditions, grid: Grid | None = None) -> Iterator[Table]:
    """A table of two arms for each point; `facts` say which axis it lies on and where."""
    grid = grid or Grid()
    hardware, precision = settle(conditions)
    share = 1 / (len(grid.problems) + len(grid.shapes))
    for axis, value, problem in grid.problems:
        forget_compiled()
        inputs = Inputs(replace(problem, dtype=hardware.dtype), conditions)
        leaves, flops = [inputs.hidden, inputs.unembedding], 6.0 * problem.n * problem.vocab * problem.width
        ce, ours = both_ways(inputs.cross_entropy, leaves), both_ways(lambda inputs=inputs: inputs.fused(0.01), leaves)  # type: ignore[misc]
        arms = [
            Arm(ENTROPY, ce, flops=flops, dtype=hardware.dtype, precision=precision),
            Arm(OURS, ours, [ENTROPY], flops, hardware.dtype, precision),
        ]
        table = measure(f"Loss over {axis}: {value:,} ({problem}, D {problem.width})", arms, conditions, share=share)
        table.facts = {"axis": axis, "value": value, "of": f"head, loss and backward; otherwise {grid.problem}"}
        yield table
    for shape in grid.shapes:
        yield step_of(shape, grid.corpus, conditions, share)


def step_of(shape: Shape, corpus: str, conditions: Conditions, share: float) -> Table:
    """The whole step of one model size."""
    forget_compiled()
    dataset = read_text(corpus, "char", shape.block)
    hardware, precision = settle(conditions)
    ours = shape.config(conditions, train={"objective": "avatarl"}, critic={"kind": "ngram"})
    made = [trainer(config, dataset, hardware, conditions) for config in (shape.config(conditions), ours)]
    arms = [step_arm(ENTROPY, made[0], precision), step_arm(OURS, made[1], precision, ENTROPY)]
    table = measure(f"Step of {shape}", arms, conditions, share=share)
    parameters = made[0].job.objective.student.parameter_count()
    what = f"whole step, T {shape.block}, batch {shape.batch}, vocabulary {dataset.tokenizer.vocab_size}, n-gram critic"
    table.facts = {"axis": PARAMETERS, "value": parameters, "of": what, "shape": vars(shape)}
    return table
