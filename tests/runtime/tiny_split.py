"""A tiny routed decoder in one file and in split form, built without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper
from tiny_artifacts import (
    HEADS,
    HIDDEN,
    KV,
    LAYERS,
    MAX_LENGTH,
    VOCAB,
    WIDTH,
    Graph,
    _float,
    _int64,
    seal,
    write,
)

EXPERTS, TOP_K, PAGE, BLOCK = 8, 2, 4096, 32
D = HIDDEN


def _weights(bits: int, size: int) -> dict[str, Any]:
    r = np.random.default_rng(5)

    def w(*shape: int) -> np.ndarray:
        return r.normal(0, shape[-2] ** -0.5, shape).astype(np.float32)

    found: dict[str, Any] = {"table": w(VOCAB, D) * 16, "places": w(MAX_LENGTH, D) * 10}
    for layer in range(LAYERS):
        found |= {f"{layer}.{n}": w(D, KV * WIDTH) for n in "kv"}
        found |= {f"{layer}.{n}": w(D, D) for n in "qo"}
        found[f"{layer}.router"] = w(D, EXPERTS)
        if bits == 16:
            found[f"{layer}.up"], found[f"{layer}.down"] = w(EXPERTS, D, size), w(EXPERTS, size, D)
            continue
        for name, rows, columns in (("up", size, D), ("down", D, size)):
            levels = r.integers(0, 256, (EXPERTS, rows, columns // 2), np.uint8)
            scale = r.uniform(0.01, 0.03, (EXPERTS, rows, columns // BLOCK))
            found[f"{layer}.{name}"], found[f"{layer}.{name}.s"] = levels, scale.astype(np.float32)
    found["head"] = w(D, VOCAB) * 3
    return found


def _qmoe(g: Graph, x: str, scores: str, routes: str, tensors: list[str], k: int) -> str:
    w1, s1, w2, s2 = tensors
    inputs = [x, scores, w1, s1, "", w2, s2, "", *[""] * 6, routes]
    return g.op(
        "QMoE",
        *inputs,
        domain="com.microsoft",
        k=k,
        normalize_routing_weights=0,
        expert_weight_bits=4,
        block_size=BLOCK,
        accuracy_level=4,
        activation_type="relu",
    )


class _Trunk:
    """What the segments and the whole model are made of."""

    def __init__(self, weights: dict[str, Any], bits: int) -> None:
        self.w, self.bits, self.g = weights, bits, Graph()
        self.inputs: list[Any] = []
        self.outputs: list[Any] = []

    def take(self, *infos: Any) -> None:
        known = {i.name for i in self.inputs}
        self.inputs += [i for i in infos if i.name not in known]

    def give(self, value: str, info: Any) -> None:
        self.g.rename(value, info.name)
        self.outputs.append(info)

    def start(self) -> str:
        g = self.g
        self.take(*(_int64(n, "b", "s") for n in ("input_ids", "position_ids")))
        ids, at = (g.const(self.w[n]) for n in ("table", "places"))
        return g.op("Add", g.op("Gather", ids, "input_ids"), g.op("Gather", at, "position_ids"))

    def attend(self, x: str, layer: int) -> str:
        g = self.g
        self.take(_int64("attention_mask", "b", "t"))
        count = g.op("ReduceSum", "attention_mask", g.const([1], np.int64), keepdims=0)
        last = g.op("Cast", g.op("Sub", count, g.const(1, np.int64)), to=TensorProto.INT32)
        total = g.op("Gather", g.op("Shape", "attention_mask"), g.const(1, np.int64))
        total = g.op("Cast", total, to=TensorProto.INT32)
        z = self.norm(x)
        q, k, v = (g.op("MatMul", z, g.const(self.w[f"{layer}.{n}"])) for n in "qkv")
        pasts = [f"past_key_values.{layer}.{part}" for part in ("key", "value")]
        self.take(*(_float(name, "b", KV, "p", WIDTH) for name in pasts))
        y, *now = g.op(
            "GroupQueryAttention",
            *(q, k, v, *pasts, last, total),
            outputs=3,
            domain="com.microsoft",
            num_heads=HEADS,
            kv_num_heads=KV,
        )
        for part, value in zip(("key", "value"), now, strict=True):
            self.give(value, _float(f"present.{layer}.{part}", "b", KV, "n", WIDTH))
        return g.op("Add", x, g.op("MatMul", y, g.const(self.w[f"{layer}.o"])))

    def norm(self, x: str) -> str:
        one = self.g.const(np.ones(D, np.float32))
        return self.g.op("SimplifiedLayerNormalization", x, one, axis=-1, epsilon=1e-5)

    def route(self, x: str, layer: int) -> tuple[str, str, str]:
        """Rows ``[n, d]``, scores and routes ``[n, E]``."""
        g = self.g
        flat = g.op("Reshape", self.norm(x), g.const([-1, D], np.int64))
        scores = g.op("MatMul", flat, g.const(self.w[f"{layer}.router"]))
        _, index = g.op("TopK", scores, g.const([TOP_K], np.int64), outputs=2)
        zeros = g.op("Mul", scores, g.const(0, np.float32))
        ones = g.op("Expand", g.const([[1.0]], np.float32), g.op("Shape", index))
        return flat, scores, g.op("ScatterElements", zeros, index, ones, axis=1)

    def every_expert(self, flat: str, scores: str, routes: str, layer: int) -> str:
        g, w = self.g, self.w
        if self.bits == 4:
            names = [f"{layer}.{n}" for n in ("up", "up.s", "down", "down.s")]
            return _qmoe(g, flat, scores, routes, [g.const(w[n]) for n in names], TOP_K)
        total = g.op("Mul", flat, g.const(0, np.float32))
        for e in range(EXPERTS):
            h = g.op("Relu", g.op("MatMul", flat, g.const(w[f"{layer}.up"][e])))
            out = g.op("MatMul", h, g.const(w[f"{layer}.down"][e]))
            on = g.op("Gather", routes, g.const([e], np.int64), axis=1)
            total = g.op("Add", total, g.op("Mul", on, out))
        return total

    def end(self, x: str) -> None:
        logits = self.g.op("MatMul", self.norm(x), self.g.const(self.w["head"]))
        self.give(logits, _float("logits", "b", "s", VOCAB))

    def model(self) -> onnx.ModelProto:
        return self.g.model(self.inputs, self.outputs)


def whole(bits: int, size: int = 32) -> onnx.ModelProto:
    """The decoder in one graph."""
    t = _Trunk(_weights(bits, size), bits)
    x = t.start()
    for layer in range(LAYERS):
        x = t.attend(x, layer)
        y = t.every_expert(*t.route(x, layer), layer)
        x = t.g.op("Add", x, t.g.op("Reshape", y, t.g.op("Shape", x)))
    t.end(x)
    return t.model()


def _segments(weights: dict[str, Any], bits: int) -> list[onnx.ModelProto]:
    found = []
    for k in range(LAYERS + 1):
        t = _Trunk(weights, bits)
        if k == 0:
            x = t.start()
        else:
            t.take(_float(f"h.{k - 1}", "b", "s", D), _float(f"y.{k - 1}", "n", D))
            y = t.g.op("Reshape", f"y.{k - 1}", t.g.op("Shape", f"h.{k - 1}"))
            x = t.g.op("Add", f"h.{k - 1}", y)
        if k == LAYERS:
            t.end(x)
        else:
            x = t.attend(x, k)
            flat, _, routes = t.route(x, k)
            t.give(flat, _float(f"x.{k}", "n", D))
            t.give(routes, _float(f"routes.{k}", "n", EXPERTS))
            t.give(x, _float(f"h.{k}", "b", "s", D))
        found.append(t.model())
    return found


def _tensors(w: dict[str, Any], layer: int, e: int, bits: int) -> dict[str, np.ndarray]:
    names = ("up", "down") if bits == 16 else ("up", "up.s", "down", "down.s")
    one = {n: w[f"{layer}.{n}"][e] for n in names}
    return one if bits == 16 else {n: a[None] for n, a in one.items()}


def _form(tensors: dict[str, np.ndarray], bits: int) -> tuple[onnx.ModelProto, dict[str, Any]]:
    g = Graph()
    entries, at = [], 0
    for name, array in tensors.items():
        proto = TensorProto(
            name=name,
            data_type=helper.np_dtype_to_tensor_dtype(array.dtype),
            dims=array.shape,
            data_location=TensorProto.EXTERNAL,
        )
        proto.external_data.add(key="location", value="experts.bin")
        g.weights.append(proto)
        entry = {"name": name, "offset": at, "shape": list(array.shape), "dtype": array.dtype.name}
        entries.append(entry)
        at += -(-array.nbytes // 64) * 64
    if bits == 16:
        y = g.op("MatMul", g.op("Relu", g.op("MatMul", "x", "up")), "down")
    else:
        rows = g.op("Shape", "x", end=1)
        rows = g.op("Concat", rows, g.const([1], np.int64), axis=0)
        on = g.op("Expand", g.const([[1.0]], np.float32), rows)
        y = _qmoe(g, "x", on, on, list(tensors), 1)
    g.rename(y, "y")
    model = g.model([_float("x", "n", D)], [_float("y", "n", D)])
    size = -(-at // PAGE) * PAGE
    return model, {"model": "expert0.onnx", "bits": bits, "size": size, "tensors": entries}


def write_split(folder: Path, bits: int, size: int = 32) -> Path:
    """An artifact with both targets."""
    write(folder, "decoder", whole(bits, size), eos_token_ids=[], shared_cache=True)
    out = folder / "split"
    out.mkdir()
    w = _weights(bits, size)
    names = []
    for k, model in enumerate(_segments(w, bits)):
        names.append(f"segment{k}.onnx")
        onnx.save(model, out / names[-1])
    model, form = _form(_tensors(w, 0, 0, bits), bits)
    onnx.save(model, out / form["model"])
    order = [(layer, e) for e in range(EXPERTS) for layer in range(LAYERS)]
    experts = []
    with (out / "experts.bin").open("wb") as file:
        for i, (layer, e) in enumerate(order):
            for entry, array in zip(
                form["tensors"], _tensors(w, layer, e, bits).values(), strict=True
            ):
                file.seek(i * form["size"] + entry["offset"])
                file.write(array.tobytes())
            where = {"layer": layer, "expert": e, "form": 0, "offset": i * form["size"]}
            experts.append(where | {"hotness": round(0.5 / (1 + e), 3)})
        file.truncate(len(order) * form["size"])
    layers: list[dict[str, Any]] = [
        {"name": f"l{i}", "experts": EXPERTS, "top_k": TOP_K, "dynamic": False, "width": D}
        for i in range(LAYERS)
    ]
    layers[1]["predictor"] = {"stream": ["h.0"], "offset": 0}
    router = w["1.router"].T.astype("<f4").tobytes() + bytes(4 * EXPERTS)
    (out / "predictors.bin").write_bytes(router)
    caches = [f"present.{i}.{part}" for i in range(LAYERS) for part in ("key", "value")]
    index = {
        "schema": 1,
        "segments": names,
        "outputs": ["logits", *caches],
        "layers": layers,
        "predictors": "predictors.bin",
        "data": "experts.bin",
        "page": PAGE,
        "forms": [form],
        "experts": experts,
    }
    (out / "index.json").write_text(json.dumps(index), "utf-8")
    seal(folder, {"onnx-split": {"model": "split/index.json", "bits": bits}})
    return folder
