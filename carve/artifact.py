"""The artifact: a folder with a manifest, written beside and renamed into place."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from carve.engine_form import FOREIGN
from carve.errors import CarveError, UserError
from carve.files import looking_into, read_json

SCHEMA = 1
MANIFEST, REPORT = "manifest.json", "report.json"


@dataclass(frozen=True)
class Artifact:
    """A finished artifact on disk."""

    path: Path
    manifest: dict[str, Any]
    report: dict[str, Any]

    @property
    def bits(self) -> int:
        """Width of the weights that nothing else is said of, the same in every target carve runs.

        Raises:
            UserError: it holds checkpoints for other engines only.
        """
        own = [t for n, t in self.manifest["targets"].items() if n not in FOREIGN]
        if not own:
            raise UserError(
                "target",
                f"{self.path} holds no target that carve runs",
                "convert with --target onnx-cpu as well, or use the engine it was made for",
            )
        with looking_into(self.path / MANIFEST):
            return int(own[0]["bits"])

    @classmethod
    def open(cls, path: str | Path) -> Artifact:
        """Read an artifact's manifest and report.

        Raises:
            UserError: it is not an artifact.
            ArtifactError: its manifest is malformed, or its files lie elsewhere.
        """
        root = Path(path)
        if not root.is_dir():
            raise UserError("not-found", f"{root}: no such directory")
        if not (root / MANIFEST).is_file():
            raise UserError(
                "not-artifact", f"{root} holds no {MANIFEST}", "make one with carve convert"
            )
        from carve_runtime.manifest import read_manifest, resolve_inside

        read_manifest(root)  # which refuses what is not one
        report = resolve_inside(root.resolve(), REPORT)
        return cls(root, read_json(root / MANIFEST), read_json(report, finite=False))


def check_output(path: Path) -> None:
    """Refuse an output that would overwrite something other than an artifact.

    Raises:
        UserError: it exists and is no artifact, or its parent cannot be written to.
    """
    if (
        path.exists()
        and not (path / MANIFEST).is_file()
        and (path.is_file() or any(path.iterdir()))
    ):
        raise UserError("output", f"{path} exists and is no carve artifact", "choose another -o")
    parent = path.resolve().parent
    if not parent.is_dir():
        raise UserError("output", f"{parent}: no such directory", "make it first")
    if not os.access(parent, os.W_OK):
        raise UserError("output", f"{parent} cannot be written to", "choose another -o")


def check_disk(path: Path, needed: int) -> None:
    """Refuse to start when the output will not fit.

    Raises:
        UserError: less than ``needed`` bytes are free.
    """
    free = shutil.disk_usage(path.resolve().parent).free
    if free < needed:
        raise UserError(
            "disk",
            f"about {needed >> 20} MB are needed beside {path}, {free >> 20} MB are free",
            "free some room or choose another -o",
        )


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """A folder beside ``path`` that takes its name when the block ends well, and else is removed.

    Raises:
        UserError: the disk is full.
        CarveError: another failure to write.
    """
    target = path.resolve()
    stage = target.parent / f".{target.name}.part-{os.getpid()}"
    shutil.rmtree(stage, ignore_errors=True)
    try:
        stage.mkdir()
        yield stage
        old = target.parent / f".{target.name}.old-{os.getpid()}"
        if target.exists():
            target.rename(old)
        stage.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as e:
        if e.errno == 28:
            raise UserError(
                "disk-full",
                f"the disk is full: {e.filename or stage}",
                "free some room and convert again",
            ) from e
        raise CarveError("write", f"{path} could not be written: {e}") from e
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def amend(path: Path, texts: Mapping[str, str]) -> None:
    """Replace or add text files of a finished artifact, with a manifest that stays true.

    A copy that shares the other files takes the artifact's place as a whole, so that nobody meets
    a file and a manifest that do not belong together.

    Raises:
        UserError: its manifest lists no files, or the disk is full.
        CarveError: it cannot be written.
    """
    manifest = read_json(path / MANIFEST)
    if not isinstance(manifest.get("files"), dict):
        raise UserError("bad-manifest", f"{path / MANIFEST} lists no files")
    with staged(path) as stage:
        shutil.copytree(path, stage, symlinks=True, copy_function=_share, dirs_exist_ok=True)
        for name, text in texts.items():
            (stage / name).unlink(missing_ok=True)  # the file itself is the old artifact's too
            (stage / name).write_text(text, encoding="utf-8")
            manifest["files"][name] = sha256(stage / name)
        (stage / MANIFEST).unlink()
        write_json(stage / MANIFEST, manifest)
        sync(stage)


def _share(source: str, target: str) -> str:
    """A second name for a file, or a copy where the file system knows none."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
    return target


def write_json(path: Path, value: Any) -> None:
    """Write JSON with a final line end."""
    path.write_text(json.dumps(value, indent=2, sort_keys=False) + "\n", encoding="utf-8")


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def hashes(root: Path) -> dict[str, str]:
    """Digest of every file under ``root`` by its relative path, the manifest left out."""
    files = sorted(p for p in root.rglob("*") if p.is_file())
    return {p.relative_to(root).as_posix(): sha256(p) for p in files if p.name != MANIFEST}


def sync(root: Path) -> None:
    """Flush the folder's files to disk before it gets its final name."""
    for p in root.rglob("*"):
        if p.is_file():
            with p.open("rb") as f, contextlib.suppress(OSError):
                os.fsync(f.fileno())
