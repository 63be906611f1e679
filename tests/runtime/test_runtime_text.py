"""Property tests of the sampler, the stop filter and the detokenizer."""

from __future__ import annotations

import numpy as np
import pytest
from carve_runtime import CarveRuntimeError, Sampler
from carve_runtime.text import Detokenizer, StopFilter
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_artifacts import TOKENIZER, VOCAB, plain_ids
from tokenizers import Tokenizer, decoders, models

LOGITS = st.lists(
    st.floats(-30, 30, width=32) | st.just(float("-inf")), min_size=1, max_size=40
).filter(lambda row: max(row) > float("-inf"))


@settings(max_examples=150, deadline=None)
@given(
    LOGITS,
    st.floats(0.05, 5),
    st.integers(0, 50),
    st.floats(0.01, 1),
    st.integers(0, 2**32),
)
def test_sampler(row: list[float], temperature: float, k: int, p: float, seed: int) -> None:
    logits = np.array(row, np.float32)
    ids, probabilities = Sampler(temperature, k, p).candidates(logits)
    assert len(set(ids.tolist())) == ids.size >= 1
    assert probabilities.sum() == pytest.approx(1)
    assert np.all(np.diff(probabilities) <= 0)

    # The same, the plain way: sort everything, keep k, keep the nucleus.
    order = np.argsort(-logits, kind="stable")[: k or None]
    weights = np.exp((logits[order].astype(np.float64) - logits.max()) / temperature)
    weights /= weights.sum()
    before = np.cumsum(weights) - weights
    if p < 1:
        # Rounding may decide a tie either way, so the count is bracketed.
        assert np.sum(before < p - 1e-9) <= ids.size <= max(1, np.sum(before < p + 1e-9))
    expected = weights[: ids.size] / weights[: ids.size].sum()
    np.testing.assert_allclose(probabilities, expected, atol=1e-9)

    first, again = Sampler(temperature, k, p, seed), Sampler(temperature, k, p, seed)
    drawn = [first(logits) for _ in range(5)]
    assert drawn == [again(logits) for _ in range(5)]
    assert set(drawn) <= set(ids.tolist())
    assert all(logits[token] > -np.inf for token in drawn)


@given(LOGITS)
def test_greedy(row: list[float]) -> None:
    assert Sampler()(np.array(row, np.float32)) == row.index(max(row))


def test_sampler_frequencies() -> None:
    sampler = Sampler(temperature=2.0, seed=0)
    logits = 2 * np.log(np.array([0.5, 0.2, 0.3, 0]) + 1e-300)
    counts = np.bincount([sampler(logits) for _ in range(4000)], minlength=4) / 4000
    np.testing.assert_allclose(counts, [0.5, 0.2, 0.3, 0], atol=0.03)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite(bad: float, temperature: float) -> None:
    with pytest.raises(CarveRuntimeError) as caught:
        Sampler(temperature)(np.array([0, bad, 1], np.float32))
    assert caught.value.code == "non-finite"
    assert Sampler(1e-320)(np.array([0, 2, 1], np.float32)) == 1


SHORT = st.text("ab", max_size=4)


@settings(max_examples=300, deadline=None)
@given(st.lists(SHORT, max_size=8), st.lists(SHORT.filter(bool), max_size=3))
def test_stop_filter(pieces: list[str], stops: list[str]) -> None:
    """However the text is cut, it ends before the stop string that is complete first."""
    text = "".join(pieces)
    expected, stopped = text, False
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            expected, stopped = text[: min(starts)], True
            break
    stream = StopFilter(stops)
    out = ""
    for piece in pieces:
        out += stream.feed(piece)
        assert expected.startswith(out)
    out += stream.flush()
    assert (out, stream.stopped) == (expected, stopped)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(2, VOCAB - 1), max_size=12) | st.text(max_size=8).map(plain_ids))
def test_detokenizer(ids: list[int]) -> None:
    """The pieces add up to the decoding of the whole, invalid UTF-8 included."""
    stream = Detokenizer(TOKENIZER)
    pieces = [stream.feed(token) for token in ids]
    assert all(not piece.endswith("\ufffd") for piece in pieces)
    assert "".join(pieces) + stream.flush() == TOKENIZER.decode(ids)


def test_detokenizer_with_spaces_and_byte_fallback() -> None:
    """The SentencePiece way: a space begins a word, and unknown characters fall to bytes."""
    words = ["<unk>", "▁the", "▁cat", "s", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.BPE({word: n for n, word in enumerate(words)}, []))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    ids = [1, 2, 3, *(4 + byte for byte in "€".encode()), 2]
    stream = Detokenizer(tokenizer)
    pieces = [stream.feed(token) for token in ids]
    assert pieces == ["the", " cat", "s", "", "", "€", " cat"]
    assert stream.flush() == ""
