"""What passes have made of a program and its context, as values that can be stored."""

from __future__ import annotations

from typing import Any

from carve.errors import UserError
from carve.ffn import RoutedFFN
from carve.passbase import Context
from carve.program import Owned, Program
from carve.random_state import random_states, set_random_states
from carve.sites import Gate
from carve.store import StateError, Store, Stored
from carve.typed import fits

_CONTEXT = ("splits", "skips", "widths")


def take(program: Program, context: Context, store: Store) -> dict[str, Stored]:
    """Store all that differs from the program as it was captured; gives where each part is."""
    parts: dict[str, Stored] = {}

    def put(key: str, value: Any) -> Any:
        parts[key], kept = store.put(value)
        return kept

    for site in program.sites:
        if site.routed is not None:
            put(f"site {site.name}", (site.routed, site.tuned))
    for block in program.gated:
        put(f"gate {block.name}", block.gate)
    put("owned", program.arguments_owned())
    for key, value in program.notes.items():
        program.notes[key] = put(f"note {key}", value)
    put("context", {name: getattr(context, name) for name in _CONTEXT})
    put("random", random_states())
    return parts


def put_back(program: Program, context: Context, store: Store, parts: dict[str, Stored]) -> None:
    """Bring a program that was just captured to where `take` saw it.

    Raises:
        StateError: a part is missing, damaged, or of another program; nothing is changed then.
        UserError: the parts are whole and do not go together.
    """
    values: dict[str, Any] = {key: store.get(stored) for key, stored in parts.items()}
    sites = {s.name: s for s in program.sites}
    blocks = {b.name: b for b in program.blocks}
    nodes = {n.name for n in program.module.graph.nodes}

    def named(prefix: str, hint: Any) -> dict[str, Any]:
        found = {k[len(prefix) :]: v for k, v in values.items() if k.startswith(prefix)}
        if not all(fits(v, hint) for v in found.values()):
            raise StateError(f"a stored {prefix.strip()} is malformed")
        return found

    routed, gates = named("site ", tuple[RoutedFFN, bool]), named("gate ", Gate)
    owned: Any = values.get("owned")
    context_parts: Any = values.get("context")
    if not fits(owned, list[Owned]) or not fits(context_parts, dict[str, dict[str, Any]]):
        raise StateError("a stored part is missing or malformed")
    strange = [*(set(routed) - set(sites)), *(set(gates) - set(blocks))]
    strange += [o.node for o in owned if o.node not in nodes]
    if strange or set(context_parts) != set(_CONTEXT):
        raise StateError(f"the program has no {(strange or ['such context'])[0]}")
    try:
        for name, (weights, tuned) in routed.items():
            program.set_routed(sites[name], weights)
            sites[name].tuned = tuned
        for name, gate in gates.items():
            program.set_gate(blocks[name], gate)
        program.set_owned(owned)
        program.notes.update(named("note ", Any))
        for name in _CONTEXT:
            mine = getattr(context, name)
            mine.clear()
            mine.update(context_parts[name])
        set_random_states(values.get("random", {}))
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as e:
        raise UserError(
            "state", f"the stored state does not fit the program: {e}", "start without --resume"
        ) from e
