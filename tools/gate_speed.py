"""What skip gates save in decoding and prefill, on blocks of a 1.1B Llama with random weights.

Usage::

    python tools/gate_speed.py --layers 12 --bits 4 --rates 0.25,0.5

The layers of the deep half without the last are gated, attention and FFN apart, with random scores
whose thresholds are set on the very tokens that are timed. ``share`` is what the gated layers cost
when nothing is gated: the time of the model less that of the model without these layers (norms,
keys and values counted, which gates cannot save; with ``--ffn-only`` it is that of a model whose
FFNs there are deleted). ``saved`` is the time saved over ``rate x share``
at the rate that was really skipped, each gate weighed by its multiply-accumulates. All models run
in turn in one process; medians of ratios.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import torch
import transformers as hf
from carve_runtime import GateInfo, ModelInfo, Session
from carve_runtime.engine import Engine

from carve.budget import plan_skips
from carve.calibration import decoder_batches
from carve.capture import capture_transformers
from carve.emit.onnx import emit
from carve.gates import SkipLesson, with_rate
from carve.program import Program
from carve.report import table
from carve.sites import Block, FFNSite, Gate
from carve.walk import set_gates

VOCAB = 2048


def build(layers: int) -> Program:
    """Blocks of the 1.1B shape with random weights; the same ones whatever their number."""
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        vocab_size=VOCAB,
        max_position_embeddings=2048,
    )
    return capture_transformers(hf.LlamaForCausalLM(config).to(torch.bfloat16))


def gate(program: Program, rate: float, rank: int, ids: list[int], ffn_only: bool) -> None:
    """Random gates whose thresholds skip ``rate`` of the tokens ``ids``."""
    generator = torch.Generator().manual_seed(1)
    planned = plan_skips(program, rate)
    ffns = {s.name for s in program.sites}
    wanted = planned.keys() & ffns if ffn_only else planned.keys()
    blocks = [b for b in program.blocks if b.name in wanted]
    batches = decoder_batches(program, torch.tensor([ids]), 1)

    def noise(*shape: int) -> torch.Tensor:
        return 1e-3 * torch.randn(*shape, generator=generator)

    def choose(block: Block, lesson: SkipLesson) -> Gate:
        d = lesson.x.shape[1]
        bridge = (noise(rank, d), None, noise(d, rank), noise(d)) if rank else (None,) * 4
        return with_rate(Gate(noise(d), torch.zeros(1), *bridge), lesson.x, rate)

    set_gates(program, batches, blocks, 2, choose)


def without(program: Program, count: int, ffn_only: bool) -> Program:
    """The model without what is gated: ``count`` layers, or their FFNs."""
    if not ffn_only:
        return build(len(program.sites) - count)
    for block in [b for b in program.gated if isinstance(b, FFNSite)]:
        program.set_gate(block, None)
        zero = program.module.graph
        with zero.inserting_after(block.output):
            nothing = zero.call_function(torch.ops.aten.zeros_like.default, (block.input,))
        nothing.meta.update(block.output.meta)
        block.output.replace_all_uses_with(nothing)
        program.sites.remove(block)
    program.clean()
    return program


class Timed:
    """One emitted model."""

    def __init__(self, program: Program, folder: Path, name: str, bits: int, threads: int) -> None:
        (folder / name).mkdir()
        emitted = emit(program, folder / name / "model.onnx", bits)
        self.engine = Engine(emitted.path, "onnx-cpu", threads)
        gates = tuple(GateInfo(b.name, b.gate.skip) for b in program.gated if b.gate)
        self.macs = [b.skippable_macs for b in program.gated]
        self.info = ModelInfo(
            VOCAB, 2048, None, (), len(program.attention), 4, 64, True, None, False, gates
        )

    def run(self, ids: list[int], context: int, gates: str = "token") -> tuple[float, float]:
        """Seconds of the prompt ``ids[:context]``, and a token of the steps after it."""
        session = Session(self.engine, self.info, gates=gates)
        began = time.perf_counter()
        session.step(ids[:context])
        prefill = time.perf_counter() - began
        began = time.perf_counter()
        for i in ids[context:]:
            session.step([i])
        return prefill, (time.perf_counter() - began) / max(1, len(ids) - context)

    def skipped(self, ids: list[int], context: int) -> tuple[float, float]:
        """Share skipped in the prompt and after it, each gate by its multiply-accumulates."""
        session = Session(self.engine, self.info, stats=True)
        session.step(ids[:context])
        prompt = session.gate_stats.skipped
        for i in ids[context:]:
            session.step([i])
        both = session.gate_stats.skipped
        weigh = self.macs
        late = [
            (b * len(ids) - p * context) / max(1, len(ids) - context)
            for p, b in zip(prompt, both, strict=True)
        ]

        def mean(values: Sequence[float]) -> float:
            return sum(v * w for v, w in zip(values, weigh, strict=True)) / max(1, sum(weigh))

        return mean(prompt), mean(late)


def main() -> None:
    """Emit the models, time them in turn, print the table."""
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    a.add_argument("--layers", type=int, default=12)
    a.add_argument("--bits", type=int, default=4)
    a.add_argument("--rates", default="0.25,0.5")
    a.add_argument("--rank", type=int, default=32, help="of the bridges; 0 for identity")
    a.add_argument("--ffn-only", action="store_true", help="no gates on attention")
    a.add_argument("--tokens", type=int, default=64)
    a.add_argument("--context", type=int, default=256, help="tokens of the prompt")
    a.add_argument("--rounds", type=int, default=9)
    a.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    args = a.parse_args()
    ids = [(7919 * i + 13) % VOCAB for i in range(args.context + args.tokens)]
    rates = [float(r) for r in args.rates.split(",")]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        program = build(args.layers)
        count = len(plan_skips(program, 0.5)) // 2
        models = {"without gates": Timed(program, folder, "base", args.bits, args.threads)}
        for rate in (*rates, 1.0):
            gate(program, rate, args.rank, ids, args.ffn_only)
            name = f"gates, {rate:.0%} asked"
            models[name] = Timed(program, folder, str(rate), args.bits, args.threads)
        fewer = without(program, count, args.ffn_only)
        del program
        models["without the layers"] = Timed(fewer, folder, "fewer", args.bits, args.threads)
        del fewer
        opened = "gates, all open"
        models[opened] = models[f"gates, {rates[0]:.0%} asked"]
        times: dict[str, list[tuple[float, float]]] = {n: [] for n in models}
        for i in range(args.rounds + 1):
            for name in list(models) if i % 2 else list(models)[::-1]:
                mode = "off" if name == opened else "token"
                found = models[name].run(ids, args.context, mode)
                time.sleep(0.1)  # idle pools spin for a while after a run
                if i:
                    times[name].append(found)
        rows = [["model", "decode ms", "skipped", "saved", "prefill ms", "skipped", "saved"]]
        for name, model in models.items():
            skips = (0.0, 0.0) if name == opened else model.skipped(ids, args.context)
            prompt, generated = skips
            cells = [name]
            for which, rate in ((1, generated), (0, prompt)):
                own = [t[which] for t in times[name]]
                base = [t[which] for t in times["without gates"]]
                least = [t[which] for t in times["without the layers"]]
                share = statistics.median(b - m for b, m in zip(base, least, strict=True))
                saved = statistics.median(b - t for b, t in zip(base, own, strict=True))
                part = f"{saved / (rate * share):.2f}" if rate else "-"
                cells += [f"{1e3 * statistics.median(own):.2f}", f"{rate:.3f}", part]
            rows.append(cells)
        print(f"{args.layers} layers, {count} gated, {args.bits} bits, rank {args.rank}")
        print(table(rows))


if __name__ == "__main__":
    main()
