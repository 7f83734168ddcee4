"""One or several run folders → one self-contained HTML page: curves, samples, configuration.

    python report.py runs/NAME               writes runs/NAME/report.html
    python report.py runs/A runs/B …         compares them in ./report.html
    python report.py runs/A runs/B --out ab.html --open
    python report.py runs/hybrid …           the arms of hybrid.py's runs side by side, with the verdict over them

The page needs no network, and JavaScript only for the values under the pointer. Training calls `write_report`
at the end of every run.
"""

import webbrowser
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from cli import parse, run_main
from config import ConfigError, require
from files import write_atomic
from reporting.page import page
from reporting.read import read_runs
from reporting.surgery import is_hybrid, parts_of, section


@dataclass(frozen=True)
class Settings:
    """One page about a run, or comparing several."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders, such as runs/NAME."""
    out: Path | None = None
    """File to write. Unset: report.html in the run's folder, or for several runs in the current one."""
    open: bool = False
    """Show the page in a browser."""


def write_report(run_folders: Sequence[Path], out: Path) -> Path:
    """Write one page about the runs to `out` and return its path; an older page there is replaced as a whole.

    What is missing or damaged inside a run folder is said on the page. Raises ConfigError for a folder that
    is no run or an `out` that is a folder, OSError where `out` cannot be written (DESIGN sections 6 and 7).
    """
    out = Path(out)
    surgery = [folder for folder in run_folders if is_hybrid(folder)]
    for folder in surgery:
        begun = len(parts_of(folder)) > 0
        require(begun, "run folder", str(folder), "nothing is logged there yet; wait for its first evaluation")
    parts = [part for folder in run_folders for part in (parts_of(folder) if folder in surgery else [folder])]
    text = page(read_runs(parts), section(surgery))
    save_page(out, text, "report")
    return out


def save_page(out: Path, text: str, what: str) -> None:
    """Write a page, a `what`, whole. Raises ConfigError where `out` is a folder, OSError where it cannot be written."""
    if out.is_dir():
        raise ConfigError(f"--out {out} is a folder; name a file, such as {out / f'{what}.html'}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(out, text.encode("utf-8", errors="replace"))
    except OSError as error:
        raise OSError(f"{out}: the {what} cannot be written ({error.strerror}); use --out FILE") from None


def main(arguments: Sequence[str]) -> None:
    """Parse, write, print where. Raises ConfigError or OSError with a line that says what to do."""
    settings = parse(Settings, arguments, prog="report.py", description=__doc__ or "")
    folder = settings.runs[0] if len(settings.runs) == 1 else Path()
    out = write_report(settings.runs, settings.out or folder / "report.html")
    print(out)
    if settings.open:
        webbrowser.open(out.resolve().as_uri())


if __name__ == "__main__":
    run_main(main)
