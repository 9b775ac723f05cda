"""The trial of a new model: what it must show before it is confirmed, and what ends a loop of crashes after an update.

A released model may pass every check and still fail on real inputs, or crash the agent on one. Rules enforced here:

* it is confirmed once ``needed`` inferences were healthy: the model ran, and its guard gave scores that are numbers;
  where, of as many, more than a tenth were not, it has failed. Inputs that hold no numbers say nothing about a model;
* inferences are counted over the life of processes, so that a board that is switched off each evening gets there too;
* a start is on disk before the model meets its first input, so that a crash cannot take it back; where a running agent
  takes the model, that is its first start;
* a model that was started ``STARTS`` times, and neither confirmed nor healthy for a window, has failed: it is left, and
  not taken again;
* a healthy window takes the count back, and so does an agent that was told to stop: only what ended otherwise, and
  before the model had shown anything, counts against it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Meta

from edgeguard import disk
from edgeguard.detection.guarded import Inference
from edgeguard.detection.verdict import Verdict
from edgeguard.errors import ConfigError

STARTS = 3
"""Two power cuts before a model has shown anything may be chance."""
NEEDED = 64
"""Healthy inferences that confirm a model where the configuration says nothing."""
SICK_SHARE = 0.1
"""Of the inferences of a trial, more than this share without scores means that the model has failed."""


@dataclass(frozen=True, kw_only=True)
class Fared:
    """How a model fared in its trial: inferences that were healthy, and those that were not."""

    healthy: int = 0
    sick: int = 0

    def seen(self, *, healthy: int, sick: int) -> Fared:
        """So many more."""
        return Fared(healthy=self.healthy + healthy, sick=self.sick + sick)


def judge(fared: Fared, *, needed: int) -> Literal["confirm", "revert", "go on"]:
    """What becomes of a model on trial.

    Args:
        fared: how the model did since its trial began.
        needed: healthy inferences that confirm it.
    """
    total = fared.healthy + fared.sick
    if total >= needed and fared.sick > SICK_SHARE * total:
        return "revert"
    return "confirm" if fared.healthy >= needed else "go on"


def count(fared: Fared, inference: Inference | None, verdict: Verdict, x: npt.NDArray[Any]) -> Fared:
    """Count one input: what was scored is healthy; what could not be, though the input holds numbers, is not.

    An input that nobody tried to score, to save work, has no scores at all and is neither.
    """
    if inference is None:
        return fared.seen(healthy=0, sick=int(np.isfinite(x).all()))
    if verdict.status == "not checked":
        return fared.seen(healthy=0, sick=int(bool(verdict.scores)))
    return fared.seen(healthy=1, sick=0)


_Count = Annotated[int, Meta(ge=0, le=2**53)]


class _Record(msgspec.Struct, frozen=True, kw_only=True):
    file_digest: str
    starts: _Count = 0
    healthy: _Count = 0
    sick: _Count = 0


class Trial:
    """What is remembered of one model's trial, in a small file that the next one's replaces: starts and inferences.

    Args:
        path: the file; there is none until a model is on trial.
        starts: after so many it has failed.
    """

    def __init__(self, path: Path, *, starts: int = STARTS) -> None:
        self._path = path
        self._starts = starts

    def failed(self, file_digest: str) -> bool:
        """True once the model of this file was started too often without being confirmed."""
        return self._read(file_digest).starts >= self._starts

    def fared(self, file_digest: str) -> Fared:
        """How it did so far, over all its starts."""
        record = self._read(file_digest)
        return Fared(healthy=record.healthy, sick=record.sick)

    def first(self, file_digest: str) -> None:
        """A running agent is about to take the model: a trial begins anew. Raises ConfigError as :meth:`begin`."""
        self._write(_Record(file_digest=file_digest, starts=1))

    def begin(self, file_digest: str) -> None:
        """Count one more start. Raises ConfigError if that cannot be written."""
        record = self._read(file_digest)
        self._write(msgspec.structs.replace(record, starts=record.starts + 1))

    def seen(self, file_digest: str, fared: Fared, *, healthy: bool) -> None:
        """Remember how it did, and that a whole window was ``healthy``. Raises ConfigError as :meth:`begin`."""
        starts = 0 if healthy else self._read(file_digest).starts
        self._write(_Record(file_digest=file_digest, starts=starts, healthy=fared.healthy, sick=fared.sick))

    def end(self, file_digest: str) -> None:
        """The model is confirmed, or the agent stops as told. Raises ConfigError if that cannot be written."""
        record = self._read(file_digest)
        if record.starts:
            self._write(msgspec.structs.replace(record, starts=0))

    def _read(self, file_digest: str) -> _Record:
        try:
            record = msgspec.json.decode(self._path.read_bytes(), type=_Record)
        except (OSError, msgspec.DecodeError, RecursionError):
            return _Record(file_digest=file_digest)
        return record if record.file_digest == file_digest else _Record(file_digest=file_digest)

    def _write(self, record: _Record) -> None:
        try:
            disk.write(self._path, msgspec.json.encode(record))
        except OSError as error:
            raise ConfigError(
                f"count of starts {self._path}",
                got=error.strerror or str(error),
                expected="a file that can be written",
                do="check the disk's space and the folder's owner",
            ) from error
