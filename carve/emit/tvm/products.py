"""Products with stored weights: which kernel computes them, and how their weights are packed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor
from tvm import relax, te, tirx
from tvm.relax import op

from carve.arithmetic import Precision
from carve.emit.pack import pack
from carve.emit.tvm import sequence
from carve.emit.tvm.kernels import Format, LinearSpec, RoutedSpec, linear, routed_ffn
from carve.emit.tvm.kernels.activations import activate
from carve.emit.tvm.kernels.layout import Array, linear_layout, routed_arrays
from carve.emit.tvm.params import Parameters
from carve.emit.tvm.weights import Matrix, Packed, pack_linear, pack_routed, widen
from carve.grid import Grid

OPAQUE = 8
"""What keeps TVM's fusion away from a kernel: the last of its operator patterns."""


def is_number(*sizes: Any) -> bool:
    """Whether all of these are plain numbers."""
    return all(isinstance(v, int | tirx.IntImm) for v in sizes)


def same_size(a: Any, b: Any) -> bool:
    """Whether two sizes are the same number or the same variable."""
    if is_number(a) or is_number(b):
        return is_number(a, b) and int(a) == int(b)
    return bool(a.same_as(b))


class Packing:
    """Arrays that are packed together when the first of them is written."""

    def __init__(self, pack: Callable[[], Packed]) -> None:
        self.pack = pack
        self.packed: Packed | None = None

    def take(self, name: str) -> np.ndarray:
        """One of them; each is asked for once."""
        if self.packed is None:
            self.packed = dict(self.pack())
        found = self.packed.pop(name)
        if not self.packed:
            self.packed = None
        return found


def widest(grids: Sequence[Grid | None]) -> Format:
    """The format that holds weights of these grids."""
    known = [g for g in grids if g is not None]
    if len(known) < len(grids) or not known:
        return Format()
    return Format(max(g.bits for g in known), known[0].block)


def matrix(
    weights: Sequence[Tensor], grids: Sequence[Grid | None], form: Format, *, stack: bool = False
) -> Matrix:
    """Weights ``[N, K]`` one below the other, or stacked; levels and scales where on grids."""
    join = np.stack if stack else np.concatenate
    if not form.quantized:
        return Matrix(join([w.float().numpy() for w in weights]))
    levels, scales = [], []
    for w, g in zip(weights, grids, strict=True):
        assert g is not None
        levels.append(widen(g.levels(w).numpy(), g.bits, form.bits))
        scales.append(g.scale.numpy())
    return Matrix(join(levels), join(scales))


