"""Which experts are in memory: a budget, what to drop, and loading ahead."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from carve_runtime.errors import CarveRuntimeError, RequestError
from carve_runtime.index import Key

POLICIES = ("lfu", "lru")
_MEMORY = 1 / 64
_LOADERS = 2
_ASK = 8
"""Steps of which one is guessed where reading ahead does not pay."""


@dataclass(slots=True)
class ExpertStats:
    """Counts since the model was loaded.

    ``hits`` experts that were resident when a step reached them, ``late`` those still being read
    because they had been expected, ``misses`` the rest. ``expected`` counts the predictor's
    experts, ``right`` those of them that were chosen, ``of`` all chosen where it had predicted.
    ``bytes_read`` from the file; ``tokens`` rows at the first layer; ``resident_bytes`` the most at
    any time.
    """

    hits: int = 0
    late: int = 0
    misses: int = 0
    expected: int = 0
    right: int = 0
    of: int = 0
    bytes_read: int = 0
    evictions: int = 0
    tokens: int = 0
    resident_bytes: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of chosen experts that were resident."""
        return self.hits / max(1, self.hits + self.late + self.misses)

    @property
    def recall(self) -> float:
        """Share of chosen experts that were expected, where there was a prediction."""
        return self.right / max(1, self.of)

    @property
    def precision(self) -> float:
        """Share of expected experts that were chosen."""
        return self.right / max(1, self.expected)

    @property
    def bytes_per_token(self) -> float:
        """Bytes read for a token."""
        return self.bytes_read / max(1, self.tokens)

    def plus(self, other: ExpertStats) -> ExpertStats:
        """Counts of two processes together."""
        return ExpertStats(*(getattr(self, n) + getattr(other, n) for n in self.__slots__))

    def as_dict(self) -> dict[str, float]:
        """All counts and rates by name."""
        return {
            **{name: getattr(self, name) for name in self.__slots__},
            "hit_rate": self.hit_rate,
            "recall": self.recall,
            "precision": self.precision,
            "bytes_per_token": self.bytes_per_token,
        }


@dataclass(slots=True)
class _Slot:
    cost: int
    value: Future[Any]
    users: int = 0
    last: int = 0


@dataclass(slots=True)
class _Heat:
    """A share of steps in which an expert was chosen; older steps count ever less."""

    share: float
    step: int = 0

    def at(self, step: int) -> float:
        return self.share * (1.0 - _MEMORY) ** (step - self.step)

    def chosen(self, step: int) -> None:
        self.share, self.step = self.at(step) + _MEMORY, step


@dataclass(slots=True)
class _Layers:
    """Steps that each layer has seen, the clock of `_Heat`."""

    steps: dict[int, int] = field(default_factory=dict)

    def of(self, key: Key) -> int:
        return self.steps.get(key[0], 0)


@dataclass(slots=True)
class _Ahead:
    """Of the experts of a layer that were guessed and not there, how many a step then took.

    One that it took would have been loaded anyway; any other is loaded for nothing and pushes out
    what may be wanted. Older guesses count ever less.
    """

    taken: float = 1.0
    other: float = 0.0
    asked: int = 0

    @property
    def pays(self) -> bool:
        return self.taken >= self.other

    def judge(self, guessed: int, taken: int) -> None:
        old = (1.0 - _MEMORY) ** guessed
        self.taken = self.taken * old + taken
        self.other = self.other * old + guessed - taken


@dataclass(frozen=True, slots=True)
class _Guess:
    """Experts that a step was said to take of a layer; ``absent`` were not there."""

    layer: int
    keys: frozenset[Key]
    absent: frozenset[Key]


