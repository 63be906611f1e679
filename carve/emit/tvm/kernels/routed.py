"""Routed FFNs: a shared expert and the experts that each token's scores choose."""

from __future__ import annotations

from typing import Any

from tvm import tirx  # type: ignore[import-not-found,unused-ignore]
from tvm.tirx.script import builder as T  # type: ignore[import-not-found,unused-ignore]

from carve.emit.tvm.cpu import Cpu
from carve.emit.tvm.kernels.arguments import Arguments
from carve.emit.tvm.kernels.decode import decode
from carve.emit.tvm.kernels.layout import output_bias, routed_layout
from carve.emit.tvm.kernels.parts import Call, Part
from carve.emit.tvm.kernels.pipeline import function
from carve.emit.tvm.kernels.prefill import prefill
from carve.emit.tvm.kernels.results import Result
from carve.emit.tvm.kernels.schedule import Schedule, default
from carve.emit.tvm.kernels.spec import RoutedSpec
from carve.emit.tvm.kernels.vector import opaque


def routed_ffn(spec: RoutedSpec, cpu: Cpu, schedule: Schedule | None = None) -> Any:
    """A PrimFunc ``(x [n, d], scores [n, E]?, packed..., y [n, out])``, fp32, ``n`` symbolic.

    ``y`` is that of `carve.dialect.routed_ffn`, whose router logits are ``scores``: the kernel
    chooses the experts itself. Without experts there are no scores.

    Args:
        spec: what to compute; weights as `carve.emit.tvm.weights.pack_routed` packs them.
        cpu: what to compile for.
        schedule: None: the default.
    """
    layout = routed_layout(spec, cpu)
    with function("routed_ffn") as made:
        given = Arguments()
        x = given.rows("x", spec.hidden_size)
        scores = given.rows("scores", spec.num_experts) if spec.num_experts else None
        found = {name: given.weights(p) for name, p in layout.items()}
        last = output_bias(spec, cpu)
        bias = None if last is None else given.array(last)
        y = given.rows("y", spec.out)

        def part(name: str) -> Part | None:
            if f"{name}_in" not in layout:
                return None
            inward, down = f"{name}_in", f"{name}_down"
            return Part(layout[inward], *found[inward], layout[down], *found[down])

        call = Call(
            spec,
            cpu,
            schedule or _default(spec, cpu),
            given.flat(x),
            None if scores is None else given.flat(scores),
            part("shared"),
            part("expert"),
            bias,
            Result(cpu, given.flat(y), spec.out),
        )
        n = opaque(given.n)
        with T.If(n == tirx.const(1, "int32")):
            with T.Then():
                decode(call)
            with T.Else():
                prefill(call, n)
    return made()


def _default(spec: RoutedSpec, cpu: Cpu) -> Schedule:
    panels = routed_layout(spec, cpu).values()
    read = 0
    for p in panels:
        size = sum(a.nbytes for a in p.arrays())
        read += size if p.name.startswith("shared") else size * spec.top_k // spec.num_experts
    return default(cpu, read, quantized=any(p.form.quantized for p in panels))
