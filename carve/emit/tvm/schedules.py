"""Schedules timed on this machine, kept in the user's cache folder for the next time.

A few schedules of a kernel are compiled and timed in turn on random weights: with one token for how
weights are read, with many for how rows are tiled, so that each compilation tells about both. Small
kernels, and kernels for other processors than this one, take the default.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from carve.emit.tvm.cpu import HOST, Cpu
from carve.emit.tvm.kernels import PIPELINE, LinearSpec, RoutedSpec, Schedule, linear, routed_ffn
from carve.emit.tvm.kernels.layout import Array, linear_layout, routed_arrays
from carve.emit.tvm.kernels.schedule import default
from carve.errors import CarveError
from carve.files import cache_folder

_log = logging.getLogger(__name__)
_SMALL = 4 << 20
"""Bytes of weights below which nothing is timed."""
_ALONE = 128 << 10
"""Bytes that one thread reads sooner than another one is woken."""
_TOKENS = 48
_ROUNDS = 5
_GAIN = 0.97
"""Another schedule has to take less than this share of the default's time."""
_LARGEST_FILE = 4 << 20
_RANGES = {"unroll": (1, 16), "tile": (1, 32), "streams": (1, 8), "ahead": (0, 1 << 16)}

Spec = LinearSpec | RoutedSpec


def cache_file() -> Path:
    """Where schedules are kept: ``carve/tvm-schedules.json`` in the user's cache folder."""
    return cache_folder() / "tvm-schedules.json"


def choose(spec: Spec, cpu: Cpu, cache: Path | None = None) -> Schedule:
    """The schedule of a kernel: from the cache, else timed here, else the default.

    Args:
        spec: the kernel.
        cpu: what it is compiled for.
        cache: the file to keep schedules in; None: `cache_file`.
    """
    size = sum(a.size * np.dtype(a.dtype).itemsize for a in _arrays(spec, cpu))
    first = default(cpu, parallel=size >= _ALONE)
    if size < _SMALL or cpu != Cpu.named(HOST):
        return first
    file, key = cache or cache_file(), _key(spec, cpu)
    known = _read(file).get(key)
    if known is not None:
        return known
    found = _time(spec, cpu, first)
    _write(file, key, found)
    return found


def kernel(spec: Spec, cpu: Cpu, schedule: Schedule | None = None) -> Any:
    """The PrimFunc of a specification."""
    if isinstance(spec, LinearSpec):
        return linear(spec, cpu, schedule)
    return routed_ffn(spec, cpu, schedule)


def _arrays(spec: Spec, cpu: Cpu) -> list[Array]:
    if isinstance(spec, LinearSpec):
        return list(linear_layout(spec, cpu).arrays())
    return routed_arrays(spec, cpu)


def _key(spec: Spec, cpu: Cpu) -> str:
    """What a timing depends on: the kernel, its code, TVM, the processor, the threads."""
    import tvm  # type: ignore[import-not-found,unused-ignore]

    code = hashlib.sha256(tvm.__version__.encode())
    for file in sorted((Path(__file__).parent / "kernels").glob("*.py")):
        code.update(file.read_bytes())
    threads = os.environ.get("TVM_NUM_THREADS") or os.environ.get("OMP_NUM_THREADS") or "all"
    parts = [cpu.name, _model(), threads, code.hexdigest()[:16], repr(spec)]
    return hashlib.sha256("|".join(parts).encode()).hexdigest()


def _model() -> str:
    """The processor's own name, where Linux tells."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return ""
    lines = info.read_text(encoding="ascii", errors="replace").splitlines()
    return next((x.partition(":")[2].strip() for x in lines if x.startswith("model name")), "")


def _grid(first: Schedule) -> list[Schedule]:
    """Schedules to time: how weights are read and how rows are tiled vary independently."""
    t = first.tile
    return [
        first,
        replace(first, streams=2, ahead=1024, tile=max(t - 2, 1)),
        replace(first, streams=4, ahead=0, tile=max(t // 2, 1)),
        replace(first, streams=1, ahead=1024, tile=max(t - 4, 1)),
    ]


def _time(spec: Spec, cpu: Cpu, first: Schedule) -> Schedule:
    """The fastest reading of weights and the fastest tiling, each beside the default's."""
    import tvm

    grid = _grid(first)
    modules = [
        tvm.compile(
            tvm.IRModule({"main": kernel(spec, cpu, s).with_attr("global_symbol", "main")}),
            target=cpu.target(),
            tir_pipeline=PIPELINE,
        ).jit()
        for s in grid
    ]
    best = {}
    for tokens in (1, _TOKENS):
        given = [tvm.runtime.tensor(a) for a in _inputs(spec, cpu, tokens)]
        least = [float("inf")] * len(grid)
        for _ in range(_ROUNDS):
            for i, module in enumerate(modules):
                timer = module.time_evaluator("main", tvm.cpu(), number=1, repeat=4)
                least[i] = min(least[i], timer(*given).min)
        fastest = min(range(len(grid)), key=least.__getitem__)
        best[tokens] = grid[fastest] if least[fastest] < _GAIN * least[0] else first
    one, many = best[1], best[_TOKENS]
    return replace(first, streams=one.streams, ahead=one.ahead, tile=many.tile)


def _inputs(spec: Spec, cpu: Cpu, tokens: int) -> list[np.ndarray]:
    """Random arguments; the result last."""
    g = np.random.default_rng(0)

    def random(*shape: int) -> np.ndarray:
        return g.standard_normal(shape, np.float32)

    weights = [
        random(a.size) if a.dtype == "float32" else g.integers(0, 255, a.size, np.uint8)
        for a in _arrays(spec, cpu)
    ]
    if isinstance(spec, LinearSpec):
        return [random(tokens, spec.in_features), *weights, random(tokens, spec.out_features)]
    # Scores of 1: a token takes as many experts as it may.
    scores = [np.ones((tokens, spec.num_experts), np.float32)] if spec.num_experts else []
    return [random(tokens, spec.hidden_size), *scores, *weights, random(tokens, spec.out)]


def _read(file: Path) -> dict[str, Schedule]:
    """What a cache file holds; entries that make no sense are left out, and said so."""
    if not file.is_file():
        return {}
    found, entries = {}, None
    if file.stat().st_size <= _LARGEST_FILE:
        try:
            entries = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, RecursionError):
            entries = None
    if not isinstance(entries, dict):
        _log.warning("%s holds no schedules; it will be written anew", file)
        return {}
    for key, entry in entries.items():
        schedule = _schedule(entry)
        if schedule is None:
            _log.warning("%s: the schedule %.80r makes no sense and is left out", file, key)
        else:
            found[key] = schedule
    return found


def _schedule(entry: object) -> Schedule | None:
    if not isinstance(entry, dict) or set(entry) != {*_RANGES, "parallel"}:
        return None
    for name, (low, high) in _RANGES.items():
        if type(entry[name]) is not int or not low <= entry[name] <= high:
            return None
    if entry["ahead"] % 64 or type(entry["parallel"]) is not bool:
        return None
    return Schedule(**entry)


def _write(file: Path, key: str, schedule: Schedule) -> None:
    """Add an entry: beside the file first, then in its place."""
    entries = {k: asdict(s) for k, s in _read(file).items()} | {key: asdict(schedule)}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, part = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as out:
                json.dump(entries, out, indent=1, sort_keys=True)
            os.replace(part, file)
        finally:
            Path(part).unlink(missing_ok=True)
    except OSError as error:
        raise CarveError(
            "cache", f"{file}: {error.strerror}", "set XDG_CACHE_HOME to a folder to write to"
        ) from error
