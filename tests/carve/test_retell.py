"""Short calibration text is told again by the model: near what was given, and judged apart."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_models as tiny
import torch
from command_line import Captured, call, convert, result
from tokenizers.processors import TemplateProcessing

from carve import advance, retell
from carve.calibration import (
    DATA,
    Batch,
    decoder_batches,
    hold_back,
    load_tokenizer,
    padded_batches,
    sentence_batches,
    text_batches,
)
from carve.capture import capture_checkpoint
from carve.config import ConvertConfig
from carve.program import Program
from carve.retell import ENOUGH, KEPT, missing, recut, redrawn, stretched, tokens_in
from carve.state_folder import Course

REFERENCE = Path(__file__).resolve().parents[2] / "models" / "reference"
Get = Callable[[str], tiny.Captured]


def rows_of(program: Program, count: int, length: int = 64) -> list[Batch]:
    ids = torch.randint(
        program.config["vocab_size"], (count, length), generator=torch.Generator().manual_seed(1)
    )
    return decoder_batches(program, ids, 4)


def told(program: Program, batches: list[Batch], tokens: int, seed: int = 0) -> list[Batch]:
    return stretched(program, batches, tokens, 128, torch.Generator().manual_seed(seed))[0]


def test_how_much_is_missing(captured: Get) -> None:
    program = captured("llama").program
    batches = rows_of(program, 8)
    assert missing(program, batches, 2000) == 2000 - 512
    assert missing(program, batches, 10**6) == ENOUGH - 512
    assert missing(program, batches, 512) == missing(program, batches, 600) == 0
    assert missing(captured("bert").program, batches, 2000) == 0


def test_what_training_lacks(captured: Get, monkeypatch: pytest.MonkeyPatch) -> None:
    program = captured("llama").program
    batches = rows_of(program, 8)
    assert missing(program, batches, 512, 5_000) == 5_000 - 512
    assert missing(program, batches, 2_000, 680) == 2_000 - 512
    assert missing(program, batches, 512, 600) == 0  # that little more is not worth it
    monkeypatch.setattr(retell, "WORK", 3_000 * program.num_parameters)
    assert missing(program, batches, 512, 5_000) == 3_000
    assert missing(program, batches, 512, 50_000) == 0  # nor what goes nowhere near


def test_what_is_judged_is_given_text_and_stands_apart(captured: Get) -> None:
    program = captured("llama").program
    batches = rows_of(program, 8)
    given = {tuple(r.tolist()) for b in batches for r in b.inputs[0]}
    found, judge = stretched(program, batches, 1500, 4096, torch.Generator().manual_seed(0))
    assert judge == 128
    assert 512 + 1500 <= tokens_in(found) < 512 + 1500 + 64
    rest, judged = hold_back(found, judge)
    apart = {tuple(r.tolist()) for b in judged for r in b.inputs[0]}
    seen = [tuple(r.tolist()) for b in rest for r in b.inputs[0]]
    assert len(apart) == 2 and apart < given
    assert given - apart < {*seen} and not apart & {*seen}
    assert tokens_in(rest) + tokens_in(judged) == tokens_in(found)


def test_one_row_is_judged_and_learnt_from(captured: Get) -> None:
    program = captured("llama").program
    found, judge = stretched(
        program, rows_of(program, 1), 200, 4096, torch.Generator().manual_seed(0)
    )
    assert [len(b.inputs[0]) for b in found] == [1, 4]
    assert judge == 16


def test_rows_begin_as_given(captured: Get) -> None:
    program = captured("llama").program
    batches = rows_of(program, 4)
    every = torch.cat([b.inputs[0] for b in told(program, batches, 3000)])
    given, again = every[1:4], every[4:]  # the first is judged
    assert again.min() >= 0 and again.max() < program.config["vocab_size"]
    for row in again:
        same = (row == given).long().cumprod(1).sum(1).max()  # the tokens it begins with
        assert 1 <= same <= KEPT + 4  # some are drawn as they were
    assert len({tuple(r.tolist()) for r in again}) == len(again) == 47


def test_the_seed_decides(captured: Get) -> None:
    program = captured("llama").program
    one, same, other = (told(program, rows_of(program, 4), 500, s) for s in (3, 3, 4))
    assert all(torch.equal(a.inputs[0], b.inputs[0]) for a, b in zip(one, same, strict=True))
    assert not torch.equal(one[-1].inputs[0], other[-1].inputs[0])


def test_it_is_what_the_model_would_say() -> None:
    """The loss on it is about that on text, far from that of tokens at random."""
    program = capture_checkpoint(REFERENCE)
    nonsense = rows_of(program, 4)
    text = (DATA / "calibration.txt").read_text("utf-8")
    given = text_batches(program, load_tokenizer(REFERENCE), text, 64, 256)

    def loss(batch: Batch) -> float:
        with torch.no_grad():
            logits = program.run(*batch.inputs)[0][:, :-1].flatten(0, 1)
        return float(torch.nn.functional.cross_entropy(logits, batch.inputs[0][:, 1:].flatten()))

    *_, again = told(program, given, 500)
    assert loss(given[0]) < 5
    assert loss(again) < 5 < 9 < loss(nonsense[0])


def test_what_comes_again_is_drawn_by_the_model_in_part() -> None:
    program = capture_checkpoint(REFERENCE)
    text = (DATA / "calibration.txt").read_text("utf-8")
    parts = text_batches(program, load_tokenizer(REFERENCE), text, 64, 4096)
    plan = [*parts, *reversed(parts), *parts]
    store: dict[str, list[torch.Tensor]] = {}

    def once(key: str, make: Callable[[], list[torch.Tensor]]) -> list[torch.Tensor]:
        return store[key] if key in store else store.setdefault(key, make())

    def mixed() -> list[Batch]:
        return redrawn(program, plan, 0.5, torch.Generator().manual_seed(0), once=once)

    found, resumed = mixed(), mixed()
    new = [i for i, b in enumerate(found) if b.told]
    assert len(new) == round(0.5 * len(plan)) and min(new) >= len(parts)
    every = [(a, b) for a, b in zip(plan, found, strict=True) if a is not b]
    assert len(every) == len(new)
    assert all(torch.equal(a.inputs[0], b.inputs[0]) for a, b in zip(found, resumed, strict=True))
    given, again = (torch.cat([pair[i].inputs[0] for pair in every]) for i in (0, 1))
    assert torch.equal(given[:, 0], again[:, 0])
    kept = float((given == again)[:, 1:].float().mean())
    assert 0.5 < kept < 0.7  # the model says about a third of it as it was
    # Drawn of every token as the model holds it likely: as surprising as it is unsure.
    sources = [b for b in parts if any(b is old for old, _ in every)]
    with torch.no_grad():
        logits = torch.cat([program.run(*b.inputs)[0][:, :-1] for b in sources])
    logp = logits.float().log_softmax(-1)
    unsure = -(logp.exp() * logp).sum(-1).mean()
    words = torch.cat(store["drawn"])[:, 1:, None]
    assert float(-logp.gather(-1, words).mean()) == pytest.approx(float(unsure), rel=0.05)
    assert redrawn(program, parts, 0.5, torch.Generator()) == parts  # nothing comes again


def test_an_encoders_rows_are_cut_elsewhere(captured: Get) -> None:
    program = captured("bert").program
    bodies = [[10 + 7 * i + j for j in range(3 + i % 5)] for i in range(40)]
    rows = [[1, *b, 2] for b in bodies]
    rows[3] = rows[3][:-1]  # as if it had been cut at the greatest length
    batches = padded_batches(rows, 4)
    have = tokens_in(batches)
    assert missing(program, batches, 10**6) == have
    assert missing(program, batches, have, have + 30) == 0
    assert missing(program, batches, have, 2 * have) == have

    def seen(batches: Sequence[Batch]) -> list[list[int]]:
        found = []
        for batch in batches:
            assert batch.mask is not None
            found += [r[m].tolist() for r, m in zip(batch.inputs[0], batch.mask, strict=True)]
        return found

    one, same, other = (
        recut(batches, have, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )
    cut = seen(one)
    assert cut == seen(same) != seen(other)
    assert all(r[0] == 1 and r[-1] == 2 and 1 not in r[1:] and 2 not in r[:-1] for r in cut)
    assert sorted(len(r) - 2 for r in cut) == sorted(map(len, bodies))
    assert sorted(t for r in cut for t in r[1:-1]) == sorted(t for b in bodies for t in b)
    assert sum(r in rows for r in cut) < len(rows) // 4
    # The first batch may be what judged text left of it.
    first = [batches[0].rows(0, 1), *batches[1:]]
    sizes = [len(b.inputs[0]) for b in recut(first, have, torch.Generator().manual_seed(0))]
    assert min(sizes) > 2
    few = recut(batches, 50, torch.Generator().manual_seed(0))
    assert 50 <= tokens_in(few) < 60
    longer, _ = stretched(program, batches, 50, 8, torch.Generator().manual_seed(0))
    assert have + 50 <= tokens_in(longer) < have + 60
    assert not {*map(tuple, seen(longer[-1:]))} & {*map(tuple, rows)}


def test_a_text_that_is_cut_keeps_its_end() -> None:
    tokenizer = tiny.make_tokenizer(300)
    ends = [("<s>", 0), ("</s>", 1)]
    tokenizer.post_processor = TemplateProcessing("<s> $A </s>", special_tokens=ends)
    (batch,) = sentence_batches(tokenizer, ["a b c d e f g h i j k l", "a b"], 8, 2)
    assert batch.mask is not None
    rows = [ids[on].tolist() for ids, on in zip(batch.inputs[0], batch.mask, strict=True)]
    assert min(map(len, rows)) < max(map(len, rows)) == 8
    assert all(r[0] == 0 and r[-1] == 1 for r in rows)
    assert len(tokenizer.encode("a b c d e f g h i j k l").ids) > 8


def test_a_text_cut_at_the_length_of_a_row_gets_no_longer() -> None:
    # As a tokenizer leaves them: what is longer than a row has no end.
    rows = [[1, *range(10, 16 + i), 2] for i in range(4)] + [[1, *range(10, 21)]] * 2
    batches = padded_batches(rows, 3)
    again = recut(batches, tokens_in(batches), torch.Generator().manual_seed(0))
    assert max(b.inputs[0].shape[1] for b in again) == max(map(len, rows))


def test_what_was_told_is_kept(checkpoint: Path, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text((DATA / "calibration.txt").read_text("utf-8")[:2_000], "utf-8")
    config = ConvertConfig(budget=0.7, bits=16, effort="none", calibration=str(text))
    labels: list[str] = []

    def progress(items: Sequence[Any], label: str) -> Iterator[Any]:
        labels.append(label)
        yield from items

    def run(course: Course, config: ConvertConfig = config) -> bool:
        labels.clear()
        advance(checkpoint, tmp_path / "a", config, progress=progress, course=course)
        return "text told again" in labels

    assert run(Course(until="profile"))
    assert not run(Course(resume=True, until="allocate"))
    assert run(Course(resume=True, until="allocate"), replace(config, seed=1))


def test_a_conversion_with_a_short_text(checkpoint: Path, tmp_path: Path, capsys: Captured) -> None:
    text = tmp_path / "short.txt"
    text.write_text((DATA / "calibration.txt").read_text("utf-8")[:2_000], "utf-8")
    asked = ["--budget", "0.7", "--bits", "16", "--effort", "none", "--calibration", str(text)]
    assert convert(checkpoint, tmp_path / "a", *asked) == 0
    capsys.readouterr()
    found = json.loads((tmp_path / "a" / "report.json").read_text("utf-8"))["calibration"]
    assert 0 < found["told_again"] < found["tokens"]
    assert 2000 <= found["tokens"] < 3000
    assert call("plan", str(checkpoint), "-o", str(tmp_path / "b"), "--json", *asked) == 0
    assert result(capsys)["tokens"]["told"] > 0
