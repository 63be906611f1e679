"""What is to be placed, and what a placement costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from carve.errors import UserError
from carve.placement.devices import Devices
from carve.placement.trace import Trace

Array = NDArray[np.float64]
Homes = list[NDArray[np.intp]]
"""By layer, the device of each expert ``[E_l]``."""


@dataclass(frozen=True)
class Problem:
    """Experts, the devices that are to hold them, and a trace of who is needed.

    ``nbytes[l]`` and ``macs[l]`` ``[E_l]``: bytes of each expert's weights and multiply-accumulates
    of a token that takes it. ``token_bytes``: what a token sends to a device and gets back.
    ``host_bytes``: what the host holds besides experts, caches included; ``host_macs[l]`` and
    ``host_reads[l]``: multiply-accumulates and bytes a token of what the host computes while others
    run experts, the shared expert. ``batch``: tokens that are served at a time, where throughput is
    asked for.
    """

    devices: Devices
    trace: Trace
    nbytes: Sequence[Array]
    macs: Sequence[Array]
    token_bytes: float
    host_bytes: float = 0.0
    host_macs: Sequence[float] = ()
    host_reads: Sequence[float] = ()
    batch: int = 64

    @property
    def num_layers(self) -> int:
        """Routed FFNs."""
        return len(self.nbytes)

    @cached_property
    def caps(self) -> Array:
        """``[D]`` bytes for experts on each device."""
        memory = np.array([d.memory for d in self.devices.devices])
        memory[0] -= self.host_bytes
        return memory

    @cached_property
    def _rates(self) -> tuple[Array, Array, Array, Array]:
        """``[D]``: seconds a multiply-accumulate, a byte read and a byte sent, and a round trip."""
        d = self.devices.devices
        links = [self.devices.link(x) for x in d]
        return (
            np.array([1.0 / x.flops for x in d]),
            np.array([1.0 / x.bandwidth for x in d]),
            np.array([0.0 if k is None else 1.0 / k.bandwidth for k in links]),
            np.array([0.0 if k is None else 2.0 * k.latency for k in links]),
        )

    @cached_property
    def busy(self) -> list[Array]:
        """``[E_l, D]`` seconds a token that an expert keeps a device busy, over the trace.

        ``p (macs / flops + sent bytes / link) + min(1, p B) bytes / (B bandwidth)`` with ``p`` the
        share of tokens that take the expert: a batch of ``B`` reads its weights once.
        """
        mac, read, sent, _ = self._rates
        return [
            p[:, None] * (m[:, None] * mac + self.token_bytes * sent)
            + (np.minimum(1.0, p * self.batch) * b / self.batch)[:, None] * read
            for p, m, b in zip(self.trace.loads(), self.macs, self.nbytes, strict=True)
        ]

    @cached_property
    def busy_base(self) -> list[Array]:
        """``[D]`` seconds a token that the host is busy with the shared expert."""
        mac, read, _, _ = self._rates
        first = np.eye(len(self.devices))[0]
        return [
            first * (m * mac[0] + b * read[0] / self.batch)
            for m, b in zip(*self._host(), strict=True)
        ]

    @cached_property
    def single(self) -> list[Array]:
        """``[E_l, D]`` seconds that an expert takes for one token alone.

        The slower of its arithmetic and reading its weights.
        """
        mac, read, _, _ = self._rates
        return [
            np.maximum(m[:, None] * mac, b[:, None] * read)
            for m, b in zip(self.macs, self.nbytes, strict=True)
        ]

    @cached_property
    def single_base(self) -> list[Array]:
        """``[D]`` seconds of the shared expert for one token alone."""
        mac, read, _, _ = self._rates
        first = np.eye(len(self.devices))[0]
        return [first * max(m * mac[0], b * read[0]) for m, b in zip(*self._host(), strict=True)]

    @cached_property
    def trip(self) -> Array:
        """``[D]`` seconds to send one token to a device and get it back."""
        _, _, sent, latency = self._rates
        return latency + self.token_bytes * sent

    @cached_property
    def transitions(self) -> list[Array]:
        """The trace's, counted once."""
        return self.trace.transitions()

    @cached_property
    def sets(self) -> list[tuple[NDArray[np.bool_], Array]]:
        """By layer, the distinct sets of experts in the trace and their shares."""
        return [self.trace.sets(i) for i in range(self.num_layers)]

    def _host(self) -> tuple[Sequence[float], Sequence[float]]:
        none = (0.0,) * self.num_layers
        return self.host_macs or none, self.host_reads or none

    def used(self, homes: Homes) -> Array:
        """``[D]`` bytes of experts on each device."""
        total = np.zeros(len(self.devices))
        for i, held in enumerate(homes):
            total += self.used_by(i, held)
        return total

    def used_by(self, layer: int, held: NDArray[np.intp]) -> Array:
        """``[D]`` bytes of one layer's experts on each device."""
        total = np.zeros(len(self.devices))
        np.add.at(total, held, self.nbytes[layer])
        return total

    def memory(self, homes: Homes) -> dict[str, list[float]]:
        """By device, bytes of experts and room for them."""
        used = zip(self.devices.names, self.used(homes), self.caps, strict=True)
        return {name: [float(u), float(m)] for name, u, m in used}

    def fits(self, homes: Homes) -> bool:
        """Whether every device's memory holds what is placed there."""
        return bool((self.used(homes) <= self.caps + 1e-6).all())

    def check(self) -> None:
        """What can be said before any search.

        Raises:
            UserError: a constraint that no placement keeps, by name.
        """
        names = self.devices.names
        if self.caps[0] < 0:
            raise UserError(
                "infeasible",
                f"memory of {names[0]!r}: attention, shared experts and cache need "
                f"{_size(self.host_bytes)}, it has {_size(self.devices.devices[0].memory)}",
                "name a larger device first, or lower --bits",
            )
        need, room = sum(float(b.sum()) for b in self.nbytes), float(self.caps.sum())
        if need > room:
            raise UserError(
                "infeasible",
                f"memory of all devices together: experts need {_size(need)}, "
                f"there is room for {_size(room)}",
                "add a device, or lower --bits",
            )
        for name, size in zip(self.trace.layers, self.nbytes, strict=True):
            if size.max() > self.caps.max():
                raise UserError(
                    "infeasible",
                    f"an expert of {name} has {_size(float(size.max()))}, and the largest room "
                    f"on one device is {_size(float(self.caps.max()))}",
                    "use more, smaller experts (--set convert.num_experts)",
                )


