"""Devices and links as the user describes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from carve.config import nearest, parse_size
from carve.errors import UserError
from carve.files import read_toml

MOST_DEVICES = 64


@dataclass(frozen=True)
class Device:
    """Something that holds and runs experts.

    ``memory``: bytes for weights and cache; ``flops``: multiply-accumulates a second;
    ``bandwidth``: bytes a second from its memory.
    """

    name: str
    memory: float
    flops: float
    bandwidth: float
    kind: str = "cpu"


@dataclass(frozen=True)
class Link:
    """A connection, the same both ways: ``bandwidth`` in bytes a second, ``latency`` in seconds."""

    bandwidth: float
    latency: float


@dataclass(frozen=True)
class Devices:
    """All devices; the first one, the host, runs everything but the routed experts."""

    devices: tuple[Device, ...]
    links: Mapping[frozenset[str], Link] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.devices)

    @property
    def names(self) -> tuple[str, ...]:
        """The devices' names."""
        return tuple(d.name for d in self.devices)

    def link(self, device: Device) -> Link | None:
        """The link between the host and a device; None for the host itself."""
        host = self.devices[0]
        return None if device is host else self.links[frozenset((host.name, device.name))]


# Peaks of data sheets: LPDDR4X-4267 x 32 bits and four Cortex-A76 with two 128-bit FMA pipes at
# 2.4 GHz, and so on. Memory is what is left beside a system.
PRESETS: dict[str, dict[str, Any]] = {
    "phone": {"memory": "4GB", "flops": 1.0e11, "bandwidth": 5.0e10, "kind": "cpu"},
    "raspberry-pi-5": {"memory": "7GB", "flops": 7.7e10, "bandwidth": 1.7e10, "kind": "cpu"},
    "jetson-orin-nano": {"memory": "6.5GB", "flops": 6.4e11, "bandwidth": 6.8e10, "kind": "gpu"},
    "laptop": {"memory": "12GB", "flops": 4.5e11, "bandwidth": 8.9e10, "kind": "cpu"},
    "rtx-4090": {"memory": "23GB", "flops": 4.1e13, "bandwidth": 1.0e12, "kind": "gpu"},
    "a100-80gb": {"memory": "78GB", "flops": 9.7e12, "bandwidth": 2.0e12, "kind": "gpu"},
    "h100-80gb": {"memory": "78GB", "flops": 3.3e13, "bandwidth": 3.3e12, "kind": "gpu"},
}
_LINKS: dict[str, dict[str, Any]] = {
    "wifi": {"bandwidth": 6e7, "latency": 2e-3},
    "ethernet": {"bandwidth": 1.2e8, "latency": 2e-4},
    "10g-ethernet": {"bandwidth": 1.2e9, "latency": 5e-5},
    "pcie-4": {"bandwidth": 2.5e10, "latency": 1e-5},
    "nvlink": {"bandwidth": 3e11, "latency": 5e-6},
}
_DEVICE_KEYS = ("name", "preset", "memory", "flops", "bandwidth", "kind", "count")
_LINK_KEYS = ("between", "preset", "bandwidth", "latency")
KINDS = ("cpu", "gpu", "npu")


def read_devices(path: str | Path) -> Devices:
    """Devices from a TOML file, or a preset's name for one device.

    The file holds ``[[device]]`` tables (``name``, ``memory``, ``flops``, ``bandwidth``, ``kind``;
    ``preset`` fills in what is not given, ``count`` makes several of it) and ``[[link]]`` tables
    (``between`` two names, ``bandwidth``, ``latency``, or a ``preset``; ``between = ["*", "*"]``
    is for all pairs that have none of their own). The first device is the host.

    Raises:
        UserError: the file, a key or a value is wrong; the message says which.
    """
    if str(path) in PRESETS:
        return Devices((_device({"preset": str(path), "name": str(path)}, 0),))
    hint = f"give a file with [[device]] tables, or one of {', '.join(PRESETS)}"
    return parse_devices(read_toml(Path(path), "devices", hint))


