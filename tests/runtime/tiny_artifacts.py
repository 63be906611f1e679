"""Tiny artifacts of known behaviour, built with onnx.helper and without torch."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

OPSET = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
LAYERS, HEADS, KV, WIDTH, MAX_LENGTH = 2, 4, 2, 8, 600
HIDDEN = HEADS * WIDTH
SCRIPT = "héllo € wörld 😀 END more text"  # what the scripted decoder says


def _tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat sat on the mat and then the hat"] * 4, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    # What a checkpoint may carry along; the runtime must not obey it for decoders.
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=16)
    return tokenizer


TOKENIZER = _tokenizer()
VOCAB = TOKENIZER.get_vocab_size()


def plain_ids(text: str) -> list[int]:
    tokenizer = Tokenizer.from_str(TOKENIZER.to_str())
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer.encode(text, add_special_tokens=False).ids


class Graph:
    """Collects nodes and initializers; every method returns the name of its result."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.weights: list[Any] = []

    def op(self, kind: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        names = [f"v{len(self.nodes)}_{n}" for n in range(outputs)]
        self.nodes.append(helper.make_node(kind, inputs, names, **attributes))
        return names[0] if outputs == 1 else names

    def const(self, array: Any, dtype: Any = None) -> str:
        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(array, dtype), name))
        return name

    def rename(self, name: str, to: str) -> None:
        self.nodes.append(helper.make_node("Identity", [name], [to]))

    def model(self, inputs: list[Any], outputs: list[Any]) -> onnx.ModelProto:
        graph = helper.make_graph(self.nodes, "tiny", inputs, outputs, self.weights)
        return helper.make_model(graph, opset_imports=OPSET, ir_version=10)


def _int64(name: str, *shape: Any) -> Any:
    return helper.make_tensor_value_info(name, TensorProto.INT64, shape)