def _size(n: float) -> str:
    return f"{n / 1e9:.2f} GB" if n >= 1e9 else f"{n / 1e6:.2f} MB"


def throughput(problem: Problem, homes: Homes) -> float:
    """``sum_l max_d (base + sum_e busy)``: seconds a token of the routed FFNs, devices at once.

    Attention is the same wherever experts are, and not counted.
    """
    return float(sum(layer_busy(problem, i, held) for i, held in enumerate(homes)))


def latency(problem: Problem, homes: Homes) -> float:
    """``sum_l mean_t max_d (base + sum_(e chosen) single + trip)``: seconds of one token alone."""
    return float(sum(layer_latency(problem, i, held) for i, held in enumerate(homes)))


def layer_busy(problem: Problem, layer: int, held: NDArray[np.intp]) -> Any:
    """One layer's part of `throughput` for homes ``[..., E]``."""
    work = one_hot(held, len(problem.devices)) * problem.busy[layer]
    return (problem.busy_base[layer] + work.sum(-2)).max(-1)


def layer_latency(problem: Problem, layer: int, held: NDArray[np.intp]) -> Any:
    """One layer's part of `latency` for homes ``[..., E]``."""
    sets, share = problem.sets[layer]
    total: Any = 0.0
    where = one_hot(held, len(problem.devices))
    work, trips = where * problem.single[layer], problem.trip
    if held.ndim == 1:
        # One placement is asked for often, as experts are moved one by one; all sets at once.
        member = sets.astype(np.float64)
        slowest = problem.single_base[layer] + member @ work + (member @ where > 0) * trips
        return share @ slowest.max(1)
    for members, p in zip(sets, share, strict=True):
        there = where[..., members, :].any(-2)
        busy = work[..., members, :].sum(-2)
        total = total + p * (problem.single_base[layer] + busy + there * trips).max(-1)
    return total


def one_hot(held: NDArray[np.intp], devices: int) -> Array:
    """``[..., E, D]``: 1 where an expert of homes ``[..., E]`` is."""
    where: Array = (held[..., None] == np.arange(devices)).astype(np.float64)
    return where


def hops(problem: Problem, homes: Homes) -> float:
    """Pairs a token of experts in adjacent layers that sit on different devices."""
    return float(
        sum(
            (w * (a[:, None] != b[None, :])).sum()
            for w, a, b in zip(problem.transitions, homes, homes[1:], strict=False)
        )
    )


OBJECTIVES = {"throughput": throughput, "latency": latency, "affinity": hops}
"""What is minimised, by name."""


def scores(problem: Problem, homes: Homes) -> dict[str, float]:
    """A placement by every objective."""
    return {name: score(problem, homes) for name, score in OBJECTIVES.items()}
