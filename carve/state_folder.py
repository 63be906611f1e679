"""The folder beside an output that holds what a conversion needs to go on; one user at a time."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from carve.artifact import explained
from carve.config import nearest
from carve.errors import CarveError, UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Course:
    """Where a conversion starts and stops.

    Attributes:
        resume: go on where an earlier run with the same output was; else its state is discarded.
        start: start again at this pass, from the stored state before it.
        until: stop after this pass and keep the state.
        keep: keep the state when the artifact is finished.
    """

    resume: bool = False
    start: str | None = None
    until: str | None = None
    keep: bool = False

    def check(self, names: list[str]) -> None:
        """Check against the passes of a conversion.

        Raises:
            UserError: no such pass, or the choices exclude one another.
        """
        for option, name in (("--from", self.start), ("--until", self.until)):
            if name is not None and name not in names:
                raise UserError(
                    "config",
                    f"{option} {name}: this conversion has no such pass"
                    f"{nearest(name, names) if names else ''}",
                )
        if self.resume and self.start is not None:
            raise UserError("config", "give either --resume or --from, not both")
        if self.start and self.until and names.index(self.start) > names.index(self.until):
            raise UserError("config", f"--until {self.until} comes before --from {self.start}")


def state_path(output: Path) -> Path:
    """Where the state of a conversion to ``output`` is."""
    target = output.resolve()
    return target.parent / f".{target.name}.state"


@contextmanager
def state_folder(output: Path, course: Course) -> Iterator[Path]:
    """The state folder of an output, locked, and tidied up after runs that were killed.

    Unless the course goes on from it, an earlier state is discarded. A folder that holds no state
    is removed at the end; where it holds one, an error says so.

    Raises:
        UserError: another process converts to the same output.
    """
    folder = state_path(output)
    with _locked(folder, output):
        _recover(output.resolve())
        if not (course.resume or course.start) and (stale := [*_contents(folder)]):
            log.info("the state of an earlier run is discarded: %s", folder)
            for path in stale:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        try:
            with explained(output):
                yield folder
        except CarveError as e:
            if any(folder.glob("*.json")) and "--resume" not in e.hint:
                e.hint = "; ".join(filter(None, [e.hint, "--resume goes on from what is done"]))
            raise
        finally:
            if not any(folder.glob("*.json")):
                shutil.rmtree(folder, ignore_errors=True)


def discard(folder: Path) -> None:
    """Remove a state for good: at no moment is there half of one."""
    gone = folder.with_name(f"{folder.name}.gone")
    shutil.rmtree(gone, ignore_errors=True)
    gone.mkdir()
    # Indices first: files that no index names are no state.
    for path in sorted(_contents(folder), key=lambda p: p.is_dir()):
        path.rename(gone / path.name)
    shutil.rmtree(gone, ignore_errors=True)


def _contents(folder: Path) -> Iterator[Path]:
    return (p for p in folder.iterdir() if p.name != "lock") if folder.is_dir() else iter(())


@contextmanager
def _locked(folder: Path, output: Path) -> Iterator[None]:
    while True:
        folder.mkdir(exist_ok=True)
        with (folder / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    "busy", f"another conversion to {output} is running", "choose another -o"
                ) from None
            try:  # the folder may have gone between opening and locking
                same = os.fstat(lock.fileno()).st_ino == (folder / "lock").stat().st_ino
            except FileNotFoundError:
                same = False
            if same:
                yield
                return


def _recover(target: Path) -> None:
    """Put back or remove what a killed run left beside its output."""
    for old in sorted(target.parent.glob(f".{target.name}.old-*")):
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:  # killed between the two renames
            old.rename(target)
    for pattern in (f".{target.name}.part-*", f".{target.name}.state.gone"):
        for path in target.parent.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)
