"""Values against declared types, for what comes from files."""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from typing import Any, Union, get_args, get_origin


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a declared type, as far as dataclasses here declare any."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, types.UnionType):
        return any(fits(value, a) for a in args)
    if origin is tuple and len(args) == 2 and args[1] is ...:
        return isinstance(value, tuple) and all(fits(v, args[0]) for v in value)
    if origin is tuple:
        alike = isinstance(value, tuple) and len(value) == len(args)
        return alike and all(map(fits, value, args))
    if origin in (list, Sequence):
        kinds = list if origin is list else (list, tuple)
        return isinstance(value, kinds) and all(fits(v, args[0]) for v in value)
    if origin in (dict, Mapping):
        pairs = value.items() if isinstance(value, dict) else ((None, None),)
        return isinstance(value, dict) and all(
            fits(k, args[0]) and fits(v, args[1]) for k, v in pairs
        )
    if hint in (int, float):
        number = isinstance(value, int) or (hint is float and isinstance(value, float))
        return number and not isinstance(value, bool)
    return isinstance(value, origin or hint)
