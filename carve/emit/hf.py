"""The checkpoint back end: a carved program as an architecture that other engines run.

``glm4_moe`` for transformers, vLLM and SGLang, ``granitemoeshared`` for llama.cpp. Weights are
written before any rounding, in the dtype of the source: those engines quantize themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from carve.artifact import write_json
from carve.emit.hf_tensors import arranged, checkpoint_tensors, has_attention_bias
from carve.emit.shards import SHARD, write_shards
from carve.engine_form import HF, check_program
from carve.ffn import RoutedFFN
from carve.program import Program

_SAME = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


def stored_dtype(program: Program) -> torch.dtype:
    """The dtype of the source's weights."""
    name = str(program.config.get("dtype") or "float32").removeprefix("torch.")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def routed_in_order(
    program: Program, orders: Mapping[str, Tensor] | None = None
) -> dict[str, RoutedFFN]:
    """The carved FFNs by site name, experts in the order of the checkpoint."""
    given = orders or {}
    return {
        s.name: arranged(s.routed, given.get(s.name))
        for s in program.carved
        if s.routed is not None
    }


def emit_checkpoint(
    program: Program, folder: Path, target: str, routed: Mapping[str, RoutedFFN], limit: int = SHARD
) -> None:
    """Write ``config.json`` and the weights.

    Args:
        program: carved in the form that the target holds (`carve.engine_form`).
        folder: an empty folder.
        target: ``hf`` or ``hf-granite``.
        routed: see `routed_in_order`.
        limit: most bytes of a file.

    Raises:
        CarveError: the program has another form, or weights that its dtype cannot hold.
    """
    check_program(program, target)
    config = checkpoint_config(program, target)
    dtype = stored_dtype(program)
    tied = bool(config["tie_word_embeddings"])
    tensors = checkpoint_tensors(program, routed, target, dtype, tied=tied)
    write_shards(folder, tensors, limit)
    write_json(folder / "config.json", config)


def checkpoint_config(program: Program, target: str) -> dict[str, Any]:
    """The ``config.json`` of the emitted architecture."""
    c = program.config
    routed = next(s.routed for s in program.carved)
    assert routed is not None
    rope = {"rope_type": "default", **(c.get("rope_parameters") or {})}
    width = c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]
    shared: dict[str, Any] = {
        **{k: c.get(k) for k in _SAME},
        "head_dim": width,
        "rope_parameters": rope,
        "attention_bias": has_attention_bias(program),
        "attention_dropout": 0.0,
        "num_experts_per_tok": routed.top_k,
        "dtype": str(stored_dtype(program)).removeprefix("torch."),
        "use_cache": True,
    }
    if target == HF:
        return {
            "architectures": ["Glm4MoeForCausalLM"],
            "model_type": "glm4_moe",
            **shared,
            "rope_parameters": {**rope, "partial_rotary_factor": 1.0},
            "partial_rotary_factor": 1.0,
            "intermediate_size": program.sites[0].dense.intermediate_size,
            "first_k_dense_replace": len(program.sites) - len(program.carved),
            "moe_intermediate_size": routed.expert_size,
            "n_routed_experts": routed.num_experts,
            "n_shared_experts": routed.shared_size // routed.expert_size,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": True,
            "routed_scaling_factor": float(routed.top_k),
            "use_qk_norm": c["model_type"] == "qwen3",
            "num_nextn_predict_layers": 0,
            "tie_word_embeddings": False,
        }
    return {
        "architectures": ["GraniteMoeSharedForCausalLM"],
        "model_type": "granitemoeshared",
        **shared,
        "intermediate_size": routed.expert_size,
        "shared_intermediate_size": routed.shared_size,
        "num_local_experts": routed.num_experts,
        "attention_multiplier": width**-0.5,
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
        "tie_word_embeddings": bool(c.get("tie_word_embeddings")),
    }
