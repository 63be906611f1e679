"""Skip gates: closed forms, the pass, the program with gates, and the budget that counts them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_models as tiny
import torch
from torch import Tensor

from carve.budget import cost_of, make_request, plan_skips, plan_widths
from carve.calibration import DATA, SiteInputs, hold_back, load_tokenizer, text_batches
from carve.capture import capture_checkpoint
from carve.errors import UserError
from carve.evaluate import Evaluator
from carve.gates import SkipLesson, fit_gate, reduced_rank, skip_error, skipped_error, with_rate
from carve.passbase import Context, PassManager
from carve.passes import (
    Allocate,
    AllocateConfig,
    Finetune,
    FinetuneConfig,
    GateConfig,
    PlaceGates,
    PlaceGatesConfig,
    Profile,
    ProfileConfig,
    SkipGates,
)
from carve.program import Program
from carve.realised import realised
from carve.sites import Gate
from carve.walk import walk_blocks

Get = Callable[[str], tiny.Captured]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Closed forms


def test_reduced_rank_regression() -> None:
    x, weight = noise(400, 24), torch.rand(400, generator=torch.Generator().manual_seed(3)) + 0.1
    low = noise(24, 3, seed=1) @ noise(3, 16, seed=2)
    y = x @ low + 2.0
    a, c, bias = reduced_rank(x, y, weight, 3, strength=1e-9)
    assert a.shape == (3, 24)
    assert c.shape == (16, 3)
    torch.testing.assert_close(x @ a.T @ c.T + bias, y, rtol=1e-3, atol=1e-3)

    y = y + noise(400, 16, seed=4)

    def error(rank: int) -> float:
        a, c, bias = reduced_rank(x, y, weight, rank, strength=1e-9)
        return float((weight[:, None] * (x @ a.T @ c.T + bias - y).square()).sum())

    errors = [error(r) for r in (1, 2, 3, 16)]
    assert errors == sorted(errors, reverse=True)
    root = weight.sqrt()[:, None]
    ones = torch.cat((x, torch.ones(400, 1)), 1)
    best = torch.linalg.lstsq(ones * root, y * root).solution
    least = float(((ones @ best - y) * root).square().sum())
    assert errors[-1] == pytest.approx(least, rel=1e-3)


@pytest.mark.parametrize("rate", [0.0, 0.25, 0.6, 1.0])
def test_the_threshold_skips_the_asked_share(rate: float) -> None:
    gate = Gate(noise(8), torch.zeros(1), None, None, None, None)
    x = noise(200, 8, seed=1)
    moved = with_rate(gate, x, rate)
    assert int((moved.scores(x) <= 0).sum()) == round(200 * rate)
    assert moved.skip == pytest.approx(rate)


def lesson_with_easy_tokens(share: float = 0.5) -> tuple[SkipLesson, Tensor]:
    """Tokens whose first feature is negative need a linear map only; the others much more."""
    x = noise(4000, 16)
    x[:, 0] = torch.where(
        torch.rand(4000, generator=torch.Generator().manual_seed(5)) < share, -1, 1
    )
    x[:, 0] += 0.1 * noise(4000, seed=6)
    easy = x[:, 0] < 0
    y = x @ noise(16, 2, seed=1) @ noise(2, 16, seed=2)
    y = torch.where(easy[:, None], y, 5 * noise(4000, 16, seed=7))
    return SkipLesson(x, y, y, torch.ones(4000), torch.arange(4000) // 40), easy


def test_a_gate_skips_what_its_bridge_can_do() -> None:
    lesson, easy = lesson_with_easy_tokens()
    gate = fit_gate(lesson, 0.4, rank=2)
    skipped = gate.scores(lesson.x) <= 0
    assert float(skipped.float().mean()) == pytest.approx(0.4, abs=0.02)
    assert float(easy[skipped].float().mean()) > 0.99
    # The bridge is fitted on the skipped ones: on all tokens it would be far off.
    assert skipped_error(gate, lesson) < 1e-4
    assert gate.bridge_in is not None


def test_the_simplest_bridge_that_serves() -> None:
    lesson, easy = lesson_with_easy_tokens()
    small = torch.where(easy[:, None], torch.zeros(1), lesson.target)
    gate = fit_gate(replace(lesson, target=small, y=small), 0.4)
    assert gate.bridge_in is None
    assert gate.bridge_bias is None
    shifted = torch.where(easy[:, None], torch.full((1,), 3.0), lesson.target)
    gate = fit_gate(replace(lesson, target=shifted, y=shifted), 0.4)
    assert gate.bridge_in is None
    assert gate.bridge_bias is not None
    torch.testing.assert_close(gate.bridge_bias, torch.full((16,), 3.0), rtol=1e-2, atol=1e-2)
    for kind, present in (("identity", False), ("low_rank", True)):
        assert (fit_gate(lesson, 0.4, kind=kind).bridge_in is not None) == present


def test_what_skipping_costs_is_beside_what_the_block_misses() -> None:
    lesson, _ = lesson_with_easy_tokens()
    gate = Gate(noise(16), torch.zeros(1), None, None, None, None)
    torch.testing.assert_close(skip_error(gate, lesson), lesson.target.square().sum(1))
    none = replace(lesson, y=torch.zeros_like(lesson.y))  # the block writes nothing anyway
    assert float(skip_error(gate, none).abs().max()) == 0


# The program with gates


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "opt", "neox", "phi3"])
def test_open_gates_leave_the_program_as_it_is(name: str, captured: Get) -> None:
    c = captured(name)
    want = c.program.run(*c.inputs)
    program = tiny.gate(c.program, "low_rank", "identity", "mean", "adapter")
    assert len(program.gated) == len([b for b in program.blocks if b.gateable]) >= 2
    for a, b in zip(program.run(*c.inputs, gates=False), want, strict=True):
        torch.testing.assert_close(a, b)
    assert tiny.relative(program.run(*c.inputs)[0], want[0]) > 0.05
    for block in program.gated:
        assert block.gate is not None
        program.set_gate(block, replace(block.gate, bias=torch.full((1,), 1e9)))
    for a, b in zip(program.run(*c.inputs), want, strict=True):
        torch.testing.assert_close(a, b)
    for block in program.gated:
        program.set_gate(block, None)
    assert not program.gated
    assert not program.module.graph.find_nodes(
        op="call_function", target=torch.ops.carve.gated.default
    )
    torch.testing.assert_close(program.run(*c.inputs)[0], want[0])


def test_a_block_that_is_shut_writes_its_bridge_and_keeps_its_cache(captured: Get) -> None:
    c = captured("llama")
    program, first = c.program, c.program.attention[0]
    want = program.run(*c.inputs)
    gate = replace(tiny.random_gate(first, bridge="mean"), bias=torch.full((1,), -1e9))
    program.set_gate(first, replace(gate, bridge_bias=torch.zeros(tiny.HIDDEN), always=0))
    got = program.run(*c.inputs)
    # The first layer's keys and values are those of the dense program, whoever is skipped.
    torch.testing.assert_close(got[1], want[1])
    torch.testing.assert_close(got[2], want[2])
    assert tiny.relative(got[0], want[0]) > 0.01


def test_the_first_tokens_always_run(captured: Get) -> None:
    c = captured("llama")
    program = c.program
    want = program.run(*c.inputs)[0]
    for block in program.blocks:
        gate = replace(tiny.random_gate(block), bias=torch.full((1,), -1e9), always=3)
        program.set_gate(block, gate)
    got = program.run(*c.inputs)[0]
    torch.testing.assert_close(got[:, :3], want[:, :3])
    assert tiny.relative(got[:, 3:], want[:, 3:]) > 0.05


def test_a_gated_site_can_still_be_carved(captured: Get) -> None:
    c = captured("llama")
    want = tiny.route(c.program.copy()).run(*c.inputs, gates=False)[0]
    program = tiny.route(tiny.gate(c.program, "low_rank"))
    torch.testing.assert_close(program.run(*c.inputs, gates=False)[0], want)
    site = program.sites[0]
    assert site.gate is not None
    assert site.gated_macs == round(site.macs * 0.5) + site.gate.macs
    assert program.macs < program.dense_macs


def test_gates_need_positions(captured: Get) -> None:
    program = captured("bert").program
    with pytest.raises(ValueError, match="positions"):
        program.set_gate(program.sites[0], tiny.random_gate(program.sites[0]))
    with pytest.raises(UserError, match="decoder"):
        plan_skips(program, 0.25)


# The pass


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six layers: two of them can be gated."""
    return tiny.save_checkpoint(tmp_path_factory.mktemp("deep") / "tiny-llama", layers=6)


