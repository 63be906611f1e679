"""Routed FFNs in two kernels: hidden values of the experts that a token takes, then the way back.

Which experts those are is decided in the first kernel, by every block that works for one of a
token's places; the second reads its decision.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import tirx  # type: ignore[import-not-found,unused-ignore]
from tvm.tirx.script import builder as T  # type: ignore[import-not-found,unused-ignore]

from carve.emit.tvm.cuda.linear import pack_matrix
from carve.emit.tvm.cuda.threads import (
    WARP,
    WARPS,
    Matrix,
    Row,
    Stored,
    divided,
    dot,
    launch,
    number,
    real,
    registers,
    shared,
    wait,
    warp_sums,
    zeros,
)
from carve.emit.tvm.kernels.activations import activate
from carve.emit.tvm.kernels.layout import Array
from carve.emit.tvm.kernels.pipeline import function
from carve.emit.tvm.kernels.spec import RoutedSpec
from carve.emit.tvm.kernels.vector import Buffer, Expr, bind, ceil_div
from carve.emit.tvm.weights import Matrix as Given
from carve.emit.tvm.weights import Packed

_NONE = -1


@dataclass(frozen=True)
class _Layout:
    """The arrays of a routed FFN, in order: matrices, and biases by name and length."""

    inward: list[Stored]
    inward_biases: list[Array]
    down: list[Stored]
    down_biases: list[Array]


def layout(spec: RoutedSpec) -> _Layout:
    """What both kernels take."""
    d, out, e = spec.hidden_size, spec.out, spec.num_experts
    kinds = ("gate", "up") if spec.gated else ("up",)
    inward, inward_biases, down, down_biases = [], [], [], []
    if spec.shared_size:
        s = spec.shared_size
        inward += [Stored(f"shared_{k}", spec.shared_in, s, d) for k in kinds]
        if spec.shared_in_bias:
            inward_biases += [Array(f"shared_{k}_bias", s, "float32") for k in kinds]
        down.append(Stored("shared_down", spec.shared_down, out, s))
    if e:
        m = spec.expert_size
        inward += [Stored(f"expert_{k}", spec.expert_in, m, d, e) for k in kinds]
        if spec.expert_in_bias:
            inward_biases += [Array(f"expert_{k}_bias", e * m, "float32") for k in kinds]
        down.append(Stored("expert_down", spec.expert_down, out, m, e))
        if spec.expert_bias:
            down_biases.append(Array("expert_bias", e * out, "float32"))
    if spec.output_bias:
        down_biases.append(Array("output_bias", out, "float32"))
    return _Layout(inward, inward_biases, down, down_biases)


def arrays(spec: RoutedSpec) -> tuple[list[Array], list[Array]]:
    """The packed arrays of each kernel, in the order of its arguments."""
    found = layout(spec)
    return (
        [*(a for s in found.inward for a in s.arrays()), *found.inward_biases],
        [*(a for s in found.down for a in s.arrays()), *found.down_biases],
    )


def hidden_size(spec: RoutedSpec) -> int:
    """Hidden values of one token: the shared expert's, then those of its places."""
    return spec.shared_size + spec.top_k * spec.expert_size


def pack_routed(spec: RoutedSpec, given: dict[str, Any]) -> Packed:
    """All arrays by name.

    Args:
        spec: what the kernels were made for.
        given: weights (`carve.emit.tvm.weights.Matrix`) and biases (numpy), named as in
            `carve.dialect.routed_ffn`; of the biases of gate and up one may be absent.
    """
    found, packed = layout(spec), {}
    for s in (*found.inward, *found.down):
        matrix: Given = given[s.name]
        packed.update(pack_matrix(s, matrix))
    for a in (*found.inward_biases, *found.down_biases):
        bias = given.get(a.name)
        blank = np.zeros(a.size, np.float32)
        packed[a.name] = blank if bias is None else np.asarray(bias, np.float32).reshape(-1)
    return packed


def _biases(arrays: list[Array]) -> dict[str, Buffer]:
    return {a.name: T.arg(a.name, T.buffer((a.size,), "float32")) for a in arrays}


def _lanes(spec: RoutedSpec) -> int:
    """Hidden values that can be read at once wherever a part of them starts."""
    return math.gcd(4, spec.shared_size, spec.expert_size if spec.num_experts else 0)


def _decide(spec: RoutedSpec, scores: Buffer, t: Expr, place: Expr, tid: Expr) -> Expr:
    """The expert in a place of token ``t``'s, or -1; the whole block has to be here."""
    found, size = shared(1, "int32"), WARPS * WARP
    with T.If(tid == number(0)), T.Then():
        T.buffer_store(found, number(_NONE), [0])
    wait()
    before = registers(1, "int32")
    with T.serial(0, ceil_div(spec.num_experts, size)) as i:
        expert = bind(i * size + tid)
        with T.If(expert < number(spec.num_experts)), T.Then():
            score = bind(scores[t, expert])
            T.buffer_store(before, number(0), [0])
            with T.serial(0, spec.num_experts) as other:
                rival = bind(scores[t, other])
                ahead = tirx.Or(rival > score, tirx.And(rival == score, other < expert))
                T.buffer_store(before, before[0] + tirx.Select(ahead, number(1), number(0)), [0])
            here = before[0] == place
            if spec.dynamic:
                here = tirx.And(here, score > real(0.0))
            with T.If(here), T.Then():
                T.buffer_store(found, expert, [0])
    wait()
    return bind(found[0])


