"""Write a byte-level BPE tokenizer in the form that the native runner reads.

Only what the runner does exactly as the ``tokenizers`` library is written; everything else is
refused with its reason. Which characters are letters, numbers or spaces is asked of the library
itself, whose Unicode version decides how a text is split.
"""

from __future__ import annotations

import functools
import struct
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from carve.files import read_json

NAME = "tokenizer.carve"
_VERSION = 1
_SPECIAL, _WORD = 1, 2
_PREFIX_SPACE, _WHOLE_WORDS, _SINGLE_DIGITS, _LLAMA = 1, 2, 4, 8
_CLASSES = (r"\p{L}", r"\p{N}", r"\s")
_LLAMA_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PATTERNS = {_LLAMA_PATTERN % r"\p{N}": 1, _LLAMA_PATTERN % r"\p{N}{1,3}": 3}
"""What Llama 3 and its like split by, and how many digits it leaves together."""
_PART = 2048


class UnsupportedError(ValueError):
    """The runner cannot do the tokenizer exactly; the message says why."""


def compact(path: Path) -> bytes:
    """The runner's form of a ``tokenizer.json``.

    Little-endian words of 32 bits: the magic ``carvetok`` and a version, flags, how many digits
    stay together; ranges of letters, numbers, spaces and single digits; of every token what it
    is and its bytes; the token of every byte; merges by rank, two tokens and the one they make;
    added tokens, those that are looked for first and the others; the special tokens before and
    after a text. All but the first are preceded by how many there are.

    Args:
        path: the tokenizer as the ``tokenizers`` library writes it.

    Raises:
        UnsupportedError: it is of another kind.
        UserError: the file cannot be read.
    """
    from tokenizers import Tokenizer

    raw = read_json(path)
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    flags, digits = _splitting(raw)
    model = _model(raw)
    flags |= _WHOLE_WORDS if model.get("ignore_merges") else 0
    added = _added(tokenizer)
    letters = _letters()
    vocab: dict[str, int] = model["vocab"]
    missing = [b for b, letter in letters.items() if letter not in vocab]
    if missing:
        raise UnsupportedError(f"its vocabulary lacks the byte {missing[0]}")
    out = [b"carvetok", _words(_VERSION, flags, digits)]
    for ranges in _classes(bool(flags & _SINGLE_DIGITS)):
        out += [_words(len(ranges)), *(_words(*r) for r in ranges)]
    out.append(_tokens(tokenizer, vocab, {i for i, a in added.items() if a.special}, letters))
    out.append(_words(*(vocab[letters[b]] for b in range(256))))
    merges = _merges(model, vocab)
    out += [_words(len(merges)), *(_words(*m) for m in merges)]
    for normalized in (False, True):
        group = {i: a.content for i, a in added.items() if a.normalized is normalized}
        out += [_words(len(group)), *(_words(i) + _text(text) for i, text in group.items())]
    for ids in _around(tokenizer, raw.get("post_processor")):
        out += [_words(len(ids)), _words(*ids)]
    return b"".join(out)


def _words(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}I", *values)


