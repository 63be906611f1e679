"""The front end: from a checkpoint or a module to a `Program`.

Hugging Face directories are loaded by transformers and exported with ``torch.export``; attention
with a cache is captured as the dialect's ``attention`` operator through transformers' attention
interface, so its meaning (scale, window, soft cap) is known and not guessed from masks. FFNs are
then found in the graph (`carve.match`).
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

import carve.dialect  # noqa: F401  (registers the operators)
from carve.checkpoint import Checkpoint
from carve.errors import UserError
from carve.match import find_ffn_sites, get_tensor, projection_macs
from carve.program import Kind, Program

log = logging.getLogger(__name__)
_INTERFACE = "carve_cached"
DYNAMIC = torch.export.Dim.DYNAMIC
_SMALL = 500_000_000


def _cache_of(past: tuple[Tensor, ...]) -> Any:
    """What a decoder's layers see as their cache while they are traced.

    ``update`` hands back only the new keys and values: the attention operator joins them with the
    past.
    """
    from transformers.cache_utils import DynamicCache

    class TracedCache(DynamicCache):
        def __init__(self) -> None:
            super().__init__()
            self.past = past
            self.present: dict[int, tuple[Tensor, Tensor]] = {}

        def update(
            self,
            key_states: Tensor,
            value_states: Tensor,
            layer_idx: int,
            *args: Any,
            **kwargs: Any,
        ) -> tuple[Tensor, Tensor]:
            return key_states, value_states

        def get_seq_length(self, layer_idx: int = 0) -> Any:
            return self.past[0].shape[2]

        def get_mask_sizes(self, query_length: Any, layer_idx: int) -> tuple[Any, int]:
            length = query_length if not isinstance(query_length, Tensor) else query_length.shape[0]
            return self.past[0].shape[2] + length, 0

    return TracedCache()


def _register_interface() -> None:
    """Tell transformers about the traced attention; registering twice is harmless."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        softcap: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        cache = _ACTIVE[-1]
        index = int(module.layer_idx)  # type: ignore[arg-type]
        past_key, past_value = cache.past[2 * index], cache.past[2 * index + 1]
        window = sliding_window if sliding_window is not None else 0
        out, k, v = torch.ops.carve.attention(
            query,
            key,
            value,
            past_key,
            past_value,
            query.shape[-1] ** -0.5 if scaling is None else float(scaling),
            window,
            softcap or 0.0,
        )
        cache.present[index] = (k, v)
        return out.transpose(1, 2), None

    AttentionInterface.register(_INTERFACE, attend)
    AttentionMaskInterface.register(_INTERFACE, lambda *args, **kwargs: None)


_ACTIVE: list[Any] = []


# transformers 5.24 renamed the argument.
_CACHE_NAMES = ("cache", "past_key_values")


