"""Benchmarks that are over in a moment: tiny shapes, few rounds, a generated text."""

from pathlib import Path

import torch

from benchmarks.timing import Conditions
from benchmarks.trainers import Shape

TINY = Shape(layers=1, width=16, heads=2, block=16, batch=4)


def conditions(scratch: Path, **changes) -> Conditions:
    """Three rounds on one thread."""
    return Conditions(torch.device("cpu"), scratch, **{"rounds": 3, "seconds": 0.0, "threads": 1} | changes)
