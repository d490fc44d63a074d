"""`cascade bench` on a processor: figures that add up, and none where something is wrong."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from cascade.batch import Batch
from cascade.bench import parity
from cascade.bench.clock import Clock
from cascade.bench.measure import Bench
from cascade.bench.peers import VllmJob, shared_module, transformers_peer, vllm_peer
from cascade.bench.report import Report
from cascade.bench.run import Settings, run
from cascade.cli import app
from cascade.errors import NumericalError, RequestError, SliceError
from cascade.kernels import cpu
from cascade.shapes import random_model
from tests.nested import reference_logits

QUICK: dict[str, Any] = {"run": 4, "repeats": 1, "context": 12, "prefill": 24}


@pytest.fixture(scope="module")
def report() -> Report:
    return run(Settings.of(shape="tiny", batches=(3,), **QUICK))


def test_every_slice_is_measured_at_every_batch(report: Report) -> None:
    assert {(d.slice, d.batch) for d in report.decode} == {
        (name, batch) for name in ("half", "whole") for batch in (1, 3)
    }
    assert {(s.slice, s.tokens) for s in report.scoring} == {
        (name, tokens) for name in ("half", "whole") for tokens in (8, 64)
    }
    assert {p.slice for p in report.prefill} == {"half", "whole"}
    assert [(s.before, s.after) for s in report.switches] == [("half", "whole"), ("whole", "half")]


def test_rates_and_shares_follow_from_times_and_bytes(report: Report) -> None:
    facts = json.loads(report.to_json())
    bandwidth = facts["machine"]["bandwidth"]
    assert bandwidth > 1e9
    for row in facts["decode"]:
        cost = row["cost"]
        assert row["tokens_per_second"] == pytest.approx(row["batch"] / cost["seconds"])
        assert cost["share"] == pytest.approx(cost["moved"] / bandwidth / cost["seconds"])
        assert cost["bytes_per_second"] == pytest.approx(cost["share"] * bandwidth)
        assert 0 < cost["share"] < 1
    assert all(row["ok"] for row in facts["agreement"])
    assert facts["memory"]["copies"] == 0
    assert facts["memory"]["weights"] == random_model("tiny", dtype=torch.float32).nbytes


def test_experts_are_counted_and_compared_with_even_routing(report: Report) -> None:
    for row in report.decode:
        assert row.experts is not None
        assert row.experts.of == 8
        assert row.experts.spread == pytest.approx(8 * (1 - 0.75**row.batch))
        assert 2 <= row.experts.distinct <= min(8, 2 * row.batch)
    assert all(d.experts and d.experts.distinct == 2 for d in report.decode if d.batch == 1)


def test_transformers_runs_beside_it(report: Report) -> None:
    ours = {d.slice: d.cost.seconds for d in report.decode if d.batch == 1}
    assert [peer.slice for peer in report.peers] == ["half", "whole"]
    for peer in report.peers:
        assert peer.name.startswith("transformers 5")
        assert peer.seconds is not None and peer.ratio is not None
        assert peer.ratio == pytest.approx(peer.seconds / ours[peer.slice])


def test_a_shape_has_assumed_acceptance_and_says_so(report: Report) -> None:
    assert [p.acceptance.source for p in report.predictions] == ["assumed"] * 3
    assert all((p.draft, p.verify) == ("half", "whole") for p in report.predictions)


def test_nothing_is_timed_where_the_fast_route_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    right = cpu.mlp_step
    monkeypatch.setattr(cpu, "mlp_step", lambda *arguments: right(*arguments) * 1.01)

    def timed(*arguments: object) -> None:
        raise AssertionError("timed on a red test")

    for figure in ("decode", "score", "prefill", "switch"):
        monkeypatch.setattr(Bench, figure, timed)
    with pytest.raises(NumericalError, match=r"no speed is reported: .* slice 'half' at batch 1"):
        run(Settings.of(shape="tiny", peers=False, slices=("half",), batches=(1,), **QUICK))


def test_a_wrong_greedy_choice_is_found_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The logits are right, and the id that is taken is not the best of them."""
    from cascade.sampling import Sampler

    adjusted = Sampler.adjusted
    monkeypatch.setattr(Sampler, "adjusted", lambda self, *arguments: -adjusted(self, *arguments))
    with pytest.raises(NumericalError, match="greedy of slice 'whole'"):
        run(Settings.of(shape="tiny", peers=False, slices=("whole",), batches=(1,), **QUICK))


def test_bfloat16_is_measured_against_the_references_own_rounding() -> None:
    settings = Settings.of(
        shape="tiny", dtype="bfloat16", peers=False, slices=("whole",), batches=(1,), **QUICK
    )
    found = run(settings)
    logits = next(a for a in found.agreement if a.of == "logits")
    assert 1e-4 < logits.error <= logits.allowed < 0.1
    assert not found.predictions and not found.switches  # one slice: nothing to choose between


