"""Text in, batches of program inputs out; and the inputs that each FFN site sees."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from carve.errors import UserError
from carve.program import Program
from carve.sites import FFNSite

if TYPE_CHECKING:
    from tokenizers import Tokenizer

DATA = Path(__file__).parent / "data"
BATCH_ROWS = 8
"""Rows of a batch of text."""
_GOLDEN = 0.6180339887498949


@dataclass(frozen=True)
class Batch:
    """Inputs of one run of a program, and which tokens count (``[B, S]`` bool, None for all).

    ``told``: made by the model itself, all or in part (`carve.retell`), so that its tokens teach
    nothing that the model's predictions do not.
    """

    inputs: tuple[Tensor, ...]
    mask: Tensor | None = None
    told: bool = False

    @property
    def tokens(self) -> int:
        """How many tokens count; what is no row of tokens counts as one."""
        if self.mask is not None:
            return int(self.mask.sum())
        rows = self.inputs[0]
        return rows.shape[0] * (rows.shape[1] if rows.ndim == 2 else 1)

    @property
    def positions(self) -> int:
        """How many positions are computed: padding is, like text."""
        return math.prod(self.inputs[0].shape[:2])

    def rows(self, start: int, stop: int | None = None) -> Batch:
        """Some of its rows."""
        mask = None if self.mask is None else self.mask[start:stop]
        return Batch(tuple(t[start:stop] for t in self.inputs), mask, self.told)

    def counted(self, x: Tensor) -> Tensor:
        """The rows ``[T, d]`` of ``x`` ``[B, S, d]`` whose tokens count."""
        flat = x.reshape(-1, x.shape[-1])
        return flat if self.mask is None else flat[self.mask.reshape(-1)]


def read_text(path: str | Path | None, default: str) -> str:
    """The text of ``path``, a file of at most 1 GiB, or the bundled ``default``.

    Raises:
        UserError: it cannot be read as UTF-8 text.
    """
    from carve_runtime.files import FileError, read_bytes

    file = DATA / default if path is None else Path(path)
    try:
        text = read_bytes(file, 1 << 30).decode("utf-8-sig")
    except (OSError, FileError, UnicodeDecodeError) as e:
        raise UserError(
            "text", f"{file} cannot be read as text: {e}", "give a UTF-8 text file"
        ) from e
    return text.replace("\r\n", "\n").replace("\r", "\n")


def load_tokenizer(folder: Path) -> Tokenizer:
    """The fast tokenizer of a Hugging Face directory, without truncation or padding.

    Raises:
        UserError: ``tokenizer.json`` is missing or malformed.
    """
    from carve_runtime.errors import ArtifactError
    from carve_runtime.text import load_tokenizer as load

    file = folder / "tokenizer.json"
    if not file.is_file():
        raise UserError(
            "tokenizer", f"{file} is missing", "save the model's fast tokenizer beside its weights"
        )
    try:
        return load(file, 0)[0]
    except ArtifactError as e:
        raise UserError("tokenizer", e.message) from e


def token_rows(tokenizer: Tokenizer, text: str, length: int, tokens: int) -> Tensor:
    """``[rows, length]`` int64 with about ``tokens`` tokens, evenly spread over the text.

    Each row starts with what the tokenizer puts in front of a sequence (BOS, if anything).

    Raises:
        UserError: the text holds less than one row.
    """
    prefix = tokenizer.encode("").ids[:1]
    pieces = text.split("\n\n\n")
    ids = [i for e in tokenizer.encode_batch(pieces, add_special_tokens=False) for i in e.ids]
    step = length - len(prefix)
    count = len(ids) // step
    if count == 0:
        raise UserError(
            "text-short",
            f"the text has {len(ids)} tokens; at least {step} are needed",
            "give a longer text, or fewer tokens a row",
        )
    wanted = min(count, max(1, round(tokens / length)))
    chosen = [i * count // wanted for i in range(wanted)]
    rows = [prefix + ids[i * step : (i + 1) * step] for i in chosen]
    return torch.tensor(rows, dtype=torch.long)


def interleaved(count: int, size: int) -> list[list[int]]:
    """Indices below ``count`` in groups of at most ``size``, each spread over the whole range.

    Text comes in order of its sources; a group of neighbours would show one of them only.
    """
    groups = -(-count // size)
    return [list(range(i, count, groups)) for i in range(groups)]


def by_length(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Indices in even groups of at most ``size`` of like length, so that little is padded.

    Groups of short and of long ones take turns, evenly spread (multiples of the golden ratio), so
    that the first few are like all of them.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    count = -(-len(order) // size)
    ends = [i * len(order) // count for i in range(count + 1)]
    groups = [order[a:b] for a, b in pairwise(ends)]
    place = sorted(range(count), key=lambda i: (0.5 + i * _GOLDEN) % 1.0)
    return [groups[i] for i in place]


def decoder_batches(program: Program, rows: Tensor, size: int) -> list[Batch]:
    """Batches of a decoder's inputs with an empty cache."""
    batches = []
    for index in interleaved(len(rows), size):
        part = rows[index]
        position = torch.arange(part.shape[1])[None].repeat(part.shape[0], 1)
        batches.append(Batch((part, position, *program.empty_cache(part.shape[0]))))
    return batches


def sentence_batches(
    tokenizer: Tokenizer, sentences: Sequence[str], length: int, size: int
) -> list[Batch]:
    """Batches of an encoder's inputs, padded to the longest sentence of the batch.

    A longer one is cut as the tokenizer cuts it: what it puts at the end of a text stays there.
    """
    cutting = type(tokenizer).from_str(tokenizer.to_str())
    cutting.enable_truncation(length)
    return padded_batches([e.ids for e in cutting.encode_batch(list(sentences))], size)


