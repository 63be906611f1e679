"""The split back end: segments and experts together are the whole model, and the program."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import carve_runtime
import numpy as np
import onnx
import pytest
import tiny_models as tiny
import torch
from carve_runtime.decoder import check_decoder
from carve_runtime.engine import Engine, value
from carve_runtime.experts import ExpertFile, LocalExperts, hottest_first
from carve_runtime.index import SplitIndex, read_index
from carve_runtime.split import SplitEngine, Trunk

from carve import cli, offload
from carve.calibration import Batch
from carve.emit.onnx import emit
from carve.emit.split import Predictor, emit_split
from carve.errors import CarveError, UserError
from carve.grid import Grid
from carve.parity import SPLIT, check_parity, feeds_of
from carve.program import Program

Get = Callable[[str], tiny.Captured]


def batches(program: Program, rows: int = 6, length: int = 40) -> list[Batch]:
    ids = tiny.token_ids(rows, length, seed=3)
    return [Batch(tiny.decoder_inputs(program, ids))]


def index_of(path: Path) -> SplitIndex:
    return read_index(path.parent.resolve(), {p.name for p in path.parent.iterdir()}, path.name)


def engine_of(path: Path) -> SplitEngine:
    index = index_of(path)
    experts = LocalExperts(ExpertFile(index), hottest_first(index))
    return SplitEngine(Trunk(index, 1), experts)


def prompts(program: Program) -> list[tuple[torch.Tensor, ...]]:
    ids = [tiny.token_ids(2, length, seed=i) for i, length in enumerate((9, 14))]
    return [tiny.decoder_inputs(program, i) for i in ids]


@dataclass
class Split:
    """A program, its whole model and its split form."""

    program: Program
    seen: offload.Watched
    predictors: dict[int, Predictor]
    path: Path
    whole: Path | None
    bits: int


def mix_widths(program: Program) -> None:
    """Experts of the last site at 4 and 8 bits in turn; what no pass was at has 8 then."""
    site = program.sites[-1]
    r = site.routed
    assert r is not None
    new, grids = {}, {}
    for name in ("expert_gate", "expert_up", "expert_down"):
        weight = getattr(r, name)
        grids[name] = [Grid.nearest(w, 8 if e % 2 else 4, 32) for e, w in enumerate(weight)]
        new[name] = torch.stack([g.round(w) for g, w in zip(grids[name], weight, strict=True)])
    program.set_routed(site, replace(r, **new, grids=grids))


@pytest.fixture(scope="module")
def split(captured: Get, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Split]:
    """Split forms, made once; tests leave them as they are."""
    kept: dict[tuple[str, int], Split] = {}

    def get(name: str, bits: int) -> Split:
        if (name, bits) not in kept:
            program = tiny.route(captured(name).program, top_k=3, dynamic=bits == 16)
            if bits == 4:
                mix_widths(program)
            folder = tmp_path_factory.mktemp("split")
            (folder / "split").mkdir()
            seen = offload.watch(program, batches(program))
            found = offload.fit_predictors(program, seen)
            heat = offload.hotness(seen)
            path = emit_split(program, folder / "split", bits, heat, found).path
            whole = None
            if name == "llama":
                whole = emit(program, folder / "model.onnx", bits).path
            kept[name, bits] = Split(program, seen, found, path, whole, bits)
        return kept[name, bits]

    return get


@pytest.mark.parametrize("name, bits", [("llama", 4), ("llama", 16), ("gpt2", 16)])
def test_split_is_the_program_and_the_whole_model(
    name: str, bits: int, split: Callable[[str, int], Split]
) -> None:
    s = split(name, bits)
    metrics = check_parity(s.program, s.path, prompts(s.program), bits, SPLIT)
    assert metrics.routings > 1
    if s.whole is None:
        return
    whole, engine = Engine(s.whole, "onnx-cpu", 1), engine_of(s.path)
    assert set(engine.inputs) == set(whole.inputs)
    assert list(engine.outputs) == list(whole.outputs)
    for inputs in prompts(s.program):
        feeds = feeds_of(s.program, inputs, list(whole.inputs))
        for a, b in zip(engine.run(feeds), whole.run(feeds), strict=True):
            assert np.abs(a - b).max() <= 3e-6 * np.abs(b).max()
    engine.close()


def test_another_program_fails_parity(split: Callable[[str, int], Split]) -> None:
    s = split("llama", 16)
    program = s.program.copy()
    site = program.sites[0]
    assert site.routed is not None
    program.set_routed(site, replace(site.routed, router=-site.routed.router))
    with pytest.raises(CarveError) as e:
        check_parity(program, s.path, prompts(program), 16, SPLIT)
    assert e.value.code == "parity"


def test_experts_lie_on_pages_the_hottest_first(split: Callable[[str, int], Split]) -> None:
    s = split("llama", 4)
    index = index_of(s.path)
    places = [index.experts[key] for key in hottest_first(index)]
    assert [p.hotness for p in places] == sorted((p.hotness for p in places), reverse=True)
    assert places[0].hotness > places[-1].hotness
    assert {p.offset % 4096 for p in places} == {0}
    for key, place in index.experts.items():
        assert place.hotness == pytest.approx(s.seen.chosen[key[0]][:, key[1]].mean(), abs=1e-5)
    # A form for each width, without weights of its own.
    assert sorted(f.bits for f in index.forms) == [4, 8]
    wide = {key for key, p in index.experts.items() if index.forms[p.form].bits == 8}
    assert wide == {(0, 0), (0, 1), (0, 2), (0, 3), (1, 1), (1, 3)}
    assert all(f.model.stat().st_size < 4096 for f in index.forms)
    names = {n.op_type for p in index.segments for n in onnx.load(str(p)).graph.node}
    assert "QMoE" not in names
    assert "GroupQueryAttention" in names


def test_predictors_are_fed_what_they_were_fitted_to(split: Callable[[str, int], Split]) -> None:
    """The runtime's stream is the program's: its scores are those of the fitted map."""
    s = split("llama", 16)
    assert set(s.predictors) == {1}
    index, engine = index_of(s.path), engine_of(s.path)
    told: list[np.ndarray] = []
    engine.experts.asks = lambda _: True  # type: ignore[method-assign]
    engine.experts.expect = lambda layer, scores: told.append(scores)  # type: ignore[method-assign]
    inputs = batches(s.program)[0].inputs
    engine.run(feeds_of(s.program, inputs, list(engine.inputs)))
    assert index.layers[0].predictor is None
    stream = s.seen.streams[0]
    assert stream is not None
    p = s.predictors[1]
    want = stream.float() @ torch.from_numpy(p.weight).T + torch.from_numpy(p.bias)
    np.testing.assert_allclose(told[0], want.numpy(), atol=2e-3)
    chosen = s.seen.chosen[1]
    guess = want.numpy() > 0
    assert (guess & chosen).sum() / chosen.sum() > 0.8
    assert (guess & chosen).sum() / guess.sum() > chosen.mean() + 0.2  # all of them: no more
    engine.close()


def test_locality_record(split: Callable[[str, int], Split]) -> None:
    s = split("llama", 16)
    program, seen, predictors = s.program, s.seen, s.predictors
    sizes = [[4096] * 4, [8192] * 4]
    m = offload.measure_locality(program, seen, predictors, sizes)
    for share in ("25%", "50%", "75%"):
        rates, read = m.hit_rate[share], m.bytes_per_token[share]
        assert rates["belady"] >= max(rates["lru"], rates["lfu"]) > 0
        assert read["lru"] > 0
    assert m.hit_rate["25%"]["belady"] < m.hit_rate["75%"]["belady"]
    assert 0 < m.srp <= 1 and 0 < m.sch <= 1
    assert m.tokens == 240
    assert set(m.recall) == {program.sites[1].name}


def test_what_has_no_split_form(captured: Get, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none is carved"):
        emit_split(captured("llama").program, tmp_path, 16, [], {})
    assert not [*tmp_path.iterdir()]


def test_refused_before_any_work(checkpoint: Path, tmp_path: Path) -> None:
    argv = ["convert", str(checkpoint), "-o", str(tmp_path / "a"), "--target", "onnx-split"]
    assert cli.main([*argv, "--budget", "1.0"]) == 2


def gated(program: Program, path: Path, bits: int) -> tuple[Path, Path]:
    """Every block gated; its split form and its whole model."""
    tiny.gate(tiny.route(program, top_k=3), "low_rank", "identity", "mean", "adapter")
    (path / "split").mkdir()
    seen = offload.watch(program, batches(program))
    found = offload.fit_predictors(program, seen)
    assert not found  # a stream that a gate changes is not to be had without it
    assert all(c.any(1).mean() < 0.9 for c in seen.chosen)  # skipped tokens heat no expert
    split = emit_split(program, path / "split", bits, offload.hotness(seen), found).path
    return split, emit(program, path / "model.onnx", bits).path


@pytest.mark.parametrize("name, bits", [("llama", 16), ("llama", 4), ("qwen3", 8)])
def test_gates_are_those_of_the_whole_model(
    name: str, bits: int, captured: Get, tmp_path: Path
) -> None:
    program = captured(name).program
    path, model = gated(program, tmp_path, bits)
    check_parity(program, path, prompts(program), bits, SPLIT)
    whole, engine = Engine(model, "onnx-cpu", 1), engine_of(path)
    assert set(engine.inputs) == set(whole.inputs)
    assert engine.outputs.keys() == whole.outputs.keys()
    assert engine.optional.keys() == whole.optional.keys() == {"gate_shift"}
    asked = []
    inner = engine.experts.run

    def run(layer: int, x: np.ndarray, routes: np.ndarray) -> np.ndarray:
        asked.append(len(x))
        return inner(layer, x, routes)

    engine.experts.run = run  # type: ignore[method-assign]
    shared = [*prompts(program), tiny.decoder_inputs(program, tiny.token_ids(1, 1, seed=5))]
    for inputs in shared:
        feeds = {n: value(a) for n, a in feeds_of(program, inputs, list(whole.inputs)).items()}
        tokens = inputs[0].numel()
        for shift in (None, 1e20, -1e20):
            if shift is not None:
                feeds["gate_shift"] = value(np.full(4, shift, np.float32))
            asked.clear()
            got = engine.run_values(list(engine.outputs), feeds)
            want = whole.run_values(list(engine.outputs), feeds)
            for a, b in zip((v.numpy() for v in got), (v.numpy() for v in want), strict=True):
                off, most = np.abs(a - b), np.abs(b).max()
                # Sums in another order: an activation may fall to the next of int8's steps.
                assert off.max() <= (1e-5 if bits == 16 else 0.05) * most
            if tokens == 1 or shift == 1e20:  # a first token always runs
                assert asked == [tokens, tokens]
            elif shift is None:
                assert min(asked) > 0 and max(asked) < tokens
            else:
                assert max(asked) <= 2 * len(inputs[0])
    engine.close()


@pytest.mark.parametrize("mode", ["token", "sequence", "off"])
def test_modes_of_gates_in_a_session(mode: str, captured: Get, tmp_path: Path) -> None:
    program = captured("llama").program
    path, model = gated(program, tmp_path, 16)
    _, heads, _, width = program.example[2].shape
    gates = tuple(carve_runtime.GateInfo(b.name, 0.5) for b in program.gated)
    info = carve_runtime.ModelInfo(
        128, 64, None, (), len(program.attention), heads, width, True, None, False, gates
    )
    ids = tiny.token_ids(1, 30)[0].tolist()
    engine = engine_of(path)
    logits, skipped = [], []
    for runner in (engine, Engine(model, "onnx-cpu", 1)):
        check_decoder(runner, info)
        session = carve_runtime.Session(runner, info, gates=mode, stats=True)
        steps = [session.step(ids[:12]), *(session.step([i]) for i in ids[12:])]
        logits.append(np.concatenate(steps))
        skipped.append(session.gate_stats.skipped)
    np.testing.assert_allclose(logits[0], logits[1], atol=2e-5)
    assert skipped[0] == skipped[1]
    assert (sum(skipped[0]) > 0.5) == (mode != "off")
    engine.close()


def test_a_shut_gate_reads_no_expert(captured: Get, tmp_path: Path) -> None:
    program = captured("llama").program
    path, _ = gated(program, tmp_path, 4)
    engine = engine_of(path)
    inputs = tiny.decoder_inputs(program, tiny.token_ids(1, 8))
    names = list(engine.inputs)
    _, *cache = engine.run(feeds_of(program, inputs, names))[: 1 + 2 * len(program.sites)]
    before = engine.experts.stats.hits
    late = tiny.decoder_inputs(program, tiny.token_ids(1, 1), [torch.from_numpy(c) for c in cache])
    feeds = {n: value(a) for n, a in feeds_of(program, late, names).items()}
    feeds["gate_shift"] = value(np.full(4, -1e20, np.float32))
    assert np.isfinite(engine.run_values(["logits"], feeds)[0].numpy()).all()
    assert engine.experts.stats.hits == before
    feeds["gate_shift"] = value(np.full(4, 1e20, np.float32))
    engine.run_values(["logits"], feeds)
    assert engine.experts.stats.hits > before
    engine.close()
