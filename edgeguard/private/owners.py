"""What the two owners bring to a private inspection, and what the model's owner takes from it. Pure.

Numbers are shared as 64-bit integers with :data:`FRACTION_BITS` bits behind the point. Behind its weights the model's
owner shares as many random integers as the inspection has results for it: the parties add one to each result before
they open it, so that what all three see is uniformly random, and who knows the pad reads it.

Rules enforced here:

* a pad is good for one inspection, whose digest its shares are bound to: what it is kept in says which plan, what was
  given and which weights it belongs to, and nothing is read with it that came of others;
* results that are no numbers a network can have are noise, and an error;
* a number beyond what the computation can hold is refused, and so are inputs beyond their range.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from edgeguard.contract.private import Inspection, Part
from edgeguard.errors import ModelError

FRACTION_BITS = 16
MAX_WEIGHT = 1024.0
MAX_RESULT = 2.0**20
"""A result beyond it is noise: one of 2^27 random numbers is not."""
Values = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


class Pad(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the model's owner keeps to read results with: :func:`pad_values` random integers, and what they belong to.

    ``inspection``: digest of the plan; ``given``: of the submission that the pad is in; ``weights``: see
    :func:`weights_digest`.
    """

    inspection: str
    given: str
    weights: str
    values: bytes

    def of(self, asked: Inspection, given: str) -> Values:
        """The integers, for a result of this inspection that was computed from ``given``.

        Raises:
            ModelError: the pad belongs to something else.
        """
        if self.inspection != asked.digest or len(self.values) != 8 * pad_values(asked):
            raise ModelError("pad", got="one of another plan", do=_OF_THIS)
        # The model owner's digest, and then the data owner's.
        if given.split(" ", maxsplit=1)[0] != self.given:
            raise ModelError("pad", got="one of other shares than the result's", do=_OF_THIS)
        return np.frombuffer(self.values, dtype="<i8").astype(np.int64)


_OF_THIS = "use the pad of this very result"


@dataclass(frozen=True, kw_only=True)
class Trigger:
    """A flagged label's trigger [D]: 0 to 1 how much of each value it replaces, and by what."""

    label: int
    mask: Floats
    pattern: Floats


def part(asked: Inspection, role: str) -> Part:
    """What an owner shares."""
    count = (asked.sought + asked.held_out) * asked.inputs
    if role == "model-owner":
        count = weight_values(asked) + trigger_values(asked) + last_values(asked)
    return Part(id=asked.id, parties=asked.parties, inspection=asked.digest, role=role, channels=count)  # type: ignore[arg-type]


def weight_values(asked: Inspection) -> int:
    """Numbers in all shared layers."""
    return sum(int(np.prod(shape)) for shape in asked.weights)


def trigger_values(asked: Inspection) -> int:
    """Numbers in the triggers of all labels."""
    return 2 * asked.classes * asked.inputs


def last_values(asked: Inspection) -> int:
    """Numbers in the last layer, which a mending changes."""
    return (asked.layers[-2] + 1) * asked.classes


def model_values(asked: Inspection, layers: Sequence[npt.NDArray[Any]], pad: Values) -> Values:
    """The model owner's part.

    Args:
        asked: the inspection.
        layers: kernels and biases, for inputs from 0 to 1.
        pad: uniformly random, :func:`pad_values` of them; kept to read results with.

    Raises:
        ModelError: other layers than the inspection's, or a weight that is too large.
    """
    return np.concatenate([_weights(asked, layers), pad])


def weights_digest(asked: Inspection, layers: Sequence[npt.NDArray[Any]]) -> str:
    """SHA-256 of the layers as they are shared: of two networks of one shape it says which. Raises as the former."""
    return hashlib.sha256(_weights(asked, layers).astype("<i8").tobytes()).hexdigest()


def pad_values(asked: Inspection) -> int:
    """How many random integers the model's owner needs."""
    return trigger_values(asked) + last_values(asked)


def data_values(asked: Inspection, inputs: npt.NDArray[Any]) -> Values:
    """The data owner's part: inputs [sought + held_out, D] from 0 to 1.

    Raises:
        ModelError: another number of them, of another size, or beyond their range.
    """
    expected = (asked.sought + asked.held_out, asked.inputs)
    if inputs.shape != expected:
        raise ModelError("inputs", got=inputs.shape, expected=expected)
    if not (np.all(inputs >= 0) and np.all(inputs <= 1)):
        raise ModelError("inputs", got=f"{inputs.min():g} to {inputs.max():g}", expected="0 to 1")
    return _fixed(np.ravel(inputs).astype(np.float64))


def triggers(asked: Inspection, padded: Values, pad: Values, labels: Sequence[int]) -> list[Trigger]:
    """The triggers of the flagged labels, from what the parties opened. Raises ModelError where they are noise."""
    count = trigger_values(asked)
    a, b = _plain(padded, pad[:count]).reshape(2, asked.classes, asked.inputs)
    mask = a + b
    pattern = np.divide(a, mask, out=np.zeros_like(a), where=mask > 0)
    return [Trigger(label=k, mask=np.clip(mask[k], 0, 1), pattern=np.clip(pattern[k], 0, 1)) for k in labels]


def last_layer(asked: Inspection, padded: Values, pad: Values) -> tuple[Floats, Floats]:
    """The mended last layer's kernel and bias, from what the parties opened. Raises ModelError where they are noise."""
    flat = _plain(padded, pad[trigger_values(asked) :])
    kernel = flat[: -asked.classes].reshape(asked.layers[-2], asked.classes)
    return kernel, flat[-asked.classes :]


def _weights(asked: Inspection, layers: Sequence[npt.NDArray[Any]]) -> Values:
    shapes = tuple(layer.shape for layer in layers)
    if shapes != asked.weights:
        raise ModelError("layers", got=shapes, expected=asked.weights)
    flat = np.concatenate([np.ravel(layer) for layer in layers]).astype(np.float64)
    if not np.all(np.abs(flat) <= MAX_WEIGHT):
        raise ModelError("weights", got="one that is no number, or too large", expected=f"within {MAX_WEIGHT:g}")
    return _fixed(flat)


def _fixed(values: Floats) -> Values:
    return np.round(values * 2.0**FRACTION_BITS).astype(np.int64)


def _plain(padded: Values, pad: Values) -> Floats:
    with np.errstate(over="ignore"):
        plain = np.asarray((padded - pad) / 2.0**FRACTION_BITS, dtype=np.float64)
    if not np.all(np.abs(plain) <= MAX_RESULT):
        raise ModelError("result", got="noise", do=_OF_THIS)
    return plain
