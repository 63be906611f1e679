"""A kernel's arguments, declared from the layout that packing follows as well."""

from __future__ import annotations

from tvm import tirx  # type: ignore[import-not-found,unused-ignore]
from tvm.tirx.script import builder as T  # type: ignore[import-not-found,unused-ignore]

from carve.emit.tvm.kernels.layout import Array, Panels
from carve.emit.tvm.kernels.product import Weights
from carve.emit.tvm.kernels.vector import Buffer, Expr


class Arguments:
    """Declares the arguments of the PrimFunc that is being built, in order.

    Activations are ``[n, width]`` with ``n`` an int64 variable; inside they are read flat, and
    counted in int32.
    """

    def __init__(self) -> None:
        self._n = tirx.Var("n", "int64")

    @property
    def n(self) -> Expr:
        """Rows of activations."""
        return tirx.Cast("int32", self._n)

    def rows(self, name: str, width: int) -> Buffer:
        """Activations ``[n, width]`` fp32."""
        return T.arg(name, T.buffer((self._n, width), "float32"))

    def array(self, array: Array) -> Buffer:
        """A packed array."""
        return T.arg(array.name, T.buffer((array.size,), array.dtype))

    def weights(self, p: Panels) -> tuple[Weights, Buffer | None]:
        """The arrays of a matrix, and its bias."""
        found = {a.name: self.array(a) for a in p.arrays()}
        scale = found.get(f"{p.name}_scale")
        return Weights(p.form, p.columns, p.panels, found[p.name], scale), found.get(p.bias)

    def flat(self, rows: Buffer) -> Buffer:
        """Activations read flat; after the last argument only."""
        return T.decl_buffer(
            (self.n * tirx.Cast("int32", rows.shape[1]),), rows.dtype, data=rows.data
        )
