"""Products with stored weights on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from tvm import relax
from tvm.relax import op

from carve.arithmetic import Precision
from carve.emit.tvm.cuda import linear, routed, sequence
from carve.emit.tvm.cuda.device import Gpu
from carve.emit.tvm.kernels import LinearSpec, RoutedSpec
from carve.emit.tvm.kernels.layout import Array
from carve.emit.tvm.params import Parameters
from carve.emit.tvm.products import Products
from carve.emit.tvm.weights import Matrix, Packed


class GpuProducts(Products):
    """As `Products`, for a GPU."""

    def __init__(
        self, bb: relax.BlockBuilder, params: Parameters, gpu: Gpu, precision: Precision
    ) -> None:
        super().__init__(bb, params, gpu, precision)
        self.sequence = sequence

    def linear_kernel(self, spec: LinearSpec) -> Any:
        """The PrimFunc of a product."""
        return linear.linear(spec)

    def linear_arrays(self, spec: LinearSpec) -> list[Array]:
        """The packed arrays that it takes."""
        return linear.arrays(spec)

    def pack_linear(self, spec: LinearSpec, weight: Matrix, bias: np.ndarray | None) -> Packed:
        """Those arrays' content."""
        return linear.pack_linear(spec, weight, bias)

    def routed(
        self,
        spec: RoutedSpec,
        x: relax.Expr,
        scores: relax.Expr,
        name: str,
        pack: Callable[[], dict[str, Any]],
    ) -> relax.Expr:
        """See `Products.routed`."""
        into = self.kernel((spec, "in"), "routed_in", lambda: routed.inward(spec))
        back = self.kernel((spec, "down"), "routed_down", lambda: routed.down(spec))
        inward, down = routed.arrays(spec)
        arrays = self.arrays(name, [*inward, *down], lambda: routed.pack_routed(spec, pack()))
        flat = self.flat(x)
        n = flat.ty.shape[0]
        hidden: Any = relax.TensorType([n, routed.hidden_size(spec)], "float32")
        if spec.top_k:
            out = [hidden, relax.TensorType([n, spec.top_k], "int32")]
            given = [flat, scores, *arrays[: len(inward)]]
            both = self.bb.emit(op.call_tir(into, relax.Tuple(given), out_ty=out))
            parts = [self.bb.emit(both[i]) for i in range(2)]
        else:
            given = [flat, *arrays[: len(inward)]]
            parts = [self.bb.emit(op.call_tir(into, relax.Tuple(given), out_ty=hidden))]
        return self.shaped(self.call(back, [*parts, *arrays[len(inward) :]], n, spec.out), x)
