"""Hidden activations of an FFN from a panel of its in-projections."""

from __future__ import annotations

from collections.abc import Sequence

from carve.emit.tvm.cpu import Cpu
from carve.emit.tvm.kernels.activations import activate
from carve.emit.tvm.kernels.layout import Panels
from carve.emit.tvm.kernels.vector import Buffer, Expr, load, store


def put_hidden(
    cpu: Cpu,
    panels: Panels,
    activation: str,
    sums: Sequence[Buffer],
    bias: Buffer | None,
    bias_at: Expr,
    to: Buffer,
    at: Expr,
) -> None:
    """Store ``act(gate) * up`` of a paired panel, else ``act`` of both vectors.

    Args:
        cpu: whose vectors.
        panels: the matrix.
        activation: by name.
        sums: the panel's two vectors.
        bias: of the rows as they are packed.
        bias_at: where the panel's begin.
        to: hidden activations.
        at: where the panel's go.
    """
    n = cpu.lanes
    values = [load(s, 0, n) for s in sums]
    if bias is not None:
        values = [v + load(bias, bias_at + i * n, n) for i, v in enumerate(values)]
    if panels.paired:
        gate, up = values
        store(to, at, activate(activation, gate, n) * up, n)
        return
    for i, v in enumerate(values):
        store(to, at + i * n, activate(activation, v, n), n)
