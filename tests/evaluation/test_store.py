"""A run directory keeps what is finished, and refuses what does not belong in it."""

import json
import os
import resource
from pathlib import Path

import pytest

from cascade.errors import RunDirectoryError
from cascade.evaluation.manifest import write_atomically
from cascade.evaluation.store import RunDirectory
from cascade.problems import Problem
from tests.evaluation.records import PROBLEMS, manifest, record

ORDER = [(p.id, "stepwise") for p in PROBLEMS]


def opened(path: Path, resume: bool = True, **changes: object) -> RunDirectory:
    store = RunDirectory(path)
    store.open(manifest(**changes), PROBLEMS, resume=resume)
    store.start()
    return store


def keep(path: Path, *ids: str) -> bytes:
    store = opened(path)
    for id in ids:
        store.append(record(id))
    store.close()
    return (path / "results.jsonl").read_bytes()


def test_what_is_appended_is_read_back(tmp_path: Path) -> None:
    keep(tmp_path, "p0", "p1")
    assert RunDirectory(tmp_path).records() == [record("p0"), record("p1")]
    assert RunDirectory(tmp_path).problems() == [p.described for p in PROBLEMS]
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    assert {"id", "run", "answer", "score"} <= json.loads(lines[0]).keys()


def test_a_line_cut_anywhere_is_an_item_that_was_not_finished(tmp_path: Path) -> None:
    whole = keep(tmp_path, "p0", "p1")
    first = whole.index(b"\n") + 1
    for cut in (*range(first, len(whole), 97), len(whole) - 1):
        (tmp_path / "results.jsonl").write_bytes(whole[:cut])
        assert [r.id for r in RunDirectory(tmp_path).records()] == ["p0"]
        assert keep(tmp_path, "p1") == whole  # the torn end is gone, the item made again


def test_damage_in_the_middle_is_named(tmp_path: Path) -> None:
    whole = keep(tmp_path, "p0", "p1")
    for damage in (b"\x00" * 20, b"[]", b'{"id": "p0"}'):
        (tmp_path / "results.jsonl").write_bytes(damage + b"\n" + whole)
        with pytest.raises(RunDirectoryError, match=r"results\.jsonl, line 1 is damaged"):
            RunDirectory(tmp_path).records()


