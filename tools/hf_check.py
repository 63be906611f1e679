"""A checkpoint for other engines beside carve's program, over thousands of held-out positions.

Usage::

    python tools/hf_check.py MODEL --target hf --positions 4096 -- --budget 0.6 --effort none

Converts MODEL with the options after ``--`` and, where the conversion compares its checkpoint with
the program on a short text, compares on this much instead: unmodified transformers in fp32, whole
rows of the bundled evaluation text, each choice of experts and every logit.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from pathlib import Path
from typing import Any

import carve.hf_parity
from carve import cli
from carve.calibration import decoder_batches, load_tokenizer, read_text, token_rows
from carve.hf_parity import CheckpointMetrics
from carve.program import Program


def main() -> int:
    """Convert and print what was compared; returns what ``carve convert`` does."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("model", type=Path)
    p.add_argument("--target", default="hf", choices=["hf", "hf-granite"])
    p.add_argument("--positions", type=int, default=4096)
    p.add_argument("--length", type=int, default=128, help="tokens a row")
    argv = sys.argv[1:]
    cut = argv.index("--") if "--" in argv else len(argv)
    args = p.parse_args(argv[:cut])
    text = read_text(None, "evaluation.txt")
    ids = token_rows(load_tokenizer(args.model), text, args.length, args.positions)
    short = carve.hf_parity.check_checkpoint

    def check(
        program: Program, folder: Path, target: str, routed: Any, prompts: object
    ) -> CheckpointMetrics:
        long = [b.inputs for b in decoder_batches(program, ids, 8)]
        found = short(program, folder, target, routed, long)
        print(f"| {target}, transformers beside the program | |\n|---|---|", file=sys.stderr)
        for name, value in dataclasses.asdict(found).items():
            print(f"| {name.replace('_', ' ')} | {value:.6g} |", file=sys.stderr)
        return found

    checker: Any = check
    carve.hf_parity.check_checkpoint = checker
    with tempfile.TemporaryDirectory() as work:
        out = str(Path(work) / "out")
        options = ["--target", args.target, *argv[cut + 1 :], "-o", out]
        return cli.main(["convert", str(args.model), *options])


if __name__ == "__main__":
    sys.exit(main())
