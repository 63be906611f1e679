"""TVM's routed kernels beside onnxruntime's nodes: ``python tools/tvm_kernels.py``.

One FFN of a 1.1B Llama (2,048 x 5,632) with random weights, half of it active: a shared expert and
a few of twelve routed ones. Everything runs in this process in turn, so that a change of the
machine's speed falls on each; times are medians (and the least), ratios medians over rounds.
"read" is a plain sum over 128 MB: the rate at which this machine reads. With ``--threads 1`` time
is that of the thread on its processor, which other processes disturb less.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from onnx import TensorProto, helper, numpy_helper

from carve.emit import pack
from carve.grid import Grid
from carve.report import table

EXPERTS, TOP_K = 12, 4
WARM = 0.06
"""Seconds that each runs before its calls are timed."""


@dataclass(frozen=True)
class Timed:
    """Something to run, and how many bytes it reads."""

    name: str
    run: Callable[[], object]
    size: float


def main() -> None:
    """Build everything, run the rounds, print the table."""
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    a.add_argument("--hidden", type=int, default=2048)
    a.add_argument("--shared", type=int, default=1408, help="neurons of the shared expert")
    a.add_argument("--expert", type=int, default=352, help="neurons of each of 12 experts")
    a.add_argument("--tokens", type=int, nargs="+", default=[1, 256])
    a.add_argument("--bits", type=int, nargs="+", default=[32, 8, 4])
    a.add_argument("--block", type=int, default=32)
    a.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    a.add_argument("--rounds", type=int, default=15)
    a.add_argument("--only", default="", help="names to run, a part of them is enough")
    args = a.parse_args()
    os.environ["TVM_NUM_THREADS"] = str(args.threads)
    os.environ["TVM_BIND_THREADS"] = "0"  # as the runtime has it
    weights = Weights(args.hidden, args.shared, args.expert)
    for tokens in args.tokens:
        for bits in args.bits:
            timed = [read(128 << 20), *onnxruntime(weights, tokens, bits, args.block, args.threads)]
            timed.append(tvm(weights, tokens, bits, args.block))
            timed = [t for t in timed if args.only in t.name]
            print(f"\n{tokens} token(s), {bits} bits, {args.threads} thread(s)")
            clock = time.thread_time if args.threads == 1 else time.perf_counter
            print(rounds(timed, args.rounds, clock))


class Weights:
    """A routed FFN with random weights, and the dense one of the same neurons."""

    def __init__(self, hidden: int, shared: int, expert: int) -> None:
        g = torch.Generator().manual_seed(0)

        def make(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=g) * shape[-1] ** -0.5

        self.hidden, self.shared, self.expert = hidden, shared, expert
        self.shared_gate, self.shared_up = make(shared, hidden), make(shared, hidden)
        self.shared_down = make(hidden, shared)
        self.expert_gate, self.expert_up = (make(EXPERTS, expert, hidden) for _ in range(2))
        self.expert_down = make(EXPERTS, hidden, expert)

    @property
    def dense(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gate, up and down of all neurons."""
        gate = torch.cat((self.shared_gate, self.expert_gate.flatten(0, 1)))
        up = torch.cat((self.shared_up, self.expert_up.flatten(0, 1)))
        return gate, up, torch.cat((self.shared_down, *self.expert_down), 1)

    def inputs(self, tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """Activations, and scores of which exactly ``TOP_K`` are positive."""
        g = torch.Generator().manual_seed(tokens)
        scores = torch.rand(tokens, EXPERTS, generator=g)
        scores -= scores.topk(TOP_K + 1).values[:, -1:]
        return torch.randn(tokens, self.hidden, generator=g).numpy(), scores.numpy()

    def bytes(self, active: int, bits: int, block: int) -> float:
        """Bytes of ``active`` neurons."""
        each = 4 if bits == 32 else bits / 8 + 4 / block
        return 3 * self.hidden * active * each


def rounds(timed: list[Timed], count: int, clock: Callable[[], float]) -> str:
    """Run each in turn, some calls at a time."""
    times: dict[str, list[float]] = {t.name: [] for t in timed}
    least = {t.name: float("inf") for t in timed}
    calls = {t.name: calls_for(t) for t in timed}
    for _ in range(count):
        for t in timed:
            time.sleep(0.02)  # until the other engine's threads have stopped waiting for work
            # Threads that wake on one core take tens of milliseconds until each has its own.
            began = time.perf_counter()
            while time.perf_counter() - began < WARM:
                t.run()
            each = []
            for _ in range(calls[t.name]):
                began = clock()
                t.run()
                each.append(clock() - began)
            times[t.name].append(statistics.median(each))
            least[t.name] = min(least[t.name], *each)
    ours = timed[-1].name
    out = [["", "ms", "least ms", "GB/s at best", "TVM is faster by", "at best"]]
    for t in timed:
        ratio = statistics.median(x / y for x, y in zip(times[t.name], times[ours], strict=True))
        out.append(
            [
                t.name,
                f"{1e3 * statistics.median(times[t.name]):.3f}",
                f"{1e3 * least[t.name]:.3f}",
                f"{t.size / least[t.name] / 1e9:.1f}",
                f"{ratio:.2f}" if t.name != "read" else "",
                f"{least[t.name] / least[ours]:.2f}" if t.name != "read" else "",
            ]
        )
    return table(out)


def calls_for(t: Timed) -> int:
    """As many calls as take 50 ms."""
    began = time.perf_counter()
    t.run()
    return max(2, min(50, int(0.05 / (time.perf_counter() - began))))


def read(size: int) -> Timed:
    """A sum in TIR over ``size`` bytes, divided among the threads."""
    import tvm as tvm_
    from tvm.script.ir_builder import IRBuilder
    from tvm.tirx.script import builder as T

    from carve.emit.tvm.cpu import Cpu
    from carve.emit.tvm.kernels.vector import load, local, splat, store

    cpu = Cpu.named("host")
    n, parts, sets = cpu.lanes, 64, 8
    each = size // 4 // parts
    with IRBuilder() as ib, T.prim_func():
        T.func_name("read")
        x, y = T.arg("x", T.buffer((parts * each,))), T.arg("y", T.buffer((parts * n,)))
        with T.parallel(0, parts) as p:
            acc = [local(n) for _ in range(sets)]
            for v in acc:
                store(v, 0, splat(0.0, n), n)
            with T.serial(0, each // n // sets) as i:
                for j, v in enumerate(acc):
                    store(v, 0, load(v, 0, n) + load(x, p * each + (i * sets + j) * n, n), n)
            for v in acc[1:]:
                store(acc[0], 0, load(acc[0], 0, n) + load(v, 0, n), n)
            store(y, p * n, load(acc[0], 0, n), n)
    run = tvm_.compile(tvm_.IRModule({"read": ib.get()}), target=cpu.target())["read"]
    x = tvm_.runtime.tensor(np.ones(parts * each, np.float32))
    y = tvm_.runtime.tensor(np.zeros(parts * n, np.float32))
    return Timed("read", lambda: run(x, y), size)


def tvm(w: Weights, tokens: int, bits: int, block: int) -> Timed:
    """The routed FFN as carve's kernel."""
    import tvm as tvm_

    from carve.emit.tvm.cpu import Cpu
    from carve.emit.tvm.kernels import PIPELINE, Format, RoutedSpec, routed_ffn
    from carve.emit.tvm.weights import Matrix, pack_routed

    cpu = Cpu.named("host")
    form = Format() if bits == 32 else Format(bits, block)
    spec = RoutedSpec(w.hidden, w.shared, w.expert, EXPERTS, TOP_K, dynamic=True)
    forms = ("shared_in", "shared_down", "expert_in", "expert_down")
    spec = replace(spec, **dict.fromkeys(forms, form))
    function = routed_ffn(spec, cpu)
    module = tvm_.IRModule({"routed_ffn": function})
    run = tvm_.compile(module, target=cpu.target(), tir_pipeline=PIPELINE)["routed_ffn"]

    def matrix(name: str) -> Matrix:
        value = getattr(w, name)
        if bits == 32:
            return Matrix(value.numpy())
        grid = Grid.nearest(value, bits, block)
        return Matrix(grid.levels(value).numpy(), grid.scale.numpy())

    names = [f"{p}_{m}" for p in ("shared", "expert") for m in ("gate", "up", "down")]
    packed = pack_routed(spec, cpu, **{n: matrix(n) for n in names})
    x, scores = w.inputs(tokens)
    arrays = (x, scores, *packed.values(), np.zeros((tokens, w.hidden), np.float32))
    given = [tvm_.runtime.tensor(v) for v in arrays]
    return Timed("TVM routed", lambda: run(*given), w.bytes(active(w), bits, block))


def active(w: Weights) -> int:
    """Neurons that a token passes through."""
    return w.shared + TOP_K * w.expert


def onnxruntime(w: Weights, tokens: int, bits: int, block: int, threads: int) -> list[Timed]:
    """The dense FFN of the same width; the routed experts' node, shared expert beside it."""
    x, scores = w.inputs(tokens)
    routes = (scores > 0).astype(np.float32)
    every = w.shared + EXPERTS * w.expert
    dense = Graph(bits, block)
    dense.ffn("x", *w.dense, out="y")
    found = [Timed("onnxruntime dense", dense.run({"x": x}, threads), w.bytes(every, bits, block))]
    moe = Graph(bits, block)
    moe.ffn("x", w.shared_gate, w.shared_up, w.shared_down, out="s")
    kind = moe.experts(w)
    moe.node("Add", ["s", "e"], "y")
    size = w.bytes(active(w), bits, block)
    feeds = {"x": x, "scores": scores if bits < 32 else np.where(routes > 0, 0, -60) + 0 * scores}
    feeds["scores"] = feeds["scores"].astype(np.float32)
    if bits < 32:
        feeds["routes"] = routes
    found.append(Timed(f"onnxruntime {kind}", moe.run(feeds, threads), size))
    return found


class Graph:
    """A small ONNX graph of products at some width."""

    def __init__(self, bits: int, block: int) -> None:
        self.bits, self.block = bits, block
        self.nodes: list[Any] = []
        self.weights: dict[str, np.ndarray] = {}

    def node(self, kind: str, inputs: list[str], out: str, **attributes: Any) -> None:
        domain = attributes.pop("domain", "")
        self.nodes.append(helper.make_node(kind, inputs, [out], domain=domain, **attributes))

    def linear(self, x: str, weight: torch.Tensor, out: str) -> None:
        """``x @ weight.T``."""
        if self.bits == 32:
            self.weights[f"{out}.w"] = weight.T.contiguous().numpy()
            self.node("MatMul", [x, f"{out}.w"], out)
            return
        n, k = weight.shape
        grid = Grid.nearest(weight, self.bits, self.block)
        packed = pack.pack(grid.levels(weight), self.bits)
        self.weights[f"{out}.w"] = packed.reshape(n, k // self.block, -1)
        self.weights[f"{out}.s"] = grid.scale.numpy()
        self.node(
            "MatMulNBits",
            [x, f"{out}.w", f"{out}.s"],
            out,
            domain="com.microsoft",
            K=k,
            N=n,
            bits=self.bits,
            block_size=self.block,
            accuracy_level=4,
        )

    def ffn(
        self, x: str, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor, out: str
    ) -> None:
        """A dense gated FFN."""
        self.linear(x, gate, f"{out}.gate")
        self.linear(x, up, f"{out}.up")
        self.node("Sigmoid", [f"{out}.gate"], f"{out}.sigmoid")
        self.node("Mul", [f"{out}.gate", f"{out}.sigmoid"], f"{out}.silu")
        self.node("Mul", [f"{out}.silu", f"{out}.up"], f"{out}.hidden")
        self.linear(f"{out}.hidden", down, out)

    def experts(self, w: Weights) -> str:
        """The routed experts as one node; its kind."""
        first, second = pack.interleave(w.expert_gate, w.expert_up), w.expert_down
        common: dict[str, Any] = {
            "domain": "com.microsoft",
            "k": TOP_K,
            "activation_type": "swiglu",
            "swiglu_fusion": 1,
            "activation_alpha": 1.0,
            "activation_beta": 0.0,
        }
        if self.bits == 32:
            self.weights |= {"w1": first.numpy(), "w2": second.numpy()}
            common["normalize_routing_weights"] = 1
            self.node("MoE", ["x", "scores", "w1", "", "w2"], "e", **common)
            return "MoE"
        for i, value in ((1, first), (2, second)):
            grid = Grid.nearest(value, self.bits, self.block)
            self.weights[f"w{i}"] = pack.pack(grid.levels(value), self.bits)
            self.weights[f"s{i}"] = grid.scale.numpy()
        self.node(
            "QMoE",
            ["x", "scores", "w1", "s1", "", "w2", "s2", *[""] * 7, "routes"],
            "e",
            normalize_routing_weights=0,
            expert_weight_bits=self.bits,
            block_size=self.block,
            accuracy_level=4,
            **common,
        )
        return "QMoE"

    def run(self, feeds: dict[str, np.ndarray], threads: int) -> Callable[[], object]:
        """A session on bound inputs."""
        import onnxruntime as ort

        graph = helper.make_graph(
            self.nodes,
            "ffn",
            [
                helper.make_tensor_value_info(k, TensorProto.FLOAT, v.shape)
                for k, v in feeds.items()
            ],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
            [numpy_helper.from_array(v, k) for k, v in self.weights.items()],
        )
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        session = ort.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        return lambda: session.run(None, feeds)


if __name__ == "__main__":
    main()