def padded_batches(rows: Sequence[list[int]], size: int) -> list[Batch]:
    """Batches of token ids and their mask, padded to the longest row of the batch."""
    batches = []
    for index in by_length(list(map(len, rows)), size):
        part = [rows[i] for i in index]
        longest = max(map(len, part))
        ids = torch.tensor([p + [0] * (longest - len(p)) for p in part])
        mask = torch.tensor([[1] * len(p) + [0] * (longest - len(p)) for p in part])
        batches.append(Batch((ids, mask), mask.bool()))
    return batches


def sentences_of(text: str, limit: int) -> list[str]:
    """Paragraph-sized pieces of a text, evenly spread, at most ``limit``."""
    pieces = [" ".join(p.split()) for p in text.replace("\n\n\n", "\n\n").split("\n\n")]
    pieces = [p for p in pieces if len(p) >= 40]
    if len(pieces) <= limit:
        return pieces
    return [pieces[i * len(pieces) // limit] for i in range(limit)]


def text_batches(
    program: Program, tokenizer: Tokenizer, text: str, length: int, tokens: int
) -> list[Batch]:
    """Batches from a text for a decoder or a text encoder.

    Raises:
        UserError: the text is shorter than one row, or the program takes no text.
    """
    if program.kind == "decoder":
        return decoder_batches(program, token_rows(tokenizer, text, length, tokens), BATCH_ROWS)
    if program.inputs[:1] != ["input_ids"]:
        raise UserError(
            "text", "this program takes no text", "give calibration batches from Python"
        )
    sentences = sentences_of(text, max(8, tokens // 32))
    if len(sentences) < 8:
        raise UserError(
            "text-short",
            "the text holds fewer than 8 paragraphs of 40 characters",
            "give a longer text",
        )
    return sentence_batches(tokenizer, sentences, length, BATCH_ROWS)


def limit_batches(batches: Sequence[Batch], tokens: int) -> list[Batch]:
    """The first rows of the first batches, about ``tokens`` tokens, at least one row."""
    taken = []
    for batch in batches:
        rows = batch.inputs[0]
        each = rows.shape[1] if rows.ndim == 2 else 1
        count = min(rows.shape[0], max(1, round(tokens / each)))
        taken.append(batch.rows(0, count))
        tokens -= count * each
        if tokens <= 0:
            break
    return taken


def hold_back(batches: Sequence[Batch], tokens: int) -> tuple[list[Batch], list[Batch]]:
    """``(rest, judged)``: about ``tokens`` tokens for judging, and all that is not among them.

    Where fewer than three times as many rows would be left, the judged ones stay in the rest.
    """
    judged = limit_batches(batches, tokens)
    taken = [len(b.inputs[0]) for b in judged]
    rest = []
    for i, batch in enumerate(batches):
        start = taken[i] if i < len(taken) else 0
        if start < len(batch.inputs[0]):
            rest.append(batch.rows(start))
    enough = sum(len(b.inputs[0]) for b in rest) >= 3 * sum(taken)
    return (rest if enough else list(batches)), judged


def head_of(program: Program, batch: Batch, rows: int = 2, tokens: int = 24) -> tuple[Tensor, ...]:
    """The inputs of a batch's first rows, of a decoder's first tokens in them."""
    if program.kind == "decoder":
        ids, position = (t[:rows, :tokens].contiguous() for t in batch.inputs[:2])
        return (ids, position, *program.empty_cache(len(ids)))
    return tuple(t[:rows] for t in batch.inputs)


class SiteInputs:
    """What each FFN site sees on the calibration batches: ``[T, d]`` a site.

    Collected in one pass over the dense program; kept in fp32 while that is small, in bf16 above.
    """

    def __init__(self, inputs: dict[str, Tensor]) -> None:
        self._inputs = inputs

    @classmethod
    def collect(
        cls,
        program: Program,
        batches: Sequence[Batch],
        progress: Callable[[Sequence[Batch]], Iterator[Batch]] = iter,
    ) -> SiteInputs:
        """Run the program over the batches and keep the sites' inputs."""
        tokens = sum(
            b.inputs[0].shape[0] * (b.inputs[0].shape[1] if b.inputs[0].ndim > 1 else 1)
            for b in batches
        )
        size = tokens * sum(s.dense.up.shape[1] for s in program.sites) * 4
        dtype = torch.float32 if size < 1 << 30 else torch.bfloat16
        parts: dict[str, list[Tensor]] = {s.name: [] for s in program.sites}
        for batch in progress(batches):

            def keep(site: FFNSite, x: Tensor, batch: Batch = batch) -> None:
                parts[site.name].append(batch.counted(x).to(dtype, copy=True))

            program.run(*batch.inputs, observe=keep)
        return cls({name: torch.cat(p) for name, p in parts.items()})

    @property
    def tokens(self) -> int:
        """Tokens collected."""
        return next(iter(self._inputs.values())).shape[0]

    def of(self, site: FFNSite, limit: int | None = None, first: int | None = None) -> Tensor:
        """Inputs of ``site`` in fp32, ``[T, d]``, evenly thinned to ``limit`` tokens.

        ``first``: only of so many tokens, the first ones.
        """
        x = self._inputs[site.name][:first]
        if limit is not None and x.shape[0] > limit:
            x = x[torch.linspace(0, x.shape[0] - 1, limit).long()]
        return x.float()
