"""Appends onnxruntime nodes to an ONNX graph, with weights that are made as the file is written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
from torch import Tensor

from carve.emit import pack
from carve.errors import CarveError

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
    """Appends nodes before a node of the graph and keeps new initializers."""

    def __init__(self, model: ir.Model, bits: int) -> None:
        self.graph, self.bits = model.graph, bits
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
        self, name: str, make: Callable[[], Tensor], shape: tuple[int, ...], *, blocked: bool
    ) -> tuple[ir.Value, ir.Value]:
        """Levels and scales of a weight ``[..., N, K]``; ``blocked``: an axis for the blocks."""
        *rows, k = shape
        blocks, width = k // pack.BLOCK, pack.BLOCK * self.bits // 8
        store: dict[int, np.ndarray] = {}

        def part(which: int) -> np.ndarray:
            # Both tensors come from one quantization; each is taken once, then forgotten.
            if which not in store:
                levels, scale = pack.quantize(make(), self.bits)
                packed = pack.pack(levels, self.bits)
                store[0] = packed.reshape(*rows, blocks, width) if blocked else packed
                store[1] = scale.numpy()
            return store.pop(which)

        last = (blocks, width) if blocked else (blocks * width,)
        levels = self.tensor(
            f"{name}.q{self.bits}", lambda: part(0), (*rows, *last), ir.DataType.UINT8
        )
        scales = self.tensor(f"{name}.scales", lambda: part(1), (*rows, blocks), ir.DataType.FLOAT)
        return levels, scales

    def linear(
        self, before: Place, x: ir.Value, name: str, weight: Tensor, bias: Tensor | None
    ) -> Any:
        """``x @ weight.T + bias`` at the model's width."""
        n, k = weight.shape
        if self.bits < 16 and k % pack.BLOCK == 0:
            b, s = self.quantized(name, lambda: weight, (n, k), blocked=True)
            y = self.op(
                before,
                "MatMulNBits",
                [x, b, s],
                domain=CONTRIB,
                K=k,
                N=n,
                bits=self.bits,
                block_size=pack.BLOCK,
                accuracy_level=4,
            )
        else:
            w = self.tensor(
                f"{name}.t",
                lambda: weight.float().t().contiguous().numpy(),
                (k, n),
                ir.DataType.FLOAT,
            )
            y = self.op(before, "MatMul", [x, w])
        if bias is not None:
            y = self.op(before, "Add", [y, self.float_tensor(f"{name}.bias", bias)])
        return y

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
