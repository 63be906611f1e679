"""The ONNX back end: what onnxruntime computes is what the program computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
import pytest
import tiny_models as tiny
import torch
from torch import Tensor, nn

from carve.arithmetic import Precision
from carve.capture import capture_module
from carve.dialect import ACTIVATIONS, linear_rule
from carve.emit.onnx import emit
from carve.errors import CarveError, UserError
from carve.parity import check_parity, feeds_of, routings
from carve.program import Program

Get = Callable[[str], tiny.Captured]
CASES = [
    *((n, 16) for n in ("llama", "phi3", "gemma2", "gpt2", "opt", "bert", "vit")),
    *((n, bits) for n in ("llama", "qwen3", "opt") for bits in (8, 4)),
]
# The kernels sum in another order; at 16 bits nothing else differs, below a rounding tie may fall
# the other way.
BOUND = {16: 1e-4, 8: 2e-2, 4: 2e-2}


@dataclass
class Written:
    program: Program
    path: Path
    bits: int
    session: ort.InferenceSession

    def run(self, inputs: tuple[Tensor, ...]) -> list[Tensor]:
        names = [i.name for i in self.session.get_inputs()]
        feeds = feeds_of(self.program, inputs, names)
        return [torch.from_numpy(t) for t in self.session.run(None, feeds)]

    def want(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The program in the kernels' arithmetic."""
        with linear_rule(Precision(self.program, self.bits).rule()):
            return self.program.run(*inputs)


def write(program: Program, path: Path, bits: int) -> Written:
    assert emit(program, path, bits).path == path
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return Written(program, path, bits, session)


@pytest.fixture(scope="module")
def written(
    captured: Get, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, int], Written]:
    """Routed programs and their models; they are shared, so tests leave them as they are."""
    kept: dict[tuple[str, int], Written] = {}

    def get(name: str, bits: int) -> Written:
        if (name, bits) not in kept:
            path = tmp_path_factory.mktemp("onnx") / "model.onnx"
            kept[name, bits] = write(tiny.route(captured(name).program), path, bits)
        return kept[name, bits]

    return get


def prompts(program: Program, *lengths: int) -> list[tuple[Tensor, ...]]:
    found: list[tuple[Tensor, ...]] = []
    for i, length in enumerate(lengths):
        if program.inputs[0] == "pixel_values":
            g = torch.Generator().manual_seed(i)
            found.append((torch.randn(1 + i, 3, 32, 32, generator=g),))
        elif program.kind == "decoder":
            found.append(tiny.decoder_inputs(program, tiny.token_ids(2, length, seed=i)))
        else:
            mask = torch.ones(2, length, dtype=torch.long)
            mask[1, length - 2 :] = 0
            found.append((tiny.token_ids(2, length, seed=i), mask))
    return found