def test_what_is_there_is_not_overwritten_without_resume(tmp_path: Path) -> None:
    keep(tmp_path, "p0")
    with pytest.raises(RunDirectoryError, match=r"1 finished items.*--resume"):
        opened(tmp_path, resume=False)
    assert len(RunDirectory(tmp_path).records()) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 7}, "seed was 0, now 7"),
        ({"grader": "exact"}, 'grader was "auto", now "exact"'),
        ({"params": {"temperature": 1.0}}, "params was {}, now"),
        (
            {"size": 9, "problems": "x", "source": {"kind": "list", "size": 9}},
            "size was null, now 9",
        ),
        ({"problems": "x"}, "problems was"),
        (
            {"engine": manifest().engine.model_copy(update={"digest": "sha256:2"})},
            'engine.digest was "sha256:1", now "sha256:2"',
        ),
        (
            {"runs": {"stepwise": manifest().runs["stepwise"] | {"policy": {"kind": "always"}}}},
            "run 'stepwise': policy was null, now",
        ),
    ],
)
def test_another_configuration_is_refused_and_said(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    keep(tmp_path, "p0")
    other = manifest(**{k: v for k, v in changes.items() if k != "runs"})
    if "runs" in changes:
        other = other.model_copy(update={"runs": changes["runs"]})
    with pytest.raises(RunDirectoryError, match="another configuration") as refused:
        RunDirectory(tmp_path).open(other, PROBLEMS, resume=True)
    assert message in str(refused.value)


def test_runs_may_be_added_and_sittings_are_listed(tmp_path: Path) -> None:
    keep(tmp_path, "p0")
    opened(tmp_path, runs=["single"]).close()
    found = RunDirectory(tmp_path).manifest
    assert list(found.runs) == ["stepwise", "single"]
    assert len(found.sessions) == 2
    assert found.sessions[0]["versions"]["torch"]


def test_two_evaluations_cannot_use_one_directory(tmp_path: Path) -> None:
    store = opened(tmp_path)
    with pytest.raises(RunDirectoryError, match="is in use by another evaluation"):
        opened(tmp_path)
    store.close()
    opened(tmp_path).close()


def test_a_full_disk_is_an_error_and_finished_items_are_kept(tmp_path: Path) -> None:
    """The limit of this process's file size stands for the end of the disk."""
    store = opened(tmp_path)
    store.append(record("p0"))
    size = (tmp_path / "results.jsonl").stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    import signal

    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, before[1]))
    try:
        with pytest.raises(RunDirectoryError, match="Finished items are kept"):
            store.append(record("p1"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    store.append(record("p2"))
    store.close()
    assert [r.id for r in RunDirectory(tmp_path).records()] == ["p0", "p2"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_device_without_space_says_that_the_disk_is_full(tmp_path: Path) -> None:
    store = opened(tmp_path)
    assert store._file is not None
    os.dup2(os.open("/dev/full", os.O_WRONLY), store._file)
    with pytest.raises(RunDirectoryError, match="the disk is full"):
        store.append(record("p0"))
    store.close()


def test_a_directory_that_cannot_be_made_or_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirectoryError, match="could not be made"):
        opened(tmp_path / "file" / "out")
    with pytest.raises(RunDirectoryError, match="there is no directory"):
        _ = RunDirectory(tmp_path / "none").manifest
    with pytest.raises(RunDirectoryError, match="holds no evaluation"):
        _ = RunDirectory(tmp_path).manifest
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(RunDirectoryError, match="not the manifest"):
        opened(tmp_path)
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "results.jsonl").write_bytes(record().to_line())
    with pytest.raises(RunDirectoryError, match="results but no manifest"):
        opened(tmp_path)


def test_parts_of_other_processes_are_brought_together_once(tmp_path: Path) -> None:
    store = opened(tmp_path)
    for worker, ids in ((2, ("p3", "p1")), (1, ("p0",))):
        part = RunDirectory(tmp_path)
        part.start(worker)
        for id in ids:
            part.append(record(id, worker=worker))
        part.close()
    store.append(record("p2"))
    assert {r.id for r in RunDirectory(tmp_path).records()} == {"p0", "p1", "p2", "p3"}
    before = {p.name: p.read_bytes() for p in tmp_path.glob("results*")}
    store.finish(ORDER)
    store.close()
    assert [r.id for r in RunDirectory(tmp_path).records()] == ["p0", "p1", "p2", "p3"]
    assert not list(tmp_path.glob("*.part"))
    # Killed between the one file's renewal and the removal of the parts: nothing stands twice.
    for name, content in before.items():
        if name.endswith(".part"):
            (tmp_path / name).write_bytes(content)
    opened(tmp_path).close()
    assert sorted(r.id for r in RunDirectory(tmp_path).records()) == ["p0", "p1", "p2", "p3"]
    assert len((tmp_path / "results.jsonl").read_bytes().splitlines()) == 4


def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"one")
    (tmp_path / "file.new").mkdir()
    with pytest.raises(OSError, match=r"file\.new"):
        write_atomically(path, b"two")
    assert path.read_bytes() == b"one"


def test_strange_text_survives(tmp_path: Path) -> None:
    odd = "line\nbreak \u2028 \udc80 </script> \x00 ∑"
    store = RunDirectory(tmp_path)
    store.open(manifest(), [Problem("odd", odd, odd)], resume=False)
    store.start()
    store.append(record("odd", answer=odd))
    store.close()
    [found] = RunDirectory(tmp_path).records()
    assert found.answer == odd
    assert RunDirectory(tmp_path).problems()[0]["question"] == odd