def parse_devices(table: Mapping[str, Any]) -> Devices:
    """As `read_devices`, from the table that the TOML holds."""
    for key in table:
        if key not in ("device", "link"):
            raise UserError("devices", f"unknown section {key!r}{nearest(key, ('device', 'link'))}")
    devices: list[Device] = []
    for i, entry in enumerate(_tables(table, "device")):
        count = entry.get("count", 1)
        if not isinstance(count, int) or not 1 <= count <= MOST_DEVICES:
            raise UserError("devices", f"device {i}: count {count!r} is no number of devices")
        base = str(entry.get("name", entry.get("preset", f"device{i}")))
        names = [base] if count == 1 else [f"{base}{n}" for n in range(count)]
        devices += [_device({**entry, "name": n}, i) for n in names]
    names = [d.name for d in devices]
    if not devices:
        raise UserError("devices", "no [[device]] is described")
    if len(devices) > MOST_DEVICES:
        raise UserError("devices", f"{len(devices)} devices are more than {MOST_DEVICES}")
    if len(set(names)) < len(names):
        raise UserError("devices", "two devices have the same name", "give each its own")
    links, rest = _links(_tables(table, "link"), tuple(names))
    for name in names[1:]:
        pair = frozenset((names[0], name))
        if pair not in links:
            if rest is None:
                raise UserError(
                    "devices",
                    f"there is no link between {names[0]!r} and {name!r}",
                    "the first device sends tokens to all others; add a [[link]] between them",
                )
            links[pair] = rest
    return Devices(tuple(devices), links)


def _tables(table: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    found = table.get(key, [])
    if not isinstance(found, list) or not all(isinstance(t, dict) for t in found):
        raise UserError("devices", f"{key} has to be written as [[{key}]]")
    return found


def _with_preset(
    entry: Mapping[str, Any], presets: Mapping[str, dict[str, Any]], keys: tuple[str, ...], at: str
) -> dict[str, Any]:
    for key in entry:
        if key not in keys:
            raise UserError("devices", f"{at}: unknown key {key!r}{nearest(key, keys)}")
    preset = entry.get("preset")
    if preset is not None and (not isinstance(preset, str) or preset not in presets):
        raise UserError(
            "devices", f"{at}: unknown preset {preset!r}{nearest(str(preset), tuple(presets))}"
        )
    return {**presets.get(str(preset), {}), **entry}


def _device(entry: Mapping[str, Any], index: int) -> Device:
    at = f"device {entry.get('name', index)!r}"
    full = _with_preset(entry, PRESETS, _DEVICE_KEYS, at)
    kind = full.get("kind", "cpu")
    if kind not in KINDS:
        raise UserError("devices", f"{at}: unknown kind {kind!r}{nearest(str(kind), KINDS)}")
    memory = parse_size(str(full.get("memory", "")), f"{at}: memory")
    return Device(
        str(full["name"]),
        float(memory),
        _positive(full, "flops", at),
        _positive(full, "bandwidth", at),
        str(kind),
    )


def _positive(entry: Mapping[str, Any], key: str, at: str, *, zero: bool = False) -> float:
    value = entry.get(key)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not (0.0 if zero else 1e-30) <= float(value) < 1e30:  # type: ignore[arg-type]
        raise UserError("devices", f"{at}: {key} has to be a positive number, not {value!r}")
    return float(value)  # type: ignore[arg-type]


def _links(
    entries: list[dict[str, Any]], names: tuple[str, ...]
) -> tuple[dict[frozenset[str], Link], Link | None]:
    """Links by pair, and the one for all pairs without their own."""
    links: dict[frozenset[str], Link] = {}
    rest = None
    for i, entry in enumerate(entries):
        full = _with_preset(entry, _LINKS, _LINK_KEYS, f"link {i}")
        between = full.get("between")
        if not isinstance(between, list) or len(between) != 2:
            raise UserError("devices", f"link {i}: between has to name two devices")
        at = f"link between {between[0]!r} and {between[1]!r}"
        link = Link(_positive(full, "bandwidth", at), _positive(full, "latency", at, zero=True))
        if between == ["*", "*"]:
            rest = link
            continue
        for name in between:
            if name not in names:
                raise UserError("devices", f"{at}: unknown device {name!r}{nearest(name, names)}")
        if between[0] == between[1]:
            raise UserError("devices", f"{at}: a device needs no link to itself")
        links[frozenset(between)] = link
    return links, rest
