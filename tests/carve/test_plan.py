"""What a plan says of a conversion before anything long starts.

How near it comes is a matter of measurement (``tools/plan_check.py``); here it is what a plan says,
what it refuses, and that every setting moves the forecast the way it moves the conversion.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_models as tiny
import torch
from command_line import QUICK, Captured, call, change_config, convert, folder_size, result
from torch import Tensor

from carve import room
from carve.budget import Split
from carve.calibration import Batch
from carve.config import ConvertConfig
from carve.dialect import linear_rule
from carve.errors import UserError
from carve.estimate import Room, room_of, seconds_of
from carve.lineup import passes_of
from carve.prepare import Prepared, prepare
from carve.rates import Rates, Work
from carve.report.plan import plan_text
from carve.room import resident, scene_of
from carve.state import size_of
from carve.state_folder import state_path
from carve.workload import COUNTED, Scene

RATES = Rates(3e-11, 1e-10, 2e-9, 3e-6, 1e-2, 1e-5, 1e-10, 1e-9, 1e-4, 1e-7, 5.0)
"""A machine that is always the same."""
KINDS = {
    "feasible": bool,
    "reasons": list,
    "parameters": int,
    "macs": int,
    "budget": float,
    "ffn_active": type(None),
    "tokens": dict,
    "steps": list,
    "passes": list,
    "seconds": float,
    "threads": int,
    "peak_memory": float,
    "memory_free": float,
    "output": float,
    "state": float,
    "disk": float,
    "disk_free": float,
}


@pytest.fixture
def fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Rates, "measure", classmethod(lambda cls, *args: RATES))


def planned(model: Path, output: Path, *more: str) -> int:
    argv = more if {"--budget", "--ffn-active"} & {*more} else ("--budget", "0.7", *more)
    return call("plan", model, "-o", output, "--json", *QUICK, *argv)


def test_answer(checkpoint: Path, out: Path, capsys: Captured) -> None:
    """Measured rates and all: the keys, and what they have to do with one another."""
    assert planned(checkpoint, out) == 0
    plan = result(capsys)
    assert {k: type(v) for k, v in plan.items()} == KINDS
    assert plan["feasible"] and not plan["reasons"]
    assert plan["budget"] == 0.7
    names = [s["name"] for s in plan["steps"]]
    assert names[0] == "load" and names[-1] == "emit onnx-cpu"
    assert [n for n in names if n in plan["passes"]] == plan["passes"]
    assert all(s["seconds"] > 0 for s in plan["steps"])
    assert all(s["does"] for s in plan["steps"] if s["name"] in plan["passes"])
    assert plan["seconds"] == pytest.approx(sum(s["seconds"] for s in plan["steps"]))
    assert plan["disk"] == plan["output"] + plan["state"]
    tokens = plan["tokens"]
    assert tokens["calibration"] - tokens["told"] == 31 * 64  # whole rows of what was asked
    assert tokens["calibration"] == tokens["distinct"] == 2 * 2000
    assert not out.exists() and not [*out.parent.iterdir()]
    shown = plan_text(plan)
    for word in (*names, "in all", "memory at the peak", "disk", "it fits"):
        assert word in shown


@pytest.mark.parametrize("target", ["hf", "tvm:x86_64"])
def test_sizes_are_those_of_the_artifact(
    checkpoint: Path, out: Path, capsys: Captured, target: str
) -> None:
    """Disk depends on no clock, so it can be compared here; `test_convert` does for ONNX."""
    request = ["--effort", "none", "--target", target]
    assert planned(checkpoint, out, *request) == 0
    plan = result(capsys)
    assert convert(checkpoint, out, "--budget", "0.7", "--keep-state", *request) == 0
    assert folder_size(out) == pytest.approx(plan["output"], rel=0.3)
    assert size_of(state_path(out)) == pytest.approx(plan["state"], rel=0.3)


@dataclass(frozen=True)
class Forecast:
    seconds: dict[str, float]
    room: Room

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """Of a model deep enough for gates."""
    source = tiny.save_checkpoint(tmp_path_factory.mktemp("deep") / "source", layers=4)
    return prepare(source, ConvertConfig(budget=0.7, tokens=2000, eval_tokens=500, length=64))


def forecast(given: Prepared, passes: dict[str, Any] | None = None, **settings: Any) -> Forecast:
    """Of a request, on the machine of `RATES`, with 10 MB in memory already."""
    share = {} if "ffn_active" in settings else {"budget": settings.pop("budget", 0.7)}
    config = ConvertConfig(**share, length=64, passes=passes or {}, **settings)
    lineup = passes_of(config)
    scene = scene_of(given.program, config, given.asked, given.batches, given.held)
    return Forecast(seconds_of(scene, config, lineup, RATES), room_of(scene, config, lineup, 1e7))


def rising(values: Sequence[float]) -> bool:
    return all(a < b for a, b in pairwise(values))


def test_effort(prepared: Prepared) -> None:
    enough = replace(prepared, batches=prepared.batches * 500)
    each = [forecast(enough, effort=e) for e in ("none", "layer", "full")]
    assert rising([f.total for f in each])
    assert each[0].room.state < each[1].room.state <= each[2].room.state
    assert not {"distill", "finetune"} & {*each[0].seconds}
    exact = forecast(prepared, effort="none", exact=True)
    assert "compensate" in exact.seconds and "refit" not in exact.seconds
    assert exact.room.state < each[0].room.state


def test_bits(prepared: Prepared) -> None:
    each = [forecast(prepared, bits=b) for b in (3, 4, 8, 16)]
    assert rising([f.room.output for f in each])
    plain = each[-1]
    assert "quantize" not in plain.seconds
    assert plain.total < each[1].total < each[0].total  # which measures what each width costs
    assert plain.room.state < each[1].room.state
    assert forecast(prepared, size="100KB").room.output < each[1].room.output


def test_targets(prepared: Prepared) -> None:
    one = forecast(prepared)
    two = forecast(prepared, targets=("onnx-cpu", "onnx-split"))
    assert two.total > one.total and two.room.output > 1.5 * one.room.output
    assert two.seconds["emit onnx-split"] > two.seconds["emit onnx-cpu"]
    alone = forecast(prepared, targets=("hf",))
    assert "quantize" not in alone.seconds  # engines quantize checkpoints themselves
    assert alone.room.output > one.room.output


def test_skip(prepared: Prepared) -> None:
    none, some, auto = (forecast(prepared, skip=s) for s in (0.0, 0.2, "auto"))
    assert some.total > none.total < auto.total
    assert {"place_gates", "gate"} <= {*some.seconds} - {*none.seconds}
    assert auto.seconds["allocate"] > none.seconds["allocate"]


def test_widths_and_text(prepared: Prepared) -> None:
    dense, pinned = forecast(prepared, budget=1.0), forecast(prepared, ffn_active=0.8)
    assert "carve" not in dense.seconds and dense.total < pinned.total
    assert dense.room.state < pinned.room.state
    usual = replace(prepared, asked=replace(prepared.asked, distinct=0))
    twice = replace(usual, batches=prepared.batches * 2, held=prepared.held * 2)
    longer, short = forecast(twice), forecast(usual)
    assert longer.room.memory > short.room.memory
    for step in ("calibration", "dense model", "refit", "quantize"):
        assert longer.seconds[step] > short.seconds[step], step
    told = forecast(prepared)  # the model tells as much again
    for step in ("calibration", "refit", "finetune"):
        assert told.seconds[step] > short.seconds[step], step


def test_settings_of_passes(prepared: Prepared) -> None:
    def step(name: str, **settings: Any) -> float:
        return forecast(prepared, {name: settings}).seconds[name]

    assert step("distill", steps=10) < step("distill", steps=100)
    assert step("carve", tokens=128) < step("carve", tokens=1024)
    assert step("quantize", method="rtn") < step("quantize", method="gptq") < step("quantize")
    assert step("quantize", sweeps=1) < step("quantize", sweeps=4)
    assert step("allocate", tokens=256) < step("allocate", tokens=1500)


def test_training_that_takes_too_long_is_left_out(prepared: Prepared) -> None:
    usual = forecast(prepared)
    none = forecast(prepared, {name: {"work": 1.0} for name in ("finetune", "tune_grids")})
    assert usual.seconds["finetune"] > 0 and usual.seconds["tune_grids"] > 0
    assert none.seconds["finetune"] == none.seconds["tune_grids"] == 0
    assert none.room.memory < usual.room.memory
    assert none.room.state < usual.room.state


def test_every_kind_of_work_costs(prepared: Prepared) -> None:
    kinds = [f.name for f in fields(Work)]
    assert kinds == [f.name for f in fields(Rates)]
    for kind in kinds:
        assert RATES.seconds(Work(**{kind: 1.0})) == getattr(RATES, kind) > 0
    config = ConvertConfig(budget=0.7, effort="full", skip=0.2, bits=3, length=64)
    scene = scene_of(prepared.program, config, prepared.asked, prepared.batches, prepared.held)
    lineup = passes_of(config)
    works = [COUNTED[p.name](scene, p) for p in lineup]
    assert all(min(getattr(w, k) for k in kinds if k != "products") >= 0 for w in works)
    assert all(RATES.seconds(w) > 0 for w in works)


def test_every_expert_is_called_for_itself(prepared: Prepared) -> None:
    """The products of a run are as many as are counted, where every expert has tokens."""
    program = tiny.route(prepared.program.copy())
    splits, products = {}, []
    for site in program.carved:
        r = site.routed
        assert r is not None
        program.set_routed(site, replace(r, router=0 * r.router, top_k=r.num_experts))
        splits[site.name] = Split(r.shared_size, r.expert_size, r.num_experts, r.num_experts)

    def rule(x: Tensor, weight: Tensor) -> Tensor:
        products.append(x.numel())
        return torch.nn.functional.linear(x, weight.float())

    batch = prepared.batches[0]
    rows, length = batch.inputs[0].shape
    with linear_rule(rule):
        program.run(*batch.inputs)
    scene = Scene(prepared.program, splits, prepared.asked, length, rows)
    assert scene.emulated(rows * length).steps == 20 * len(products)
    weights = sum(w.weight.numel() for w in program.linears)
    assert scene.emulated(rows * length).elements >= 8 * sum(products) + 4 * weights
    assert scene.routed(2 * rows * length).steps == 2 * scene.routed(rows * length).steps > 0


def test_measured_rates(prepared: Prepared) -> None:
    """By a clock that counts calls, so that no time is waited for; nothing of it is left behind."""
    now = iter(range(10**9))
    config = ConvertConfig(budget=0.7, length=64)
    scene = scene_of(prepared.program, config, prepared.asked, prepared.batches, prepared.held)
    before = [p.clone() for p in prepared.program.module.parameters()]
    rates = Rates.measure(
        scene, prepared.batches, ["distill", "quantize"], 5.0, lambda: float(next(now))
    )
    assert rates.traces == 5.0
    assert all(getattr(rates, f.name) >= 0 for f in fields(Rates))
    after = prepared.program.module.parameters()
    assert all(bool((a == b).all()) for a, b in zip(before, after, strict=True))
    untrained = Rates.measure(scene, prepared.batches, ["profile"], 5.0, lambda: float(next(now)))
    assert untrained.training == untrained.rounding == 0


def test_the_program_is_timed_on_a_usual_batch(prepared: Prepared) -> None:
    """The first of an encoder may be of short sentences, where calls outweigh products."""
    config = ConvertConfig(budget=0.7, length=64)
    scene = scene_of(prepared.program, config, prepared.asked, prepared.batches, prepared.held)
    whole = prepared.batches[0]
    small = Batch((*(t[:, :4] for t in whole.inputs[:2]), *whole.inputs[2:]))
    ran = []
    program = prepared.program.copy()
    run = program.run
    program.run = lambda *inputs: (ran.append(inputs[0].shape), run(*inputs))[1]  # type: ignore
    scene = replace(scene, program=program)
    Rates.measure(scene, [small, whole, small], ["profile"], 5.0)
    assert max(shape[1] for shape in ran) == scene.length


# What does not fit, and what is refused


def test_too_little_room(
    checkpoint: Path, out: Path, capsys: Captured, fixed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan names all that is too little and is no error; a conversion would not begin."""
    usage = SimpleNamespace(total=10**9, used=10**9 - 1000, free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(room, "memory_free", lambda: 1e6)
    assert planned(checkpoint, out) == 0
    plan = result(capsys)
    assert plan["feasible"] is False
    memory, disk = plan["reasons"]
    assert "of memory are needed" in memory and "MB are needed beside" in disk
    sizes = Room(*(plan[k] for k in ("peak_memory", "output", "state")))
    with pytest.raises(UserError) as e:
        room.check_room(sizes, out)
    assert e.value.code == "memory"
    assert memory in e.value.message and disk in e.value.message
    monkeypatch.setattr(room, "memory_free", lambda: 1e15)
    with pytest.raises(UserError) as e:
        room.check_room(sizes, out)
    assert (e.value.code, e.value.message) == ("disk", disk)
    room.check_room(sizes, out, stored=plan["disk"])  # it is there already


def test_memory_that_a_group_of_processes_may_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is free counts what this process has, and stops at the control group's limit."""
    assert room.memory_free() > resident() > 1e7
    limit = tmp_path / "memory.max"
    real = Path.is_file

    def redirected(self: Path) -> bool:
        return limit.is_file() if str(self) == "/sys/fs/cgroup/memory.max" else real(self)

    read = Path.read_text
    monkeypatch.setattr(Path, "is_file", redirected)
    monkeypatch.setattr(
        Path,
        "read_text",
        lambda self, *a, **k: read(
            limit if str(self) == "/sys/fs/cgroup/memory.max" else self, *a, **k
        ),
    )
    for text, most in (("1000000\n", 1e6), ("max\n", float("inf"))):
        limit.write_text(text)
        assert room.memory_free() <= most
    assert room.memory_free() > 1e7


@pytest.mark.parametrize(
    "argv, code, word",
    [
        (("--budget", "0.3"), "budget", "the least is 0.606"),
        (("--budget", "2"), "budget", "outside (0, 1]"),
        (("--budget", "0.7", "--target", "hf-granit"), "target", "'hf-granite'"),
        (("--budget", "0.7", "--bits", "1"), "bits", "--bits 1"),
        (("--budget", "0.7", "--set", "quantize.sweps=1"), "recipe", "'sweeps'"),
        (("--budget", "0.7", "--calibration", "/dev/zero"), "text", "not a regular file"),
        (("--budget", "0.7", "--devices", "/nowhere/d.toml"), "devices", "/nowhere/d.toml"),
    ],
)
def test_refused_as_the_conversion_would(
    argv: tuple[str, ...],
    code: str,
    word: str,
    checkpoint: Path,
    out: Path,
    capsys: Captured,
    fixed: None,
) -> None:
    assert call("plan", checkpoint, "-o", out, "--json", *argv) == 2
    printed = capsys.readouterr()
    error = json.loads(printed.out)["error"]
    assert error["code"] == code, error
    assert word in error["message"] + error["hint"]
    assert "Traceback" not in printed.err


def test_hostile_sources(damaged: Path, out: Path, capsys: Captured) -> None:
    """Nothing is planned for what could not be loaded: shapes, sizes and files are looked at."""
    for change in (
        lambda: change_config(damaged, num_hidden_layers=10**9),
        lambda: (damaged / "config.json").write_text("[" * 10_000),
        lambda: os.truncate(damaged / "model.safetensors", 1000),
        lambda: (damaged / "model.safetensors").unlink(),
    ):
        change()
        assert planned(damaged, out) == 2
        assert result(capsys)["error"]["code"]
    assert planned(damaged / "nowhere", out) == 2
    assert result(capsys)["error"]["code"] == "not-found"