def inward(spec: RoutedSpec) -> Any:
    """A PrimFunc ``(x [n, d], scores [n, E]?, packed..., h [n, H], taken [n, k]?)``.

    ``h``: what `hidden_size` counts; ``taken``: the experts in a token's places, -1 for none.
    """
    found = layout(spec)
    s, m, k = spec.shared_size, spec.expert_size, spec.top_k
    with function("routed_in") as made:
        rows = tirx.Var("n", "int64")
        x = T.arg("x", T.buffer((rows, spec.hidden_size), "float32"))
        scores = T.arg("scores", T.buffer((rows, spec.num_experts), "float32")) if k else None
        matrices = {v.name: v.declare() for v in found.inward}
        biases = _biases(found.inward_biases)
        h = T.arg("h", T.buffer((rows, hidden_size(spec)), "float32"))
        taken = T.arg("taken", T.buffer((rows, k), "int32")) if k else None
        n = bind(tirx.Cast("int32", rows))
        shared_units, expert_units = ceil_div(s, WARPS), ceil_div(m, WARPS) if k else 0
        units = shared_units + k * expert_units

        def neuron(part: str, t: Expr, row: Expr, at: Expr, lane: Expr) -> None:
            kinds = ("gate", "up") if spec.gated else ("up",)
            both: list[tuple[Matrix, Expr]] = [(matrices[f"{part}_{v}"], row) for v in kinds]
            acc = registers(len(both))
            zeros(acc, len(both))
            word = both[0][0].stored.word
            dot(both, [Row(x, t, number(0), word)], acc, lane)
            warp_sums(acc, len(both))
            sums = [
                acc[i] + biases[f"{part}_{v}_bias"][row] if f"{part}_{v}_bias" in biases else acc[i]
                for i, v in enumerate(kinds)
            ]
            with T.If(lane == number(0)), T.Then():
                value = activate(spec.activation, bind(sums[0]), 1)
                T.buffer_store(h, value * sums[1] if spec.gated else value, [t, at])

        def of_shared(unit: Expr, t: Expr, warp: Expr, lane: Expr) -> None:
            row = bind(unit * WARPS + warp)
            with T.If(row < number(s)), T.Then():
                neuron("shared", t, row, row, lane)

        def of_experts(unit: Expr, t: Expr, warp: Expr, lane: Expr) -> None:
            place, part = divided(unit, expert_units)
            expert = _decide(spec, scores, t, place, warp * WARP + lane)
            first = tirx.And(part == number(0), tirx.And(warp == number(0), lane == number(0)))
            with T.If(first), T.Then():
                T.buffer_store(taken, expert, [t, place])
            row = bind(part * WARPS + warp)
            with T.If(tirx.And(expert >= number(0), row < number(m))), T.Then():
                neuron("expert", t, expert * m + row, s + place * m + row, lane)

        with launch(n * units) as (block, warp, lane):
            unit, t = divided(block, n)
            _either(shared_units, units, unit, t, warp, lane, of_shared, of_experts)
    return made()


def _either(
    shared_units: int,
    units: int,
    unit: Expr,
    t: Expr,
    warp: Expr,
    lane: Expr,
    of_shared: Callable[[Expr, Expr, Expr, Expr], None],
    of_experts: Callable[[Expr, Expr, Expr, Expr], None],
) -> None:
    if shared_units == units:
        of_shared(unit, t, warp, lane)
    elif shared_units == 0:
        of_experts(unit, t, warp, lane)
    else:
        with T.If(unit < number(shared_units)):
            with T.Then():
                of_shared(unit, t, warp, lane)
            with T.Else():
                of_experts(bind(unit - number(shared_units)), t, warp, lane)


def down(spec: RoutedSpec) -> Any:
    """A PrimFunc ``(h [n, H], taken [n, k]?, packed..., y [n, out])`` over what `inward` gives."""
    found = layout(spec)
    s, m, k = spec.shared_size, spec.expert_size, spec.top_k
    with function("routed_down") as made:
        rows = tirx.Var("n", "int64")
        h = T.arg("h", T.buffer((rows, hidden_size(spec)), "float32"))
        taken = T.arg("taken", T.buffer((rows, k), "int32")) if k else None
        matrices = {v.name: v.declare() for v in found.down}
        biases = _biases(found.down_biases)
        y = T.arg("y", T.buffer((rows, spec.out), "float32"))
        n = bind(tirx.Cast("int32", rows))
        lanes = _lanes(spec)
        with launch(n * ceil_div(spec.out, WARPS)) as (block, warp, lane):
            unit, t = divided(block, n)
            row = bind(unit * WARPS + warp)
            with T.If(row < number(spec.out)), T.Then():
                acc, extra = registers(1), registers(1)
                zeros(acc, 1)
                last = biases.get("output_bias")
                T.buffer_store(extra, real(0.0) if last is None else last[row], [0])
                if s:
                    dot([(matrices["shared_down"], row)], [Row(h, t, number(0), lanes)], acc, lane)
                if taken is not None:
                    with T.serial(0, k) as place:
                        expert = bind(taken[t, place])
                        with T.If(expert >= number(0)), T.Then():
                            at = bind(expert * spec.out + row)
                            given = Row(h, t, s + place * m, lanes)
                            dot([(matrices["expert_down"], at)], [given], acc, lane)
                            if "expert_bias" in biases:
                                T.buffer_store(extra, extra[0] + biases["expert_bias"][at], [0])
                warp_sums(acc, 1)
                with T.If(lane == number(0)), T.Then():
                    T.buffer_store(y, acc[0] + extra[0], [t, row])
    return made()
