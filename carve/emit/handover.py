"""A placement in the forms that other engines take: expert order, maps, overrides by layer.

Engines with expert parallelism give each rank the same number of slots, contiguous in the order of
the experts. Where the placement has equal counts it is baked: the experts of a checkpoint are
reordered and no map is needed. In any case the maps say which expert each slot holds, and
llama.cpp, which places whole layers only, gets the nearest such placement.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]
from torch import Tensor

from carve.artifact import write_json
from carve.emit.hf_tensors import layer_of
from carve.placement.result import Placement

Slots = list[list[list[int]]]
"""By layer and rank, the experts that it holds."""


@dataclass(frozen=True)
class HandOver:
    """What a placement means for a checkpoint.

    ``ranks``: names of the devices that hold experts, in order; ``orders``: by site, the old index
    of each expert of the checkpoint, empty where the placement is not baked; ``slots``: experts in
    the checkpoint's order, every rank filled up to the same number with copies of its own.
    """

    ranks: tuple[str, ...]
    layers: tuple[str, ...]
    orders: dict[str, Tensor]
    slots: Slots
    overrides: dict[str, list[int]]

    @property
    def baked(self) -> bool:
        """Whether contiguous blocks of experts are the devices."""
        return bool(self.orders)


def hand_over(placement: Placement, loads: Sequence[NDArray[np.float64]]) -> HandOver:
    """Work out orders, slots and overrides.

    Args:
        placement: devices of every expert.
        loads: by layer, the share of tokens that takes each expert.
    """
    used = sorted({d for layer in placement.assignment for held in layer for d in held})
    held = [
        [[e for e, at in enumerate(layer) if d in at] for d in used]
        for layer in placement.assignment
    ]
    counts = {len(experts) for layer in held for experts in layer}
    alone = all(len(at) == 1 for layer in placement.assignment for at in layer)
    orders: dict[str, Tensor] = {}
    if alone and len(counts) == 1:
        for name, layer in zip(placement.layers, held, strict=True):
            orders[name] = torch.tensor([e for experts in layer for e in experts])
        block = counts.pop()
        held = [[[*range(r * block, r * block + block)] for r in range(len(used))] for _ in held]
    ranks = tuple(placement.devices[d] for d in used)
    overrides = _whole_layers(placement, used, loads)
    return HandOver(
        ranks,
        placement.layers,
        orders,
        _filled(held),
        {
            r: [layer_of(placement.layers[i]) for i in at]
            for r, at in zip(ranks, overrides, strict=True)
        },
    )


def _filled(held: Slots) -> Slots:
    """Every rank with as many slots as the fullest: its own experts again, or the first."""
    most = max(len(experts) for layer in held for experts in layer)
    return [
        [[(experts or [0])[i % max(1, len(experts))] for i in range(most)] for experts in layer]
        for layer in held
    ]


def _whole_layers(
    placement: Placement, used: Sequence[int], loads: Sequence[NDArray[np.float64]]
) -> list[list[int]]:
    """Which layers each device gets where a layer cannot be divided.

    A device gets as many layers as its share of all experts says, and together they keep as much
    of the load as possible where the placement has it: an assignment problem.
    """
    layers = len(placement.homes)
    kept = np.array(
        [[p[h == d].sum() for d in used] for p, h in zip(loads, placement.homes, strict=True)]
    )
    share = np.array([sum(int((h == d).sum()) for h in placement.homes) for d in used], float)
    share *= layers / share.sum()
    counts = np.floor(share).astype(int)
    for d in np.argsort(counts - share, kind="stable")[: layers - counts.sum()]:
        counts[d] += 1
    owner = np.repeat(np.arange(len(used)), counts)
    rows, columns = linear_sum_assignment(-kept[:, owner])
    return [
        [int(r) for r, c in zip(rows, columns, strict=True) if owner[c] == d]
        for d in range(len(used))
    ]


def physical_to_logical(h: HandOver, num_layers: int, num_experts: int) -> dict[str, Any]:
    """SGLang's ``--init-expert-location``: for every layer of the model, the expert in each slot.

    Layers without routed experts have a row too, which is not read.
    """
    slots = sum(len(experts) for experts in h.slots[0])
    rows = [[s % num_experts for s in range(slots)] for _ in range(num_layers)]
    for name, layer in zip(h.layers, h.slots, strict=True):
        rows[layer_of(name)] = [e for experts in layer for e in experts]
    return {"physical_to_logical_map": rows}


def expert_map(h: HandOver) -> dict[str, Any]:
    """vLLM-Ascend's ``expert_map_path``, layers with experts counted from 0."""
    return {
        "moe_layer_count": len(h.slots),
        "layer_list": [
            {
                "layer_id": i,
                "device_count": len(layer),
                "device_list": [
                    {"device_id": d, "device_expert": experts} for d, experts in enumerate(layer)
                ],
            }
            for i, layer in enumerate(h.slots)
        ],
    }


def tensor_overrides(overrides: Mapping[str, Sequence[int]]) -> list[str]:
    """llama.cpp's ``--override-tensor`` patterns, one a device.

    The name after ``=`` is the device's own: name devices as llama.cpp does (``CPU``, ``CUDA0``),
    or put its name there.
    """
    return [
        rf"blk\.({'|'.join(map(str, at))})\.ffn_(gate|up|down)_exps\.={re.sub(r'[,=]', '_', name)}"
        for name, at in overrides.items()
        if at
    ]


def write_handover(h: HandOver, folder: Path, num_layers: int, num_experts: int) -> None:
    """Write all forms into ``folder``, which has to exist."""
    each = len(h.slots[0][0])
    write_json(folder / "sglang.json", physical_to_logical(h, num_layers, num_experts))
    write_json(folder / "vllm_ascend.json", expert_map(h))
    lines = "".join(f"{p}\n" for p in tensor_overrides(h.overrides))
    (folder / "llama_cpp.txt").write_text(lines, encoding="utf-8")
    facts = {
        "ranks": list(h.ranks),
        "experts_a_rank": each,
        "redundant_experts": each * len(h.ranks) - num_experts,
        "baked": h.baked,
        "orders": {n: o.tolist() for n, o in h.orders.items()},
    }
    write_json(folder / "handover.json", facts)
