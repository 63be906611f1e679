"""What quantizing promises, on a tiny carved model with real text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import tiny_models as tiny
import torch
from onnx import helper
from torch import Tensor

from carve.arithmetic import as_emitted, grids_of, product
from carve.budget import Request, Split, Widths
from carve.calibration import (
    DATA,
    SiteInputs,
    decoder_batches,
    hold_back,
    load_tokenizer,
    text_batches,
)
from carve.capture import capture_checkpoint
from carve.emit.onnx import emit
from carve.emit.pack import pack
from carve.emulation import BOUND, check_nodes, cpu_session
from carve.errors import CarveError, UserError
from carve.evaluate import Evaluator
from carve.ffn import RoutedFFN
from carve.grid import Grid
from carve.parity import check_parity, feeds_of
from carve.passbase import Context, ContractError, Pass, PassManager
from carve.passes import (
    Carve,
    CarveConfig,
    ChooseWidths,
    ChooseWidthsConfig,
    Profile,
    ProfileConfig,
    Quantize,
    QuantizeConfig,
    Refit,
    RefitConfig,
    RouteRidge,
    RouteRidgeConfig,
    Smooth,
    SmoothConfig,
)
from carve.passes.choose_widths import BITS, BYTES, READS
from carve.passes.smooth import fold, groups_of
from carve.program import Program
from carve.quantize_units import folds, sorted_neurons
from carve.realign import agreement, margins, realigned
from carve.twin import twin_walk, units_of

SPLIT = Split(shared_size=64, expert_size=32, num_experts=6, top_k=2)


class Carved:
    """A carved tiny program, its text and its own results on held-out text."""

    def __init__(self, folder: Path) -> None:
        dense = capture_checkpoint(folder)
        text = (DATA / "calibration.txt").read_text(encoding="utf-8")[:60_000]
        batches = text_batches(dense, load_tokenizer(folder), text, 64, 6000)
        self.batches, self.held = hold_back(batches, 1024)
        self.inputs = SiteInputs.collect(dense, self.batches)
        self.program = dense
        parts: list[Pass[Any]] = [
            Profile(ProfileConfig()),
            Carve(CarveConfig(tokens=512)),
            RouteRidge(RouteRidgeConfig()),
            Refit(RefitConfig(judge=False)),
        ]
        PassManager(parts)(dense, self.context())
        self.reference = Evaluator(dense, self.held)

    def context(self, **more: Any) -> Context:
        splits: dict[str, Split | None] = {}
        if hasattr(self, "program"):
            splits = {s.name: SPLIT for s in self.program.sites}
        return Context(self.batches, self.inputs, Request(0.0), splits, **more)

    def quantized(self, config: QuantizeConfig | None = None, **more: Any) -> tuple[Program, Any]:
        program = self.program.copy()
        p = Quantize(config or QuantizeConfig(tokens=2_000))
        (result,) = PassManager([p])(program, self.context(**{"bits": 4, **more}))
        return program, result.metrics

    def loss(self, program: Program) -> float:
        with as_emitted(program):
            return self.reference.loss(program)

    def prompts(self) -> list[tuple[Tensor, ...]]:
        ids = torch.cat([b.inputs[0] for b in self.held])[:4, :20]
        return [decoder_batches(self.program, ids[i : i + 2], 2)[0].inputs for i in (0, 2)]


@pytest.fixture(scope="module")
def carved(checkpoint: Path) -> Carved:
    return Carved(checkpoint)


@pytest.fixture(scope="module")
def four(carved: Carved) -> tuple[Program, Any]:
    return carved.quantized()


def mixed(program: Program) -> dict[str, Widths]:
    """Every width there is: 8 for shared experts and attention, experts of 2 and 4 bits."""
    widths = {n.name: Widths(8) for n in program.linears}
    for site in program.carved:
        widths[site.name] = Widths(8, (2, 4, 2, 4, 4, 2))
    return widths


def test_it_is_better_than_rounding_and_than_gptq(
    carved: Carved, four: tuple[Program, Any]
) -> None:
    plain = carved.loss(carved.quantized(QuantizeConfig(method="rtn", tokens=64))[0])
    gptq = carved.loss(carved.quantized(QuantizeConfig(method="gptq", tokens=2_000))[0])
    ours = carved.loss(four[0])
    # Random weights and two layers: far less to gain than from a trained model.
    assert 0 < ours < 0.8 * plain
    assert ours < gptq


def test_eight_bits_cost_next_to_nothing(carved: Carved, four: tuple[Program, Any]) -> None:
    eight, _ = carved.quantized(bits=8)
    assert carved.loss(eight) < 0.1 * carved.loss(four[0])


def test_every_weight_is_on_its_grid(carved: Carved, four: tuple[Program, Any]) -> None:
    program, metrics = four
    grids = list(grids_of(program))
    assert {g.bits for g in grids} == {4}
    assert [n.name for n in program.linears if n.grid is None] == []
    site = program.carved[0].routed
    assert site is not None
    assert len(site.grids["expert_up"]) == site.num_experts
    for e, grid in enumerate(site.grids["expert_down"]):
        want = grid.round(site.expert_down[e])
        assert torch.equal(want.to(site.expert_down.dtype), site.expert_down[e])
    assert metrics["effective_bits"] == [5.0]


def test_the_program_before_is_left_alone(carved: Carved) -> None:
    before = {k: v.clone() for k, v in carved.program.module.named_parameters()}
    carved.quantized(QuantizeConfig(method="rtn", tokens=64))
    after = dict(carved.program.module.named_parameters())
    assert before.keys() == after.keys()
    assert all(torch.equal(v, after[k]) for k, v in before.items())
    assert not list(grids_of(carved.program))


def test_metrics_tell_each_expert(four: tuple[Program, Any]) -> None:
    program, metrics = four
    for site in program.carved:
        e = metrics["experts"][site.name]
        assert len(e["sqnr"]) == SPLIT.num_experts
        assert all(0 < v < 60 for v in e["sqnr"])
        # Eight bits of the activations are far finer than four of the weights.
        assert all(a > w for a, w in zip(e["sqnr_activations"], e["sqnr_weights"], strict=True))
        assert all(0 < p < 1 for p in e["prior"])
        assert sum(e["tokens"]) > 1_000
        assert 0.3 < metrics["agreement"][site.name] <= 1
        assert metrics["jaccard"][site.name] >= metrics["agreement"][site.name]
        tried = metrics["alignment"][site.name]
        assert set(tried) == {"former", "ridge", "kl"}
        assert metrics["agreement"][site.name] == max(tried.values())
        assert metrics["realigned"][site.name] == (max(tried.values()) > tried["former"])


def test_sorting_neurons_changes_nothing(carved: Carved) -> None:
    site = carved.program.carved[0]
    assert site.routed is not None
    x = carved.inputs.of(site, 200)
    new = sorted_neurons(site.routed, x)
    assert tiny.relative(new(x), site.routed(x)) < 1e-5
    hidden = new.merged().hidden(x).square().mean(0)
    own = hidden[: new.shared_size]
    assert bool((own[:-1] >= own[1:] - 1e-6).all())
    assert not torch.equal(new.expert_up, site.routed.expert_up)


def chooses(carved: Carved, kind: str) -> tuple[RoutedFFN, Tensor]:
    """A routed FFN that chooses by a threshold or always two experts, and inputs of it."""
    site = carved.program.carved[0]
    assert site.routed is not None
    assert site.routed.dynamic
    routed = site.routed.with_top_k(2) if kind == "fixed" else site.routed
    return routed, carved.inputs.of(site, 4_000)


def distorted(x: Tensor, how: str) -> Tensor:
    """Inputs as something before the router might leave them."""
    if how == "turned":
        return x * 1.2 + 0.05 * x.roll(1, 1) + 0.1
    if how == "rounded":
        return (2.5 * x).round() / 2.5
    generator = torch.Generator().manual_seed(0)
    return x + 0.1 * x.std() * torch.randn(x.shape, generator=generator)


@pytest.mark.parametrize("kind", ["threshold", "fixed"])
def test_margins_are_positive_where_an_expert_is_chosen(carved: Carved, kind: str) -> None:
    routed, x = chooses(carved, kind)
    at = margins(routed.logits(x), routed.top_k, routed.dynamic)
    assert torch.equal(at > 0, routed.chosen(x))
    everyone = routed.with_top_k(routed.num_experts)
    assert bool((margins(everyone.logits(x), everyone.top_k, False) > 0).all())


@pytest.mark.parametrize("kind", ["threshold", "fixed"])
@pytest.mark.parametrize("how", ["turned", "rounded", "noisy"])
def test_a_realigned_router_never_agrees_less(carved: Carved, kind: str, how: str) -> None:
    before, x = chooses(carved, kind)
    assert realigned(before, x, x).routed is before
    now = distorted(x, how)
    fit = realigned(before, now, x)
    held = folds(len(x))[1]
    got = agreement(fit.routed.chosen(now[held]), before.chosen(x[held]))
    assert got == max(fit.agreement.values())
    assert (fit.routed is before) == (got == fit.agreement["former"])
    again = realigned(before, now, x).routed
    assert torch.equal(again.router, fit.routed.router)
    if kind == "threshold":  # the budget is kept: as many experts a token as before
        counts = [r.chosen(t).sum(1).float().mean() for r, t in ((fit.routed, now), (before, x))]
        assert float((counts[0] - counts[1]).abs()) < 0.05


@pytest.mark.parametrize("kind", ["threshold", "fixed"])
def test_divergence_finds_what_ridge_leaves(carved: Carved, kind: str) -> None:
    before, x = chooses(carved, kind)
    now = distorted(x, "turned")
    tried = realigned(before, now, x).agreement
    assert tried["former"] < tried["ridge"] < tried["kl"]
    assert "kl" not in realigned(before, now, x, steps=0).agreement


def test_a_router_of_representative_neurons_is_left_alone(carved: Carved) -> None:
    routed, x = chooses(carved, "fixed")
    analytical = replace(routed, router_gate=routed.router.roll(1, 1))
    fit = realigned(analytical, distorted(x, "turned"), x)
    assert fit.routed is analytical
    assert fit.agreement == {}


def test_starved_experts_lean_on_the_others(carved: Carved) -> None:
    full = carved.loss(carved.quantized(QuantizeConfig(tokens=4_000))[0])
    few = carved.loss(carved.quantized(QuantizeConfig(tokens=512))[0])
    assert few < 2.0 * full
    alone = carved.loss(carved.quantized(QuantizeConfig(method="gptq", tokens=512))[0])
    assert few < alone


@pytest.mark.parametrize("case", ["four", "mixed"])
def test_emitted_as_it_was_fitted(
    case: str, carved: Carved, four: tuple[Program, Any], tmp_path: Path
) -> None:
    program = four[0]
    if case == "mixed":
        program, _ = carved.quantized(widths=mixed(carved.program))
    emit(program, tmp_path / "m.onnx", 4)
    prompts = carved.prompts()
    parity = check_parity(program, tmp_path / "m.onnx", prompts, 4)
    assert parity.top1_agreement > 0.9
    feeds = feeds_of(program, prompts[0], [*program.inputs, "attention_mask"])
    found = check_nodes(tmp_path / "m.onnx", feeds)
    model = onnx.load(tmp_path / "m.onnx", load_external_data=False)
    nodes = [n for n in model.graph.node if n.op_type in ("MatMulNBits", "QMoE")]
    assert found.nodes == len(nodes)
    assert found.median < BOUND
    moe = [n for n in nodes if n.op_type == "QMoE"]
    assert len(moe) == len(program.carved) * (2 if case == "mixed" else 1)
    assert [p.name for p in tmp_path.iterdir() if "probe" in p.name] == []


def test_an_expert_that_no_token_takes_is_checked_too(
    captured: Callable[[str], tiny.Captured], tmp_path: Path
) -> None:
    found = captured("bert")
    site = found.program.sites[0]
    routed = tiny.random_routed(site, dynamic=True)
    assert routed.router_bias is not None
    starved = routed.router_bias.clone()
    starved[1] = -1e6
    found.program.set_routed(site, replace(routed, router_bias=starved))
    emit(found.program, tmp_path / "m.onnx", 8)
    model = onnx.load(tmp_path / "m.onnx", load_external_data=False)
    nodes = [n for n in model.graph.node if n.op_type in ("MatMulNBits", "QMoE")]
    feeds = feeds_of(found.program, found.inputs, [*found.program.inputs, "attention_mask"])
    assert check_nodes(tmp_path / "m.onnx", feeds).nodes == len(nodes)


def test_a_damaged_weight_is_found(
    carved: Carved, four: tuple[Program, Any], tmp_path: Path
) -> None:
    program = four[0]
    path = tmp_path / "m.onnx"
    emit(program, path, 4)
    model = onnx.load(path)
    (scales,) = [i for i in model.graph.initializer if "layers.1.mlp.fc2.scales" in i.name]
    array = onnx.numpy_helper.to_array(scales).copy()
    # The kernel has its own copy of nothing: only the file's order of experts is wrong now.
    scales.CopyFrom(onnx.numpy_helper.from_array(array[::-1].copy(), scales.name))
    onnx.save(model, path)
    with pytest.raises(CarveError, match="differ"):
        check_parity(program, path, carved.prompts(), 4)


def test_a_kernel_that_computes_otherwise_is_found(
    carved: Carved, four: tuple[Program, Any], tmp_path: Path
) -> None:
    path = tmp_path / "m.onnx"
    emit(four[0], path, 4)
    model = onnx.load(path)
    for node in model.graph.node:
        for a in node.attribute:
            if a.name == "accuracy_level":
                a.i = 1  # fp32 activations
    onnx.save(model, path)
    feeds = feeds_of(four[0], carved.prompts()[0], [*four[0].inputs, "attention_mask"])
    with pytest.raises(CarveError, match="arithmetic"):
        check_nodes(path, feeds)


def one_product(weight: Tensor, grid: Grid, path: Path, accuracy_level: int) -> None:
    """Save ``y = x @ weight.T`` as a model of one node for 16 rows."""
    (n, k), real = weight.shape, onnx.TensorProto.FLOAT
    node = helper.make_node(
        "MatMulNBits",
        ["x", "w", "s"],
        ["y"],
        "product",
        domain="com.microsoft",
        K=k,
        N=n,
        bits=grid.bits,
        block_size=grid.block,
        accuracy_level=accuracy_level,
    )
    levels = pack(grid.levels(weight), grid.bits).reshape(n, k // grid.block, -1)
    constants = {"w": levels, "s": grid.scale.numpy()}
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info("x", real, [16, k])],
        [helper.make_tensor_value_info("y", real, [16, n])],
        [onnx.numpy_helper.from_array(v, name) for name, v in constants.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)


def test_activations_between_two_levels_are_taken_as_the_kernel_took_them(tmp_path: Path) -> None:
    """Levels of 8 bits with an extreme of -128, as an embedding's after a norm of equal weights."""
    torch.manual_seed(0)
    x = torch.randint(-127, 128, (16, 64)) * 0.37
    x[:, ::32] = -128 * 0.37
    x[:, 1::16] = 64 * 0.37
    weight = torch.randn(48, 64)
    grid = Grid.nearest(weight, 8)
    path = tmp_path / "m.onnx"
    one_product(weight, grid, path, accuracy_level=4)
    assert check_nodes(path, {"x": x.numpy()}).worst < BOUND
    have = torch.from_numpy(cpu_session(path).run(None, {"x": x.numpy()})[0])
    want = product(x, grid.round(weight), grid)
    assert ((have - want).norm(dim=1) / want.norm(dim=1)).median() > 10 * BOUND
    one_product(weight, grid, path, accuracy_level=1)  # fp32 activations
    with pytest.raises(CarveError, match="arithmetic"):
        check_nodes(path, {"x": x.numpy()})


