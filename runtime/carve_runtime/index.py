"""The index of a split artifact: segments, and where every expert lies in ``experts.bin``.

As hostile as the manifest: every name has to be listed there, and every range has to lie inside
its file, on pages of its own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from carve_runtime.errors import ArtifactError
from carve_runtime.files import read_json
from carve_runtime.manifest import check_relative_path, resolve_inside

SCHEMA = 1
PAGE = 4096
_MAX_LAYERS, _MAX_EXPERTS, _MAX_TENSORS, _MAX_WIDTH = 4096, 65536, 64, 1 << 24
_DTYPES: dict[str, np.dtype[Any]] = {"uint8": np.dtype(np.uint8), "float32": np.dtype("<f4")}
_NAME = re.compile(r"[\w.\-/]{1,200}")
Key = tuple[int, int]
"""Layer and expert."""


@dataclass(frozen=True, slots=True)
class TensorRange:
    """A tensor of an expert; ``offset`` counts from the expert's own start."""

    name: str
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def nbytes(self) -> int:
        """Its bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Form:
    """What experts of one shape share: the graph of one of them and where its tensors lie."""

    model: Path
    bits: int
    size: int
    tensors: tuple[TensorRange, ...]


@dataclass(frozen=True, slots=True)
class Predictor:
    """Guesses a layer's scores from the stream before its attention.

    ``stream``: the values of the graphs that, with the experts' sum before, are the stream;
    ``weight`` ``[E, d]`` and ``bias`` ``[E]`` fp32.
    """

    stream: tuple[str, ...]
    weight: NDArray[np.float32]
    bias: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Layer:
    """A routed FFN."""

    name: str
    experts: int
    top_k: int
    dynamic: bool
    width: int
    predictor: Predictor | None


@dataclass(frozen=True, slots=True)
class Place:
    """Where an expert's bytes start, its form, and the share of tokens that chose it."""

    form: int
    offset: int
    hotness: float


@dataclass(frozen=True, slots=True)
class SplitIndex:
    """The typed content of ``index.json``; ``experts`` are in the order of the file."""

    folder: Path
    segments: tuple[Path, ...]
    outputs: tuple[str, ...]
    layers: tuple[Layer, ...]
    forms: tuple[Form, ...]
    experts: Mapping[Key, Place]
    data: Path

    def size(self, key: Key) -> int:
        """Bytes of an expert in the file, whole pages."""
        return self.forms[self.experts[key].form].size


def _bad(what: str) -> ArtifactError:
    return ArtifactError(
        "model", f"the split model's index: {what}", "compile the model again with carve"
    )


def _int(raw: Any, key: str, low: int, high: int) -> int:
    value = raw.get(key) if isinstance(raw, dict) else None
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise _bad(f"{key!r} must be an integer from {low} to {high}, not {value!r:.40}")
    return value


def _list(raw: Any, key: str, most: int) -> list[Any]:
    value = raw.get(key) if isinstance(raw, dict) else None
    if not isinstance(value, list) or len(value) > most:
        raise _bad(f"{key!r} must be a list of at most {most}")
    return value


def _name(value: Any) -> str:
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise _bad(f"{value!r:.60} is no name")
    return value


class _Reader:
    """Resolves names of files beside the index, which the manifest has to list."""

    def __init__(self, root: Path, files: Collection[str], model: str) -> None:
        self.root, self.files = root, files
        self.base = model.rpartition("/")[0]

    def file(self, value: Any) -> Path:
        name = check_relative_path(_name(value))
        path = f"{self.base}/{name}" if self.base else name
        if path not in self.files:
            raise _bad(f"{name!r:.100} is not listed in the manifest")
        return resolve_inside(self.root, path)


def read_index(root: Path, files: Collection[str], model: str) -> SplitIndex:
    """Read and check an index.

    Args:
        root: the artifact directory, resolved.
        files: the paths that its manifest lists.
        model: the index's path among them.

    Raises:
        ArtifactError: ``model`` for whatever does not fit, ``unsafe-path`` or ``not-found``.
    """
    path = resolve_inside(root, model)
    raw = read_json(path, _bad)
    _int(raw, "schema", SCHEMA, SCHEMA)
    _int(raw, "page", PAGE, PAGE)
    reader = _Reader(root, files, model)
    segments = tuple(reader.file(s) for s in _list(raw, "segments", _MAX_LAYERS + 1))
    outputs = tuple(_name(o) for o in _list(raw, "outputs", 1 << 16))
    predictors = reader.file(raw.get("predictors"))
    entries = _list(raw, "layers", _MAX_LAYERS)
    layers = tuple(_layer(entry, k, predictors) for k, entry in enumerate(entries))
    if len(segments) != len(layers) + 1 or not layers:
        raise _bad(f"{len(layers)} layers need one segment more, not {len(segments)}")
    if len(set(segments)) != len(segments):
        raise _bad("a segment is there twice")
    forms = tuple(_form(f, reader) for f in _list(raw, "forms", _MAX_EXPERTS))
    binary = reader.file(raw.get("data"))
    experts = _experts(raw, layers, forms, binary.stat().st_size)
    return SplitIndex(path.parent, segments, outputs, layers, forms, experts, binary)


