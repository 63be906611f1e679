"""What every pass can be told, read from its source: nothing of torch is imported for it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from carve.config import PASS_NAMES, ConvertConfig

_ROOT = Path(__file__).parent
_NAMES = r"``\w+``(?:(?:,| and|, and) ``\w+``)*"


@dataclass(frozen=True)
class Setting:
    """One key of a recipe's section, its default, and what it does in one sentence."""

    name: str
    default: Any
    about: str


def general() -> list[Setting]:
    """The keys of ``[convert]``."""
    about = _of_attributes(ConvertConfig.__doc__ or "")
    return [
        Setting(f.name, None if f.default is MISSING else f.default, about[f.name])
        for f in fields(ConvertConfig)
        if f.name != "passes"
    ]


@cache
def of_pass(name: str) -> tuple[str, list[Setting]]:
    """What a pass does in one line, and its keys.

    Raises:
        KeyError: there is no such pass.
    """
    if name not in PASS_NAMES:
        raise KeyError(name)
    file = _ROOT / "passes" / f"{name}.py"
    tree = _tree(file)
    what = re.sub(r"\s+", " ", (ast.get_docstring(tree) or "").split("\n\n")[0])
    # The pass's own name is said already.
    what = what.partition(": ")[2] or what
    (config,) = (c for c in tree.body if isinstance(c, ast.ClassDef) and c.name.endswith("Config"))
    return what, list(_fields(config, tree))


def _fields(config: ast.ClassDef, tree: ast.Module) -> Iterator[Setting]:
    """The fields of a dataclass, those of its base first, which it may give other defaults."""
    known: dict[str, Setting] = {}
    for base in config.bases:
        assert isinstance(base, ast.Name)
        found, its_tree = _definition(base.id, tree)
        assert isinstance(found, ast.ClassDef)
        known |= {s.name: s for s in _fields(found, its_tree)}
    annotated = [n for n in config.body if isinstance(n, ast.AnnAssign)]
    own = [n for n in annotated if ast.unparse(n.annotation) != "ClassVar"]
    names = [n.target.id for n in own if isinstance(n.target, ast.Name)]
    about = _of_prose(ast.get_docstring(config) or "", names)
    for n, name in zip(own, names, strict=True):
        assert n.value is not None
        inherited = known[name].about if name in known else ""
        known[name] = Setting(name, _value(n.value, tree), about.get(name, inherited))
    yield from known.values()


def _value(node: ast.expr, tree: ast.Module) -> Any:
    """A literal, or a constant of this module or of the one that it is imported from."""
    if isinstance(node, ast.Name):
        found, its_tree = _definition(node.id, tree)
        assert isinstance(found, ast.expr)
        return _value(found, its_tree)
    return ast.literal_eval(node)


def _definition(name: str, tree: ast.Module) -> tuple[ast.AST, ast.Module]:
    for n in tree.body:
        if isinstance(n, ast.ClassDef) and n.name == name:
            return n, tree
        if isinstance(n, ast.Assign) and any(
            isinstance(t, ast.Name) and t.id == name for t in n.targets
        ):
            return n.value, tree
        if isinstance(n, ast.ImportFrom) and any(a.name == name for a in n.names):
            parts = (n.module or "").split(".")[1:]
            return _definition(name, _tree(_ROOT.joinpath(*parts).with_suffix(".py")))
    raise KeyError(name)


@cache
def _tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def _of_prose(text: str, names: list[str]) -> dict[str, str]:
    """By field, the first sentence after ``name``: or ``name`` and ``name``: in a docstring."""
    flat = re.sub(r"\s+", " ", text)
    found = [
        (m, [n for n in re.findall(r"``(\w+)``", m[1]) if n in names])
        for m in re.finditer(rf"({_NAMES}):\s", flat)
    ]
    found = [(m, known) for m, known in found if known]
    about = {}
    for (m, known), after in zip(found, [*found[1:], None], strict=True):
        end = len(flat) if after is None else after[0].start()
        for name in known:
            about[name] = _sentence(flat[m.end() : end])
    return about


def _of_attributes(text: str) -> dict[str, str]:
    """By attribute, the first sentence of a docstring's Attributes section."""
    section = text.partition("Attributes:")[2]
    return {
        m[1]: _sentence(re.sub(r"\s+", " ", m[2]))
        for m in re.finditer(r"^ {8}(\w+): (.*?)(?=^ {8}\w+: |\Z)", section, re.M | re.S)
    }


def _sentence(text: str) -> str:
    """The first sentence, on one line."""
    first = re.split(r"\.\s+(?=[A-Z`])", text.strip().rstrip(".;"), maxsplit=1)[0].strip()
    first = re.sub(r",? and$", "", first)
    return first.replace("``", "").replace("`", "")
