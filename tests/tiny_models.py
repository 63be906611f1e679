"""Tiny random models of many architectures, and what the tests do with captured ones.

Imports torch, so that only tests of `carve` may import it, never those of the runtime.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

from carve.calibration import DATA
from carve.capture import DYNAMIC, capture_module, capture_transformers
from carve.ffn import RoutedFFN
from carve.program import Program
from carve.sites import Block, FFNSite, Gate

# Nothing here is large enough for two threads, and threads that wait for one another stall for
# minutes on a machine that is busy with other work.
torch.set_num_threads(1)

HIDDEN, FFN, LAYERS, VOCAB, LENGTH = 64, 256, 2, 128, 11
_SIZES: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_COMMON = {**_SIZES, "intermediate_size": FFN}
GROUPED = {**_COMMON, "num_key_value_heads": 2}

ARCHITECTURES: dict[str, Any] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**GROUPED)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(head_dim=16, **GROUPED)),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(sliding_window=4, **GROUPED)),
    "phi3": lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**GROUPED)),
    "gemma2": lambda: hf.Gemma2ForCausalLM(
        hf.Gemma2Config(head_dim=16, sliding_window=4, **GROUPED)
    ),
    "gpt2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(
            n_embd=HIDDEN,
            n_layer=LAYERS,
            n_head=4,
            n_positions=64,
            vocab_size=VOCAB,
            initializer_range=0.1,
            bos_token_id=1,
            eos_token_id=2,
        )
    ),
    "neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**_COMMON)),
    "opt": lambda: hf.OPTForCausalLM(
        hf.OPTConfig(
            ffn_dim=FFN,
            word_embed_proj_dim=HIDDEN,
            init_std=0.1,
            **{k: v for k, v in _SIZES.items() if k != "initializer_range"},
        )
    ),
    "bert": lambda: hf.BertModel(hf.BertConfig(**_COMMON)),
    "roberta": lambda: hf.RobertaModel(hf.RobertaConfig(**_COMMON)),
    "vit": lambda: hf.ViTModel(
        hf.ViTConfig(
            hidden_size=HIDDEN,
            intermediate_size=FFN,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            image_size=32,
            patch_size=8,
            initializer_range=0.1,
        )
    ),
}
ENCODERS = ("bert", "roberta", "vit")
DECODERS = tuple(n for n in ARCHITECTURES if n not in ENCODERS)
ACTIVATION = {
    "llama": "silu",
    "qwen2": "silu",
    "qwen3": "silu",
    "mistral": "silu",
    "phi3": "silu",
    "gemma2": "gelu_tanh",
    "gpt2": "gelu_tanh",
    "neox": "gelu",
    "opt": "relu",
    "bert": "gelu",
    "roberta": "gelu",
    "vit": "gelu",
    "plain": "gelu",
}


class Plain(nn.Module):
    """A stock encoder without transformers around it."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(HIDDEN, 4, FFN, batch_first=True, activation="gelu")
        self.encoder = nn.TransformerEncoder(layer, LAYERS)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x)


def jitter(model: nn.Module) -> nn.Module:
    """Move biases and norms away from 0 and 1, where a forgotten one would not be seen."""
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(0.1 * torch.randn_like(p))
    return model.eval()


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = jitter(Plain() if name == "plain" else ARCHITECTURES[name]())
    if name != "plain":
        model.set_attn_implementation("eager")
    return model


def token_ids(rows: int = 3, length: int = LENGTH, seed: int = 1) -> Tensor:
    # No padding token: some models give it a position of its own.
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def inputs_of(name: str) -> dict[str, Tensor]:
    """What the original model is called with."""
    generator = torch.Generator().manual_seed(2)
    if name == "vit":
        return {"pixel_values": torch.randn(3, 3, 32, 32, generator=generator)}
    if name == "plain":
        return {"x": torch.randn(3, LENGTH, HIDDEN, generator=generator)}
    if name in DECODERS:
        return {"input_ids": token_ids()}
    mask = torch.ones(3, LENGTH, dtype=torch.long)
    mask[1, 6:] = 0
    return {"input_ids": token_ids(), "attention_mask": mask}


@dataclass
class Captured:
    """A captured program, the inputs to try, and what the original model says of them."""

    program: Program
    inputs: tuple[Tensor, ...]
    want: Tensor


def capture(name: str, model: nn.Module | None = None) -> Captured:
    """Capture an architecture; the reference is computed before, for capture takes the weights."""
    model = model or build(name)
    given = inputs_of(name)
    with torch.no_grad():
        out = model(**given)
    want = out if isinstance(out, Tensor) else out[0]
    if name == "plain":
        axes = ({0: DYNAMIC, 1: DYNAMIC},)
        program = capture_module(model, (torch.randn(2, 5, HIDDEN),), axes)
    else:
        program = capture_transformers(model)
    if program.kind == "decoder":
        return Captured(program, decoder_inputs(program, given["input_ids"]), want)
    return Captured(program, tuple(given.values()), want)


