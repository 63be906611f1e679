"""Weights in the order in which the TVM kernels read them (numpy to numpy)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from carve.emit.tvm.cpu import Cpu
from carve.emit.tvm.kernels.layout import (
    VECTORS,
    Panels,
    linear_layout,
    output_bias,
    routed_arrays,
    routed_layout,
)
from carve.emit.tvm.kernels.spec import LinearSpec, RoutedSpec
from carve.errors import CarveError

Packed = dict[str, np.ndarray]


@dataclass(frozen=True)
class Matrix:
    """``[N, K]``, or ``[E, N, K]``: fp32, or levels uint8 with ``scale`` ``[..., N, K / block]``.

    Levels and scales are those of `carve.grid.Grid`: ``w = (level - 2^(bits - 1)) * scale``.
    """

    values: np.ndarray
    scale: np.ndarray | None = None


def widen(levels: np.ndarray, bits: int, to: int) -> np.ndarray:
    """Levels of ``bits`` as levels of ``to`` bits that stand for the same weights."""
    return (levels + np.uint8((1 << (to - 1)) - (1 << (bits - 1)))).astype(np.uint8)


def pack_linear(
    spec: LinearSpec, cpu: Cpu, weight: Matrix, bias: np.ndarray | None = None
) -> Packed:
    """The arrays of `carve.emit.tvm.kernels.linear`, by name in the order of its arguments.

    Args:
        spec: what the kernel was made for.
        cpu: what it was made for.
        weight: ``[N, K]``.
        bias: ``[N]`` where ``spec.bias``.

    Raises:
        CarveError: a shape or format that the specification does not say.
    """
    panels = linear_layout(spec, cpu)
    packed = _matrix(panels, cpu, [weight])
    if spec.bias:
        packed["bias"] = _bias(panels, [bias])
    elif bias is not None:
        raise CarveError("kernel", "linear: a bias that the kernel does not take")
    return packed


def pack_routed(
    spec: RoutedSpec,
    cpu: Cpu,
    *,
    shared_gate: Matrix | None = None,
    shared_gate_bias: np.ndarray | None = None,
    shared_up: Matrix | None = None,
    shared_up_bias: np.ndarray | None = None,
    shared_down: Matrix | None = None,
    output_bias: np.ndarray | None = None,
    expert_gate: Matrix | None = None,
    expert_gate_bias: np.ndarray | None = None,
    expert_up: Matrix | None = None,
    expert_up_bias: np.ndarray | None = None,
    expert_down: Matrix | None = None,
    expert_bias: np.ndarray | None = None,
) -> Packed:
    """The arrays of `carve.emit.tvm.kernels.routed_ffn`, by name in the order of its arguments.

    Weights are named as in `carve.dialect.routed_ffn`, with its shapes. Where the specification
    says that gate and up have biases, one of the two may be absent.

    Raises:
        CarveError: a shape or format that the specification does not say.
    """
    layout = routed_layout(spec, cpu)
    found: Packed = {}

    def inward(
        name: str,
        matrices: Sequence[Matrix | None],
        biases: Sequence[np.ndarray | None],
        has_bias: bool,
    ) -> None:
        if not spec.gated:
            matrices, biases = matrices[1:], biases[1:]
        found.update(_matrix(layout[name], cpu, matrices))
        if has_bias:
            found[f"{name}_bias"] = _bias(layout[name], biases)

    if spec.shared_size:
        inward(
            "shared_in",
            [shared_gate, shared_up],
            [shared_gate_bias, shared_up_bias],
            spec.shared_in_bias,
        )
        found.update(_matrix(layout["shared_down"], cpu, [shared_down]))
    if spec.num_experts:
        inward(
            "expert_in",
            [expert_gate, expert_up],
            [expert_gate_bias, expert_up_bias],
            spec.expert_in_bias,
        )
        found.update(_matrix(layout["expert_down"], cpu, [expert_down]))
        if spec.expert_bias:
            found["expert_bias"] = _bias(layout["expert_down"], [expert_bias])
    if spec.output_bias:
        found["output_bias"] = _output_bias(spec, cpu, output_bias)
    ordered = {a.name: found[a.name] for a in routed_arrays(spec, cpu)}
    for a in routed_arrays(spec, cpu):
        assert found[a.name].shape == (a.size,)
        assert found[a.name].dtype == a.dtype
    return ordered


def _output_bias(spec: RoutedSpec, cpu: Cpu, bias: np.ndarray | None) -> np.ndarray:
    array = output_bias(spec, cpu)
    if array is None or bias is None or bias.shape != (spec.out,):
        raise CarveError("kernel", f"output_bias: expected [{spec.out}]")
    padded = np.zeros(array.size, np.float32)
    padded[: spec.out] = bias
    return padded


def _matrix(p: Panels, cpu: Cpu, matrices: Sequence[Matrix | None]) -> Packed:
    """A matrix, or a gate and an up of the same shape, in panels."""
    form = p.form
    kind = np.dtype(np.uint8 if form.quantized else np.float32)
    parts, scales = [], []
    for m in matrices:
        _check(p, p.name, None if m is None else m.values, p.columns, kind)
        assert m is not None
        parts.append(m.values)
        if form.quantized:
            scale = f"{p.name} scale"
            _check(p, scale, m.scale, p.columns // form.block, np.dtype(np.float32))
            assert m.scale is not None
            scales.append(m.scale)
    if not form.quantized:
        return {p.name: np.ascontiguousarray(_panels(p, parts).swapaxes(-1, -2)).reshape(-1)}
    data, scale_data = _panels(p, parts, form.zero), _panels(p, scales)
    groups = data.reshape(*data.shape[:-1], p.columns // 4, 4).swapaxes(-2, -3)
    if form.bits < 8:
        each = 8 // form.bits
        parted = [groups[..., i::each, :, :] << (i * form.bits) for i in range(each)]
        groups = np.bitwise_or.reduce(parted)
    elif cpu.signed_levels:
        groups = groups ^ np.uint8(0x80)
    return {
        p.name: np.ascontiguousarray(groups).reshape(-1),
        f"{p.name}_scale": np.ascontiguousarray(scale_data.swapaxes(-1, -2)).reshape(-1),
    }


def _panels(p: Panels, parts: Sequence[np.ndarray], fill: int = 0) -> np.ndarray:
    """Rows ``[count, panels, 2 lanes, columns]``, padded with ``fill``."""
    stacked = []
    for part in parts:
        rows = part.reshape(p.count, p.rows, part.shape[-1])
        gap = ((0, 0), (0, p.padded - p.rows), (0, 0))
        rows = np.pad(rows, gap, constant_values=fill)
        per = p.lanes if p.paired else VECTORS * p.lanes
        stacked.append(rows.reshape(p.count, p.panels, per, -1))
    return np.concatenate(stacked, axis=2)


def _bias(p: Panels, biases: Sequence[np.ndarray | None]) -> np.ndarray:
    for b in biases:
        if b is not None and b.shape not in ((p.count, p.rows), (p.rows,) * (p.count == 1)):
            raise CarveError("kernel", f"{p.bias}: {b.shape} where [{p.count}, {p.rows}] is due")
    if all(b is None for b in biases):
        raise CarveError("kernel", f"{p.bias}: the kernel takes one")
    zero = np.zeros((p.count, p.rows), np.float32)
    parts = [(zero if b is None else b).reshape(p.count, p.rows, 1) for b in biases]
    return np.ascontiguousarray(_panels(p, parts), dtype=np.float32).reshape(-1)


def _check(
    p: Panels, what: str, array: np.ndarray | None, columns: int, dtype: np.dtype[np.generic]
) -> None:
    due = (p.count, p.rows, columns)
    shapes = (due, due[1:]) if p.count == 1 else (due,)
    if array is None or array.shape not in shapes or array.dtype != dtype:
        have = "nothing" if array is None else f"{array.dtype} {list(array.shape)}"
        raise CarveError("kernel", f"{what}: {have} where {dtype} {list(due)} is due")
