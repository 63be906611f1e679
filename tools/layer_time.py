"""How long layer-wise distillation of one large layer takes: ``python tools/layer_time.py``.

One block of a 1.1B Llama (hidden 2,048, FFN 5,632) with random weights, half of the FFN active, on
random tokens; the passes and their settings are those of ``carve convert --effort layer``.
"""

from __future__ import annotations

import argparse
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
        p.Distill(p.DistillConfig()),
    ]
    out = [["pass", "seconds"]]
    for each in passes:
        began = time.monotonic()
        (result,) = PassManager([each])(program, context)
        out.append([each.name, f"{time.monotonic() - began:.1f}"])
    print(table(out))
    print(f"{result.metrics['steps']} steps, {inputs.tokens} tokens, peak {peak_rss_mb():.0f} MB")


if __name__ == "__main__":
    main()
