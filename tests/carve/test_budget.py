"""Budgets: widths that answer what is asked, and refusals that name what can be reached."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_models as tiny
import torch
import transformers as hf

from carve import budget as b
from carve.budget import (
    Request,
    Split,
    choose_split,
    least_budget,
    macs_of,
    make_request,
    splits_of,
)
from carve.capture import capture_transformers
from carve.engine_form import FOREIGN, FORMS
from carve.errors import UserError
from carve.program import Program

WIDE = 2048
BUDGETS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)


@pytest.fixture(scope="module")
def program() -> Program:
    """A Llama whose blocks are mostly FFN, as those of real ones are."""
    torch.manual_seed(0)
    sizes = {**tiny.GROUPED, "intermediate_size": WIDE}
    return capture_transformers(hf.LlamaForCausalLM(hf.LlamaConfig(**sizes)))


def plan_widths(program: Program, *asked: Any, **narrowed: Any) -> dict[str, Split]:
    request = make_request(program, *asked, **narrowed)
    return {k: v for k, v in b.plan_widths(program, request).items() if v is not None}


def realised(program: Program, splits: dict[str, Split]) -> float:
    """Counted from the weights that the widths lead to."""
    carved = program.copy()
    for site in carved.sites:
        s = splits[site.name]
        options = {"num_experts": s.num_experts, "expert_size": s.expert_size, "top_k": s.top_k}
        routed = tiny.random_routed(site, **options)
        assert routed.shared_size == s.shared_size
        carved.set_routed(site, routed)
    return carved.macs / carved.dense_macs


@pytest.mark.parametrize("asked", BUDGETS)
@pytest.mark.parametrize("target", FOREIGN)
def test_engines_get_equal_widths(asked: float, target: str, program: Program) -> None:
    splits = plan_widths(program, asked, None, 0.55, form=FORMS[target])
    (split,) = {*splits.values()}
    assert asked - 0.05 <= realised(program, splits) <= asked
    if FORMS[target].whole_shared:
        assert split.shared_size >= split.expert_size
        assert split.shared_size % split.expert_size == 0


@pytest.mark.parametrize("asked", BUDGETS)
def test_budget_is_kept_and_used(asked: float, program: Program) -> None:
    splits = plan_widths(program, asked, None, 0.55)
    assert set(splits) == {s.name for s in program.sites}
    got = realised(program, splits)
    assert asked - 0.03 <= got <= asked


@pytest.mark.parametrize("asked", BUDGETS)
def test_widths(asked: float, program: Program) -> None:
    for s in plan_widths(program, asked, None, 0.55).values():
        assert s.shared_size + s.num_experts * s.expert_size == WIDE
        assert s.shared_size % b.BLOCK == s.expert_size % b.BLOCK == 0
        assert s.expert_size > 0
        assert s.shared_size >= 0
        assert 1 <= s.top_k < s.num_experts


@pytest.mark.parametrize("asked", [0.25, 0.5, 0.75])
def test_active_share_is_pinned(asked: float, program: Program) -> None:
    for s in plan_widths(program, None, asked, 0.55).values():
        assert abs(s.active_size / WIDE - asked) <= 0.03


def test_narrowed_choice(program: Program) -> None:
    for s in plan_widths(program, 0.7, None, 0.55, num_experts=8, top_k=2).values():
        assert (s.num_experts, s.top_k) == (8, 2)


def test_shared_share_moves_neurons(program: Program) -> None:
    little = plan_widths(program, 0.6, None, 0.2)
    much = plan_widths(program, 0.6, None, 0.8)
    for name in little:
        assert little[name].shared_size < much[name].shared_size


@pytest.mark.parametrize("asked", [0.5, 0.6, 0.7])
def test_wide_ffns_have_finer_experts(asked: float, program: Program) -> None:
    """Eight a token, each about an eighth of what is routed."""
    for s in plan_widths(program, asked, None, 0.7).values():
        assert s.top_k == b.MANY
        assert s.expert_size <= 0.3 * s.active_size / b.MANY + b.BLOCK
        assert s.shared_size / s.active_size == pytest.approx(0.7, abs=0.15)


def test_unreachable_budget_names_the_least(program: Program) -> None:
    least = least_budget(program)
    assert program.attention_macs / program.dense_macs < least < 0.5
    with pytest.raises(UserError) as e:
        plan_widths(program, least - 0.01, None, 0.55)
    assert e.value.code == "budget"
    assert f"{least:.3f}" in e.value.message
    # What is named can be had.
    assert realised(program, plan_widths(program, least + 1e-6, None, 0.55)) <= least + 1e-6


def test_least_budget_is_the_least(program: Program) -> None:
    every = [
        program.attention_macs + sum(macs_of(s, o) for s in program.sites)
        for o in splits_of(program.sites[0], None, None)
    ]
    assert least_budget(program) == pytest.approx(min(every) / program.dense_macs)


@pytest.mark.parametrize("asked", [0.0, -0.5, 1.01, float("nan"), None])
def test_outside(asked: float | None, program: Program) -> None:
    with pytest.raises(UserError) as e:
        plan_widths(program, asked, None, 0.55)
    assert e.value.code == "budget"


def test_split_that_does_not_fit(program: Program) -> None:
    site = program.sites[0]
    with pytest.raises(UserError, match="no split fits") as e:
        choose_split(site, 0.01 * site.dense.macs, Request(0.0))
    assert e.value.code == "budget"
    least = min(macs_of(site, s) for s in splits_of(site, None, None))
    assert f"{least / site.dense.macs:.3f}" in e.value.message
    assert macs_of(site, choose_split(site, least, Request(0.0))) == least


def test_counts(program: Program) -> None:
    site = program.sites[0]
    split = Split(1024, 128, 8, 4)
    assert split.active_size == 1536
    options = {"num_experts": 8, "expert_size": 128, "top_k": 4}
    assert macs_of(site, split) == tiny.random_routed(site, **options).macs
