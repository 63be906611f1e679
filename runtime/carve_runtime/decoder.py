"""A decoder's key-value cache and its steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from carve_runtime.engine import OnnxRunner, Runner, value
from carve_runtime.errors import ArtifactError, RequestError, out_of_memory
from carve_runtime.gates import BARS, SCORES, SHIFT, Gates, GateStats
from carve_runtime.manifest import ModelInfo

_FIRST_CAPACITY = 256
_SHRINK_FROM = 64


def check_decoder(engine: Runner, info: ModelInfo, *, masked: bool = True) -> None:
    """Check that a graph has the inputs and outputs that a decoder's manifest promises.

    ``masked``: a shared cache's valid length is told by ``attention_mask``.

    Raises:
        ArtifactError: ``model`` when it has not.
    """

    def refuse(what: str) -> ArtifactError:
        return ArtifactError(
            "model", f"the graph does not match the manifest: {what}", "compile it again"
        )

    known = {"input_ids", "attention_mask", "position_ids"}
    logits = engine.outputs.get("logits")
    if "input_ids" not in engine.inputs or logits is None:
        raise refuse("it must have input_ids and logits")
    if not logits.is_float32(None, None, info.vocab_size):
        raise refuse(f"logits are {logits.dtype} {logits.shape}, vocab_size is {info.vocab_size}")
    if masked and info.shared_cache and "attention_mask" not in engine.inputs:
        raise refuse("a shared cache needs attention_mask to know the valid length")
    cache = (None, info.num_key_value_heads, None, info.head_dim)
    for past, present in cache_names(info):
        known.add(past)
        for ports, name in ((engine.inputs, past), (engine.outputs, present)):
            port = ports.get(name)
            if port is None or not port.is_real or not port.fits(*cache):
                raise refuse(f"{name} must be float32 or float16 with shape {cache}")
    if info.gates:
        told = [engine.outputs.get(name) for name in (SCORES, BARS)]
        wide = all(p is not None and p.is_float32(None, None, len(info.gates)) for p in told)
        if SHIFT not in engine.optional or not wide:
            raise refuse(f"{len(info.gates)} gates need {SHIFT}, {SCORES} and {BARS}")
    if engine.inputs.keys() - known:
        raise refuse(f"unknown inputs {sorted(engine.inputs.keys() - known)}")


def cache_names(info: ModelInfo) -> list[tuple[str, str]]:
    """The (past, present) names of every cache tensor, keys and values layer by layer."""
    return [
        (f"past_key_values.{layer}.{part}", f"present.{layer}.{part}")
        for layer in range(info.num_layers)
        for part in ("key", "value")
    ]


class Session:
    """One sequence being decoded, with a cache of its own.

    Sessions of one model may run in different threads at once; one session may not.

    Args:
        engine: the model.
        info: what the manifest says of it.
        gates: see `carve_runtime.gates.Gates`.
        stats: keep what the gates skip, see `gate_stats`; mode ``sequence`` does so by itself.

    Raises:
        RequestError: ``argument`` for an unknown mode of the gates.
    """

    def __init__(
        self, engine: OnnxRunner, info: ModelInfo, *, gates: str = "token", stats: bool = False
    ) -> None:
        self._engine, self._info = engine, info
        self._gates = Gates(info.gates, gates)
        self._watch = bool(self._gates) and (stats or gates == "sequence")
        self._length = 0
        self._capacity = 0
        self._open()

    def _open(self) -> None:
        """Get the cache ready."""
        engine, info = self._engine, self._info
        self._names = cache_names(info)
        half = bool(self._names) and engine.inputs[self._names[0][0]].is_half
        self._dtype = np.float16 if half else np.float32
        empty = np.zeros((1, info.num_key_value_heads, 0, info.head_dim), self._dtype)
        # The cache: past and present at once where it is shared, else the latest present.
        self._values = [engine.place(empty)] * len(self._names)
        self._binding: Any = engine.binding()

    @property
    def gate_stats(self) -> GateStats:
        """What the gates skipped; empty where the session was not asked to keep it."""
        return self._gates.stats()

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        return self._length

    def step(
        self, ids: Sequence[int] | NDArray[np.integer], *, rows: int | None = None
    ) -> NDArray[np.float32]:
        """Append tokens to the sequence.

        Args:
            ids: [S] token ids, S >= 1: a prompt or a part of it, or the latest token.
            rows: of how many of them, the last ones, logits are wanted; None: of all.

        Returns:
            Logits float32 [S, V], or [rows, V], that predict the token after each of ``ids``.

        Raises:
            RequestError: ``token-id`` for ids that are not integers in the vocabulary,
                ``context-length`` when the sequence would pass the model's maximum. The
                session is unchanged then.
            CarveRuntimeError: ``memory`` when the cache or the logits do not fit, ``run`` when
                the engine fails.
        """
        tokens = check_ids(ids, self._info.vocab_size)
        total = self._length + tokens.size
        if total > self._info.max_length:
            raise RequestError(
                "context-length",
                f"{total} tokens do not fit the model's context of {self._info.max_length}",
                "shorten the prompt",
            )
        count = tokens.size if rows is None else max(1, min(rows, tokens.size))
        try:
            logits = self._advance(tokens, total, count)
        except MemoryError as error:
            raise out_of_memory("the sequence", error) from error
        self._length = total
        return logits

    def _advance(self, tokens: NDArray[np.int64], total: int, rows: int) -> NDArray[np.float32]:
        """Run the model on new tokens, ``total`` with those before; logits of the last ``rows``."""
        feeds: dict[str, NDArray[Any]] = {
            "input_ids": tokens[None],
            "attention_mask": np.ones((1, total), np.int64),
            "position_ids": np.arange(self._length, total, dtype=np.int64)[None],
        }
        feeds = {name: array for name, array in feeds.items() if name in self._engine.inputs}
        feeds.update(self._gates.feeds())
        if self._info.shared_cache:
            logits = self._step_shared(feeds, tokens.size, total)
        else:
            logits = self._step_growing(feeds)
        last: NDArray[np.float32] = logits[0, -rows:]
        return last

    def _step_growing(self, feeds: dict[str, NDArray[Any]]) -> NDArray[np.float32]:
        values = {name: value(array) for name, array in feeds.items()}
        pasts = {past: v for (past, _), v in zip(self._names, self._values, strict=True)}
        outputs = ["logits", *(present for _, present in self._names)]
        if self._watch:
            outputs += [SCORES, BARS]
        logits, *rest = self._engine.run_values(outputs, values | pasts)
        if self._watch:
            bars, scores = rest.pop().numpy(), rest.pop().numpy()
            self._gates.seen(scores, bars)
        self._values = rest
        array: NDArray[np.float32] = logits.numpy()
        return array

    def _step_shared(
        self, feeds: dict[str, NDArray[Any]], steps: int, total: int
    ) -> NDArray[np.float32]:
        if total > self._capacity:
            self._grow(total)
        binding = self._binding
        for name, array in feeds.items():
            if name in self._engine.inputs:
                binding.bind_cpu_input(name, array)
            else:  # an input with a value of its own: numpy arrays are bound to the others only
                binding.bind_ortvalue_input(name, value(array))
        # A fresh array each step: the caller may keep it.
        logits = np.empty((1, steps, self._info.vocab_size), np.float32)
        binding.bind_ortvalue_output("logits", value(logits))
        if self._watch:
            scores, bars = np.empty((2, 1, steps, len(self._info.gates)), np.float32)
            binding.bind_ortvalue_output(SCORES, value(scores))
            binding.bind_ortvalue_output(BARS, value(bars))
        self._engine.run_bound(binding, shrink=steps >= _SHRINK_FROM)
        if self._watch:
            self._gates.seen(scores, bars)
        return logits

    def _room(self, total: int) -> int:
        """Tokens that the cache gets room for where ``total`` no longer fit."""
        return min(max(_FIRST_CAPACITY, 2 * self._capacity, total), self._info.max_length)

    def _grow(self, total: int) -> None:
        """Make room for ``total`` tokens; every doubling copies what is valid once."""
        capacity = self._room(total)
        heads, width = self._info.num_key_value_heads, self._info.head_dim
        for index, (past, present) in enumerate(self._names):
            # zeros, not empty: the pages are not touched before they are written either way,
            # and no operator can meet a NaN that an earlier owner of the memory left.
            buffer = np.zeros((1, heads, capacity, width), self._dtype)
            if self._length:
                buffer[:, :, : self._length] = self._values[index].numpy()[:, :, : self._length]
            self._values[index] = shared = self._engine.place(buffer)
            self._binding.bind_ortvalue_input(past, shared)
            self._binding.bind_ortvalue_output(present, shared)
        self._capacity = capacity


def check_ids(ids: Sequence[int] | NDArray[np.integer], vocab_size: int) -> NDArray[np.int64]:
    """Return token ids as int64 [S], S >= 1.

    Raises:
        RequestError: ``token-id`` when they are not integers from 0 to ``vocab_size - 1``.
    """
    array = np.asarray(ids)
    if array.ndim != 1 or array.size == 0 or array.dtype.kind not in "iu":
        raise RequestError("token-id", "token ids must be a non-empty sequence of integers")
    if array.min() < 0 or array.max() >= vocab_size:
        raise RequestError(
            "token-id",
            f"token ids run from {array.min()} to {array.max()}, "
            f"but the model's vocabulary ends at {vocab_size - 1}",
        )
    return array.astype(np.int64)
