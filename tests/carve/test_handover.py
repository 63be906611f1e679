from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np

from carve.emit.handover import (
    expert_map,
    hand_over,
    physical_to_logical,
    tensor_overrides,
    write_handover,
)
from carve.placement.result import Placement

LAYERS = tuple(f"model.layers.{i}.mlp" for i in (1, 2, 3))
LOADS = [np.array([0.9, 0.1, 0.5, 0.5, 0.2, 0.8]) for _ in LAYERS]


def placed(*layers: list[int] | list[tuple[int, ...]]) -> Placement:
    held = tuple(tuple((d,) if isinstance(d, int) else d for d in layer) for layer in layers)
    return Placement(("hub", "CUDA0", "CUDA1"), LAYERS, held, "throughput", 1.0, 1.0)


EQUAL = placed([1, 2, 1, 2, 1, 2], [2, 2, 2, 1, 1, 1], [1, 1, 1, 2, 2, 2])
UNEQUAL = placed([0, 2, 1, 2, 1, 2], [2, 2, 2, 1, 1, 1], [1, 1, 2, 2, 2, 2])


def test_equal_counts_are_baked_into_the_order_of_experts() -> None:
    h = hand_over(EQUAL, LOADS)
    assert h.baked
    assert h.ranks == ("CUDA0", "CUDA1")  # the hub holds none
    for name, homes in zip(LAYERS, EQUAL.homes, strict=True):
        order = h.orders[name].numpy()
        assert sorted(order) == [*range(6)]
        assert (homes[order] == [1, 1, 1, 2, 2, 2]).all()
    assert h.slots == [[[0, 1, 2], [3, 4, 5]]] * 3


def test_unequal_counts_and_replicas_are_handed_over_as_maps() -> None:
    twice = placed([1, 2, 1, 2, 1, (2, 1)], [2, 2, 2, 1, 1, 1], [1, 1, 1, 2, 2, 2])
    for placement, ranks, most in ((UNEQUAL, (0, 1, 2), 4), (twice, (1, 2), 4)):
        h = hand_over(placement, LOADS)
        assert not h.baked
        assert not h.orders
        for held, layer in zip(placement.assignment, h.slots, strict=True):
            assert [len(experts) for experts in layer] == [most] * len(ranks)
            for d, experts in zip(ranks, layer, strict=True):
                own = {e for e, at in enumerate(held) if d in at}
                assert {*experts} == (own or {0})


def test_maps_of_sglang_and_vllm_ascend() -> None:
    h = hand_over(UNEQUAL, LOADS)
    rows = physical_to_logical(h, 4, 6)["physical_to_logical_map"]
    assert [len(row) for row in rows] == [12] * 4
    assert all({*row} == {*range(6)} for row in rows)
    # Layer 0 is dense, layer 1 the first that is routed.
    assert rows[1] == [0, 0, 0, 0, 2, 4, 2, 4, 1, 3, 5, 1]
    table = expert_map(h)
    assert table["moe_layer_count"] == 3
    first = table["layer_list"][0]
    assert (first["layer_id"], first["device_count"]) == (0, 3)
    assert [d["device_expert"] for d in first["device_list"]] == h.slots[0]
    assert [d["device_id"] for d in first["device_list"]] == [0, 1, 2]


def test_llama_cpp_gets_whole_layers_by_load() -> None:
    heavy = np.array([1.0, 1.0, 1.0, 0.0, 0.0, 0.0])
    # Half of the experts are CUDA1's: two layers of four, those whose load it has.
    layers = [[1, 1, 1, 2, 2, 2], [2, 2, 2, 1, 1, 1], [2, 2, 2, 1, 1, 1]]
    h = hand_over(placed(*layers), [heavy] * 3)
    assert sorted(len(v) for v in h.overrides.values()) == [1, 2]
    assert 1 in h.overrides["CUDA0"]
    owner = {}
    for pattern in tensor_overrides(h.overrides):
        expression, _, device = pattern.rpartition("=")
        for layer in range(5):
            for part in ("gate", "up", "down"):
                if re.search(expression, f"blk.{layer}.ffn_{part}_exps.weight"):
                    owner[layer, part] = device
            assert not re.search(expression, f"blk.{layer}.ffn_gate_shexp.weight")
            assert not re.search(expression, f"blk.1{layer}.ffn_gate_exps.weight")
    assert {layer for layer, _ in owner} == {1, 2, 3}
    assert owner[1, "up"] == "CUDA0"
    assert len(owner) == 9


def test_files(tmp_path: Path) -> None:
    write_handover(hand_over(UNEQUAL, LOADS), tmp_path, 4, 6)
    facts = json.loads((tmp_path / "handover.json").read_text())
    assert facts["ranks"] == ["hub", "CUDA0", "CUDA1"]
    assert facts["redundant_experts"] == 12 - 6
    assert facts["baked"] is False
    assert [*json.loads((tmp_path / "sglang.json").read_text())] == ["physical_to_logical_map"]
    assert len((tmp_path / "llama_cpp.txt").read_text().splitlines()) >= 2
    assert json.loads((tmp_path / "vllm_ascend.json").read_text())["layer_list"]
