"""Inputs that owners shared, replayed on the hub's own copy of the model: what they say of a suspicion.

A device sends no input to the hub. Its owner may take flagged inputs out of its quarantine, look at them, and share
those that are *not* of the suspected class: what a clean model flags by chance is mostly what it looks like.

Rules enforced here:

* an input confirms only where the hub's own copy of the model flags it and calls it the suspected label;
* each counts once: not again with the same bytes, nor where it is nearly the same as another one, as frames of a video.
  Where those that count lie at another hub, or were lost, no more are taken until they were shared here again;
* ``ENOUGH`` that count make a case of a suspicion, also of one that an inspection dismissed or could not check, unless
  another record of the model is open, or has replaced it. Those shared while it is inspected, or while another record
  is open, count after that. The repair inspects by itself all the same;
* an input has the shape and type that the model takes; size and number are bounded before anything is stored;
* inputs lie in files named by their digest, in this hub's state folder alone; the database has what the replay said.
  A file is on the disk before its row is written, and one that is not what its name says counts as not there;
* of a private model none are taken;
* the replay runs in a short-lived child.
"""

from __future__ import annotations

import hashlib
import io
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np
import numpy.typing as npt
from sqlalchemy import func, select

from edgeguard.contract.guard import GuardMetadata
from edgeguard.errors import ConfigError, LinkError
from edgeguard.hub import bulk, cases
from edgeguard.hub.casebook import HUB, Casebook, Move, StaleError
from edgeguard.hub.cases import OPEN, Case, State
from edgeguard.hub.replay import Replayed
from edgeguard.hub.setup import files
from edgeguard.hub.store import Store
from edgeguard.hub.tables import shared as table

ENOUGH = 10
MOST = 256
"""Inputs of one case."""
MAX_BYTES = 4 << 20
"""Of one input."""
AT_ONCE = 64
NEAR = 0.02
"""Inputs whose mean difference is less than this share of the value range count as one."""
TIMEOUT_S = 60.0
TAKEN_IN: tuple[State, ...] = ("suspected", "inspecting", "confirmed", "dismissed", "could_not_check")
CONFIRMED_IN: tuple[State, ...] = ("suspected", "dismissed", "could_not_check")
_TRIES = 5

Array = npt.NDArray[Any]


class Copy(Protocol):
    """The hub's own copy of a model."""

    @property
    def guarded(self) -> Path:
        """Its file."""

    @property
    def guard(self) -> GuardMetadata:
        """What that says of itself."""


@dataclass(frozen=True, kw_only=True)
class Input:
    """One shared input and what the replay said. ``counts``: it confirms, and none that counts is nearly the same."""

    digest: str
    predicted: int | None
    flagged: bool
    score: float | None
    counts: bool


Replay = Callable[[Path, Sequence[Path]], Sequence[Replayed]]


def replay(model: Path, inputs: Sequence[Path]) -> list[Replayed]:
    """What the model says of each input.

    Raises:
        LinkError: the child failed, or took too long.
    """
    command = [sys.executable, "-m", "edgeguard.hub.replay", str(model), *map(str, inputs)]
    try:
        done = subprocess.run(command, capture_output=True, timeout=TIMEOUT_S, check=True)
        return msgspec.json.decode(done.stdout, type=list[Replayed])
    except subprocess.CalledProcessError as error:
        got = error.stderr.decode(errors="replace").strip().rpartition("\n")[2][:300]
        raise LinkError("replay of shared inputs", got=got or f"exit status {error.returncode}") from error
    except (subprocess.TimeoutExpired, msgspec.DecodeError) as error:
        raise LinkError("replay of shared inputs", got=error, do="try again later") from error


