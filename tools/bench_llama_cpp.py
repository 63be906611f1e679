"""Time llama.cpp on a Hugging Face Llama: the outside reference for decode and prefill.

Usage::

    python tools/bench_llama_cpp.py MODEL_DIR --types Q4_0,Q8_0 --tokens 64 --context 0 --threads 2

Needs the ``gguf`` and ``llama-cpp-python`` packages; the latter only to run a model.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import gguf
import numpy as np
from gguf.quants import quantize
from safetensors import safe_open
from torch import Tensor

TYPES = ("F32", "F16", "Q8_0", "Q4_0")
BATCH = 512


def write_gguf(model_dir: str | Path, out: str | Path, qtype: str) -> Path:
    """Convert a Hugging Face Llama directory to GGUF.

    Every matrix, embedding and output head included, becomes ``qtype``; vectors stay F32. Rows of
    ``q_proj`` and ``k_proj`` are reordered within each head from Hugging Face's halves ``[2, D/2]``
    to the pairs ``[D/2, 2]`` that llama.cpp's rope rotates (``permute`` in llama.cpp's
    convert_hf_to_gguf.py). Tied embeddings are written once. One tensor is in memory at a time.

    The tokenizer is written as byte-level BPE ("gpt2") where ``tokenizer.json`` is one, filled up
    with unused tokens to ``vocab_size``, else as a vocabulary without text ("none").

    Args:
        model_dir: directory with ``config.json`` and safetensors.
        out: file to write.
        qtype: one of ``TYPES``.

    Returns:
        The path of the file.
    """
    model_dir, out = Path(model_dir), Path(out)
    config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    if config["model_type"] != "llama" or config.get("hidden_act", "silu") != "silu":
        raise ValueError(f"{model_dir}: not a Llama with SiLU")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise ValueError(f"{model_dir}: rope scaling is not supported")
    if qtype not in TYPES:
        raise ValueError(f"{qtype}: not one of {', '.join(TYPES)}")
    writer = gguf.GGUFWriter(out, "llama")
    add_facts(writer, model_dir, config, qtype)
    writer.add_feed_forward_length(config["intermediate_size"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    tied = config.get("tie_word_embeddings", False)
    pieces = []
    for name, file, shape in listing(model_dir):
        if "rotary_emb.inv_freq" in name or (tied and name == "lm_head.weight"):
            continue
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise ValueError(f"{name}: has no place in a GGUF Llama")
        pieces.append(Piece(target, shape, reader(name, file, config), qtype))
    write_pieces(writer, pieces)
    return out


@dataclass(frozen=True)
class Piece:
    """A tensor to write: its GGUF ``name``, and ``load`` that gives it in fp32.

    A matrix is stored as ``qtype``, a vector as F32.
    """

    name: str
    shape: tuple[int, ...]
    load: Callable[[], Tensor]
    qtype: str

    @property
    def stored(self) -> gguf.GGMLQuantizationType:
        """How its elements are stored."""
        return gguf.GGMLQuantizationType[self.qtype if len(self.shape) > 1 else "F32"]


def add_facts(writer: gguf.GGUFWriter, model_dir: Path, config: dict[str, Any], qtype: str) -> None:
    """Write what every Llama-like architecture says, and the tokenizer."""
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    rope = config.get("rope_parameters") or {}
    writer.add_name(model_dir.name)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(rope.get("rope_theta", config.get("rope_theta", 10000.0)))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    prefix = "ALL" if qtype == "F32" else "MOSTLY"
    writer.add_file_type(gguf.LlamaFileType[f"{prefix}_{qtype}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_tokenizer(writer, model_dir, config)


def write_pieces(writer: gguf.GGUFWriter, pieces: Sequence[Piece]) -> None:
    """Write header and tensors, one tensor in memory at a time, and close the file."""
    for p in pieces:
        # A quantized row has its size in bytes; GGUFWriter wants the shape in elements.
        nbytes = int(np.prod(gguf.quant_shape_to_byte_shape(p.shape, p.stored)))
        writer.add_tensor_info(p.name, p.shape, np.dtype(np.float32), nbytes, raw_dtype=p.stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for p in pieces:
        data = quantize(p.load().contiguous().numpy(), p.stored)
        writer.write_tensor_data(np.ascontiguousarray(data))
    writer.close()


def reader(name: str, file: Path, config: dict[str, Any]) -> Callable[[], Tensor]:
    """Reads a tensor in fp32, queries and keys as llama.cpp's rope wants their rows."""
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads

    def load() -> Tensor:
        with safe_open(file, "pt") as f:
            tensor: Tensor = f.get_tensor(name).float()
        if ".q_proj." in name:
            return _pairs(tensor, heads)
        return _pairs(tensor, kv_heads) if ".k_proj." in name else tensor

    return load


