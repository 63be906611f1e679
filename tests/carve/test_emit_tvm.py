"""The TVM back end: what the compiled library computes is what the program computes."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import carve_runtime
import numpy as np
import pytest
import tiny_models as tiny
import torch
from carve_runtime.heap import heap_bytes
from carve_runtime.tensors import map_tensors
from carve_runtime.tvm_engine import TvmEngine, TvmSession
from carve_runtime.tvm_index import read_tvm_index
from torch import Tensor, nn

import carve
from carve.arithmetic import Precision
from carve.capture import capture_module
from carve.config import ConvertConfig, target_names
from carve.dialect import linear_rule
from carve.emit.tvm.emit import emit_tvm
from carve.emit.tvm.functions import translate
from carve.emit.tvm.names import check_ready, folder_of, processor
from carve.emit.tvm.params import Parameters
from carve.errors import CarveError, UserError
from carve.grid import Grid
from carve.parity import TVM, check_parity, routings
from carve.program import Program
from carve.write_artifact import model_facts

Get = Callable[[str], tiny.Captured]
HOST = processor("tvm:host")
BRIDGES = ("low_rank", "identity", "mean", "adapter")


def emitted(program: Program, folder: Path, bits: int) -> TvmEngine:
    assert emit_tvm(program, folder, bits, "tvm:host", HOST).path == folder / "index.json"
    files = {p.name for p in folder.iterdir()}
    return TvmEngine(read_tvm_index(folder.resolve(), files, "index.json"), 1)


def feeds(engine: TvmEngine, program: Program, inputs: tuple[Tensor, ...]) -> dict[str, Any]:
    return {n: t.numpy() for n, t in zip(program.inputs, inputs, strict=True)}


def close(engine: TvmEngine, program: Program, bits: int, inputs: tuple[Tensor, ...]) -> list[Any]:
    """Results, compared with the program in the kernels' arithmetic."""
    got = engine.run(feeds(engine, program, inputs))
    with linear_rule(Precision(program, bits).rule()):
        want = program.run(*inputs)
    for a, b in zip(got, want, strict=False):
        assert tiny.relative(torch.from_numpy(a), b) < (1e-4 if bits == 16 else 2e-2)
    return got


def prompts(program: Program, *lengths: int) -> list[tuple[Tensor, ...]]:
    if program.kind == "decoder":
        return [tiny.decoder_inputs(program, tiny.token_ids(2, n, seed=n)) for n in lengths]
    found = []
    for n in lengths:
        mask = torch.ones(2, n, dtype=torch.long)
        mask[1, n - 2 :] = 0
        found.append((tiny.token_ids(2, n, seed=n), mask))
    return found


def session(engine: TvmEngine, program: Program, gates: str = "token") -> TvmSession:
    facts = model_facts(program, True, None)
    info = carve_runtime.ModelInfo(
        vocab_size=tiny.VOCAB,
        max_length=facts["max_length"],
        bos_token_id=None,
        eos_token_ids=(),
        num_layers=facts["num_layers"],
        num_key_value_heads=facts["num_key_value_heads"],
        head_dim=facts["head_dim"],
        shared_cache=True,
        pooling=None,
        normalize=False,
        gates=tuple(carve_runtime.GateInfo(**g) for g in facts["gates"]),
    )
    return TvmSession(engine, info, gates=gates)


@pytest.mark.parametrize("name", [*tiny.ARCHITECTURES, "plain"])
def test_every_architecture_translates(name: str, captured: Get) -> None:
    program = captured(name).program
    for _ in range(2):  # dense, then routed
        mod, params = translate(program, 16, HOST)
        functions = {g.name_hint for g in mod.functions}
        wanted = {"decode", "prefill"} if program.kind == "decoder" else {"main"}
        assert wanted <= functions
        assert set(params.taken) == wanted
        tiny.route(program)