class Residency:
    """A cache of loaded experts; safe to share between threads.

    A thread uses one expert at a time, so that whoever waits for room holds none.

    Args:
        load: makes an expert.
        cost: bytes of memory each takes.
        size: bytes of the file that each is.
        budget: most bytes of memory; None for no limit.
        policy: ``lfu`` drops what was chosen in the smallest share of recent steps, where the share
            starts at ``hotness``; ``lru`` what was not used for longest.
        hotness: share of calibration tokens that chose an expert.

    Raises:
        RequestError: ``argument`` for another policy.
    """

    def __init__(
        self,
        load: Callable[[Key], Any],
        cost: Mapping[Key, int],
        size: Mapping[Key, int],
        *,
        budget: int | None,
        policy: str,
        hotness: Mapping[Key, float],
    ) -> None:
        if policy not in POLICIES:
            raise RequestError("argument", f"policy {policy!r} is none of {', '.join(POLICIES)}")
        self._load, self._cost, self._size = load, cost, size
        self._budget, self._policy = budget, policy
        self._slots: dict[Key, _Slot] = {}
        self._heat = {key: _Heat(share) for key, share in hotness.items()}
        self._layers = _Layers()
        self._used = self._clock = 0
        self._wanted: dict[int, frozenset[Key]] = {}
        self._guesses: dict[int, _Guess] = {}
        self._absent = Counter(layer for layer, _ in cost)
        self._ahead = {layer: _Ahead() for layer in self._absent}
        self._changed = threading.Condition()
        self._pool = ThreadPoolExecutor(_LOADERS, "carve-load")
        self.stats = ExpertStats()

    def fill(self, keys: Sequence[Key]) -> None:
        """Load ``keys`` in order as long as they fit."""
        begun = []
        with self._changed:
            for key in keys:
                if self._budget is not None and self._used + self._cost[key] > self._budget:
                    break
                begun.append(self._begin(key))
        for slot in begun:
            slot.value.result()

    def want(self, layer: int, keys: Sequence[Key], rows: int) -> frozenset[Key]:
        """A step of ``rows`` reached a layer and takes ``keys``; returns those that are resident.

        Missing ones are begun as far as there is room at once.
        """
        with self._changed:
            self.stats.tokens += rows if layer == 0 else 0
            if keys:
                self._layers.steps[layer] = self._layers.of(keys[0]) + 1
            self._wanted[threading.get_ident()] = frozenset(keys)
            found = []
            for key in keys:
                self._heat[key].chosen(self._layers.of(key))
                slot = self._slots.get(key)
                if slot is None:
                    self.stats.misses += 1
                elif slot.value.done():
                    self.stats.hits += 1
                    found.append(key)
                else:
                    self.stats.late += 1
            guess = self._guesses.pop(threading.get_ident(), None)
            if guess is not None and guess.layer == layer:
                self.stats.expected += len(guess.keys)
                self.stats.right += len(guess.keys.intersection(keys))
                self.stats.of += len(keys)
                taken = len(guess.absent.intersection(keys))
                self._ahead[layer].judge(len(guess.absent), taken)
            for key in keys:
                if key not in self._slots and not self._begin_if_room(key):
                    break
            return frozenset(found)

    def asks(self, layer: int) -> bool:
        """Whether to guess what a step will take of a layer.

        Not where all is there; and seldom where reading ahead has not paid of late, see `_Ahead`.
        """
        with self._changed:
            if not self._absent[layer]:
                return False
            ahead = self._ahead[layer]
            ahead.asked += 1
            return ahead.pays or ahead.asked % _ASK == 0

    def prefetch(self, layer: int, keys: Sequence[Key]) -> None:
        """Begin to load ``keys`` of a layer where that pays, as far as there is room at once."""
        with self._changed:
            me = threading.get_ident()
            absent = [key for key in keys if key not in self._slots]
            self._guesses[me] = _Guess(layer, frozenset(keys), frozenset(absent))
            if not absent or not self._ahead[layer].pays:
                return
            self._wanted[me] = frozenset(keys)
            for key in sorted(absent, key=self._keep, reverse=True):
                if not self._begin_if_room(key):
                    return

    def everything(self) -> dict[Key, Any]:
        """All that is loaded."""
        with self._changed:
            return {key: slot.value.result() for key, slot in self._slots.items()}

    def found(self, layer: int, count: int, rows: int) -> None:
        """A step took ``count`` experts of what `everything` gave."""
        with self._changed:
            self.stats.hits += count
            self.stats.tokens += rows if layer == 0 else 0

    def done(self) -> None:
        """The step has what it wanted from the layer."""
        with self._changed:
            self._wanted.pop(threading.get_ident(), None)

    @contextmanager
    def use(self, key: Key) -> Iterator[Any]:
        """An expert, loaded if it has to be; it stays while the block runs.

        Raises:
            CarveRuntimeError: it cannot be loaded.
        """
        with self._changed:
            while key not in self._slots and not self._begin_if_room(key, last_resort=True):
                self._changed.wait()
            slot = self._slots[key]
            slot.users += 1
            self._clock += 1
            slot.last = self._clock
        try:
            yield slot.value.result()
        finally:
            with self._changed:
                slot.users -= 1
                if slot.value.done() and slot.value.exception() is not None:
                    self._drop(key, slot)
                self._changed.notify_all()

    def close(self) -> None:
        """End the loading threads and let go of every expert."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        with self._changed:
            self._slots.clear()
            self._used = 0

    def _keep(self, key: Key) -> float:
        """What is lowest goes first."""
        if self._policy == "lru":
            return float(self._slots[key].last) if key in self._slots else 0.0
        return self._heat[key].at(self._layers.of(key))

    def _begin_if_room(self, key: Key, *, last_resort: bool = False) -> bool:
        """Make room and begin to load.

        Experts that steps wait for stay, unless nothing else is left and ``last_resort``.
        """
        cost = self._cost[key]
        if self._budget is not None and self._used + cost > self._budget:
            idle = [k for k, s in self._slots.items() if not s.users and s.value.done()]
            waited = frozenset().union(*self._wanted.values())
            free = sorted((k for k in idle if k not in waited), key=self._keep)
            if last_resort:
                free += sorted((k for k in idle if k in waited), key=self._keep)
            victims = []
            room = self._budget - self._used
            for k in free:
                if room >= cost:
                    break
                victims.append(k)
                room += self._slots[k].cost
            if room < cost:
                return False
            for k in victims:
                self._drop(k, self._slots[k])
                self.stats.evictions += 1
        self._begin(key)
        return True

    def _begin(self, key: Key) -> _Slot:
        self._used += self._cost[key]
        self.stats.resident_bytes = max(self.stats.resident_bytes, self._used)
        self.stats.bytes_read += self._size[key]
        self._clock += 1
        try:
            value = self._pool.submit(self._load, key)
        except RuntimeError as error:
            raise CarveRuntimeError("closed", "the model is closed", "load it again") from error
        self._slots[key] = slot = _Slot(self._cost[key], value, last=self._clock)
        self._absent[key[0]] -= 1
        value.add_done_callback(self._loaded)
        return slot

    def _loaded(self, _: Future[Any]) -> None:
        with self._changed:
            self._changed.notify_all()

    def _drop(self, key: Key, slot: _Slot) -> None:
        if self._slots.get(key) is slot:
            del self._slots[key]
            self._absent[key[0]] += 1
            self._used -= slot.cost