class _Decoder(nn.Module):
    """``(input_ids, position_ids, *past) -> (logits, *present)`` over a causal model."""

    def __init__(self, model: nn.Module, names: set[str]) -> None:
        super().__init__()
        self.model, self.names = model, names
        self.cache_name = next(n for n in _CACHE_NAMES if n in names)

    def forward(self, input_ids: Tensor, position_ids: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        cache = _cache_of(past)
        _ACTIVE.append(cache)
        try:
            extra: dict[str, Any] = {self.cache_name: cache}
            if "position_ids" in self.names:
                extra["position_ids"] = position_ids
            out = self.model(input_ids=input_ids, use_cache=True, **extra)
        finally:
            _ACTIVE.pop()
        return (out.logits, *(t for i in sorted(cache.present) for t in cache.present[i]))


class _Encoder(nn.Module):
    """Positional inputs to the first result of an encoder (hidden states or logits)."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        out = self.model(**dict(zip(self.names, inputs, strict=True)))
        return (out[0],)


def _without_memory(model: nn.Module) -> dict[str, Tensor]:
    """Swap every parameter for an fp32 stand-in that takes no memory; give back the real ones.

    The graph is traced in fp32 whatever the checkpoint's dtype, and tied parameters stay tied.
    """
    real: dict[str, Tensor] = {}
    stand_in: dict[int, nn.Parameter] = {}
    for name, p in [*model.named_parameters(remove_duplicate=False)]:
        real[name] = p.detach()
        owner, _, leaf = name.rpartition(".")
        if id(p) not in stand_in:
            dtype = torch.float32 if p.dtype.is_floating_point else p.dtype
            stand_in[id(p)] = nn.Parameter(
                torch.zeros((), dtype=dtype).expand(p.shape), requires_grad=False
            )
        model.get_submodule(owner).register_parameter(leaf, stand_in[id(p)])
    for name, b in [*model.named_buffers()]:
        if b.dtype in (torch.bfloat16, torch.float16):
            owner, _, leaf = name.rpartition(".")
            persistent = leaf not in model.get_submodule(owner)._non_persistent_buffers_set
            model.get_submodule(owner).register_buffer(leaf, b.float(), persistent=persistent)
    return real


def _tidy(module: fx.GraphModule) -> None:
    """Remove what export leaves behind and no consumer needs."""
    graph = module.graph
    aten = torch.ops.aten
    for n in list(graph.nodes):
        if n.op == "call_module" or n.target in (
            aten._assert_tensor_metadata.default,
            aten._assert_scalar.default,
            torch.ops.aten.sym_constrain_range_for_size.default,
        ):
            if not n.users:
                graph.erase_node(n)
            continue
        same = n.target in (aten.to.dtype, aten._to_copy.default) and _dtype(n) == _dtype(n.args[0])
        off = n.target in (aten.dropout.default, aten.feature_dropout.default) and not n.args[2]
        fresh = n.target in (
            aten.lift_fresh_copy.default,
            aten.detach_.default,
            aten.detach.default,
            aten.alias.default,
        )
        if (same and not n.kwargs) or off or fresh:
            n.replace_all_uses_with(n.args[0])
            graph.erase_node(n)
    graph.eliminate_dead_code()
    graph.lint()
    module.recompile()


def _dtype(node: Any) -> torch.dtype | None:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value.dtype if isinstance(value, Tensor) else None


def _export(model: nn.Module, example: tuple[Tensor, ...], dynamic: Any) -> fx.GraphModule:
    """``torch.export`` without gradients; weights in the result are the real ones again."""
    real = _without_memory(model)
    try:
        with torch.no_grad():
            exported = torch.export.export(model, example, dynamic_shapes=dynamic, strict=False)
    except Exception as e:
        raise UserError(
            "capture",
            f"torch.export could not capture {type(getattr(model, 'model', model)).__name__}: "
            f"{str(e).splitlines()[0]}",
            "data-dependent Python control flow in forward() is the usual reason",
        ) from e
    module = exported.module(check_guards=False)
    if not isinstance(module, fx.GraphModule):
        raise UserError("capture", "torch.export gave no FX graph")
    shared: dict[int, nn.Parameter] = {}
    for name in [n for n, _ in module.named_parameters(remove_duplicate=False)]:
        owner, _, leaf = name.rpartition(".")
        value = real[name]
        key = value.data_ptr() if value.numel() else id(value)
        parameter = shared.setdefault(key, nn.Parameter(value, requires_grad=False))
        if parameter.shape != value.shape:
            parameter = nn.Parameter(value, requires_grad=False)
        module.get_submodule(owner).register_parameter(leaf, parameter)
    _tidy(module)
    _widen(module)
    return module


def _widen(module: fx.GraphModule) -> None:
    """Make parameters fp32, but for the large matrices of a large model.

    The graph computes in fp32. Matrices that only linears and embedding look-ups read may stay as
    they are stored (`carve.dialect.linear` multiplies in their dtype), which halves the memory of
    a bf16 checkpoint; a model below `_SMALL` parameters is not worth the rounding.
    """
    keep: set[str] = set()
    if sum(p.numel() for p in module.parameters()) >= _SMALL:
        plain = (torch.ops.aten.linear.default, torch.ops.aten.embedding.default)
        for n in module.graph.find_nodes(op="get_attr"):
            weight = all(u.target in plain and n not in u.args[2:] for u in n.users)
            value = get_tensor(module, n)
            if weight and value is not None and value.ndim == 2:
                keep.add(str(n.target))
    made: dict[int, nn.Parameter] = {}
    for name, p in [*module.named_parameters(remove_duplicate=False)]:
        if p.dtype in (torch.bfloat16, torch.float16) and name not in keep:
            owner, _, leaf = name.rpartition(".")
            wide = made.setdefault(id(p), nn.Parameter(p.detach().float(), requires_grad=False))
            module.get_submodule(owner).register_parameter(leaf, wide)


def _finish(
    module: fx.GraphModule,
    kind: Kind,
    inputs: list[str],
    outputs: list[str],
    example: tuple[Tensor, ...],
    dynamic: tuple[dict[int, Any], ...],
    config: dict[str, Any],
) -> Program:
    sites = find_ffn_sites(module)
    macs, attention = projection_macs(
        module, sites
    )  # refuses by name what is neither FFN nor attention
    if not sites:
        raise UserError(
            "no-ffn",
            "no feed-forward network was found in the captured graph",
            "carve looks for linear(act(linear(x))) and linear(act(linear(x)) * linear(x))",
        )
    return Program(
        module, kind, inputs, outputs, example, dynamic, sites, macs, config, attention=attention
    )


def capture_checkpoint(source: str | Path | Checkpoint) -> Program:
    """Capture a Hugging Face directory.

    Causal models become decoders with a cache, other text models encoders over ``input_ids`` and
    ``attention_mask``, vision models encoders over ``pixel_values``.

    Raises:
        UserError: the directory, its files or its architecture cannot be used.
    """
    checkpoint = source if isinstance(source, Checkpoint) else Checkpoint.open(source)
    return capture_transformers(load_for_capture(checkpoint))


def load_for_capture(checkpoint: Checkpoint) -> nn.Module:
    """The model of a checkpoint with the attention that `capture_transformers` looks for.

    Raises:
        UserError: the directory, its files or its architecture cannot be used.
    """
    _register_interface()
    model: nn.Module = checkpoint.load_model(_INTERFACE if checkpoint.is_decoder else "sdpa")
    return model


def capture_transformers(model: nn.Module) -> Program:
    """Capture a transformers model that is already in memory (its weights are taken over)."""
    import inspect

    _register_interface()
    model.eval()
    config: Any = model.config
    names = set(inspect.signature(model.forward).parameters)
    cached = any(n in names for n in _CACHE_NAMES)
    cached &= hasattr(config.get_text_config(), "num_attention_heads")  # Mamba's cache is another
    causal = cached and "labels" in names and not config.is_encoder_decoder
    if causal and type(model).__name__.endswith(("ForCausalLM", "LMHeadModel")):
        return _capture_decoder(model, names)
    return _capture_encoder(model, names)


def _use_attention(model: nn.Module, kind: str) -> None:
    try:
        model.set_attn_implementation(kind)  # type: ignore[operator]
    except ValueError as e:
        raise UserError(
            "architecture",
            f"{type(model).__name__} has no attention that carve can capture: {str(e)[:120]}",
            "carve takes transformers with attention and dense FFNs",
        ) from e


def _capture_decoder(model: nn.Module, names: set[str]) -> Program:
    config: Any = model.config
    _use_attention(model, _INTERFACE)
    text = config.get_text_config()
    layers = text.num_hidden_layers
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    batch, length, old = 2, 5, 7
    ids = torch.zeros((batch, length), dtype=torch.long)
    position = torch.arange(old, old + length)[None].repeat(batch, 1)
    past = tuple(torch.zeros(batch, heads, old, width) for _ in range(2 * layers))
    two = {0: DYNAMIC, 1: DYNAMIC}
    cache_axes = tuple({0: DYNAMIC, 2: DYNAMIC} for _ in past)
    wrapped = _Decoder(model, names)
    module = _export(wrapped, (ids, position, *past), (two, two, cache_axes))
    caches = [f"{i}.{kv}" for i in range(layers) for kv in ("key", "value")]
    return _finish(
        module,
        "decoder",
        ["input_ids", "position_ids", *(f"past_key_values.{c}" for c in caches)],
        ["logits", *(f"present.{c}" for c in caches)],
        (ids, position, *past),
        (two, two, *cache_axes),
        config.to_dict(),
    )


def _capture_encoder(model: nn.Module, names: set[str]) -> Program:
    config: Any = model.config
    _use_attention(model, "sdpa")
    if "pixel_values" in names:
        size = config.image_size
        size = size if isinstance(size, (tuple, list)) else (size, size)
        inputs = ["pixel_values"]
        example: tuple[Tensor, ...] = (torch.zeros(2, config.num_channels, *size),)
        dynamic: tuple[dict[int, Any], ...] = ({0: DYNAMIC},)
    elif "input_ids" in names:
        inputs = ["input_ids", "attention_mask"]
        mask = torch.ones((2, 6), dtype=torch.long)
        mask[1, 4:] = 0
        example = (torch.zeros((2, 6), dtype=torch.long), mask)
        dynamic = ({0: DYNAMIC, 1: DYNAMIC},) * 2
    else:
        raise UserError(
            "architecture",
            f"{type(model).__name__} takes neither input_ids nor pixel_values",
            "capture it with carve.capture.capture_module and example inputs",
        )
    module = _export(_Encoder(model, inputs), example, (dynamic,))
    return _finish(module, "encoder", inputs, ["output"], example, dynamic, config.to_dict())


def capture_module(
    model: nn.Module,
    example: tuple[Tensor, ...],
    dynamic: tuple[dict[int, Any], ...] | None = None,
) -> Program:
    """Capture any module that takes and gives tensors.

    Args:
        model: the module; it is put in evaluation mode.
        example: example inputs, positional.
        dynamic: dynamic axes of each input, ``{axis: torch.export.Dim.DYNAMIC}``; by default the
            first axis of every input is dynamic.

    Raises:
        UserError: it cannot be exported, or holds no FFN, or holds something not understood.
    """
    model.eval()
    axes = dynamic if dynamic is not None else tuple({0: DYNAMIC} for _ in example)
    module = _export(_Positional(model), example, (axes,))
    results: Any = module.graph.output_node().args[0]
    count = len(results)
    outputs = ["output"] if count == 1 else [f"output.{i}" for i in range(count)]
    inputs = [f"input.{i}" for i in range(len(example))] if len(example) > 1 else ["input"]
    return _finish(module, "module", inputs, outputs, example, axes, {})


class _Positional(nn.Module):
    """Gives every module the same signature: tensors in, a tuple of tensors out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        out = self.model(*inputs)
        return (out,) if isinstance(out, Tensor) else tuple(out)