class Shared:
    """The shared inputs of one fleet. Every method may be called from any thread.

    Args:
        store: the database.
        book: the records.
        folder: where the files are.
        models: the hub's own copies, by model digest.
        clock_ms: the hub's clock.
        replay: asks a copy.
    """

    def __init__(
        self,
        store: Store,
        book: Casebook,
        *,
        folder: Path,
        models: Callable[[], Mapping[str, Copy]],
        clock_ms: Callable[[], int],
        replay: Replay = replay,
    ) -> None:
        self._store = store
        self._book = book
        self._folder = folder
        self._models = models
        self._clock_ms = clock_ms
        self._replay = replay

    def add(
        self, case_id: int, inputs: Sequence[bytes], *, dtype: str, shape: Sequence[int], who: str, why: str = ""
    ) -> tuple[Case, list[Input]]:
        """Replay inputs and store them with what was said; those that are known already change nothing.

        Args:
            case_id: the record.
            inputs: each as the bytes of an array, the last axis fastest, little-endian.
            dtype: its type.
            shape: its shape.
            who: shares them, and with that says that they are not of the suspected class.
            why: for the audit trail.

        Returns:
            The record as it is now, and the inputs in their order.

        Raises:
            ConfigError: there is no such record or copy, it takes none any more, an input is not one of the model's, or
                those that count are not here.
            LinkError: the replay failed.
        """
        case = self._book.get(case_id)
        if case is None or case.state not in TAKEN_IN:
            got = "no such case" if case is None else f"a case that is {case.state}"
            raise ConfigError(f"inputs for case {case_id}", got=got, expected="one that is not repaired yet")
        if case.private:
            raise ConfigError(f"inputs for case {case_id}", got="a private model", do="bring what three parties found")
        copy = self._models().get(case.model_digest)
        if copy is None:
            raise ConfigError(f"inputs for case {case_id}", got="no copy of its model", do="name it under [[models]]")
        arrays = {hashlib.sha256(one).hexdigest(): _array(one, dtype, shape, copy.guard) for one in inputs}
        known = self._known(case_id)
        new = {digest: array for digest, array in arrays.items() if digest not in known}
        if len(known) + len(new) > MOST:
            raise ConfigError(f"inputs for case {case_id}", got=f"{len(known) + len(new)}", expected=f"at most {MOST}")
        for digest in arrays.keys() - new.keys():
            if self._read(case_id, digest) is None:
                self._write(case_id, digest, arrays[digest])
        if new:
            self._put(case, copy, new, known, who)
            known = self._known(case_id)
        return self._confirm(case, known, who, why), [known[digest] for digest in arrays]

    def of_case(self, case_id: int) -> list[Input]:
        """All that were shared for a record."""
        return list(self._known(case_id).values())

    def bundle(self, case_id: int, folder: Path) -> str | None:
        """Write those that count and lie here to an npz file, ``inputs`` ``[M, ...]``; None where there are none."""
        counted = (self._read(case_id, one.digest) for one in self._known(case_id).values() if one.counts)
        arrays = [array for array in counted if array is not None]
        if not arrays:
            return None
        folder.mkdir(parents=True, exist_ok=True)
        np.savez(folder / "quarantined.npz", inputs=np.stack(arrays))
        return str(folder / "quarantined.npz")

    def reconsider(self, records: Sequence[Case]) -> None:
        """Make cases of suspicions for which enough was shared while they could not become one.

        Args:
            records: all that there are.
        """
        waiting = [case for case in records if case.state in CONFIRMED_IN and not case.is_case]
        waiting = [case for case in waiting if not _taken(case, records)]
        if not waiting:
            return
        counts = (table.c.fleet == self._store.fleet, table.c.counts == 1)
        with self._store.read() as db:
            enough = select(table.c.case_id).where(*counts).group_by(table.c.case_id).having(func.count() >= ENOUGH)
            found = set(db.scalars(enough))
        for case in waiting:
            if case.id in found:
                self._confirm(case, self._known(case.id), None, "")

    def _put(self, case: Case, copy: Copy, new: Mapping[str, Array], known: Mapping[str, Input], who: str) -> None:
        others: list[Array] = []
        for one in known.values():
            array = self._read(case.id, one.digest) if one.counts else None
            if array is not None:
                others.append(array)
            elif one.counts:
                raise ConfigError(
                    f"inputs for case {case.id}",
                    got="some that count and are not at this hub",
                    expected="all of them here, so that none counts twice",
                    do="share those at this hub again, before the new ones",
                )
        folder = self._folder / str(case.id)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as held:
            paths = [Path(held, f"{digest}.npy") for digest in new]
            for path, array in zip(paths, new.values(), strict=True):
                np.save(path, array, allow_pickle=False)
            said = self._replay(copy.guarded, paths)
        for digest, array in new.items():
            self._write(case.id, digest, array)
        low, high = copy.guard.input.range
        near = NEAR * (high - low)
        rows: list[tuple[Any, ...]] = []
        for (digest, array), word in zip(new.items(), said, strict=True):
            counts = word.flagged and word.predicted == case.label and not any(_near(array, o, near) for o in others)
            if counts:
                others.append(array)
            key = (self._store.fleet, case.id, digest, self._clock_ms(), who)
            rows.append((*key, word.predicted, int(word.flagged), word.score, int(counts)))
        with self._store.write() as db:
            bulk.insert(db, table, tuple(column.name for column in table.c), rows, conflict="ignore")

    def _confirm(self, case: Case, known: Mapping[str, Input], who: str | None, why: str) -> Case:
        count = sum(one.counts for one in known.values())
        for _ in range(_TRIES):
            if count < ENOUGH or case.state not in CONFIRMED_IN or _taken(case, self._book.all()):
                return case
            text = (
                f"{count} inputs that {who or 'owners'} shared as not of this class are flagged by the hub's own copy"
                f" of the model, which calls them the suspected label" + (f": {why}" if why else "")
            )
            try:
                after = cases.confirmed(case, at_ms=self._clock_ms(), note=text, shared=count)
                return self._book.save(Move(case=after, text=text, who=who or HUB))
            except StaleError:
                case = self._book.get(case.id) or case
        return case

    def _known(self, case_id: int) -> dict[str, Input]:
        chosen = select(table).where(table.c.fleet == self._store.fleet, table.c.case_id == case_id)
        with self._store.read() as db:
            return {
                row.digest: Input(
                    digest=row.digest,
                    predicted=row.predicted,
                    flagged=bool(row.flagged),
                    score=row.score,
                    counts=bool(row.counts),
                )
                for row in db.execute(chosen.order_by(table.c.at_ms, table.c.digest))
            }

    def _path(self, case_id: int, digest: str) -> Path:
        return self._folder / str(case_id) / f"{digest}.npy"

    def _write(self, case_id: int, digest: str, array: Array) -> None:
        content = io.BytesIO()
        np.save(content, array, allow_pickle=False)
        path = self._path(case_id, digest)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        files.write(path, content.getvalue(), mode=files.SECRET)

    def _read(self, case_id: int, digest: str) -> Array | None:
        """The input; None where its file is not here, or is not what was written."""
        with suppress(OSError, ValueError, EOFError):
            array: Array = np.load(self._path(case_id, digest), allow_pickle=False)
            return array if hashlib.sha256(array.tobytes()).hexdigest() == digest else None
        return None


