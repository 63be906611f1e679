"""What stored states are made of, and the folder they are in."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save

from carve.codec import CodecError, decode, settled
from carve.errors import CarveError, UserError
from carve.state_folder import Course, state_folder, state_path
from carve.storable import storable
from carve.store import StateError, Store, Stored, write_index
from carve.typed import fits

# Values


@storable
@dataclass(frozen=True)
class Example:
    count: int
    ratio: float
    by_name: dict[str, tuple[int, ...]]
    weight: torch.Tensor | None


def test_values_come_back_as_they_were(tmp_path: Path) -> None:
    base = torch.randn(6, 6)
    value = {
        "example": Example(3, 0.1 + 0.2, {"a": (1, 2)}, torch.arange(5)),
        ("a", 1): [None, True, "text", -0.0, float("inf")],
        "views": (base[1:3], base.T, base, base),
        "types": [torch.ones(2, dtype=torch.bfloat16), torch.zeros(0, 3), torch.tensor(1.5)],
        "array": np.arange(6, dtype=np.int16).reshape(2, 3),
    }
    stored, kept = Store(tmp_path).put(value)
    read = Store(tmp_path).get(stored)
    for found in (kept, read):
        assert str(found) == str(value)
        assert found["example"].by_name == {"a": (1, 2)}
        assert found["types"][0].dtype == torch.bfloat16
        for tensor in found["views"]:
            assert tensor.is_contiguous()
            assert tensor.data_ptr() % 64 == 0
    assert settled(kept) is kept
    assert kept["views"][2] is base


def test_a_tensor_is_written_once(tmp_path: Path) -> None:
    big = torch.randn(1000)
    store = Store(tmp_path)
    first, _ = store.put([big])
    second, _ = store.put({"again": big, "more": torch.ones(1)})
    assert set(first.needs) < set(second.needs)
    assert (tmp_path / f"{second.file}.safetensors").stat().st_size < 1000
    assert torch.equal(Store(tmp_path).get(second)["again"], big)
    big.add_(1)  # changed in place: another tensor from now on
    third, _ = store.put([big])
    assert torch.equal(Store(tmp_path).get(third)[0], big)
    store.drop_others(third.needs)
    with pytest.raises(StateError, match="missing"):
        Store(tmp_path).get(first)


@pytest.mark.parametrize(
    "raw",
    [
        {"class": "Path", "fields": {}},
        {"class": "Example", "fields": {"count": 1}},
        {"class": "Example", "fields": {"count": "1", "ratio": 1.0, "by_name": {"dict": []},
                                        "weight": None}},
        {"class": "Example", "fields": {"count": 1, "ratio": 1.0, "by_name": {"dict": [["a"]]},
                                        "weight": None}},
        {"call": "os.system"},
        {"dict": [[{"dict": []}, 1]]},
        {"tuple": 3},
        {},
    ],
)  # fmt: skip
def test_malformed_values_are_refused(raw: Any) -> None:
    with pytest.raises(CodecError):
        decode(raw, lambda name: torch.zeros(1))
    for _ in range(200):
        raw = [raw]
    with pytest.raises(CodecError, match="deep"):
        decode(raw, lambda name: torch.zeros(1))


@pytest.mark.parametrize("place", [["", ""], ["", "1"], [], None, ["", 0], ["ab", "0"]])
def test_tensors_that_are_not_there_are_refused(place: Any, tmp_path: Path) -> None:
    data = save({"0": torch.zeros(2)}, {"value": json.dumps([{"tensor": place}])})
    name = hashlib.sha256(data).hexdigest()
    (tmp_path / f"{name}.safetensors").write_bytes(data)
    with pytest.raises(StateError):
        Store(tmp_path).get(Stored(name, (name,)))


def test_what_cannot_be_stored_is_named(tmp_path: Path) -> None:
    with pytest.raises(CarveError, match=r"pathlib.*cannot be stored"):
        Store(tmp_path).put({"where": tmp_path})
    assert not any(tmp_path.iterdir())


def test_types_are_checked() -> None:
    assert fits((1, 2), tuple[int, ...])
    assert not fits((1, True), tuple[int, ...])
    assert fits(1, float)
    assert not fits(1.0, int)
    assert fits({"a": [1]}, dict[str, list[int]])
    assert not fits({"a": [None]}, dict[str, list[int]])
    assert fits(None, int | None)


# The folder


def test_one_conversion_at_a_time(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with (
        state_folder(out, Course()),
        pytest.raises(UserError, match="another conversion"),
        state_folder(out, Course()),
    ):
        pytest.fail("locked twice")
    assert not any(tmp_path.iterdir())


def test_what_a_killed_run_left_beside_is_tidied_up(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for name in (".out.part-77", ".out.old-77", ".out.state.gone"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    (tmp_path / ".other.part-77").mkdir()
    with state_folder(out, Course(resume=True)):
        # Killed between the renames: the former artifact is put back.
        assert (out / "file").read_text() == ".out.old-77"
    assert sorted(p.name for p in tmp_path.iterdir()) == [".other.part-77", "out"]


@pytest.mark.parametrize("course", [Course(), Course(resume=True)])
def test_state_is_discarded_unless_it_is_asked_for(course: Course, tmp_path: Path) -> None:
    folder = state_path(tmp_path / "out")
    write_index(folder / "00-profile.json", {"parts": {}})
    (folder / "objects").mkdir()
    with state_folder(tmp_path / "out", course):
        assert (folder / "00-profile.json").is_file() == course.resume
    assert folder.is_dir() == course.resume


@pytest.mark.parametrize(
    "course, word",
    [
        (Course(start="refitt"), "'refit'"),
        (Course(until="nothing"), "no such pass"),
        (Course(resume=True, start="refit"), "not both"),
        (Course(start="refit", until="carve"), "comes before"),
    ],
)
def test_courses_that_make_no_sense(course: Course, word: str) -> None:
    with pytest.raises(UserError, match=word):
        course.check(["carve", "refit"])
