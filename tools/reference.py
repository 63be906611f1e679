"""Write ``docs/reference`` from the docstrings and the command line's own help.

Usage::

    python tools/reference.py           # write
    python tools/reference.py --check   # exit with 1 where a page is not what the code says
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, get_args

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "reference"
_ROLES = re.compile(r"``([^`]+)``|`([^`]+)`")
_SHORT = 90
PYTHON = {
    "carve": "The compiler. Importing it loads no torch; `convert` does.",
    "carve_runtime": "The runtime: numpy, onnxruntime and tokenizers.",
}


def _text(docstring: str | None) -> str:
    """A docstring as Markdown: sections in bold with lists below, single backticks."""
    out: list[str] = []
    inside = code = False
    for line in inspect.cleandoc(docstring or "").splitlines():
        heading = re.fullmatch(r"(Args|Attributes|Returns|Raises|Yields):", line)
        if heading:
            out += [f"**{heading[1]}**", ""]
            inside = True
            continue
        if line and not line.startswith(" "):
            if code:
                out.append("```")
            inside = code = False
        if inside and line.startswith("    ") and not line.startswith("     "):
            line = re.sub(r"^    ([\w.*]+): ", r"- `\1`: ", line)
            line = line if line.startswith("- ") else f"- {line.strip()}"
        elif inside and line:
            line = "  " + line.strip()
        elif line.endswith("::"):
            line, code = line[:-1] + "\n\n```", True
        out.append(_ROLES.sub(lambda m: f"`{m[1] or m[2]}`", line) if not code else line)
    return "\n".join([*out, "```"] if code else out).strip()


def _defaults(cls: type[Any]) -> str:
    """A dataclass's fields with their defaults as a table."""
    rows = ["| setting | default |", "|---|---|"]
    for f in fields(cls):
        value = f.default
        if value is MISSING:
            value = f.default_factory() if f.default_factory is not MISSING else "(required)"
        shown = list(value) if isinstance(value, tuple) else value
        rows.append(f"| `{f.name}` | `{'unset' if shown is None else json.dumps(shown)}` |")
    return "\n".join(rows)


def commands() -> Iterator[str]:
    """The command line: what ``--help`` tells."""
    from carve.arguments import parser

    made = parser()
    yield f"# Command line\n\n{made.description}\n"
    (every,) = (a for a in made._actions if isinstance(a, argparse._SubParsersAction))
    for name, command in every.choices.items():
        rows = ["| argument | |", "|---|---|"]
        for a in command._actions:
            names = ", ".join(f"`{o}`" for o in a.option_strings) or f"`{a.dest}`"
            among = f"one of {', '.join(map(str, a.choices))}. " if a.choices else ""
            rows.append(f"| {names} | {among}{a.help or ''} |")
        text = "\n".join(rows)
        yield f"## carve {name}\n\n{command.description}\n\n{text}\n"


def recipe() -> Iterator[str]:
    """What a recipe may hold: the general settings, then those of every pass."""
    from carve import passes
    from carve.config import PASS_NAMES, ConvertConfig
    from carve.passbase import Pass

    yield "# Recipes and passes\n"
    yield (
        "A recipe is TOML: a section `[convert]` and one for each pass. `--set section.key=value` "
        "sets one key. Unknown keys are refused with the nearest name.\n"
    )
    yield f"## [convert]\n\n{_text(ConvertConfig.__doc__)}\n\n{_defaults(ConvertConfig)}\n"
    found = {
        cls.name: cls
        for cls in vars(passes).values()
        if inspect.isclass(cls) and issubclass(cls, Pass)
    }
    for name in PASS_NAMES:
        cls = found[name]
        (config,) = get_args(cls.__orig_bases__[0])
        what = f"{_text(cls.__doc__)}\n\n{_text(config.__doc__)}"
        yield f"## [{name}]\n\n{what}\n\n{_defaults(config)}\n"


def python(package: str) -> Iterator[str]:
    """The public names of a package."""
    module = importlib.import_module(package)
    yield f"# {package}\n\n{PYTHON[package]}\n"
    for name in module.__all__:
        thing = getattr(module, name)
        if not callable(thing):
            continue
        call = f"```python\n{name}{_signature(thing)}\n```"
        yield f"## {package}.{name}\n\n{call}\n\n{_text(thing.__doc__)}\n"
        if not inspect.isclass(thing) or issubclass(thing, Exception):
            continue
        for own, member in vars(thing).items():
            if own.startswith("_"):
                continue
            member = member.__func__ if isinstance(member, classmethod | staticmethod) else member
            if inspect.isfunction(member):
                call = f"```python\n{own}{_signature(member)}\n```"
                yield f"### {name}.{own}\n\n{call}\n\n{_text(member.__doc__)}\n"
            elif isinstance(member, property):
                yield f"### {name}.{own}\n\n{_text(member.__doc__)}\n"


class _Plain(str):
    """An annotation that shows itself without quotes."""

    def __new__(cls, annotation: Any) -> Any:
        return super().__new__(cls, annotation) if isinstance(annotation, str) else annotation

    __repr__ = str.__str__


def _signature(thing: Any) -> str:
    """Its signature, one argument a line where it is long."""
    try:
        signature = inspect.signature(thing)
    except ValueError:
        return "(...)"
    plain = [p.replace(annotation=_Plain(p.annotation)) for p in signature.parameters.values()]
    signature = signature.replace(
        parameters=plain, return_annotation=_Plain(signature.return_annotation)
    )
    shown = str(signature)
    if len(shown) < _SHORT:
        return shown
    lines, starred = [], False
    for p in signature.parameters.values():
        if p.kind is p.KEYWORD_ONLY and not starred:
            lines.append("*")
        starred = starred or p.kind in (p.KEYWORD_ONLY, p.VAR_POSITIONAL)
        lines.append(str(p))
    returns = str(signature.replace(parameters=[]))[2:]
    return "(\n    " + ",\n    ".join(lines) + ",\n)" + returns


def pages() -> dict[str, str]:
    """Every page by its file's name."""
    made = {
        "command-line.md": commands(),
        "recipes.md": recipe(),
        **{f"{name}.md": python(name) for name in PYTHON},
    }
    index = "# Reference\n\nMade from the code by `tools/reference.py`.\n\n" + "".join(
        f"- [{name.removesuffix('.md').replace('-', ' ')}]({name})\n" for name in made
    )
    return {"README.md": index} | {
        name: "\n".join(p.rstrip("\n") + "\n" for p in parts) for name, parts in made.items()
    }


def main(argv: list[str] | None = None) -> int:
    """Write the pages, or compare them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args(argv).check
    stale = []
    for name, text in pages().items():
        path = FOLDER / name
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            stale.append(name)
            if not check:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text, encoding="utf-8")
    if check and stale:
        print(
            f"not what the code says: {', '.join(stale)}; run tools/reference.py", file=sys.stderr
        )
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