class Setting:
    def __init__(self, folder: Path, rate: float, budget: float = 0.9) -> None:
        self.program = capture_checkpoint(folder)
        tokenizer = load_tokenizer(folder)
        text = (DATA / "calibration.txt").read_text(encoding="utf-8")[:90_000]
        batches = text_batches(self.program, tokenizer, text, 64, 16_000)
        rest, self.held = batches[::2], batches[1::2]
        rest, judged = hold_back(rest, 512)
        self.evaluator = Evaluator(self.program, self.held)
        skips = plan_skips(self.program, rate)
        request = make_request(self.program, budget, None)
        self.context = Context(
            rest,
            SiteInputs.collect(self.program, rest[:1]),
            request,
            plan_widths(self.program, request, skips),
            judge=Evaluator(self.program, judged).loss,
            skips=skips,
        )

    def run(self, **options: Any) -> dict[str, Any]:
        (result,) = PassManager([SkipGates(GateConfig(**options))])(self.program, self.context)
        return result.metrics


@pytest.fixture(scope="module")
def plain(deep: Path) -> Setting:
    """Gates by the defaults; tests leave them as they are."""
    setting = Setting(deep, 0.3)
    setting.run(rank=8)
    return setting


def test_which_blocks_are_gated(deep: Path) -> None:
    setting = Setting(deep, 0.25)
    names = [b.name for b in setting.program.blocks if b.name in setting.context.skips]
    assert names == [f"model.layers.{i}.{kind}" for i in (3, 4) for kind in ("self_attn", "mlp")]
    assert plan_skips(setting.program, 0.0) == {}


