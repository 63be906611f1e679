"""Devices, traces, the place pass and carve plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models as tiny
import torch

from carve.budget import Request, make_request, plan_widths
from carve.calibration import Batch, SiteInputs
from carve.cli import main
from carve.config import ConvertConfig
from carve.errors import UserError
from carve.passbase import Context, PassManager
from carve.passes import Place, PlaceConfig
from carve.placement.devices import PRESETS, parse_devices, read_devices
from carve.placement.sizes import Sizes, sizes_of
from carve.placement.trace import Trace, collect_trace

TWO = """
[[device]]
name = "hub"
preset = "laptop"
[[device]]
name = "phone"
memory = "1GB"
flops = 1e10
bandwidth = 1e10
kind = "gpu"
[[link]]
between = ["hub", "phone"]
bandwidth = 1e8
latency = 1e-3
"""


def hub_with(memory: float) -> str:
    return TWO.replace('preset = "laptop"', f'preset = "laptop"\nmemory = "{int(memory)}"')


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "devices.toml"
    path.write_text(text)
    return path


def test_devices_are_read_with_presets_and_links(tmp_path: Path) -> None:
    found = read_devices(written(tmp_path, TWO))
    hub, phone = found.devices
    assert (hub.name, hub.flops) == ("hub", PRESETS["laptop"]["flops"])
    assert (phone.memory, phone.kind) == (1e9, "gpu")
    assert found.link(hub) is None
    link = found.link(phone)
    assert link is not None
    assert (link.bandwidth, link.latency) == (1e8, 1e-3)
    assert len(read_devices("raspberry-pi-5")) == 1


def test_count_and_wildcard_make_many() -> None:
    found = parse_devices(
        {
            "device": [{"preset": "h100-80gb", "name": "gpu", "count": 4}],
            "link": [{"between": ["*", "*"], "preset": "nvlink"}],
        }
    )
    assert found.names == ("gpu0", "gpu1", "gpu2", "gpu3")
    assert len(found.links) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("bandwidth = 1e8", "bandwith = 1e8"), "did you mean 'bandwidth'"),
        (('preset = "laptop"', 'preset = "labtop"'), "did you mean 'laptop'"),
        (("flops = 1e10", "flops = -1"), "positive number"),
        (("flops = 1e10", "flops = nan"), "positive number"),
        (('memory = "1GB"', 'memory = "much"'), "no size in bytes"),
        (('between = ["hub", "phone"]', 'between = ["hub", "fone"]'), "did you mean 'phone'"),
        (('name = "phone"', 'name = "hub"'), "same name"),
        (('kind = "gpu"', 'kind = "gpx"'), "did you mean 'gpu'"),
        (("[[link]]", "[[links]]"), "did you mean 'link'"),
        (("[[device]]", "[device]"), "TOML"),
    ],
)
def test_wrong_devices_are_refused(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    assert change[0] in TWO
    with pytest.raises(UserError, match=message):
        read_devices(written(tmp_path, TWO.replace(*change)))


def test_a_missing_link_and_a_missing_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no link between 'hub' and 'phone'"):
        read_devices(written(tmp_path, TWO.split("[[link]]")[0]))
    with pytest.raises(UserError, match="cannot be read"):
        read_devices(tmp_path / "none.toml")


def test_trace_counts_what_tokens_took(tmp_path: Path) -> None:
    g = np.random.default_rng(0)
    chosen = (g.random((700, 5)) < 0.4, g.random((700, 9)) < 0.3)
    trace = Trace(("a", "b"), chosen)
    pairs = trace.transitions()[0]
    assert pairs[2, 7] == pytest.approx((chosen[0][:, 2] & chosen[1][:, 7]).mean())
    sets, share = trace.sets(0)
    assert share.sum() == pytest.approx(1)
    assert len(sets) == len(np.unique(chosen[0], axis=0))
    first, second = trace.halves()
    assert first.tokens + second.tokens == 700
    assert min(first.tokens, second.tokens) > 200
    path = tmp_path / "trace.npz"
    path.write_bytes(trace.pack())
    again = Trace.read(path)
    assert again.layers == trace.layers
    assert all((a == b).all() for a, b in zip(again.chosen, chosen, strict=True))


def test_hostile_traces_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "trace.npz"
    path.write_bytes(b"PK\x03\x04 no archive")
    with pytest.raises(UserError, match="is no trace"):
        Trace.read(path)
    np.savez_compressed(
        path, layers=np.array(["a"]), experts=np.array([9]), chosen0=np.zeros((3, 1))
    )
    with pytest.raises(UserError, match="do not fit"):
        Trace.read(path)
    np.savez(path, layers=np.array(["a"], dtype=object), experts=np.array([1]))
    with pytest.raises(UserError, match="is no trace"):
        Trace.read(path)
    np.savez_compressed(path, chosen0=np.zeros(1 << 20, np.uint8))
    with pytest.raises(UserError, match="unpacks to more"):
        Trace.read(path, most_bytes=1 << 16)


@pytest.fixture(scope="module")
def routed() -> Any:
    return tiny.route(tiny.capture("llama").program, dynamic=True)


def batches_of(count: int = 4) -> list[Batch]:
    return [
        Batch(tiny.decoder_inputs(tiny.capture("llama").program, tiny.token_ids(seed=s)))
        for s in range(count)
    ]


def test_trace_is_what_the_routers_choose(routed: Any) -> None:
    batches = batches_of(2)
    trace = collect_trace(routed, batches)
    inputs = SiteInputs.collect(routed, batches)
    assert trace.layers == tuple(s.name for s in routed.carved)
    for site, chosen in zip(routed.carved, trace.chosen, strict=True):
        want = site.routed.chosen(inputs.of(site))
        assert torch.equal(torch.from_numpy(chosen), want)


def test_sizes_add_up_to_the_model(routed: Any) -> None:
    sizes = sizes_of(routed, 16)
    whole = 4 * sum(
        p.numel() for p in {p.data_ptr(): p for p in routed.module.parameters()}.values()
    )
    assert sizes.host_bytes + sum(map(sum, sizes.nbytes)) == whole
    r = routed.carved[0].routed
    assert sizes.macs[0][0] == 3 * r.expert_size * r.expert_up.shape[-1]


def test_pass_places_within_memory_and_scores_on_the_other_half(
    routed: Any, tmp_path: Path
) -> None:
    need = sum(map(sum, sizes_of(routed, 16).nbytes))
    host = sizes_of(routed, 16).host_bytes
    text = TWO.replace(
        'preset = "laptop"', f'preset = "laptop"\nmemory = "{int(host + need * 0.7)}"'
    )
    devices = written(tmp_path, text.replace('memory = "1GB"', f'memory = "{int(need * 0.5)}"'))
    batches = batches_of()
    context = Context(
        batches,
        SiteInputs.collect(routed, batches),
        Request(1e9),
        {s.name: None for s in routed.sites},
    )
    config = PlaceConfig(devices=str(devices), seconds=3.0, batch=1, context=0)
    metrics = Place(config).call(routed, context)
    assert set(metrics.scores) == {"placed", "round-robin"}
    assert all(used <= room for used, room in metrics.memory.values())
    assert sum(used for used, _ in metrics.memory.values()) == pytest.approx(need)
    placement = routed.notes["placement"]
    assert placement.bound <= placement.value
    assert json.loads(json.dumps(placement.as_dict()))["gap"] == pytest.approx(metrics.gap)


def test_too_little_memory_fails_before_the_first_pass(tmp_path: Path) -> None:
    program = tiny.capture("llama").program
    batches = batches_of(1)
    inputs = SiteInputs.collect(program, batches)
    request = make_request(program, None, 0.5)
    context = Context(batches, inputs, request, plan_widths(program, request))
    devices = written(tmp_path, hub_with(9_000))
    with pytest.raises(UserError, match="memory of 'hub'"):
        PassManager([Place(PlaceConfig(devices=str(devices)))])(program, context)


def test_dense_conversions_have_nothing_to_place() -> None:
    with pytest.raises(UserError, match="nothing is carved"):
        ConvertConfig(budget=1.0, devices="laptop")
    with pytest.raises(UserError, match="needs devices"):
        ConvertConfig(budget=0.5, passes={"place": {"seconds": 1.0}})


def test_plan_answers_for_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny.save_checkpoint(tmp_path / "model")
    devices = written(tmp_path, TWO)
    args = ["plan", str(model), "--devices", str(devices), "--budget", "0.7", "--json"]
    assert main([*args, "--set", "place.objective=latency"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["placement"]["objective"] == "latency"
    assert result["expert_bytes"] == pytest.approx(sum(u for u, _ in result["memory"].values()))
    assert main([*args, "--set", "carve.x=1"]) == 2
    devices.write_text(hub_with(9_000))
    capsys.readouterr()
    assert main(args) == 2
    assert "memory of 'hub'" in json.loads(capsys.readouterr().out)["error"]["message"]


def test_sizes_of_an_artifact_are_checked() -> None:
    trace = Trace(("a",), (np.ones((4, 2), bool),))
    good = {
        "nbytes": [[1.0, 2.0]],
        "macs": [[1.0, 1.0]],
        "token_bytes": 8.0,
        "host_bytes": 1.0,
        "cache_bytes": 1.0,
        "host_macs": [1.0],
        "host_reads": [1.0],
    }
    assert Sizes.parse(good, trace).nbytes == [[1.0, 2.0]]
    for key, value in (("nbytes", [[1.0]]), ("macs", None), ("host_bytes", -1.0)):
        with pytest.raises(UserError, match="sizes"):
            Sizes.parse({**good, key: value}, trace)
    with pytest.raises(UserError, match="cannot be read"):
        Sizes.parse({k: v for k, v in good.items() if k != "host_macs"}, trace)
