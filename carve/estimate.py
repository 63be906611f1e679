"""What a conversion will take: time by pass, memory and disk, from sizes and measured rates.

Time is counted work (`carve.workload`) over rates measured on the machine (`carve.rates`); slices,
sorts and solvers are not counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from carve.config import ConvertConfig
from carve.engine_form import FOREIGN
from carve.errors import UserError
from carve.grid import BLOCK, large_table
from carve.passbase import Pass
from carve.placement.sizes import planned_sizes
from carve.rates import Rates
from carve.workload import COUNTED, Scene, around

_LOADED = 750e6
"""Bytes of a process that has imported torch, transformers, onnxscript and onnxruntime."""


@dataclass(frozen=True)
class Estimate:
    """``seconds`` by what is done, in order; ``memory``: bytes at the peak.

    ``output``: bytes of the artifact; ``state``: what the states of all passes take until then.
    """

    seconds: dict[str, float]
    memory: float
    output: float
    state: float

    @property
    def total_seconds(self) -> float:
        """All of it."""
        return sum(self.seconds.values())

    @property
    def disk(self) -> float:
        """Bytes that have to be free beside the output."""
        return self.output + self.state

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "total_seconds": self.total_seconds, "disk": self.disk}


def estimate(
    scene: Scene, config: ConvertConfig, passes: Sequence[Pass[Any]], rates: Rates
) -> Estimate:
    """Time, memory and disk of a conversion."""
    names = [p.name for p in passes]
    seconds = {"capture": _fixed(scene, rates, 900)}
    besides = around(scene, names) if passes else {}
    for name in ("calibration", "dense model"):
        if name in besides:
            seconds[name] = rates.seconds(besides[name])
    for p in passes:
        if p.name in COUNTED:
            seconds[p.name] = rates.seconds(COUNTED[p.name](scene, p))
        elif p.name == "place":
            seconds[p.name] = float(p.config.seconds)
    for name in ("after each pass", "held-out text"):
        if name in besides:
            seconds[name] = rates.seconds(besides[name])
    seconds |= {f"emit {t}": _fixed(scene, rates, 3500) for t in config.targets}
    output, state = _output(scene, config), _state(scene, config, names)
    return Estimate(seconds, _memory(scene, config, names), output, state)


def _fixed(scene: Scene, rates: Rates, steps: float) -> float:
    """Tracing and translating a graph: ``steps`` calls an operator of it."""
    return steps * len(scene.program.module.graph.nodes) / rates.steps


def _stored(scene: Scene) -> tuple[float, float, float]:
    """Bytes of the dense weights, of the FFNs to be carved among them, and of the linears."""
    p = scene.program
    total = float(sum(t.nbytes for t in p.module.parameters()))
    carved = float(sum(t.nbytes for s, _ in scene.carved for t in s.dense.tensors().values()))
    linears = float(sum(n.weight.nbytes for n in p.linears))
    return total, carved, linears


def _output(scene: Scene, config: ConvertConfig) -> float:
    """Bytes of all targets."""
    total, _, _ = _stored(scene)
    bits = config.nominal_bits
    try:
        sizes, _ = planned_sizes(scene.program, scene.splits, bits)
        own = sizes.host_bytes + sum(map(sum, sizes.nbytes))
    except UserError:  # nothing is carved
        weights = sum(t.numel() for t in scene.program.module.parameters())
        own = weights * (bits / 8 + 4 / BLOCK if bits < 16 else 4.0)
    return sum(total if t in FOREIGN else own for t in config.targets) + 4e6


def _state(scene: Scene, config: ConvertConfig, names: Sequence[str]) -> float:
    """Bytes of the states of all passes: each stores what it changed."""
    _, carved, linears = _stored(scene)
    down = sum(s.dense.down.nbytes for s, _ in scene.carved)
    biases = sum(4 * (s.num_experts + 1) * f.dense.down.shape[0] for f, s in scene.carved)
    routers = sum(4 * s.num_experts * f.dense.up.shape[1] for f, s in scene.carved)
    ffns = sum(t.numel() for f, _ in scene.carved for t in f.dense.tensors().values())
    others = sum(n.weight.numel() for n in scene.program.linears)
    tables = sum(w.weight.numel() for w in scene.program.lookups if large_table(w.weight))
    each = {
        "carve": carved,
        "route_ridge": routers,
        "route_analytical": 2 * routers,
        "compensate": biases,
        "refit": down + biases,
        "distill": carved + biases,
        "finetune": carved + biases + 12.0 * ffns,
        "smooth": carved + linears,
        # Grids have a scale a block; tables that are rounded stand in fp32.
        "quantize": carved + linears + 4.0 * (ffns + others + tables) / BLOCK + 4.0 * tables,
    }
    return sum(each.get(n, 0.0) for n in names)


def _memory(scene: Scene, config: ConvertConfig, names: Sequence[str]) -> float:
    """Peak of resident bytes."""
    total, carved, linears = _stored(scene)
    t = scene.layerwise
    widths = [s.dense.up.shape[1] for s in scene.program.sites]
    d, m = max(widths), max(s.dense.intermediate_size for s in scene.program.sites)
    size = 4.0 * t * sum(widths)
    inputs = size if size < 1 << 30 else size / 2
    logits = 2.0 * min(scene.tokens.final * scene.vocabulary, 1 << 29)
    logits += 2.0 * scene.tokens.judge * scene.vocabulary
    # Streams, inputs and queries of both copies, then one site's lesson.
    walked = 4.0 * t * d * (2 * 4 + 4)
    fitted = 8.0 * (m + 33) ** 2 * 3 + 4.0 * 4096 * m * 6
    batch = 4.0 * scene.rows * scene.length * (3 * scene.vocabulary + 6 * m)
    if "quantize" in names:
        tq = min(t, 24_576)
        walked = max(walked, 4.0 * tq * d * 16 + 8.0 * tq * scene.vocabulary)
    during = inputs + logits + (walked if {"refit", "distill", "quantize"} & {*names} else 0.0)
    rewritten = carved * (2 if "quantize" in names else 1) + (
        linears if "quantize" in names else 0.0
    )
    return _LOADED + total + rewritten + during + max(fitted, batch)
