"""Hugging Face directories: checked before anything is loaded, safetensors only."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from carve.errors import UserError

if TYPE_CHECKING:
    from torch import nn

log = logging.getLogger(__name__)
_MAX_JSON = 64 << 20
_DECODERS = ("ForCausalLM", "LMHeadModel")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of bounded size.

    Raises:
        UserError: not there, too large, not JSON, or not an object.
    """
    try:
        if path.stat().st_size > _MAX_JSON:
            raise UserError("bad-file", f"{path.name} is larger than {_MAX_JSON >> 20} MB")
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError("not-found", f"{path} is missing") from None
    except (OSError, ValueError) as e:
        raise UserError("bad-file", f"{path} cannot be read as JSON: {e}") from e
    if not isinstance(value, dict):
        raise UserError("bad-file", f"{path} holds no JSON object")
    return value


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
            UserError: no such directory, no config, pickle only, truncated or malformed files, a
                shard outside the directory.
        """
        root = Path(path)
        if not root.is_dir():
            raise UserError(
                "not-found",
                f"{root}: no such directory",
                "give a local Hugging Face directory with config.json and safetensors",
            )
        config = read_json(root / "config.json")
        weights = _weight_files(root)
        shapes: dict[str, tuple[int, ...]] = {}
        for file in weights:
            for name, shape in _header(file).items():
                if name in shapes:
                    raise UserError("bad-file", f"{file.name}: tensor {name} is there twice")
                shapes[name] = shape
        return cls(root, config, weights, shapes)

    @property
    def architecture(self) -> str:
        """The class that the configuration names."""
        names = self.config.get("architectures") or [""]
        return str(names[0])

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

        kind: Any
        if self.is_decoder:
            kind = transformers.AutoModelForCausalLM
        else:
            kind = getattr(transformers, self.architecture, transformers.AutoModel)
        level = transformers.logging.get_verbosity()
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        try:
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
            inside = (root / name).resolve().parent == root.resolve()
            if Path(name).name != name or not inside:
                raise UserError("bad-file", f"{index.name} points outside the folder: {name}")
            if not (root / name).is_file():
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
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np") as f:
            return {k: tuple(f.get_slice(k).get_shape()) for k in f.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as e:
        raise UserError(
            "bad-file",
            f"{file} is not a whole safetensors file: {e}",
            "download or copy it again",
        ) from e