def test_one_wrong_row_of_many_is_found_in_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    note = parity._Told._note

    def mixed_up(self: parity._Told, rows: Batch, tables: list[Any]) -> None:
        note(self, rows, [tables[1], *tables[1:]] if len(tables) > 1 else tables)

    monkeypatch.setattr(parity._Told, "_note", mixed_up)
    with pytest.raises(NumericalError, match="worst row of slice 'whole' at batch 48"):
        run(
            Settings.of(
                shape="tiny",
                dtype="bfloat16",
                peers=False,
                slices=("whole",),
                batches=(48,),
                **QUICK,
            )
        )


@pytest.mark.gpu
def test_a_gpu_is_timed_by_events_and_tells_its_peak_of_memory() -> None:
    found = run(Settings.of(shape="tiny", device="cuda", batches=(1, 3), **QUICK))
    assert found.machine.device == torch.cuda.get_device_name()
    assert found.machine.dtype == "bfloat16"
    assert all(d.peak > found.memory.weights for d in found.decode)
    assert {(d.slice, d.batch) for d in found.decode} >= {("half", 3), ("whole", 1)}
    assert all(d.cost.seconds > 0 for d in found.decode)


def test_threads_are_left_as_they_were() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        settings = Settings.of(shape="tiny", peers=False, slices=("half",), batches=(1,), **QUICK)
        assert run(settings).machine.threads == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


# ---- peers ----


@pytest.mark.parametrize("slice", ["half", "whole"])
def test_transformers_is_given_our_weights_and_no_copy(slice: str) -> None:
    model = random_model("tiny", dtype=torch.float32)
    theirs = shared_module(model, slice)
    ids = list(range(40))
    with model.sequence() as row:
        ours = row.append(ids, slice)
    torch.testing.assert_close(ours, reference_logits(theirs, ids)[-1], atol=1e-4, rtol=1e-4)
    storage = {t.untyped_storage().data_ptr() for _, t in model.weights("whole").named_tensors()}
    copied = [
        name
        for name, t in theirs.state_dict().items()
        if t.untyped_storage().data_ptr() not in storage
    ]
    assert all(name.endswith("A_log") for name in copied)


def test_a_peer_that_fails_gives_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    from cascade.bench import peers

    def broken(*arguments: object) -> None:
        raise RuntimeError("out of memory\nand more")

    monkeypatch.setattr(peers, "shared_module", broken)
    model = random_model("tiny", dtype=torch.float32)
    peer = transformers_peer(model, Clock(model.device), "half", [1, 2, 3])
    assert (peer.seconds, peer.note) == (None, "RuntimeError: out of memory")


def test_vllm_that_is_missing_or_fails_gives_its_reason() -> None:
    """Its process really starts, and says why it cannot go on."""
    job = VllmJob.of(random_model("tiny", dtype=torch.float32), "half", 8)
    peer = vllm_peer(job)
    assert peer.seconds is None and peer.note
    if "vllm" not in sys.modules:
        assert "vllm" in peer.note


# ---- settings and the command line ----


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"batches": (0,)}, RequestError, "batches.0=0"),
        ({"repeats": 0}, RequestError, "repeats=0"),
        ({"bathces": (1,)}, RequestError, "bathces"),
    ],
)
def test_bad_settings_are_refused(
    settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Settings.of(**settings)


def test_unknown_shapes_and_slices_are_refused_with_the_known_ones() -> None:
    with pytest.raises(RequestError, match="unknown shape '31b'; did you mean '30b'"):
        run(Settings.of(shape="31b"))
    with pytest.raises(SliceError, match="Known: half, whole"):
        run(Settings.of(shape="tiny", slices=("wohle",)))


def test_the_command_prints_tables_and_writes_json(tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    arguments = "bench --model nano --slice small --slice large --batch 2 --context 16 --prefill 32"
    arguments += f" --repeats 1 --no-peers --json {file}"
    result = CliRunner().invoke(app, arguments.split())
    assert result.exit_code == 0, result.output
    for word in ("nano, float32", "decode", "verify 8", "score 64", "prefill 32", "stepwise"):
        assert word in result.output
    assert "measured" in result.output and "\x1b[" not in result.output
    assert max(map(len, result.output.splitlines()[2:10])) <= 80
    facts = json.loads(file.read_text())
    [prediction] = facts["predictions"]
    assert prediction["acceptance"]["source"] == "measured"
    assert 0.5 < prediction["acceptance"]["token"] <= 1
    assert facts["peers"] == []


def test_json_to_standard_output_is_one_object() -> None:
    arguments = "bench --shape tiny --slice half --batch 1 --context 8 --prefill 8 --repeats 1"
    result = CliRunner().invoke(app, [*arguments.split(), "--no-peers", "--json", "-"])
    assert json.loads(result.output)["model"] == "random tiny"
