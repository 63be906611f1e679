"""Run an artifact in onnxruntime-genai and compare its greedy tokens with carve's runtime.

Usage::

    python tools/genai_check.py out --prompt "The old man" --tokens 32
"""

from __future__ import annotations

import argparse
import os
import sys

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import carve_runtime
import onnxruntime_genai as og


def main() -> None:
    """Compare; exit 1 when the tokens differ."""
    a = argparse.ArgumentParser(description=__doc__)
    a.add_argument("artifact")
    a.add_argument("--prompt", default="The old man looked at the sea and")
    a.add_argument("--tokens", type=int, default=32)
    args = a.parse_args()
    ours = carve_runtime.load(args.artifact)
    prompt = ours.tokenizer.encode(args.prompt).ids
    want = list(ours.generate(prompt, max_new_tokens=args.tokens).token_ids)
    model = og.Model(args.artifact)
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=len(prompt) + args.tokens, do_sample=False)
    generator = og.Generator(model, params)
    generator.append_tokens(prompt)
    got = []
    while not generator.is_done() and len(got) < args.tokens:
        generator.generate_next_token()
        got.append(int(generator.get_next_tokens()[0]))
    got = [t for t in got if t not in ours.manifest.model.eos_token_ids]
    print("carve_runtime     ", want)
    print("onnxruntime-genai ", got)
    print("same tokens" if got == want else "tokens differ")
    sys.exit(got != want)


if __name__ == "__main__":
    main()