def decoder_inputs(
    program: Program, ids: Tensor, past: tuple[Tensor, ...] | list[Tensor] = ()
) -> tuple[Tensor, ...]:
    start = past[0].shape[2] if len(past) else 0
    position = torch.arange(start, start + ids.shape[1])[None].repeat(len(ids), 1)
    return (ids, position, *(past if len(past) else program.empty_cache(len(ids))))


def random_routed(
    site: FFNSite,
    *,
    num_experts: int = 4,
    expert_size: int = 32,
    top_k: int = 2,
    analytical: bool = False,
    compensation: bool = True,
    dynamic: bool = False,
    seed: int = 0,
) -> RoutedFFN:
    """A random split of the site's neurons with a random router and random means."""
    g = torch.Generator().manual_seed(seed)
    d = site.dense
    order = torch.randperm(d.intermediate_size, generator=g)
    shared, rest = order[: -num_experts * expert_size], order[-num_experts * expert_size :]
    groups = rest.view(num_experts, expert_size)

    def rows(w: Tensor | None, index: Tensor) -> Tensor | None:
        return None if w is None or index.numel() == 0 else w[index]

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    out, width = d.down.shape[0], d.up.shape[1]
    means = 0.1 * noise(num_experts, out) if compensation else None
    bias = d.down_bias
    if means is not None:
        bias = means.sum(0) if bias is None else bias + means.sum(0)
    return RoutedFFN(
        rows(d.gate, shared),
        rows(d.gate_bias, shared),
        rows(d.up, shared),
        rows(d.up_bias, shared),
        None if shared.numel() == 0 else d.down[:, shared],
        bias,
        rows(d.gate, groups),
        rows(d.gate_bias, groups),
        d.up[groups],
        rows(d.up_bias, groups),
        d.down.T[groups].transpose(1, 2).contiguous(),
        None if means is None else -means,
        noise(num_experts, width),
        None if analytical else 0.1 * noise(num_experts),
        noise(num_experts, width) if analytical and d.gate is not None else None,
        d.activation,
        top_k,
        dynamic,
    )


def route(program: Program, **options: Any) -> Program:
    """Carve every site at random, each with a seed of its own."""
    for i, site in enumerate(program.sites):
        program.set_routed(site, random_routed(site, seed=i, **options))
    return program


def relative(got: Tensor, want: Tensor) -> float:
    """Largest deviation over the largest value."""
    assert got.shape == want.shape
    return float((got - want).abs().max() / want.abs().max())


def make_tokenizer(vocab: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = (DATA / "calibration.txt").read_text(encoding="utf-8")[:20_000]
    tokenizer.train_from_iterator([text], trainer)
    return tokenizer


def random_gate(block: Block, *, bridge: str = "low_rank", seed: int = 0) -> Gate:
    """A gate that skips about half of the tokens, with a bridge that cannot be overlooked."""
    g = torch.Generator().manual_seed(seed)
    d, out = (int(n.meta["val"].shape[-1]) for n in (block.input, block.output))

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    wide = bridge in ("low_rank", "adapter")
    return Gate(
        noise(d),
        0.1 * noise(1),
        noise(32, d) / d**0.5 if wide else None,
        noise(32, d) / d**0.5 if bridge == "adapter" else None,
        noise(out, 32) / 8 if wide else None,
        None if bridge == "identity" else noise(out),
        skip=0.5,
    )


def gate(program: Program, *bridges: str) -> Program:
    """Gate every block, with each of ``bridges`` in turn."""
    for i, block in enumerate(b for b in program.blocks if b.gateable):
        program.set_gate(block, random_gate(block, bridge=bridges[i % len(bridges)], seed=i))
    return program


def save_checkpoint(folder: Path, vocab: int = 300, layers: int = LAYERS) -> Path:
    """A Llama on disk with a byte-level tokenizer; 60 thousand weights a layer."""
    torch.manual_seed(0)
    sizes = {
        **GROUPED,
        "vocab_size": vocab,
        "num_hidden_layers": layers,
        "max_position_embeddings": 192,
        "pad_token_id": None,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    return _save(hf.LlamaForCausalLM(hf.LlamaConfig(**sizes)), folder, vocab)


def save_encoder(folder: Path, vocab: int = 300) -> Path:
    """A BERT on disk with the same tokenizer."""
    torch.manual_seed(0)
    return _save(hf.BertModel(hf.BertConfig(**{**_COMMON, "vocab_size": vocab})), folder, vocab)


def _save(model: Any, folder: Path, vocab: int) -> Path:
    jitter(model).save_pretrained(folder)
    make_tokenizer(vocab).save(str(folder / "tokenizer.json"))
    return folder