@pytest.mark.parametrize(
    "name, bits, gated", [("llama", 16, True), ("gemma2", 16, False), ("qwen3", 4, True)]
)
def test_decoders(name: str, bits: int, gated: bool, captured: Get, tmp_path: Path) -> None:
    program = tiny.route(captured(name).program)
    if gated:
        tiny.gate(program, *BRIDGES)
    engine = emitted(program, tmp_path, bits)
    two = prompts(program, 9, 14)
    with linear_rule(Precision(program, bits).rule()):
        assert len({r for p in two for r in routings(program, p)}) > 4
    for p in two:
        close(engine, program, bits, p)
    metrics = check_parity(program, tmp_path / "index.json", two, bits, TVM)
    assert metrics.median_error < (1e-4 if bits == 16 else 2e-2)
    # One token at a time and several, over a cache that grows in between.
    ids = tiny.token_ids(1, 40, seed=3)
    inputs = tiny.decoder_inputs(program, ids)
    with linear_rule(Precision(program, bits).rule()):
        want = program.run(*inputs)[0][0]
    for first in (1, 30):
        one = session(engine, program)
        rows = [one.step(ids[0, :first].numpy())]
        cache = one._tensors[0]
        rows += [one.step([int(i)]) for i in ids[0, first:]]
        assert one._tensors[0] is cache
        got = torch.from_numpy(np.concatenate(rows))
        error = (got - want).norm(dim=1) / want.norm(dim=1)
        assert float(error.median()) < (1e-4 if bits == 16 else 2e-2)
        assert float((error < 0.1).float().mean()) > 0.9
    last = session(engine, program).step(ids[0].numpy(), rows=1)
    assert last.shape == (1, tiny.VOCAB)
    np.testing.assert_allclose(last[0], want[-1], atol=1e-3 if bits == 16 else 1e-1)
    if gated:
        off = session(engine, program, "off")
        got = torch.from_numpy(off.step(ids[0].numpy()))
        with linear_rule(Precision(program, bits).rule()):
            whole = program.run(*inputs, gates=False)[0][0]
        error = (got - whole).norm(dim=1) / whole.norm(dim=1)
        assert float(error.median()) < (1e-4 if bits == 16 else 2e-2)
        assert tiny.relative(whole, want) > 0.01


def test_encoder(captured: Get, tmp_path: Path) -> None:
    program = tiny.route(captured("bert").program)
    engine = emitted(program, tmp_path, 8)
    for p in prompts(program, 9, 14):
        close(engine, program, 8, p)
    with pytest.raises(carve_runtime.RequestError, match="input_ids is float32"):
        engine.run({n: np.zeros((1, 3), np.float32) for n in engine.inputs})


