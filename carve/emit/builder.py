"""Appends onnxruntime nodes to an ONNX graph, with weights that are made as the file is written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from carve.arithmetic import Precision
from carve.emit import pack
from carve.errors import CarveError
from carve.grid import Grid

CONTRIB = "com.microsoft"


Place = ir.Node | list[ir.Node]
"""Where a node goes: before a node of the graph, or to the end of a branch."""


def lazy_float(name: str, value: Tensor) -> ir.LazyTensor:
    """``value`` in fp32, converted when it is written."""
    return ir.LazyTensor(
        lambda: ir.Tensor(value.float().contiguous().numpy(), name=name),
        dtype=ir.DataType.FLOAT,
        shape=ir.Shape(tuple(value.shape)),
        name=name,
    )


class Builder:
    """Appends nodes before a node of the graph and keeps new initializers.

    ``router_weights``: whether the engine's ``QMoE`` reads them; on CUDA it does not.
    """

    def __init__(
        self, model: ir.Model, precision: Precision, *, router_weights: bool = True
    ) -> None:
        self.graph, self.precision = model.graph, precision
        self.router_weights = router_weights
        self.count = 0
        self.ones: dict[tuple[int, ir.Value | None], Any] = {}

    def op(
        self,
        before: Place,
        kind: str,
        inputs: list[ir.Value | None],
        *,
        outputs: int = 1,
        domain: str = "",
        **attributes: Any,
    ) -> Any:
        """One node before ``before``, or at a branch's end; its value, or values where several."""
        self.count += 1
        node = ir.Node(
            domain,
            kind,
            inputs,
            ir.convenience.convert_attributes(attributes),
            num_outputs=outputs,
            name=f"carve_{kind}_{self.count}",
        )
        for i, v in enumerate(node.outputs):
            v.name = f"carve_{kind}_{self.count}_{i}"
        if isinstance(before, list):
            before.append(node)
        else:
            before.prepend(node)
        return node.outputs[0] if outputs == 1 else node.outputs

    def tensor(
        self, name: str, make: Callable[[], np.ndarray], shape: tuple[int, ...], dtype: ir.DataType
    ) -> ir.Value:
        """An initializer whose content is made when it is written."""
        if name in self.graph.initializers:
            return self.graph.initializers[name]
        lazy = ir.LazyTensor(
            lambda: ir.Tensor(np.ascontiguousarray(make()), name=name),
            dtype=dtype,
            shape=ir.Shape(shape),
            name=name,
        )
        value = ir.Value(
            name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype), const_value=lazy
        )
        self.graph.register_initializer(value)
        return value

    def const(self, name: str, array: np.ndarray) -> ir.Value:
        """A small initializer."""
        dtype = ir.DataType.from_numpy(array.dtype)
        return self.tensor(name, lambda: array, array.shape, dtype)

    def float_tensor(self, name: str, value: Tensor) -> ir.Value:
        """An fp32 initializer with the content of ``value``."""
        return self.tensor(
            name, lambda: value.float().contiguous().numpy(), tuple(value.shape), ir.DataType.FLOAT
        )

    def quantized(
        self, name: str, parts: Sequence[tuple[Tensor, Grid]], *, blocked: bool = True
    ) -> tuple[ir.Value, ir.Value]:
        """Levels and scales of weights ``[N, K]`` on grids of one width, rows after one another.

        Levels as ``[N, K / block, bytes]`` where ``blocked``, else ``[N, bytes]``.
        """
        rows, k = sum(len(w) for w, _ in parts), parts[0][0].shape[-1]
        grid = parts[0][1]
        blocks, width = k // grid.block, grid.block * grid.bits // 8

        def levels() -> np.ndarray:
            packed = [pack.pack(g.levels(w), grid.bits) for w, g in parts]
            return np.concatenate(packed).reshape(rows, *last)

        last = (blocks, width) if blocked else (blocks * width,)

        return (
            self.tensor(f"{name}.q{grid.bits}", levels, (rows, *last), ir.DataType.UINT8),
            self.tensor(
                f"{name}.scales",
                lambda: torch.cat([g.scale for _, g in parts]).numpy(),
                (rows, blocks),
                ir.DataType.FLOAT,
            ),
        )

    def stacked(
        self, name: str, experts: Sequence[Sequence[tuple[Tensor, Grid]]]
    ) -> tuple[ir.Value, ir.Value]:
        """Levels ``[E, N, bytes]`` and scales of one matrix an expert.

        Each is one weight, or the rows of two in turn.
        """
        grid = experts[0][0][1]
        rows, k = sum(len(w) for w, _ in experts[0]), experts[0][0][0].shape[-1]
        blocks = k // grid.block

        def joined(parts: list[Tensor]) -> Tensor:
            return parts[0] if len(parts) == 1 else pack.interleave(*parts)

        def levels() -> np.ndarray:
            each = [joined([g.levels(w) for w, g in parts]) for parts in experts]
            return pack.pack(torch.stack(each), grid.bits)

        def scales() -> np.ndarray:
            made: np.ndarray = torch.stack(
                [joined([g.scale for _, g in p]) for p in experts]
            ).numpy()
            return made

        count = len(experts)
        return (
            self.tensor(
                f"{name}.q{grid.bits}",
                levels,
                (count, rows, k * grid.bits // 8),
                ir.DataType.UINT8,
            ),
            self.tensor(f"{name}.scales", scales, (count, rows, blocks), ir.DataType.FLOAT),
        )

    def linear(
        self,
        before: Place,
        x: ir.Value,
        name: str,
        weight: Tensor | Sequence[Tensor],
        bias: Tensor | None,
    ) -> Any:
        """``x @ weight.T + bias`` on the weight's grid; several weights as one, rows in order."""
        weights = [weight] if isinstance(weight, Tensor) else list(weight)
        grids = [self.precision.of(w) for w in weights]
        n, k = sum(len(w) for w in weights), weights[0].shape[1]
        found = [(w, g) for w, g in zip(weights, grids, strict=True) if g is not None]
        if len(found) == len(weights):
            grid = found[0][1]
            b, s = self.quantized(name, found)
            y = self.op(
                before,
                "MatMulNBits",
                [x, b, s],
                domain=CONTRIB,
                K=k,
                N=n,
                bits=grid.bits,
                block_size=grid.block,
                accuracy_level=4,
            )
        else:
            w = self.tensor(
                f"{name}.t",
                lambda: torch.cat([w.float() for w in weights]).t().contiguous().numpy(),
                (k, n),
                ir.DataType.FLOAT,
            )
            y = self.op(before, "MatMul", [x, w])
        if bias is not None:
            y = self.op(before, "Add", [y, self.float_tensor(f"{name}.bias", bias)])
        return y

    def alike(self, weights: Sequence[Tensor]) -> bool:
        """Whether one product can take these weights: all on grids of one width, or on none."""
        grids = [self.precision.of(w) for w in weights]
        return len({None if g is None else (g.bits, g.block) for g in grids}) == 1

    def ones_like(
        self, before: Place, scores: Any, experts: int, rows: ir.Value | None = None
    ) -> Any:
        """Ones in the shape ``[n, experts]``, made once: ``n`` is the same at every layer.

        Not so behind a gate: ``rows`` are the tokens that run there.
        """
        if (experts, rows) not in self.ones:
            one = ir.Tensor(np.ones(1, np.float32))
            shape = self.op(before, "Shape", [scores])
            self.ones[experts, rows] = self.op(before, "ConstantOfShape", [shape], value=one)
        return self.ones[experts, rows]

    def activate(self, before: Place, x: Any, name: str) -> Any:
        """An activation by its name in the dialect.

        Raises:
            CarveError: ONNX has no short form of it here.
        """
        plain: dict[str, tuple[str, str, dict[str, Any]]] = {
            "gelu": ("Gelu", "", {}),
            "gelu_tanh": ("Gelu", "", {"approximate": "tanh"}),
            "relu": ("Relu", "", {}),
            "elu": ("Elu", "", {}),
            "leaky_relu": ("LeakyRelu", "", {}),
            "mish": ("Mish", "", {}),
            "softplus": ("Softplus", "", {}),
            "hardswish": ("HardSwish", "", {}),
            "sigmoid": ("Sigmoid", "", {}),
            "tanh": ("Tanh", "", {}),
            "silu": ("QuickGelu", CONTRIB, {"alpha": 1.0}),
            "quick_gelu": ("QuickGelu", CONTRIB, {"alpha": 1.702}),
        }
        if name == "identity":
            return x
        if name == "relu2":
            y = self.op(before, "Relu", [x])
            return self.op(before, "Mul", [y, y])
        if name == "relu6":
            low = self.const("carve_zero", np.array(0.0, np.float32))
            high = self.const("carve_six", np.array(6.0, np.float32))
            return self.op(before, "Clip", [x, low, high])
        if name not in plain:
            raise CarveError("emit", f"activation {name} has no ONNX form")
        kind, domain, attributes = plain[name]
        return self.op(before, kind, [x], domain=domain, **attributes)
