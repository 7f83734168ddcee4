"""What Modal is asked for: image, Volumes, secrets, and the app whose one function makes the attempts."""

import contextlib
import sys
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config import ConfigError
from on_modal.container import CHECKOUT, PLACES, ROOT, VOLUMES, prepare_on_modal, train_on_modal

APP = "avatarl"
PYTHON = "3.11"  # what constraints.txt was tested with
GRACE = 20 * 60  # seconds between an attempt's own end and Modal's timeout: time to save


@dataclass(frozen=True)
class Resources:
    """What one function gets; `gpus` is 0 for a corpus to prepare."""

    gpu: str
    gpus: int
    nodes: int
    hours: float
    retries: int

    @property
    def gpu_request(self) -> str:
        """As Modal writes it: H100:8."""
        return f"{self.gpu}:{self.gpus}"


def require_modal() -> Any:
    """The modal library. Raises ConfigError where it is missing."""
    try:
        import modal
    except ImportError:
        raise ConfigError("modal is not installed; run `.venv/bin/pip install modal`, then `modal setup`") from None
    return modal


@contextlib.contextmanager
def in_one_line() -> Iterator[None]:
    """Within the block what Modal refuses is a RuntimeError, which command lines print as one line."""
    try:
        import modal
    except ImportError:  # then nothing asks it
        yield
        return
    try:
        yield
    except modal.exception.AuthError as error:
        raise RuntimeError(f"Modal knows no account here; run `modal setup` ({first_sentence(error)})") from None
    except modal.Error as error:
        raise RuntimeError(f"Modal: {error}") from None


def first_sentence(error: Exception) -> str:
    """The beginning of its message."""
    return str(error).partition(". ")[0]


def packages() -> list[str]:
    """What the image installs: the project's dependencies and the extras that are of use there."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    return sorted({*project["dependencies"], *(name for extra in ("wandb", "web") for name in extras.get(extra, ()))})


def stays_here(path: Path) -> bool:
    """Whether a file of the checkout, named from its root, is no part of what containers see."""
    hidden = any(part.startswith((".", "__pycache__")) for part in path.parts)
    return hidden or path.suffix not in (".py", ".css", ".js") or path.parts[0] in ("tests", "runs", "wandb")


def make_image() -> Any:
    """Packages at the versions of constraints.txt (torch's default build, which is CUDA's), a compiler, our files."""
    caches = PLACES["cache"]
    environment = {
        "PYTHONUNBUFFERED": "1",
        "AVATARL_DATA": PLACES["data"],
        "TIKTOKEN_CACHE_DIR": f"{caches}/tiktoken",
        "HF_HOME": f"{caches}/huggingface",
        "TORCHINDUCTOR_CACHE_DIR": f"{caches}/inductor",
        "TRITON_CACHE_DIR": f"{caches}/triton",
        "OMP_NUM_THREADS": "4",
    }
    return (
        require_modal()
        .Image.debian_slim(python_version=PYTHON)
        .apt_install("build-essential")  # torch.compile
        .add_local_file(ROOT / "constraints.txt", "/constraints.txt", copy=True)
        .pip_install(*packages(), extra_options="--constraint /constraints.txt")
        .env(environment)
        .workdir(CHECKOUT)
        .add_local_dir(ROOT, CHECKOUT, ignore=stays_here)
    )


def make_volumes() -> dict[str, Any]:
    """The Volumes by the place where containers see them; made where they are missing."""
    volume = require_modal().Volume
    return {place: volume.from_name(VOLUMES[name], create_if_missing=True) for name, place in PLACES.items()}


def find_secrets(name: str) -> list[Any]:
    """The secret of that name in a list, which is empty where the account has none. Asks Modal."""
    modal = require_modal()
    secret = modal.Secret.from_name(name)
    try:
        secret.hydrate()
    except modal.exception.NotFoundError:
        print(f"no secret {name}: runs do without Weights & Biases", file=sys.stderr)
        return []
    return [secret]


def make_app(
    wanted: Resources, secrets: Sequence[Any] = (), start: Callable[[Any], int | None] | None = None
) -> tuple[Any, Any]:
    """The app, and its one function with the resources `wanted`.

    start: called with the function by the local entrypoint, within the running app; returns an exit code.
    """
    modal = require_modal()
    app = modal.App(APP)
    options: dict[str, Any] = {"cpu": 16.0, "memory": 32 * 1024}  # MiB
    entry: Any = prepare_on_modal
    if wanted.gpus:
        options = {"gpu": wanted.gpu_request, "cpu": 2.0 + 2.0 * wanted.gpus, "memory": 16 * 1024 * wanted.gpus}
        entry = train_on_modal
    if wanted.nodes > 1:
        entry = modal.clustered(size=wanted.nodes, rdma=True)(entry)
    function = app.function(
        image=make_image(),
        volumes=make_volumes(),
        secrets=list(secrets),
        retries=modal.Retries(max_retries=wanted.retries, initial_delay=10.0, backoff_coefficient=1.0),
        timeout=int(wanted.hours * 3600) + GRACE,
        include_source=False,  # the image brings it
        **options,
    )(entry)

    def main(*words: str) -> None:
        """Called by `modal run` with words that have been read before."""
        if start is not None:
            sys.exit(start(function))

    main.__qualname__ = "main"  # Modal takes only functions that look global; this one never leaves this process
    app.local_entrypoint()(main)
    return app, function
