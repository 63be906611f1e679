"""Which device runs which expert: a placement file, or equal parts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from carve_runtime.errors import ArtifactError, RequestError
from carve_runtime.index import SplitIndex

_MOST_SHARDS = 1024
_MOST_BYTES = 1 << 26


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
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ArtifactError("placement", f"{path} is larger than any placement")
        raw = json.loads(path.read_bytes())
    except OSError as error:
        raise ArtifactError("not-found", f"{path} cannot be read: {error}") from error
    except (ValueError, RecursionError) as error:
        raise ArtifactError("placement", f"{path} is not JSON: {str(error)[:200]}") from error
    return read_placement(raw, index)
