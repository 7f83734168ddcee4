"""What every script's command line has in common: parsing with tyro, errors in one line, exit codes.

Exit codes: 0 done, 2 usage or settings, 1 a failed run, 130 and 143 stopped by Ctrl-C and SIGTERM.
"""

import contextlib
import io
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, TextIO, TypeVar

import tyro

from config import ConfigError

Command = TypeVar("Command")


def parse(
    kind: type[Command], words: Sequence[str], *, prog: str, description: str, default: Command | None = None
) -> Command:
    """Command-line words as an instance of the dataclass `kind`, whose docstrings are the help.

    Exits with 2 and a message for an unknown flag; raises ConfigError for a value that the dataclass refuses.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            parsed: Command = tyro.cli(
                kind,
                args=list(words),
                default=default,
                prog=prog,
                description=description,
            )  # type: ignore[assignment]
    except SystemExit as end:
        refused = refusal(end)
        if refused is not None:  # tyro draws a box around it and breaks its lines
            raise refused from None
        sys.stderr.write(said.getvalue())
        raise
    return parsed


def refusal(error: BaseException) -> ConfigError | None:
    """The ConfigError that led to `error`, if one did."""
    cause = error.__context__
    return cause if cause is None or isinstance(cause, ConfigError) else refusal(cause)


class Outliving:
    """A stream that drops what is written once its reader has gone."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write, or don't."""
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            self._drop()
            return len(text)

    def flush(self) -> None:
        """Send on what was written, or don't."""
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._drop()

    def _drop(self) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def run_main(main: Callable[[Sequence[str]], int | None], *, outlive: bool = False) -> None:
    """Call main(arguments) and exit with what it returns, None being 0.

    Whoever closes our output early (`| head`) has seen enough: 0; or, where a main that is to `outlive` its reader has
    work to finish, it goes on unheard. An error that says `leave_at_once` ends the process before anything is freed.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal or pipe that cannot show a character gets a ? for it
            stream.reconfigure(errors="replace")
    if outlive:
        sys.stdout, sys.stderr = Outliving(sys.stdout), Outliving(sys.stderr)  # type: ignore[assignment]
    try:
        code = main(sys.argv[1:]) or 0
        sys.stdout.flush()
    except ConfigError as error:
        code = report(error, 2)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more
        code = 0
    except (RuntimeError, OSError) as error:
        code = report(error, 1)
        if getattr(error, "leave_at_once", False):
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)


def report(error: Exception, code: int) -> int:
    """Print the error's line on stderr; give back the exit code."""
    print(f"error: {error}", file=sys.stderr)
    return code
