"""Tensors of a safetensors file, mapped into memory and never copied.

The file is as hostile as the manifest: its header's size, its names, types, shapes and ranges are
checked before anything is read.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from carve_runtime.errors import ArtifactError
from carve_runtime.files import FileError, open_regular, parse_json

MAX_HEADER_BYTES = 64 * 1024 * 1024
_DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


def _bad(path: Path, what: str) -> ArtifactError:
    return ArtifactError("model", f"{path}: {what}", "compile the model again with carve")


def map_tensors(path: Path) -> dict[str, NDArray[Any]]:
    """The file's tensors as views of its pages, which nothing that is written to them changes.

    Raises:
        ArtifactError: ``model`` where the file is no sound safetensors file.
    """
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
                raise _bad(path, "it is no safetensors file")
            header = parse_json(file.read(length))
            # Copied on write, which nothing does: only writable memory can be lent to kernels.
            data = np.memmap(file, np.uint8, "c")
    except (FileError, OSError) as error:
        raise _bad(path, str(error)) from error
    if not isinstance(header, dict):
        raise _bad(path, "its header is no object")
    start = 8 + length
    found = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        dtype, shape, first, last = _entry(path, name, entry)
        if not 0 <= first <= last <= size - start:
            raise _bad(path, f"{name!r:.60} does not lie where it can be read")
        if math.prod(shape) * dtype.itemsize != last - first:
            raise _bad(path, f"{name!r:.60} has {last - first} bytes, not those of {shape}")
        found[name] = data[start + first : start + last].view(dtype).reshape(shape)
    return found


def _entry(path: Path, name: str, entry: Any) -> tuple[np.dtype[Any], tuple[int, ...], int, int]:
    def whole(values: Any, most: int) -> list[int]:
        sound = isinstance(values, list) and len(values) <= most
        if not sound or not all(type(v) is int and 0 <= v < 2**62 for v in values):
            raise _bad(path, f"{name!r:.60} has an unsound shape or range")
        return list(values)

    if not isinstance(entry, dict) or str(entry.get("dtype")) not in _DTYPES:
        raise _bad(path, f"{name!r:.60} has a type that is not known")
    ends = whole(entry.get("data_offsets"), 2)
    if len(ends) != 2:
        raise _bad(path, f"{name!r:.60} has no range")
    return _DTYPES[entry["dtype"]], tuple(whole(entry.get("shape"), 8)), ends[0], ends[1]
