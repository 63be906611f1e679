"""Text in chosen shares of several domains, for `carve convert --calibration`.

    python tools/mix_text.py FOLDER -o mixed.txt

Every ``NAME.txt`` of the folder is a domain. Its text is cut into pieces of 4,000 characters, of
which a random choice is taken; the pieces stand in a random order. The shares that are taken where
none are given are those of carve's bundled text, so that what a model learns from is as mixed as
what it is judged on. What the folder holds must not be among the text that judges.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

PIECE = 4_000
"""Characters in one piece."""
BUNDLED = {
    "drama": 0.095,
    "essays": 0.12,
    "prose": 0.22,
    "quotations": 0.14,
    "technical": 0.16,
    "verse": 0.14,
    "wiki": 0.125,
}
"""Shares of the domains of the bundled text, see `carve/data/SOURCES.md`."""


def mixed(texts: Mapping[str, str], shares: Mapping[str, float], characters: int, seed: int) -> str:
    """About ``characters`` characters of ``texts``, ``shares`` of them from each.

    Raises:
        ValueError: a domain has less text than its share.
    """
    generator = random.Random(seed)
    found: list[str] = []
    for name in sorted(shares):
        text = texts[name]
        pieces = [text[i : i + PIECE] for i in range(0, len(text), PIECE)]
        generator.shuffle(pieces)
        count = round(shares[name] * characters / PIECE)
        if count > len(pieces):
            raise ValueError(f"{name}: {len(text)} characters, {count * PIECE} are wanted")
        found += pieces[:count]
    generator.shuffle(found)
    return "\n\n\n".join(found)


def shares_of(text: str) -> dict[str, float]:
    """``NAME=SHARE,...`` as shares that add up to 1."""
    parts = dict(part.split("=", 1) for part in text.split(","))
    given = {name.strip(): float(share) for name, share in parts.items()}
    total = sum(given.values())
    if total <= 0 or min(given.values()) < 0:
        raise ValueError("shares are at least 0, and not all of them 0")
    return {name: share / total for name, share in given.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Read the folder and write the mixed text."""
    p = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    p.add_argument("folder", type=Path)
    p.add_argument("-o", "--output", type=Path, required=True)
    p.add_argument("--shares", type=shares_of, default=BUNDLED, help="NAME=SHARE,...")
    p.add_argument("--characters", type=int, default=3_300_000)
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args(argv)
    try:
        texts = {n: (args.folder / f"{n}.txt").read_text("utf-8") for n in args.shares}
        text = mixed(texts, args.shares, args.characters, args.seed)
    except (OSError, ValueError) as e:
        p.error(str(e))
    args.output.write_text(text, "utf-8")
    sys.stdout.write(f"{args.output}: {len(text)} characters\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
