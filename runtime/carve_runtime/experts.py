"""Experts of a split model, run where their bytes are: the sum is the same wherever that is."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from carve_runtime.engine import ExpertSession
from carve_runtime.errors import ArtifactError
from carve_runtime.files import FileError, open_regular, read_bytes
from carve_runtime.heap import heap_bytes
from carve_runtime.index import Key, Layer, SplitIndex
from carve_runtime.residency import ExpertStats, Residency

Rows = NDArray[np.float32]
_MOST_GRAPH = 1 << 26


class Experts(Protocol):
    """Where the experts of a model run."""

    def run(self, layer: int, x: Rows, routes: Rows) -> Rows:
        """Sum over a layer's experts.

        Args:
            layer: its number.
            x: ``[n, d]``.
            routes: ``[n, E]``, not 0 where a row takes an expert.

        Returns:
            ``[n, d]``: each row the sum of its experts' results, in the order of the experts.
        """
        ...

    def asks(self, layer: int) -> bool:
        """Whether `expect` is worth calling for a layer now."""
        ...

    def expect(self, layer: int, scores: Rows) -> None:
        """Say what a layer's scores will be, before it is reached: ``[n, E]``."""
        ...

    @property
    def stats(self) -> ExpertStats:
        """What was found, read and predicted."""
        ...

    def close(self) -> None:
        """End processes and threads."""
        ...


def chosen_rows(routes: Rows) -> list[tuple[int, NDArray[np.intp]]]:
    """Each chosen expert of ``routes`` ``[n, E]`` with its rows, in order."""
    return [(int(e), np.flatnonzero(routes[:, e])) for e in np.flatnonzero(routes.any(0))]


def likely(layer: Layer, scores: Rows) -> Rows:
    """``[n, E]``, not 0 where a row of ``scores`` would take an expert.

    Where the k-th score is repeated there is one more, which does no harm.
    """
    least = np.partition(scores, -layer.top_k, axis=1)[:, -layer.top_k, None]
    hit = scores >= least
    if layer.dynamic:
        hit &= scores > 0
    return hit.astype(np.float32)


def summed(x: Rows, results: Iterable[tuple[NDArray[np.intp], Rows]]) -> Rows:
    """``[n, d]`` zeros with every expert's rows added, in the order they come."""
    y = np.zeros_like(x)
    for rows, out in results:
        if len(rows) == len(y):
            y += out
        else:
            y[rows] += out
    return y


class ExpertFile:
    """Makes sessions from ranges of ``experts.bin``; safe to share between threads.

    The file is opened once: one that takes its name later is another model's.

    Args:
        index: the model.
        costs: what `costs` of another one gave, where another process measured it.

    Raises:
        ArtifactError: ``model`` when it or a graph cannot be read.
    """

    def __init__(self, index: SplitIndex, costs: Mapping[int, int] | None = None) -> None:
        self.index = index
        try:
            graphs = {f: read_bytes(f, _MOST_GRAPH) for f in {f.model for f in index.forms}}
            self._file = open_regular(index.data)
            if hasattr(os, "posix_fadvise"):
                # The next expert in the file is seldom the next one read: without this the system
                # reads megabytes ahead, and drops for them what it kept.
                os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        except (OSError, FileError) as error:
            raise ArtifactError("model", f"an expert cannot be read: {error}") from error
        self._graphs = [graphs[form.model] for form in index.forms]
        self._costs: dict[int, int] = dict(costs or {})

    def load(self, key: Key) -> ExpertSession:
        """Read an expert and make its session.

        Raises:
            ArtifactError: ``model`` when the file is shorter than it was, or is refused.
        """
        place = self.index.experts[key]
        form = self.index.forms[place.form]
        tensors = {}
        # An array each: onnxruntime keeps some of them, and a shared one would live with those.
        for t in form.tensors:
            data = np.empty(t.shape, t.dtype)
            self._read(data.reshape(-1).view(np.uint8), place.offset + t.offset)
            tensors[t.name] = data
        return ExpertSession(self._graphs[place.form], self.index.folder, tensors)

    def _read(self, data: NDArray[np.uint8], offset: int) -> None:
        """Fill ``data`` from the file; the system reads at most 2 GB at once."""
        at = 0
        while at < data.size:
            count = os.preadv(self._file.fileno(), [data[at:].data], offset + at)
            if count == 0:
                raise ArtifactError("model", f"{self.index.data} is shorter than its index says")
            at += count

    def cost(self, key: Key) -> int:
        """Bytes of memory that an expert takes once loaded, measured once for each form."""
        form = self.index.experts[key].form
        if form not in self._costs:
            first = self.load(key)  # takes what onnxruntime makes once, too
            before = heap_bytes()
            second = self.load(key)
            self._costs[form] = max(self.index.size(key), heap_bytes() - before)
            del first, second
        return self._costs[form]

    def costs(self) -> dict[int, int]:
        """By form that has an expert, what `cost` gives."""
        return {place.form: self.cost(key) for key, place in self.index.experts.items()}

    def least(self, keys: Collection[Key]) -> int:
        """Bytes of the most that one layer takes of ``keys`` for one token."""
        costs: dict[int, list[int]] = {}
        for key in keys:
            costs.setdefault(key[0], []).append(self.cost(key))
        return max(
            (
                sum(sorted(found, reverse=True)[: self.index.layers[number].top_k])
                for number, found in costs.items()
            ),
            default=0,
        )


