"""The dialect's operators against the plainest code that does the same."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from carve import dialect
from carve.dialect import ACTIVATIONS
from carve.ffn import RoutedFFN

D, S, E, M = 12, 10, 5, 6


def routed(
    *,
    gated: bool = True,
    biases: bool = True,
    shared: bool = True,
    compensation: bool = True,
    analytical: bool = False,
    activation: str = "silu",
    top_k: int = 2,
    dtype: torch.dtype = torch.float32,
    output: int = D,
    dynamic: bool = False,
) -> RoutedFFN:
    g = torch.Generator().manual_seed(3)

    def t(present: bool, *shape: int) -> Any:
        return (0.5 * torch.randn(*shape, generator=g)).to(dtype) if present else None

    return RoutedFFN(
        t(shared and gated, S, D),
        t(shared and gated and biases, S),
        t(shared, S, D),
        t(shared and biases, S),
        t(shared, output, S),
        t(compensation or biases, output),
        t(gated, E, M, D),
        t(gated and biases, E, M),
        t(True, E, M, D),
        t(biases, E, M),
        t(True, E, output, M),
        t(compensation, E, output),
        t(True, E, D),
        t(biases, E),
        t(analytical, E, D),
        activation,
        top_k,
        dynamic,
    )


def tokens(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, D, generator=torch.Generator().manual_seed(4)).to(dtype)


def one_token(x: Tensor, r: RoutedFFN) -> Tensor:
    """The formula for one token, in scalars and vectors."""
    act = ACTIVATIONS[r.activation]

    def ffn(gate: Any, gate_bias: Any, up: Any, up_bias: Any, down: Tensor) -> Tensor:
        u = up @ x + (0 if up_bias is None else up_bias)
        if gate is None:
            return down @ act(u)
        return down @ (act(gate @ x + (0 if gate_bias is None else gate_bias)) * u)

    def of(t: Tensor | None, e: int) -> Tensor | None:
        return None if t is None else t[e]

    y = torch.zeros(r.expert_down.shape[1], dtype=x.dtype)
    if r.output_bias is not None:
        y = y + r.output_bias
    if r.shared_up is not None:
        y = y + ffn(r.shared_gate, r.shared_gate_bias, r.shared_up, r.shared_up_bias, r.shared_down)
    scores = []
    for e in range(r.num_experts):
        score = r.router[e] @ x + (0 if r.router_bias is None else r.router_bias[e])
        if r.router_gate is not None:
            score = act(r.router_gate[e] @ x) * score
        scores.append(float(score))
    best = sorted(range(r.num_experts), key=lambda e: -scores[e])[: r.top_k]
    if r.dynamic:
        best = [e for e in best if scores[e] > 0]
    for e in best:
        y = y + ffn(
            of(r.expert_gate, e),
            of(r.expert_gate_bias, e),
            r.expert_up[e],
            of(r.expert_up_bias, e),
            r.expert_down[e],
        )
        if r.expert_bias is not None:
            y = y + r.expert_bias[e]
    return y


CASES: dict[str, dict[str, Any]] = {
    "gated": {},
    "plain": {"gated": False, "activation": "relu"},
    "no biases": {"biases": False},
    "no compensation": {"compensation": False},
    "bare": {"biases": False, "compensation": False, "shared": False},
    "no shared": {"shared": False},
    "analytical gated": {"analytical": True, "biases": False},
    "analytical plain": {"gated": False, "activation": "gelu"},
    "every expert": {"top_k": E},
    "dynamic": {"top_k": 4, "dynamic": True},
    "one expert": {"top_k": 1, "activation": "gelu_tanh"},
}


@pytest.mark.parametrize("case", CASES)
def test_routed_ffn_is_the_formula(case: str) -> None:
    r, x = routed(**CASES[case]), tokens(4, 7)
    want = torch.stack([one_token(t, r) for t in x.flatten(0, 1)]).view(4, 7, D)
    torch.testing.assert_close(
        torch.ops.carve.routed_ffn(x, *values_of(r)), want, rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(r(x), want, rtol=1e-5, atol=1e-5)


def values_of(r: RoutedFFN) -> tuple[Any, ...]:
    return tuple(r.arguments().values())


def test_routed_ffn_of_one_token_and_of_none() -> None:
    r = routed()
    x = tokens(1)
    torch.testing.assert_close(r(x[0]), one_token(x[0], r), rtol=1e-5, atol=1e-5)
    assert r(x[:0]).shape == (0, D)


def test_each_token_is_routed_alone() -> None:
    r, x = routed(), tokens(9)
    alone = torch.cat([r(t[None]) for t in x])
    torch.testing.assert_close(r(x), alone, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(r(x.flip(0)).flip(0), alone, rtol=1e-5, atol=1e-5)


def test_selection() -> None:
    scores = torch.tensor([[0.1, 0.9, -1.0, 0.5], [3.0, 2.0, 1.0, 0.0]])
    want = [[False, True, False, True], [True, True, False, False]]
    assert dialect.select(scores, 2).tolist() == want


def test_router_is_fp32_whatever_the_weights() -> None:
    r = routed(dtype=torch.bfloat16)
    x = tokens(6)
    assert r.logits(x).dtype == torch.float32
    want = x @ r.router.float().T + r.router_bias.float()
    torch.testing.assert_close(r.logits(x), want)
    y = r(x)
    assert y.dtype == torch.float32
    exact = replace(r, **{k: v.float() for k, v in r.tensors().items()})(x)
    assert float((y - exact).norm() / exact.norm()) < 2e-2


def test_linear_rule_sees_every_product_but_the_router() -> None:
    r, x = routed(), tokens(6)
    seen = []

    def rule(inputs: Tensor, weight: Tensor) -> Tensor:
        seen.append(weight.shape)
        return torch.nn.functional.linear(inputs, weight)

    want = r(x)
    with dialect.linear_rule(rule):
        torch.testing.assert_close(r(x), want)
    used = int(dialect.select(r.logits(x), r.top_k).any(0).sum())
    assert len(seen) == 3 + 3 * used
    assert (E, D) not in seen
    count = len(seen)
    r(x)
    assert len(seen) == count


def test_counts() -> None:
    r = routed()
    assert (r.num_experts, r.expert_size, r.shared_size) == (E, M, S)
    assert (r.active_size, r.intermediate_size) == (S + 2 * M, S + E * M)
    assert r.macs == 3 * D * (S + 2 * M) + E * D
    plain = routed(gated=False, shared=False)
    assert plain.macs == 2 * D * 2 * M + E * D


# Gradients


def with_grad(values: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(v.clone().requires_grad_() if isinstance(v, Tensor) else v for v in values)


@pytest.mark.parametrize("case", CASES)
def test_routed_ffn_gradient_is_the_plain_functions(case: str) -> None:
    values = (tokens(3, 5), *values_of(routed(**CASES[case])))
    weight = torch.randn(3, 5, D)
    found = []
    for function in (torch.ops.carve.routed_ffn, dialect.routed_ffn):
        args = with_grad(values)
        (function(*args) * weight).sum().backward()
        found.append([v.grad for v in args if isinstance(v, Tensor)])
    assert any(g is not None and g.abs().max() > 0 for g in found[0])
    for got, want in zip(*found, strict=True):
        if want is None:
            assert got is None or not got.any()
        else:
            torch.testing.assert_close(got, want)


def test_routed_ffn_gradient_is_the_numeric_one() -> None:
    r = routed(dtype=torch.float64)
    args = with_grad((tokens(4, dtype=torch.float64), *values_of(r)))
    moving = {"router", "router_bias"}
    for name, value in zip(("x", *r.arguments()), args, strict=True):
        if name in moving:
            value.requires_grad_(False)
    assert torch.autograd.gradcheck(torch.ops.carve.routed_ffn, args)


# Attention


def naive(
    q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor, scale: float, window: int, cap: float
) -> Tensor:
    keys, values = torch.cat((pk, k), 2), torch.cat((pv, v), 2)
    past, group = pk.shape[2], q.shape[1] // k.shape[1]
    out = torch.zeros_like(q)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(q.shape[2]):
                at = past + i
                first = max(0, at - window + 1) if window > 0 else 0
                s = keys[b, h // group, first : at + 1] @ q[b, h, i] * scale
                if cap > 0:
                    s = cap * torch.tanh(s / cap)
                out[b, h, i] = s.softmax(0) @ values[b, h // group, first : at + 1]
    return out


def attention_inputs(
    past: int, new: int, heads: int, kv: int, width: int = 6
) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(5)
    shapes = [(heads, new), (kv, new), (kv, new), (kv, past), (kv, past)]
    return tuple(torch.randn(2, n, t, width, generator=g) for n, t in shapes)


@pytest.mark.parametrize("window", [0, 1, 3, 100])
@pytest.mark.parametrize("cap", [0.0, 1.5])
@pytest.mark.parametrize("past, new", [(0, 7), (5, 1), (5, 4), (0, 1)])
@pytest.mark.parametrize("heads, kv", [(4, 4), (4, 2), (6, 1)])
def test_attention_is_the_naive_one(
    window: int, cap: float, past: int, new: int, heads: int, kv: int
) -> None:
    args = attention_inputs(past, new, heads, kv)
    out, keys, values = torch.ops.carve.attention(*args, 0.4, window, cap)
    torch.testing.assert_close(out, naive(*args, 0.4, window, cap), rtol=1e-5, atol=1e-5)
    assert torch.equal(keys, torch.cat((args[3], args[1]), 2))
    assert torch.equal(values, torch.cat((args[4], args[2]), 2))


@pytest.mark.parametrize("past, window, cap", [(0, 0, 0.0), (3, 2, 0.0), (3, 0, 1.5)])
def test_attention_gradient_is_the_numeric_one(past: int, window: int, cap: float) -> None:
    small = attention_inputs(past, 3, 2, 1, width=2)
    args = with_grad(tuple(t[:1].double() for t in small))
    assert torch.autograd.gradcheck(
        lambda *t: torch.ops.carve.attention(*t, 0.7, window, cap), args
    )


# What torch asks of an operator: schema, shapes of the fake version, autograd, tracing

CHECKS = (
    "test_schema",
    "test_faketensor",
    "test_autograd_registration",
    "test_aot_dispatch_dynamic",
)


@pytest.mark.parametrize("case", ["gated", "plain", "bare"])
def test_routed_ffn_fake_is_the_eager_one(case: str) -> None:
    args = (tokens(2, 3), *values_of(routed(**CASES[case])))
    torch.library.opcheck(torch.ops.carve.routed_ffn.default, args, test_utils=CHECKS)


@pytest.mark.parametrize("past", [0, 5])
@pytest.mark.parametrize("cap", [0.0, 1.5])
def test_attention_fake_is_the_eager_one(past: int, cap: float) -> None:
    args = (*attention_inputs(past, 4, 4, 2), 0.4, 3, cap)
    torch.library.opcheck(torch.ops.carve.attention.default, args, test_utils=CHECKS)