def choose(carved: Carved, **limits: float) -> tuple[dict[str, Widths], Any]:
    program = carved.program.copy()
    names = {"bits": BITS, "bytes": BYTES, "reads": READS}
    context = carved.context(limits={names[k]: v for k, v in limits.items()})
    config = ChooseWidthsConfig(tokens=128)
    (result,) = PassManager([ChooseWidths(config)])(program, context)
    return context.widths, result.metrics


def test_widths_keep_every_limit(carved: Carved) -> None:
    for average in (2, 3, 4.5, 8):
        widths, metrics = choose(carved, bits=average)
        assert metrics["average"] <= average + 1e-9
        each = {b for w in widths.values() for b in (w.shared, *w.experts)}
        assert each <= {2, 4, 8}
        if average == 2:
            assert each == {average}
        for w in widths.values():
            assert len(set(w.experts)) <= 2
        assert metrics["bound"] <= metrics["predicted"] * (1 + 1e-6) + 1e-12
    _, free = choose(carved, bits=8)
    _, tight = choose(carved, bits=3)
    assert tight["predicted"] > free["predicted"]
    _, reads = choose(carved, bits=8, reads=0.5 * free["bytes"])
    assert reads["bytes"] < free["bytes"]
    with pytest.raises(UserError, match="least"):
        choose(carved, bytes=1000.0)


