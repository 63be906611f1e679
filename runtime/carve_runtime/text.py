"""Turn a stream of token ids into a stream of text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tokenizers import Tokenizer

from carve_runtime.errors import ArtifactError, CarveRuntimeError, RequestError

_REPLACEMENT = "\ufffd"


@contextmanager
def tokenizing(what: str) -> Iterator[None]:
    """Say failures of the tokenizers library as one error.

    Raises:
        ArtifactError: ``tokenizer`` for whatever it raises, a panic of its Rust code included.
    """
    try:
        yield
    except CarveRuntimeError:
        raise
    except BaseException as error:
        # It raises plain Exception; what a panic becomes is none, and has no name to import.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ArtifactError(
            "tokenizer", f"{what}: {str(error)[:200]}", "compile the model again with carve"
        ) from error


def load_tokenizer(path: Path, truncate: int) -> tuple[Tokenizer, int]:
    """A tokenizer that does not pad, and its padding token.

    Args:
        path: ``tokenizer.json``.
        truncate: cut to so many tokens; 0 does not.

    Raises:
        ArtifactError: ``tokenizer`` when it cannot be read.
    """
    with tokenizing(f"cannot read {path}"):
        tokenizer = Tokenizer.from_file(str(path))
        pad = int((tokenizer.padding or {}).get("pad_id", 0))
        # Set once here and never later: threads share the tokenizer.
        tokenizer.no_padding()
        tokenizer.no_truncation()
        if truncate:
            tokenizer.enable_truncation(truncate)
        return tokenizer, pad


class Detokenizer:
    """Decode token by token, holding back characters whose UTF-8 is not complete yet.

    Decoding a token alone is wrong for most tokenizers (leading spaces, bytes), so each piece
    is what a token adds to the decoding of a short window before it.
    """

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._done = 0  # tokens of the window whose text is out already
        self._done_text = ""

    def _decode(self, ids: list[int]) -> str:
        if self._tokenizer is None or not ids:
            return ""
        with tokenizing("the tokenizer cannot decode"):
            return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def feed(self, token: int) -> str:
        """Add a token; return the text that is complete with it, perhaps none."""
        self._window.append(token)
        text = self._decode(self._window)
        if text.endswith(_REPLACEMENT) or len(text) <= len(self._done_text):
            return ""
        return self._advance(text)

    def flush(self) -> str:
        """Return what is still held; bytes that never became a character read as U+FFFD."""
        return self._advance(self._decode(self._window))

    def _advance(self, text: str) -> str:
        piece = text[len(self._done_text) :]
        # The tokens of this piece stay as context for the next; those before them can go.
        self._window = self._window[self._done :]
        self._done = len(self._window)
        self._done_text = self._decode(self._window)
        return piece


class StopFilter:
    """Pass text through until a stop string appears, which is never let out, even in part.

    The result does not depend on how the text is cut into pieces: the stop string that is
    complete first wins.

    Args:
        stops: the stop strings.

    Raises:
        RequestError: ``argument`` for a plain string or an empty stop string.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if isinstance(stops, str) or not all(isinstance(stop, str) and stop for stop in stops):
            raise RequestError("argument", "stop must be a sequence of strings, none of them empty")
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def feed(self, piece: str) -> str:
        """Add text; return what can be let out. After a stop string nothing more comes out."""
        if self.stopped or not piece:
            return ""
        text = self._held + piece
        hits = [(at + len(s), at) for s in self._stops if (at := text.find(s)) >= 0]
        if hits:
            self.stopped, self._held = True, ""
            return text[: min(hits)[1]]
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        """Let out what was held in case it became a stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a proper beginning of ``stop``."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