class LocalExperts:
    """Experts of this process, all or as many as fit.

    Args:
        file: their weights.
        keys: those of this process, the hottest first.
        budget: bytes for resident ones; None for all.
        policy: see `carve_runtime.residency.Residency`.
        prefetch: load what is expected.
        threads: how many experts run at once.
    """

    def __init__(
        self,
        file: ExpertFile,
        keys: Sequence[Key],
        *,
        budget: int | None = None,
        policy: str = "lfu",
        prefetch: bool = True,
        threads: int = 1,
    ) -> None:
        index = file.index
        self._layers = index.layers
        self._prefetch = prefetch and budget is not None
        self._pool = ThreadPoolExecutor(threads, "carve-expert") if threads > 1 else None
        self._all: dict[Key, ExpertSession] | None = None
        self._residency = Residency(
            file.load,
            {key: 0 if budget is None else file.cost(key) for key in keys},
            {key: index.size(key) for key in keys},
            budget=budget,
            policy=policy,
            hotness={key: index.experts[key].hotness for key in keys},
        )
        self._residency.fill(keys)
        if budget is None:
            # Nothing ever goes, so a step need not ask.
            self._all = self._residency.everything()

    @property
    def stats(self) -> ExpertStats:
        """What was found, read and predicted."""
        return self._residency.stats

    def asks(self, layer: int) -> bool:
        """See `Experts.asks`."""
        return self._prefetch and self._residency.asks(layer)

    def expect(self, layer: int, scores: Rows) -> None:
        """Start to load the experts that ``scores`` ``[n, E]`` would choose."""
        self.fetch(layer, [e for e, _ in chosen_rows(likely(self._layers[layer], scores))])

    def fetch(self, layer: int, experts: Sequence[int]) -> None:
        """Start to load experts of a layer that comes next."""
        self._residency.prefetch(layer, [(layer, e) for e in experts])

    def run(self, layer: int, x: Rows, routes: Rows) -> Rows:
        """See `Experts.run`."""
        return summed(x, self.each(layer, x, chosen_rows(routes)))

    def each(
        self, layer: int, x: Rows, chosen: Sequence[tuple[int, NDArray[np.intp]]]
    ) -> list[tuple[NDArray[np.intp], Rows]]:
        """The results of chosen experts, in the order of ``chosen``."""
        if self._all is not None:
            return self._each_of_all(self._all, layer, x, chosen)
        keys = [(layer, e) for e, _ in chosen]
        resident = self._residency.want(layer, keys, len(x))
        rows = {(layer, e): r for e, r in chosen}
        # What is there runs while the rest is read.
        order = sorted(keys, key=lambda key: key not in resident)

        def one(key: Key) -> Rows:
            with self._residency.use(key) as session:
                result: Rows = session.run(x[rows[key]])
                return result

        try:
            if self._pool is None or len(order) < 2:
                found = {key: one(key) for key in order}
            else:
                found = dict(zip(order, self._pool.map(one, order), strict=True))
        finally:
            self._residency.done()
        return [(rows[key], found[key]) for key in keys]

    def _each_of_all(
        self,
        sessions: Mapping[Key, ExpertSession],
        layer: int,
        x: Rows,
        chosen: Sequence[tuple[int, NDArray[np.intp]]],
    ) -> list[tuple[NDArray[np.intp], Rows]]:
        self._residency.found(layer, len(chosen), len(x))

        def one(part: tuple[int, NDArray[np.intp]]) -> tuple[NDArray[np.intp], Rows]:
            e, rows = part
            return rows, sessions[layer, e].run(x if len(rows) == len(x) else x[rows])

        if self._pool is None or len(chosen) < 2:
            return [one(part) for part in chosen]
        return list(self._pool.map(one, chosen))

    def close(self) -> None:
        """End the threads."""
        self._all = None
        self._residency.close()
        if self._pool is not None:
            self._pool.shutdown(wait=True)


def hottest_first(index: SplitIndex) -> list[Key]:
    """Every expert, in the order of the file."""
    places: Mapping[Key, int] = {key: p.offset for key, p in index.experts.items()}
    return sorted(places, key=lambda key: places[key])
