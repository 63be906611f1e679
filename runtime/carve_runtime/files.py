"""Read files that may come from anywhere: regular ones, of bounded size, and strict JSON."""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Callable
from io import BufferedReader
from pathlib import Path
from typing import Any

from carve_runtime.errors import ArtifactError

MAX_JSON = 16 * 1024 * 1024
_MAX_DEPTH = 64
_MAX_DIGITS = 40
Identity = tuple[int, ...]
"""What tells a file from another one, and from itself after a change."""


class FileError(ValueError):
    """A file that is refused; the message goes on where the file's name ends."""


def open_regular(path: str | os.PathLike[str]) -> BufferedReader:
    """Open a file for reading, following links.

    Raises:
        FileError: it is a pipe, a device or a folder. Nothing waits for a pipe's other end.
        OSError: it cannot be opened.
    """
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise FileError("is not a regular file")
    return os.fdopen(handle, "rb")


def identity(found: os.stat_result) -> Identity:
    """Device, inode, size and times of an open or named file."""
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def read_bytes(path: str | os.PathLike[str], most: int) -> bytes:
    """The content of a regular file of at most ``most`` bytes.

    Raises:
        FileError: it is none, larger, or changes meanwhile.
        OSError: it cannot be read.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise FileError(f"is larger than {most} bytes")
        data = file.read(size + 1)
    if len(data) != size:
        raise FileError("changed while it was read")
    return data


def parse_json(data: bytes, *, finite: bool = True) -> Any:
    """JSON in UTF-8, without what parsers disagree on.

    Args:
        data: the text.
        finite: refuse NaN and infinities, which are not JSON but which Python writes.

    Raises:
        FileError: it is not JSON, has a key twice in one object, nests deeper than 64, holds a
            whole number of more than 40 digits, or a number that is not finite.
    """

    def number(text: str) -> float:
        value = float(text)
        if finite and not math.isfinite(value):
            raise FileError(f"holds {text:.40}, which is not finite")
        return value

    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_int=_whole,
            parse_float=number,
            parse_constant=number,
        )
    except FileError:
        raise
    except (ValueError, RecursionError) as error:
        raise FileError(f"is not JSON: {str(error)[:200]}") from error
    except MemoryError as error:
        raise FileError("does not fit in memory") from error
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(_MAX_DEPTH + 1):
        if not level:
            return value
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
    raise FileError(f"nests deeper than {_MAX_DEPTH}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise FileError(f"has the key {key!r:.100} twice")
        found[key] = value
    return found


def _whole(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise FileError(f"holds a number of {len(text)} digits")
    return int(text)


def read_json(path: Path, refuse: Callable[[str], ArtifactError]) -> Any:
    """`parse_json` of one of an artifact's files.

    Args:
        path: the file, at most 16 MB.
        refuse: the error for content that is refused, from a message that goes on where the file's
            name ends.

    Raises:
        ArtifactError: that, or ``not-found`` when the file cannot be read.
    """
    try:
        return parse_json(read_bytes(path, MAX_JSON))
    except FileError as error:
        raise refuse(str(error)) from error
    except OSError as error:
        raise ArtifactError("not-found", f"{path} cannot be read: {error.strerror}") from error
