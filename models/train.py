"""Train the reference model: a small Llama on plain text, exported as a Hugging Face directory.

Usage::

    python models/train.py --corpus CORPUS --out models/reference

``CORPUS`` holds ``train/*.txt`` and ``valid/*.txt``. The run goes on where it stopped when the
state file is still there (``--state``), uses a GPU when there is one, and shows progress with the
validation loss on standard error. The model is a plain PyTorch loop with bf16 autocast: on a CPU
it is several times as fast as the transformers forward pass.

Optimizer: Muon (Jordan et al., 2024) for the matrices inside the blocks, AdamW for embeddings and
norms, linear decay to zero after a short warm-up.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from tqdm import tqdm

log = logging.getLogger("train")
BOS = "<|endoftext|>"


@dataclass(frozen=True)
class Shape:
    """Sizes of the reference model, in the words of ``LlamaConfig``."""

    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 1024
    num_hidden_layers: int = 8
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    max_position_embeddings: int = 512
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5


SHAPE = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)
"""What of a `Shape` the command line sets."""


class Block(nn.Module):
    """Pre-norm attention and gated FFN; parameter names follow Hugging Face's Llama."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.heads, self.kv_heads = s.num_attention_heads, s.num_key_value_heads
        self.head_dim = s.hidden_size // s.num_attention_heads
        d, kv = s.hidden_size, self.kv_heads * self.head_dim
        self.input_layernorm = nn.RMSNorm(d, s.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(d, s.rms_norm_eps)
        self.self_attn = nn.ModuleDict(
            {
                "q_proj": nn.Linear(d, d, bias=False),
                "k_proj": nn.Linear(d, kv, bias=False),
                "v_proj": nn.Linear(d, kv, bias=False),
                "o_proj": nn.Linear(d, d, bias=False),
            }
        )
        self.mlp = nn.ModuleDict(
            {
                "gate_proj": nn.Linear(d, s.intermediate_size, bias=False),
                "up_proj": nn.Linear(d, s.intermediate_size, bias=False),
                "down_proj": nn.Linear(s.intermediate_size, d, bias=False),
            }
        )

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """``x`` ``[B, S, d]`` with the tables of the rotary embedding ``[S, head_dim]``."""
        batch, length, width = x.shape
        h, a = self.input_layernorm(x), self.self_attn

        def split(z: Tensor, heads: int) -> Tensor:
            return z.view(batch, length, heads, self.head_dim).transpose(1, 2)

        def rotate(z: Tensor) -> Tensor:
            first, second = z.chunk(2, -1)
            return z * cos + torch.cat((-second, first), -1) * sin

        q = rotate(split(a["q_proj"](h), self.heads))
        k = rotate(split(a["k_proj"](h), self.kv_heads))
        v = split(a["v_proj"](h), self.kv_heads)
        # The CPU kernel has no grouped heads, so keys and values are repeated here.
        k, v = (z.repeat_interleave(self.heads // self.kv_heads, 1) for z in (k, v))
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + a["o_proj"](o.transpose(1, 2).reshape(batch, length, width))
        h, m = self.post_attention_layernorm(x), self.mlp
        return x + m["down_proj"](F.silu(m["gate_proj"](h)) * m["up_proj"](h))


class Llama(nn.Module):
    """Decoder with tied embeddings; ``forward`` gives the mean cross-entropy in nats a token."""

    cos: Tensor
    sin: Tensor

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(s.vocab_size, s.hidden_size)
        self.layers = nn.ModuleList(Block(s) for _ in range(s.num_hidden_layers))
        self.norm = nn.RMSNorm(s.hidden_size, s.rms_norm_eps)
        head_dim = s.hidden_size // s.num_attention_heads
        inverse = s.rope_theta ** (-torch.arange(0, head_dim, 2) / head_dim)
        angle = torch.outer(torch.arange(s.max_position_embeddings), inverse).repeat(1, 2)
        self.register_buffer("cos", angle.cos().bfloat16(), persistent=False)
        self.register_buffer("sin", angle.sin().bfloat16(), persistent=False)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                scale = (
                    1.0 / math.sqrt(2 * s.num_hidden_layers)
                    if "o_proj" in name or "down" in name
                    else 1.0
                )
                nn.init.normal_(p, std=0.02 * scale)

    def forward(self, rows: Tensor) -> Tensor:
        """``rows`` ``[B, S + 1]`` token ids."""
        x = self.embed_tokens(rows[:, :-1]).bfloat16()
        length = x.shape[1]
        for layer in self.layers:
            x = layer(x, self.cos[:length], self.sin[:length])
        logits = F.linear(self.norm(x), self.embed_tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())


def train_tokenizer(files: list[Path], vocab_size: int) -> Tokenizer:
    """Byte-level BPE with one special token, put in front of every sequence."""
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tok.train([str(f) for f in files], trainer)
    tok.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tok.token_to_id(BOS))]
    )
    return tok


