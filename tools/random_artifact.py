"""An artifact of real size in minutes, to time engines: experts and routers at random, no passes.

Usage::

    python tools/make_random.py big --tokenizer models/reference
    python tools/random_artifact.py big big4 --bits 4 --targets onnx-cpu,tvm:x86_64
    python tools/tvm_speed.py big4
    python tools/speed.py big4

Every FFN is split into slices (`baselines.random_split`), 14 of them shared and eight of the others
chosen for each token: 22 of 44, half of the FFN, which is a budget of 0.6 for the 1.1B Llama shape.
Weights are rounded to the nearest as they are written. What the model says means nothing; what it
reads and multiplies is what a converted model of those widths reads and multiplies.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import sys
import time
from pathlib import Path

import torch
from baselines import random_split

from carve import artifact as art
from carve.capture import capture_checkpoint
from carve.emit.onnx import emit
from carve.emit.tvm.emit import emit_tvm
from carve.emit.tvm.names import PREFIX, folder_of, processor
from carve.targets import ONNX
from carve.write_artifact import model_facts


def main() -> None:
    """Capture, split, write."""
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    a.add_argument("checkpoint", type=Path)
    a.add_argument("output", type=Path)
    a.add_argument("--bits", type=int, default=4)
    a.add_argument("--targets", default="onnx-cpu,tvm:x86_64")
    a.add_argument("--slices", type=int, default=44)
    a.add_argument("--shared", type=int, default=14)
    a.add_argument("--top-k", type=int, default=8)
    args = a.parse_args()
    program = capture_checkpoint(args.checkpoint)
    for seed, site in enumerate(program.sites):
        width = site.dense.up.shape[1]
        x = torch.randn(256, width, generator=torch.Generator().manual_seed(seed))
        widths = {"num_slices": args.slices, "num_shared": args.shared, "top_k": args.top_k}
        program.set_routed(site, random_split(site.dense, x, **widths, seed=seed))
    share = program.macs / program.dense_macs
    sys.stderr.write(f"{share:.3f} of the dense multiply-accumulates\n")
    art.check_output(args.output)
    with art.staged(args.output) as stage:
        targets, shared = {}, True  # TVM's functions always write into the cache they are given
        for target in args.targets.split(","):
            began, used = time.monotonic(), time.process_time()
            if target == ONNX:
                (stage / "onnx").mkdir()
                emitted = emit(program, stage / "onnx" / "model.onnx", args.bits)
                shared, path = emitted.shared_cache, emitted.path
            elif target.startswith(PREFIX):
                folder = stage / folder_of(target)
                folder.mkdir(parents=True)
                path = emit_tvm(program, folder, args.bits, target, processor(target)).path
            else:
                a.error(f"no target {target} here")
            targets[target] = {"model": str(path.relative_to(stage)), "bits": args.bits}
            sys.stderr.write(
                f"{target}: {time.monotonic() - began:.0f} s, "
                f"{time.process_time() - used:.0f} s of the processor\n"
            )
        shutil.copy(args.checkpoint / "tokenizer.json", stage / "tokenizer.json")
        manifest = {
            "schema": 1,
            "carve": "0",
            "kind": "decoder",
            "source": {"id": "random", "path": str(args.checkpoint.resolve())},
            "model": model_facts(program, shared, args.checkpoint),
            "targets": targets,
        }
        art.write_json(stage / art.REPORT, {})  # no pass ran
        art.write_json(stage / "manifest.json", {**manifest, "files": art.hashes(stage)})
        art.sync(stage)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(json.dumps({"output": str(args.output), "share": round(share, 4), "peak_gb": peak}))


if __name__ == "__main__":
    main()
