"""Sizes in bytes as people write them."""

from __future__ import annotations

import re

from carve_runtime.errors import RequestError


def parse_bytes(text: str | int, name: str) -> int:
    """Bytes of ``40MB``, ``1.5 GB``, ``300KiB`` or a plain number.

    Raises:
        RequestError: ``argument`` for another form, or less than one byte.
    """
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([KMGT]?)(i?)B?\s*", str(text), re.IGNORECASE)
    value = 0.0
    if found:
        base = 1024 if found[3] else 1000
        value = float(found[1]) * base ** " KMGT".index(found[2].upper() or " ")
    if not 1 <= value < 2**63:
        raise RequestError(
            "argument", f"{name} {text!r:.40} is no size in bytes", "for example 40MB"
        )
    return int(value)
