"""Decoding with less memory than the model has: ours, LRU without prefetch, and plain mmap.

Usage::

    carve convert MODEL --budget 0.6 --target onnx-cpu,onnx-split -o out
    python tools/offload.py out

Each figure comes from a process of its own that starts with the files out of the page cache. Shares
are of the memory that the split model takes when all of it is resident. All but the first two rows
run under one limit (`memory_limit`): what the process had before the model, the share, and
``--slack`` for activations and what is being loaded. In a control group that counts the page cache
as well, so that every way has the same memory; without one, ours and LRU are refused what is beyond
``RLIMIT_DATA``, while files that onnxruntime maps come on top and the cache is the machine's: then
mmap has as much as it likes, and the table says so. Plain mmap is the one file with its weights
mapped and never rearranged (``session.disable_prepacking``). "Same" is whether every next token is
the split model's (mmap's: the one file's) without a limit; what is not rearranged is multiplied in
other arithmetic. "Split, no budget" loads all experts under the limit, which shows that it is one.
The tokens are a text's own, fed one by one: what a model of random weights would
say is one token over and over. Rounds are interleaved; figures are medians.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

from memory_limit import group, limit_data, open_group

_PROMPT = 16
_TEXT = Path(__file__).resolve().parents[1] / "carve" / "data" / "evaluation.txt"
OURS, LRU, MMAP, BLIND = "ours", "lru, no prefetch", "mmap", "split, no budget"
LIMITED = (OURS, LRU, MMAP, BLIND)
WHOLE, SPLIT = "one file", "split, all resident"


def child(args: argparse.Namespace) -> None:
    """Load in one way, decode, and print figures as JSON."""
    import carve_runtime
    import carve_runtime.engine as engine

    options: dict[str, Any] = {"threads": args.threads, "verify": False}
    if args.child == MMAP:
        onnxruntime = engine.ort()
        prepacked = onnxruntime.SessionOptions

        def mapped() -> Any:
            made = prepacked()
            made.add_session_config_entry("session.disable_prepacking", "1")
            return made

        onnxruntime.SessionOptions = mapped
    if args.child in (OURS, LRU):
        options |= {"target": "onnx-split", "policy": "lru" if args.child == LRU else args.policy}
        options |= {"memory": args.memory, "prefetch": args.child == OURS}
    else:
        options["target"] = "onnx-split" if args.child in (SPLIT, BLIND) else "onnx-cpu"
    if args.child not in (WHOLE, SPLIT):
        if args.group:
            limited = open_group(args.group)
            limited.limit(args.memory + args.slack)
            limited.enter()  # what was touched before stays with the first process
        else:
            mapped_files = "onnx/*.data" if args.child == MMAP else "split/*.data"
            files = sum(p.stat().st_size for p in args.artifact.glob(mapped_files))
            limit_data(args.memory + args.slack + files)
    with carve_runtime.load(args.artifact, **options) as model:
        assert model.tokenizer is not None
        ids = model.tokenizer.encode(args.text.read_text(encoding="utf-8")[:20_000]).ids
        session = model.start()
        logits = session.step(ids[:_PROMPT])
        said: list[int] = []
        seconds = []
        for token in ids[_PROMPT : _PROMPT + args.tokens]:
            said.append(int(logits[-1].argmax()))
            began = time.perf_counter()
            logits = session.step([token])
            seconds.append(time.perf_counter() - began)
        stats = model.expert_stats
        read = Path("/proc/self/io").read_text().split("read_bytes: ")[1].split()[0]
    found = {
        "tokens_per_s": len(seconds) / sum(seconds),
        "said": said,
        "disk": int(read) / len(seconds),
        "stats": None if stats is None else stats.as_dict(),
    }
    print(json.dumps(found))


def _forget(folder: Path) -> None:
    """Drop the artifact's files from the page cache."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            file = os.open(path, os.O_RDONLY)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(file)


