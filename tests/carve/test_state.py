"""States between and within passes: what goes on is what an undisturbed run would have been."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import carve.passes.quantize
from carve import store as store_module
from carve.budget import Request, Split
from carve.calibration import DATA, SiteInputs, hold_back, load_tokenizer, text_batches
from carve.capture import capture_checkpoint
from carve.codec import encode
from carve.config import ConvertConfig
from carve.errors import UserError
from carve.evaluate import Evaluator
from carve.fingerprint import difference, of_input, of_pass
from carve.passbase import Context, ContractError, Pass, PassManager
from carve.passes import (
    Carve,
    CarveConfig,
    Distill,
    DistillConfig,
    GateConfig,
    Profile,
    ProfileConfig,
    Quantize,
    QuantizeConfig,
    Refit,
    RefitConfig,
    RouteRidge,
    RouteRidgeConfig,
    SkipGates,
    Smooth,
    SmoothConfig,
)
from carve.program import Program
from carve.state import PassStates
from carve.state_folder import Course
from carve.store import StateError, Store, Stored, read_index, write_index

SPLIT = Split(shared_size=64, expert_size=32, num_experts=6, top_k=2)


class Killed(BaseException):
    """Nothing may catch it, as nothing catches SIGKILL."""


class Events:
    """Counts what happens, and kills the run before the event of a number."""

    def __init__(self, kill_at: int = -1) -> None:
        self.kill_at, self.labels = kill_at, list[str]()

    def happen(self, label: str) -> None:
        if len(self.labels) == self.kill_at:
            raise Killed(label)
        self.labels.append(label)

    def __call__(self, items: Sequence[Any], label: str) -> Iterator[Any]:
        for item in items:
            self.happen(label)
            yield item


class Bench:
    """A tiny program with passes of every kind, to be run again and again."""

    def __init__(self, folder: Path) -> None:
        self.dense = capture_checkpoint(folder)
        text = (DATA / "calibration.txt").read_text(encoding="utf-8")[:60_000]
        batches = text_batches(self.dense, load_tokenizer(folder), text, 64, 1_200)
        self.batches, judged = hold_back(batches, 256)
        self.judge = Evaluator(self.dense, judged)
        self.inputs = SiteInputs.collect(self.dense, self.batches)
        self.config = ConvertConfig(budget=0.7)
        self.input = {"the model": "tiny"}

    @property
    def passes(self) -> list[Pass[Any]]:
        return [
            Profile(ProfileConfig()),
            Carve(CarveConfig(tokens=256)),
            RouteRidge(RouteRidgeConfig()),
            Refit(RefitConfig()),
            Distill(DistillConfig(steps=4, judge=False)),
            SkipGates(GateConfig()),
            Smooth(SmoothConfig(alphas=(0.5,), forced=True)),
            Quantize(QuantizeConfig()),
        ]

    def run(
        self,
        folder: Path,
        course: Course | None = None,
        events: Events | None = None,
        passes: Sequence[Pass[Any]] | None = None,
    ) -> tuple[Program, list[str]]:
        """Run with states in ``folder``; the program, and the labels of the work it took."""
        program = self.dense.copy()
        splits: dict[str, Split | None] = {s.name: SPLIT for s in program.sites}
        events = events or Events()
        context = Context(
            self.batches,
            self.inputs,
            Request(0.0),
            splits,
            progress=events,
            judge=self.judge.loss,
            skips={program.attention[0].name: 0.3, program.sites[0].name: 0.3},
            bits=4,
        )
        course = course or Course(resume=True)
        chosen = list(passes or self.passes)
        parts = [of_pass(p, self.config) for p in chosen]
        states = PassStates(folder, self.input, parts, course)
        PassManager(chosen, keeper=states)(program, context, course.until)
        return program, events.labels


@dataclass
class Whole:
    bench: Bench
    folder: Path
    labels: list[str]
    parts: dict[str, Any]
    logits: torch.Tensor


@pytest.fixture(scope="module")
def whole(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """An undisturbed run, its states kept."""
    bench = Bench(checkpoint)
    folder = tmp_path_factory.mktemp("states")
    program, labels = bench.run(folder)
    logits = program.run(*bench.batches[0].inputs)[0]
    return Whole(bench, folder, labels, contents(folder), logits)


def contents(folder: Path) -> dict[str, Any]:
    """Every number and the hash of every tensor of the last state."""
    store = Store(folder / "objects")

    def hashed(tensor: torch.Tensor) -> str:
        raw = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return hashlib.sha256(f"{tensor.dtype} {tensor.shape}".encode() + raw).hexdigest()

    parts = read_index(folder / "07-quantize.json")["parts"]
    assert len(parts) > 8
    return {
        key: encode(store.get(Stored(file, tuple(needs))), hashed)
        for key, (file, *needs) in parts.items()
        if key != "records"  # they hold seconds
    }


# Going on


@pytest.mark.parametrize("kill_at", [10, 16])
def test_killed_anywhere_it_comes_to_the_same(kill_at: int, whole: Whole, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        whole.bench.run(tmp_path, events=Events(kill_at))
    program, labels = whole.bench.run(tmp_path)
    assert contents(tmp_path) == whole.parts
    assert torch.equal(program.run(*whole.bench.batches[0].inputs)[0], whole.logits)
    finished = set(whole.labels[:kill_at]) - {whole.labels[kill_at]}
    assert finished
    assert not finished & set(labels)


def test_killed_at_every_few_writes(
    whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of a write, and between a file's end and its name."""
    write, left, runs = store_module.write_file, 0, 0

    def short(path: Path, data: bytes) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            path.with_name(f"{path.name}.part").write_bytes(data[: len(data) // (1 + runs % 2)])
            raise Killed(path.name)
        write(path, data)

    monkeypatch.setattr(store_module, "write_file", short)
    program = None
    while program is None and runs < 15:
        runs, left = runs + 1, 16
        with suppress(Killed):
            program, _ = whole.bench.run(tmp_path)
    assert 3 < runs < 15
    assert program is not None
    assert contents(tmp_path) == whole.parts
    assert torch.equal(program.run(*whole.bench.batches[0].inputs)[0], whole.logits)
    assert not [p for p in tmp_path.rglob("*") if p.suffix == ".part"]


def test_layers_that_are_done_are_not_done_again(
    whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    last = max(i for i, label in enumerate(whole.labels) if label == "quantize")
    with pytest.raises(Killed):
        whole.bench.run(tmp_path, events=Events(last))
    rounded = []
    solve = carve.passes.quantize.round_linear

    def counted(*args: Any, **options: Any) -> Any:
        rounded.append(args[0].unit.name)
        return solve(*args, **options)

    monkeypatch.setattr(carve.passes.quantize, "round_linear", counted)
    whole.bench.run(tmp_path)
    assert rounded == ["lm_head"]
    assert contents(tmp_path) == whole.parts


def test_until_and_from(whole: Whole, tmp_path: Path) -> None:
    _, labels = whole.bench.run(tmp_path, Course(until="distill"))
    assert labels[-1] == "distill"
    _, labels = whole.bench.run(tmp_path)
    assert labels[0] == "gate"
    _, labels = whole.bench.run(tmp_path, Course(start="quantize"))
    assert set(labels) == {"quantize"}
    assert contents(tmp_path) == whole.parts
    _, labels = whole.bench.run(tmp_path, Course(resume=True))
    assert labels == []


# What is not used again


def copied(whole: Whole, folder: Path) -> Path:
    return Path(shutil.copytree(whole.folder, folder / "copy"))


def test_other_settings_redo_what_hears_them(whole: Whole, tmp_path: Path) -> None:
    folder = copied(whole, tmp_path)
    passes = whole.bench.passes
    passes[4] = Distill(DistillConfig(steps=5, judge=False))
    with pytest.raises(UserError, match=r"after gate .* distill\.steps differs \(5, was 4\)"):
        whole.bench.run(folder, Course(start="smooth"), passes=passes)
    before = sorted(p.name for p in folder.glob("*.json"))
    assert len(before) == len(passes)  # a refusal destroys nothing
    _, labels = whole.bench.run(folder, passes=passes)
    assert labels[0] == "distill"


def test_what_a_fingerprint_covers(whole: Whole, monkeypatch: pytest.MonkeyPatch) -> None:
    b = whole.bench
    held, counts = b.judge.batches, {"final": 256}

    def now(
        program: Program = b.dense, config: ConvertConfig = b.config, batches: Any = b.batches
    ) -> Any:
        parts = of_input(program, config, None, batches, held, counts)
        return json.loads(json.dumps(parts))

    was = now()
    assert difference(now(), was) is None
    other = b.dense.copy()
    (linear, *_) = other.linears
    other.set_linear(linear, linear.weight * 1.0001, None, None)
    assert difference(now(program=other), was) == "the model differs"
    assert "text" in str(difference(now(batches=b.batches[:1]), was))
    changed = ConvertConfig(budget=0.7, seed=3)
    assert difference(now(config=changed), was) == "the setting seed differs (3, was 0)"
    # Bits matter to the passes that round only.
    assert difference(now(config=ConvertConfig(budget=0.7, bits=8)), was) is None
    wide = ConvertConfig(budget=0.7, bits=8)
    for p in b.passes:
        same = difference(of_pass(p, wide), of_pass(p, b.config)) is None
        assert same == (p.name not in ("smooth", "quantize"))
    monkeypatch.setattr("carve.fingerprint.version", lambda name: "0.0")
    assert "the version of torch differs" in str(difference(now(), was))
    monkeypatch.undo()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    assert difference(now(), was) == "the number of threads differs"
    monkeypatch.undo()
    monkeypatch.setattr("carve.fingerprint.of_code", lambda: "other")
    assert difference(now(), was) == "the code of carve differs"


def test_code_is_hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from carve import fingerprint

    root = tmp_path / "carve"
    (root / "passes").mkdir(parents=True)
    (root / "a.py").write_text("x = 1\n")
    monkeypatch.setattr(fingerprint, "__file__", str(root / "fingerprint.py"))
    hashed = fingerprint.of_code.__wrapped__
    first = hashed()
    (root / "passes" / "p.py").write_text("of its own\n")
    assert hashed() == first
    (root / "a.py").write_text("x = 2\n")
    assert hashed() != first


def damage(folder: Path, how: str) -> None:
    """Damage the state after quantizing alone: files that states before it share stay."""
    index = folder / "07-quantize.json"
    before: set[str] = set()
    for other in folder.glob("*.json"):
        if other != index:
            before |= {n for v in read_index(other)["parts"].values() for n in v}
    body = read_index(index)
    own = sorted({n for v in body["parts"].values() for n in v} - before)
    file = folder / "objects" / f"{own[0]}.safetensors"
    if how == "changed byte":
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    elif how == "truncated":
        file.write_bytes(file.read_bytes()[:-1])
    elif how == "missing":
        file.unlink()
    elif how == "link":
        file.rename(folder / "elsewhere")
        file.symlink_to(folder / "elsewhere")
    elif how == "index byte":
        index.write_bytes(index.read_bytes().replace(b'"owned"', b'"owner"'))
    elif how == "index truncated":
        index.write_bytes(index.read_bytes()[:-20])
    elif how == "path":
        body["parts"]["owned"] = ["../../../etc/passwd"]
        write_index(index, body)
    elif how == "part missing":
        del body["parts"]["owned"]
        write_index(index, body)
    elif how == "other site":
        body["parts"]["site nowhere"] = body["parts"].pop("site model.layers.0.mlp")
        write_index(index, body)
    elif how == "not listed":
        body["parts"]["owned"] = body["parts"]["owned"][:2]
        write_index(index, body)


HOWS = (
    "changed byte",
    "truncated",
    "missing",
    "link",
    "index byte",
    "index truncated",
    "path",
    "part missing",
    "other site",
)


@pytest.mark.parametrize("how", HOWS)
def test_a_damaged_state_is_redone_or_refused(
    how: str, whole: Whole, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = copied(whole, tmp_path)
    damage(folder, how)
    extra = [*whole.bench.passes, Refit(RefitConfig())]  # something to start from that state
    with pytest.raises(UserError, match="the state after quantize cannot be used"):
        whole.bench.run(folder, Course(start="refit"), passes=[*extra[:3], *extra[4:]])
    if how in ("changed byte", "part missing"):
        _, labels = whole.bench.run(folder)
        assert set(labels) == {"quantize"}
        assert "quantize and what follows it is redone" in caplog.text
        assert contents(folder) == whole.parts


def test_a_state_that_fails_within_a_pass_is_named(
    whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Refit, *given: object) -> None:
        raise StateError("it is gone")

    monkeypatch.setattr(Refit, "call", fail)
    with pytest.raises(StateError, match=r"pass refit \(after: .*it is gone") as found:
        whole.bench.run(tmp_path, passes=[*whole.bench.passes[:3], Refit(RefitConfig())])
    assert "refit" in found.value.message
    assert found.value.hint


def test_a_pass_that_breaks_its_contract_leaves_nothing(whole: Whole, tmp_path: Path) -> None:
    class Broken(Refit):
        def ensures(self, program: Program, context: Context) -> None:
            raise ContractError("contract", "broken")

    passes = [*whole.bench.passes[:3], Broken(RefitConfig())]
    with pytest.raises(ContractError):
        whole.bench.run(tmp_path, passes=passes)
    assert sorted(p.name for p in tmp_path.glob("*.json"))[-1] == "02-route_ridge.json"
    _, labels = whole.bench.run(tmp_path, Course(resume=True, until="route_ridge"), passes=passes)
    assert labels == []
