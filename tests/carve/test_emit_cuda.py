"""Half precision for CUDA, by the CPU's kernels: they give the same up to rounding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import carve_runtime
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import tiny_models as tiny
import torch
import transformers as hf
from carve_runtime import decoder, engine
from test_emit_gates import gated, nodes
from test_emit_onnx import prompts

import carve
from carve.budget import splits_of
from carve.capture import capture_transformers
from carve.config import ConvertConfig
from carve.dialect import linear_rule
from carve.emit.onnx import emit
from carve.engine_form import check_source, form_of
from carve.errors import CarveError, UserError
from carve.parity import CUDA, check_parity
from carve.program import Program

Get = Callable[[str], tiny.Captured]
FLOAT, HALF = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16


def written(program: Program, folder: Path, bits: int) -> Path:
    path = folder / "model.onnx"
    emit(program, path, bits, half=True)
    return path


@pytest.mark.parametrize(
    "name, bits", [("llama", 4), ("qwen3", 8), ("gemma2", 16), ("opt", 4), ("bert", 16)]
)
def test_parity(name: str, bits: int, captured: Get, tmp_path: Path) -> None:
    program = tiny.route(captured(name).program)
    path = written(program, tmp_path, bits)
    metrics = check_parity(program, path, prompts(program, 9, 14), bits, CUDA)
    assert metrics.median_error < 1e-2
    assert metrics.routings > 1


def test_gates_and_their_branches(captured: Get, tmp_path: Path) -> None:
    program = gated(captured("llama").program)
    path = written(program, tmp_path, 4)
    assert check_parity(program, path, prompts(program, 9, 14), 4, CUDA).median_error < 1e-2


def test_another_program_fails(captured: Get, tmp_path: Path) -> None:
    program = tiny.route(captured("llama").program)
    path = written(program, tmp_path, 4)
    other = program.copy()
    site = other.sites[1]
    assert site.routed is not None
    other.set_routed(site, replace(site.routed, router=-site.routed.router))
    with pytest.raises(CarveError, match="differ"):
        check_parity(other, path, prompts(other, 9, 14), 4, CUDA)


def test_what_cuda_needs_of_the_graph(captured: Get, tmp_path: Path) -> None:
    path = written(tiny.route(captured("llama").program), tmp_path, 4)
    model = onnx.load(str(path), load_external_data=False)
    kinds = {
        v.name: v.type.tensor_type.elem_type for v in (*model.graph.input, *model.graph.output)
    }
    assert {k for n, k in kinds.items() if n.startswith(("past", "present"))} == {HALF}
    assert kinds["logits"] == FLOAT
    weights = {w.name: w.data_type for w in model.graph.initializer}
    routers = {n for n in weights if n.endswith((".router", ".router_bias"))}
    assert routers
    assert {weights[n] for n in routers} == {FLOAT}
    assert {k for n, k in weights.items() if n.endswith(".scales")} == {HALF}
    experts = [n for n in nodes(path) if n.op_type == "QMoE"]
    assert experts
    for node in experts:
        told = {a.name: a.i for a in node.attribute if a.type == onnx.AttributeProto.INT}
        # The default is a layout of CUDA's own; int8 activations are the CPU's.
        assert told["weights_prepacked"] == 0
        assert told["accuracy_level"] == 0
        # CUDA's kernel reads no `router_weights`, it has its own of the chosen experts' scores.
        assert told["normalize_routing_weights"] == 1
        assert not any(node.input[14:])


def test_angles_stay_wide(captured: Get, tmp_path: Path) -> None:
    """Positions above 2,048 are no half numbers."""
    path = written(tiny.route(captured("gemma2").program), tmp_path, 16)
    model = onnx.load(str(path), load_external_data=False)
    makers = {o: n for n in model.graph.node for o in n.output}
    weights = {w.name: w.data_type for w in model.graph.initializer}
    left = [i for n in model.graph.node if n.op_type in ("Cos", "Sin") for i in n.input]
    tables = [k for n, k in weights.items() if "cos" in n or "sin" in n]
    assert left or tables
    while left:
        name = left.pop()
        assert weights.get(name) != HALF
        node = makers.get(name)
        if node is not None and node.op_type != "Shape":
            left += node.input
            assert not (node.op_type == "Cast" and node.attribute[0].i == HALF)


def test_artifact_and_runtime(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"ffn_active": 0.6, "effort": "none", "tokens": 1200, "eval_tokens": 600}
    targets = ("onnx-cpu", "onnx-cuda")
    made = carve.convert(checkpoint, tmp_path / "out", bits=4, targets=targets, **settings)
    assert set(made.manifest["targets"]) == set(targets)
    ids = list(range(2, 40))
    cpu = carve_runtime.load(made.path)
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        with pytest.raises(carve_runtime.ArtifactError, match="CUDAExecutionProvider") as e:
            carve_runtime.load(made.path, target="onnx-cuda")
        assert "onnxruntime-gpu" in e.value.hint
        cpu_only = {**engine.PROVIDERS, "onnx-cuda": ("CPUExecutionProvider",)}
        monkeypatch.setattr(engine, "PROVIDERS", cpu_only)
    half = carve_runtime.load(made.path, target="onnx-cuda")
    want, got = (m.start().step(ids) for m in (cpu, half))
    assert got.dtype == np.float32
    assert tiny.relative(torch.from_numpy(got), torch.from_numpy(want)) < 5e-2
    monkeypatch.setattr(decoder, "_FIRST_CAPACITY", 16)
    session = half.start()
    # The cache grows past its first capacity and keeps what it holds.
    steps = [session.step([i % 50 + 2]) for i in range(180)]
    again = half.start().step([i % 50 + 2 for i in range(180)])
    # A score that rounding moves past its bar changes that token; the others stay.
    errors = np.abs(np.concatenate(steps) - again).max(1)
    assert np.quantile(errors, 0.95) < 2e-2 * np.abs(again).max()


def test_experts_are_as_wide_as_the_kernels_tiles(captured: Get, tmp_path: Path) -> None:
    site = captured("llama").program.sites[0]
    form = form_of(("onnx-cpu", "onnx-cuda"))
    assert {s.expert_size % 64 for s in splits_of(site, None, None, form)} == {0}
    assert any(s.expert_size % 64 for s in splits_of(site, None, None))
    narrow = capture_transformers(
        hf.LlamaForCausalLM(hf.LlamaConfig(**{**tiny.GROUPED, "hidden_size": 96}))
    )
    check_source(narrow, ("onnx-cpu",))
    with pytest.raises(UserError, match=r"multiple of 64 wide, and .* is 96"):
        check_source(narrow, ("onnx-cuda",))


def test_mixed_widths_are_refused() -> None:
    for more in ({"bits": 3}, {"bits": "auto"}, {"size": "4MB"}):
        with pytest.raises(UserError, match="4 or 8 bits"):
            ConvertConfig(budget=0.6, targets=("onnx-cuda",), **more)


def test_activations_that_kernels_do_not_round(captured: Get) -> None:
    from carve.arithmetic import Precision

    program = tiny.route(captured("llama").program)
    precision = Precision(program, 4)
    linear = program.linears[0]
    x = torch.randn(3, linear.weight.shape[1], generator=torch.Generator().manual_seed(0))
    grid = precision.of(linear.weight)
    assert grid is not None
    with linear_rule(precision.rule(int8=False)):
        exact = precision.rule(int8=False)(x, linear.weight)
    assert torch.equal(exact, x @ grid.round(linear.weight).T)
    assert not torch.equal(precision.rule()(x, linear.weight), exact)