def _text(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return _words(len(data)) + data


def _parts(raw: Any, key: str) -> list[dict[str, Any]]:
    """A step of the tokenizer, or the steps that a sequence names."""
    if raw is None:
        return []
    if raw.get("type") == "Sequence":
        return [p for part in raw[key] for p in _parts(part, key)]
    return [raw]


def _splitting(raw: dict[str, Any]) -> tuple[int, int]:
    """Flags and the number of digits that stay together."""
    if raw.get("normalizer") is not None:
        raise UnsupportedError(f"it normalizes text ({raw['normalizer'].get('type')})")
    decoders = _parts(raw.get("decoder"), "decoders")
    if [d.get("type") for d in decoders] != ["ByteLevel"]:
        raise UnsupportedError("its decoder is not that of byte-level BPE")
    *first, last = _parts(raw.get("pre_tokenizer"), "pretokenizers") or [{}]
    if last.get("type") != "ByteLevel":
        raise UnsupportedError("it does not split text into bytes")
    flags = _PREFIX_SPACE if last.get("add_prefix_space") else 0
    own = last.get("use_regex", True)
    if not first and own:
        return flags, 0
    if len(first) == 1 and first[0].get("type") == "Digits" and own:
        if first[0].get("individual_digits"):
            return flags | _SINGLE_DIGITS, 0
    elif len(first) == 1 and first[0].get("type") == "Split" and not own and not flags:
        pattern = first[0].get("pattern", {}).get("Regex")
        plain = first[0].get("behavior") == "Isolated" and not first[0].get("invert")
        if plain and pattern in _PATTERNS:
            return flags | _LLAMA, _PATTERNS[pattern]
    raise UnsupportedError("it splits text by a pattern that the runner does not know")


def _model(raw: dict[str, Any]) -> dict[str, Any]:
    model: dict[str, Any] = raw["model"]
    if model.get("type") != "BPE":
        raise UnsupportedError(f"its model is {model.get('type')}, not BPE")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(key):
            raise UnsupportedError(f"its model has {key}")
    return model


def _added(tokenizer: Any) -> dict[int, Any]:
    """Added tokens by the ids that the library gives them, which a file may have otherwise."""
    added: dict[int, Any] = tokenizer.get_added_tokens_decoder()
    for token in added.values():
        for key in ("single_word", "lstrip", "rstrip"):
            if getattr(token, key):
                raise UnsupportedError(f"its token {token.content!r:.40} has {key}")
    return {i: token for i, token in added.items() if token.content}


def _letters() -> dict[int, str]:
    """The character that stands for each byte (Radford et al., 2019)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1)]
    plain += range(ord("®"), ord("ÿ") + 1)
    others = [b for b in range(256) if b not in plain]
    return {b: chr(b) for b in plain} | {b: chr(256 + n) for n, b in enumerate(others)}


def _tokens(
    tokenizer: Any, vocab: dict[str, int], special: set[int], letters: dict[int, str]
) -> bytes:
    bytes_of = {letter: b for b, letter in letters.items()}
    count = max([*vocab.values(), *special, tokenizer.get_vocab_size() - 1]) + 1
    if count > 1 << 24:
        raise UnsupportedError(f"it has tokens up to {count}")
    names = [tokenizer.id_to_token(i) for i in range(count)]
    out = [_words(count)]
    for i, name in enumerate(names):
        name = name or ""
        whole = all(c in bytes_of for c in name)
        kind = (_SPECIAL if i in special else 0) | (_WORD if whole and vocab.get(name) == i else 0)
        data = bytes(bytes_of[c] for c in name) if whole else name.encode()
        out.append(_words(kind) + _text(data))
    return b"".join(out)


def _merges(model: dict[str, Any], vocab: dict[str, int]) -> list[tuple[int, int, int]]:
    found: dict[tuple[str, str], None] = {}
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        found.pop((left, right), None)  # of two the later one counts
        found[left, right] = None
    return [(vocab[a], vocab[b], vocab[a + b]) for a, b in found]


def _around(tokenizer: Any, post: Any) -> tuple[list[int], list[int]]:
    """The special tokens before and after a text."""
    for part in _parts(post, "processors"):
        if part.get("type") not in ("ByteLevel", "TemplateProcessing"):
            raise UnsupportedError(f"it finishes texts by {part.get('type')}")
    bare = tokenizer.encode("a", add_special_tokens=False).ids
    whole = tokenizer.encode("a").ids
    for at in range(len(whole) - len(bare) + 1):
        if whole[at : at + len(bare)] == bare:
            return whole[:at], whole[at + len(bare) :]
    raise UnsupportedError("its special tokens are not around a text")


@functools.cache
def _classes(single_digits: bool) -> tuple[list[tuple[int, int]], ...]:
    """Ranges of letters, numbers, spaces and single digits, as the library knows them."""
    from tokenizers import Regex, pre_tokenizers

    texts = [
        "".join(map(chr, range(at, at + _PART)))
        for at in range(0, sys.maxunicode + 1, _PART)
        if not 0xD800 <= at < 0xE000  # halves of characters
    ]
    of_one = [pre_tokenizers.Split(Regex(f"[^{p}]"), "removed") for p in _CLASSES]
    runs = pre_tokenizers.Split(Regex("|".join(f"{p}+" for p in _CLASSES)), "isolated")
    classes: list[set[int]] = [set() for _ in _CLASSES]
    for text in texts:
        for run, _ in runs.pre_tokenize_str(text):
            for found, splitter in zip(classes, of_one, strict=True):
                if splitter.pre_tokenize_str(run[0]):
                    found.update(map(ord, run))
    digits: set[int] = set()
    if single_digits:
        singly = pre_tokenizers.Digits(individual_digits=True)
        # Between letters a digit, and nothing else, is a piece of its own.
        apart = [f"a{'a'.join(t)}a" for t in texts]
        pieces = (piece for t in apart for piece, _ in singly.pre_tokenize_str(t))
        digits = {ord(p) for p in pieces if len(p) == 1 and p != "a"}
    return tuple(_ranges(found) for found in (*classes, digits))


def _ranges(codes: Iterable[int]) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for c in sorted(codes):
        if found and found[-1][1] == c - 1:
            found[-1] = (found[-1][0], c)
        else:
            found.append((c, c))
    return found


def compact_or_reason(tokenizer: Path) -> tuple[bytes | None, str]:
    """`compact`, or None and why there is none."""
    try:
        return compact(tokenizer), ""
    except UnsupportedError as e:
        return None, str(e)
