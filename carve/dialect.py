"""The dialect between passes and emitters: operators that an FX graph may hold beside ATen's.

Each operator is registered with ``torch.library`` (eager, fake, autograd). The eager
implementation is the specification: an emitter that lowers an operator has to match it.

Importing this module registers the operators.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "relu6": F.relu6,
    "elu": F.elu,
    "leaky_relu": F.leaky_relu,
    "mish": F.mish,
    "softplus": F.softplus,
    "hardswish": F.hardswish,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "identity": lambda x: x,
}
"""Elementwise functions that the routed operator knows by name."""

_LIB = torch.library.Library("carve", "DEF")


LinearRule = Callable[[Tensor, Tensor], Tensor]
_RULE: ContextVar[LinearRule | None] = ContextVar("carve_linear_rule", default=None)


@contextmanager
def linear_rule(rule: LinearRule) -> Iterator[None]:
    """Have every product with a weight computed by ``rule(x, weight)`` in this context.

    So a program can be run in a target's arithmetic without being rewritten; routers stay fp32.
    """
    token = _RULE.set(rule)
    try:
        yield
    finally:
        _RULE.reset(token)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias`` in the weight's own precision, result in ``x``'s dtype.

    Weights stay as the checkpoint holds them (bf16 or fp32): a bf16 weight is multiplied in bf16,
    which needs no copy of it.
    """
    rule = _RULE.get()
    if rule is not None:
        y = rule(x, weight)
        return y if bias is None else y + bias.to(x.dtype)
    if weight.dtype == x.dtype:
        return F.linear(x, weight, bias)
    y = stored_product(x, weight)
    return y if bias is None else y + bias.to(x.dtype)