class Stack(nn.Module):
    """FFNs in a row, one with an unusual activation."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(64, 256) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(256, 64) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for up, down, act in zip(self.up, self.down, (nn.GELU(), nn.ReLU()), strict=True):
            x = x + down(act(up(x)))
        return x


def test_forms_of_a_routed_ffn_and_a_model_that_is_another(tmp_path: Path) -> None:
    torch.manual_seed(0)
    program = capture_module(Stack(), (torch.randn(3, 64),))
    forms: tuple[dict[str, Any], ...] = (
        {"num_experts": 8, "top_k": 3, "dynamic": True},
        {"expert_size": 20, "compensation": False},
    )
    for i, (site, form) in enumerate(zip(program.sites, forms, strict=True)):
        program.set_routed(site, tiny.random_routed(site, seed=i, **form))
    engine = emitted(program, tmp_path, 16)
    for rows in (1, 9):
        close(engine, program, 16, (torch.randn(rows, 64),))
    two = [(torch.randn(9, 64),), (torch.randn(5, 64),)]
    check_parity(program, tmp_path / "index.json", two, 16, TVM)
    routed = program.sites[1].routed
    assert routed is not None
    program.set_routed(program.sites[1], replace(routed, router=-routed.router))
    with pytest.raises(CarveError) as e:
        check_parity(program, tmp_path / "index.json", two, 16, TVM)
    assert e.value.code == "parity"


class Strange(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(self.down(nn.functional.gelu(self.up(x))))


def test_what_has_no_translation_is_refused_by_name() -> None:
    program = capture_module(Strange(), (torch.randn(3, 8),))
    with pytest.raises(CarveError, match="bessel_j0") as e:
        translate(program, 16, HOST)
    assert e.value.code == "emit"


def test_names() -> None:
    assert processor("tvm:x86_64-v3").name == "x86_64-avx2"
    assert folder_of("tvm:x86_64-v3") == "tvm/x86_64-v3"
    assert processor("tvm:aarch64").triple.startswith("aarch64")
    assert {"onnx-cpu", "tvm:host", "tvm:aarch64"} <= set(target_names())
    assert processor("tvm:cuda").name == "cuda-sm_80"
    assert processor("tvm:cuda-sm_90").name == "cuda-sm_90"
    for name in ("tvm:i386", "tvm:cuda-sm_9"):
        with pytest.raises(UserError) as e:
            processor(name)
        assert e.value.code == "target"
    with pytest.raises(UserError, match="unknown target"):
        ConvertConfig(budget=0.5, targets=("tvm:i386",))


def test_a_missing_compiler_is_refused_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    check_ready("tvm:host")
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(UserError, match="compiler"):
        check_ready("tvm:host")


def test_experts_of_several_widths(captured: Get, tmp_path: Path) -> None:
    program = captured("llama").program
    tiny.route(program, num_experts=3, expert_size=64, top_k=2, dynamic=True)
    widths = (2, 8, 4)
    for site in program.sites:
        r = site.routed
        assert r is not None
        new, grids = {}, {}
        for name in ("expert_gate", "expert_up", "expert_down"):
            weight = getattr(r, name)
            grids[name] = tuple(Grid.nearest(w, b, 32) for w, b in zip(weight, widths, strict=True))
            new[name] = torch.stack([g.round(w) for g, w in zip(grids[name], weight, strict=True)])
        program.set_routed(site, replace(r, **new, grids=grids))
    engine = emitted(program, tmp_path, 4)
    two = prompts(program, 9, 14)
    metrics = check_parity(program, tmp_path / "index.json", two, 4, TVM)
    assert metrics.median_error < 1e-3
    # onnxruntime computes experts of 2 bits by look-up, which rounds otherwise.
    precision, got = Precision(program, 4), engine.run(feeds(engine, program, two[0]))[0]
    errors = []
    for lookup in (False, True):
        with linear_rule(precision.rule(lookup=lookup)):
            want = program.run(*two[0])[0]
        errors.append(tiny.relative(torch.from_numpy(got), want))
    assert errors[0] < 1e-2 < errors[1]
    sizes = {n: a.nbytes for n, a in map_tensors(tmp_path / "model.safetensors").items()}
    stored = [n for n in sizes if n.endswith(".expert_in")]
    assert [sizes[n] / sizes[stored[0]] for n in stored] == [1, 1 / 2, 1 / 4] * 2


def test_prompts_of_every_length_leave_no_memory(captured: Get, tmp_path: Path) -> None:
    program = tiny.route(captured("llama").program)
    engine = emitted(program, tmp_path, 16)
    ids = tiny.token_ids(1, 64)[0].numpy()

    def prompt(length: int) -> None:
        one = session(engine, program)
        one.step(ids[:length], rows=1)
        one.step(ids[:1])

    prompt(63)
    before = heap_bytes()
    if not before:
        pytest.skip("the C library does not tell what is allocated")
    for length in range(16, 63):
        prompt(length)
    # Kept, they are about 150 KB.
    assert heap_bytes() - before < 64 * 1024


def test_tensors_start_where_vectors_may(tmp_path: Path) -> None:
    params = Parameters()
    params.begin("main")
    values = {"a": torch.arange(3.0), "b": torch.tensor(2), "c": torch.randn(5, 7).bfloat16()}
    for name, value in values.items():
        params.tensor(name, value)
    params.write(tmp_path / "t.safetensors")
    data = (tmp_path / "t.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    for name in values:
        assert (8 + length + header[name]["data_offsets"][0]) % 64 == 0
    from safetensors.torch import load_file

    read = load_file(tmp_path / "t.safetensors")  # a reader that allows no gaps
    for name, value in values.items():
        assert torch.equal(read[name], value.float() if value.is_floating_point() else value)


@pytest.fixture(scope="module")
def artifact(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> carve.Artifact:
    return carve.convert(
        checkpoint,
        tmp_path_factory.mktemp("out") / "a",
        budget=0.7,
        bits=4,
        effort="none",
        tokens=2048,
        eval_tokens=256,
        length=64,
        targets=("onnx-cpu", "tvm:host"),
    )


def test_128_tokens_are_those_of_onnxruntime(artifact: carve.Artifact) -> None:
    assert set(artifact.manifest["targets"]) == {"onnx-cpu", "tvm:host"}
    onnx, tvm = (carve_runtime.load(artifact.path, engine=e) for e in ("onnx", "tvm"))
    assert (onnx.target, tvm.target) == ("onnx-cpu", "tvm:host")
    prompt = [5, 9, 60, 33, 100, 7, 8, 41]
    want = onnx.generate(prompt, max_new_tokens=128)
    got = tvm.generate(prompt, max_new_tokens=128)
    assert len(set(want.token_ids)) > 5
    assert got.token_ids == want.token_ids
    assert "".join(tvm.stream(prompt, max_new_tokens=128)) == want.text
    logits = tvm.logits(prompt)
    np.testing.assert_allclose(logits, onnx.logits(prompt), atol=1e-2)


def test_commands(artifact: carve.Artifact, capsys: pytest.CaptureFixture[str]) -> None:
    from carve import cli

    path = str(artifact.path)
    argv = ["run", path, "--prompt", "hello", "--max-tokens", "4", "--engine", "tvm", "--json"]
    assert cli.main(argv) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == 4
    assert cli.main(["eval", path, "--engine", "tvm", "--tokens", "256", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["perplexity"] < 3 * result["dense_perplexity"]