def encode_rows(tok: Tokenizer, files: list[Path], length: int) -> np.ndarray:
    """``[rows, length + 1]`` uint16: the special token, then ``length`` tokens of text."""
    bos = tok.token_to_id(BOS)
    rows = []
    for f in files:
        ids: list[int] = []
        for text in f.read_text(encoding="utf-8").split("\n\n\n"):
            # Whole works at once are slow to encode; lines keep the pre-tokenizer's pieces.
            parts = text.splitlines(keepends=True)
            chunks = ["".join(parts[i : i + 200]) for i in range(0, len(parts), 200)]
            for e in tok.encode_batch(chunks, add_special_tokens=False):
                ids.extend(e.ids)
            ids.append(bos)
        count = len(ids) // length
        body = np.asarray(ids[: count * length], np.uint16).reshape(count, length)
        rows.append(np.concatenate([np.full((count, 1), bos, np.uint16), body], 1))
    return np.concatenate(rows)


def save_atomically(path: Path, state: object) -> None:
    """Write beside and rename, so that a kill leaves the former state."""
    part = path.with_suffix(".part")
    torch.save(state, part)
    os.replace(part, path)


def export(model: Llama, shape: Shape, tok: Tokenizer, out: Path, facts: dict[str, object]) -> None:
    """Write the Hugging Face directory: config, bf16 safetensors, tokenizer, training facts."""
    out.mkdir(parents=True, exist_ok=True)
    skip = ("cos", "sin")
    tensors = {
        f"model.{k}": v.detach().to("cpu", torch.bfloat16).contiguous()
        for k, v in model.state_dict().items()
        if k not in skip
    }
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    bos = tok.token_to_id(BOS)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **asdict(shape),
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        "head_dim": shape.hidden_size // shape.num_attention_heads,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": bos,
        "eos_token_id": bos,
        "dtype": "bfloat16",
    }
    tok.save(str(out / "tokenizer.json"))
    special = {"bos_token": BOS, "eos_token": BOS}
    files = {
        "config.json": config,
        "generation_config.json": {"bos_token_id": bos, "eos_token_id": bos},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": shape.max_position_embeddings,
            **special,
        },
        "special_tokens_map.json": special,
        "training.json": facts,
    }
    for name, content in files.items():
        (out / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def parse() -> argparse.Namespace:
    """Command line of the recipe."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--corpus", type=Path, required=True, help="folder with train/ and valid/")
    p.add_argument("--out", type=Path, required=True, help="Hugging Face directory to write")
    p.add_argument("--state", type=Path, help="resumable state (default: OUT/../.OUT.state)")
    for f in SHAPE:
        name = "--" + f.removeprefix("num_").removesuffix("_size").replace("_", "-")
        p.add_argument(name, dest=f, type=int, default=getattr(Shape, f), help=f"{f} of the config")
    p.add_argument("--tokens", type=float, default=14e6, help="tokens to see")
    p.add_argument("--batch", type=int, default=16, help="rows a step")
    p.add_argument("--length", type=int, default=512, help="tokens a row")
    p.add_argument("--lr", type=float, default=3e-3)
    p.add_argument("--weight-decay", type=float, default=0.1)
    p.add_argument("--eval-every", type=int, default=100)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--no-compile", action="store_true", help="do not use torch.compile")
    return p.parse_args()


def main() -> None:
    """Train, or go on training, then export."""
    args = parse()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    sizes = {f: getattr(args, f) for f in SHAPE}
    shape = Shape(max_position_embeddings=args.length, **sizes)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)
    state_dir = args.state or args.out.parent / f".{args.out.name}.state"
    state_dir.mkdir(parents=True, exist_ok=True)

    train_files = sorted((args.corpus / "train").glob("*.txt"))
    valid_files = sorted((args.corpus / "valid").glob("*.txt"))
    if not train_files or not valid_files:
        raise SystemExit(f"{args.corpus}: needs train/*.txt and valid/*.txt")
    tok_file = state_dir / "tokenizer.json"
    if not tok_file.exists():
        log.info("training the tokenizer")
        train_tokenizer(train_files, shape.vocab_size).save(str(tok_file))
    tok = Tokenizer.from_file(str(tok_file))
    cache = state_dir / f"rows-{args.length}.npz"
    if not cache.exists():
        log.info("encoding the corpus")
        part = cache.with_suffix(".part.npz")
        np.savez(
            part,
            train=encode_rows(tok, train_files, args.length),
            valid=encode_rows(tok, valid_files, args.length),
        )
        os.replace(part, cache)
    data = np.load(cache, allow_pickle=False)
    train, valid = data["train"], data["valid"]
    valid = valid[np.random.default_rng(0).permutation(len(valid))[:128]]
    log.info(
        "%d training rows, %d validation rows of %d tokens", len(train), len(valid), args.length
    )

    model = Llama(shape).to(device)
    matrices = [p for p in model.layers.parameters() if p.ndim == 2]
    others = [p for n, p in model.named_parameters() if p.ndim < 2 or "embed" in n]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(
            matrices,
            lr=args.lr,
            weight_decay=args.weight_decay,
            momentum=0.95,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(others, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]
    loss_of = model if args.no_compile else torch.compile(model)
    steps = math.ceil(args.tokens / (args.batch * args.length))
    warmup = min(100, steps // 10)
    first, spent = 0, 0.0
    history: list[dict[str, float]] = []
    state_file = state_dir / "state.pt"
    if state_file.exists():
        state = torch.load(state_file, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        for o, s in zip(optimizers, state["optimizers"], strict=True):
            o.load_state_dict(s)
        first, history, spent = state["step"], state["history"], state["seconds"]
        log.info("resumed at step %d", first)

    def batch_of(step: int) -> Tensor:
        # The order is a function of the step alone, so a resumed run sees the same rows.
        per_epoch = len(train) // args.batch
        epoch, index = divmod(step, per_epoch)
        order = np.random.default_rng((args.seed, epoch)).permutation(len(train))
        return torch.from_numpy(
            train[order[index * args.batch : (index + 1) * args.batch]].astype(np.int64)
        ).to(device)

    def run(rows: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return loss_of(rows)

    def validate() -> float:
        model.eval()
        rows = torch.from_numpy(valid.astype(np.int64)).to(device)
        with torch.no_grad():
            losses = [run(rows[i : i + args.batch]).item() for i in range(0, len(rows), args.batch)]
        model.train()
        return float(np.mean(losses))

    began = time.monotonic() - spent
    bar = tqdm(range(first, steps), initial=first, total=steps, mininterval=10)
    for step in bar:
        scale = min(1.0, (step + 1) / warmup) * (1.0 - step / steps)
        for o in optimizers:
            for group in o.param_groups:
                group["lr"] = args.lr * scale
        loss = run(batch_of(step))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for o in optimizers:
            o.step()
            o.zero_grad(set_to_none=True)
        if not math.isfinite(loss.item()):
            raise SystemExit(f"loss is not finite at step {step}")
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        if (step + 1) % args.eval_every == 0 or step + 1 == steps:
            held_out = validate()
            seen = (step + 1) * args.batch * args.length
            seconds = time.monotonic() - began
            history.append({"tokens": seen, "valid_loss": held_out, "seconds": round(seconds)})
            log.info("step %d: %.1fM tokens, validation loss %.4f", step + 1, seen / 1e6, held_out)
            save_atomically(
                state_file,
                {
                    "model": model.state_dict(),
                    "optimizers": [o.state_dict() for o in optimizers],
                    "step": step + 1,
                    "history": history,
                    "seconds": seconds,
                },
            )
            export(model, shape, tok, args.out, {"arguments": arguments(args), "history": history})


def arguments(args: argparse.Namespace) -> dict[str, object]:
    """The settings that decide the result; paths are left out."""
    keep = (*SHAPE, "tokens", "batch", "length", "lr", "weight_decay", "seed")
    return {k: getattr(args, k) for k in keep}


if __name__ == "__main__":
    main()