def _float(name: str, *shape: Any) -> Any:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def decoder(shared: bool) -> onnx.ModelProto:
    """Two layers of grouped-query attention with learned positions, the same both ways."""
    random = np.random.default_rng(0)

    def weight(*shape: int) -> str:
        return g.const(random.normal(0, shape[0] ** -0.5, shape), np.float32)

    g = Graph()
    inputs = [_int64(n, "b", "s") for n in ("input_ids", "position_ids")]
    inputs.append(_int64("attention_mask", "b", "t"))
    outputs = [_float("logits", "b", "s", VOCAB)]
    table = g.const(random.normal(0, 1, (VOCAB, HIDDEN)), np.float32)
    places = g.const(random.normal(0, 1, (MAX_LENGTH, HIDDEN)), np.float32)
    x = g.op("Add", g.op("Gather", table, "input_ids"), g.op("Gather", places, "position_ids"))
    total = g.op("Gather", g.op("Shape", "attention_mask"), g.const(1, np.int64))
    if shared:
        count = g.op("ReduceSum", "attention_mask", g.const([1], np.int64), keepdims=0)
        last = g.op("Cast", g.op("Sub", count, g.const(1, np.int64)), to=TensorProto.INT32)
        total = g.op("Cast", total, to=TensorProto.INT32)
    else:
        zero, one = g.const(0, np.int64), g.const(1, np.int64)
        keys = g.op("Range", zero, total, one)
        query = g.op("Unsqueeze", "position_ids", g.const([1, 3], np.int64))  # [b, 1, s, 1]
        query = g.op("Unsqueeze", query, g.const([1], np.int64))
        mask = g.op("Greater", keys, query)  # [b, 1, 1, s, t]
        bias = g.op("Where", mask, g.const(-1e9, np.float32), g.const(0, np.float32))
    for layer in range(LAYERS):
        q = g.op("MatMul", x, weight(HIDDEN, HIDDEN))
        k, v = (g.op("MatMul", x, weight(HIDDEN, KV * WIDTH)) for _ in range(2))
        pasts = [f"past_key_values.{layer}.{part}" for part in ("key", "value")]
        presents = [f"present.{layer}.{part}" for part in ("key", "value")]
        inputs += [_float(name, "b", KV, "p", WIDTH) for name in pasts]
        outputs += [_float(name, "b", KV, "n", WIDTH) for name in presents]
        if shared:
            y, *now = g.op(
                "GroupQueryAttention",
                *(q, k, v, *pasts, last, total),
                outputs=3,
                domain="com.microsoft",
                num_heads=HEADS,
                kv_num_heads=KV,
            )
        else:
            split = g.const([0, -1, KV, WIDTH], np.int64)
            k, v = (g.op("Transpose", g.op("Reshape", t, split), perm=[0, 2, 1, 3]) for t in (k, v))
            now = [g.op("Concat", p, t, axis=2) for p, t in zip(pasts, (k, v), strict=True)]
            k, v = (g.op("Unsqueeze", t, g.const([2], np.int64)) for t in now)
            q = g.op("Reshape", q, g.const([0, -1, KV, HEADS // KV, WIDTH], np.int64))
            q = g.op("Transpose", q, perm=[0, 2, 3, 1, 4])
            scores = g.op("MatMul", q, g.op("Transpose", k, perm=[0, 1, 2, 4, 3]))
            scores = g.op("Mul", scores, g.const(WIDTH**-0.5, np.float32))
            y = g.op("MatMul", g.op("Softmax", g.op("Add", scores, bias)), v)
            y = g.op("Transpose", y, perm=[0, 3, 1, 2, 4])
            y = g.op("Reshape", y, g.const([0, 0, HIDDEN], np.int64))
        for name, present in zip(now, presents, strict=True):
            g.rename(name, present)
        x = g.op("Add", x, g.op("MatMul", y, weight(HIDDEN, HIDDEN)))
    g.rename(g.op("MatMul", x, weight(HIDDEN, VOCAB)), "logits")
    return g.model(inputs, outputs)


def _scripted(ids: list[int]) -> onnx.ModelProto:
    """Says ``ids`` whatever the prompt: token n after position n. Takes no attention_mask."""
    logits = np.full((MAX_LENGTH, VOCAB), -5, np.float32)
    logits[np.arange(len(ids)), ids] = 5
    g = Graph()
    g.rename(g.op("Gather", g.const(logits), "position_ids"), "logits")
    new = g.op("Cast", g.op("Unsqueeze", "input_ids", g.const([1, 3], np.int64)), to=1)
    for part in ("key", "value"):
        g.rename(g.op("Concat", f"past_key_values.0.{part}", new, axis=2), f"present.0.{part}")
    caches = [f"{part}" for part in ("key", "value")]
    return g.model(
        [_int64("input_ids", "b", "s"), _int64("position_ids", "b", "s")]
        + [_float(f"past_key_values.0.{part}", "b", 1, "p", 1) for part in caches],
        [_float("logits", "b", "s", VOCAB)]
        + [_float(f"present.0.{part}", "b", 1, "n", 1) for part in caches],
    )


def encoder() -> onnx.ModelProto:
    """hidden = table[id] + the mean of table[id] over the mask."""
    g = Graph()
    table = np.random.default_rng(1).normal(0, 1, (VOCAB, HIDDEN)).astype(np.float32)
    mask = g.op("Cast", "attention_mask", to=TensorProto.FLOAT)
    mask = g.op("Unsqueeze", mask, g.const([2], np.int64))
    x = g.op("Gather", g.const(table), "input_ids")
    axis = g.const([1], np.int64)
    total = g.op("ReduceSum", g.op("Mul", x, mask), axis)
    g.rename(g.op("Add", x, g.op("Div", total, g.op("ReduceSum", mask, axis))), "output")
    ids = [_int64("input_ids", "b", "s"), _int64("attention_mask", "b", "s")]
    return g.model(ids, [_float("output", "b", "s", HIDDEN)])


def module() -> onnx.ModelProto:
    g = Graph()
    g.rename(g.op("Mul", "x", g.const([2.0, 3.0], np.float32)), "y")
    return g.model([_float("x", "n", 2)], [_float("y", "n", 2)])


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    (folder / "manifest.json").write_text(json.dumps(manifest), "utf-8")


def read_manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text("utf-8"))


def _hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if path.name != "manifest.json"
    }


def seal(folder: Path, targets: dict[str, Any] | None = None) -> None:
    """List the files as they are now, and more targets."""
    manifest = read_manifest(folder)
    manifest["targets"] |= targets or {}
    write_manifest(folder, manifest | {"files": _hashes(folder)})


def write(folder: Path, kind: str, model: onnx.ModelProto, **info: Any) -> Path:
    (folder / "onnx").mkdir(parents=True)
    onnx.save_model(
        model,
        folder / "onnx/model.onnx",
        save_as_external_data=True,
        location="model.onnx.data",
        size_threshold=1024 if kind != "module" else 0,
    )
    if kind != "module":
        TOKENIZER.save(str(folder / "tokenizer.json"))
    manifest = {
        "schema": 1,
        "carve": "0.1.0",
        "kind": kind,
        "source": {"id": "tiny"},
        "files": _hashes(folder),
        "targets": {"onnx-cpu": {"model": "onnx/model.onnx", "bits": 16}},
        "model": {
            "vocab_size": VOCAB,
            "max_length": MAX_LENGTH,
            "bos_token_id": 0,
            "eos_token_ids": [1],
            "num_layers": LAYERS,
            "num_key_value_heads": KV,
            "head_dim": WIDTH,
            "shared_cache": False,
            "pooling": None,
            "normalize": False,
        }
        | info,
    }
    write_manifest(folder, manifest)
    return folder


def write_scripted(folder: Path, text: str, *, prompt: str = "hi", **info: Any) -> Path:
    """An artifact that answers ``prompt`` with ``text`` and the end token."""
    start = len(plain_ids(prompt))  # <s> comes first: the last prompt token is at this position
    ids = [0] * start + plain_ids(text) + [1]
    info = {"num_layers": 1, "num_key_value_heads": 1, "head_dim": 1} | info
    return write(folder, "decoder", _scripted(ids), **info)
