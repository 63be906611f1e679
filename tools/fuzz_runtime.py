"""What reads an artifact's files in carve_runtime, one target each; nothing here needs torch."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import carve_runtime
import numpy as np
from carve_runtime import engine
from carve_runtime.errors import CarveRuntimeError
from carve_runtime.files import FileError, parse_json
from carve_runtime.index import read_index
from carve_runtime.manifest import read_manifest
from carve_runtime.placement import load_placement
from carve_runtime.text import Detokenizer, load_tokenizer, tokenizing
from fuzz_mutate import BAIT, Choices, json_bytes, raw_bytes

Target = Callable[[bytes], None]
TRICKS = ("gone", "link", "folder", "pipe", "empty", "elsewhere")


class Sandbox:
    """A copy of a folder in which one file at a time is damaged, and a bait beside it."""

    def __init__(self, seed: Path, work: Path) -> None:
        self.root = work / seed.name
        shutil.copytree(seed, self.root)
        self.bait = work / BAIT

    def with_file(self, name: str, data: bytes, use: Callable[[], object]) -> None:
        """Run ``use`` while ``name`` holds ``data``."""
        self._while(name, lambda path: path.write_bytes(data), use)

    def with_trick(self, name: str, trick: str, use: Callable[[], object]) -> None:
        """Run ``use`` while ``name`` is something else than a file of this folder."""

        def put(path: Path) -> None:
            if trick == "link":
                shutil.copyfile(path.with_name(path.name + ".kept"), self.bait)
                os.utime(self.bait, (0, 1))
                path.symlink_to(self.bait)
            elif trick == "elsewhere":
                path.symlink_to("/dev/zero")
            elif trick == "folder":
                path.mkdir()
            elif trick == "pipe":
                os.mkfifo(path)
            elif trick == "empty":
                path.touch()

        self._while(name, put, use)

    def _while(self, name: str, put: Callable[[Path], object], use: Callable[[], object]) -> None:
        path = self.root / name
        kept = path.with_name(path.name + ".kept")
        path.rename(kept)
        try:
            put(path)
            kept.rename(self.root.parent / "kept")
            use()
        finally:
            if path.is_dir() and not path.is_symlink():
                path.rmdir()
            path.unlink(missing_ok=True)
            (kept if kept.exists() else self.root.parent / "kept").rename(path)


def allowed(use: Callable[[], object], *errors: type[Exception]) -> Callable[[], None]:
    """``use``, whose clear errors are no finding."""

    def run() -> None:
        try:
            use()
        except errors:
            return

    return run


def seeds(folder: Path) -> None:
    """Artifacts as the tests have them; the tests' folders have to be importable."""
    import tiny_artifacts as tiny
    import tiny_split

    folder.mkdir(parents=True, exist_ok=True)
    tiny_split.write_split(folder / "split", 4)
    tiny.write(folder / "decoder", "decoder", tiny.decoder(False), eos_token_ids=[])
    tiny.write(folder / "encoder", "encoder", tiny.encoder(), pooling="mean", max_length=8)
    homes = [[e % 2] for e in range(tiny_split.EXPERTS)]
    placement = {"devices": ["a", "b"], "assignment": {"l0": homes, "l1": homes}}
    (folder / "placement.json").write_text(json.dumps(placement), "utf-8")


def targets(seeds: Path, work: Path) -> dict[str, Callable[[], Target]]:
    """By name, what makes a target; each takes the bytes that choose the damage."""

    def manifest() -> Target:
        box = Sandbox(seeds / "decoder", work)
        sound = json.loads((box.root / "manifest.json").read_bytes())

        def run(data: bytes) -> None:
            use = allowed(lambda: read_manifest(box.root), CarveRuntimeError)
            box.with_file("manifest.json", json_bytes(sound, Choices(data)), use)

        return run

    def index() -> Target:
        box = Sandbox(seeds / "split", work)
        files = read_manifest(box.root).files
        sound = json.loads((box.root / "split/index.json").read_bytes())

        def run(data: bytes) -> None:
            use = allowed(
                lambda: read_index(box.root.resolve(), files, "split/index.json"), CarveRuntimeError
            )
            box.with_file("split/index.json", json_bytes(sound, Choices(data)), use)

        return run

    def placement() -> Target:
        root = (seeds / "split").resolve()
        found = read_index(root, read_manifest(root).files, "split/index.json")
        sound = json.loads((seeds / "placement.json").read_bytes())
        path = work / "placement.json"

        def run(data: bytes) -> None:
            path.write_bytes(json_bytes(sound, Choices(data)))
            allowed(lambda: load_placement(path, found), CarveRuntimeError)()

        return run

    def tokenizer() -> Target:
        sound = json.loads((seeds / "decoder/tokenizer.json").read_bytes())
        path = work / "tokenizer.json"

        def use() -> None:
            made, _ = load_tokenizer(path, 8)
            with tokenizing("encode"):
                ids = made.encode("the cat sat 😀 on\n\u0301 mats").ids
            pieces = Detokenizer(made)
            for token in [*ids, 0, 1, 289, 1 << 20]:
                pieces.feed(token)
            pieces.flush()

        def run(data: bytes) -> None:
            path.write_bytes(json_bytes(sound, Choices(data)))
            allowed(use, CarveRuntimeError)()

        return run

    def json_text() -> Target:
        sound: Any = {"a": [1, 2.5, "x", None, {"b": True}], "": {"c": []}}

        def run(data: bytes) -> None:
            c = Choices(data)
            text = json_bytes(sound, c) if c.below(2) else data
            try:
                value = parse_json(text)
            except FileError:
                return
            assert value == json.loads(text.decode("utf-8"))

        return run

    def whole(name: str, target: str) -> Target:
        box = Sandbox(seeds / name, work)
        text = (box.root / "manifest.json").read_bytes()
        names = sorted(json.loads(text)["files"])
        engine.ort()  # reads files of the system once, as it is imported

        def use() -> None:
            with carve_runtime.load(box.root, target=target, threads=1) as model:
                if model.manifest.kind == "encoder":
                    model.embed(["the cat", "sat"])
                else:
                    model.generate("the cat", max_new_tokens=3)
                    model.logits(np.arange(5))

        def run(data: bytes) -> None:
            c = Choices(data)
            file = c.pick(names)
            trick = c.below(16)
            guarded = allowed(use, CarveRuntimeError)
            if trick < len(TRICKS):
                box.with_trick(file, TRICKS[trick], guarded)
                return
            old = (box.root / file).read_bytes()
            new = json_bytes(json.loads(old), c) if file.endswith(".json") else raw_bytes(old, c)
            box.with_file(file, new, lambda: _resealed(box.root, text, file, new, guarded))

        return run

    return {
        "manifest": manifest,
        "index": index,
        "placement": placement,
        "tokenizer": tokenizer,
        "json": json_text,
        "decoder": lambda: whole("decoder", "onnx-cpu"),
        "encoder": lambda: whole("encoder", "onnx-cpu"),
        "split": lambda: whole("split", "onnx-split"),
    }


def _resealed(root: Path, text: bytes, name: str, data: bytes, use: Callable[[], None]) -> None:
    """Run ``use`` with a manifest that has the damaged file's own hash: who sends one has both."""
    import hashlib

    manifest = json.loads(text)
    manifest["files"][name] = hashlib.sha256(data).hexdigest()
    (root / "manifest.json").write_text(json.dumps(manifest), "utf-8")
    try:
        use()
    finally:
        (root / "manifest.json").write_bytes(text)
