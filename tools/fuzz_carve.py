"""What reads files of others in carve, one target each."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from carve_runtime.errors import CarveRuntimeError
from fuzz_mutate import Choices, json_bytes, raw_bytes, toml_bytes
from fuzz_runtime import TRICKS, Sandbox, Target, allowed
from safetensors.torch import load_file, save_file
from torch import nn

import carve
from carve.artifact import REPORT, Artifact
from carve.capture import capture_checkpoint
from carve.checkpoint import Checkpoint
from carve.config import apply_settings, from_table, read_recipe
from carve.errors import CarveError
from carve.files import read_json
from carve.lineup import build_passes
from carve.passbase import Partial
from carve.placement.devices import read_devices
from carve.placement.sizes import Sizes
from carve.placement.trace import Trace
from carve.report.command import show
from carve.store import StateError, Store, Stored
from carve.training_state import load, save

_DEVICES: dict[str, Any] = {
    "device": [
        {"name": "hub", "preset": "laptop"},
        {"name": "b", "memory": "2GB", "flops": 4e10, "bandwidth": 1.2e10, "count": 2},
    ],
    "link": [{"between": ["*", "*"], "preset": "ethernet"}],
}


def seeds(folder: Path) -> None:
    """What needs no conversion, and what a conversion makes."""
    plain_seeds(folder)
    devices = folder / "devices.toml"
    devices.write_bytes(toml_text(_DEVICES))
    carve.convert(
        folder / "checkpoint",
        folder / "artifact",
        budget=0.75,
        effort="none",
        tokens=4000,
        eval_tokens=2000,
        length=64,
        devices=str(devices),
        passes={"place": {"seconds": 1.0}},
    )


def plain_seeds(folder: Path) -> None:
    """A checkpoint in one file and in shards, and the state of a training."""
    from tiny_models import save_checkpoint

    source = save_checkpoint(folder / "checkpoint")
    shutil.copytree(source, folder / "shards")
    whole = folder / "shards/model.safetensors"
    tensors = load_file(whole)
    names = sorted(tensors)
    table = {}
    for i, part in enumerate((names[::2], names[1::2])):
        held = {n: tensors[n] for n in part}
        save_file(held, folder / f"shards/{i}.safetensors", {"format": "pt"})
        table |= dict.fromkeys(part, f"{i}.safetensors")
    whole.unlink()
    index = folder / "shards/model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": table}), "utf-8")
    model, optimizer = trainee()
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    kept = Kept()
    save(kept, model, [optimizer], 1, [0.5])
    stored, _ = Store(folder / "objects").put(kept.value)
    (folder / "objects" / f"{stored.file}.safetensors").rename(folder / "state.safetensors")


def toml_text(tables: dict[str, Any]) -> bytes:
    """A sound TOML text."""
    lines = []
    for name, section in tables.items():
        several = isinstance(section, list)
        for one in section if several else [section]:
            lines.append(f"[[{name}]]" if several else f"[{name}]")
            lines += [f"{k} = {json.dumps(v)}" for k, v in one.items()]
    return "\n".join(lines).encode()


class Kept(Partial):
    """Keeps one value."""

    value: Any = None

    def get(self, key: str) -> Any:
        return self.value

    def put(self, key: str, value: Any) -> None:
        self.value = value


def trainee() -> tuple[nn.Module, torch.optim.Optimizer]:
    """A small model with its optimizer, the same every time."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    return model, torch.optim.Adam(model.parameters())