def test_what_has_one_input_has_one_width(carved: Carved) -> None:
    widths, _ = choose(carved, bits=4)
    for layer in range(tiny.LAYERS):
        path = f"model.layers.{layer}.self_attn"
        assert len({widths[f"{path}.{n}_proj"].shared for n in "qkv"}) == 1


@pytest.mark.parametrize("name", ["llama", "phi3", "neox", "opt"])
def test_smoothing_is_folded_away(name: str) -> None:
    program = tiny.capture(name).program
    for site in program.sites:
        program.set_routed(site, tiny.random_routed(site, dynamic=True))
    inputs = program.example
    before = program.run(*inputs)[0]
    groups = groups_of(program)
    # Phi fuses gate and up; the norms of NeoX and OPT have biases. Each layer has two.
    assert len(groups) >= 2 * tiny.LAYERS
    generator = torch.Generator().manual_seed(0)
    for group in groups:
        width = group.matrices()[0].shape[-1]
        fold(program, group, torch.randn(width, generator=generator).exp())
    assert tiny.relative(program.run(*inputs)[0], before) < 1e-4


def test_smoothing_pays_where_channels_are_unequal(carved: Carved) -> None:
    program = carved.program.copy()
    (result,) = PassManager([Smooth(SmoothConfig(tokens=512))])(program, carved.context(bits=4))
    assert all(g <= 1 for g in result.metrics["gain"].values())
    assert carved.loss(program) < 1e-4
    # Every other channel of a norm forty times too large, its columns so much too small.
    group = groups_of(program)[0]
    s = torch.ones(group.matrices()[0].shape[-1])
    s[::2] = 1 / 40
    fold(program, group, s)
    (result,) = PassManager([Smooth(SmoothConfig(tokens=512))])(program, carved.context(bits=4))
    assert result.metrics["gain"][group.name] < 0.7