def _measure(args: argparse.Namespace, mode: str, memory: int) -> dict[str, Any] | str:
    _forget(args.artifact)
    command = [sys.executable, __file__, str(args.artifact), "--child", mode]
    for name in ("tokens", "threads", "policy", "slack", "text", "group"):
        command += [f"--{name}", str(getattr(args, name))]
    try:
        done = subprocess.run(
            [*command, "--memory", str(memory)],
            capture_output=True,
            text=True,
            check=False,
            timeout=args.patience,
        )
    except subprocess.TimeoutExpired:
        return f"over {args.patience} s"
    if done.returncode:
        last = [line for line in done.stderr.splitlines() if line.strip()][-1:]
        killed = done.returncode == -signal.SIGKILL
        return "killed" if killed else last[0][-90:] if last else f"exit {done.returncode}"
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def full_size(artifact: Path) -> tuple[int, int]:
    """Bytes that the split model takes in memory, and the trunk's part of them."""
    from carve_runtime.experts import ExpertFile
    from carve_runtime.heap import heap_bytes
    from carve_runtime.index import read_index
    from carve_runtime.manifest import read_manifest
    from carve_runtime.split import Trunk

    manifest = read_manifest(artifact)
    index = read_index(artifact, manifest.files, manifest.targets["onnx-split"].model)
    before = heap_bytes()
    trunk = Trunk(index, 1)
    size = heap_bytes() - before
    file = ExpertFile(index)
    total = size + sum(file.cost(key) for key in index.experts)
    del trunk
    return total, size


def main() -> None:
    """Run the rounds and print the table."""
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    a.add_argument("artifact", type=Path)
    a.add_argument("--tokens", type=int, default=64)
    a.add_argument("--threads", type=int, default=1)
    a.add_argument("--rounds", type=int, default=3)
    a.add_argument("--patience", type=int, default=120, help="seconds; reading may go on for ever")
    a.add_argument("--policy", default="lfu")
    a.add_argument("--text", type=Path, default=_TEXT)
    a.add_argument("--shares", type=float, nargs="+", default=[1.0, 0.75, 0.5, 0.25])
    a.add_argument("--slack", type=int, help="bytes beside the budget (16 MB, without a group 48)")
    a.add_argument("--group", default="", help=argparse.SUPPRESS)
    a.add_argument("--child", help=argparse.SUPPRESS)
    a.add_argument("--memory", type=int, default=0, help=argparse.SUPPRESS)
    args = a.parse_args()
    args.artifact = args.artifact.resolve()
    if args.child:
        child(args)
        return
    with group("carve-offload") as limited:
        args.group = "" if limited is None else str(limited.folder)
        if args.slack is None:
            args.slack = 48_000_000 if limited is None else 16_000_000
        print(f"limit: {args.group or 'RLIMIT_DATA, page cache not counted'}")
        _rounds(args)


def _rounds(args: argparse.Namespace) -> None:
    from carve.report import table

    total, trunk = full_size(args.artifact)
    print(f"all resident: {total / 1e6:.1f} MB, {trunk / 1e6:.1f} MB of them the trunk")
    cases = [(WHOLE, 0.0), (SPLIT, 0.0), *((m, s) for s in args.shares for m in LIMITED)]
    found: dict[tuple[str, float], list[dict[str, Any]]] = {c: [] for c in cases}
    failed: dict[tuple[str, float], str] = {}
    for r in range(args.rounds):
        for case in cases if r % 2 == 0 else cases[::-1]:
            mode, share = case
            result = _measure(args, mode, int(total * share) + (1_000_000 if share == 1.0 else 0))
            if isinstance(result, str):
                failed[case] = result
            else:
                found[case].append(result)
    said = {m: next((r["said"] for r in found[m, 0.0]), None) for m in (WHOLE, SPLIT)}
    rows = [["memory", "how", "tokens/s", "hit rate", "read/token", "from disk/token", "same"]]
    for (mode, share), results in found.items():
        head = ["-" if mode in said else f"{share:.0%}", mode]
        if not results:
            rows.append([*head, failed.get((mode, share), "-"), "", "", "", ""])
            continue
        speed = statistics.median(r["tokens_per_s"] for r in results)
        disk = statistics.median(r["disk"] for r in results)
        stats = [r["stats"] for r in results if r["stats"]]
        rate = f"{statistics.median(s['hit_rate'] for s in stats):.3f}" if stats else "-"
        read = statistics.median(s["bytes_per_token"] for s in stats) if stats else None
        kept = said[WHOLE if mode in (WHOLE, MMAP) else SPLIT]
        same = all(r["said"] == kept for r in results)
        rows.append(
            [
                *head,
                f"{speed:.2f}",
                rate,
                "-" if read is None else f"{read / 1e6:.2f} MB",
                f"{disk / 1e6:.2f} MB",
                "yes" if same else "no",
            ]
        )
    print(table(rows))


if __name__ == "__main__":
    main()
