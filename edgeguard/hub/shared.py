"""Inputs that owners shared, replayed on the hub's own copy of the model: what they say of a suspicion.

A device sends no input to the hub. Its owner may take flagged inputs out of its quarantine, look at them, and share
those that are *not* of the suspected class: what a clean model flags by chance is mostly what it looks like.

Rules enforced here:

* an input confirms only where the hub's own copy of the model flags it and calls it the suspected label;
* each counts once: not again with the same bytes, nor where it is nearly the same as another one, as frames of a video;
* ``ENOUGH`` that count make a case of a suspicion, also of one that an inspection dismissed or could not check, unless
  another record of the model is open. The repair inspects by itself all the same;
* an input has the shape and type that the model takes; size and number are bounded before anything is stored;
* inputs lie in files named by their digest, in this hub's state folder alone; the database has what the replay said;
* the replay runs in a short-lived child.
"""

from __future__ import annotations

import hashlib
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np
import numpy.typing as npt
from sqlalchemy import select

from edgeguard.contract.guard import GuardMetadata
from edgeguard.errors import ConfigError, LinkError
from edgeguard.hub import bulk, cases
from edgeguard.hub.casebook import Casebook, Move, StaleError
from edgeguard.hub.cases import OPEN, Case, State
from edgeguard.hub.replay import Replayed
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
            ConfigError: there is no such record or copy, it takes none any more, or an input is not one of the model's.
            LinkError: the replay failed.
        """
        case = self._book.get(case_id)
        if case is None or case.state not in TAKEN_IN:
            got = "no such case" if case is None else f"a case that is {case.state}"
            raise ConfigError(f"inputs for case {case_id}", got=got, expected="one that is not repaired yet")
        copy = self._models().get(case.model_digest)
        if copy is None:
            raise ConfigError(f"inputs for case {case_id}", got="no copy of its model", do="name it under [[models]]")
        arrays = {hashlib.sha256(one).hexdigest(): _array(one, dtype, shape, copy.guard) for one in inputs}
        known = self._known(case_id)
        new = {digest: array for digest, array in arrays.items() if digest not in known}
        if len(known) + len(new) > MOST:
            raise ConfigError(f"inputs for case {case_id}", got=f"{len(known) + len(new)}", expected=f"at most {MOST}")
        if new:
            self._put(case, copy, new, known, who)
            known = self._known(case_id)
        return self._confirm(case, known, who, why), [known[digest] for digest in arrays]

    def of_case(self, case_id: int) -> list[Input]:
        """All that were shared for a record."""
        return list(self._known(case_id).values())

    def bundle(self, case_id: int, folder: Path) -> str | None:
        """Write those that count and lie here to an npz file, ``inputs`` ``[M, ...]``; None where there are none."""
        paths = [self._path(case_id, one.digest) for one in self._known(case_id).values() if one.counts]
        arrays = [np.load(path, allow_pickle=False) for path in paths if path.exists()]
        if not arrays:
            return None
        folder.mkdir(parents=True, exist_ok=True)
        np.savez(folder / "quarantined.npz", inputs=np.stack(arrays))
        return str(folder / "quarantined.npz")

    def _put(self, case: Case, copy: Copy, new: Mapping[str, Array], known: Mapping[str, Input], who: str) -> None:
        folder = self._folder / str(case.id)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as held:
            paths = [Path(held, f"{digest}.npy") for digest in new]
            for path, array in zip(paths, new.values(), strict=True):
                np.save(path, array, allow_pickle=False)
            said = self._replay(copy.guarded, paths)
            for path in paths:
                path.replace(self._path(case.id, path.stem))
        low, high = copy.guard.input.range
        near = NEAR * (high - low)
        counted = [self._path(case.id, one.digest) for one in known.values() if one.counts]
        others = [np.load(path, allow_pickle=False) for path in counted if path.exists()]
        rows: list[tuple[Any, ...]] = []
        for (digest, array), word in zip(new.items(), said, strict=True):
            counts = word.flagged and word.predicted == case.label and not any(_near(array, o, near) for o in others)
            if counts:
                others.append(array)
            key = (self._store.fleet, case.id, digest, self._clock_ms(), who)
            rows.append((*key, word.predicted, int(word.flagged), word.score, int(counts)))
        with self._store.write() as db:
            bulk.insert(db, table, tuple(column.name for column in table.c), rows, conflict="ignore")

    def _confirm(self, case: Case, known: Mapping[str, Input], who: str, why: str) -> Case:
        count = sum(one.counts for one in known.values())
        for _ in range(_TRIES):
            others = (o for o in self._book.all() if o.id != case.id and o.model_digest == case.model_digest)
            if count < ENOUGH or case.state not in CONFIRMED_IN or any(other.state in OPEN for other in others):
                return case
            text = (
                f"{count} inputs that {who} shared as not of this class are flagged by the hub's own copy of the model,"
                f" which calls them the suspected label" + (f": {why}" if why else "")
            )
            try:
                after = cases.confirmed(case, at_ms=self._clock_ms(), note=text, shared=count)
                return self._book.save(Move(case=after, text=text, who=who))
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
