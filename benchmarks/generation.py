"""Generation with and without the KV cache, within one block of context."""

from collections.abc import Iterator, Sequence

from benchmarks.table import Table
from benchmarks.timing import Arm, Conditions, measure, settle
from benchmarks.trainers import Shape, new_model
from generation import generate

SHAPES = (Shape(4, 128, 4, 64, 1), Shape(4, 128, 4, 64, 8), Shape(6, 384, 6, 256, 1), Shape(6, 384, 6, 256, 8))
VOCABULARY = 65
WITHOUT = "without a cache"


def tables(conditions: Conditions, shapes: Sequence[Shape] = SHAPES) -> Iterator[Table]:
    """For each shape, whose batch is the number of prompts: an eighth of a block is continued to its end."""
    for shape in shapes:
        length = max(1, shape.block // 8)
        new = shape.block - length
        title = f"Generation, {shape.layers} × {shape.width}, {shape.batch} prompts of {length}, {new} new tokens each"
        table = measure(title, both(shape, length, new, conditions), conditions, share=1 / len(shapes))
        table.unit, table.work, table.reference = "tokens", new * shape.batch, WITHOUT
        table.facts = {"shape": vars(shape), "vocab_size": VOCABULARY, "prompt": length, "new": new}
        yield table


def both(shape: Shape, length: int, new: int, conditions: Conditions) -> list[Arm]:
    """The two ways to draw the same tokens."""
    hardware, precision = settle(conditions, dtype="float32", compile="off")  # as sample.py does it
    model = new_model(shape.model, VOCABULARY, conditions.seed, hardware)
    prompts = [list(range(length))] * shape.batch

    def drawing(use_cache: bool) -> list[list[int]]:
        return generate(model, prompts, new, seed=conditions.seed, use_cache=use_cache)

    return [
        Arm(WITHOUT, lambda: drawing(False), precision=precision),
        Arm("with the KV cache", lambda: drawing(True), [WITHOUT], precision=precision),
    ]
