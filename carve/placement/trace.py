"""Traces: which experts every token of a text took."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from carve_runtime.files import open_regular
from numpy.typing import NDArray

from carve.errors import UserError
from carve.storable import storable

if TYPE_CHECKING:
    from torch import Tensor

    from carve.calibration import Batch
    from carve.program import Program
    from carve.sites import FFNSite

Mask = NDArray[np.bool_]


@storable
@dataclass(frozen=True)
class Trace:
    """``layers``: names of the routed FFNs; ``chosen[l]``: bool ``[T, E_l]``, tokens in order."""

    layers: tuple[str, ...]
    chosen: tuple[Mask, ...]

    @property
    def tokens(self) -> int:
        """How many tokens were traced."""
        return len(self.chosen[0]) if self.chosen else 0

    def loads(self) -> list[NDArray[np.float64]]:
        """By layer, the share of tokens that took each expert."""
        return [c.mean(0, dtype=np.float64) for c in self.chosen]

    def transitions(self) -> list[NDArray[np.float64]]:
        """By pair of adjacent layers, ``[E_l, E_l+1]`` mean pairs a token of experts taken."""
        return [
            a.T.astype(np.float64) @ b.astype(np.float64) / max(1, len(a))
            for a, b in zip(self.chosen, self.chosen[1:], strict=False)
        ]

    def sets(self, layer: int) -> tuple[Mask, NDArray[np.float64]]:
        """The distinct sets of experts ``[S, E]`` that tokens of a layer took, and their shares."""
        found, count = np.unique(self.chosen[layer], axis=0, return_counts=True)
        return found, count / max(1, self.tokens)

    def halves(self, block: int = 256) -> tuple[Trace, Trace]:
        """One half to place and one to score, blocks of consecutive tokens taken in turn."""
        even = (np.arange(self.tokens) // block) % 2 == 0
        if even.all():  # too short for blocks
            even = np.arange(self.tokens) < (self.tokens + 1) // 2
        a, b = (Trace(self.layers, tuple(c[m] for c in self.chosen)) for m in (even, ~even))
        return a, b if b.tokens else a

    def pack(self) -> bytes:
        """As an ``npz`` file of packed bits."""
        buffer = io.BytesIO()
        arrays = {f"chosen{i}": np.packbits(c, axis=1) for i, c in enumerate(self.chosen)}
        np.savez_compressed(
            buffer,
            layers=np.array(self.layers),
            experts=np.array([c.shape[1] for c in self.chosen]),
            **arrays,  # type: ignore[arg-type]
        )
        return buffer.getvalue()

    @staticmethod
    def read(path: Path, most_bytes: int = 1 << 26) -> Trace:
        """A trace that `pack` wrote.

        Raises:
            UserError: the file is none, or does not fit together.
        """
        try:
            layers, experts, packed = _unpack(path, most_bytes)
        except UserError:
            raise
        except Exception as e:  # what zipfile, zlib and numpy raise has no common base
            raise UserError("trace", f"{path} is no trace: {str(e)[:200]}") from e
        # A member whose header says no array comes as its bytes.
        fits = len(experts) == len(layers) > 0 and all(
            isinstance(p, np.ndarray)
            and p.dtype == np.uint8
            and p.ndim == 2
            and e >= 1
            and p.shape == (len(packed[0]), -(-e // 8))
            for p, e in zip(packed, experts, strict=False)
        )
        if not fits:
            raise UserError("trace", f"{path}: its arrays do not fit together")
        chosen = tuple(
            np.unpackbits(p, axis=1, count=e).view(bool)
            for p, e in zip(packed, experts, strict=True)
        )
        return Trace(layers, chosen)


def _unpack(path: Path, most_bytes: int) -> tuple[tuple[str, ...], list[int], list[Any]]:
    with open_regular(path) as file:
        with zipfile.ZipFile(file) as archive:
            if sum(i.file_size for i in archive.infolist()) > most_bytes:
                raise UserError("trace", f"{path} unpacks to more than {most_bytes} bytes")
        file.seek(0)
        with np.load(file, allow_pickle=False) as f:
            layers = tuple(str(n) for n in f["layers"])
            experts = [int(e) for e in f["experts"]]
            return layers, experts, [f[f"chosen{i}"] for i in range(len(layers))]


def collect_trace(program: Program, batches: Sequence[Batch]) -> Trace:
    """Run ``batches`` through the program and note every choice; padding is left out.

    Tokens that a skip gate leads round a block are counted as if they had run through it.
    """
    found: dict[str, list[Mask]] = {s.name: [] for s in program.carved}
    for batch in batches:

        def note(site: FFNSite, x: Tensor, batch: Batch = batch) -> None:
            if site.routed is not None:
                found[site.name].append(site.routed.chosen(batch.counted(x)).numpy())

        program.run(*batch.inputs, observe=note)
    return Trace(tuple(found), tuple(np.concatenate(masks) for masks in found.values()))
