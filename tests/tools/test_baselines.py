"""The peers of ``tools/baselines.py`` split the neurons and leave the dense FFN intact."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from carve.ffn import DenseFFN, RoutedFFN

D, INTERMEDIATE, SLICES, SHARED = 24, 135, 8, 3
EXPERTS, M = SLICES - SHARED, INTERMEDIATE // SLICES


def _load() -> ModuleType:
    path = Path(__file__).parents[2] / "tools" / "baselines.py"
    spec = importlib.util.spec_from_file_location("carve_tools_baselines", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


baselines = _load()
METHODS: dict[str, Callable[..., RoutedFFN]] = {
    "cmoe": baselines.cmoe,
    "cmoe-normalized": lambda *a, **k: baselines.cmoe(*a, **k, normalize=True),
    "random": lambda *a, **k: baselines.random_split(*a, **{"seed": 0, **k}),
}


def dense_ffn(kind: str) -> DenseFFN:
    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape) / shape[-1] ** 0.5

    torch.manual_seed(0)
    gated = kind == "gated"
    return DenseFFN(
        gate=draw(INTERMEDIATE, D) if gated else None,
        gate_bias=None,
        up=draw(INTERMEDIATE, D),
        up_bias=None if gated else draw(INTERMEDIATE),
        down=draw(D, INTERMEDIATE),
        down_bias=None if gated else draw(D),
        activation="silu" if gated else "gelu",
    )


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3000, D, generator=torch.Generator().manual_seed(1))


cases = pytest.mark.parametrize(
    ("method", "kind"), [(m, k) for m in METHODS for k in ("gated", "plain")]
)


@cases
def test_all_experts_equal_dense(method: str, kind: str, x: Tensor) -> None:
    dense = dense_ffn(kind)
    routed = METHODS[method](dense, x, num_slices=SLICES, num_shared=SHARED, top_k=EXPERTS)
    torch.testing.assert_close(routed(x), dense(x), rtol=1e-5, atol=1e-5)
    fewer = routed.with_top_k(EXPERTS - 1)
    assert (fewer(x) - dense(x)).abs().max() > 1e-2


@cases
def test_every_neuron_once(method: str, kind: str, x: Tensor) -> None:
    dense = dense_ffn(kind)
    routed = METHODS[method](dense, x, num_slices=SLICES, num_shared=SHARED, top_k=2)
    assert (routed.num_experts, routed.expert_size) == (EXPERTS, M)
    assert routed.shared_size == INTERMEDIATE - EXPERTS * M  # three slices and the remainder
    assert routed.intermediate_size == INTERMEDIATE
    rows = torch.cat((routed.shared_up, routed.expert_up.flatten(0, 1)))
    columns = torch.cat((routed.shared_down, routed.expert_down.transpose(0, 1).flatten(1)), 1)
    neuron = torch.cdist(rows, dense.up).argmin(1)
    assert neuron.sort().values.equal(torch.arange(INTERMEDIATE))
    assert rows.equal(dense.up[neuron])
    assert columns.equal(dense.down[:, neuron])
    assert routed.router.shape == (EXPERTS, D)
    assert routed.router.dtype == torch.float32
    assert routed.expert_bias is None and routed.output_bias is dense.down_bias


def test_cmoe_shares_the_busiest_and_routes_by_a_member(x: Tensor) -> None:
    dense = dense_ffn("gated")
    routed = baselines.cmoe(dense, x, num_slices=SLICES, num_shared=SHARED, top_k=2)
    h = dense.hidden(x)
    marks = torch.zeros_like(h).scatter_(1, h.abs().topk(10, dim=-1).indices, 1.0)
    neuron = torch.cdist(torch.cat((routed.shared_up, routed.expert_up.flatten(0, 1))), dense.up)
    neuron = neuron.argmin(1)
    rate = marks.mean(0)[neuron]
    shared, experts = rate.split([routed.shared_size, EXPERTS * M])
    assert shared.min() >= experts.max()

    groups = neuron[routed.shared_size :].view(EXPERTS, M)
    for e in range(EXPERTS):
        columns = marks[:, groups[e]].T
        nearest = torch.cdist(columns.mean(0, keepdim=True), columns, p=1).argmin()
        assert routed.router[e].equal(dense.up[groups[e, nearest]])
        assert routed.router_gate[e].equal(dense.gate[groups[e, nearest]])
    representatives = torch.cdist(routed.router, dense.up).argmin(1)
    torch.testing.assert_close(routed.logits(x), h[:, representatives])


def test_cmoe_groups_what_fires_together() -> None:
    # Five families of neurons, each with a direction of its own; a token fires one family. The
    # first members of all families fire together on some more tokens, so they start the centroids.
    torch.manual_seed(2)
    basis = torch.linalg.qr(torch.randn(D, D)).Q[: EXPERTS + 1]
    family = torch.arange(EXPERTS).repeat(M)
    up = basis[family] + 0.02 * torch.randn(EXPERTS * M, D)
    up[:EXPERTS] += basis[EXPERTS]
    dense = DenseFFN(None, None, up, None, torch.randn(D, EXPERTS * M), None, "relu")
    x = basis[torch.arange(600) % (EXPERTS + 1)] + 0.02 * torch.randn(600, D)
    routed = baselines.cmoe(dense, x, num_slices=EXPERTS, num_shared=0, top_k=1, k_a=M)
    found = family[torch.cdist(routed.expert_up.flatten(0, 1), up).argmin(1)].view(EXPERTS, M)
    assert routed.shared_up is None
    assert all(row.unique().numel() == 1 for row in found)
    assert found[:, 0].unique().numel() == EXPERTS
    torch.testing.assert_close(routed.with_top_k(EXPERTS)(x), dense(x))


def test_random_router_is_balanced(x: Tensor) -> None:
    routed = METHODS["random"](
        dense_ffn("gated"), x + 3.0, num_slices=SLICES, num_shared=SHARED, top_k=2
    )
    chosen = routed.logits(x + 3.0).topk(2).indices.flatten().bincount(minlength=EXPERTS)
    assert (chosen / len(x) - 2 / EXPERTS).abs().max() < 0.1


def test_seed_decides(x: Tensor) -> None:
    dense = dense_ffn("gated")
    kwargs = {"num_slices": SLICES, "num_shared": SHARED, "top_k": 2}
    for method in METHODS.values():
        one, two = (method(dense, x, **kwargs, seed=0) for _ in range(2))
        assert all(torch.equal(a, two.tensors()[k]) for k, a in one.tensors().items())
    other = baselines.random_split(dense, x, **kwargs, seed=1)
    assert not torch.equal(other.router, one.router)


def test_bad_sizes(x: Tensor) -> None:
    dense = dense_ffn("gated")
    for sizes in ({"num_shared": SLICES, "top_k": 1}, {"num_shared": 3, "top_k": 6}):
        with pytest.raises(ValueError, match="do not fit"):
            baselines.random_split(dense, x, num_slices=SLICES, seed=0, **sizes)
