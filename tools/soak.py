"""Threads that call one loaded artifact for minutes: the same tokens as alone, and flat memory.

    python tools/soak.py out --minutes 10
    python tools/soak.py out --minutes 10 --memory 6MB     # the split form, experts come and go

Every thread generates from prompts of its own, in an order of its own; what each prompt gives is
computed before, by one thread alone. Returns 1 after an error or another token.
"""

from __future__ import annotations

import argparse
import random
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import carve_runtime

_PROMPTS = (
    *("The old man looked at the sea and", "Once upon a time", "In the year 1815", "She said:"),
    *("It was a dark night", "Of all the things that", "The road to the north", "Where", "My dear"),
)


@dataclass
class Soak:
    """What the threads did: ``tokens`` compared, and the first errors."""

    tokens: int = 0
    calls: int = 0
    errors: list[str] = field(default_factory=list)


def soak(model: carve_runtime.Model, threads: int, seconds: float, tokens: int) -> Soak:
    """Call ``model`` from ``threads`` threads; prints a line a minute."""
    want = {p: model.generate(p, max_new_tokens=tokens).token_ids for p in _PROMPTS}
    done, lock, end = Soak(), threading.Lock(), time.monotonic() + seconds

    def work(seed: int) -> None:
        order = random.Random(seed)
        while time.monotonic() < end and len(done.errors) < 10:
            prompt = order.choice(_PROMPTS)
            try:
                got = model.generate(prompt, max_new_tokens=tokens).token_ids
                problem = "" if got == want[prompt] else f"{prompt!r}: {got}, not {want[prompt]}"
            except Exception as error:  # whatever it is, it is what is looked for
                problem = f"{type(error).__name__}: {error}"
            with lock:
                done.calls += 1
                done.tokens += len(want[prompt])
                if problem:
                    done.errors.append(problem)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(threads)]
    for worker in workers:
        worker.start()
    began = time.monotonic()
    while any(w.is_alive() for w in workers):
        for worker in workers:
            worker.join(60 / threads)
        print(
            f"{(time.monotonic() - began) / 60:6.1f} min  {done.calls:>7} calls  {done.tokens:>9} "
            f"tokens  {len(done.errors)} errors  {resident_mb():8.1f} MB resident",
            flush=True,
        )
    return done


def resident_mb() -> float:
    """This process's resident memory."""
    text = Path("/proc/self/status").read_text(encoding="ascii")
    return int(text.split("VmRSS:")[1].split()[0]) / 1024


def main() -> int:
    """Load, call, and print."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("artifact")
    p.add_argument("--minutes", type=float, default=10.0)
    p.add_argument("--threads", type=int, default=8)
    p.add_argument("--tokens", type=int, default=24, help="generated in each call")
    p.add_argument("--memory", help="see carve run")
    args = p.parse_args()
    with carve_runtime.load(args.artifact, threads=1, memory=args.memory) as model:
        done = soak(model, args.threads, 60 * args.minutes, args.tokens)
        if model.expert_stats is not None:
            print(model.expert_stats.as_dict())
    for error in done.errors[:10]:
        print(error)
    return 1 if done.errors else 0


if __name__ == "__main__":
    sys.exit(main())
