"""Experts in several processes, one for each device; this one is the first.

Frames over a child's standard input and output: a length, then bytes. Numbers are little-endian.
Nothing is pickled. A child ends when its input does, however this process ended.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from carve_runtime.errors import CarveRuntimeError
from carve_runtime.experts import (
    ExpertFile,
    LocalExperts,
    Rows,
    chosen_rows,
    hottest_first,
    summed,
)
from carve_runtime.index import Key, SplitIndex
from carve_runtime.residency import ExpertStats

_LENGTH = struct.Struct("<Q")
_HEAD = struct.Struct("<III")  # layer, rows, experts
_MOST_FRAME = 1 << 34
_FAILED, _DONE = b"!", b"."
Assignment = Sequence[Sequence[int]]
"""By layer and expert, the device that runs it."""


def _send(stream: IO[bytes], *parts: bytes | memoryview) -> None:
    stream.write(_LENGTH.pack(sum(len(p) for p in parts)))
    for part in parts:
        stream.write(part)
    stream.flush()


def _receive(stream: IO[bytes]) -> bytes:
    """A frame; empty at the end of the stream."""
    head = stream.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return b""
    (length,) = _LENGTH.unpack(head)
    data = stream.read(length) if length <= _MOST_FRAME else b""
    return data if len(data) == length else b""


def _bytes(array: NDArray[Any]) -> memoryview:
    return memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8))  # type: ignore[arg-type]


class _Shard:
    """A process with some of the experts."""

    def __init__(self, number: int, artifact: Path, model: str, keys: Sequence[Key]) -> None:
        self.number = number
        # The package that runs here, whatever the caller did to the path; -P: not the folder's.
        home = str(Path(__file__).resolve().parents[1])
        path = os.pathsep.join([home, *filter(None, [os.environ.get("PYTHONPATH")])])
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "carve_runtime.shards"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
        )
        request = {"artifact": str(artifact), "model": model, "keys": [list(k) for k in keys]}
        self.send(json.dumps(request).encode())

    @property
    def pid(self) -> int:
        """Its process."""
        return self._process.pid

    def send(self, *parts: bytes | memoryview) -> None:
        try:
            assert self._process.stdin is not None
            _send(self._process.stdin, *parts)
        except (OSError, ValueError) as error:
            raise self._gone() from error

    def receive(self) -> memoryview:
        """An answer.

        Raises:
            CarveRuntimeError: ``shard`` when the process is gone or failed.
        """
        assert self._process.stdout is not None
        try:
            data = _receive(self._process.stdout)
        except (OSError, ValueError) as error:
            raise self._gone() from error
        if not data:
            raise self._gone()
        if data[:1] == _FAILED:
            raise CarveRuntimeError("shard", f"shard {self.number}: {data[1:].decode()}")
        return memoryview(data)[1:]

    def _gone(self) -> CarveRuntimeError:
        self.end()
        return CarveRuntimeError(
            "shard",
            f"the process of shard {self.number} ended (exit code {self._process.returncode})",
            "load the model again; out of memory is the usual reason",
        )

    def end(self) -> None:
        """End it: by the end of its input, or by force."""
        for stream in (self._process.stdin, self._process.stdout):
            try:
                if stream is not None:
                    stream.close()
            except OSError:  # what was buffered for a process that is gone
                continue
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class ShardedExperts:
    """Experts by device; device 0 is this process.

    Args:
        index: the model.
        artifact: its directory, resolved.
        model: the index's path in it.
        homes: by layer and expert, the device.
        devices: how many there are.
        threads: how many experts run at once in this process.

    Raises:
        CarveRuntimeError: ``shard`` when a process cannot load its experts.
    """

    predicts = False

    def __init__(
        self,
        index: SplitIndex,
        artifact: Path,
        model: str,
        homes: Assignment,
        devices: int,
        threads: int,
    ) -> None:
        self._homes = homes
        self._lock = threading.Lock()
        self._broken: CarveRuntimeError | None = None
        keys = hottest_first(index)
        own = [[k for k in keys if homes[k[0]][k[1]] == d] for d in range(devices)]
        self._shards: dict[int, _Shard] = {}
        try:
            for d in range(1, devices):
                self._shards[d] = _Shard(d, artifact, model, own[d])
            self._local = LocalExperts(ExpertFile(index), own[0], threads=threads)
            for shard in self._shards.values():
                shard.receive()
        except BaseException:
            self._end()
            raise

    @property
    def stats(self) -> ExpertStats:
        """Of this process only."""
        return self._local.stats

    @property
    def pids(self) -> list[int]:
        """The other processes."""
        return [s.pid for s in self._shards.values()]

    def expect(self, layer: int, scores: Rows) -> None:
        """Nothing: every expert is loaded."""

    def run(self, layer: int, x: Rows, routes: Rows) -> Rows:
        """See `carve_runtime.experts.Experts.run`."""
        chosen = chosen_rows(routes)
        home = self._homes[layer]
        parts: dict[int, list[tuple[int, NDArray[np.intp]]]] = {}
        for e, rows in chosen:
            parts.setdefault(home[e], []).append((e, rows))
        with self._lock:
            if self._broken is not None:
                raise self._broken
            try:
                found = self._ask(layer, x, parts)
            except BaseException as error:
                # An answer may still be under way: what comes next could not be told from it.
                self._broken = (
                    error
                    if isinstance(error, CarveRuntimeError)
                    else CarveRuntimeError("shard", "interrupted in a step", "load it again")
                )
                self._end()
                raise
        return summed(x, [(rows, found[e]) for e, rows in chosen])

    def _ask(
        self, layer: int, x: Rows, parts: Mapping[int, list[tuple[int, NDArray[np.intp]]]]
    ) -> dict[int, Rows]:
        away = {d: part for d, part in parts.items() if d}
        for d, part in away.items():
            taken = np.unique(np.concatenate([rows for _, rows in part]))
            mask = np.zeros((len(part), len(taken)), np.uint8)
            for row, (_, rows) in zip(mask, part, strict=True):
                row[np.searchsorted(taken, rows)] = 1
            experts = np.array([e for e, _ in part], "<u4")
            head = _HEAD.pack(layer, len(taken), len(part))
            self._shards[d].send(head, _bytes(experts), _bytes(mask), _bytes(x[taken]))
        here = parts.get(0, [])
        found = {
            e: out for (e, _), (_, out) in zip(here, self._local.each(layer, x, here), strict=True)
        }
        for d, part in away.items():
            flat = np.frombuffer(self._shards[d].receive(), "<f4").reshape(-1, x.shape[1])
            at = 0
            for e, rows in part:
                found[e] = flat[at : at + len(rows)]
                at += len(rows)
        return found

    def _end(self) -> None:
        for shard in self._shards.values():
            shard.end()

    def close(self) -> None:
        """End the processes."""
        with self._lock:
            if self._broken is None:
                self._broken = CarveRuntimeError("closed", "the model is closed", "load it again")
            self._end()
            self._local.close()


def _serve(source: IO[bytes], sink: IO[bytes]) -> None:
    """What a child does: load its experts, then answer until its input ends."""
    from carve_runtime.index import read_index
    from carve_runtime.manifest import read_manifest

    request = json.loads(_receive(source))
    root = Path(request["artifact"])
    index = read_index(root, read_manifest(root).files, request["model"])
    experts = LocalExperts(ExpertFile(index), [(int(i), int(e)) for i, e in request["keys"]])
    _send(sink, _DONE)
    while data := _receive(source):
        layer, rows, count = _HEAD.unpack_from(data)
        width = index.layers[layer].width
        numbers = np.frombuffer(data, "<u4", count, _HEAD.size)
        at = _HEAD.size + 4 * count
        mask = np.frombuffer(data, np.uint8, count * rows, at).reshape(count, rows)
        x = np.frombuffer(data[at + count * rows :], "<f4").reshape(rows, width)
        part = [(int(e), np.flatnonzero(m)) for e, m in zip(numbers, mask, strict=True)]
        results = [_bytes(out) for _, out in experts.each(layer, x, part)]
        _send(sink, _DONE, *results)
    experts.close()


def main() -> int:
    """The entry of a child process."""
    import signal

    # A terminal sends its interrupt to all; the first process ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    source, sink = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever else is printed must not be taken for an answer
    try:
        _serve(source, sink)
    except BrokenPipeError:
        return 1
    except Exception as error:
        try:
            _send(sink, _FAILED, str(error).encode())
        except OSError:
            return 1
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