def _pairs(tensor: Tensor, heads: int) -> Tensor:
    """Rows ``[heads * D, ...]``: in each head, halves ``[2, D/2]`` become pairs ``[D/2, 2]``."""
    split = tensor.view(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return split.transpose(1, 2).reshape(tensor.shape)


def listing(model_dir: Path) -> Iterator[tuple[str, Path, tuple[int, ...]]]:
    """Name, file and shape of every tensor of the checkpoint."""
    files = sorted(model_dir.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{model_dir}: no safetensors file")
    for file in files:
        with safe_open(file, "pt") as f:
            for name in f.keys():  # noqa: SIM118 - not a dict
                yield name, file, tuple(f.get_slice(name).get_shape())


def _add_tokenizer(writer: gguf.GGUFWriter, model_dir: Path, config: dict[str, Any]) -> None:
    path = model_dir / "tokenizer.json"
    spec = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    model = spec.get("model", {})
    vocab: dict[str, int] = model.get("vocab", {}) if model.get("type") == "BPE" else {}
    if "Ċ" not in vocab:  # the newline of a byte-level alphabet
        writer.add_tokenizer_model("none")
        return
    size, special = config["vocab_size"], gguf.TokenType.CONTROL
    tokens = [f"[PAD{i}]" for i in range(size)]
    types = [gguf.TokenType.UNUSED] * size
    for token, i in vocab.items():
        tokens[i], types[i] = token, gguf.TokenType.NORMAL
    for added in spec.get("added_tokens", []):
        i = added["id"]
        tokens[i] = added["content"]
        types[i] = special if added["special"] else gguf.TokenType.USER_DEFINED
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    for key, add in (("bos", writer.add_bos_token_id), ("eos", writer.add_eos_token_id)):
        value = config.get(f"{key}_token_id")
        value = value[0] if isinstance(value, list) else value
        if value is not None:
            add(value)


def _binding() -> ModuleType:
    """The low-level module of llama-cpp-python, also when this file's folder is on the path."""
    here, path = Path(__file__).resolve().parent, sys.path[:]
    if getattr(sys.modules.get("llama_cpp"), "__file__", None) == __file__:
        raise ImportError("import this tool as tools.llama_cpp: its bare name is the binding's")
    sys.path[:] = [p for p in path if Path(p or ".").resolve() != here]
    try:
        return importlib.import_module("llama_cpp.llama_cpp")
    finally:
        sys.path[:] = path


_QUIET: list[Any] = []


class LlamaCpp:
    """A GGUF model in llama.cpp at batch 1 on the CPU, driven through the C interface.

    Args:
        path: GGUF file.
        threads: CPU threads for decode and prefill.
        n_ctx: positions the cache holds; 0 for the model's context length.
        kv_type: element type of the cache, ``"F16"`` (llama.cpp's default) or ``"F32"``.
    """

    def __init__(
        self, path: str | Path, threads: int, n_ctx: int = 0, kv_type: str = "F16"
    ) -> None:
        self._api = api = _binding()
        if not _QUIET:
            api.llama_backend_init()
            quiet = api.llama_log_callback(lambda *_: None)
            api.llama_log_set(quiet, ctypes.c_void_p(0))
            _QUIET.append(quiet)  # the library keeps the pointer
        options = api.llama_model_default_params()
        options.n_gpu_layers = 0
        self._model = api.llama_model_load_from_file(str(path).encode(), options)
        if not self._model:
            raise RuntimeError(f"{path}: llama.cpp cannot load it")
        options = api.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch = n_ctx, BATCH, BATCH
        options.n_threads = options.n_threads_batch = threads
        options.type_k = options.type_v = gguf.GGMLQuantizationType[kv_type].value
        options.no_perf = True
        self._context = api.llama_init_from_model(self._model, options)
        if not self._context:
            raise RuntimeError(f"{path}: llama.cpp cannot make a context")
        self.n_ctx = int(api.llama_n_ctx(self._context))
        self.vocab_size = int(api.llama_vocab_n_tokens(api.llama_model_get_vocab(self._model)))

    def close(self) -> None:
        """Free the model and its cache."""
        if self._context:
            self._api.llama_free(self._context)
            self._api.llama_model_free(self._model)
            self._context = self._model = None

    def reset(self) -> None:
        """Empty the cache."""
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), False)

    def feed(self, ids: list[int]) -> np.ndarray:
        """Run tokens after those in the cache and give the last one's logits ``[vocab]``.

        The result is a view that the next call overwrites.
        """
        api = self._api
        for i in range(0, len(ids), BATCH):
            part = ids[i : i + BATCH]
            tokens = (api.llama_token * len(part))(*part)
            if code := api.llama_decode(self._context, api.llama_batch_get_one(tokens, len(part))):
                raise RuntimeError(f"llama_decode: {code}")
        logits = api.llama_get_logits_ith(self._context, -1)
        return np.ctypeslib.as_array(logits, (self.vocab_size,))

    def greedy(self, ids: list[int], n: int) -> list[int]:
        """``n`` greedy tokens after the prompt ``ids``."""
        self.reset()
        result = [int(self.feed(ids).argmax())]
        while len(result) < n:
            result.append(int(self.feed(result[-1:]).argmax()))
        return result

    def decode(self, n: int, context: int = 0) -> float:
        """Tokens a second over ``n`` greedy steps with ``context`` tokens in the cache before."""
        self.reset()
        token = 0
        if context:
            token = int(self.feed(self._tokens(context)).argmax())
        start = time.perf_counter()
        for _ in range(n):
            token = int(self.feed([token]).argmax())
        return n / (time.perf_counter() - start)

    def prefill(self, n: int) -> float:
        """Seconds from ``n`` tokens to the logits of the last."""
        self.reset()
        ids = self._tokens(n)
        start = time.perf_counter()
        self.feed(ids)
        return time.perf_counter() - start

    def _tokens(self, n: int) -> list[int]:
        return np.random.default_rng(0).integers(self.vocab_size, size=n).tolist()


