"""The problem that a program poses: bytes and multiply-accumulates of its experts and the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from carve.arithmetic import Precision
from carve.budget import Split, matrices
from carve.errors import UserError
from carve.ffn import RoutedFFN
from carve.grid import BLOCK, large_table
from carve.placement.devices import Devices
from carve.placement.problem import Problem
from carve.placement.trace import Trace
from carve.program import Program
from carve.storable import storable


@storable
@dataclass(frozen=True)
class Sizes:
    """What `Problem` has to know of a model; as JSON it is enough to place it anew.

    ``nbytes``, ``macs``: by layer, of each expert; ``host_bytes`` without the cache;
    ``cache_bytes``: of one token in all layers; the rest as in `Problem`.
    """

    nbytes: Sequence[Sequence[float]]
    macs: Sequence[Sequence[float]]
    token_bytes: float
    host_bytes: float
    cache_bytes: float
    host_macs: Sequence[float]
    host_reads: Sequence[float]

    def problem(self, devices: Devices, trace: Trace, *, context: int, batch: int) -> Problem:
        """The problem for some devices, ``batch`` sequences of ``context`` tokens in the cache."""
        return Problem(
            devices,
            trace,
            [np.array(b, np.float64) for b in self.nbytes],
            [np.array(m, np.float64) for m in self.macs],
            self.token_bytes,
            self.host_bytes + self.cache_bytes * context * batch,
            self.host_macs,
            self.host_reads,
            batch,
        )

    @classmethod
    def parse(cls, raw: Mapping[str, Any], trace: Trace) -> Sizes:
        """From JSON that an artifact holds.

        Raises:
            UserError: fields are missing, of other types, or do not fit the trace.
        """
        try:
            found = cls(
                [[float(v) for v in layer] for layer in raw["nbytes"]],
                [[float(v) for v in layer] for layer in raw["macs"]],
                float(raw["token_bytes"]),
                float(raw["host_bytes"]),
                float(raw["cache_bytes"]),
                [float(v) for v in raw["host_macs"]],
                [float(v) for v in raw["host_reads"]],
            )
        except (KeyError, TypeError, ValueError) as e:
            raise UserError("placement", f"the artifact's sizes cannot be read: {e}") from e
        experts = [c.shape[1] for c in trace.chosen]
        numbers = [v for layers in (found.nbytes, found.macs) for layer in layers for v in layer]
        numbers += [found.token_bytes, found.host_bytes, found.cache_bytes]
        numbers += [*found.host_macs, *found.host_reads]
        fits = (
            [len(b) for b in found.nbytes] == experts
            and [len(m) for m in found.macs] == experts
            and len(found.host_macs) == len(found.host_reads) == len(experts)
            and all(np.isfinite(v) and v >= 0 for v in numbers)
        )
        if not fits:
            raise UserError("placement", "the artifact's sizes do not fit its trace")
        return found


def sizes_of(program: Program, bits: int) -> Sizes:
    """Sizes of a carved program whose weights have ``bits`` bits where no pass chose others."""
    precision = Precision(program, bits)
    layers = [s.routed for s in program.carved if s.routed is not None]
    macs = [_macs(r, r.expert_size) for r in layers]
    return Sizes(
        [[float(n) for n in precision.experts(r)] for r in layers],
        [[m] * r.num_experts for m, r in zip(macs, layers, strict=True)],
        8.0 * max(r.expert_up.shape[-1] for r in layers),
        float(precision.rest(program)),
        cache_bytes(program),
        [_macs(r, r.shared_size) for r in layers],
        [float(precision.shared(r)) for r in layers],
    )


def _macs(r: RoutedFFN, width: int) -> float:
    return float((2 if r.expert_gate is None else 3) * width * r.expert_up.shape[-1])


def planned_sizes(
    program: Program, splits: Mapping[str, Split | None], bits: float
) -> tuple[Sizes, Trace]:
    """Sizes of a dense program that is to be carved so, and a trace of equal loads."""
    per = bits / 8 + 4 / BLOCK if bits < 16 else 4.0
    carved = [(s, split) for s in program.sites if (split := splits.get(s.name)) is not None]
    if not carved:
        raise UserError("placement", "nothing is carved at this budget", "lower --budget")
    unit = [matrices(s) * s.dense.up.shape[1] for s, _ in carved]
    one = [float(n * split.expert_size) for n, (_, split) in zip(unit, carved, strict=True)]
    shared = [float(n * split.shared_size) for n, (_, split) in zip(unit, carved, strict=True)]
    moved = sum(n * split.num_experts for n, (_, split) in zip(one, carved, strict=True))
    tables = {w.weight.data_ptr(): w.weight for w in program.lookups} if bits < 16 else {}
    # A large table is 8 bits, a small one fp32, and a head that shares its weights has its own.
    own = sum(t.numel() * (1 + 4 / BLOCK if large_table(t) else 4) for t in tables.values())
    tied = sum(n.weight.numel() for n in program.linears if n.weight.data_ptr() in tables)
    counted = sum(t.numel() for t in tables.values()) - tied
    rest = program.num_parameters - moved - counted
    sizes = Sizes(
        [[n * per] * split.num_experts for n, (_, split) in zip(one, carved, strict=True)],
        [[n] * split.num_experts for n, (_, split) in zip(one, carved, strict=True)],
        8.0 * max(s.dense.up.shape[1] for s, _ in carved),
        rest * per + own,
        cache_bytes(program),
        shared,
        [n * per for n in shared],
    )
    longest = max(split.num_experts for _, split in carved)
    turns = [
        (np.arange(split.num_experts) - np.arange(longest)[:, None]) % split.num_experts
        for _, split in carved
    ]
    chosen = tuple(t < split.top_k for t, (_, split) in zip(turns, carved, strict=True))
    return sizes, Trace(tuple(s.name for s, _ in carved), chosen)


def cache_bytes(program: Program) -> float:
    """Bytes that one token takes in the key and value caches, fp32."""
    if program.kind != "decoder":
        return 0.0
    return float(sum(4 * t.shape[1] * t.shape[3] for t in program.example[2:]))
