"""Which devices hold which expert: a placement file, or equal parts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from carve_runtime.errors import ArtifactError, RequestError
from carve_runtime.files import read_json
from carve_runtime.index import SplitIndex

_MOST_SHARDS = 1024
Holders = Sequence[Sequence[tuple[int, ...]]]
"""By layer and expert, the devices that have a copy of it, its home first."""


def shard_count(shards: object) -> int:
    """A number of shards.

    Raises:
        RequestError: ``argument`` when it is none.
    """
    if type(shards) is not int or not 1 <= shards <= _MOST_SHARDS:
        raise RequestError("argument", f"shards must be 1 to {_MOST_SHARDS}, not {shards!r:.40}")
    return shards


def contiguous(index: SplitIndex, shards: int) -> Holders:
    """Experts of each layer in ``shards`` blocks, in order."""
    return [[(e * shards // n.experts,) for e in range(n.experts)] for n in index.layers]


class Copies:
    """Which copy of an expert serves a step.

    Experts with one copy are where they are. Of the others, those that most rows take choose first,
    each the device with the fewest rows in this layer so far: the greedy form of the shares in
    which a placement with replicas is costed (``min max_d sum rows``). A copy serves all rows of
    its expert or none, so that every product is the one that an unsharded model makes. Ties go to
    the copy that served last, which a device short of memory still holds.
    """

    def __init__(self, holders: Holders) -> None:
        self._holders = holders
        self._served = {
            (i, e): devices[0] for i, layer in enumerate(holders) for e, devices in enumerate(layer)
        }

    def choose(
        self, layer: int, rows: Sequence[tuple[int, int]], *, keep: bool = True
    ) -> list[int]:
        """The device for each of ``rows``: experts and how many rows take them.

        ``keep``: remember the choice; a guess of what is to come should not be.
        """
        held, load, found = self._holders[layer], dict[int, int](), dict[int, int]()
        for e, count in sorted(rows, key=lambda part: (len(held[part[0]]) > 1, -part[1])):
            last = self._served[layer, e]
            device = min(held[e], key=lambda d: (load.get(d, 0), d != last))
            load[device] = load.get(device, 0) + count
            found[e] = device
            if keep:
                self._served[layer, e] = device
        return [found[e] for e, _ in rows]


def read_placement(raw: Any, index: SplitIndex) -> tuple[int, Holders]:
    """The number of devices and each expert's holders, from the content of a ``placement.json``.

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
    holders = []
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
            if len(set(each)) != len(each):
                raise bad(f"has an expert of {layer.name} twice on one device")
        holders.append([tuple(each) for each in held])
    return len(devices), holders


def choose_holders(
    shards: int | str | os.PathLike[str], own: Path | None, index: SplitIndex
) -> tuple[int, Holders]:
    """The number of devices and each expert's holders.

    Args:
        shards: so many devices, or the path of a placement.
        own: the artifact's own placement, taken where it is for as many devices; else experts are
            dealt out in equal parts.
        index: the model.

    Raises:
        ArtifactError, RequestError: as `load_placement` and `shard_count`.
    """
    if not isinstance(shards, int):
        return load_placement(Path(shards), index)
    devices = shard_count(shards)
    if own is not None:
        placed = load_placement(own, index)
        if placed[0] == devices:
            return placed
    return devices, contiguous(index, devices)


def load_placement(path: Path, index: SplitIndex) -> tuple[int, Holders]:
    """`read_placement` of a file.

    Raises:
        ArtifactError: ``placement`` or ``not-found``.
    """
    raw = read_json(path, lambda what: ArtifactError("placement", f"{path} {what}"))
    return read_placement(raw, index)