def test_blocks_of_128_where_all_widths_are_multiples(carved: Carved) -> None:
    program, metrics = carved.quantized(QuantizeConfig(tokens=512, block=128))
    # Nothing in this model is a multiple of 128 but the width of the shared expert's neurons.
    assert {g.block for g in grids_of(program)} == {32}
    assert metrics["effective_bits"] == [5.0]
    with pytest.raises(UserError, match="neither 32 nor 128"):
        carved.quantized(QuantizeConfig(block=64))


def test_widths_that_are_no_whole_blocks_are_left_to_the_emitter(
    carved: Carved, tmp_path: Path
) -> None:
    program = carved.program.copy()
    site = program.carved[1]
    program.set_routed(site, tiny.random_routed(site, num_experts=4, expert_size=24))
    kept = site.routed
    assert kept is not None
    limits = {BITS: 4.0}
    context = carved.context(bits=4, limits=limits)
    chosen = [ChooseWidths(ChooseWidthsConfig(tokens=128)), Quantize(QuantizeConfig(tokens=512))]
    PassManager(chosen)(program, context)
    assert site.name not in context.widths
    assert site.routed is kept
    assert program.carved[0].routed is not None
    assert program.carved[0].routed.grids
    emit(program, tmp_path / "m.onnx", 4)
    assert check_parity(program, tmp_path / "m.onnx", carved.prompts(), 4).median_error < 2e-2


