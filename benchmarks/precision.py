"""The cross-entropy step in float32, in PyTorch's "medium" float32, in bfloat16, and compiled.

Compilation is cold, nothing cached: its time is that of the first call beyond the median step.
"""

import contextlib
from collections.abc import Iterator, Sequence

import torch

from benchmarks.step import step_arm
from benchmarks.table import Table, quartiles
from benchmarks.timing import Arm, Conditions, forget_compiled, measure, settle
from benchmarks.trainers import Shape, read_text, trainer
from data.prepare import Dataset

SHAPES = (Shape(4, 128, 4, 64, 12), Shape(6, 384, 6, 256, 8))
EXACT = "float32"
EAGER = {
    EXACT: ("float32", "highest"),
    "float32, medium": ("float32", "medium"),
    "bfloat16": ("bfloat16", ""),
}


def tables(
    conditions: Conditions,
    shapes: Sequence[Shape] = SHAPES,
    compiled: bool = True,
    corpus: str = "tinyshakespeare",
) -> Iterator[Table]:
    """A table for each shape; `compiled` adds the arm that is compiled, where a compiler is there."""
    for shape in shapes:
        dataset = read_text(corpus, "char", shape.block)
        arms, notes = eager(shape, dataset, conditions), list[str]()
        if compiled:
            hardware, precision = settle(conditions, compile="on")
            chosen = str(hardware.dtype).removeprefix("torch.")
            if hardware.compile:
                forget_compiled()
                made = trainer(shape.config(conditions), dataset, hardware, conditions)
                arms.append(step_arm(f"{chosen}, compiled", made, precision, chosen))
            else:
                notes.append(f"{chosen}, compiled: left out ({hardware.notes[-1]})")
        with nothing_cached():
            table = measure(f"Precision of the step, {shape}", arms, conditions, share=1 / len(shapes))
        table.unit, table.work, table.reference = "tokens", shape.tokens, EXACT
        table.facts = {"shape": vars(shape), "vocab_size": dataset.tokenizer.vocab_size}
        for row in table.rows:
            if row.name.endswith("compiled") and row.seconds and row.first_seconds is not None:
                notes.append(f"compiling took {row.first_seconds - quartiles(row.seconds)[1]:.1f} s")
        table.notes = notes
        yield table


def eager(shape: Shape, dataset: Dataset, conditions: Conditions) -> list[Arm]:
    """The ways to make the products without compiling."""
    arms = []
    for name, (dtype, wanted) in EAGER.items():
        hardware, precision = settle(conditions, dtype, "off", wanted)
        made = trainer(shape.config(conditions), dataset, hardware, conditions)
        arms.append(step_arm(name, made, precision, *([] if name == EXACT else [EXACT])))
    return arms


@contextlib.contextmanager
def nothing_cached() -> Iterator[None]:
    """Within the block torch.compile neither reads nor writes its caches on disk."""
    settings = torch.compiler.config
    before = settings.force_disable_caches
    settings.force_disable_caches = True
    try:
        yield
    finally:
        settings.force_disable_caches = before