def test_gates_stand_where_they_cost_least(deep: Path) -> None:
    setting = Setting(deep, 0.25)
    program, context = setting.program, setting.context
    cheap = {f"model.layers.{i}.mlp" for i in range(3)}  # they save more than the deep half would

    def judge(p: Program, replaced: Any = None, /) -> float:
        return 0.1 if any(b.name in cheap for b in p.gated) else 0.3

    context.judge = judge
    planned = dict(context.skips)
    (result,) = PassManager([PlaceGates(PlaceGatesConfig(tokens=1000))])(program, context)
    found = result.metrics
    assert cheap == found["skips"].keys() == context.skips.keys()
    assert set(found["skips"].values()) == {0.25}
    assert found["predicted"] < found["predicted_deep"]
    assert len(found["sensitivity"]) == 10  # all but the last layer
    size = {b.name: b.skippable_macs for b in program.blocks}
    assert sum(size[n] for n in found["skips"]) >= sum(size[n] for n in planned)
    assert not program.gated


@pytest.mark.parametrize("rate", [0.25, 0.5])
def test_the_asked_rate_is_the_realised_one(deep: Path, rate: float) -> None:
    setting = Setting(deep, rate)
    found = setting.run(rank=8)
    assert found["asked"] == setting.context.skips
    shares = realised(setting.program, setting.held).skips()
    for name, share in shares.items():
        assert found["skipped"][name] == pytest.approx(rate, abs=0.005)
        assert share == pytest.approx(rate, abs=0.06)  # two or three points on more text
    assert sum(shares.values()) / len(shares) == pytest.approx(rate, abs=0.03)
    assert realised(setting.program, setting.held).share()["skip"] == pytest.approx(
        sum(shares.values()) / len(shares)
    )


def test_fitted_gates_lose_less_than_chance(deep: Path) -> None:
    setting = Setting(deep, 0.4)
    setting.run(rank=8)
    fitted = setting.evaluator.loss(setting.program)
    for i, block in enumerate(setting.program.gated):
        assert block.gate is not None
        chance = replace(block.gate, weight=noise(tiny.HIDDEN, seed=i))
        setting.program.set_gate(block, chance)
    # The same rates by scores that know nothing.
    SkipGates(GateConfig()).calibrate(setting.program, setting.context)
    rates = realised(setting.program, setting.held).skips().values()
    assert sum(rates) / len(rates) == pytest.approx(0.4, abs=0.05)
    assert fitted < 0.8 * setting.evaluator.loss(setting.program)


