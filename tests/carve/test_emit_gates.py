"""Skip gates in onnxruntime: the same results, whoever runs, and a cache that stays whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import carve_runtime
import numpy as np
import onnx
import pytest
import tiny_models as tiny
import torch
from test_emit_onnx import BOUND, Written, prompts, write

import carve
from carve.capture import capture_checkpoint
from carve.parity import check_parity, run_onnx
from carve.program import Program

Get = Callable[[str], tiny.Captured]
BRIDGES = ("low_rank", "identity", "mean", "adapter")


def gated(program: Program) -> Program:
    return tiny.gate(tiny.route(program), *BRIDGES)


def nodes(path: Path) -> list[onnx.NodeProto]:
    """Every node, those of branches too."""
    found: list[onnx.NodeProto] = []
    stack = [onnx.load(str(path), load_external_data=False).graph]
    while stack:
        graph = stack.pop()
        for node in graph.node:
            found.append(node)
            stack += [a.g for a in node.attribute if a.type == onnx.AttributeProto.GRAPH]
    return found


def emitted(program: Program, folder: Path, bits: int = 16) -> Written:
    return write(program, folder / "model.onnx", bits)


def same(w: Written, inputs: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    """Results without scores and bars, compared with the program."""
    got, want = w.run(inputs)[:-2], w.want(inputs)
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert tiny.relative(a, b) < BOUND[w.bits]
    return got


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "opt", "neox", "phi3", "mistral"])
def test_parity_with_mixed_gates(name: str, captured: Get, tmp_path: Path) -> None:
    program = gated(captured(name).program)
    w = emitted(program, tmp_path)
    for p in prompts(program, 9, 14, 1):
        closed = program.run(*p, gates=False)[0]
        got = same(w, p)
        if p[0].shape[1] > 2:
            assert tiny.relative(got[0], closed) > 0.01
    # No weight stands in a branch.
    for node in nodes(w.path):
        for a in node.attribute:
            if a.type == onnx.AttributeProto.GRAPH:
                assert not a.g.initializer


@pytest.mark.parametrize("name", ["llama", "qwen3"])
@pytest.mark.parametrize("bits", [8, 4])
def test_parity_of_narrow_weights(name: str, bits: int, captured: Get, tmp_path: Path) -> None:
    program = gated(captured(name).program)
    w = emitted(program, tmp_path, bits)
    # A tie that falls the other way moves a token to its bridge, so the typical token is bounded.
    metrics = check_parity(program, w.path, prompts(program, 40, 30), bits)
    assert metrics.median_error < max(BOUND[bits], 3 * metrics.rounding_floor)


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral"])
def test_the_cache_over_many_steps(name: str, captured: Get, tmp_path: Path) -> None:
    program = gated(captured(name).program)
    w = emitted(program, tmp_path)
    ids = tiny.token_ids(1, 30)
    whole = program.run(*tiny.decoder_inputs(program, ids))
    cache = [t.to(torch.float32) for t in program.empty_cache(1)]
    for at in range(30):
        inputs = tiny.decoder_inputs(program, ids[:, at : at + 1], cache)
        logits, *cache = w.run(inputs)[:-2]
        assert tiny.relative(logits[:, 0], whole[0][:, at]) < 1e-4
    for a, b in zip(cache, whole[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_128_greedy_tokens_are_those_of_torch(tmp_path: Path) -> None:
    """With a cache on both sides; the scores nearest to their bars are far beyond rounding."""
    program = gated(capture_checkpoint(tiny.save_checkpoint(tmp_path / "source", layers=4)))
    w = emitted(program, tmp_path)
    prompt = tiny.token_ids(1, 8)
    inputs = tiny.decoder_inputs(program, prompt)
    tokens: list[int] = []
    got_tokens: list[int] = []
    margins: list[float] = []
    shares: list[float] = []
    got_inputs = inputs
    for _ in range(128):
        logits, *cache = program.run(*inputs)
        tokens.append(int(logits[0, -1].argmax()))
        inputs = tiny.decoder_inputs(program, torch.tensor([tokens[-1:]]), cache)
        got, *rest = w.run(got_inputs)
        got_tokens.append(int(got[0, -1].argmax()))
        *got_cache, scores, bars = rest
        got_inputs = tiny.decoder_inputs(program, torch.tensor([got_tokens[-1:]]), got_cache)
        late = (scores - bars)[bars > -1e20]
        if late.numel():
            margins.append(float(late.abs().min()))
        shares.append(float((scores > bars)[0, -1].float().mean()))
    assert got_tokens == tokens
    assert len({round(s, 3) for s in shares}) > 2  # mixed, and not always the same
    assert min(margins) > 1e-5


def test_all_open_and_all_shut(captured: Get, tmp_path: Path) -> None:
    c = captured("llama")
    for i, bias in enumerate((1e9, -1e9)):
        program = gated(c.program.copy())
        for block in program.gated:
            assert block.gate is not None
            program.set_gate(block, replace(block.gate, bias=torch.full((1,), bias)))
        (tmp_path / str(i)).mkdir()
        w = emitted(program, tmp_path / str(i))
        for p in prompts(program, 9, 1):
            same(w, p)


def test_dense_ffns_can_be_gated(captured: Get, tmp_path: Path) -> None:
    program = tiny.gate(captured("llama").program, *BRIDGES)
    w = emitted(program, tmp_path)
    for p in prompts(program, 9, 14):
        same(w, p)


def test_scores_bars_and_shift(captured: Get, tmp_path: Path) -> None:
    program = gated(captured("llama").program)
    w = emitted(program, tmp_path)
    (p,) = prompts(program, 9)
    scores, bars = w.run(p)[-2:]
    assert scores.shape == bars.shape == (2, 9, len(program.gated))
    assert bool((scores[:, :2] > bars[:, :2]).all())
    block = program.gated[0]
    assert block.gate is not None
    seen: list[torch.Tensor] = []
    first = program.attention[0]
    assert block is first
    steps = program.steps(*p, pauses=_after(block), only_first=True)
    with torch.no_grad():
        seen.append(block.gate.scores(next(steps).x))
    late = slice(2, None)
    torch.testing.assert_close((scores - bars)[:, late, 0], seen[0][:, late], rtol=1e-4, atol=1e-4)
    plain = run_onnx(w.path, program, [p])[0][0]
    feeds = {"gate_shift": np.full(len(program.gated), 1e20, np.float32)}
    names = [i.name for i in w.session.get_inputs()]
    assert "gate_shift" not in names  # it has a value of its own
    from carve.parity import feeds_of

    opened = w.session.run(None, feeds_of(program, p, names) | feeds)[0]
    torch.testing.assert_close(
        torch.from_numpy(opened), program.run(*p, gates=False)[0], rtol=1e-3, atol=1e-4
    )
    assert np.abs(opened - plain).max() > 0.01


def _after(block: object) -> object:
    from carve.executor import Pauses

    return Pauses(after=[block])  # type: ignore[list-item]


# A whole conversion


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> carve.Artifact:
    folder = tmp_path_factory.mktemp("gates")
    source = tiny.save_checkpoint(folder / "deep", layers=6)
    passes: dict[str, Any] = {"carve": {"tokens": 512}, "gate": {"rank": 8}}
    passes["place_gates"] = {"blocks": "deep"}
    return carve.convert(
        source,
        folder / "out",
        budget=0.7,
        skip=0.5,
        bits=16,
        effort="none",
        tokens=4000,
        eval_tokens=2000,
        length=64,
        passes=passes,
    )


def test_report_and_manifest(artifact: carve.Artifact) -> None:
    report = artifact.report
    assert report["skip"]["asked"] == 0.5
    # Few tokens calibrate it, and the held-out ones are of another text.
    assert report["skip"]["realised"] == pytest.approx(0.5, abs=0.1)
    assert report["budget"]["realised"] <= 0.71
    names = [f"model.layers.{i}.{kind}" for i in (3, 4) for kind in ("self_attn", "mlp")]
    assert list(report["skip"]["blocks"]) == names
    gates = artifact.manifest["model"]["gates"]
    assert [g["name"] for g in gates] == names
    assert all(g["skip"] == pytest.approx(0.5, abs=0.01) for g in gates)
    assert "gate" in [p["name"] for p in report["passes"]]


def test_steps_with_a_shared_cache_are_one_run(artifact: carve.Artifact) -> None:
    """Greedy by steps with a shared cache, against one run of the ONNX graph in whole."""
    model = carve_runtime.load(artifact.path)
    prompt = [5, 9, 60, 33, 100, 7, 8, 41]
    done = model.generate(prompt, max_new_tokens=128, stats=True)
    assert len(done.token_ids) == 128
    whole = model.logits(prompt + list(done.token_ids[:-1]))[len(prompt) - 1 :]
    assert whole.argmax(1).tolist() == list(done.token_ids)
    stats = done.gate_stats
    assert stats is not None
    assert len(stats.by_position) == len(prompt) + 127
    assert stats.by_position[:2].max() == 0
    assert 0.1 < stats.generated < 0.9  # some open, some shut


def test_modes(artifact: carve.Artifact) -> None:
    model = carve_runtime.load(artifact.path)
    prompt = [5, 9, 60, 33, 100, 7, 8, 41]
    off = model.generate(prompt, max_new_tokens=24, gates="off", stats=True)
    assert off.gate_stats is not None
    assert off.gate_stats.generated == off.gate_stats.prompt == 0
    plan = model.generate(prompt, max_new_tokens=24, gates="sequence", stats=True)
    assert plan.gate_stats is not None
    shares = plan.gate_stats.by_position[len(prompt) :]
    assert shares.tolist() == [0.5] * 23  # two of four gates, the same for every token
    with pytest.raises(carve_runtime.RequestError, match="is none of"):
        model.start(gates="sometimes")
    assert model.generate(prompt, max_new_tokens=4).gate_stats is None


def test_run_stats(artifact: carve.Artifact, capsys: pytest.CaptureFixture[str]) -> None:
    from carve import cli

    argv = ["run", str(artifact.path), "--prompt", "hello there", "--max-tokens", "8", "--stats"]
    assert cli.main(argv) == 0
    err = capsys.readouterr().err
    assert "model.layers.3.mlp" in err
    assert "positions" in err
    assert cli.main([*argv, "--json"]) == 0
    assert '"by_position"' in capsys.readouterr().out
