"""What a report says of costs, errors, routing and skipped positions, on a tiny model."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import tiny_models as tiny
import torch

from carve.calibration import Batch
from carve.diagnosis import Diagnosis, costs
from carve.evaluate import Evaluator
from carve.program import Program
from carve.realised import realised
from carve.routing_stats import RouterStats, margins

Capture = Callable[[str], tiny.Captured]


def batches(program: Program, rows: int = 4, length: int = 24) -> list[Batch]:
    g = torch.Generator().manual_seed(5)
    ids = torch.randint(3, tiny.VOCAB, (rows, length), generator=g)
    return [Batch(tiny.decoder_inputs(program, ids))]


@pytest.fixture
def program(captured: Capture) -> Program:
    return captured("llama").program


def test_costs_of_a_dense_program_are_its_weights(program: Program) -> None:
    found = costs(program)
    parameters = {p.data_ptr(): p for p in program.module.parameters()}
    assert found["bytes"] == 4 * sum(p.numel() for p in parameters.values())
    assert found["macs"] == program.dense_macs
    # Of the embedding one row is read, which counts as nothing, unless it is the head as well.
    (table,) = program.lookups
    tied = any(n.weight.data_ptr() == table.weight.data_ptr() for n in program.linears)
    assert found["bytes"] - found["reads"] == (0 if tied else 4 * table.weight.numel())


def test_experts_and_gates_are_read_by_their_share(program: Program) -> None:
    before = costs(program)
    site = program.sites[0]
    program.set_routed(site, tiny.random_routed(site, num_experts=4, top_k=1, compensation=False))
    after = costs(program)
    expert = 3 * tiny.HIDDEN * 32 * 4
    router = after["bytes"] - before["bytes"]
    assert before["reads"] - after["reads"] == pytest.approx(3 * expert - router)
    other = program.sites[1]
    program.set_gate(other, replace(tiny.random_gate(other), skip=0.25))
    assert other.gate is not None
    own = sum(4 * t.numel() for t in other.gate.tensors().values())
    gated = costs(program)
    dense = 3 * tiny.HIDDEN * tiny.FFN * 4
    assert after["reads"] - gated["reads"] == pytest.approx(0.25 * dense - own)
    attention = program.attention[0]
    program.set_gate(attention, replace(tiny.random_gate(attention), skip=0.5))
    assert attention.gate is not None
    own = sum(4 * t.numel() for t in attention.gate.tensors().values())
    saved = gated["reads"] - costs(program)["reads"]
    assert saved == pytest.approx(0.5 * 4 * attention.query_macs - own)


def test_errors_by_layer(program: Program) -> None:
    held = batches(program)
    diagnosis = Diagnosis(program, Evaluator(program, held))
    first, second = program.sites
    assert set(diagnosis.state(program)["error"].values()) == {0.0}
    program.set_routed(second, tiny.random_routed(second, top_k=1))
    error = diagnosis.state(program)["error"]
    assert error[first.name] == 0.0
    assert error[second.name] > 1e-3
    program.set_routed(first, tiny.random_routed(first, top_k=1))
    assert diagnosis.state(program)["error"][first.name] > 1e-3
    # The error is that of the stream: the FFN's own, over what it is added to.
    program.set_routed(first, tiny.random_routed(first).with_top_k(4))
    assert diagnosis.state(program)["error"][first.name] < 1e-9


def test_the_stream_behind_a_gate(program: Program) -> None:
    diagnosis = Diagnosis(program, Evaluator(program, batches(program)))
    site = program.sites[0]
    program.set_gate(site, tiny.random_gate(site))
    error = diagnosis.state(program)["error"]
    assert all(v > 1e-3 for v in error.values())
    never = replace(tiny.random_gate(site), bias=torch.tensor([1e6]))
    program.set_gate(site, never)
    assert max(diagnosis.state(program)["error"].values()) == 0.0


def test_loss_is_what_the_dense_ffn_gives_back(program: Program) -> None:
    held = batches(program)
    evaluator = Evaluator(program, held)
    diagnosis = Diagnosis(program, evaluator)
    site, other = program.sites
    program.set_routed(site, tiny.random_routed(site, top_k=1))
    found = diagnosis.layers(program, realised(program, held))
    whole = evaluator.loss(program)
    assert found[site.name]["loss"] == pytest.approx(whole, rel=1e-3)
    assert found[other.name]["loss"] == pytest.approx(0.0, abs=1e-6)
    assert found[other.name]["active"] == 1.0
    assert "load" not in found[other.name]


def test_load_is_counted_over_all_batches(program: Program) -> None:
    tiny.route(program, dynamic=True, top_k=3)
    held = batches(program)
    use = realised(program, [held[0].rows(0, 1), held[0].rows(1)])
    taken = {s.name: torch.zeros(4) for s in program.sites}
    program.run(
        *held[0].inputs,
        observe=lambda s, x: taken[s.name].add_(s.routed.chosen(x).flatten(0, 1).sum(0)),  # type: ignore[union-attr]
    )
    for site in program.sites:
        found = use.of(site)
        assert found["load"] == pytest.approx((taken[site.name] / 96).tolist())
        assert found["load_max"] == max(found["load"])
        assert found["experts_per_token"]["mean"] == pytest.approx(sum(found["load"]))
        assert 0 <= found["experts_per_token"]["p5"] <= found["experts_per_token"]["p95"] <= 3
        share = [v / sum(found["load"]) for v in found["load"]]
        even = -sum(v * math.log(v) for v in share if v) / math.log(4)
        assert found["balance"] == pytest.approx(even, rel=1e-4)


def test_entropy_says_how_sure_a_router_is(program: Program) -> None:
    site = program.sites[0]
    x = torch.randn(200, tiny.HIDDEN, generator=torch.Generator().manual_seed(0))

    def entropy(router: torch.Tensor) -> float:
        routed = replace(tiny.random_routed(site), router=router, router_bias=None)
        program.set_routed(site, routed)
        stats = RouterStats(program)
        stats.add(site, x)
        return float(stats.of(site.name)["entropy"])

    one = torch.zeros(4, tiny.HIDDEN)
    one[0] = 1.0
    noise = torch.randn(4, tiny.HIDDEN, generator=torch.Generator().manual_seed(1))
    assert 0 < entropy(one) < 1
    assert entropy(noise) == pytest.approx(entropy(noise * 1000), rel=1e-4)  # has no scale
    assert entropy(torch.ones(4, tiny.HIDDEN)) == pytest.approx(1.0)  # all alike


def test_margins(program: Program) -> None:
    routed = tiny.random_routed(program.sites[0], top_k=2)
    scores = torch.tensor([[4.0, 3.0, 1.0, 0.0], [5.0, -1.0, -2.0, -3.0]])
    assert margins(scores, routed).tolist() == [2.0, 1.0]
    scores = torch.tensor([[4.0, 3.0, 1.0, 0.5], [5.0, -1.0, -2.0, -3.0], [-1.0, -2.0, -3.0, -4.0]])
    dynamic = replace(routed, dynamic=True)
    # Cut off by top_k, cut off by the threshold, and none at all: its distance to the threshold.
    assert margins(scores, dynamic).tolist() == [2.0, 6.0, 1.0]
    every = replace(routed, top_k=4)
    assert len(margins(scores, every)) == 0
    assert margins(torch.full((1, 4), 2.5), replace(every, dynamic=True)).tolist() == [2.5]


def test_skips_by_position(program: Program) -> None:
    tiny.gate(program, "mean")
    held = batches(program)
    use = realised(program, held)
    found = use.positions(spans=6)
    assert found["width"] == 4
    assert set(found["blocks"]) == {b.name for b in program.gated}
    for block in program.gated:
        assert block.gate is not None
        spans = found["blocks"][block.name]
        assert len(spans) == 6
        assert spans[0] <= 0.5  # the first two of four positions always run
        late = 24 - block.gate.always
        assert sum(spans) * 4 == pytest.approx(use.skips()[block.name] * late)


def test_no_gates_have_no_positions(program: Program) -> None:
    assert realised(program, batches(program)).positions() == {}
