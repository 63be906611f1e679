"""What walking, refitting, distilling and finetuning promise, on a tiny model with real text."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tiny_models as tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from training_sample import SPLIT, Routed, Steps

from carve.calibration import (
    Batch,
    by_length,
    decoder_batches,
    hold_back,
)
from carve.dialect import select
from carve.end_to_end import divergence, quarters
from carve.evaluate import LanguageQuality
from carve.passbase import Pass, PassManager, need_routed, unless_worse
from carve.passes import (
    Distill,
    DistillConfig,
    Finetune,
    FinetuneConfig,
    Refit,
    RefitConfig,
)
from carve.program import Program
from carve.retell import tokens_in
from carve.sites import FFNSite
from carve.state import PassStates
from carve.state_folder import Course
from carve.statistics import refit_down, weights_of_size
from carve.tuning import Balance, MaskedFFN, calibrated, common_threshold, shuffled, threshold
from carve.walk import walk


@pytest.fixture(scope="module")
def routed(checkpoint: Path) -> Routed:
    return Routed(checkpoint)


def test_judged_text_is_held_back(routed: Routed) -> None:
    dense = routed.dense
    rows = torch.arange(19)[:, None].repeat(1, 10)
    batches = decoder_batches(dense, rows, 4)
    # Each batch shows the whole range, and none is lost.
    assert sorted(torch.cat([b.inputs[0][:, 0] for b in batches]).tolist()) == list(range(19))
    assert batches[0].inputs[0][-1, 0] > 10
    rest, judged = hold_back(batches, 30)
    found = [torch.cat([b.inputs[0][:, 0] for b in part]).tolist() for part in (rest, judged)]
    assert len(found[1]) == 3
    assert sorted(found[0] + found[1]) == list(range(19))
    assert all(len({len(t) for t in b.inputs}) == 1 for b in rest)
    rest, judged = hold_back(batches, 100)  # too little would be left
    assert len(rest) == len(batches)


@settings(deadline=None)
@given(st.lists(st.integers(1, 512), min_size=9, max_size=400), st.integers(1, 32))
def test_sentences_of_like_length_share_a_batch(lengths: list[int], size: int) -> None:
    groups = by_length(lengths, size)
    assert sorted(i for g in groups for i in g) == list(range(len(lengths)))
    sizes = {len(g) for g in groups}
    assert max(sizes) <= size
    assert max(sizes) - min(sizes) <= 1
    spans = sorted((min(lengths[i] for i in g), max(lengths[i] for i in g)) for g in groups)
    assert all(a[1] <= b[0] for a, b in pairwise(spans))


def test_the_first_batches_are_like_all_of_them() -> None:
    groups = by_length(list(range(4000)), 8)
    means = torch.tensor([float(sum(g)) / len(g) for g in groups])
    for count in (4, 10, 50):
        assert abs(float(means[:count].mean()) - 2000) < 600 / count**0.5
        assert float(means[:count].std()) > 900


# Dynamic k


@pytest.mark.parametrize("mean", [0.5, 1.7, 3.0])
def test_threshold_gives_the_asked_mean(mean: float) -> None:
    logits = torch.randn(500, 8, generator=torch.Generator().manual_seed(0))
    bar = threshold(logits, 6, mean)
    above = logits.topk(6, -1).values > bar
    assert float(above.sum(1).float().mean()) == pytest.approx(mean, abs=2e-3)


def test_dynamic_router_takes_the_mean_on_calibration_text(routed: Routed) -> None:
    context = routed.context()
    for site in routed.program.carved:
        assert site.routed is not None
        assert site.routed.dynamic
        count = site.routed.chosen(context.inputs.of(site)).sum(1).float()
        assert float(count.mean()) == pytest.approx(context.experts(site), rel=0.02)
        assert site.routed.mean_top_k == pytest.approx(float(count.mean()))
        assert float(count.std()) > 0.1
        assert count.max() <= site.routed.top_k <= SPLIT.num_experts
        moved = calibrated(site.routed, context.inputs.of(site), 1.0)
        assert moved.mean_top_k == pytest.approx(1.0, rel=0.02)
    assert routed.program.macs < routed.program.dense_macs


# Walking


def test_a_site_learns_to_lead_back_to_the_dense_stream(routed: Routed) -> None:
    program = routed.copy()
    seen: dict[str, list[Tensor]] = {}

    def keep(site: FFNSite, x: Tensor) -> None:
        seen.setdefault(site.name, []).append(x.reshape(-1, x.shape[-1]))

    for batch in routed.batches:
        program.run(*batch.inputs, observe=keep)
    for site, lesson in zip(program.carved, walk(program, routed.batches), strict=True):
        assert lesson.site is site
        torch.testing.assert_close(lesson.x, torch.cat(seen[site.name]), rtol=1e-3, atol=1e-4)
        if site is program.sites[0]:  # nothing went wrong before it
            torch.testing.assert_close(lesson.target, site.dense(lesson.x))
        else:
            assert (lesson.target - site.dense(lesson.x)).abs().max() > 1e-4


def test_walk_of_perfect_sites_ends_at_the_dense_program(routed: Routed) -> None:
    """Where each site gives its target, the streams are equal again after every site."""
    program = routed.copy()
    lessons = walk(program, routed.batches[:2])
    first = next(lessons)
    site = first.site
    assert site.routed is not None
    program.set_routed(site, site.routed.with_top_k(site.routed.num_experts))
    second = next(lessons)
    torch.testing.assert_close(second.target, second.site.dense(second.x), rtol=1e-3, atol=1e-4)


def test_walk_sees_what_was_rewritten(routed: Routed) -> None:
    program = routed.copy()
    for lesson in walk(program, routed.batches[:2]):
        site = lesson.site
        assert site.routed is not None
        program.set_routed(site, replace(site.routed, output_bias=torch.full((64,), 5.0)))
        last = lesson
    plain = list(walk(routed.copy(), routed.batches[:2]))[-1]
    assert (last.x - plain.x).abs().max() > 0.1


# The closed form


def test_refit_is_the_least_error(routed: Routed) -> None:
    site = routed.program.sites[0]
    assert site.routed is not None
    x = routed.inputs.of(site)
    target = site.dense(x)
    weight = weights_of_size(target)
    fit = refit_down(site.routed, x, target, weight, [1e-6])
    assert fit.strength == 1e-6
    assert fit.after < fit.before

    def error(scale: float) -> float:
        r = fit.routed
        noise = torch.randn(r.expert_down.shape, generator=torch.Generator().manual_seed(1))
        moved = replace(r, expert_down=r.expert_down + scale * noise)
        return float((weight[:, None] * (moved(x) - target).square()).sum())

    # A minimum: either way along any direction the error rises.
    assert error(0.0) < min(error(1e-2), error(-1e-2))


def test_a_wide_output_is_judged_by_a_projection_of_it(
    routed: Routed, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = routed.program.sites[0]
    assert site.routed is not None
    x = routed.inputs.of(site)
    target = site.dense(x)
    strengths = [1e-4, 1.0, 1e4]
    exact = refit_down(site.routed, x, target, torch.ones(len(x)), strengths)
    monkeypatch.setattr("carve.statistics._JUDGED_WIDTH", 24)  # of 64
    seen = refit_down(site.routed, x, target, torch.ones(len(x)), strengths)
    assert seen.strength == exact.strength
    torch.testing.assert_close(seen.routed.expert_down, exact.routed.expert_down)
    assert seen.before != exact.before
    assert seen.before == pytest.approx(exact.before, rel=0.25)
    assert seen.after == pytest.approx(exact.after, rel=0.25)


def test_refit_leaves_what_it_cannot_better() -> None:
    routed = tiny.random_routed(capture_plain().sites[0], compensation=False).with_top_k(4)
    x = torch.randn(300, 64, generator=torch.Generator().manual_seed(0))
    fit = refit_down(routed, x, routed(x), torch.ones(300), [1e-1, 1.0])
    assert fit.after <= fit.before < 1e-6  # of fp32 sums


def capture_plain() -> Program:
    from carve.capture import capture_module

    torch.manual_seed(0)
    return capture_module(tiny.build("plain"), (torch.randn(2, tiny.LENGTH, tiny.HIDDEN),))


# The form that trains


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("dynamic", [True, False])
def test_masked_form_is_the_routed_function(routed: Routed, dynamic: bool, rank: int) -> None:
    site = routed.program.sites[1]
    assert site.routed is not None
    r = site.routed if dynamic else site.routed.with_top_k(2)
    x = routed.inputs.of(site, 200)
    model = MaskedFFN(r, straight_through=True, rank=rank)
    torch.testing.assert_close(model(x).detach(), r(x), rtol=1e-4, atol=1e-5)
    back = model.export()
    for name, tensor in r.tensors().items():
        torch.testing.assert_close(back.tensors()[name], tensor)
    assert (back.dynamic, back.top_k) == (r.dynamic, r.top_k)
    model.groups(0.01, 0.01)
    model(x).square().sum().backward()
    moved = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert ("up" in moved) == (rank == 0)
    assert {"router", "output_bias", "expert_bias"} <= moved
    assert any(n.startswith("low_rank") for n in moved) == (rank > 0)


def test_router_stays_where_it_is_not_trained(routed: Routed) -> None:
    site = routed.program.sites[1]
    assert site.routed is not None
    model = MaskedFFN(site.routed)
    model.groups(0.01, 0.01)
    model(routed.inputs.of(site, 50)).sum().backward()
    assert model.router is not None
    assert model.router.grad is None


def test_shuffled_covers_everything_before_it_repeats() -> None:
    picks = list(shuffled(10, 5, 4, torch.Generator().manual_seed(0)))
    assert sorted(torch.cat(picks[:2]).tolist()) == list(range(10))
    assert sorted(torch.cat(picks[2:]).tolist()) == list(range(10))


# Passes


@pytest.mark.parametrize("what", ["refit", "distill"])
def test_layerwise_passes_lower_the_loss(what: str, routed: Routed) -> None:
    program = routed.copy()
    before = routed.judge.loss(program)
    make: dict[str, Pass[Any]] = {
        "refit": Refit(RefitConfig()),
        "distill": Distill(DistillConfig(steps=40)),
    }
    (result,) = routed.run(program, make[what])
    metrics = result.metrics
    assert metrics["kept"]
    assert routed.judge.loss(program) < before
    for site in program.carved:
        assert site.tuned
        assert metrics["error_after"][site.name] < metrics["error_before"][site.name]
        assert site.routed is not None
        assert site.routed.mean_top_k == pytest.approx(routed.context().experts(site), rel=0.05)


def test_what_makes_it_worse_is_undone(routed: Routed) -> None:
    program = routed.copy()
    weights = [s.routed for s in program.carved]

    def spoil() -> None:
        for site in program.carved:
            assert site.routed is not None
            program.set_routed(site, replace(site.routed, expert_down=-site.routed.expert_down))
            site.tuned = True

    assert not unless_worse(program, routed.context(), spoil)
    assert [s.routed for s in program.carved] == weights
    assert not any(s.tuned for s in program.carved)
    assert unless_worse(program, None, spoil)


def finetune(
    routed: Routed,
    program: Program,
    folder: Path,
    steps: Steps | None = None,
    tokens: int = 20_000,
) -> Any:
    config = FinetuneConfig(tokens=tokens, save_seconds=0.0, judge=False)
    parts = {"the pass": "finetune", "tokens": tokens}
    states = PassStates(folder, {}, [parts], Course(resume=True))
    context = routed.context(progress=steps or Steps())
    (result,) = PassManager([Finetune(config)], keeper=states)(program, context)
    return result.metrics


def test_finetune_lowers_the_loss(routed: Routed, tmp_path: Path) -> None:
    program = routed.copy()
    before = routed.judge.loss(program)
    metrics = finetune(routed, program, tmp_path)
    assert routed.judge.loss(program) < before
    assert metrics["loss"][-1] < metrics["loss"][0]
    assert 15_000 < metrics["tokens"] <= 20_000
    assert metrics["distinct"] == sum(b.inputs[0].numel() for b in routed.batches)


def test_finetune_leaves_a_program_that_gates_alone_made_cheaper(routed: Routed) -> None:
    program = routed.dense.copy()
    program.notes["carve"] = {}  # as `Carve` leaves it there
    (result,) = PassManager([Finetune(FinetuneConfig(batch=256))])(program, routed.context())
    assert result.metrics["tokens"] == 0
    assert not result.metrics["kept"]


def test_losses_are_told_by_quarters_of_the_steps() -> None:
    assert quarters([float(i) for i in range(11)]) == [0.5, 3.0, 6.0, 9.0]
    assert quarters([1.0, 2.0]) == [1.0, 2.0]
    assert quarters([]) == []


def test_finetune_with_labels_lowers_what_its_judge_weighs(routed: Routed) -> None:
    config = FinetuneConfig(tokens=20_000, labels=0.5)
    program, before = routed.copy(), routed.copy()
    (result,) = PassManager([Finetune(config)])(program, routed.context())
    assert result.metrics["kept"]
    quality = routed.judge(before)
    assert isinstance(quality, LanguageQuality)
    more = math.log(quality.perplexity / quality.dense_perplexity)
    loss = routed.judge.loss(before, None, 0.5)
    assert loss == pytest.approx((quality.kl + more) / 2)
    assert routed.judge.loss(program, None, 0.5) < loss


def test_text_that_comes_again_is_drawn_anew(
    routed: Routed, monkeypatch: pytest.MonkeyPatch
) -> None:
    lessons: list[Batch] = []
    loss = Finetune._loss

    def kept(self: Finetune, *args: Any) -> Tensor:
        if len(args) > 4:  # a step, not the look before the first
            lessons.append(args[3])
        return loss(self, *args)

    monkeypatch.setattr(Finetune, "_loss", kept)
    config = FinetuneConfig(tokens=20_000, batch=512, labels=0.5, judge=False, redrawn=0.25)
    text = tokens_in(routed.batches)
    assert 2 * text < 20_000
    context = routed.context()
    (result,) = PassManager([Finetune(config)])(routed.copy(), context)
    anew = [b for b in lessons if b.told]
    metrics = result.metrics
    assert tokens_in(anew) == metrics["redrawn"] == pytest.approx(5_000, abs=512)
    assert tokens_in(lessons) == metrics["tokens"] <= 20_000
    assert metrics["distinct"] == text
    once = len(lessons) * text // 20_000 - 1
    assert not any(b.told for b in lessons[:once])
    rest = lessons[once:]
    halves = [
        sum(b.told for b in half) for half in (rest[: len(rest) // 2], rest[len(rest) // 2 :])
    ]
    assert min(halves) > 0


def test_padding_has_no_say_in_what_experts_cost(
    routed: Routed, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, hold = [], Balance.hold

    def counting(self: Balance, logits: list[Tensor], speed: float = 1.0) -> float:
        rows.append({len(x) for x in logits})
        return hold(self, logits, speed)

    monkeypatch.setattr(Balance, "hold", counting)
    context = routed.context()
    mask = torch.arange(64).expand(2, 64) < torch.tensor([[64], [10]])
    context.batches = [
        replace(b.rows(i, i + 2), mask=mask)
        for b in routed.batches
        for i in range(0, len(b.inputs[0]) - 1, 2)
    ]
    config = FinetuneConfig(tokens=8 * 74, batch=74, judge=False)
    PassManager([Finetune(config)])(routed.copy(), context)
    assert rows == [{74}] * 8 + [{tokens_in(context.batches)}]


def test_labels_of_told_text_teach_nothing(routed: Routed) -> None:
    batch = routed.batches[0]
    want, have = (torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    short = Batch((torch.randint(7, (2, 5)), *batch.inputs[1:]))
    told = replace(short, told=True)
    plain = divergence("decoder", want, have, short)
    assert divergence("decoder", want, have, told, 0.5) == plain
    assert divergence("decoder", want, have, short, 0.5) != plain
    assert told.rows(0, 1).told


def test_steps_are_smaller_where_little_is_lost(
    routed: Routed, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved, loss = [], Finetune._loss
    for lost in (0.0004, 0.04, 0.4):
        monkeypatch.setattr(Finetune, "_loss", _at_first(lost, loss))
        program = routed.copy()
        config = FinetuneConfig(tokens=8 * 512, batch=512, judge=False)
        PassManager([Finetune(config)])(program, routed.context())
        before, after = (
            need_routed(p.carved[0], "test").merged().down for p in (routed.copy(), program)
        )
        moved.append(float((after - before).norm()))
    assert moved[0] == pytest.approx(moved[1] / 10, rel=0.2)
    assert moved[1] == moved[2]


def _at_first(lost: float, loss: Any) -> Any:
    """What stands for `Finetune._loss`: ``lost`` where nothing is to be learnt."""

    def call(self: Finetune, *args: Any) -> Tensor:
        found: Tensor = loss(self, *args)
        return found if torch.is_grad_enabled() else torch.tensor(lost)

    return call


def test_sites_trade_experts_and_the_cost_of_all_stays(routed: Routed, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(500, 6, generator=generator), torch.randn(500, 4, generator=generator)]
    shift = common_threshold(logits, [3, 4], [2.0, 5.0], 9.0)
    used = [
        select(x - shift, k, True).sum(1).float().mean()
        for x, k in zip(logits, [3, 4], strict=True)
    ]
    assert float(2 * used[0] + 5 * used[1]) == pytest.approx(9.0, abs=0.02)
    # More than there is takes all that may be taken, nothing takes none.
    assert (logits[1] > common_threshold(logits, [3, 4], [2.0, 5.0], 99.0)).all()
    assert not (logits[1] > common_threshold(logits, [3, 4], [2.0, 5.0], 0.0)).any()

    program = routed.copy()
    models = {s.name: MaskedFFN(s.routed) for s in program.carved if s.routed is not None}
    assert all(m.source.dynamic for m in models.values())
    first = next(iter(models.values()))
    assert first.router_bias is not None
    first.router_bias.data += 1.0
    balance = Balance(models, dict.fromkeys(models, 1.5))
    for m in models.values():
        m.mask(torch.randn(400, m.source.router.shape[1], generator=generator))
    scores = balance.last()
    shift = balance.hold(scores)
    counts = [
        select(x - shift, m.source.top_k, True) for x, m in zip(scores, balance.models, strict=True)
    ]
    means = [float(c.sum(1).float().mean()) for c in counts]
    assert sum(means) == pytest.approx(1.5 * len(models), rel=0.02)
    # What one site's loss is worth, the others give.
    assert means[0] > max(means[1:])


def test_finetune_keeps_what_was_planned(routed: Routed, tmp_path: Path) -> None:
    program, context = routed.copy(), routed.context()
    finetune(routed, program, tmp_path)
    asked = sum(context.experts(s) for s in program.carved)
    told = sum(s.routed.mean_top_k or 0.0 for s in program.carved if s.routed is not None)
    assert told == pytest.approx(asked, rel=0.03)
    seen: dict[str, float] = {}
    for batch in context.batches:

        def note(site: FFNSite, x: torch.Tensor) -> None:
            assert site.routed is not None
            taken = site.routed.chosen(x.flatten(0, -2)).sum(1).float().mean()
            seen[site.name] = seen.get(site.name, 0.0) + float(taken) / len(context.batches)

        program.run(*batch.inputs, observe=note)
    assert sum(seen.values()) == pytest.approx(asked, rel=0.03)


def test_finetune_goes_on_where_it_was_killed(routed: Routed, tmp_path: Path) -> None:
    whole, steps = routed.copy(), Steps()
    want = finetune(routed, whole, tmp_path / "whole", steps)
    with pytest.raises(KeyboardInterrupt):
        finetune(routed, routed.copy(), tmp_path, Steps(kill_at=7))
    resumed, rest = routed.copy(), Steps()
    assert finetune(routed, resumed, tmp_path, rest) == want
    assert rest.done <= steps.done - 6
    for a, b in zip(whole.carved, resumed.carved, strict=True):
        assert a.routed is not None
        assert b.routed is not None
        for name, tensor in a.routed.tensors().items():
            assert torch.equal(b.routed.tensors()[name], tensor)


@pytest.mark.parametrize("how", ["other settings", "damaged", "missing"])
def test_training_state_that_is_not_used(how: str, routed: Routed, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        finetune(routed, routed.copy(), tmp_path, Steps(kill_at=5))
    for file in (tmp_path / "objects").iterdir():
        if how == "damaged":
            data = bytearray(file.read_bytes())
            data[-1] ^= 1
            file.write_bytes(data)
        elif how == "missing":
            file.unlink()
    steps = Steps()
    finetune(routed, routed.copy(), tmp_path, steps, 10_000 if how == "other settings" else 20_000)
    whole = Steps()
    other = tmp_path / "fresh"
    finetune(routed, routed.copy(), other, whole, 10_000 if how == "other settings" else 20_000)
    assert steps.done == whole.done
