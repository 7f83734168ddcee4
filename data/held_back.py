"""Text that is read last: the end of the training text, which a critic of counts doesn't know.

    known = known_tokens(len(train_ids), share=0.1)
    batches = HeldBackBatches(before, after, first_step)        # of train_ids[:known] and of train_ids[known:]

Whatever a student learns of a text and its statistics makes it surer of that text than of a new one. Steps from
`first_step` on read new text alone, in windows whose place in the critic's text is None, as they have none.
"""

from checks import ConfigError
from config import Config
from config_method import first_held_back
from data.batches import Batch, TrainingBatches


def known_tokens(length: int, share: float) -> int:
    """How many of `length` training tokens come before those that are held back, `share` of them."""
    return length - round(share * length)


def check_held_back(length: int, config: Config) -> None:
    """Raise ConfigError where one of the two parts of a text of `length` tokens has not even one window."""
    known, block_size = known_tokens(length, config.held_back), config.row_length
    if config.held_back and min(known, length - known) <= block_size:
        raise ConfigError(
            f"method.held-back = {config.held_back}: it divides {length:,} training tokens into {known:,} and "
            f"{length - known:,}, too few for a window of {block_size + 1}; use another share, or more text"
        )


class HeldBackBatches:
    """The batches of a run: those of `before` for the steps before `first_step`, then those of `after`."""

    def __init__(self, before: TrainingBatches, after: TrainingBatches, first_step: int) -> None:
        self._before, self._after, self._first_step = before, after, first_step

    def batch(self, step: int, start: int = 0, stop: int | None = None) -> Batch:
        """Rows start..stop of the global batch of `step` (0-based); all of them by default."""
        if step < self._first_step:
            return self._before.batch(step, start, stop)
        made = self._after.batch(step - self._first_step, start, stop)
        earlier = self._first_step * self._after.batch_size  # rows of the run
        return made._replace(positions=None, indices=made.indices + earlier, first=made.first + earlier)


def training_batches(tokens, config: Config, cache=None) -> TrainingBatches | HeldBackBatches:  # type: ignore[no-untyped-def]
    """The batches of `config` over the training tokens (L,); `cache`: what a cached critic thinks of them.

    Raises ConfigError as TrainingBatches does.
    """
    of = config.row_length, config.train.batch_size, config.run.seed
    if not config.held_back:
        return TrainingBatches(tokens, *of, cache=cache)
    known = known_tokens(len(tokens), config.held_back)
    first_step = first_held_back(config.train.steps, config.held_back)
    return HeldBackBatches(TrainingBatches(tokens[:known], *of), TrainingBatches(tokens[known:], *of), first_step)
