"""Values as JSON and tensors, and back: what a stored state is made of.

Only what is named here is ever made from a file: numbers, text, containers, tensors, arrays, and
dataclasses marked `carve.storable.storable`, whose fields are checked against their types.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from functools import cache
from typing import Any, get_type_hints

import numpy as np
import torch
from torch import Tensor

from carve.storable import CLASSES
from carve.typed import fits

_ALIGNMENT = 64
_PLAIN = (type(None), bool, int, float, str)
_DEPTH = 64


class CodecError(ValueError):
    """A value that cannot be stored, or a stored one that is malformed."""


def settled(value: Any) -> Any:
    """The same value with every tensor contiguous and aligned; what is so already stays itself.

    Products may differ in their last bits by where operands lie in memory. What is used after it
    was stored has to be as what is read back, or a resumed run would give another result.
    """
    if isinstance(value, Tensor):
        tensor = value.detach().contiguous()
        aligned = tensor.numel() == 0 or tensor.data_ptr() % _ALIGNMENT == 0
        if not aligned:
            return tensor.clone()
        return tensor if value.requires_grad or tensor.data_ptr() != value.data_ptr() else value
    if is_dataclass(value) and not isinstance(value, type):
        old = {f.name: getattr(value, f.name) for f in fields(value) if f.init}
        new = {k: settled(v) for k, v in old.items()}
        changed = {k: v for k, v in new.items() if v is not old[k]}
        return replace(value, **changed) if changed else value
    if isinstance(value, dict):
        parts = {k: settled(v) for k, v in value.items()}
        return parts if any(parts[k] is not v for k, v in value.items()) else value
    if type(value) in (list, tuple):
        items = [settled(v) for v in value]
        same = all(a is b for a, b in zip(items, value, strict=True))
        return value if same else type(value)(items)
    return value


def encode(value: Any, keep: Callable[[Tensor], Any]) -> Any:
    """``value`` as what JSON can hold; ``keep`` takes each tensor and gives what stands for it.

    Raises:
        CodecError: it holds something else.
    """
    if type(value) in _PLAIN:
        return value
    if isinstance(value, Tensor):
        return {"tensor": keep(value)}
    if isinstance(value, np.ndarray):
        return {"array": keep(torch.from_numpy(np.ascontiguousarray(value)))}
    if isinstance(value, np.generic):
        return value.item()
    if type(value) is list:
        return [encode(v, keep) for v in value]
    if type(value) is tuple:
        return {"tuple": [encode(v, keep) for v in value]}
    if type(value) is dict:
        return {"dict": [[encode(k, keep), encode(v, keep)] for k, v in value.items()]}
    cls = type(value)
    if CLASSES.get(cls.__name__) is cls:
        given = {f.name: encode(getattr(value, f.name), keep) for f in fields(cls)}
        return {"class": cls.__name__, "fields": given}
    raise CodecError(
        f"a {cls.__module__}.{cls.__name__} cannot be stored; use tensors and plain containers, or "
        "mark the dataclass carve.storable.storable"
    )


def decode(raw: Any, find: Callable[[Any], Tensor], depth: int = _DEPTH) -> Any:
    """The value that `encode` was given; ``find`` gives the tensors.

    Raises:
        CodecError: malformed, of an unknown class, or a field has another type than declared.
    """
    if depth == 0:
        raise CodecError("nested too deeply")

    def inner(v: Any) -> Any:
        return decode(v, find, depth - 1)

    if type(raw) in _PLAIN:
        return raw
    if isinstance(raw, list):
        return [inner(v) for v in raw]
    if not isinstance(raw, dict):
        raise CodecError(f"a {type(raw).__name__} where a value should be")
    kind = next(iter(raw), None)
    body = raw.get(kind)
    if kind == "tensor":
        return find(body)
    if kind == "array":
        return find(body).numpy()
    if kind == "tuple" and isinstance(body, list):
        return tuple(inner(v) for v in body)
    if kind == "dict" and isinstance(body, list):
        return {_key(inner(k)): inner(v) for k, v in map(_pair, body)}
    if kind == "class" and isinstance(raw.get("fields"), dict):
        return _instance(str(body), {k: inner(v) for k, v in raw["fields"].items()})
    raise CodecError(f"unknown kind {kind!r}")


def _pair(item: Any) -> tuple[Any, Any]:
    if not isinstance(item, list) or len(item) != 2:
        raise CodecError("a dictionary's item is no pair")
    return item[0], item[1]


def _key(key: Any) -> Any:
    if not isinstance(key, str | int | tuple):
        raise CodecError(f"a {type(key).__name__} as a key")
    return key


@cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _instance(name: str, given: dict[str, Any]) -> Any:
    cls = CLASSES.get(name)
    if cls is None:
        raise CodecError(f"unknown class {name!r}")
    hints = _hints(cls)
    names = {f.name for f in fields(cls)}
    if set(given) != names:
        raise CodecError(f"{name} has other fields: {', '.join(sorted(set(given) ^ names))}")
    for key, value in given.items():
        if not fits(value, hints[key]):
            raise CodecError(f"{name}.{key} is a {type(value).__name__}")
    return cls(**given)
