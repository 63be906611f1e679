"""A tiny decoder compiled by TVM, and an artifact around it; needs no torch."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("TVM_FFI_DISABLE_TORCH_C_DLPACK", "1")

import tvm
from carve_runtime import processor
from tiny_artifacts import MAX_LENGTH, TOKENIZER, VOCAB, seal, write_manifest
from tvm import relax, tirx
from tvm.relax import op
from tvm.script import tirx as T

WIDTH = 16


def _library(path: Path) -> None:
    """``logits_t = table[id_0] + ... + table[id_t]``, the sum taken over the cache."""
    bb = relax.BlockBuilder()
    for name, length in (("decode", 1), ("prefill", tirx.Var("length", "int64"))):
        capacity = tirx.Var("capacity", "int64")
        ids, position = (
            relax.Var(n, relax.TensorType([1, length], "int64")) for n in ("ids", "position")
        )
        keep = tirx.Var("keep", "int64")
        rows = [] if name == "decode" else [relax.Var("rows", relax.ShapeType([keep]))]
        size = [1, 1, capacity, WIDTH]
        caches = [relax.Var(f"c{i}", relax.TensorType(size, "float32")) for i in range(2)]
        table = relax.Var("table", relax.TensorType([VOCAB, WIDTH], "float32"))
        head = relax.Var("head", relax.TensorType([WIDTH, VOCAB], "float32"))
        with bb.function(name, [ids, position, *rows, *caches, table, head]):

            @T.prim_func(private=True)
            def step(
                ip: T.handle, pp: T.handle, t: T.Buffer((VOCAB, WIDTH), "float32"),
                kp: T.handle, vp: T.handle, yp: T.handle,
            ):  # fmt: skip
                n = T.int64()
                c = T.int64()
                i_ = T.match_buffer(ip, (1, n), "int64")
                p_ = T.match_buffer(pp, (1, n), "int64")
                k_ = T.match_buffer(kp, (1, 1, c, WIDTH), "float32")
                v_ = T.match_buffer(vp, (1, 1, c, WIDTH), "float32")
                y = T.match_buffer(yp, (1, n, WIDTH), "float32")
                for s, j in T.grid(n, WIDTH):
                    k_[0, 0, p_[0, s], j] = t[i_[0, s], j]
                    v_[0, 0, p_[0, s], j] = t[i_[0, s], j]
                for s, j in T.grid(n, WIDTH):
                    y[0, s, j] = T.float32(0)
                    for m in range(p_[0, s] + 1):
                        y[0, s, j] = y[0, s, j] + k_[0, 0, m, j]

            gv = bb.add_func(step, "step")
            given = relax.Tuple([ids, position, table, *caches])
            kept = [c.ty for c in caches]
            hidden = relax.TensorType([1, length, WIDTH], "float32")
            made = bb.emit(op.call_tir_inplace(gv, given, [3, 4, -1], [*kept, hidden]))
            h, k, v = (bb.emit(made[i]) for i in (2, 0, 1))
            if rows:
                h = bb.emit(op.dynamic_strided_slice(h, *_last(bb, length, keep)))
                h = bb.match_cast(h, relax.TensorType([1, keep, WIDTH], "float32"))
            logits = bb.emit(op.matmul(h, head))
            bb.emit_func_output(bb.emit(relax.Tuple([logits, k, v])))
    tvm.compile(bb.get(), target=tvm.target.Target({"kind": "llvm"})).export_library(str(path))


def _last(bb: relax.BlockBuilder, length: Any, keep: Any) -> list[relax.Expr]:
    ends = ([0, length - keep, 0], [1, length, WIDTH], [1, 1, 1])
    return [bb.emit(op.shape_to_tensor(relax.ShapeExpr(e))) for e in ends]


def write_tensors(path: Path, arrays: dict[str, np.ndarray], shift: int = 0) -> None:
    header, at = {}, shift
    if shift:
        header["_"] = {"dtype": "U8", "shape": [shift], "data_offsets": [0, shift]}
    for name, a in arrays.items():
        ends = [at, at + a.nbytes]
        header[name] = {"dtype": "F32", "shape": list(a.shape), "data_offsets": ends}
        at += a.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)
    data = bytes(shift) + b"".join(a.tobytes() for a in arrays.values())
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def tensors() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {
        "table": random.normal(size=(VOCAB, WIDTH)).astype(np.float32),
        "head": random.normal(size=(WIDTH, VOCAB)).astype(np.float32),
    }


def index() -> dict[str, Any]:
    def port(name: str, dtype: str, *shape: Any) -> dict[str, Any]:
        return {"name": name, "dtype": f"tensor({dtype})", "shape": list(shape)}

    parts = ("key", "value")
    return {
        "schema": 1,
        "target": "tvm:host",
        "machine": processor.machine(),
        "flags": [],
        "library": "model.so",
        "tensors": "model.safetensors",
        "functions": {f: ["table", "head"] for f in ("decode", "prefill")},
        "inputs": [
            port("input_ids", "int64", None, None),
            port("position_ids", "int64", None, None),
            *(port(f"past_key_values.0.{p}", "float", None, 1, None, WIDTH) for p in parts),
        ],
        "outputs": [
            port("logits", "float", None, None, VOCAB),
            *(port(f"present.0.{p}", "float", None, 1, None, WIDTH) for p in parts),
        ],
    }


def write_index(folder: Path, **changes: Any) -> None:
    (folder / "tvm/host/index.json").write_text(json.dumps(index() | changes))


def write_compiled(folder: Path) -> Path:
    """An artifact with the target ``tvm:host`` alone."""
    (folder / "tvm/host").mkdir(parents=True)
    _library(folder / "tvm/host/model.so")
    write_tensors(folder / "tvm/host/model.safetensors", tensors())
    write_index(folder)
    TOKENIZER.save(str(folder / "tokenizer.json"))
    manifest = {
        "schema": 1,
        "carve": "0.1.0",
        "kind": "decoder",
        "source": {"id": "tiny"},
        "files": {},
        "targets": {"tvm:host": {"model": "tvm/host/index.json", "bits": 16}},
        "model": {
            "vocab_size": VOCAB,
            "max_length": MAX_LENGTH,
            "bos_token_id": 0,
            "eos_token_ids": [],
            "num_layers": 1,
            "num_key_value_heads": 1,
            "head_dim": WIDTH,
            "shared_cache": True,
            "pooling": None,
            "normalize": False,
        },
    }
    write_manifest(folder, manifest)
    seal(folder)
    return folder
