"""What no kernel of ours computes yet, spelled out in operators that any target compiles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from tvm import relax, te, tirx
from tvm.relax import op
from tvm.script import tirx as T

from carve.emit.tvm.params import Parameters
from carve.ffn import RoutedFFN

OPAQUE = {"op_pattern": 8, "tirx.noalias": True}


class Plain:
    def __init__(self, bb: relax.BlockBuilder, params: Parameters, products) -> None:
        self.bb, self.params = bb, params
        self.linear = products.linear

    def rms_norm(self, x, weight, epsilon):
        return self.bb.emit(op.nn.rms_norm(x, weight, axes=[-1], epsilon=epsilon))

    def layer_norm(self, x, weight, bias, epsilon):
        return self.bb.emit(op.nn.layer_norm(x, weight, bias, axes=[-1], epsilon=epsilon))

    def rotary(self, x, cos, sin, width):
        """x [B,S,H,D], cos [B,S,width]."""
        half = width // 2
        def compute(x, cos, sin):
            def at(b, s, h, d):
                first = d < half
                other = tirx.if_then_else(first, -x[b, s, h, tirx.min(d + half, width - 1)], x[b, s, h, tirx.max(d - half, 0)])
                dd = tirx.min(d, width - 1)
                return tirx.if_then_else(d < width, x[b, s, h, d] * cos[b, s, dd] + other * sin[b, s, dd], x[b, s, h, d])
            return te.compute(x.shape, at)
        return self.bb.emit_te(compute, x, cos, sin)

    def append(self, new, position, cache):
        """new [1,S,KV,D] at position [1,S] of cache [1,KV,C,D]."""
        kv, d = int(new.ty.shape[2]), int(new.ty.shape[3])

        @T.prim_func(private=True)
        def append(np_: T.handle, pp: T.handle, cp: T.handle):
            T.func_attr(OPAQUE)
            s = T.int64()
            c = T.int64()
            N = T.match_buffer(np_, (1, s, kv, d), "float32")
            P = T.match_buffer(pp, (1, s), "int64")
            C = T.match_buffer(cp, (1, kv, c, d), "float32")
            for i, h in T.grid(s, kv):
                for j in T.vectorized(d):
                    C[0, h, P[0, i], j] = N[0, i, h, j]

        gv = self.bb.add_func(append, "append")
        return self.bb.emit(op.call_tir_inplace(gv, relax.Tuple([new, position, cache]), [2], cache.ty))

    def attend(self, q, position, key, value, scale, window, softcap):
        """q [1,S,H,D], position [1,S], caches [1,KV,C,D] -> [1,S,H,D]."""
        heads, d = int(q.ty.shape[2]), int(q.ty.shape[3])
        kv = int(key.ty.shape[1])
        rep = heads // kv
        far = window if window > 0 else 1 << 40

        @T.prim_func(private=True)
        def attend(qp: T.handle, pp: T.handle, kp: T.handle, vp: T.handle, op_: T.handle):
            T.func_attr(OPAQUE)
            s = T.int64()
            c = T.int64()
            Q = T.match_buffer(qp, (1, s, heads, d), "float32")
            P = T.match_buffer(pp, (1, s), "int64")
            K = T.match_buffer(kp, (1, kv, c, d), "float32")
            V = T.match_buffer(vp, (1, kv, c, d), "float32")
            O = T.match_buffer(op_, (1, s, heads, d), "float32")
            for i, h in T.grid(s, heads):
                top = T.alloc_buffer((1,), "float32")
                total = T.alloc_buffer((1,), "float32")
                x = T.alloc_buffer((2,), "float32")
                top[0] = T.float32(-1e30)
                total[0] = T.float32(0)
                for j in range(d):
                    O[0, i, h, j] = T.float32(0)
                for n in range(P[0, i] + 1):
                    if n > P[0, i] - far:
                        x[0] = T.float32(0)
                        for j in range(d):
                            x[0] += Q[0, i, h, j] * K[0, h // rep, n, j]
                        x[0] = x[0] * T.float32(scale)
                        if softcap > 0:
                            x[0] = T.tanh(x[0] / T.float32(softcap)) * T.float32(softcap)
                        if x[0] > top[0]:
                            x[1] = T.exp(top[0] - x[0])
                            total[0] = total[0] * x[1]
                            for j in range(d):
                                O[0, i, h, j] = O[0, i, h, j] * x[1]
                            top[0] = x[0]
                        x[1] = T.exp(x[0] - top[0])
                        total[0] += x[1]
                        for j in range(d):
                            O[0, i, h, j] += x[1] * V[0, h // rep, n, j]
                for j in range(d):
                    O[0, i, h, j] = O[0, i, h, j] / total[0]

        gv = self.bb.add_func(attend, "attend")
        return self.bb.emit(op.call_tir(gv, relax.Tuple([q, position, key, value]), out_ty=q.ty))

    def lookup(self, table: Tensor, name: str, ids):
        p = self.params.tensor(f"{name}.table", table)
        def compute(t, i):
            return te.compute((*i.shape, t.shape[1]), lambda *a: t[i(*a[:-1]), a[-1]])
        return self.bb.emit_te(compute, p, ids)
