"""Hugging Face directories: checked before anything is loaded, safetensors only."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from carve.errors import UserError
from carve.files import read_json

if TYPE_CHECKING:
    from torch import nn

log = logging.getLogger(__name__)
_DECODERS = ("ForCausalLM", "LMHeadModel")
GENERATION = "generation_config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    GENERATION,
    "chat_template.jinja",
)


@dataclass(frozen=True)
class Checkpoint:
    """A checked Hugging Face directory.

    ``weights`` are the safetensors files; ``shapes`` gives each tensor's shape by name.
    """

    path: Path
    config: dict[str, Any]
    weights: tuple[Path, ...]
    shapes: dict[str, tuple[int, ...]]

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """Check the directory's files and read the headers.

        Raises:
            UserError: no such directory, no config, pickle only, truncated or malformed files, one
                outside the directory, a configuration that the weights cannot be of.
        """
        root = Path(path)
        if not root.is_dir():
            raise UserError(
                "not-found",
                f"{root}: no such directory",
                "give a local Hugging Face directory with config.json and safetensors",
            )
        _check_folder(root)
        config = read_json(root / "config.json")
        weights = _weight_files(root)
        shapes: dict[str, tuple[int, ...]] = {}
        for file in weights:
            for name, shape in _header(file).items():
                if name in shapes:
                    raise UserError("bad-file", f"{file.name}: tensor {name} is there twice")
                shapes[name] = shape
        _check_config(config, shapes)
        if (root / GENERATION).is_file():
            _check_ids(GENERATION, read_json(root / GENERATION))
        return cls(root, config, weights, shapes)

    @property
    def architecture(self) -> str:
        """The class that the configuration names."""
        names = self.config.get("architectures")
        return str(names[0]) if isinstance(names, list) and names else ""

    @property
    def is_decoder(self) -> bool:
        """Whether the checkpoint is a causal language model."""
        return self.architecture.endswith(_DECODERS)

    @property
    def num_parameters(self) -> int:
        """Stored elements in all tensors."""
        total = 0
        for shape in self.shapes.values():
            count = 1
            for n in shape:
                count *= n
            total += count
        return total

    def sha256(self) -> str:
        """Hash over the configuration and the weight files."""
        digest = hashlib.sha256((self.path / "config.json").read_bytes())
        for file in self.weights:
            digest.update(file.name.encode())
            with file.open("rb") as f:
                digest.update(hashlib.file_digest(f, "sha256").digest())
        return digest.hexdigest()

    def load_model(self, attention: str) -> nn.Module:
        """Build the model with transformers and load the weights in their stored dtype.

        Raises:
            UserError: transformers does not know the architecture, or configuration and weights
                disagree.
        """
        import torch
        import transformers

        auto = transformers.AutoModelForCausalLM if self.is_decoder else transformers.AutoModel
        kind: Any = auto
        named = getattr(transformers, self.architecture, None) if self.architecture else None
        if not self.is_decoder and isinstance(named, type):
            kind = named if issubclass(named, transformers.PreTrainedModel) else auto
        level = transformers.logging.get_verbosity()
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        try:
            self._check_size(auto)
            model, info = kind.from_pretrained(
                self.path,
                dtype="auto",
                attn_implementation=attention,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # so that they are named below, and refused
            )
        except UserError:
            raise
        except Exception as e:
            first = (str(e).strip() or type(e).__name__).splitlines()[0]
            raise UserError(
                "config-mismatch",
                f"{self.path}: {self.architecture or 'the model'} cannot be loaded: {first}",
                "the configuration has to name a known architecture and agree with the weights",
            ) from e
        finally:
            transformers.logging.set_verbosity(level)
        # A weight of a layer that the model does not have is a truncated model; a left-over
        # head or buffer is not.
        extra = [k for k in info["unexpected_keys"] if re.search(r"\.\d+\.", k)]
        mismatched = [k[0] if isinstance(k, tuple) else k for k in info["mismatched_keys"]]
        wrong = sorted({*info["missing_keys"], *mismatched, *extra})
        if wrong:
            raise UserError(
                "config-mismatch",
                f"{self.path}: configuration and weights disagree on {', '.join(wrong[:4])}",
                "check num_hidden_layers, hidden_size and the like in config.json",
            )
        for name, p in model.named_parameters():
            if not bool(torch.isfinite(p).all()):
                raise UserError("not-finite", f"{self.path}: {name} holds NaN or infinity")
        loaded: nn.Module = model.eval()
        return loaded

    def _check_size(self, auto: Any) -> None:
        """Build the model without memory, before it is built with some.

        Raises:
            UserError: it is much larger than what is stored.
        """
        import torch
        import transformers

        config = transformers.AutoConfig.from_pretrained(
            self.path, local_files_only=True, trust_remote_code=False
        )
        with torch.device("meta"):
            empty = auto.from_config(config, trust_remote_code=False)
        needed = sum(t.numel() for t in (*empty.parameters(), *empty.buffers()))
        # Tied weights may count twice, and masks are not stored.
        if needed > 2 * self.num_parameters + (1 << 26):
            raise UserError(
                "config-mismatch",
                f"{self.path}: the configuration is of {needed} weights, "
                f"{self.num_parameters} are stored",
                "check vocab_size, hidden_size and the like in config.json",
            )


def _check_folder(root: Path) -> None:
    """Check that whatever may be read of a folder is regular and lies in it.

    The Hugging Face cache is known: a snapshot there holds links to the blobs beside it.

    Raises:
        UserError: a link that leads outside, a pipe or a device.
    """
    home = root.resolve()
    allowed = [home]
    if home.parent.name == "snapshots":
        allowed.append(home.parent.parent / "blobs")
    for entry in (*root.iterdir(), root / "1_Pooling" / "config.json"):
        if entry.is_dir() or not os.path.lexists(entry):
            continue
        try:
            found = entry.resolve()
            inside = any(found.is_relative_to(folder) for folder in allowed)
        except (OSError, RuntimeError):  # a loop of links
            inside = False
        if not inside:
            raise UserError(
                "bad-file",
                f"{entry} is a link that leads outside the folder",
                "copy the folder with its links followed (cp -rL) if you trust it",
            )
        if not found.is_file():
            raise UserError("bad-file", f"{entry} is not a regular file", "remove it")


def _check_config(config: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> None:
    """Refuse what would keep transformers busy for ever, or reading elsewhere.

    Raises:
        UserError: more layers than tensors, more labels than any tensor has rows, numbers beyond 64
            bits, or weights in another file.
    """
    widest = max((n for shape in shapes.values() for n in shape), default=0)
    most = {"layer": max(1024, len(shapes)), "num_labels": max(1024, widest), "": 2**63 - 1}
    values: list[tuple[str, Any]] = list(config.items())
    while values:
        key, value = values.pop()
        if isinstance(value, dict):
            values += value.items()
        elif isinstance(value, list):
            values += [(key, v) for v in value]
        elif isinstance(value, int):
            for part, limit in most.items():
                if part in key and abs(value) > limit:
                    raise UserError("config-mismatch", f"config.json: {key} is {value}")
    _check_ids("config.json", config)
    if "transformers_weights" in config:
        raise UserError("bad-file", "config.json: transformers_weights is not supported")


def _check_ids(name: str, config: dict[str, Any]) -> None:
    """Refuse token ids that no artifact can hold, before hours of work.

    Raises:
        UserError: they are not whole numbers from 0.
    """
    for key in ("bos_token_id", "eos_token_id"):
        value = config.get(key)
        ids = value if isinstance(value, list) and key == "eos_token_id" else [value]
        if value is not None and not all(type(i) is int and i >= 0 for i in ids):
            raise UserError("config-mismatch", f"{name}: {key} is {value!r:.60}")


def _weight_files(root: Path) -> tuple[Path, ...]:
    single, index = root / "model.safetensors", root / "model.safetensors.index.json"
    if single.exists():
        return (single,)
    if index.exists():
        table = read_json(index).get("weight_map")
        if not isinstance(table, dict) or not table:
            raise UserError("bad-file", f"{index.name} has no weight_map")
        names = sorted({str(v) for v in table.values()})
        for name in names:
            if not re.fullmatch(r"[\w.+ -]+", name):
                raise UserError("bad-file", f"{index.name} points outside the folder: {name!r}")
            # No file system has longer names, and asking for one is an error of its own.
            if len(name.encode()) > 255 or not (root / name).is_file():
                raise UserError("not-found", f"{root / name} is missing")
        return tuple(root / n for n in names)
    pickles = [p.name for p in root.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt")]
    if pickles:
        raise UserError(
            "pickle",
            f"{root} holds only pickled weights ({pickles[0]}), which can run code when loaded",
            "convert it to safetensors first, for example with model.save_pretrained(...)",
        )
    raise UserError("not-found", f"{root} holds no safetensors weights")


def _header(file: Path) -> dict[str, tuple[int, ...]]:
    from carve_runtime.files import FileError, parse_json
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np") as f:
            shapes = {k: tuple(f.get_slice(k).get_shape()) for k in f.keys()}  # noqa: SIM118
        # The library has checked the header, but takes the last of two tensors of one name.
        with file.open("rb") as f:
            parse_json(f.read(int.from_bytes(f.read(8), "little")).rstrip())
    except (SafetensorError, FileError, OSError) as e:
        raise UserError(
            "bad-file",
            f"{file} is not a whole safetensors file: {e}",
            "download or copy it again",
        ) from e
    return shapes
