"""Write the checkpoint that ``--target hf-granite`` gives as a GGUF file for llama.cpp.

Usage::

    python tools/granite_gguf.py OUT/hf-granite MODEL.gguf --type Q4_0

llama.cpp's own ``convert_hf_to_gguf.py`` reads the same checkpoint; this one needs the ``gguf``
package only and quantizes as it writes, every matrix but the routers to the same type.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))
from bench_llama_cpp import TYPES, Piece, add_facts, listing, reader, write_pieces

_HALVES = {
    "block_sparse_moe.input_linear.weight": (
        gguf.MODEL_TENSOR.FFN_GATE_EXP,
        gguf.MODEL_TENSOR.FFN_UP_EXP,
    ),
    "shared_mlp.input_linear.weight": (
        gguf.MODEL_TENSOR.FFN_GATE_SHEXP,
        gguf.MODEL_TENSOR.FFN_UP_SHEXP,
    ),
}
"""Gate and up projections stand in one tensor there, and in two here."""


def write_granite(model_dir: str | Path, out: str | Path, qtype: str) -> Path:
    """Convert a ``granitemoeshared`` checkpoint to GGUF (architecture ``granitemoe``).

    Args:
        model_dir: directory with ``config.json`` and safetensors.
        out: file to write.
        qtype: one of ``bench_llama_cpp.TYPES``.

    Returns:
        The path of the file.
    """
    model_dir, out = Path(model_dir), Path(out)
    config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    if config["model_type"] != "granitemoeshared" or config.get("hidden_act", "silu") != "silu":
        raise ValueError(f"{model_dir}: no granitemoeshared checkpoint")
    if config["rope_parameters"].get("rope_type", "default") != "default":
        raise ValueError(f"{model_dir}: rope scaling is not supported")
    writer = gguf.GGUFWriter(out, "granitemoe")
    add_facts(writer, model_dir, config, qtype)
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_expert_shared_feed_forward_length(config["shared_intermediate_size"])
    writer.add_expert_count(config["num_local_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_attention_scale(config["attention_multiplier"])
    writer.add_embedding_scale(config["embedding_multiplier"])
    writer.add_residual_scale(config["residual_multiplier"])
    writer.add_logit_scale(config["logits_scaling"])
    write_pieces(writer, [p for item in listing(model_dir) for p in _pieces(*item, config, qtype)])
    return out


def _pieces(
    name: str, file: Path, shape: tuple[int, ...], config: dict[str, Any], qtype: str
) -> list[Piece]:
    load = reader(name, file, config)
    layer, _, leaf = name.removeprefix("model.layers.").partition(".")
    if leaf in _HALVES:
        half = shape[-2] // 2
        return [
            Piece(
                f"{gguf.TENSOR_NAMES[kind].format(bid=layer)}.weight",
                (*shape[:-2], half, shape[-1]),
                _part(load, i * half, half),
                qtype,
            )
            for i, kind in enumerate(_HALVES[leaf])
        ]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GRANITE_MOE, config["num_hidden_layers"])
    target = names.get_name(name, try_suffixes=(".weight", ".bias"))
    if target is None:
        raise ValueError(f"{name}: has no place in a GGUF granitemoe")
    # Rounding a router would change which experts are chosen.
    return [Piece(target, shape, load, "F32" if ".router." in name else qtype)]


def _part(load: Callable[[], Tensor], start: int, length: int) -> Callable[[], Tensor]:
    return lambda: load().narrow(-2, start, length)


def main() -> None:
    """Convert one checkpoint."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("model_dir", type=Path, metavar="CHECKPOINT")
    p.add_argument("out", type=Path, metavar="FILE")
    p.add_argument("--type", default="Q4_0", choices=TYPES)
    args = p.parse_args()
    part = args.out.with_suffix(".part")
    write_granite(args.model_dir, part, args.type).replace(args.out)


if __name__ == "__main__":
    main()
