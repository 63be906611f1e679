"""What processor this machine has, as compiled libraries name it."""

from __future__ import annotations

import platform
from pathlib import Path


def machine() -> str:
    """The architecture, ``x86_64`` or ``aarch64`` whatever the system calls it, or another name."""
    name = platform.machine().lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(name, name)


def flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str] | None:
    """What Linux says the first processor can do; None where the system does not tell."""
    if not cpuinfo.exists():
        return None
    for line in cpuinfo.read_text(encoding="ascii", errors="replace").splitlines():
        key, _, value = line.partition(":")
        if key.strip().lower() in ("flags", "features"):
            return frozenset(value.split())
    return None