def measure(args: argparse.Namespace, work: Path) -> None:
    """Convert, time the types in turn so that they share disturbances, print a table."""
    models = {}
    for qtype in args.types.split(","):
        file = work / f"{args.model_dir.resolve().name}-{qtype}.gguf"
        if not file.exists():
            start = time.perf_counter()
            # Written beside and renamed: a kill leaves no half file that looks whole.
            write_gguf(args.model_dir, file.with_suffix(".part"), qtype).replace(file)
            print(f"{file.name}: written in {time.perf_counter() - start:.0f} s", file=sys.stderr)
        need = max(args.prefill, args.context + args.tokens)
        models[qtype] = file, LlamaCpp(file, args.threads, n_ctx=-(-need // 256) * 256)
    speed: dict[str, list[float]] = {q: [] for q in models}
    first: dict[str, list[float]] = {q: [] for q in models}
    for round_ in range(args.repeats + 1):
        for qtype, (_, model) in models.items():
            rate, seconds = model.decode(args.tokens, args.context), model.prefill(args.prefill)
            if round_:  # the first round warms up
                speed[qtype].append(rate)
                first[qtype].append(seconds)
    print("| type | file MB | decode tok/s | min..max | prefill s | prefill tok/s |")
    print("|---|---|---|---|---|---|")
    for qtype, (file, model) in models.items():
        rate, seconds = statistics.median(speed[qtype]), statistics.median(first[qtype])
        print(
            f"| {qtype} | {file.stat().st_size / 1e6:.1f} | {rate:.2f} "
            f"| {min(speed[qtype]):.2f}..{max(speed[qtype]):.2f} "
            f"| {seconds:.3f} | {args.prefill / seconds:.1f} |"
        )
        model.close()


def parse() -> argparse.Namespace:
    """Command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("model_dir", type=Path, metavar="MODEL_DIR")
    p.add_argument("--types", default="Q4_0,Q8_0", help=f"comma-separated, of {', '.join(TYPES)}")
    p.add_argument("--tokens", type=int, default=64, help="decode steps timed")
    p.add_argument("--context", type=int, default=0, help="tokens in the cache before decoding")
    p.add_argument("--prefill", type=int, default=256, help="tokens of the timed prompt")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--repeats", type=int, default=3, help="rounds timed; the table has medians")
    p.add_argument("--work", type=Path, help="keep the GGUF files here and reuse them")
    return p.parse_args()


def main() -> None:
    """Convert and time."""
    args = parse()
    if args.work is not None:
        args.work.mkdir(parents=True, exist_ok=True)
        measure(args, args.work)
        return
    with tempfile.TemporaryDirectory() as folder:
        measure(args, Path(folder))


if __name__ == "__main__":
    main()