def test_contracts(carved: Carved, four: tuple[Program, Any]) -> None:
    with pytest.raises(ContractError, match="width below"):
        carved.quantized(bits=16)
    with pytest.raises(UserError, match="rtn"):
        carved.quantized(QuantizeConfig(method="awq"))
    with pytest.raises(ContractError, match="limit"):
        choose(carved)


def test_a_tied_head_and_table_part(carved: Carved) -> None:
    program = carved.program.copy()
    (lookup,) = program.lookups
    head = program.linears[-1]
    shared = lookup.weight
    grid = Grid.nearest(shared, 8)
    program.set_lookup(lookup, grid.round(shared), grid)
    head = program.linears[-1]
    assert torch.equal(head.weight, carved.program.linears[-1].weight)
    again = program.set_linear(head, head.weight * 0.5, None, Grid.nearest(head.weight * 0.5, 4))
    assert torch.equal(program.lookups[0].weight, grid.round(shared))
    assert torch.equal(program.linears[-1].weight, again.weight)
    assert program.lookups[0].grid is not None


def test_twin_walk_of_an_unchanged_program_has_nothing_to_mend(carved: Carved) -> None:
    program = carved.program.copy()
    walk = twin_walk(program, carved.batches[:1], lambda: torch.nn.functional.linear)
    seen = []
    lesson = next(walk)
    while True:
        seen.append(lesson.unit.name)
        assert torch.equal(lesson.x, lesson.reference)
        try:
            lesson = walk.send(lesson.unit)
        except StopIteration:
            break
    assert seen == [u.name for u in units_of(program)]
