"""Which device runs which expert: a placement file, or equal parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from carve_runtime.errors import ArtifactError, RequestError
from carve_runtime.files import read_json
from carve_runtime.index import SplitIndex

_MOST_SHARDS = 1024


def shard_count(shards: object) -> int:
    """A number of shards.

    Raises:
        RequestError: ``argument`` when it is none.
    """
    if type(shards) is not int or not 1 <= shards <= _MOST_SHARDS:
        raise RequestError("argument", f"shards must be 1 to {_MOST_SHARDS}, not {shards!r:.40}")
    return shards


def contiguous(index: SplitIndex, shards: int) -> list[list[int]]:
    """Experts of each layer in ``shards`` blocks, in order."""
    return [[e * shards // n.experts for e in range(n.experts)] for n in index.layers]


def read_placement(raw: Any, index: SplitIndex) -> tuple[int, list[list[int]]]:
    """The number of devices and each expert's home, from the content of a ``placement.json``.

    Raises:
        ArtifactError: ``placement`` when it is not one for this model.
    """

    def bad(what: str) -> ArtifactError:
        return ArtifactError("placement", f"the placement {what}", "make it for this model")

    if not isinstance(raw, dict) or not isinstance(raw.get("assignment"), dict):
        raise bad("must be an object with an assignment")
    devices, by_name = raw.get("devices"), raw["assignment"]
    if not isinstance(devices, list) or not 1 <= len(devices) <= _MOST_SHARDS:
        raise bad(f"must list 1 to {_MOST_SHARDS} devices")
    homes = []
    for layer in index.layers:
        held = by_name.get(layer.name)
        if not isinstance(held, list) or len(held) != layer.experts:
            raise bad(f"must hold {layer.experts} experts of {layer.name}")
        for each in held:
            known = isinstance(each, list) and all(
                type(d) is int and 0 <= d < len(devices) for d in each
            )
            if not known or not each:
                raise bad(f"has an expert of {layer.name} on no device that it lists")
        homes.append([int(each[0]) for each in held])
    return len(devices), homes


def load_placement(path: Path, index: SplitIndex) -> tuple[int, list[list[int]]]:
    """`read_placement` of a file.

    Raises:
        ArtifactError: ``placement`` or ``not-found``.
    """
    raw = read_json(path, lambda what: ArtifactError("placement", f"{path} {what}"))
    return read_placement(raw, index)