def _layer(raw: Any, number: int, predictors: Path) -> Layer:
    experts = _int(raw, "experts", 1, _MAX_EXPERTS)
    width = _int(raw, "width", 1, _MAX_WIDTH)
    dynamic = raw.get("dynamic")
    if not isinstance(dynamic, bool):
        raise _bad("'dynamic' must be true or false")
    found = raw.get("predictor")
    return Layer(
        _name(raw.get("name")),
        experts,
        _int(raw, "top_k", 1, experts),
        dynamic,
        width,
        None if found is None else _predictor(found, number, experts, width, predictors),
    )


def _predictor(raw: Any, number: int, experts: int, width: int, file: Path) -> Predictor:
    stream = tuple(_name(s) for s in _list(raw, "stream", 4))
    if not stream or number == 0:
        raise _bad("a predictor needs a stream")
    size = file.stat().st_size
    offset = _int(raw, "offset", 0, size)
    count = experts * (width + 1)
    if offset + 4 * count > size:
        raise _bad("a predictor ends beyond its file")
    flat = np.fromfile(file, "<f4", count, offset=offset)
    weight = flat[: experts * width].reshape(experts, width)
    if not np.isfinite(flat).all():
        raise _bad("a predictor holds what is no number")
    return Predictor(stream, weight, flat[experts * width :])


def _form(raw: Any, reader: _Reader) -> Form:
    size = _int(raw, "size", PAGE, 1 << 62)
    if size % PAGE:
        raise _bad(f"an expert of {size} bytes is no whole pages")
    tensors = []
    for entry in _list(raw, "tensors", _MAX_TENSORS):
        shape = tuple(_list(entry, "shape", 4))
        if not all(type(n) is int and 1 <= n <= _MAX_WIDTH for n in shape):
            raise _bad(f"{shape!r:.60} is no shape")
        dtype = _DTYPES.get(str(entry.get("dtype")))
        if dtype is None:
            raise _bad(f"unknown dtype {entry.get('dtype')!r:.40}")
        one = TensorRange(_name(entry.get("name")), _int(entry, "offset", 0, size), shape, dtype)
        tensors.append(one)
    if len({t.name for t in tensors}) != len(tensors):
        raise _bad("an expert has two tensors of one name")
    _check_ranges([(t.offset, t.nbytes) for t in tensors], size, "an expert's tensors")
    return Form(reader.file(raw.get("model")), _int(raw, "bits", 1, 32), size, tuple(tensors))


def _experts(
    raw: Any, layers: tuple[Layer, ...], forms: tuple[Form, ...], size: int
) -> dict[Key, Place]:
    count = sum(layer.experts for layer in layers)
    entries = _list(raw, "experts", count)
    found: dict[Key, Place] = {}
    for entry in entries:
        layer = _int(entry, "layer", 0, len(layers) - 1)
        key = layer, _int(entry, "expert", 0, layers[layer].experts - 1)
        form = _int(entry, "form", 0, len(forms) - 1)
        offset = _int(entry, "offset", 0, size)
        hotness = entry.get("hotness")
        if isinstance(hotness, bool) or not isinstance(hotness, int | float):
            raise _bad("'hotness' must be a number")
        if not 0.0 <= hotness <= 1.0:
            raise _bad(f"hotness {hotness!r:.40} is outside [0, 1]")
        if offset % PAGE:
            raise _bad(f"expert {key} does not start on a page")
        found[key] = Place(form, offset, float(hotness))
    if len(found) != count or len(entries) != count:
        raise _bad(f"{count} experts are needed, each once")
    _check_ranges(
        [(p.offset, forms[p.form].size) for p in found.values()], size, "experts in the file"
    )
    return found


def _check_ranges(ranges: list[tuple[int, int]], size: int, what: str) -> None:
    """Ranges ``(offset, bytes)`` inside ``size`` that do not overlap."""
    end = 0
    for offset, length in sorted(ranges):
        if offset < end or offset + length > size:
            raise _bad(f"{what} overlap or end beyond {size} bytes")
        end = offset + length
