"""A memory limit that the kernel keeps: a control group, or ``RLIMIT_DATA`` where none can be made.

A control group counts all that a process touches for the first time, page cache included, and gives
the cache's pages back before it kills. ``RLIMIT_DATA`` counts private mappings, touched or not, and
no page cache: whoever reads files through the cache has more memory than the limit says.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Group:
    """A control group's folder, and how its version names files."""

    folder: Path
    most: str
    swap: str

    def enter(self) -> None:
        """Move this process into it."""
        (self.folder / "cgroup.procs").write_text(str(os.getpid()))

    def limit(self, size: int) -> None:
        """Let it have ``size`` bytes and no swap."""
        both = "memsw" in self.swap  # of version 1: memory and swap together
        swap = self.folder / self.swap
        if both and swap.exists():
            swap.write_text("-1")  # memory alone may not be more, and the last limit still stands
        (self.folder / self.most).write_text(str(size))
        if swap.exists():
            swap.write_text(str(size if both else 0))


def _versions(name: str) -> Iterator[Group]:
    v2 = _ROOT / "cgroup.subtree_control"
    if v2.exists() and "memory" in v2.read_text().split():
        yield Group(_ROOT / name, "memory.max", "memory.swap.max")
    if (_ROOT / "memory" / "cgroup.procs").exists():
        bound, both = "memory.limit_in_bytes", "memory.memsw.limit_in_bytes"
        yield Group(_ROOT / "memory" / name, bound, both)


@contextmanager
def group(name: str) -> Iterator[Group | None]:
    """A new group, gone again afterwards; None where this user may make none."""
    for found in _versions(f"{name}-{os.getpid()}"):
        try:
            found.folder.mkdir()
        except OSError:
            continue
        try:
            yield found
        finally:
            found.folder.rmdir()
        return
    yield None


def open_group(folder: str) -> Group:
    """The group that another process made."""
    return next(
        g for g in _versions(Path(folder).name) if g.folder == Path(folder) and g.folder.is_dir()
    )


def _data_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmData"):
            return int(line.split()[1]) * 1024
    raise SystemExit("this needs Linux's /proc")


def limit_data(size: int) -> None:
    """Let this process map ``size`` private bytes more than it has."""
    most = _data_bytes() + size
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
