"""How processes share a step's sequences: the batch is the same for any number of them, and so is what fits at once.

`train.grad-accum` cuts the batch into micro-batches for one process. Several processes keep the size of a micro-batch
as a limit, not their number: with twice as many, each accumulates half as often, and where a machine is lost the
others accumulate more instead of running out of memory. Source: DESIGN section 3.5.
"""

from config import TrainConfig, require


def fewest_parts(share: int, largest: int) -> int:
    """Into how few equal parts of at most `largest` sequences (at least 1) a share of them can be cut."""
    return next(parts for parts in range(1, share + 1) if share % parts == 0 and share // parts <= largest)


def micro_batches(train: TrainConfig, processes: int) -> int:
    """How many micro-batches each of so many processes makes of its share of a step.

    Raises ConfigError for a batch that they cannot share, with the nearest ones that they can.
    """
    batch = train.batch_size
    below = batch // processes * processes
    near = f"{below} or {below + processes}" if below else str(processes)
    fix = f"does not divide among {processes} processes, as {near} would; change it, or use other numbers of processes"
    require(batch % processes == 0, "train.batch-size", batch, fix)
    return fewest_parts(batch // processes, batch // train.grad_accum)


def rows_of(train: TrainConfig, rank: int, processes: int) -> list[tuple[int, int]]:
    """The (first, behind the last) rows of the batch that each micro-batch of process `rank` has, in order."""
    share = train.batch_size // processes
    micro = share // micro_batches(train, processes)
    return [(begin, begin + micro) for begin in range(rank * share, (rank + 1) * share, micro)]
