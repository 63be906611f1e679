"""Safetensors in shards, written as the tensors come: memory stays near one shard."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from carve.errors import CarveError

SHARD = 1 << 30
"""Bytes of a shard; what a layer of a large model takes, so memory grows by no more than that."""
_NAME = "model.safetensors"


def write_shards(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], limit: int = SHARD
) -> dict[str, str]:
    """Write ``model.safetensors``, or numbered shards with their index where one is too small.

    Args:
        folder: an empty folder.
        tensors: names and tensors, each written once and let go.
        limit: most bytes of a shard; a larger tensor has one of its own.

    Returns:
        By tensor, the file that holds it.

    Raises:
        CarveError: a tensor is not finite, or a name comes twice.
    """
    parts: list[list[str]] = []
    held: dict[str, Tensor] = {}
    seen: set[str] = set()
    size = total = 0

    def flush() -> None:
        save_file(held, folder / f"part-{len(parts)}", metadata={"format": "pt"})
        parts.append([*held])
        held.clear()

    for name, tensor in tensors:
        if name in seen:
            raise CarveError("emit", f"{name} comes twice")
        if not bool(torch.isfinite(tensor).all()):
            raise CarveError("emit", f"{name} is not finite as {tensor.dtype}")
        if held and size + tensor.nbytes > limit:
            flush()
            size = 0
        seen.add(name)
        # Views of one stack may not share a file's bytes.
        held[name] = tensor.contiguous().clone()
        size += tensor.nbytes
        total += tensor.nbytes
    flush()
    if len(parts) == 1:
        os.replace(folder / "part-0", folder / _NAME)
        return dict.fromkeys(parts[0], _NAME)
    where: dict[str, str] = {}
    for i, names in enumerate(parts):
        file = f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors"
        os.replace(folder / f"part-{i}", folder / file)
        where |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    text = json.dumps(index, indent=2) + "\n"
    (folder / f"{_NAME}.index.json").write_text(text, encoding="utf-8")
    return where
