from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from carve_runtime import Model, RequestError
from tiny_artifacts import HIDDEN, plain_ids

Loaded = dict[str, Model]
TEXTS = ["the cat", "a", "then the hat sat on the mat and on", "the mat"]


def with_info(model: Model, **info: object) -> Model:
    manifest = dataclasses.replace(
        model.manifest,
        model=dataclasses.replace(model.manifest.model, **info),  # type: ignore[arg-type]
    )
    return Model(manifest, model._engine, model.tokenizer, model._pad)


def test_embed_does_not_depend_on_the_batch(loaded: Loaded) -> None:
    model = loaded["encoder"]
    together = model.embed(TEXTS)
    assert together.shape == (4, HIDDEN) and together.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(together, model.embed(TEXTS, batch_size=2), atol=1e-6)
    alone = np.concatenate([model.embed([text]) for text in TEXTS])
    np.testing.assert_allclose(together, alone, atol=1e-6)
    assert model.embed([]).shape == (0, HIDDEN)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_pooling_and_truncation(loaded: Loaded, pooling: str) -> None:
    model = with_info(loaded["encoder"], pooling=pooling, normalize=False)
    for text in TEXTS:
        ids = [0, *plain_ids(text)][: model.max_length]
        hidden = model.hidden([ids])[0]
        expected = hidden.mean(axis=0) if pooling == "mean" else hidden[0]
        np.testing.assert_allclose(model.embed([text])[0], expected, atol=1e-5)


def test_hidden_and_run(loaded: Loaded) -> None:
    ids = np.array([[3, 4, 5]])
    hidden = loaded["encoder"].hidden(ids)
    mask = np.ones_like(ids)
    (raw,) = loaded["encoder"].run({"input_ids": ids, "attention_mask": mask})
    np.testing.assert_array_equal(hidden, raw)
    (y,) = loaded["module"].run({"x": np.ones((3, 2), np.float32)})
    np.testing.assert_array_equal(y, [[2, 3]] * 3)
    for feeds in ({}, {"x": np.ones((3, 2))}, {"z": np.ones((3, 2), np.float32)}):
        with pytest.raises(RequestError) as caught:
            loaded["module"].run(feeds)
        assert caught.value.code == "inputs"


def test_wrong_kind(loaded: Loaded) -> None:
    calls = [
        lambda: loaded["encoder"].generate("hi"),
        lambda: loaded["encoder"].stream("hi"),
        lambda: loaded["encoder"].start(),
        lambda: loaded["module"].logits([1]),
        lambda: loaded["growing"].embed(["hi"]),
        lambda: loaded["module"].hidden([[1]]),
    ]
    for call in calls:
        with pytest.raises(RequestError, match="artifact of a") as caught:
            call()
        assert caught.value.code == "kind"


def test_embed_refusals(loaded: Loaded) -> None:
    model = loaded["encoder"]
    for broken, code in (
        (with_info(model, pooling=None), "no-pooling"),
        (Model(model.manifest, model._engine, None, 0), "no-tokenizer"),
    ):
        with pytest.raises(RequestError) as caught:
            broken.embed(["a"])
        assert caught.value.code == code
    with pytest.raises(RequestError):
        model.embed("not a list")
