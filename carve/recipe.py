"""Recipes as they are written: every setting with its value and what it does."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from carve.config import ConvertConfig
from carve.settings import general, of_pass

if TYPE_CHECKING:
    from carve.passbase import Pass


def resolved(config: ConvertConfig, passes: Sequence[Pass[Any]]) -> str:
    """A conversion's recipe as TOML: ``[convert]``, then one section a pass in the order they run.

    Every key has a comment; what is not set stands as a comment itself. Read back, it gives the
    same conversion.
    """
    lines = ["[convert]"]
    for s in general():
        lines += ["", *_comment(s.about), _line(s.name, getattr(config, s.name))]
    for p in passes:
        what, settings = of_pass(p.name)
        values = asdict(p.config)
        lines += ["", "", *_comment(what), f"[{p.name}]"]
        for s in settings:
            lines += ["", *_comment(s.about), _line(s.name, values[s.name])]
    return "\n".join(lines) + "\n"


def _comment(text: str) -> list[str]:
    return textwrap.wrap(text, 98, initial_indent="# ", subsequent_indent="# ")


def _line(key: str, value: Any) -> str:
    return f"# {key} is not set" if value is None else f"{key} = {_toml(value)}"


def _toml(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return json.dumps(value)
