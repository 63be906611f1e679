"""Write a Llama with random weights as a Hugging Face directory, to time shapes without a download.

Usage::

    python tools/make_random.py OUT --hidden-size 2048 --intermediate-size 5632 \\
        --num-hidden-layers 22 --num-attention-heads 32 --num-key-value-heads 4 \\
        --vocab-size 32000 --tokenizer DIR

Weights are Gaussian with standard deviation 0.02; the projections that write into the residual
stream (``o_proj``, ``down_proj``) are scaled by ``1 / sqrt(2 layers)`` (GPT-2, Radford et al.,
2019), so activations stay of the same size through the depth. The safetensors file is written
tensor by tensor: no more than one tensor is in memory.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

STD = 0.02
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)


def shapes(a: argparse.Namespace) -> Iterator[tuple[str, tuple[int, ...], float | None]]:
    """Name, shape and standard deviation (None: ones) of every tensor of the checkpoint."""
    d, m, head_dim = a.hidden_size, a.intermediate_size, a.hidden_size // a.num_attention_heads
    kv, residual = a.num_key_value_heads * head_dim, STD / math.sqrt(2 * a.num_hidden_layers)
    yield "model.embed_tokens.weight", (a.vocab_size, d), STD
    for i in range(a.num_hidden_layers):
        layer = f"model.layers.{i}"
        yield f"{layer}.input_layernorm.weight", (d,), None
        yield f"{layer}.self_attn.q_proj.weight", (d, d), STD
        yield f"{layer}.self_attn.k_proj.weight", (kv, d), STD
        yield f"{layer}.self_attn.v_proj.weight", (kv, d), STD
        yield f"{layer}.self_attn.o_proj.weight", (d, d), residual
        yield f"{layer}.post_attention_layernorm.weight", (d,), None
        yield f"{layer}.mlp.gate_proj.weight", (m, d), STD
        yield f"{layer}.mlp.up_proj.weight", (m, d), STD
        yield f"{layer}.mlp.down_proj.weight", (d, m), residual
    yield "model.norm.weight", (d,), None
    yield "lm_head.weight", (a.vocab_size, d), STD


def write_weights(a: argparse.Namespace, path: Path) -> int:
    """Stream random bf16 tensors into a safetensors file and return the number of parameters.

    Format (huggingface/safetensors): the header's length as little-endian u64, the header as JSON
    padded with blanks to a multiple of 8 bytes, then the tensors without gaps.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape, _ in shapes(a):
        end = offset + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    generator = torch.Generator().manual_seed(a.seed)
    with path.open("wb") as f:
        f.write(len(head).to_bytes(8, "little") + head)
        for _, shape, std in tqdm([*shapes(a)], desc=path.name):
            f.write(memoryview(_draw(shape, std, generator).view(torch.int16).numpy()).cast("B"))
    return offset // 2


def _draw(shape: tuple[int, ...], std: float | None, generator: torch.Generator) -> Tensor:
    if std is None:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.empty(shape).normal_(std=std, generator=generator).bfloat16()


def token_id(folder: Path, tok: Tokenizer, name: str) -> int | None:
    """The id of ``bos_token`` or ``eos_token`` as the tokenizer's configuration names it."""
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        path = folder / file
        token = json.loads(path.read_text(encoding="utf-8")).get(name) if path.exists() else None
        if token is not None:
            return tok.token_to_id(token["content"] if isinstance(token, dict) else token)
    return None


def make(a: argparse.Namespace) -> int:
    """Write the directory ``a.out`` and return the number of parameters."""
    if a.hidden_size % a.num_attention_heads or a.num_attention_heads % a.num_key_value_heads:
        raise SystemExit("heads have to divide the hidden size, key/value heads the heads")
    tok = Tokenizer.from_file(str(a.tokenizer / "tokenizer.json"))
    if tok.get_vocab_size() > a.vocab_size:
        raise SystemExit(f"the tokenizer has {tok.get_vocab_size()} tokens, more than --vocab-size")
    a.out.mkdir(parents=True, exist_ok=True)
    ids = {f"{n}_id": token_id(a.tokenizer, tok, n) for n in ("bos_token", "eos_token")}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": a.vocab_size,
        "hidden_size": a.hidden_size,
        "intermediate_size": a.intermediate_size,
        "num_hidden_layers": a.num_hidden_layers,
        "num_attention_heads": a.num_attention_heads,
        "num_key_value_heads": a.num_key_value_heads,
        "head_dim": a.hidden_size // a.num_attention_heads,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        **ids,
        "dtype": "bfloat16",
    }
    for name, content in (("config.json", config), ("generation_config.json", ids)):
        (a.out / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    for name in TOKENIZER_FILES:
        if (a.tokenizer / name).exists():
            shutil.copyfile(a.tokenizer / name, a.out / name)
    return write_weights(a, a.out / "model.safetensors")


def parse() -> argparse.Namespace:
    """Command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("out", type=Path, metavar="OUT", help="directory to write")
    p.add_argument("--hidden-size", type=int, default=2048)
    p.add_argument("--intermediate-size", type=int, default=5632)
    p.add_argument("--num-hidden-layers", type=int, default=22)
    p.add_argument("--num-attention-heads", type=int, default=32)
    p.add_argument("--num-key-value-heads", type=int, default=4)
    p.add_argument("--vocab-size", type=int, default=32000)
    p.add_argument("--tokenizer", type=Path, required=True, help="directory with tokenizer.json")
    p.add_argument("--seed", type=int, default=0)
    return p.parse_args()


def main() -> None:
    """Write the model and say how large it is."""
    args = parse()
    print(f"{args.out}: {make(args) / 1e6:.1f}M parameters")


if __name__ == "__main__":
    main()
