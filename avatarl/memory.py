"""How much memory is left, asked before something large is built: the system would kill the process without a word."""

from pathlib import Path

PROC = Path("/proc/meminfo")
GROUPS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes")),
)
"""Limit and use of this process's container, by version 2 and version 1 of control groups."""


def memory_left() -> int | None:
    """Bytes that this machine and this container still have; None where neither says."""
    found = []
    for line in _text(PROC).splitlines():
        if line.startswith("MemAvailable:"):
            found.append(1024 * int(line.split()[1]))
    for limit, use in GROUPS:
        most, now = _text(limit).strip(), _text(use).strip()
        if most.isdecimal() and now.isdecimal():
            found.append(max(0, int(most) - int(now)))
    return min(found, default=None)


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
