"""What a conversion will take: time by pass, memory and disk, from sizes and measured rates.

Time is counted work (`carve.workload`) over rates measured on the machine (`carve.rates`); slices,
sorts and solvers are not counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from carve.config import ConvertConfig, parse_size
from carve.emit.hf import stored_dtype
from carve.emit.tvm.names import PREFIX
from carve.end_to_end import TrainingConfig
from carve.engine_form import FOREIGN
from carve.errors import UserError
from carve.grid import BLOCK, large_table
from carve.passbase import Pass
from carve.placement.sizes import planned_sizes
from carve.rates import Rates
from carve.workload import COUNTED, Scene, around, emitting, training

_PAGE = 1e5
"""Bytes of reports and recipe, whatever the model."""
_NODE, _TENSOR = 250.0, 512.0
"""Bytes of a graph for each operator and each tensor."""
_LIBRARY, _LAYER, _KERNEL = 4e5, 2.5e4, 8e4
"""Bytes of a library for TVM: of any, for each layer, for each other set of widths."""


@dataclass(frozen=True)
class Room:
    """``memory``: bytes at the peak; ``output``: of the artifact.

    ``state``: bytes that the states of all passes take until the artifact is finished.
    """

    memory: float
    output: float
    state: float

    @property
    def disk(self) -> float:
        """Bytes that have to be free beside the output."""
        return self.output + self.state


def seconds_of(
    scene: Scene, config: ConvertConfig, passes: Sequence[Pass[Any]], rates: Rates
) -> dict[str, float]:
    """Time by what is done, in order."""
    names = [p.name for p in passes]
    seconds: dict[str, float] = {}
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
    emitted = dict.fromkeys(config.targets)
    return seconds | {f"emit {t}": rates.seconds(emitting(scene, t)) for t in emitted}


def room_of(
    scene: Scene,
    config: ConvertConfig,
    passes: Sequence[Pass[Any]],
    resident: float,
    seconds: Mapping[str, float] | None = None,
) -> Room:
    """Memory and disk of a conversion whose process has ``resident`` bytes, weights among them.

    ``seconds``: of passes, where they are known (`seconds_of`).
    """
    names = [p.name for p in passes]
    each = _outputs(scene, config)
    output = sum(each.values()) + scene.copied + _PAGE
    # A target is written from one copy of its weights and compared in another.
    emission = 3.0 * max(each.values())
    trained = [p for p in passes if isinstance(p.config, TrainingConfig)]
    steps = {p.name: p.config.batch for p in trained if training(scene, p.config)[1]}
    memory = resident + max(_working(scene, names, steps), emission)
    return Room(memory, output, _state(scene, passes, steps, seconds or {}))


def _stored(scene: Scene) -> tuple[float, float]:
    """Bytes of the dense weights of the FFNs to be carved, and of other linears."""
    carved = float(sum(t.nbytes for s, _ in scene.carved for t in s.dense.tensors().values()))
    linears = float(sum(n.weight.nbytes for n in scene.others))
    return carved, linears


def _outputs(scene: Scene, config: ConvertConfig) -> dict[str, float]:
    """Bytes of every target."""
    program = scene.program
    weights = sum(t.numel() for t in program.module.parameters())
    foreign = float(weights * stored_dtype(program).itemsize)
    bits = config.average_bits
    try:
        sizes, _ = planned_sizes(program, scene.splits, bits)
        own = sizes.host_bytes + sum(map(sum, sizes.nbytes))
    except UserError:  # nothing is carved
        own = program.num_parameters * (bits / 8 + 4 / BLOCK if bits < 16 else 4.0)
    if config.size is not None:
        own = min(own, float(parse_size(config.size, "size")))
    own += _NODE * len(program.module.graph.nodes)
    own += _TENSOR * sum(1 for _ in program.module.parameters())
    widths = len({split for _, split in scene.carved})
    library = _LIBRARY + _LAYER * len(program.sites) + _KERNEL * widths
    return {
        t: foreign if t in FOREIGN else own + (library if t.startswith(PREFIX) else 0.0)
        for t in config.targets
    }


def _state(
    scene: Scene,
    passes: Sequence[Pass[Any]],
    steps: Mapping[str, int],
    seconds: Mapping[str, float],
) -> float:
    """Most bytes of the states of all passes: each stores what it changed; told text is there too.

    ``steps``: see `_working`.

    Training keeps weights and two moments, and the former ones until new ones are written; what
    takes less than its ``save_seconds`` keeps none, and less than twice of them one.
    """
    names = [p.name for p in passes]
    carved, linears = _stored(scene)
    down = sum(s.dense.down.nbytes for s, _ in scene.carved)
    biases = sum(4 * (s.num_experts + 1) * f.dense.down.shape[0] for f, s in scene.carved)
    routers = sum(4 * s.num_experts * f.dense.up.shape[1] for f, s in scene.carved)
    ffns = sum(t.numel() for f, _ in scene.carved for t in f.dense.tensors().values())
    others = sum(n.weight.numel() for n in scene.others)
    tables = sum(w.weight.numel() for w in scene.program.lookups if large_table(w.weight))
    # Grids have a scale a block; tables that are rounded stand in fp32.
    rounded = carved + linears + 4.0 * (ffns + others + tables) / BLOCK + 4.0 * tables
    each = {
        "carve": carved,
        "route_ridge": routers,
        "route_analytical": 2 * routers,
        "compensate": biases,
        "refit": down + biases,
        "distill": carved + biases,
        "finetune": carved + biases,
        "smooth": carved + linears,
        "quantize": rounded + (ffns + others if "tune_grids" in names else 0.0),
        "tune_grids": rounded,
    }
    moments = {"finetune": 12.0 * ffns, "tune_grids": 12.0 * (ffns + others)}
    stored = most = 8.0 * scene.tokens.told
    for p in passes:
        if p.name in steps:
            each_save = p.config.save_seconds
            took = seconds.get(p.name, 2 * each_save)
            copies = (took >= each_save) + (took >= 2 * each_save)
            most = max(most, stored + copies * moments[p.name])
        stored += each.get(p.name, 0.0)
    return max(most, stored)


def _trained(scene: Scene, name: str, step: int) -> float:
    """Bytes that a pass which trains the whole program keeps for its way back.

    ``step``: tokens a step. Of the weights their values (the levels and what is made of them on the
    way), their gradient and two moments. Of a token in a block: what norms, attention and the
    shared expert read and write; of each of its experts the row that it reads, as it was and
    rounded for gate and up, and the one that it writes; and hidden activations, in
    `carve.passes.Finetune` of all experts. Of the logits the dense ones, these and their gradient.
    An encoder's largest batch is no usual one, and its attention keeps every pair's score.
    """
    kept, tokens = 3.0 * scene.vocabulary, float(min(step, scene.usual))
    if scene.program.kind == "encoder":
        tokens = float(step)
        heads = int(scene.program.config.get("num_attention_heads", 1))
        kept += 3.0 * heads * step / scene.rows * len(scene.program.sites)
    for site in scene.program.sites:
        split, d = scene.splits.get(site.name), site.dense.up.shape[1]
        taken, hidden = 0, site.dense.intermediate_size
        if split is not None and name == "tune_grids":
            taken, hidden = split.top_k, split.active_size
        kept += 12 * d + 4 * d * taken + 6 * hidden
    return 4.0 * (tokens * kept + 6 * scene.program.num_parameters)


def _working(scene: Scene, names: Sequence[str], steps: Mapping[str, int]) -> float:
    """Most bytes that passes hold at once, beside the weights that are there when they begin.

    ``steps``: tokens a step of passes that train the whole program, and do.
    """
    carved, linears = _stored(scene)
    t = scene.layerwise
    widths = [s.dense.up.shape[1] for s in scene.program.sites]
    d, m = max(widths), max(s.dense.intermediate_size for s in scene.program.sites)
    size = 4.0 * t * sum(widths)
    inputs = size if size < 1 << 30 else size / 2
    logits = 2.0 * min(scene.tokens.final * scene.vocabulary, 1 << 29)
    logits += 2.0 * scene.tokens.judge * scene.vocabulary
    # Streams, inputs and queries of both copies, and one site's lesson.
    walked = 4.0 * t * d * (2 * 4 + 4)
    fitted = 4.0 * (m + 33) ** 2 * 4 + 4.0 * 4096 * m * 6
    batch = 4.0 * scene.usual * (3 * scene.vocabulary + 6 * m)
    if "quantize" in names:
        tq = min(t, 24_576)
        walked = max(walked, 4.0 * tq * d * 16 + 8.0 * tq * scene.vocabulary)
    batch = max([batch, *(_trained(scene, name, step) for name, step in steps.items())])
    during = inputs + logits + (walked if {"refit", "distill", "quantize"} & {*names} else 0.0)
    rewritten = carved * (2 if "quantize" in names else 1) + (
        linears if "quantize" in names else 0.0
    )
    return rewritten + during + max(fitted, batch)