@pytest.mark.parametrize(
    "options",
    [{"training": "straight_through", "steps": 4}, {"bridge": "adapter"}, {"label": "loss"}],
)
def test_options_keep_the_rate(deep: Path, plain: Setting, options: dict[str, Any]) -> None:
    other = Setting(deep, 0.3)
    found = other.run(rank=8, **options)
    assert all(share == pytest.approx(0.3, abs=0.01) for share in found["skipped"].values())
    pairs = zip(plain.program.gated, other.program.gated, strict=True)
    for mine, theirs in ((a.gate, b.gate) for a, b in pairs):
        assert mine is not None
        assert theirs is not None
        assert (theirs.bridge_gate is not None) == ("bridge" in options)
        if "bridge" not in options:
            assert not torch.equal(mine.weight, theirs.weight)
    assert other.evaluator.loss(other.program) < 2 * plain.evaluator.loss(plain.program)


def test_unknown_options_are_refused(deep: Path) -> None:
    setting = Setting(deep, 0.3)
    for options in ({"bridge": "rope"}, {"training": "magic"}, {"label": "a"}):
        with pytest.raises(UserError, match="is none of"):
            setting.run(**options)


def test_a_gate_learns_to_undo_the_ones_before(deep: Path) -> None:
    setting = Setting(deep, 0.5)
    program, batches = setting.program, setting.context.batches[:1]
    blocks = [b for b in program.blocks if b.name in setting.context.skips]
    walk = walk_blocks(program, batches, blocks, 2)
    block, lesson = next(walk)
    torch.testing.assert_close(lesson.target, lesson.y)
    rows, length = batches[0].inputs[0].shape
    assert len(lesson.x) == rows * (length - 2)
    shut = replace(tiny.random_gate(block, bridge="mean"), bias=torch.full((1,), -1e9))
    _, after = walk.send(shut)
    assert (after.target - after.y).abs().max() > 0.1
    plain = walk_blocks(program, batches, blocks, 2)
    next(plain)
    _, same = plain.send(None)
    torch.testing.assert_close(same.target, same.y)
    assert not torch.allclose(after.x, same.x)
    assert not program.gated  # the walk leaves the program alone


# The budget


def test_gates_make_room_for_wider_ffns(deep: Path) -> None:
    without, with_gates = Setting(deep, 0.0, 0.7), Setting(deep, 0.5, 0.7)

    def neurons(setting: Setting) -> int:
        sizes = [s.dense.intermediate_size for s in setting.program.sites]
        splits = setting.context.splits.values()
        return sum(n if s is None else s.active_size for n, s in zip(sizes, splits, strict=True))

    assert neurons(with_gates) > neurons(without)


@pytest.mark.parametrize("costly", ["model.layers.1.mlp", "model.layers.4.self_attn"])
def test_the_allocation_skips_what_costs_nothing(deep: Path, costly: str) -> None:
    setting = Setting(deep, 0.0, 0.65)
    context, program = setting.context, setting.program

    def judge(p: Program, replaced: Any = None, /) -> float:
        return 0.2 if replaced or any(b.name == costly for b in p.gated) else 0.0

    context.judge = judge
    config = AllocateConfig(skip=True, tokens=1000)
    result = PassManager([Profile(ProfileConfig()), Allocate(config)])(program, context)[-1]
    found = result.metrics
    assert not program.gated
    assert found["skips"] == context.skips
    assert costly not in found["skips"]
    assert found["skip_sensitivity"][costly] > 0
    last = {"model.layers.5.mlp", "model.layers.5.self_attn"}
    free = {b.name for b in program.blocks} - last - {costly}
    assert len(found["skips"].keys() & free) > len(free) // 2
    used = sum(
        cost_of(s, context.splits[s.name], context.request, context.skips.get(s.name, 0.0))
        for s in program.sites
    )
    room = sum(context.skips.get(a.name, 0.0) * a.query_macs for a in program.attention)
    assert used <= context.request.limit + room


def test_the_last_pass_is_taught_by_the_model_without_gates(deep: Path) -> None:
    setting = Setting(deep, 0.0)
    program, batch = setting.program, setting.held[0].rows(0, 2)
    dense: dict[str, Any] = {s.name: s.dense for s in program.sites}
    finetune, clean = Finetune(FinetuneConfig()), program.copy()
    assert float(finetune._loss(program, clean, dense, batch)) < 1e-3
    tiny.gate(program, "low_rank")
    assert float(finetune._loss(program, clean, dense, batch)) > 0.05