def stored_product(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight.T`` in the weight's own precision, result in ``x``'s dtype; no rule is asked."""
    return F.linear(x.to(weight.dtype), weight).to(x.dtype)


def hidden(
    x: Tensor,
    gate: Tensor | None,
    gate_bias: Tensor | None,
    up: Tensor,
    up_bias: Tensor | None,
    activation: str,
) -> Tensor:
    """Hidden activations of an FFN: ``act(x W_g) * (x W_u)`` when gated, else ``act(x W_u)``.

    Shapes: ``x`` ``[..., d]``, ``gate`` and ``up`` ``[m, d]``, biases ``[m]``; result ``[..., m]``.
    """
    act = ACTIVATIONS[activation]
    if gate is None:
        return act(linear(x, up, up_bias))
    return act(linear(x, gate, gate_bias)) * linear(x, up, up_bias)


def router_logits(
    x: Tensor,
    router: Tensor,
    router_bias: Tensor | None,
    router_gate: Tensor | None,
    activation: str,
) -> Tensor:
    """Scores that choose the experts, always in fp32: bf16 rounding flips a top-k.

    Linear router: ``x W_r + b_r``. With ``router_gate`` (analytical router) the scores are the
    hidden activations of one representative neuron an expert: ``act(x W_rg) * (x W_r)``.

    Shapes: ``x`` ``[..., d]``, ``router`` and ``router_gate`` ``[E, d]``; result ``[..., E]``.
    """
    xf = x.float()
    scores = F.linear(xf, router.float(), None if router_bias is None else router_bias.float())
    if router_gate is not None:
        scores = ACTIVATIONS[activation](F.linear(xf, router_gate.float())) * scores
    return scores


def select(logits: Tensor, top_k: int, dynamic: bool = False) -> Tensor:
    """Boolean mask ``[..., E]`` of the ``top_k`` largest scores of each token.

    With ``dynamic`` only the positive ones among them, so that an easy token takes fewer experts;
    an absolute threshold is part of the router's bias.
    """
    chosen = logits.topk(top_k, dim=-1).indices
    mask = torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, chosen, True)
    return mask & (logits > 0) if dynamic else mask


_LIB.define(
    "routed_ffn(Tensor x, Tensor? shared_gate, Tensor? shared_gate_bias, Tensor? shared_up, "
    "Tensor? shared_up_bias, Tensor? shared_down, Tensor? output_bias, Tensor? expert_gate, "
    "Tensor? expert_gate_bias, Tensor expert_up, Tensor? expert_up_bias, Tensor expert_down, "
    "Tensor? expert_bias, Tensor router, Tensor? router_bias, Tensor? router_gate, "
    "str activation, int top_k, bool dynamic) -> Tensor"
)


def routed_ffn(
    x: Tensor,
    shared_gate: Tensor | None,
    shared_gate_bias: Tensor | None,
    shared_up: Tensor | None,
    shared_up_bias: Tensor | None,
    shared_down: Tensor | None,
    output_bias: Tensor | None,
    expert_gate: Tensor | None,
    expert_gate_bias: Tensor | None,
    expert_up: Tensor,
    expert_up_bias: Tensor | None,
    expert_down: Tensor,
    expert_bias: Tensor | None,
    router: Tensor,
    router_bias: Tensor | None,
    router_gate: Tensor | None,
    activation: str,
    top_k: int,
    dynamic: bool,
) -> Tensor:
    """An FFN as one shared expert and routed experts with mean compensation.

    ``y(x) = FFN_s(x) + b + sum over e in T(x) of (FFN_e(x) + b_e)``, ``T(x)`` the ``top_k``
    experts with the largest router scores (``dynamic``: those among them whose score is positive),
    each with weight exactly 1. ``b`` (``output_bias``)
    holds the dense output bias and the sum of the experts' means ``c_e``; ``b_e``
    (``expert_bias``) is ``-c_e``, so an expert that is left out leaves its mean behind.

    Shapes: ``x`` ``[..., d]``; shared in-projections ``[s, d]``, ``shared_down`` ``[d, s]``;
    ``expert_gate``/``expert_up`` ``[E, m, d]``, their biases ``[E, m]``, ``expert_down``
    ``[E, d, m]``, ``expert_bias`` ``[E, d]``, ``output_bias`` ``[d]``; router as in
    `router_logits`. Result like ``x``. Sources: CMoE (arXiv 2502.04416) for the construction; the
    compensation is carve's own.
    """
    flat = x.reshape(-1, x.shape[-1])
    logits = router_logits(flat, router, router_bias, router_gate, activation)
    y = chosen_ffn(
        flat,
        select(logits, top_k, dynamic),
        shared_gate,
        shared_gate_bias,
        shared_up,
        shared_up_bias,
        shared_down,
        output_bias,
        expert_gate,
        expert_gate_bias,
        expert_up,
        expert_up_bias,
        expert_down,
        expert_bias,
        activation,
    )
    return y.reshape(x.shape)


def chosen_ffn(
    flat: Tensor,
    chosen: Tensor,
    shared_gate: Tensor | None,
    shared_gate_bias: Tensor | None,
    shared_up: Tensor | None,
    shared_up_bias: Tensor | None,
    shared_down: Tensor | None,
    output_bias: Tensor | None,
    expert_gate: Tensor | None,
    expert_gate_bias: Tensor | None,
    expert_up: Tensor,
    expert_up_bias: Tensor | None,
    expert_down: Tensor,
    expert_bias: Tensor | None,
    activation: str,
    weights: Tensor | None = None,
) -> Tensor:
    """`routed_ffn` of rows ``flat`` ``[T, d]`` whose experts ``chosen`` ``[T, E]`` are known.

    With ``weights`` ``[T, E]`` they do not count 1 each, as in other engines' arithmetic.
    """
    if shared_up is not None and shared_down is not None:
        h = hidden(flat, shared_gate, shared_gate_bias, shared_up, shared_up_bias, activation)
        y = linear(h, shared_down, output_bias)
    else:
        y = (
            torch.zeros_like(flat)
            if output_bias is None
            else output_bias.to(flat.dtype).repeat(len(flat), 1)
        )
    for e in range(expert_up.shape[0]):
        rows = chosen[:, e].nonzero().squeeze(1)
        if rows.numel() == 0:
            continue
        h = hidden(
            flat.index_select(0, rows),  # for indexing has a slower gradient
            None if expert_gate is None else expert_gate[e],
            None if expert_gate_bias is None else expert_gate_bias[e],
            expert_up[e],
            None if expert_up_bias is None else expert_up_bias[e],
            activation,
        )
        out = linear(h, expert_down[e], None if expert_bias is None else expert_bias[e])
        # In place: another copy of all rows for every expert takes as long as its products.
        y.index_add_(0, rows, out if weights is None else out * weights[rows, e, None])
    return y


_LIB.impl("routed_ffn", routed_ffn, "CompositeExplicitAutograd")


@torch.library.register_fake("carve::routed_ffn")  # type: ignore[untyped-decorator]
def _(x: Tensor, *args: object) -> Tensor:
    return torch.empty_like(x)


def _differentiable(name: str, function: Callable[..., object]) -> None:
    """Give an operator its gradient by recomputation: the eager code is differentiable."""

    def remember(ctx: Any, inputs: tuple[object, ...], output: object) -> None:
        ctx.save_for_backward(*(v for v in inputs if isinstance(v, Tensor)))
        ctx.template = [None if isinstance(v, Tensor) else (v,) for v in inputs]

    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        args = [next(saved) if t is None else t[0] for t in ctx.template]
        needed = [i for i, need in enumerate(ctx.needs_input_grad) if need]
        with torch.enable_grad():
            for i in needed:
                args[i] = args[i].detach().requires_grad_()
            y = function(*args)
            outputs = [y] if isinstance(y, Tensor) else list(y)  # type: ignore[call-overload]
            pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None]
            found = torch.autograd.grad(
                [o for o, _ in pairs],
                [args[i] for i in needed],
                [g for _, g in pairs],
                allow_unused=True,
            )
        result: list[Tensor | None] = [None] * len(args)
        for i, g in zip(needed, found, strict=True):
            result[i] = g
        return tuple(result)

    torch.library.register_autograd(f"carve::{name}", backward, setup_context=remember)


_differentiable("routed_ffn", routed_ffn)

_LIB.define(
    "attention(Tensor query, Tensor key, Tensor value, Tensor past_key, Tensor past_value, "
    "float scale, int window, float softcap) -> (Tensor, Tensor, Tensor)"
)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    scale: float,
    window: int,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Causal attention with a key/value cache, grouped heads, sliding window and soft cap.

    Keys and values are ``[past; new]``; query ``i`` (absolute position ``P + i``) sees keys ``j``
    with ``j <= P + i`` and, when ``window > 0``, ``j > P + i - window``. With ``softcap > 0`` the
    scores ``s`` become ``softcap * tanh(s / softcap)``.

    Shapes: ``query`` ``[B, H, S, D]``; ``key``/``value`` ``[B, KV, S, D]``; past
    ``[B, KV, P, D]``. Returns output ``[B, H, S, D]`` and the present cache ``[B, KV, P + S, D]``.
    """
    k, v = torch.cat((past_key, key), 2), torch.cat((past_value, value), 2)
    length, total = query.shape[2], k.shape[2]
    repeat = query.shape[1] // k.shape[1]
    # After the rotation by fp32 angles releases of torch differ in the type of what was bf16.
    ks, vs = k.to(query.dtype), v.to(query.dtype)
    if length == total and softcap <= 0 and (window <= 0 or window >= total):
        if repeat > 1:
            ks, vs = (t.repeat_interleave(repeat, 1) for t in (ks, vs))
        return F.scaled_dot_product_attention(query, ks, vs, is_causal=True, scale=scale), k, v
    # The heads of a group one after the other, as more rows for the same keys: a copy of a long
    # cache for every head costs more than all else of a step.
    shape = query.shape
    query = query.unflatten(1, (k.shape[1], repeat)).flatten(2, 3)
    at = torch.arange(total - length, total, device=query.device).repeat(repeat)[:, None]
    to = torch.arange(total, device=query.device)[None]
    seen = to <= at
    if window > 0:
        seen &= to > at - window
    if softcap <= 0:
        y = F.scaled_dot_product_attention(query, ks, vs, attn_mask=seen, scale=scale)
    else:
        scores = softcap * torch.tanh(query @ ks.transpose(-1, -2) * (scale / softcap))
        y = scores.masked_fill(~seen, float("-inf")).softmax(-1) @ vs
    return y.reshape(shape), k, v


_LIB.impl("attention", attention, "CompositeExplicitAutograd")


@torch.library.register_fake("carve::attention")  # type: ignore[untyped-decorator]
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    scale: float,
    window: int,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, old, width = past_key.shape
    total = old + key.shape[2]
    return (
        torch.empty_like(query),
        key.new_empty((batch, heads, total, width)),
        value.new_empty((batch, heads, total, width)),
    )


_differentiable("attention", attention)

_LIB.define(
    "gated(Tensor y, Tensor x, Tensor position, Tensor weight, Tensor bias, Tensor? bridge_in, "
    "Tensor? bridge_gate, Tensor? bridge_out, Tensor? bridge_bias, int always) -> Tensor"
)


def gate_scores(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``x g + b`` in fp32, ``[...]`` for ``x`` ``[..., d]``: positive where a token runs.

    Shapes: ``weight`` ``[d]``, ``bias`` ``[1]`` (the threshold is part of it).
    """
    return F.linear(x.float(), weight.float()[None]).squeeze(-1) + bias.float()


def bridge(
    x: Tensor,
    bridge_in: Tensor | None,
    bridge_gate: Tensor | None,
    bridge_out: Tensor | None,
    bridge_bias: Tensor | None,
) -> Tensor:
    """What a skipped token gets: ``h C + c`` with ``h = x A``, or ``silu(x G) * (x A)``.

    Without ``bridge_in`` only ``c``, without it zero. Shapes: ``x`` ``[..., d]``, ``A`` and ``G``
    ``[r, d]``, ``C`` ``[d_out, r]``, ``c`` ``[d_out]``.
    """
    if bridge_in is not None and bridge_out is not None:
        activation = "identity" if bridge_gate is None else "silu"
        h = hidden(x, bridge_gate, None, bridge_in, None, activation)
        return linear(h, bridge_out, bridge_bias)
    zero = torch.zeros_like(x)
    return zero if bridge_bias is None else zero + bridge_bias.to(x.dtype)


def gated(
    y: Tensor,
    x: Tensor,
    position: Tensor,
    weight: Tensor,
    bias: Tensor,
    bridge_in: Tensor | None,
    bridge_gate: Tensor | None,
    bridge_out: Tensor | None,
    bridge_bias: Tensor | None,
    always: int,
) -> Tensor:
    """A block's result where the gate lets a token run, else what its bridge gives.

    ``out_t = y_t`` if ``x_t g + b > 0`` or ``position_t < always``, else ``bridge(x_t)``. Here both
    are computed; an emitter that lowers the operator computes ``y_t`` for the tokens that run.

    Shapes: ``y`` ``[B, S, d_out]``, ``x`` ``[B, S, d]``, ``position`` ``[B, S]`` int64; the others
    as in `gate_scores` and `bridge`. Sources: Mixture-of-Depths (arXiv 2404.02258) for routing
    tokens round a block, FlexiDepth (arXiv 2503.23798) for keys and values of skipped tokens.
    """
    runs = (gate_scores(x, weight, bias) > 0) | (position < always)
    other = bridge(x, bridge_in, bridge_gate, bridge_out, bridge_bias)
    return torch.where(runs[..., None].expand(y.shape), y, other.reshape(y.shape).to(y.dtype))


_LIB.impl("gated", gated, "CompositeExplicitAutograd")


@torch.library.register_fake("carve::gated")  # type: ignore[untyped-decorator]
def _(y: Tensor, *args: object) -> Tensor:
    return torch.empty_like(y)


_differentiable("gated", gated)
