"""TVM's kernels beside the specification: the dialect's operators in the targets' arithmetic."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import tvm
from torch import Tensor
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from carve import dialect
from carve.arithmetic import product as reference
from carve.emit.tvm.cpu import CPUS, Cpu
from carve.emit.tvm.kernels import (
    PIPELINE,
    Format,
    LinearSpec,
    RoutedSpec,
    Schedule,
    linear,
    routed_ffn,
)
from carve.emit.tvm.kernels.activations import activate
from carve.emit.tvm.kernels.dot import dot, has_offset
from carve.emit.tvm.kernels.schedule import default
from carve.emit.tvm.kernels.vector import load, store
from carve.emit.tvm.weights import Matrix, pack_linear, pack_routed, widen
from carve.errors import CarveError, UserError
from carve.grid import Grid

HOST = Cpu.named("host")
HERE = [c for c in CPUS if c.triple == HOST.triple and c.flags <= HOST.flags]
SMALL = Schedule(tile=3, streams=2)
FP32, INT8, INT4, INT2 = Format(), Format(8, 32), Format(4, 32), Format(2, 32)
BOUND = 2e-6


def build(function: Any, cpu: Cpu = HOST) -> Any:
    """The function, compiled."""
    module = tvm.IRModule({"main": function.with_attr("global_symbol", "main")})
    return tvm.compile(module, target=cpu.target(), tir_pipeline=PIPELINE)["main"]


def call(function: Any, *arrays: np.ndarray, out: tuple[int, ...]) -> Tensor:
    result = tvm.runtime.tensor(np.full(out, np.nan, np.float32))
    function(*[tvm.runtime.tensor(np.ascontiguousarray(a)) for a in arrays], result)
    return torch.from_numpy(result.numpy())


def matrix(weight: Tensor, form: Format) -> Matrix:
    if not form.quantized:
        return Matrix(weight.numpy())
    grid = Grid.nearest(weight, form.bits, form.block)
    return Matrix(grid.levels(weight).numpy(), grid.scale.numpy())


def error(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm(dim=-1).div(want.norm(dim=-1)).max())


@pytest.mark.parametrize("cpu", HERE, ids=lambda c: c.name)
@pytest.mark.parametrize(
    "form", [FP32, INT8, INT4, Format(4, 128), INT2], ids=lambda f: f"{f.bits}-{f.block}"
)
def test_linear(cpu: Cpu, form: Format) -> None:
    g = torch.Generator().manual_seed(0)
    rows, columns = 70, 258 if form == FP32 else 256  # no whole panels, no whole steps
    weight, bias = torch.randn(rows, columns, generator=g), torch.randn(rows, generator=g)
    spec = LinearSpec(rows, columns, form, bias=True)
    packed = pack_linear(spec, cpu, matrix(weight, form), bias.numpy())
    run = build(linear(spec, cpu, SMALL), cpu)
    for n in (1, 2, 3, 7):
        x = torch.randn(n, columns, generator=g)
        x[n // 2, :32] = 0
        want = x @ weight.T
        if form.quantized:
            want = reference(x, weight, Grid.nearest(weight, form.bits, form.block))
        got = call(run, x.numpy(), *packed.values(), out=(n, rows))
        assert error(got, want + bias) < BOUND


@pytest.mark.parametrize("form, rows", [(FP32, 256), (FP32, 1024), (INT4, 256)])
def test_linear_by_the_default_schedule(form: Format, rows: int) -> None:
    g = torch.Generator().manual_seed(1)
    weight = torch.randn(rows, 64, generator=g)
    spec = LinearSpec(rows, 64, form)
    run, packed = build(linear(spec, HOST)), pack_linear(spec, HOST, matrix(weight, form))
    tile = default(HOST, weight.nbytes, quantized=form.quantized).tile
    for n in (1, tile - 1, tile, 2 * tile + 5):
        x = torch.randn(n, 64, generator=g)
        want = x @ weight.T
        if form.quantized:
            want = reference(x, weight, Grid.nearest(weight, form.bits, form.block))
        assert error(call(run, x.numpy(), *packed.values(), out=(n, rows)), want) < BOUND


def test_default_schedules() -> None:
    many, few = Cpu.named("x86_64-avx512-vnni"), Cpu.named("x86_64-avx2")
    tiles = [default(c, 1 << 20, quantized=q).tile for c in (many, few) for q in (False, True)]
    assert tiles == [12, 6, 4, 4]
    assert [default(many, n, quantized=True).parallel for n in (1000, 1 << 20)] == [False, True]
    # Of the routed experts a token reads those that it takes.
    spec = RoutedSpec(256, 64, 16, 64, 1, shared_in=INT4, shared_down=INT4)
    loops = [routed_ffn(replace(spec, top_k=k), many).script().count("T.parallel") for k in (1, 64)]
    assert loops[0] < loops[1]


class Routed:
    """A routed FFN with random weights, and its packed form."""

    def __init__(self, spec: RoutedSpec, cpu: Cpu = HOST) -> None:
        g = torch.Generator().manual_seed(0)
        d, s, m, e = spec.hidden_size, spec.shared_size, spec.expert_size, spec.num_experts

        def make(*shape: int, there: bool = True) -> Tensor | None:
            return torch.randn(*shape, generator=g) * shape[-1] ** -0.5 if there else None

        gated, shared = spec.gated, s > 0
        self.spec = spec
        self.weights = {
            "shared_gate": make(s, d, there=shared and gated),
            "shared_gate_bias": make(s, there=spec.shared_in_bias and gated),
            "shared_up": make(s, d, there=shared),
            "shared_up_bias": make(s, there=spec.shared_in_bias and not gated),
            "shared_down": make(d, s, there=shared),
            "output_bias": make(d, there=spec.output_bias),
            "expert_gate": make(e, m, d, there=gated),
            "expert_gate_bias": None,
            "expert_up": make(e, m, d),
            "expert_up_bias": make(e, m, there=spec.expert_in_bias),
            "expert_down": make(e, d, m),
            "expert_bias": make(e, d, there=spec.expert_bias),
        }
        self.router, self.router_bias = make(e, d), make(e)
        self.grids: dict[int, Grid] = {}
        packed = {}
        for name, w in self.weights.items():
            if w is None:
                continue
            if name.endswith("bias"):
                packed[name] = w.numpy()
                continue
            part, which = name.split("_")
            form = getattr(spec, f"{part}_{'down' if which == 'down' else 'in'}")
            packed[name] = matrix(w, form)
            for one in [w] if w.ndim == 2 else list(w):
                if form.quantized:
                    self.grids[one.data_ptr()] = Grid.nearest(one, form.bits, form.block)
        self.packed = pack_routed(spec, cpu, **packed)

    def rule(self, x: Tensor, weight: Tensor) -> Tensor:
        grid = self.grids.get(weight.data_ptr())
        return x @ weight.T if grid is None else reference(x, weight, grid)

    def scores(self, x: Tensor) -> Tensor:
        return dialect.router_logits(x, self.router, self.router_bias, None, "silu")

    def want(self, x: Tensor) -> Tensor:
        s = self.spec
        with dialect.linear_rule(self.rule):
            y: Tensor = dialect.routed_ffn(
                x,
                *self.weights.values(),
                self.router,
                self.router_bias,
                None,
                s.activation,
                s.top_k,
                s.dynamic,
            )
        return y


BASE = RoutedSpec(64, 96, 32, 5, 3, dynamic=True, output_bias=True, expert_bias=True)
SPECS = {
    "fp32": BASE,
    "fixed": replace(BASE, dynamic=False, activation="gelu", output_bias=False),
    "int4": replace(
        BASE, shared_in=INT4, shared_down=INT8, expert_in=INT4, expert_down=INT4, expert_size=64
    ),
    "plain": replace(
        BASE,
        gated=False,
        activation="relu2",
        shared_in_bias=True,
        expert_in_bias=True,
        shared_in=INT8,
        expert_size=30,
    ),
    "no shared": replace(BASE, shared_size=0, expert_in=INT8, expert_down=FP32, top_k=5),
    "odd": replace(BASE, hidden_size=50, shared_size=45, expert_size=21, shared_in_bias=True),
}


@pytest.mark.parametrize("name", SPECS)
def test_routed(name: str) -> None:
    made = Routed(SPECS[name])
    d = made.spec.hidden_size
    run = build(routed_ffn(made.spec, HOST, SMALL))
    g = torch.Generator().manual_seed(2)
    for n in (1, 2, 5, 19):
        x = torch.randn(n, d, generator=g)
        scores = made.scores(x)
        got = call(run, x.numpy(), scores.numpy(), *made.packed.values(), out=(n, d))
        assert error(got, made.want(x)) < BOUND


@pytest.mark.parametrize("cpu", HERE[1:], ids=lambda c: c.name)
def test_routed_by_other_instructions(cpu: Cpu) -> None:
    made = Routed(SPECS["int4"], cpu)
    run = build(routed_ffn(made.spec, cpu, SMALL), cpu)
    for n in (1, 4):
        x = torch.randn(n, 64, generator=torch.Generator().manual_seed(n))
        given = (x.numpy(), made.scores(x).numpy(), *made.packed.values())
        assert error(call(run, *given, out=(n, 64)), made.want(x)) < BOUND


def test_routed_takes_whom_the_scores_say() -> None:
    made = Routed(replace(BASE, top_k=2))
    run = build(routed_ffn(made.spec, HOST, SMALL))
    x = torch.randn(1, 64, generator=torch.Generator().manual_seed(5))
    r = made.weights

    def expert(e: int) -> Tensor:
        h = torch.nn.functional.silu(x @ r["expert_gate"][e].T) * (x @ r["expert_up"][e].T)
        return h @ r["expert_down"][e].T + r["expert_bias"][e]

    h = torch.nn.functional.silu(x @ r["shared_gate"].T) * (x @ r["shared_up"].T)
    shared = h @ r["shared_down"].T + r["output_bias"]
    # None is positive; one is; of three equal ones the first two are taken.
    for scores, taken in (
        ([-1, -2, 0, -1, -3], []),
        ([-1, -2, 0, 4, -3], [3]),
        ([1, 2, 2, 0.5, 2], [1, 2]),
    ):
        for n in (1, 3):
            given = (x.expand(n, -1).numpy(), np.array([scores] * n, np.float32))
            got = call(run, *given, *made.packed.values(), out=(n, 64))
            want = shared + sum((expert(e) for e in taken), torch.zeros(1, 64))
            assert error(got, want.expand(n, -1)) < BOUND


def test_dense_ffn() -> None:
    g = torch.Generator().manual_seed(3)
    up, down = torch.randn(40, 64, generator=g), torch.randn(48, 40, generator=g)
    spec = RoutedSpec(64, 40, gated=False, activation="tanh", out_features=48)
    packed = pack_routed(spec, HOST, shared_up=matrix(up, FP32), shared_down=matrix(down, FP32))
    run = build(routed_ffn(spec, HOST, SMALL))
    for n in (1, 4):
        x = torch.randn(n, 64, generator=g)
        got = call(run, x.numpy(), *packed.values(), out=(n, 48))
        assert error(got, torch.tanh(x @ up.T) @ down.T) < BOUND


@pytest.mark.parametrize("name", dialect.ACTIVATIONS)
def test_activations(name: str) -> None:
    n = HOST.lanes
    x = torch.cat((torch.linspace(-12, 12, 4001), torch.tensor([-200.0, 200.0, 0.0, -0.0, 1e-8])))
    x = torch.nn.functional.pad(x, (0, -len(x) % n))
    with IRBuilder() as ib, T.prim_func():
        T.func_name("main")
        source, result = (T.arg(a, T.buffer((len(x),), "float32")) for a in "xy")
        with T.serial(0, len(x) // n) as i:
            store(result, i * n, activate(name, load(source, i * n, n), n), n)
    got = call(build(ib.get()), x.numpy(), out=(len(x),))
    want = dialect.ACTIVATIONS[name](x)
    assert float(((got - want).abs() / want.abs().clamp_min(1)).max()) < 1e-6


@pytest.mark.parametrize("cpu", HERE, ids=lambda c: c.name)
@pytest.mark.parametrize("form", [INT8, INT4], ids=["8", "4"])
def test_integer_products_are_exact(cpu: Cpu, form: Format) -> None:
    n, count = cpu.lanes, 600
    g = np.random.default_rng(0)
    top = 15 if form.bits == 4 else 255
    w = g.integers(0, top + 1, (count, n, 4), np.uint8)
    a = g.integers(-127, 128, (count, 4), np.int8)
    w[:4], a[:4] = np.array([0, 0, top, top])[:, None, None], np.array([127, -127] * 2)[:, None]
    stored = w if has_offset(cpu, form) else w ^ np.uint8(128)
    value = w.astype(int) - (0 if has_offset(cpu, form) else 128)
    with IRBuilder() as ib, T.prim_func():
        T.func_name("main")
        levels = T.arg("w", T.buffer((w.size,), "uint8"))
        fours = T.arg("a", T.buffer((count,), "int32"))
        result = T.arg("y", T.buffer((count * n,), "int32"))
        with T.serial(0, count) as i:
            one = T.Bind(load(levels, i * 4 * n, 4 * n))
            acc = load(result, i * n, n)
            store(result, i * n, dot(cpu, acc, one, T.Bind(fours[i]), form), n)
    start = g.integers(-1000, 1000, count * n, np.int32)
    y = tvm.runtime.tensor(start)
    given = [tvm.runtime.tensor(v) for v in (stored.reshape(-1), a.reshape(-1).view(np.int32))]
    build(ib.get(), cpu)(*given, y)
    want = start + (value * a[:, None].astype(int)).sum(-1).reshape(-1)
    assert np.array_equal(y.numpy(), want)


@pytest.mark.parametrize(
    "name, form, mark", [("aarch64", INT8, "smull"), ("aarch64-dotprod", INT2, "sdot")]
)
def test_kernels_compile_for_arm(name: str, form: Format, mark: str) -> None:
    cpu = Cpu.named(name)
    spec = replace(BASE, expert_in=form, expert_down=form)
    module = tvm.IRModule({"routed_ffn": routed_ffn(spec, cpu, SMALL)})
    built = tvm.compile(module, target=cpu.target(), tir_pipeline=PIPELINE)
    assert mark in built.mod.inspect_source("s")


def test_other_functions_keep_the_default_passes() -> None:
    @tvm.script.ir_module
    class Other:
        @tvm.script.tirx.prim_func(s_tir=True)
        def twice(
            x: tvm.script.tirx.Buffer((8,), "float32"),
            y: tvm.script.tirx.Buffer((8,), "float32"),
        ):
            for i in range(8):
                with tvm.script.tirx.sblock("twice"):
                    v = tvm.script.tirx.axis.spatial(8, i)
                    y[v] = x[v] * tvm.script.tirx.float32(2)

    module = tvm.IRModule(dict(Other.functions_items()))
    module["linear"] = linear(LinearSpec(8, 8), HOST, SMALL)
    built = tvm.compile(module, target=HOST.target(), tir_pipeline=PIPELINE)
    x = np.arange(8, dtype=np.float32)
    assert call(built["twice"], x, out=(8,)).tolist() == (2 * x).tolist()
    assert built["linear"] is not None


@pytest.mark.parametrize("bits, to", [(2, 4), (2, 8), (4, 8)])
def test_widened_levels_stand_for_the_same_weights(bits: int, to: int) -> None:
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    grid = Grid.nearest(weight, bits)
    wide = torch.from_numpy(widen(grid.levels(weight).numpy(), bits, to))
    assert torch.equal(Grid(to, grid.scale).values(wide), grid.round(weight))


def test_what_cannot_be_packed_is_refused() -> None:
    spec = LinearSpec(8, 64, INT8)
    levels, scale = np.zeros((8, 64), np.uint8), np.zeros((8, 2), np.float32)
    for weight in (
        Matrix(levels),
        Matrix(levels[:4], scale),
        Matrix(levels.astype(np.float32), scale),
        Matrix(levels, scale.astype(np.float64)),
    ):
        with pytest.raises(CarveError, match="is due"):
            pack_linear(spec, HOST, weight)
    with pytest.raises(CarveError, match="bias"):
        pack_linear(spec, HOST, Matrix(levels, scale), np.zeros(8, np.float32))
    for bits, block in ((3, 32), (8, 0), (4, 48), (32, 32)):
        with pytest.raises(CarveError, match="no TVM kernel"):
            Format(bits, block)
    with pytest.raises(CarveError, match="whole blocks"):
        LinearSpec(8, 48, INT4)
    with pytest.raises(UserError, match="no processor"):
        Cpu.named("z80")
