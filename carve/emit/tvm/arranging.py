"""Operators that only move values, where TVM's own translation lacks a form that captures have."""

from __future__ import annotations

from typing import Any

from torch import fx
from tvm import relax, te, tirx
from tvm.relax import op
from tvm.relax.frontend.torch.exported_program_translator import ExportedProgramImporter

from carve.emit.tvm import patterns
from carve.emit.tvm.patterns import Node
from carve.emit.tvm.products import is_number, same_size
from carve.errors import CarveError


class Arranging(ExportedProgramImporter):  # type: ignore[misc]
    """Slices, views and look-ups with sizes that are known as the model runs."""

    def emit(self, value: relax.Expr) -> relax.Var:
        """Bind a value."""
        return self.block_builder.emit(value)

    def _cut(self, n: Node) -> Any:
        """``x[..., start:stop:step]``; a stop that is no number is within the axis."""
        more: tuple[Any, ...] = (0, 0, None, 1)
        given = tuple(n.args)
        x, axis, start, stop, step = given + more[len(given) - 1 :]
        value = self.env[x]
        axis = int(axis) % len(value.ty.shape)
        size = value.ty.shape[axis]
        ends: list[Any] = []
        for end, default in ((start, 0), (stop, size)):
            end = self.env[end] if isinstance(end, fx.Node) else end
            if end is None or (isinstance(end, int) and end >= (1 << 62)):
                end = default
            elif isinstance(end, int) and end < 0:
                end = size + end
            elif is_number(end, size):
                end = min(int(end), int(size))
            ends.append(end)
        first, last = ends
        count = last - first if step == 1 else tirx.floordiv(last - first + step - 1, step)

        def cut(x: te.Tensor) -> te.Tensor:
            shape = [count if a == axis else s for a, s in enumerate(x.shape)]
            return te.compute(
                shape,
                lambda *i: x(*(first + v * step if a == axis else v for a, v in enumerate(i))),
            )

        return self.block_builder.emit_te(cut, value)

    def _our_reshape(self, n: Node) -> Any:
        value = self.env[n.args[0]]
        sizes = [self.env[s] if isinstance(s, fx.Node) else s for s in n.args[1]]
        have = list(value.ty.shape)
        free = [i for i, s in enumerate(sizes) if isinstance(s, int) and s == -1]
        if free:
            # Symbols cancel by hand: the rest of the product is then known.
            whole = list(have)
            rest = []
            for s in sizes:
                if isinstance(s, int) and s == -1:
                    continue
                same = next((i for i, w in enumerate(whole) if same_size(w, s)), None)
                if same is None:
                    rest.append(s)
                else:
                    del whole[same]
            missing: Any = 1
            for w in whole:
                missing = missing * w
            for s in rest:
                missing = (
                    tirx.floordiv(missing, s)
                    if not is_number(missing, s)
                    else int(missing) // int(s)
                )
            sizes[free[0]] = missing
        if len(sizes) == len(have) and all(
            same_size(a, b) for a, b in zip(sizes, have, strict=True)
        ):
            return value
        return self.emit(op.reshape(value, sizes))

    def _our_index(self, n: Node) -> Any:
        """``x[i, j, ...]`` with an index tensor for every axis."""
        x, indices = self.env[n.args[0]], n.args[1]
        if len(indices) != len(x.ty.shape) or any(i is None for i in indices):
            raise CarveError("emit", f"{n.name}: this indexing has no translation to TVM")

        def take(x: te.Tensor, *index: te.Tensor) -> te.Tensor:
            rank = max(len(i.shape) for i in index)
            shape = []
            for axis in range(rank):
                sizes = [i.shape[axis - rank] for i in index if len(i.shape) >= rank - axis]
                wide = [s for s in sizes if not same_size(s, 1)]
                shape.append(wide[0] if wide else 1)

            def at(*place: Any) -> Any:
                where = []
                for i in index:
                    mine = place[rank - len(i.shape) :]
                    where.append(
                        i(
                            *(
                                0 if same_size(s, 1) else p
                                for s, p in zip(i.shape, mine, strict=True)
                            )
                        )
                    )
                return x(*where)

            return te.compute(shape, at)

        return self.block_builder.emit_te(take, x, *(self.env[i] for i in indices))

    def _our_ones(self, n: Node) -> Any:
        dtype = self._convert_data_type(n.meta["val"].dtype)
        sizes = [self.env[s] if isinstance(s, fx.Node) else s for s in n.args[1]]
        return self.emit(op.full(sizes, relax.const(1, dtype), dtype))

    def _our_gather(self, n: Node) -> Any:
        return self.emit(
            op.gather_elements(self.env[n.args[0]], self.env[n.args[2]], axis=int(n.args[1]))
        )

    def _our_size(self, n: Node) -> Any:
        return self.env[n.args[0]].ty.shape[n.args[1]]

    def _to_device(self, n: Node) -> Any:
        if patterns.passes_through(n):
            return self.env[n.args[0]]
        return self.emit(op.astype(self.env[n.args[0]], self._convert_data_type(n.args[2])))
