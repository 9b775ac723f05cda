"""What every source of inputs is to the agent's loop.

Rules enforced here:

* ``take`` and ``answer`` never wait: what a source waits for is a file descriptor that the loop selects on;
* inputs are checked against the model by the source that brings them, so that a bad one is told to whoever sent it;
* what cannot be taken now is left with the sender (a full socket, a file in its folder) or is dropped and counted.
"""

from __future__ import annotations

import math
import selectors
from collections.abc import Iterable
from enum import Enum
from typing import Any, Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from edgeguard.contract import frames
from edgeguard.contract.guard import ModelInput
from edgeguard.detection import images
from edgeguard.errors import ModelError

_LITTLE = {name: np.dtype(name).newbyteorder("<") for name in ("uint8", "int8", "int16", "float32")}


MAX_PICTURE = 8 << 20


class Item(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """One piece of work. ``inputs`` ``[n, ...]``, n >= 1, of the model's shape and the owner's own type.

    ``name`` is what results call it: a file's name, a frame's id. ``sender`` means something to its source alone.
    """

    source: str
    name: str
    inputs: npt.NDArray[Any]
    sender: object = None


class Told(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """What a program's own interpreter scored; the agent only counts it. ``features`` float32 ``[D]``."""

    scored: frames.Scored
    features: npt.NDArray[np.float32]


class Answer(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """The outcome for one input of an item, on its way back: the frame and its body, see :class:`frames.Result`."""

    item: Item
    result: frames.Result
    body: bytes


class Refused(Enum):
    """Something was taken and was no input; there may be more."""

    NO_INPUT = "no input"


class Source(Protocol):
    """One source."""

    @property
    def name(self) -> str:
        """What it is called."""

    @property
    def ended(self) -> bool:
        """True once nothing can come any more."""

    @property
    def dropped(self) -> int:
        """Inputs that were lost because they came faster than the model runs, or could not be read."""

    def open(self, selector: selectors.BaseSelector) -> None:
        """Register the descriptors that tell when there is something to take."""

    def ready(self, key: selectors.SelectorKey, mask: int) -> None:
        """One of its descriptors is ready."""

    def take(self) -> Item | Told | Refused | None:
        """What is next, or None when nothing waits now. One thing at a time: what is refused has had its turn."""

    def answer(self, answer: Answer) -> None:
        """Give an outcome back to who sent the input, where somebody waits for it."""

    def counted(self, names: Iterable[str]) -> None:
        """These items are in a report that is on disk. Called from the reporter's thread.

        Raises:
            ConfigError: the source cannot let go of them.
        """

    def close(self) -> None:
        """Let go of everything."""


def most_bytes(expected: ModelInput) -> int:
    """How large one input of this model may be on its way in, as an array or as a picture."""
    size = _LITTLE[expected.dtype].itemsize * math.prod(expected.shape)
    return max(size, MAX_PICTURE)


def array_of(frame: frames.Input, body: bytes, expected: ModelInput) -> npt.NDArray[Any]:
    """The input ``[*shape]`` in a frame.

    Raises:
        ModelError: it is not what the model takes.
    """
    if frame.encoding == "image":
        return images.decode(body, expected)
    found, wanted = (frame.dtype, frame.shape), (expected.dtype, expected.shape)
    if found != wanted:
        raise ModelError(
            "input",
            got=f"{found[0]}{list(found[1])}",
            expected=f"{wanted[0]}{list(wanted[1])}",
            do="send what the model takes",
        )
    dtype = _LITTLE[expected.dtype]
    size = dtype.itemsize * math.prod(expected.shape)
    if len(body) != size:
        raise ModelError("input", got=f"{len(body)} bytes", expected=f"{size}, {expected.dtype}{list(expected.shape)}")
    return np.frombuffer(body, dtype).reshape(expected.shape)
