"""The integer programme and the pass that feeds it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from carve.allocate import Option, allocate
from carve.budget import cost_of, make_request, plan_widths
from carve.calibration import DATA, SiteInputs, hold_back, load_tokenizer, text_batches
from carve.capture import capture_checkpoint
from carve.engine_form import ANY, FORMS, GRANITE, HF, EngineForm
from carve.errors import UserError
from carve.evaluate import Evaluator
from carve.passbase import Context, PassManager
from carve.passes import Allocate, AllocateConfig, Profile, ProfileConfig
from carve.program import Program
from carve.sites import FFN
from carve.statistics import weights_of_size

# Whole costs: at the limit itself a solver's tolerance and a sum of floats may each go either way.
COST = st.integers(0, 20)
OPTION = st.tuples(st.floats(0.0, 1.0), COST, COST)
SITES = st.lists(st.lists(OPTION, min_size=1, max_size=4), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(SITES, st.integers(1, 60), st.integers(1, 60))
def test_the_choice_is_the_best_of_all(
    table: list[list[tuple[float, int, int]]], macs: int, size: int
) -> None:
    options = {
        f"s{i}": [Option(loss, {"macs": m, "bytes": b}) for loss, m, b in each]
        for i, each in enumerate(table)
    }
    limits = {"macs": macs, "bytes": size}

    def fits(choice: tuple[Option, ...]) -> bool:
        return all(sum(o.cost[r] for o in choice) <= limits[r] for r in limits)

    possible = [c for c in itertools.product(*options.values()) if fits(c)]
    if not possible:
        with pytest.raises(Exception, match=r"least|not solved"):
            allocate(options, limits)
        return
    found = allocate(options, limits)
    best = min(sum(o.loss for o in c) for c in possible)
    assert found.loss == pytest.approx(best, abs=1e-5)
    assert found.bound == pytest.approx(best, abs=1e-4)
    assert fits(tuple(found.chosen.values()))


def test_what_cannot_be_reached_is_named() -> None:
    with pytest.raises(UserError, match="least macs"):
        allocate({"s": [Option(0.0, {"macs": 2.0})]}, {"macs": 1.0})


def test_nothing_on_standard_output(capfd: pytest.CaptureFixture[str]) -> None:
    allocate({"s": [Option(0.0, {"macs": 0.5})]}, {"macs": 1.0})
    assert capfd.readouterr().out == ""


# The pass


def setting(checkpoint: Path, share: float, form: EngineForm = ANY) -> tuple[Program, Context]:
    program = capture_checkpoint(checkpoint)
    text = (DATA / "calibration.txt").read_text(encoding="utf-8")[:40_000]
    batches = text_batches(program, load_tokenizer(checkpoint), text, 64, 4000)
    rest, judged = hold_back(batches, 512)
    request = make_request(program, None, share, form=form)
    context = Context(
        rest,
        SiteInputs.collect(program, rest),
        request,
        plan_widths(program, request),
        judge=Evaluator(program, judged).loss,
    )
    return program, context


def test_the_site_that_matters_gets_more(checkpoint: Path) -> None:
    program, context = setting(checkpoint, 0.8)  # room for one site to stay dense
    first = program.sites[0].name

    def judge(p: Program, replace: Mapping[str, FFN] | None = None, /) -> float:
        return 10.0 if first in (replace or {}) else 0.1

    context.judge = judge
    results = PassManager([Profile(ProfileConfig()), Allocate(AllocateConfig())])(program, context)
    found = results[-1].metrics
    others = [v for k, v in found["active"].items() if k != first]
    assert found["active"][first] > max(others)
    assert found["predicted"] < found["predicted_uniform"]
    used = sum(cost_of(s, context.splits[s.name], context.request) for s in program.sites)
    assert used <= context.request.limit * (1 + 1e-9)


@pytest.mark.parametrize(("target", "dense"), [(HF, 1), (GRANITE, 0)])
def test_equal_widths_with_the_first_site_dense_where_that_is_held(
    checkpoint: Path, target: str, dense: int
) -> None:
    program, context = setting(checkpoint, 0.8, FORMS[target])
    name = program.sites[0].name

    def judge(p: Program, replace: Mapping[str, FFN] | None = None, /) -> float:
        return 10.0 if name in (replace or {}) else 0.1

    context.judge = judge
    PassManager([Profile(ProfileConfig()), Allocate(AllocateConfig())])(program, context)
    splits = [context.splits[s.name] for s in program.sites]
    assert splits[:dense] == [None] * dense
    assert len({*splits[dense:]}) == 1
    assert splits[-1] is not None
    used = sum(cost_of(s, context.splits[s.name], context.request) for s in program.sites)
    assert used <= context.request.limit * (1 + 1e-9)


def test_uniform_keeps_the_plan(checkpoint: Path) -> None:
    program, context = setting(checkpoint, 0.6)
    before = dict(context.splits)
    passes = [Profile(ProfileConfig()), Allocate(AllocateConfig(policy="uniform"))]
    found = PassManager(passes)(program, context)[-1].metrics
    assert context.splits == before
    assert found["predicted"] == pytest.approx(found["predicted_uniform"])


def test_the_probe_is_the_best_linear_reconstruction(checkpoint: Path) -> None:
    program, context = setting(checkpoint, 0.6)
    PassManager([Profile(ProfileConfig())])(program, context)
    site = program.sites[0]
    config = AllocateConfig(probe=0.5)
    errors, probe = Allocate(config).measure(site, program, context)
    assert errors.shape == (site.dense.intermediate_size + 1,)
    assert float(errors[-1]) == 0
    assert bool((errors[1:] <= errors[:-1] * (1 + 1e-5)).all())
    x = context.inputs.of(site)
    square = (probe(x) - site.dense(x)).square().sum(1)
    weight = weights_of_size(site.dense(x))
    half = site.dense.intermediate_size // 2
    said = float((weight * square).sum() / weight.sum())
    assert float(errors[half]) == pytest.approx(said, rel=0.02)
    miss = (probe(x) - site.dense(x)).square().sum()
    kept = program.notes["profile"][site.name].energy.argsort(descending=True)
    plain = site.dense.hidden(x)
    plain[:, kept[len(kept) // 2 :]] = plain[:, kept[len(kept) // 2 :]].mean(0)
    pruned = plain @ site.dense.down.T
    assert float(miss) < 0.9 * float((pruned - site.dense(x)).square().sum())
    assert torch.isfinite(errors).all()
