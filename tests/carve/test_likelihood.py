"""What the harness asks for, beside a computation from the logits of one pass."""

from __future__ import annotations

import sys
from pathlib import Path

import carve_runtime
import numpy as np
import pytest

from carve import likelihood
from carve.errors import CarveError, UserError
from carve.likelihood import Scorer

sys.path.append(str(Path(__file__).parents[1] / "runtime"))
import tiny_artifacts as tiny

CONTEXT, CONTINUATION = [0, 40, 41, 42], [50, 51, 52, 53, 54]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> carve_runtime.Model:
    folder = tmp_path_factory.mktemp("likelihood") / "a"
    tiny.write(folder, "decoder", tiny.decoder(True), shared_cache=True, max_length=48)
    return carve_runtime.load(folder, threads=1)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    return logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)


@pytest.mark.parametrize("step", [1, 16 * 4 * tiny.VOCAB, 1 << 30])
def test_score_is_that_of_the_logits(
    model: carve_runtime.Model, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    monkeypatch.setattr(likelihood, "_STEP_BYTES", step)
    context = (CONTEXT * 8)[:30]
    total, greedy = Scorer(model).score(context, CONTINUATION)
    rows = log_softmax(model.logits([*context, *CONTINUATION]))[len(context) - 1 : -1]
    assert total == pytest.approx(rows[np.arange(5), CONTINUATION].sum(), abs=1e-5)
    assert not greedy


def test_what_is_greedy(model: carve_runtime.Model) -> None:
    likely = model.generate(CONTEXT, max_new_tokens=4).token_ids
    assert len(likely) == 4
    scorer = Scorer(model)
    assert scorer.score(CONTEXT, likely)[1]
    assert not scorer.score(CONTEXT, [*likely[:-1], (likely[-1] + 1) % tiny.VOCAB])[1]


def test_long_contexts_lose_their_start(model: carve_runtime.Model) -> None:
    scorer = Scorer(model)
    long = list(range(2, 102))
    cut = long[-(48 + 1 - len(CONTINUATION)) :]
    assert scorer.score(long, CONTINUATION) == scorer.score(cut, CONTINUATION)
    rows = log_softmax(model.logits([*cut, *CONTINUATION][:-1]))[-len(CONTINUATION) :]
    want = rows[np.arange(5), CONTINUATION].sum()
    assert scorer.score(long, CONTINUATION)[0] == pytest.approx(want, abs=1e-5)
    for context, continuation in (([1], [3] * 49), ([], [3])):
        with pytest.raises(UserError, match="48"):
            scorer.score(context, continuation)


def test_special_tokens(model: carve_runtime.Model) -> None:
    plain, scorer = tiny.plain_ids("the cat"), Scorer(model)
    assert scorer.encode("the cat") == [0, *plain]
    assert scorer.encode("the cat", special=False) == plain
    assert Scorer(model, add_bos_token=False).encode("the cat") == plain
    assert scorer.encode("<s>the cat") == [0, *plain]


def test_generation(model: carve_runtime.Model) -> None:
    scorer = Scorer(model)
    greedy = {"do_sample": False, "temperature": 0.0, "max_gen_toks": 12, "until": ["", "\0"]}
    want = model.generate("the cat", max_new_tokens=12).text
    assert scorer.generate("the cat", greedy) == want
    stop = want[3:5]
    assert scorer.generate("the cat", {**greedy, "until": [stop]}) == want[: want.index(stop)]
    warm = {"do_sample": True, "temperature": 2.0, "seed": 3, "max_gen_toks": 12}
    sampled = model.generate("the cat", max_new_tokens=12, temperature=2.0, seed=3).text
    assert scorer.generate("the cat", warm) == sampled != want
    long = scorer.generate("the cat sat on " * 20, greedy)
    ids = scorer.encode("the cat sat on " * 20)[-36:]
    assert long == model.generate(ids, max_new_tokens=12).text
    for wrong in ({"num_beams": 4}, {"max_gen_toks": 48}):
        with pytest.raises(UserError):
            scorer.generate("the cat", {**greedy, **wrong})


def test_models_that_cannot_be_scored(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "m", "module", tiny.module())
    with pytest.raises(UserError, match="decoder"):
        Scorer(carve_runtime.load(folder))
    tiny.write(tmp_path / "n", "decoder", tiny.decoder(False), eos_token_ids=[])
    data = tmp_path / "n/onnx/model.onnx.data"
    data.write_bytes(np.full(data.stat().st_size // 4, np.nan, np.float32).tobytes())
    tiny.seal(tmp_path / "n")
    with pytest.raises(CarveError, match="finite"):
        Scorer(carve_runtime.load(tmp_path / "n")).score(CONTEXT, CONTINUATION)
