"""How long distilling and quantizing one large layer takes: ``python tools/layer_time.py``.

One block of a 1.1B Llama (hidden 2,048, FFN 5,632) with random weights, half of the FFN active, on
as many random tokens as converting the whole of it sees; the passes and their settings are those of
``carve convert --effort layer``, or with ``--quantize`` those of ``--effort none --bits 4`` (then
beside the layer's weights and Hessians: what the process grew by while it quantized). CPU seconds
are those of all threads: over their number, what the pass takes on a machine that does nothing
else.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
import transformers as hf

from carve import passes as p
from carve.budget import make_request, plan_widths
from carve.calibration import SiteInputs, decoder_batches, hold_back
from carve.capture import capture_transformers
from carve.config import ConvertConfig
from carve.evaluate import Evaluator
from carve.lineup import default_tokens
from carve.passbase import Context, PassManager, peak_rss_mb
from carve.report import table


def main() -> None:
    """Build the layer, run the passes, print their times."""
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    a.add_argument("--hidden", type=int, default=2048)
    a.add_argument("--intermediate", type=int, default=5632)
    a.add_argument("--tokens", type=int, help="by default what a model of such layers is given")
    a.add_argument("--layers", type=int, default=22, help="of that model")
    a.add_argument("--quantize", action="store_true", help="quantize instead of distilling")
    args = a.parse_args()
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=1,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=4,
        vocab_size=1024,
        max_position_embeddings=512,
    )
    program = capture_transformers(hf.LlamaForCausalLM(config))
    each = program.num_parameters - program.lookups[0].weight.numel()
    effort = "none" if args.quantize else "layer"
    asked = ConvertConfig(ffn_active=0.5, effort=effort)
    given = default_tokens(asked, args.layers * each).calibration
    rows = torch.randint(0, 1024, (-(-(args.tokens or given) // 512), 512))
    batches, judged = hold_back(decoder_batches(program, rows, 8), 512)
    inputs = SiteInputs.collect(program, batches)
    request = make_request(program, None, 0.5, asked.shared_share)
    widths = plan_widths(program, request)
    context = Context(batches, inputs, request, widths, judge=Evaluator(program, judged).loss)
    passes = [
        p.Profile(p.ProfileConfig()),
        p.Carve(p.CarveConfig()),
        p.RouteRidge(p.RouteRidgeConfig()),
        p.Refit(p.RefitConfig()),
        p.Quantize(p.QuantizeConfig()) if args.quantize else p.Distill(p.DistillConfig()),
    ]
    context.bits = 4
    out = [["pass", "seconds", "CPU seconds"]]
    for each in passes:
        before = memory_mb("VmRSS")
        forget_peak()
        began, cpu = time.monotonic(), time.process_time()
        (result,) = PassManager([each])(program, context)
        seconds = (time.monotonic() - began, time.process_time() - cpu)
        out.append([each.name, *(f"{s:.1f}" for s in seconds)])
    print(table(out))
    if args.quantize:
        weights = sum(w.numel() for n in program.linears for w in (n.weight,)) * 4e-6
        weights += sum(s.dense.macs for s in program.sites) * 4e-6
        size = args.intermediate + program.carved[0].routed.num_experts + 1  # type: ignore[union-attr]
        hessians = (2 * size**2 + 4 * args.hidden**2) * 4e-6
        peak = memory_mb("VmHWM")
        print(
            f"{inputs.tokens} tokens; {before:.0f} MB before, peak {peak:.0f} MB while quantizing; "
            f"weights {weights:.0f} MB and Hessians {hessians:.0f} MB in fp32: grew by "
            f"{(peak - before) / (weights + hessians):.2f} times these"
        )
        return
    print(f"{result.metrics['steps']} steps, {inputs.tokens} tokens, peak {peak_rss_mb():.0f} MB")


def memory_mb(name: str) -> float:
    """Resident size of this process in MB: ``VmRSS`` now, ``VmHWM`` at its peak."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split(f"{name}:")[1].split()[0]) * 1024e-6


def forget_peak() -> None:
    """Let the peak be measured from here on."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


if __name__ == "__main__":
    main()