class Products:
    """Emits products into the function that is being built, one kernel for each shape.

    Args:
        bb: takes the kernels and calls.
        params: takes the packed weights.
        cpu: what is compiled for.
        precision: the weights' grids.

    ``sequence`` has the kernels along the sequence.
    """

    def __init__(
        self, bb: relax.BlockBuilder, params: Parameters, cpu: Any, precision: Precision
    ) -> None:
        self.bb, self.params, self.cpu, self.precision = bb, params, cpu, precision
        self.sequence: Any = sequence
        self._kernels: dict[Any, Any] = {}

    def kernel(self, key: Any, name: str, make: Callable[[], Any]) -> Any:
        """A kernel in the module, made once for every key."""
        if key not in self._kernels:
            made = make().without_attr("global_symbol").with_attr("op_pattern", OPAQUE)
            made = made.with_attr("tirx.is_scheduled", True)
            self._kernels[key] = self.bb.add_func(made, name)
        return self._kernels[key]

    def arrays(self, name: str, arrays: Sequence[Array], pack: Callable[[], Packed]) -> list[Any]:
        """Packed arrays as parameters of the running function."""
        packing = Packing(pack)

        def add(a: Array) -> Any:
            return self.params.add(
                f"{name}.{a.name}", lambda: packing.take(a.name), (a.size,), a.dtype
            )

        return [add(a) for a in arrays]

    def alike(self, weights: Sequence[Tensor]) -> bool:
        """Whether one product can take these weights."""
        return len({widest([self.precision.of(w)]) for w in weights}) == 1

    def linear(
        self, x: relax.Expr, name: str, weights: Sequence[Tensor], bias: Tensor | None
    ) -> relax.Expr:
        """``x W' + b`` for ``x`` ``[..., K]`` and weights ``[N, K]``, one below the other."""
        grids = [self.precision.of(w) for w in weights]
        return self._linear(x, name, weights, grids, bias)

    def full(self, x: relax.Expr, name: str, weight: Tensor, bias: Tensor | None) -> relax.Expr:
        """As `linear`, in fp32 whatever the program's width."""
        return self._linear(x, name, [weight], [None], bias)

    def _linear(
        self,
        x: relax.Expr,
        name: str,
        weights: Sequence[Tensor],
        grids: Sequence[Grid | None],
        bias: Tensor | None,
    ) -> relax.Expr:
        form = widest(grids)
        rows, width = sum(len(w) for w in weights), int(weights[0].shape[1])
        spec = LinearSpec(rows, width, form, bias is not None)
        gv = self.kernel(spec, "linear", lambda: self.linear_kernel(spec))

        def packed() -> Packed:
            b = None if bias is None else bias.float().numpy()
            return self.pack_linear(spec, matrix(weights, grids, form), b)

        given = self.arrays(name, self.linear_arrays(spec), packed)
        return self.on_rows(gv, x, given, rows)

    def linear_kernel(self, spec: LinearSpec) -> Any:
        """The PrimFunc of a product."""
        return linear(spec, self.cpu)

    def linear_arrays(self, spec: LinearSpec) -> list[Array]:
        """The packed arrays that it takes."""
        return list(linear_layout(spec, self.cpu).arrays())

    def pack_linear(self, spec: LinearSpec, weight: Matrix, bias: np.ndarray | None) -> Packed:
        """Those arrays' content."""
        return pack_linear(spec, self.cpu, weight, bias)

    def routed(
        self,
        spec: RoutedSpec,
        x: relax.Expr,
        scores: relax.Expr,
        name: str,
        pack: Callable[[], dict[str, Any]],
    ) -> relax.Expr:
        """A routed FFN of ``x`` ``[..., d]``.

        Args:
            spec: what to compute.
            x: the input.
            scores: ``[n, E]``.
            name: of the FFN, for its arrays.
            pack: gives the keyword arguments of `carve.emit.tvm.weights.pack_routed`.
        """
        gv = self.kernel(spec, "routed_ffn", lambda: routed_ffn(spec, self.cpu))
        arrays = routed_arrays(spec, self.cpu)
        given = self.arrays(name, arrays, lambda: pack_routed(spec, self.cpu, **pack()))
        return self.on_rows(gv, x, [scores, *given], spec.out)

    def on_rows(
        self,
        gv: Any,
        x: relax.Expr,
        given: Sequence[relax.Expr],
        out: int,
    ) -> relax.Expr:
        """Call a kernel on ``x`` ``[..., K]`` as rows; ``[..., out]``."""
        flat = self.flat(x)
        return self.shaped(self.call(gv, [flat, *given], flat.ty.shape[0], out), x)

    def call(self, gv: Any, given: Sequence[relax.Expr], rows: Any, out: int) -> relax.Expr:
        """Call a kernel that gives fp32 ``[rows, out]``."""
        kind = relax.TensorType([rows, out], "float32")
        return self.bb.emit(op.call_tir(gv, relax.Tuple(list(given)), out_ty=kind))

    def shaped(self, rows: relax.Expr, x: relax.Expr) -> relax.Expr:
        """Rows as `flat` made them of ``x``, with the axes of ``x`` again."""
        shape = list(x.ty.shape)
        if len(shape) == 2:
            return rows
        return self.bb.emit(op.reshape(rows, [*shape[:-1], rows.ty.shape[1]]))

    def flat(self, x: relax.Expr) -> relax.Expr:
        """``[..., K]`` as rows ``[n, K]``."""
        shape = list(x.ty.shape)
        if len(shape) == 2:
            return x
        count: Any = 1
        for n in shape[:-1]:
            count = count * n
        return self.bb.emit(op.reshape(x, [count, shape[-1]]))

    def activate(self, x: relax.Expr, name: str) -> relax.Expr:
        """An activation by its name in the dialect."""

        def compute(v: te.Tensor) -> te.Tensor:
            return te.compute(v.shape, lambda *i: activate(name, v(*i), 1))

        return self.bb.emit_te(compute, x)

    def lookup(self, ids: relax.Expr, name: str, table: Tensor) -> relax.Expr:
        """Rows of an embedding's table ``[V, d]``, levels turned into numbers as they are read."""
        grid = self.precision.known(table)
        width = int(table.shape[1])
        if grid is None:
            whole = self.params.tensor(f"{name}.table", table)

            def rows(t: te.Tensor, ids: te.Tensor) -> te.Tensor:
                return te.compute((*ids.shape, width), lambda *i: t[ids(*i[:-1]), i[-1]])

            return self.bb.emit_te(rows, whole, ids)
        bits, block, each = grid.bits, grid.block, 8 // grid.bits
        levels = self.params.add(
            f"{name}.table.q{bits}",
            lambda: pack(grid.levels(table), bits),
            (len(table), width // each),
            "uint8",
        )
        scales = self.params.tensor(f"{name}.table.scales", grid.scale)

        def decoded(q: te.Tensor, s: te.Tensor, ids: te.Tensor) -> te.Tensor:
            def at(*i: Any) -> Any:
                row, j = ids(*i[:-1]), i[-1]
                byte = q[row, tirx.floordiv(j, each)].astype("int32")
                level = (byte >> (tirx.floormod(j, each) * bits).astype("int32")) & (
                    (1 << bits) - 1
                )
                value = (level - grid.zero).astype("float32")
                return value * s[row, tirx.floordiv(j, block)]

            return te.compute((*ids.shape, width), at)

        return self.bb.emit_te(decoded, levels, scales, ids)
