"""What training the grids of a quantized program promises."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from training_sample import Routed, Steps

from carve.arithmetic import Precision, as_emitted, grids_of, rounded
from carve.budget import Widths
from carve.calibration import Batch
from carve.dialect import linear_rule
from carve.end_to_end import divergence, in_order, in_parts
from carve.grid import Grid
from carve.passbase import ContractError, PassManager
from carve.passes import Quantize, QuantizeConfig, TuneGrids, TuneGridsConfig
from carve.passes.tune_grids import Grids
from carve.program import Program
from carve.quantizer import rest_of
from carve.retell import tokens_in
from carve.state import PassStates
from carve.state_folder import Course


@pytest.fixture(scope="module")
def routed(checkpoint: Path) -> Routed:
    return Routed(checkpoint)


def quantized(routed: Routed, *widths: int, rest: bool = False) -> Program:
    """The carved program at 4 bits, experts in turn at ``widths``."""
    program = routed.copy()
    each = {
        s.name: Widths(4, tuple((widths * 6)[: s.routed.num_experts]))
        for s in program.carved
        if s.routed is not None
    }
    context = {"bits": 4, "widths": each if widths else {}}
    routed.run(program, Quantize(QuantizeConfig(method="rtn", tokens=64, rest=rest)), **context)
    return program


@pytest.fixture(scope="module")
def four(routed: Routed) -> Program:
    return quantized(routed)


def tune(routed: Routed, program: Program, **settings: Any) -> dict[str, Any]:
    tuned = TuneGrids(
        TuneGridsConfig(**{"tokens": 20_000, "distinct": 0, "batch": 512, **settings})
    )
    (result,) = routed.run(program, tuned, dense=routed.dense, bits=4)
    return dict(result.metrics)


def loss(routed: Routed, program: Program, labels: float = 0.0) -> float:
    with as_emitted(program):
        return routed.judge.loss(program, None, labels)


def levels(program: Program) -> Iterator[torch.Tensor]:
    for linear in program.linears:
        assert linear.grid is not None
        yield linear.grid.levels(linear.weight)
    for site in program.carved:
        assert site.routed is not None
        for _, weight, grid in site.routed.on_grids():
            assert torch.equal(grid.round(weight).to(weight.dtype), weight)
            yield grid.levels(weight)


@pytest.mark.parametrize("widths", [(), (2, 4, 8)])
def test_the_loss_gets_lower_and_every_level_stays(widths: tuple[int, ...], routed: Routed) -> None:
    program = quantized(routed, *widths)
    before, was = loss(routed, program), list(levels(program))
    linears = [n.name for n in program.linears]
    metrics = tune(routed, program)
    assert metrics["kept"]
    assert metrics["before"] == pytest.approx(before)
    assert metrics["after"] == pytest.approx(loss(routed, program))
    assert metrics["after"] < 0.97 * before
    assert metrics["loss"][-1] < metrics["loss"][0]
    assert 0 < metrics["moved"] < 0.1
    assert 15_000 < metrics["tokens"] <= 20_000
    now = list(levels(program))
    assert len(now) == len(was) > 10
    assert all(torch.equal(a, b) for a, b in zip(was, now, strict=True))
    assert [n.name for n in program.linears] == linears
    assert not [n for n, _ in program.module.named_parameters() if "again" in n]
    assert metrics["scales"] == sum(g.scale.numel() for g in grids_of(program)) - sum(
        n.grid.scale.numel() for n in program.lookups if n.grid is not None
    )


def test_labels_weigh_in_training_and_in_its_judge(routed: Routed, four: Program) -> None:
    program = four.copy()
    metrics = tune(routed, program, labels=0.5)
    assert metrics["kept"]
    assert metrics["before"] == pytest.approx(loss(routed, four, 0.5))
    assert metrics["after"] == pytest.approx(loss(routed, program, 0.5))
    assert metrics["loss"] != tune(routed, four.copy())["loss"]


def test_levels_turn_that_lay_near_the_next_one(routed: Routed) -> None:
    program = quantized(routed, rest=True)
    rests = [g.rest for g in grids_of(program) if g.rest is not None]
    was = list(levels(program))
    assert len(rests) == len(was)
    before = loss(routed, program)
    metrics = tune(routed, program, level_rate=0.01)
    assert metrics["kept"]
    assert metrics["after"] == pytest.approx(loss(routed, program))
    assert metrics["after"] < 0.97 * before
    now = list(levels(program))
    turned = [(a != b) for a, b in zip(was, now, strict=True)]
    assert metrics["changed"] == pytest.approx(
        float(torch.cat([t.flatten() for t in turned]).float().mean())
    )
    assert metrics["changed"] > 0
    for rest, turn, old, new in zip(rests, turned, was, now, strict=True):
        # By one level, towards where the weight lay; what was in the middle stays.
        assert int((new.int() - old.int()).abs().max()) <= 1
        assert not bool(turn[rest.abs() < 60].any())
    assert all(g.rest is None for g in grids_of(program))


def test_what_is_not_trained_forgets_where_weights_lay(routed: Routed) -> None:
    program = quantized(routed, rest=True)
    was = list(levels(program))
    tune(routed, program, tokens=1)
    assert all(g.rest is None for g in grids_of(program))
    assert all(torch.equal(a, b) for a, b in zip(was, levels(program), strict=True))


@pytest.mark.parametrize("rest", [False, True])
def test_before_training_it_is_the_arithmetic_of_the_target(rest: bool, routed: Routed) -> None:
    program, inputs = quantized(routed, rest=rest), routed.batches[0].inputs
    with linear_rule(Precision(program, 8).rule()):
        want = program.run(*inputs)[0]
    with linear_rule(Grids(program).rule()):
        have = program.run(*inputs)[0]
    assert torch.equal(have, want)


@pytest.mark.parametrize("rest", [False, True])
def test_gradients_are_those_of_unrounded_activations_times_weights(rest: bool) -> None:
    torch.manual_seed(0)
    wanted, x = torch.randn(8, 64), torch.randn(5, 64, requires_grad=True)
    grid = Grid.nearest(wanted, 4)
    weight = grid.round(wanted)
    if rest:
        grid = replace(grid, rest=rest_of(wanted, weight, grid.scale))
    one = SimpleNamespace(linears=[SimpleNamespace(weight=weight, grid=grid)], carved=[])
    grids = Grids(one)  # type: ignore[arg-type]
    side = torch.randn(5, 8)
    (grids.rule()(x, weight) * side).sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, side @ weight, atol=1e-5)
    by_weight = side.T @ rounded(x.detach())
    (log,) = grids.logs
    assert log.grad is not None
    product = (by_weight * weight).unflatten(1, (2, 32)).sum(-1)
    assert torch.allclose(log.grad, product, atol=1e-4)
    for place in grids.places:
        # Where the weight lay, but for what one byte and the bound on it lose.
        lay = wanted / grid.scale.repeat_interleave(32, 1) + grid.zero
        assert float((place - lay.clamp(-0.5, 15.5)).detach().abs().max()) < 0.02
        assert torch.equal(place.detach().round(), grid.levels(weight).float())
        assert place.grad is not None
        assert torch.allclose(
            place.grad, by_weight * grid.scale.repeat_interleave(32, 1), atol=1e-4
        )
    assert len(grids.places) == rest


def test_the_last_level_moves_alike_at_every_width(routed: Routed) -> None:
    grids = Grids(quantized(routed, 2, 4, 8, rest=True))
    *scales, levels = grids.groups(0.004, 0.001)
    assert sorted(g["lr"] for g in scales) == [0.00025, 0.004, 0.016]
    assert levels["lr"] == 0.001
    trained = [p for g in scales for p in g["params"]]
    assert {id(p) for p in trained} == {id(p) for p in grids.logs}
    assert {id(p) for p in levels["params"]} == {id(p) for p in grids.places}
    assert len(grids.places) == len(grids.logs)


def test_what_makes_it_worse_is_not_taken(routed: Routed, four: Program) -> None:
    program = four.copy()
    before = dict(program.module.named_parameters())
    metrics = tune(routed, program, rate=0.5, tokens=5_000)
    assert not metrics["kept"]
    assert metrics["after"] > metrics["before"]
    after = dict(program.module.named_parameters())
    assert before.keys() == after.keys()
    assert all(after[n] is p for n, p in before.items())


def test_a_large_program_gets_fewer_tokens(routed: Routed, four: Program) -> None:
    config = TuneGridsConfig(tokens=1_000, work=8e6)
    assert config.tokens_for(1_000, 10_000) == 1_000
    assert config.tokens_for(10_000, 10_000) == 200
    assert config.tokens_for(1_000, 100) == 800
    assert [TuneGridsConfig.tokens_at(b) for b in (8, 4, 3)] == [131_072, 131_072, 393_216]
    metrics = tune(routed, four.copy(), work=4.0 * 512 * 7 * routed.dense.num_parameters)
    assert metrics["tokens"] == 0
    assert not metrics["kept"]


def test_short_text_is_gone_on_with(routed: Routed, four: Program) -> None:
    given = tokens_in(routed.batches)
    metrics = tune(routed, four.copy(), tokens=9_000, distinct=given + 1_000)
    assert metrics["told"] == 0  # that little more is not worth it
    metrics = tune(routed, four.copy(), tokens=9_000, distinct=given + 2_500)
    assert metrics["told"] == 2_500
    assert 8_500 < metrics["tokens"] <= 9_000
    large = TuneGridsConfig(work=4.0 * 2048 * 7 * routed.dense.num_parameters)
    assert large.told(routed.dense, given) == 0


def test_it_goes_on_where_it_was_killed(routed: Routed, four: Program, tmp_path: Path) -> None:
    def run(program: Program, folder: Path, steps: Steps) -> Any:
        config = TuneGridsConfig(tokens=8_000, batch=512, save_seconds=0.0)
        states = PassStates(folder, {}, [{"the pass": "tune_grids"}], Course(resume=True))
        context = routed.context(progress=steps, dense=routed.dense, bits=4)
        (result,) = PassManager([TuneGrids(config)], keeper=states)(program, context)
        return result.metrics

    whole, steps = four.copy(), Steps()
    want = run(whole, tmp_path / "whole", steps)
    with pytest.raises(KeyboardInterrupt):
        run(four.copy(), tmp_path / "killed", Steps(kill_at=7))
    resumed, rest = four.copy(), Steps()
    assert run(resumed, tmp_path / "killed", rest) == want
    assert rest.done <= steps.done - 6
    pairs = zip(grids_of(whole), grids_of(resumed), strict=True)
    assert all(torch.equal(a.scale, b.scale) for a, b in pairs)


def test_it_needs_grids_and_the_dense_program(routed: Routed, four: Program) -> None:
    p = TuneGrids(TuneGridsConfig())
    with pytest.raises(ContractError, match="grids"):
        p.requires(routed.program, routed.context(dense=routed.dense))
    with pytest.raises(ContractError, match="dense"):
        p.requires(four, routed.context())
    # Whoever runs the passes keeps it.
    context = routed.context(bits=4)
    program = four.copy()
    PassManager([TuneGrids(TuneGridsConfig(tokens=64))])(program, context)
    assert context.dense is not None
    assert context.dense is not program


def test_batches_come_in_a_new_order_each_time_round() -> None:
    rows = torch.arange(12)[:, None].repeat(1, 10)
    parts = in_parts([Batch((rows[:7],)), Batch((rows[7:],))], 30)
    assert [len(b.inputs[0]) for b in parts] == [3, 3, 1, 3, 2]
    plan = in_order(parts, 250, torch.Generator().manual_seed(0))
    assert 220 < sum(b.tokens for b in plan) <= 250
    seen = torch.cat([b.inputs[0][:, 0] for b in plan])
    first, second = seen[:12], seen[12:]
    assert sorted(first.tolist()) == list(range(12))
    assert not torch.equal(first[: len(second)], second)


def test_divergence_is_relative_for_encoders_and_kl_for_decoders() -> None:
    torch.manual_seed(0)
    want, have = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    p, q = want.softmax(-1), have.softmax(-1)
    batch = Batch((torch.zeros(2, 3),), torch.tensor([[True, True, False], [True, False, False]]))
    kl = (p * (p / q).log()).sum(-1).mean()
    assert torch.allclose(divergence("decoder", want, have, batch), kl, atol=1e-6)
    long, other = torch.randn(2, 300, 40), torch.randn(2, 300, 40, requires_grad=True)
    p, q = long.log_softmax(-1).flatten(0, 1), other.log_softmax(-1).flatten(0, 1)
    want_grad = torch.autograd.grad(F.kl_div(q, p, log_target=True, reduction="batchmean"), other)
    found = divergence("decoder", long, other, batch)
    assert torch.allclose(found, F.kl_div(q, p, log_target=True, reduction="batchmean"))
    assert torch.allclose(torch.autograd.grad(3 * found, other)[0], 3 * want_grad[0], atol=1e-7)
    text = Batch((torch.arange(600).view(2, 300) % 40,))
    found = divergence("decoder", long, other, text, labels=0.25)
    q = other.log_softmax(-1).flatten(0, 1)
    # The last token of a row has no next one.
    first = [t.view(2, 300, 40)[:, :-1] for t in (p, q)]
    next_ids = text.inputs[0][:, 1:, None]
    each = F.kl_div(q, p, log_target=True, reduction="none").sum(-1).view(2, 300)
    more = (first[0] - first[1]).gather(2, next_ids).squeeze(-1)
    mixed = torch.cat([0.75 * each[:, :-1] + 0.25 * more, each[:, -1:]], 1).mean()
    assert torch.allclose(found, mixed)
    want_grad = torch.autograd.grad(mixed, other)
    assert torch.allclose(torch.autograd.grad(found, other)[0], want_grad[0], atol=1e-7)
    counted = (have - want)[batch.mask].square().sum() / want[batch.mask].square().sum()
    assert torch.allclose(divergence("encoder", want, have, batch), counted)
