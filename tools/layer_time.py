"""How long distilling and quantizing one large layer takes: ``python tools/layer_time.py``.

One block of a 1.1B Llama (hidden 2,048, FFN 5,632) with random weights, half of the FFN active, on
random tokens; the passes and their settings are those of ``carve convert --effort layer``, or with
``--quantize`` those of ``--effort none --bits 4`` (then beside the layer's weights and Hessians:
what the process grew by while it quantized).
"""

from __future__ import annotations

import argparse
import resource
import time

import torch
import transformers as hf

from carve import passes as p
from carve.budget import make_request, plan_widths
from carve.calibration import SiteInputs, decoder_batches, hold_back
from carve.capture import capture_transformers
from carve.evaluate import Evaluator
from carve.passbase import Context, PassManager, peak_rss_mb
from carve.report import table


def main() -> None:
    """Build the layer, run the passes, print their times."""
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    a.add_argument("--hidden", type=int, default=2048)
    a.add_argument("--intermediate", type=int, default=5632)
    a.add_argument("--tokens", type=int, default=16_384)
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
    rows = torch.randint(0, 1024, (args.tokens // 512, 512))
    batches, judged = hold_back(decoder_batches(program, rows, 8), 512)
    inputs = SiteInputs.collect(program, batches)
    request = make_request(program, None, 0.5)
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
    out = [["pass", "seconds"]]
    for each in passes:
        before = resident_mb()
        began = time.monotonic()
        (result,) = PassManager([each])(program, context)
        out.append([each.name, f"{time.monotonic() - began:.1f}"])
    print(table(out))
    if args.quantize:
        weights = sum(w.numel() for n in program.linears for w in (n.weight,)) * 4e-6
        weights += sum(s.dense.macs for s in program.sites) * 4e-6
        size = args.intermediate + program.carved[0].routed.num_experts + 1  # type: ignore[union-attr]
        hessians = (2 * size**2 + 4 * args.hidden**2) * 4e-6
        print(
            f"{inputs.tokens} tokens; {before:.0f} MB before, peak {peak_rss_mb():.0f} MB; "
            f"weights {weights:.0f} MB and Hessians {hessians:.0f} MB in fp32"
        )
        return
    print(f"{result.metrics['steps']} steps, {inputs.tokens} tokens, peak {peak_rss_mb():.0f} MB")


def resident_mb() -> float:
    """Resident size of this process now, in MB."""
    with open("/proc/self/statm", encoding="ascii") as f:
        return int(f.read().split()[1]) * resource.getpagesize() / 1e6


if __name__ == "__main__":
    main()