def targets(seeds: Path, work: Path) -> dict[str, Callable[[], Target]]:
    """By name, what makes a target; each takes the bytes that choose the damage."""
    logging.getLogger("carve").setLevel(logging.CRITICAL)

    def text(name: str, make: Callable[[Choices], bytes], use: Callable[[Path], object]) -> Target:
        path = work / name

        def run(data: bytes) -> None:
            path.write_bytes(make(Choices(data)))
            allowed(lambda: use(path), CarveError, CarveRuntimeError)()

        return run

    def devices() -> Target:
        return text("d.toml", lambda c: toml_bytes(_DEVICES, c), read_devices)

    def recipe() -> Target:
        sound = read_recipe(seeds / "artifact/recipe.toml")

        def use(path: Path) -> None:
            table = read_recipe(path)
            apply_settings(table, ["route_ridge.power=1.0"])
            build_passes(from_table(table))

        return text("r.toml", lambda c: toml_bytes(sound, c), use)

    def trace() -> Target:
        sound = (seeds / "artifact/placement/trace.npz").read_bytes()
        return text("t.npz", lambda c: raw_bytes(sound, c), Trace.read)

    def sizes() -> Target:
        found = Trace.read(seeds / "artifact/placement/trace.npz")
        sound = read_json(seeds / "artifact/placement/sizes.json")

        def use(path: Path) -> None:
            Sizes.parse(read_json(path), found)

        return text("s.json", lambda c: json_bytes(sound, c), use)

    def report() -> Target:
        box = Sandbox(seeds / "artifact", work)
        sound = json.loads((box.root / REPORT).read_bytes())

        def use() -> None:
            Artifact.open(box.root)
            show(str(box.root), None)
            show(str(box.root), str(work / "page.html"))

        def run(data: bytes) -> None:
            guarded = allowed(use, CarveError, CarveRuntimeError)
            box.with_file(REPORT, json_bytes(sound, Choices(data)), guarded)

        return run

    def state() -> Target:
        folder = work / "objects"
        folder.mkdir()
        sound = (seeds / "state.safetensors").read_bytes()
        size = int.from_bytes(sound[:8], "little")
        header, body = json.loads(sound[8 : 8 + size]), sound[8 + size :]

        def run(data: bytes) -> None:
            # Under the name that belongs to it, or nothing of it would be looked at.
            damaged = _safetensors(header, body, Choices(data))
            name = hashlib.sha256(damaged).hexdigest()
            path = folder / f"{name}.safetensors"
            path.write_bytes(damaged)
            kept = Kept()
            try:
                kept.value = Store(folder).get(Stored(name, (name,)))
            except StateError:
                return
            finally:
                path.unlink()
            model, optimizer = trainee()
            before = [p.clone() for p in model.parameters()]
            losses: list[float] = []
            step = load(kept, model, [optimizer], losses)
            if step == 0 and not losses:
                assert all(map(torch.equal, before, model.parameters()))
            optimizer.zero_grad()
            model(torch.ones(2, 3)).sum().backward()
            optimizer.step()

        return run

    def checkpoint(name: str, use: Callable[[Path], object], only: str = "") -> Target:
        box = Sandbox(seeds / name, work)
        names = [only] if only else sorted(p.name for p in box.root.iterdir())

        def run(data: bytes) -> None:
            c = Choices(data)
            file = c.pick(names)
            guarded = allowed(lambda: use(box.root), CarveError)
            trick = c.below(16)
            if not only and trick < len(TRICKS):
                box.with_trick(file, TRICKS[trick], guarded)
                return
            old = (box.root / file).read_bytes()
            if file.endswith(".json"):
                new = json_bytes(json.loads(old), c)
            else:
                size = int.from_bytes(old[:8], "little")
                new = _safetensors(json.loads(old[8 : 8 + size]), old[8 + size :], c)
            box.with_file(file, new, guarded)

        return run

    def opened(path: Path) -> None:
        found = Checkpoint.open(path)
        _ = found.is_decoder, found.num_parameters, found.sha256()

    return {
        "devices": devices,
        "recipe": recipe,
        "trace": trace,
        "sizes": sizes,
        "report": report,
        "state": state,
        "checkpoint": lambda: checkpoint("checkpoint", opened),
        "shards": lambda: checkpoint("shards", opened),
        "config": lambda: checkpoint("checkpoint", capture_checkpoint, "config.json"),
    }


def _safetensors(header: Any, body: bytes, c: Choices) -> bytes:
    """A safetensors file with a damaged header, length or body."""
    if c.below(4) == 0:
        text = json.dumps(header).encode()
        return raw_bytes(len(text).to_bytes(8, "little") + text + body, c)
    text = json_bytes(header, c)
    return len(text).to_bytes(8, "little") + text + body
