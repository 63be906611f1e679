"""Models that TVM compiled: a library, and tensors that stay mapped in memory."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from carve_runtime import processor
from carve_runtime import tvm_library as tvm
from carve_runtime.decoder import Session, cache_names
from carve_runtime.engine import Port, check_feeds
from carve_runtime.errors import ArtifactError, CarveRuntimeError, RequestError
from carve_runtime.gates import SHIFT
from carve_runtime.manifest import ModelInfo
from carve_runtime.tensors import map_tensors
from carve_runtime.tvm_index import DTYPES, TvmIndex
from carve_runtime.tvm_memory import compiled, has_gpu, memory_of


class TvmEngine:
    """Runs the functions of a compiled model; threads may share it and take turns.

    Args:
        index: what the artifact says of it; the library's hash has been checked.
        threads: threads of one kernel; None takes every core of this process.

    Raises:
        ArtifactError: ``model`` when library and tensors do not fit the index, ``target`` when this
            processor cannot run it.
    """

    def __init__(self, index: TvmIndex, threads: int | None) -> None:
        check_processor(index)
        self.inputs, self.outputs = dict(index.inputs), dict(index.outputs)
        self.optional: dict[str, Port] = {}
        if SHIFT in self.inputs:
            self.optional[SHIFT] = self.inputs.pop(SHIFT)
        self._threads = threads or len(os.sched_getaffinity(0))
        self.memory = memory_of(index.gpu)
        with compiled(index.gpu):
            self._library = tvm.Library(index.library, self.memory.devices)
        arrays = map_tensors(index.tensors)
        named = {n for names in index.functions.values() for n in names}
        lost = [n for n in sorted(named) if n not in arrays or not tvm.is_aligned(arrays[n])]
        if lost:
            raise ArtifactError(
                "model",
                f"{index.tensors} has no {lost[0]!r:.60}, or where kernels cannot read it",
                "compile the model again with carve",
            )
        made = {n: self.memory.tensor(arrays[n]) for n in sorted(named)}
        self._weights = {f: [made[n] for n in names] for f, names in index.functions.items()}
        self._functions = {f: self._library.function(f) for f in index.functions}
        self._lock = threading.Lock()

    def weights(self, function: str) -> list[Any]:
        """What a function takes after its inputs.

        Raises:
            ArtifactError: ``model`` when there is no such function.
        """
        if function not in self._weights:
            raise ArtifactError("model", f"the compiled model has no function {function!r}")
        return self._weights[function]

    def call(self, function: str, arguments: Sequence[Any]) -> Any:
        """Run a function; the memory of all but ``decode`` is given back.

        Raises:
            CarveRuntimeError: ``run`` when TVM fails.
        """
        with self._lock:
            tvm.use_threads(self._threads)
            try:
                found = self._functions[function](*arguments)
                if function != "decode":  # the sizes of one token are always the same
                    tvm.give_back()
            except Exception as error:  # its exceptions have no common base
                raise CarveRuntimeError(
                    "run",
                    f"TVM failed in the model: {error}",
                    "check that the artifact is whole, or compile it again with carve",
                ) from error
        return found

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """Run with numpy inputs; returns every output in order.

        Raises:
            RequestError: ``inputs`` when names, types or shapes are not the model's.
        """
        shift = feeds.get(SHIFT) if self.optional else None
        check_feeds(self, {n: a for n, a in feeds.items() if n not in self.optional})
        arrays = {n: self._fitting(n, feeds[n]) for n in self.inputs}
        if "main" in self._functions:
            given = [*map(self.memory.tensor, arrays.values()), *self.weights("main")]
            return [self.memory.array_of(v).copy() for v in self.call("main", given)]
        rows = [self._sequence(arrays, b, shift) for b in range(len(arrays["input_ids"]))]
        return [np.concatenate(parts) for parts in zip(*rows, strict=True)]

    def _fitting(self, name: str, array: Any) -> NDArray[Any]:
        port = self.inputs[name]
        given = np.asarray(array)
        kind = DTYPES[port.dtype]
        if given.dtype != kind or not port.takes(given.shape):
            raise RequestError(
                "inputs", f"{name} is {given.dtype} {given.shape}, not {kind} {port.shape}"
            )
        copy = tvm.aligned(given.shape, kind)
        copy[...] = given
        return copy

    def _sequence(
        self, arrays: Mapping[str, NDArray[Any]], row: int, shift: Any
    ) -> list[NDArray[Any]]:
        """One sequence of a batch, with its cache before and after."""
        pasts = [n for n in arrays if n.startswith("past_key_values.")]
        old = arrays[pasts[0]].shape[2]
        ids = arrays["input_ids"][row : row + 1]
        length = ids.shape[1]
        caches = []
        for name in pasts:
            _, heads, _, width = arrays[name].shape
            cache = tvm.aligned((1, heads, old + length, width), np.float32)
            cache[:, :, :old] = arrays[name][row]
            caches.append(cache)
        position = arrays.get("position_ids")
        places = np.arange(old, old + length)[None] if position is None else position[row][None]
        given = [self.int64(ids), self.int64(places), tvm.shape(length)]
        if self.optional:
            bars = tvm.aligned(self._shift_shape, np.float32)
            bars[...] = 0 if shift is None else shift
            given.append(self.memory.tensor(bars))
        tensors = [self.memory.tensor(c) for c in caches]
        found = self.call("prefill", [*given, *tensors, *self.weights("prefill")])
        logits, *told = (
            self.memory.array_of(v).copy() for v in (found[0], *found[len(caches) + 1 :])
        )
        return [logits, *map(self.memory.array_of, tensors), *told]

    def int64(self, array: NDArray[Any]) -> Any:
        """A tensor of token ids or positions."""
        copy = tvm.aligned(array.shape, np.int64)
        copy[...] = array
        return self.memory.tensor(copy)

    @property
    def _shift_shape(self) -> tuple[int, ...]:
        return tuple(int(d or 0) for d in self.optional[SHIFT].shape)

    def close(self) -> None:
        """Nothing to do: memory goes with the library."""


class TvmSession(Session):
    """A sequence whose cache compiled functions write in place, see `Session`."""

    _engine: Any

    def _open(self) -> None:
        info: ModelInfo = self._info
        self._count = len(cache_names(info))
        memory = self._engine.memory
        self._one = [tvm.aligned((1, 1), np.int64) for _ in range(2)]
        self._decode_head = [memory.tensor(a) for a in self._one]
        self._shift_array = tvm.aligned((len(info.gates),), np.float32)
        self._shift = [memory.tensor(self._shift_array)] if info.gates else []
        self._decode_weights = self._engine.weights("decode")
        self._prefill_weights = self._engine.weights("prefill")
        self._tensors: list[Any] = []
        self._grow(0)

    def _advance(self, tokens: NDArray[np.int64], total: int, rows: int) -> NDArray[np.float32]:
        memory = self._engine.memory
        if total > self._capacity:
            self._grow(total)
        if self._shift:
            self._shift_array[...] = self._gates.feeds().get(SHIFT, 0)
            memory.write(self._shift[0], self._shift_array)
        if tokens.size == 1:
            self._one[0][0, 0], self._one[1][0, 0] = tokens[0], total - 1
            for there, here in zip(self._decode_head, self._one, strict=True):
                memory.write(there, here)
            found = self._engine.call("decode", self._decode_arguments)
        else:
            places = np.arange(self._length, total, dtype=np.int64)
            ids = (tokens[None], places[None])
            head = [*map(self._engine.int64, ids), tvm.shape(rows)]
            given = [*head, *self._shift, *self._tensors, *self._prefill_weights]
            found = self._engine.call("prefill", given)
        if self._watch:
            scores, bars = (memory.array_of(found[self._count + i]) for i in (1, 2))
            self._gates.seen(scores, bars)
        last: NDArray[np.float32] = memory.array_of(found[0])[0]
        return last

    def _grow(self, total: int) -> None:
        """Make room for ``total`` tokens; every doubling copies what is valid once."""
        info, memory = self._info, self._engine.memory
        self._capacity = self._room(total)
        size = (1, info.num_key_value_heads, self._capacity, info.head_dim)
        new = []
        for i in range(self._count):
            cache = tvm.aligned(size, np.float32)
            if self._tensors:
                cache[:, :, : self._length] = memory.array_of(self._tensors[i])[
                    :, :, : self._length
                ]
            new.append(memory.tensor(cache))
        self._tensors = new
        self._decode_arguments = [
            *self._decode_head,
            *self._shift,
            *self._tensors,
            *self._decode_weights,
        ]


def runs_here(index: TvmIndex) -> bool:
    """Whether this machine can run what the index is of."""
    if index.machine != processor.machine() or _missing(index):
        return False
    return index.gpu is None or has_gpu(index.gpu.capability)


def _missing(index: TvmIndex) -> list[str]:
    """The flags that this processor lacks; none where the system does not tell."""
    have = processor.flags()
    return [] if have is None else [f for f in index.flags if f not in have]


def check_processor(index: TvmIndex) -> None:
    """Compare what the library was compiled for with this machine.

    Raises:
        ArtifactError: ``target`` when the processor is another, or lacks an instruction set.
    """
    missing = [] if index.machine == processor.machine() else [index.machine]
    missing += _missing(index) if not missing else []
    if missing:
        raise ArtifactError(
            "target",
            f"{index.target} was compiled for another processor than this: no {missing[0]}",
            "convert the model for this machine (carve convert --target tvm:host)",
        )
