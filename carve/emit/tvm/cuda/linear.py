"""Dense products ``y = x W^T + b``: a warp for each row of ``W``."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from tvm import tirx  # type: ignore[import-not-found,unused-ignore]
from tvm.tirx.script import builder as T  # type: ignore[import-not-found,unused-ignore]

from carve.emit.pack import pack
from carve.emit.tvm.cuda.threads import (
    WARPS,
    Row,
    Stored,
    divided,
    dot,
    launch,
    number,
    registers,
    warp_sums,
    zeros,
)
from carve.emit.tvm.kernels.layout import Array
from carve.emit.tvm.kernels.pipeline import function
from carve.emit.tvm.kernels.spec import LinearSpec
from carve.emit.tvm.kernels.vector import Expr, bind, ceil_div
from carve.emit.tvm.weights import Matrix, Packed

_TILE = 8
"""Tokens that share what a warp reads, where there are several."""


def stored(spec: LinearSpec) -> Stored:
    """The layout of the weight."""
    return Stored("weight", spec.format, spec.out_features, spec.in_features)


def arrays(spec: LinearSpec) -> list[Array]:
    """The packed arrays in the order of the kernel's arguments."""
    bias = [Array("bias", spec.out_features, "float32")] if spec.bias else []
    return [*stored(spec).arrays(), *bias]


def linear(spec: LinearSpec) -> Any:
    """A PrimFunc ``(x [n, K], weight, scale?, bias?, y [n, N])``, fp32, ``n`` symbolic.

    Activations are not rounded.
    """
    with function("linear") as made:
        rows = tirx.Var("n", "int64")
        x = T.arg("x", T.buffer((rows, spec.in_features), "float32"))
        weight = stored(spec).declare()
        bias = T.arg("bias", T.buffer((spec.out_features,), "float32")) if spec.bias else None
        y = T.arg("y", T.buffer((rows, spec.out_features), "float32"))
        n = bind(tirx.Cast("int32", rows))
        units = ceil_div(spec.out_features, WARPS)

        def kernel(tile: int) -> None:
            tiles = bind(ceil_div(n, tile))
            with launch(tiles * units) as (block, warp, lane):
                unit, t = divided(block, tiles)
                row = bind(unit * WARPS + warp)
                acc = registers(tile)
                zeros(acc, tile)

                def token(i: int) -> Expr:
                    at = t * tile + i
                    return bind(tirx.min(at, n - number(1))) if tile > 1 else at

                with T.If(row < number(spec.out_features)), T.Then():
                    given = [Row(x, token(i), number(0), weight.stored.word) for i in range(tile)]
                    dot([(weight, row)], given, acc, lane)
                    warp_sums(acc, tile)
                    with T.If(lane == number(0)), T.Then():
                        for i in range(tile):
                            value = acc[i] if bias is None else acc[i] + bias[row]
                            with T.If(t * tile + i < n), T.Then():
                                T.buffer_store(y, value, [t * tile + i, row])

        with T.If(n == number(1)):
            with T.Then():
                kernel(1)
            with T.Else():
                kernel(_TILE)
    return made()


def pack_matrix(s: Stored, weight: Matrix) -> Packed:
    """The arrays of a matrix."""
    if weight.scale is None:
        return {s.name: np.ascontiguousarray(weight.values, np.float32).reshape(-1)}
    levels = torch.from_numpy(weight.values.reshape(-1))
    return {
        s.name: pack(levels, s.form.bits).view("<i4"),
        f"{s.name}_scale": np.ascontiguousarray(weight.scale, np.float32).reshape(-1),
    }


def pack_linear(spec: LinearSpec, weight: Matrix, bias: np.ndarray | None) -> Packed:
    """The arrays of `linear`, by name."""
    packed = pack_matrix(stored(spec), weight)
    if bias is not None:
        packed["bias"] = np.ascontiguousarray(bias, np.float32)
    return packed
