"""Calls of the kernels along the sequence, one kernel for each form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import relax
from tvm.relax import op

from carve.emit.tvm.products import Products


class Layers:
    """Emits norms, rotary embeddings and attention into the function that is being built.

    Heads are ``[1, S, H, D]`` and positions ``[1, S]`` here.
    """

    def __init__(self, products: Products) -> None:
        self.products, self.bb, self.cpu = products, products.bb, products.cpu
        self.sequence = products.sequence

    def _call(self, gv: Any, given: Sequence[relax.Expr], out: Any) -> relax.Expr:
        return self.bb.emit(op.call_tir(gv, relax.Tuple(list(given)), out_ty=out))

    def _view(self, x: relax.Expr, shape: Sequence[Any]) -> relax.Expr:
        return self.bb.emit(op.reshape(x, list(shape)))

    def rms_norm(self, x: relax.Expr, weight: relax.Expr, epsilon: float) -> relax.Expr:
        """RMSNorm over the last axis."""
        return self._norm(x, [weight], epsilon, "rms")

    def layer_norm(
        self, x: relax.Expr, weight: relax.Expr, bias: relax.Expr, epsilon: float
    ) -> relax.Expr:
        """LayerNorm over the last axis."""
        return self._norm(x, [weight, bias], epsilon, "layer")

    def _norm(
        self, x: relax.Expr, given: Sequence[relax.Expr], epsilon: float, kind: str
    ) -> relax.Expr:
        gv, flat = self._norm_kernel(x, epsilon, kind, summed=False), self.products.flat(x)
        y = self._call(gv, [flat, *given], flat.ty)
        return y if len(x.ty.shape) == 2 else self._view(y, x.ty.shape)

    def _norm_kernel(self, x: relax.Expr, epsilon: float, kind: str, *, summed: bool) -> Any:
        width = int(x.ty.shape[-1])
        form = (width, epsilon, kind, summed)
        return self.products.kernel(
            ("norm", *form), "norm", lambda: self.sequence.norm(*form, self.cpu)
        )

    def sum_norm(
        self,
        a: relax.Expr,
        b: relax.Expr,
        weight: relax.Expr,
        bias: relax.Expr | None,
        epsilon: float,
    ) -> tuple[relax.Expr, relax.Expr]:
        """``a + b`` and its norm, a LayerNorm where there is a bias."""
        kind = "rms" if bias is None else "layer"
        gv = self._norm_kernel(a, epsilon, kind, summed=True)
        flat = [self.products.flat(v) for v in (a, b)]
        given = [*flat, weight, *([] if bias is None else [bias])]
        both = self._call(gv, given, [flat[0].ty, flat[0].ty])
        total, y = (self.bb.emit(both[i]) for i in range(2))
        return self._view(total, a.ty.shape), self._view(y, a.ty.shape)

    def _rows(self, x: relax.Expr) -> relax.Expr:
        """``[1, S, ...]`` without the first axis."""
        return self._view(x, list(x.ty.shape)[1:])

    def rotary(self, x: relax.Expr, cos: relax.Expr, sin: relax.Expr, turned: int) -> relax.Expr:
        """Heads turned by the angles of ``cos`` and ``sin`` ``[1, S, turned]``."""
        heads, width = (int(n) for n in list(x.ty.shape)[2:])
        gv = self.products.kernel(
            ("rotate", heads, width, turned),
            "rotate",
            lambda: self.sequence.rotate(heads, width, turned, self.cpu),
        )
        rows = self._rows(x)
        y = self._call(gv, [rows, self._rows(cos), self._rows(sin)], rows.ty)
        return self._view(y, list(x.ty.shape))

    def enter(
        self,
        packed: relax.Expr,
        cos: relax.Expr,
        sin: relax.Expr,
        turned: int,
        position: relax.Expr,
        caches: tuple[relax.Expr, relax.Expr],
    ) -> tuple[relax.Expr, relax.Expr, relax.Expr]:
        """Queries ``[1, S, H, D]`` and both caches, from queries, keys and values ``[1, S, .]``."""
        key, value = caches
        groups, width = int(key.ty.shape[1]), int(key.ty.shape[3])
        heads = int(packed.ty.shape[2]) // width - 2 * groups
        form = (heads, groups, width, turned)
        gv = self.products.kernel(
            ("enter", *form), "enter", lambda: self.sequence.enter(*form, self.cpu)
        )
        length = packed.ty.shape[1]
        given = [self._rows(v) for v in (packed, cos, sin, position)]
        out = [relax.TensorType([length, heads, width], "float32"), key.ty, value.ty]
        made = self.bb.emit(
            op.call_tir_inplace(gv, relax.Tuple([*given, key, value]), [-1, 4, 5], out)
        )
        q, key, value = (self.bb.emit(made[i]) for i in range(3))
        return self._view(q, [1, length, heads, width]), key, value

    def append(self, new: relax.Expr, position: relax.Expr, cache: relax.Expr) -> relax.Expr:
        """The cache with new keys or values, written in place."""
        heads, width = (int(n) for n in list(new.ty.shape)[2:])
        gv = self.products.kernel(
            ("append", heads, width), "append", lambda: self.sequence.append(heads, width, self.cpu)
        )
        given = relax.Tuple([self._rows(new), self._rows(position), cache])
        return self.bb.emit(op.call_tir_inplace(gv, given, [2], cache.ty))

    def attend(
        self,
        q: relax.Expr,
        position: relax.Expr,
        key: relax.Expr,
        value: relax.Expr,
        scale: float,
        window: int,
        softcap: float,
    ) -> relax.Expr:
        """Attention of queries over the cache."""
        heads, width = (int(n) for n in list(q.ty.shape)[2:])
        form = (heads, int(key.ty.shape[1]), width, scale, window, softcap)
        gv = self.products.kernel(
            ("attend", *form), "attend", lambda: self.sequence.attend(*form, self.cpu)
        )
        rows = self._rows(q)
        y = self._call(gv, [rows, self._rows(position), key, value], rows.ty)
        return self._view(y, list(q.ty.shape))