def check(w: Written, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    got, want = w.run(inputs), w.want(inputs)
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert tiny.relative(a, b) < BOUND[w.bits]
    return got


@pytest.mark.parametrize("name, bits", CASES)
def test_parity(name: str, bits: int, written: Callable[[str, int], Written]) -> None:
    w = written(name, bits)
    # Other routings than the example's, other lengths, and not the same in both.
    two = prompts(w.program, 9, 14)
    with linear_rule(Precision(w.program, bits).rule()):
        chosen = [set(routings(w.program, p)) for p in two]
        example = set(routings(w.program, w.program.example))
    assert chosen[0] != chosen[1]
    assert chosen[0] - example
    assert chosen[1] - example
    for p in two:
        check(w, p)
    metrics = check_parity(w.program, w.path, two, bits)
    assert metrics.median_error < BOUND[bits]
    assert metrics.routings == len(chosen[0] | chosen[1])
    assert metrics.tokens == sum(w.want(p)[0][..., 0].numel() for p in two)


@pytest.mark.parametrize("name, bits", [c for c in CASES if c[0] in tiny.DECODERS])
def test_cache_over_several_steps(
    name: str, bits: int, written: Callable[[str, int], Written]
) -> None:
    w = written(name, bits)
    ids = tiny.token_ids(2, 10, seed=7)
    step = tiny.decoder_inputs(w.program, ids[:, :5])
    for i in range(5, 10):
        # The model's own cache goes on, so an error would add up.
        cache = check(w, step)[1:]
        assert {t.shape[2] for t in cache} == {i}
        step = tiny.decoder_inputs(w.program, ids[:, i : i + 1], cache)
    # Several tokens after a cache: onnxruntime's operator takes them for one sequence at a time.
    one = [t[:1, :, :5] for t in cache]
    check(w, tiny.decoder_inputs(w.program, ids[:1, 5:9], one))


@pytest.mark.parametrize("name, bits", CASES)
def test_only_operators_of_stock_onnxruntime(
    name: str, bits: int, written: Callable[[str, int], Written]
) -> None:
    model = onnx.load(str(written(name, bits).path))
    assert {n.domain for n in model.graph.node} <= {"", "com.microsoft"}
    assert {o.domain for o in model.opset_import} == {"", "com.microsoft"}
    assert not model.functions
    kinds = {n.op_type for n in model.graph.node}
    assert ("MatMulNBits" in kinds) == (bits < 16)
    assert ("GroupQueryAttention" in kinds) == (name in tiny.DECODERS)
    assert ("QMoE" in kinds) == (bits < 16)
    names = [i.name for i in model.graph.input]
    program = written(name, bits).program
    assert set(names) - {"attention_mask"} == set(program.inputs) - {"attention_mask"} & set(names)
    assert [o.name for o in model.graph.output] == program.outputs


@pytest.mark.parametrize("bits", [16, 4])
def test_dense_program(bits: int, captured: Get, tmp_path: Path) -> None:
    c = captured("llama")
    w = write(c.program, tmp_path / "dense.onnx", bits)
    got = check(w, c.inputs)
    if bits == 16:
        assert tiny.relative(got[0], c.want) < 1e-4
    metrics = check_parity(c.program, w.path, prompts(c.program, 9, 14), bits)
    assert metrics.routings == 0


def test_model_that_is_not_the_program_fails_parity(
    written: Callable[[str, int], Written],
) -> None:
    w = written("llama", 16)
    other = w.program.copy()
    site = other.sites[1]
    assert site.routed is not None
    other.set_routed(site, replace(site.routed, router=-site.routed.router))
    with pytest.raises(CarveError) as e:
        check_parity(other, w.path, prompts(other, 9, 14), 16)
    assert e.value.code == "parity"
    assert "differ" in e.value.message


@pytest.mark.parametrize("bits", [16, 4])
def test_baked_routing_fails_parity(bits: int, tmp_path: Path) -> None:
    """A model that always takes the same experts, as a careless export does."""
    torch.manual_seed(0)
    program = tiny.route(capture_module(Stack(["silu"], True, True), (torch.randn(3, 64),)))
    baked = program.copy()
    (site,) = baked.sites
    r = site.routed
    assert r is not None
    fixed = {"router": torch.zeros(4, 64), "router_bias": torch.tensor([1.0, 1.0, 0.0, 0.0])}
    two = [(torch.randn(9, 64),), (torch.randn(5, 64),)]
    emit(program, tmp_path / "sound.onnx", bits)
    check_parity(program, tmp_path / "sound.onnx", two, bits)
    baked.set_routed(site, replace(r, **fixed))
    emit(baked, tmp_path / "baked.onnx", bits)
    with pytest.raises(CarveError) as e:
        check_parity(program, tmp_path / "baked.onnx", two, bits)
    assert e.value.code == "parity"


def test_prompts_that_do_not_exercise_the_router_fail_parity(
    written: Callable[[str, int], Written],
) -> None:
    w = written("llama", 16)
    with pytest.raises(CarveError) as e:
        check_parity(w.program, w.path, [tuple(t[:1] for t in w.program.example)], 16)
    assert e.value.code == "parity"
    assert "routing" in e.value.message


def test_unknown_width(captured: Get, tmp_path: Path) -> None:
    with pytest.raises(UserError) as e:
        emit(captured("llama").program, tmp_path / "model.onnx", 3)
    assert e.value.code == "bits"
    assert not [*tmp_path.iterdir()]


class Stack(nn.Module):
    """One FFN an activation, gated or not."""

    def __init__(self, names: list[str], gated: bool, bias: bool) -> None:
        super().__init__()
        self.names = names
        self.gate = nn.ModuleList(nn.Linear(64, 256, bias) for _ in names if gated)
        self.up = nn.ModuleList(nn.Linear(64, 256, bias) for _ in names)
        self.down = nn.ModuleList(nn.Linear(256, 64, bias) for _ in names)

    def forward(self, x: Tensor) -> Tensor:
        for i, name in enumerate(self.names):
            act = ACTIVATIONS[name]
            up = self.up[i](x)
            h = act(self.gate[i](x)) * up if len(self.gate) else act(up)
            x = x + self.down[i](h)
        return x


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
def test_every_activation(gated: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    names = [n for n in ACTIVATIONS if gated or n != "identity"]
    program = capture_module(Stack(names, gated, True), (torch.randn(3, 64),))
    assert [s.dense.activation for s in program.sites] == names
    tiny.route(program)
    check(write(program, tmp_path / "model.onnx", 16), (torch.randn(9, 64),))


FORMS: tuple[dict[str, Any], ...] = (
    {"num_experts": 8},  # no shared expert
    {"compensation": False},
    {"num_experts": 8, "compensation": False},
    {"analytical": True},
    {"top_k": 1},
    {"expert_size": 20},  # no multiple of a block
    {"top_k": 3, "dynamic": True},
    {"top_k": 4, "dynamic": True, "compensation": False},
    {"top_k": 3, "dynamic": True, "expert_size": 20},
)


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize("bias", [True, False], ids=["biases", "no biases"])
def test_every_form_of_a_routed_ffn(gated: bool, bits: int, bias: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    stack = Stack(["silu" if gated else "relu"] * len(FORMS), gated, bias)
    program = capture_module(stack, (torch.randn(3, 64),))
    for i, (site, form) in enumerate(zip(program.sites, FORMS, strict=True)):
        program.set_routed(site, tiny.random_routed(site, seed=i, **form))
    w = write(program, tmp_path / "model.onnx", bits)
    for rows in (1, 9):
        check(w, (torch.randn(rows, 64),))
