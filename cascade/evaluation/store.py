"""A run directory: what survives a kill at any moment.

    manifest.json    what was asked, of which model, with which versions
    problems.json    the questions, for reports
    results.jsonl    one line an item, written as it finishes; while several processes write,
                     each further one has a `results.N.part` of its own
    report.html, figures/    made of the above

A line is handed to the operating system in one piece. What a kill can leave is at most a last line
without its end, which is cut off when the directory is opened again.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from cascade.errors import RunDirectoryError
from cascade.evaluation.manifest import Manifest, read_manifest, write_atomically
from cascade.evaluation.records import Record
from cascade.problems import Problem

RESULTS, MANIFEST, PROBLEMS = "results.jsonl", "manifest.json", "problems.json"
SYNC_SECONDS = 5.0  # between two calls of fsync, which guards against a loss of power alone


class RunDirectory:
    """One evaluation on disk. `open` it, `append` records, `finish` and `close`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: int | None = None
        self._lock: int | None = None
        self._synced = 0.0

    # ---- reading ----

    @property
    def manifest(self) -> Manifest:
        """Raises RunDirectoryError where there is none."""
        if not self.path.is_dir():
            raise RunDirectoryError(f"there is no directory {self.path}")
        found = read_manifest(self.path / MANIFEST)
        if found is None:
            raise RunDirectoryError(f"{self.path} has no {MANIFEST}: it holds no evaluation")
        return found

    def records(self) -> list[Record]:
        """Every finished item, the first line of each. Raises RunDirectoryError for damage."""
        found: dict[tuple[str, str], Record] = {}
        for path in (self.path / RESULTS, *self._parts()):
            for record in _read(path):
                found.setdefault(record.key, record)
        return list(found.values())

    def problems(self) -> list[dict[str, Any]]:
        """The questions by `id`, `question`, `answer`, `kind`, `choices`, `facts`."""
        path = self.path / PROBLEMS
        try:
            found = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise RunDirectoryError(f"{path} could not be read: {error}") from error
        return list(found)

    # ---- writing ----

    def open(self, manifest: Manifest, problems: Iterable[Problem], *, resume: bool) -> Manifest:
        """Make the directory, or go on with what is in it; returns the manifest that holds.

        Raises RunDirectoryError for one that is in use, that holds another evaluation, or that
        holds this one although nobody said `resume`.
        """
        with self._disk("be made"):
            self.path.mkdir(parents=True, exist_ok=True)
        self._take_lock()
        try:
            return self._open(manifest, problems, resume)
        except BaseException:
            self.close()
            raise

    def _open(self, manifest: Manifest, problems: Iterable[Problem], resume: bool) -> Manifest:
        before = read_manifest(self.path / MANIFEST)
        if before is None and any(_read(self.path / RESULTS)):
            raise RunDirectoryError(
                f"{self.path} has results but no {MANIFEST}; they cannot be gone on with"
            )
        if before is not None:
            if not resume:
                raise RunDirectoryError(
                    f"{self.path} holds an evaluation with {len(self.records())} finished items: "
                    "go on with it by --resume (resume=True), or choose another directory"
                )
            if differences := before.differences(manifest):
                raise RunDirectoryError(
                    f"{self.path} holds an evaluation of another configuration, and results are "
                    f"not mixed: {'; '.join(differences)}"
                )
            manifest = before.model_copy(
                update={
                    "runs": {**before.runs, **manifest.runs},
                    "sessions": (*before.sessions, *manifest.sessions),
                }
            )
        with self._disk("be written"):
            questions = [problem.described for problem in problems]
            write_atomically(self.path / PROBLEMS, json.dumps(questions).encode() + b"\n")
            self.write_manifest(manifest)
            cut_torn_line(self.path / RESULTS)
            for part in self._parts():
                cut_torn_line(part)
        self._merge()
        return manifest

    def write_manifest(self, manifest: Manifest) -> None:
        with self._disk("be written"):
            text = manifest.model_dump_json(indent=2) + "\n"
            write_atomically(self.path / MANIFEST, text.encode())

    def start(self, worker: int = 0) -> None:
        """Open the file that `append` writes to; each process has its own."""
        path = self.path / (f"results.{worker}.part" if worker else RESULTS)
        with self._disk("be written"):
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def append(self, record: Record) -> None:
        """Write one line; it is there whatever happens next. Raises RunDirectoryError."""
        assert self._file is not None, "start() comes first"
        line = record.to_line()
        length = os.lseek(self._file, 0, os.SEEK_END)
        try:
            written = os.write(self._file, line)
            if written < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if time.monotonic() - self._synced > SYNC_SECONDS:
                os.fsync(self._file)
                self._synced = time.monotonic()
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, length)
            raise self._failed(error, "be written") from error

    def finish(self, order: Iterable[tuple[str, str]]) -> None:
        """Bring the lines of all processes into one file, in the order of (id, run) given."""
        self._merge()
        place = {key: i for i, key in enumerate(order)}
        records = self.records()
        ordered = sorted(records, key=lambda r: place.get(r.key, len(place)))
        if ordered != records:
            with self._disk("be written"):
                lines = b"".join(record.to_line() for record in ordered)
                write_atomically(self.path / RESULTS, lines)

    def close(self) -> None:
        for descriptor in (self._file, self._lock):
            if descriptor is not None:
                with contextlib.suppress(OSError):
                    os.fsync(descriptor)
                os.close(descriptor)
        self._file = self._lock = None

    # ---- inside ----

    def _parts(self) -> list[Path]:
        return sorted(self.path.glob("results.*.part"))

    def _merge(self) -> None:
        """Move what other processes wrote into the one file. A kill in between only repeats it."""
        parts = self._parts()
        if not parts:
            return
        with self._disk("be written"):
            lines = b"".join(record.to_line() for record in self.records())
            write_atomically(self.path / RESULTS, lines)
            for part in parts:
                part.unlink(missing_ok=True)

    def _take_lock(self) -> None:
        try:
            import fcntl
        except ImportError:  # Windows
            return
        with self._disk("be written"):
            self._lock = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            self._lock = None
            raise RunDirectoryError(
                f"{self.path} is in use by another evaluation; wait for it, or choose another"
            ) from None

    @contextlib.contextmanager
    def _disk(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self._failed(error, what) from error

    def _failed(self, error: OSError, what: str) -> RunDirectoryError:
        why = "the disk is full" if error.errno == errno.ENOSPC else error.strerror or str(error)
        return RunDirectoryError(
            f"{self.path} could not {what}: {why}. Finished items are kept; go on with --resume"
        )


def _read(path: Path) -> Iterator[Record]:
    """The records of whole lines; nothing where there is no file."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    return  # torn by a kill: this item was not finished
                try:
                    yield Record.from_line(line)
                except (ValueError, TypeError) as error:
                    raise RunDirectoryError(
                        f"{path}, line {number} is damaged ({error}); delete that line, and "
                        "--resume makes the item anew"
                    ) from error
    except FileNotFoundError:
        return
    except OSError as error:
        raise RunDirectoryError(f"{path} could not be read: {error}") from error


def cut_torn_line(path: Path) -> None:
    """Cut a file behind its last whole line."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        kept = size
        while kept:
            start = max(kept - 65536, 0)
            file.seek(start)
            newline = file.read(kept - start).rfind(b"\n")
            if newline >= 0:
                kept = start + newline + 1
                break
            kept = start
        if kept < size:
            file.truncate(kept)
