"""The artifact: a folder with a manifest, written beside and renamed into place."""

from __future__ import annotations

import contextlib
import errno
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
from carve.errors import CarveError, UserError, is_out_of_memory
from carve.files import looking_into, read_json

SCHEMA = 1
MANIFEST, REPORT = "manifest.json", "report.json"
VOLATILE = ("seconds", "peak_rss_mb", "speed")
"""Keys of records whose values differ from run to run: whatever is measured in time or memory has
to stand under one of them, see `Artifact.digest`."""


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

    def digest(self) -> str:
        """Hash of all that a conversion determines: the same for the same request on one machine.

        Files count by their content and name, records in JSON without the keys in `VOLATILE`, and
        of the manifest what is neither that, nor where the source was, nor this hash. A report in
        HTML is left out, for it shows ``report.json``.
        """
        return digest(self.path, self.manifest)


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


def disk_free(path: Path) -> int:
    """Bytes free where ``path`` is, or is to be."""
    return shutil.disk_usage(path.resolve().parent).free


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """What the machine refuses in the block, in words: no room, no right to write, no memory.

    Raises:
        UserError: the disk is full, or ``path`` cannot be written to.
        CarveError: another failure to write, or no memory.
    """
    try:
        yield
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise UserError(
                "disk-full", f"the disk is full: {e.filename or path}", "free some room"
            ) from e
        if e.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise UserError(
                "output", f"{e.filename or path} cannot be written to", "choose another -o"
            ) from e
        if not is_out_of_memory(e):
            raise CarveError("write", f"{path} could not be written: {e}") from e
        raise _no_memory() from e
    except Exception as e:
        if getattr(e, "code", "") == "memory" or not is_out_of_memory(e):
            raise
        raise _no_memory() from e


def _no_memory() -> CarveError:
    return CarveError(
        "memory", "out of memory", "close other programs, or use a machine with more of it"
    )


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """A folder beside ``path`` that takes its name when the block ends well, else is removed."""
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
        sync_folder(target.parent)
        shutil.rmtree(old, ignore_errors=True)
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
    with explained(path), staged(path) as stage:
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


def digest(root: Path, manifest: dict[str, Any]) -> str:
    """See `Artifact.digest`."""
    found = {}
    for name in sorted(manifest["files"]):
        if name.endswith(".html"):
            continue
        if name in (REPORT, "placement.json") or name.startswith("passes/"):
            found[name] = _hash_of(_lasting(read_json(root / name, finite=False)))
        else:
            found[name] = sha256(root / name)
    said = {k: v for k, v in manifest.items() if k not in ("files", "digest", "source")}
    return _hash_of([found, said, manifest["source"]["sha256"]])


def _hash_of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _lasting(value: Any) -> Any:
    """A record without what differs from run to run."""
    if isinstance(value, dict):
        return {k: _lasting(v) for k, v in value.items() if k not in VOLATILE}
    return [_lasting(v) for v in value] if isinstance(value, list) else value


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


def sync_folder(folder: Path) -> None:
    """Flush a folder's own entries, where the file system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def sync(root: Path) -> None:
    """Flush the folder's files to disk before it gets its final name."""
    for p in root.rglob("*"):
        if p.is_file():
            with p.open("rb") as f, contextlib.suppress(OSError):
                os.fsync(f.fileno())