def _taken(case: Case, records: Iterable[Case]) -> bool:
    """Whether another record of its model is open, or has replaced it."""
    others = (other for other in records if other.id != case.id and other.model_digest == case.model_digest)
    return any(other.state in OPEN or other.state == "closed" for other in others)


def _array(content: bytes, dtype: str, shape: Sequence[int], guard: GuardMetadata) -> Array:
    """The input in these bytes. Raises ConfigError unless it is one that the model takes."""
    takes = guard.input
    got = f"{dtype}{list(shape)}"
    if (dtype, tuple(shape)) != (takes.dtype, takes.shape):
        raise ConfigError("shared input", got=got, expected=f"{takes.dtype}{list(takes.shape)}, as the model takes")
    kind = np.dtype(dtype).newbyteorder("<")
    size = math.prod(shape) * kind.itemsize
    if len(content) != size or size > MAX_BYTES:
        raise ConfigError("shared input", got=f"{len(content)} bytes", expected=f"{size}, and at most {MAX_BYTES}")
    array = np.frombuffer(content, kind).reshape(tuple(shape))
    if not np.isfinite(array).all():
        raise ConfigError("shared input", got="NaN or infinite values", expected="numbers")
    return array


def _near(one: Array, other: Array, reach: float) -> bool:
    return float(np.abs(one.astype(np.float64) - other.astype(np.float64)).mean()) < reach
