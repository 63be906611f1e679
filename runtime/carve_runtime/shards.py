"""Experts in several processes, one for each device; this one is the first."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from carve_runtime.errors import CarveRuntimeError
from carve_runtime.experts import (
    ExpertFile,
    LocalExperts,
    Rows,
    chosen_rows,
    hottest_first,
    likely,
    summed,
)
from carve_runtime.frames import FAILED, STATS, Part, pack_expect, pack_run, receive, send
from carve_runtime.index import Key, SplitIndex
from carve_runtime.placement import Copies, Holders
from carve_runtime.residency import ExpertStats


@dataclass(frozen=True, slots=True)
class Limits:
    """Memory of the processes.

    ``budgets``: by device, bytes for resident experts; ``policy``, ``prefetch``: see
    `carve_runtime.load`; ``costs``: what `carve_runtime.experts.ExpertFile.costs` gave.
    """

    budgets: Sequence[int]
    policy: str
    prefetch: bool
    costs: Mapping[int, int]

    def of(self, device: int) -> dict[str, Any]:
        """What `LocalExperts` is told."""
        return {"budget": self.budgets[device], "policy": self.policy, "prefetch": self.prefetch}


_NO_LIMITS = {"budget": None, "policy": "lfu", "prefetch": False}


def held_by(index: SplitIndex, holders: Holders, devices: int) -> list[list[Key]]:
    """By device, the experts that it has a copy of, the hottest first."""
    keys = hottest_first(index)
    return [[k for k in keys if d in holders[k[0]][k[1]]] for d in range(devices)]


class _Shard:
    """A process with some of the experts."""

    def __init__(self, number: int, request: Mapping[str, Any]) -> None:
        self.number = number
        # The package that runs here, whatever the caller did to the path; -P: not the folder's.
        home = str(Path(__file__).resolve().parents[1])
        path = os.pathsep.join([home, *filter(None, [os.environ.get("PYTHONPATH")])])
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "carve_runtime.shard_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
        )
        self.send(json.dumps(request).encode())

    @property
    def pid(self) -> int:
        """Its process."""
        return self._process.pid

    def send(self, *parts: bytes | memoryview) -> None:
        try:
            assert self._process.stdin is not None
            send(self._process.stdin, *parts)
        except (OSError, ValueError) as error:
            raise self._gone() from error

    def receive(self) -> memoryview:
        """An answer.

        Raises:
            CarveRuntimeError: ``shard`` when the process is gone or failed.
        """
        assert self._process.stdout is not None
        try:
            data = receive(self._process.stdout)
        except (OSError, ValueError) as error:
            raise self._gone() from error
        if not data:
            raise self._gone()
        if data[:1] == FAILED:
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
        file: their weights.
        artifact: its directory, resolved.
        model: the index's path in it.
        holders: by layer and expert, the devices with a copy.
        devices: how many there are.
        threads: how many experts run at once in this process.
        limits: memory of the processes, None for as much as it takes.

    Raises:
        CarveRuntimeError: ``shard`` when a process cannot load its experts.
    """

    def __init__(
        self,
        file: ExpertFile,
        artifact: Path,
        model: str,
        holders: Holders,
        devices: int,
        threads: int,
        limits: Limits | None = None,
    ) -> None:
        self._layers = file.index.layers
        self._copies = Copies(holders)
        self._lock = threading.Lock()
        self._broken: CarveRuntimeError | None = None
        self._tokens = 0
        own = held_by(file.index, holders, devices)
        options = [_NO_LIMITS if limits is None else limits.of(d) for d in range(devices)]
        costs = {} if limits is None else limits.costs
        self._prefetch = limits is not None and limits.prefetch
        self._shards: dict[int, _Shard] = {}
        try:
            for d in range(1, devices):
                request = {"artifact": str(artifact), "model": model, "keys": own[d]}
                self._shards[d] = _Shard(d, {**request, "costs": costs, **options[d]})
            self._local = LocalExperts(file, own[0], threads=threads, **options[0])
            for shard in self._shards.values():
                shard.receive()
        except BaseException:
            self._end()
            raise

    @property
    def stats(self) -> ExpertStats:
        """Of all processes together; ``resident_bytes`` is the sum of the most of each.

        Raises:
            CarveRuntimeError: as `run`.
        """
        with self._whole():
            total = self._local.stats
            for shard in self._shards.values():
                shard.send(STATS)
            for shard in self._shards.values():
                total = total.plus(ExpertStats(**json.loads(bytes(shard.receive()))))
            # A row counts once, whichever processes it went to.
            total = total.plus(ExpertStats(tokens=self._tokens - total.tokens))
        return total

    @property
    def pids(self) -> list[int]:
        """The other processes."""
        return [s.pid for s in self._shards.values()]

    def asks(self, layer: int) -> bool:
        """Always where there is a limit: each process knows for itself whether it pays."""
        return self._prefetch

    def expect(self, layer: int, scores: Rows) -> None:
        """Let every process read ahead what it would be asked for."""
        parts = self._parts(layer, chosen_rows(likely(self._layers[layer], scores)), keep=False)
        with self._whole():
            for d, part in parts.items():
                experts = [e for e, _ in part]
                if d:
                    self._shards[d].send(*pack_expect(layer, experts))
                else:
                    self._local.fetch(layer, experts)

    def run(self, layer: int, x: Rows, routes: Rows) -> Rows:
        """See `carve_runtime.experts.Experts.run`.

        Raises:
            CarveRuntimeError: ``shard`` when a process is gone or failed, now or before.
        """
        chosen = chosen_rows(routes)
        with self._whole():
            self._tokens += len(x) if layer == 0 else 0
            found = self._ask(layer, x, self._parts(layer, chosen, keep=True))
        return summed(x, [(rows, found[e]) for e, rows in chosen])

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """One talk with the processes at a time, and none after one that failed."""
        with self._lock:
            if self._broken is not None:
                raise self._broken
            try:
                yield
            except BaseException as error:
                # An answer may still be under way: what comes next could not be told from it.
                self._broken = (
                    error
                    if isinstance(error, CarveRuntimeError)
                    else CarveRuntimeError("shard", "interrupted in a step", "load it again")
                )
                self._end()
                raise

    def _parts(self, layer: int, chosen: Part, *, keep: bool) -> dict[int, Part]:
        """Who runs what: experts by device."""
        devices = self._copies.choose(layer, [(e, len(rows)) for e, rows in chosen], keep=keep)
        return {
            d: [one for where, one in zip(devices, chosen, strict=True) if where == d]
            for d in dict.fromkeys(devices)
        }

    def _ask(self, layer: int, x: Rows, parts: Mapping[int, Part]) -> dict[int, Rows]:
        away = {d: part for d, part in parts.items() if d}
        for d, part in away.items():
            self._shards[d].send(*pack_run(layer, x, part))
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
