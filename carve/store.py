"""A folder of values on disk, each file named by the hash of its content.

A tensor that has been stored once is not written again: later values point at it. Files are
written beside and renamed, flushed before they are named, and checked whenever they are read.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import weakref
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from carve.artifact import sha256, sync_folder
from carve.codec import CodecError, decode, encode, settled
from carve.errors import CarveError, UserError
from carve.files import read_json

_NAME = re.compile(r"[0-9a-f]{64}")
_SUFFIX = ".safetensors"


class StateError(CarveError):
    """A stored state that is missing, damaged or malformed."""

    def __init__(self, message: str) -> None:
        super().__init__("state", message, "it will not be used")


def write_file(path: Path, data: bytes) -> None:
    """Write a file beside and rename it, with all of it on disk before it has its name."""
    part = path.with_name(f"{path.name}.part")
    try:
        with part.open("wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        part.replace(path)
    except OSError:
        with suppress(OSError):
            part.unlink()
        raise
    sync_folder(path.parent)


@dataclass(frozen=True)
class Stored:
    """Where a value is: the file that holds it, and all files that it takes to read it."""

    file: str
    needs: tuple[str, ...]


@dataclass(frozen=True)
class _Known:
    alive: weakref.ref[Tensor]
    version: int
    place: tuple[str, str]


class Store:
    """Values in a folder, see the module.

    Args:
        folder: where the files are; made when the first is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._known: dict[int, _Known] = {}
        self._checked: set[str] = set()

    def put(self, value: Any) -> tuple[Stored, Any]:
        """Store a value; gives where it is, and the value as reading it back would give it.

        Raises:
            CarveError: it holds what cannot be stored.
            OSError: it cannot be written.
        """
        value = settled(value)
        own: dict[str, Tensor] = {}
        names: dict[int, str] = {}
        needs: set[str] = set()

        def keep(tensor: Tensor) -> list[str]:
            place = self._place(tensor)
            if place is not None:
                needs.add(place[0])
                return [*place]
            name = names.setdefault(id(tensor), str(len(own)))
            own[name] = tensor
            return ["", name]

        try:
            tree = encode(value, keep)
        except CodecError as e:
            raise CarveError("state", str(e)) from e
        data = save(_apart(own), {"value": json.dumps(tree)})
        name = hashlib.sha256(data).hexdigest()
        if not self._whole(name):
            self.folder.mkdir(parents=True, exist_ok=True)
            write_file(self._path(name), data)
        self._checked.add(name)
        for key, tensor in own.items():
            self._know(tensor, (name, key))
        return Stored(name, tuple(sorted({*needs, name}))), value

    def get(self, stored: Stored) -> Any:
        """Read a value back.

        Raises:
            StateError: a file is missing, damaged or malformed.
        """
        needs = set(stored.needs)
        tree = self._read(stored.file, lambda f: json.loads((f.metadata() or {})["value"]))
        found: dict[tuple[str, str], Tensor] = {}

        def find(place: Any) -> Tensor:
            if not isinstance(place, list) or [type(p) for p in place] != [str, str]:
                raise CodecError("a tensor has no place")
            file, name = place[0] or stored.file, place[1]
            if file not in needs:
                raise CodecError(f"a tensor lies in a file that is not listed: {file[:80]!r}")
            if (file, name) not in found:
                # In memory of its own.
                tensor = self._read(file, lambda f: f.get_tensor(name).clone())
                found[file, name] = tensor
                self._know(tensor, (file, name))
            return found[file, name]

        try:
            return decode(tree, find)
        except (CodecError, RecursionError, TypeError, ValueError) as e:
            raise StateError(f"{stored.file[:12]}{_SUFFIX} is malformed: {e}") from e

    def check(self, stored: Stored) -> None:
        """Compare the files of a value with their names.

        Raises:
            StateError: one is missing, or its content has changed.
        """
        for name in stored.needs:
            self._check(name)

    def drop_others(self, needed: Iterable[str]) -> None:
        """Remove every file that is not among ``needed``."""
        names = set(needed)
        for path in self.folder.glob("*") if self.folder.is_dir() else ():
            if path.stem not in names or path.suffix != _SUFFIX:
                path.unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        if not _NAME.fullmatch(name):
            raise StateError(f"{name[:80]!r} is no hash")
        return self.folder / f"{name}{_SUFFIX}"

    def _whole(self, name: str) -> bool:
        """Whether a file is there as its name says; a damaged one is written anew."""
        try:
            self._check(name)
        except StateError:
            return False
        return True

    def _check(self, name: str) -> Path:
        path = self._path(name)
        if name not in self._checked:
            if path.is_symlink() or not path.is_file():
                raise StateError(f"{path.name[:12]}{_SUFFIX} is missing")
            try:
                if sha256(path) != name:
                    raise StateError(f"{path.name[:12]}{_SUFFIX} has been changed or damaged")
            except OSError as e:
                raise StateError(f"{path} cannot be read: {e}") from e
            self._checked.add(name)
        return path

    def _read(self, name: str, take: Callable[[Any], Any]) -> Any:
        """What ``take`` finds in a file that is as its name says."""
        path = self._check(name)
        try:
            with safe_open(path, framework="pt") as f:
                return take(f)
        except (SafetensorError, OSError, KeyError, ValueError, RecursionError) as e:
            raise StateError(f"{path.name[:12]}{_SUFFIX} cannot be read: {e}") from e

    def _place(self, tensor: Tensor) -> tuple[str, str] | None:
        known = self._known.get(id(tensor))
        if known is None or known.alive() is not tensor or known.version != tensor._version:
            return None
        return known.place

    def _know(self, tensor: Tensor, place: tuple[str, str]) -> None:
        key = id(tensor)

        def forget(_: Any) -> None:
            self._known.pop(key, None)

        self._known[key] = _Known(weakref.ref(tensor, forget), tensor._version, place)


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with none sharing memory with another, which the format refuses."""
    seen: set[int] = set()
    found = {}
    for name, t in tensors.items():
        start = t.untyped_storage().data_ptr()
        found[name] = t.clone() if start in seen else t
        seen.add(start)
    return found


def write_index(path: Path, body: dict[str, Any]) -> None:
    """Write a JSON index with the hash of its own content."""
    text = json.dumps(body, indent=1)
    whole = {"sha256": hashlib.sha256(text.encode()).hexdigest(), "body": body}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, (json.dumps(whole, indent=1) + "\n").encode())


def read_index(path: Path) -> dict[str, Any]:
    """Read what `write_index` wrote.

    Raises:
        StateError: missing, damaged or malformed.
    """
    try:
        whole = read_json(path)
    except UserError as e:
        raise StateError(e.message) from e
    body = whole.get("body")
    if not isinstance(body, dict):
        raise StateError(f"{path.name} is malformed")
    if hashlib.sha256(json.dumps(body, indent=1).encode()).hexdigest() != whole.get("sha256"):
        raise StateError(f"{path.name} has been changed or damaged")
    return body


def parse_stored(raw: Any) -> Stored:
    """A `Stored` from an index.

    Raises:
        StateError: malformed.
    """
    names = [n for n in raw if isinstance(n, str)] if isinstance(raw, list) else []
    if not names or len(names) != len(raw) or not all(map(_NAME.fullmatch, names)):
        raise StateError("an index names a file by something that is no hash")
    return Stored(names[0], tuple(names[1:]))
