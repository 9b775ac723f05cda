"""The clean, labelled data of a model's owner, in two parts: a third repairs, the rest calibrates and gates.

Rules enforced here:

* the parts share no input, and none of one group, such as the frames of one video;
* each is in random order, so that its first inputs are of every class;
* a part that is too small for what it is there for is refused, whatever the groups make of a third;
* labels that the untouched model mostly gets wrong are not its own: nothing could be told from them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgeguard import data as datasets
from edgeguard.detection.statistics import inputs_needed
from edgeguard.errors import ModelError
from edgeguard.inspection.audit import MIN_INPUTS
from edgeguard.repair.gate import MAX_ERRORS

REPAIR_SHARE = 1 / 3
_CHECKED = 500

Images = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Images [N, H, W, C] with labels [N], to repair with and to gate with. ``groups`` [N] are of the latter."""

    x_repair: Images
    y_repair: Ints
    x_gate: Images
    y_gate: Ints
    groups: Ints | None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one input."""
        return tuple(self.x_gate.shape[1:])

    def check(self, source: str, shape: Sequence[int], answers: Callable[[Images], Ints], *, classes: int) -> None:
        """Raise ModelError where inputs or labels are not those of the model.

        Args:
            source: what the error calls the data.
            shape: of one input of the model.
            answers: the model's classes [N] of images [N, H, W, C].
            classes: how many the model has.
        """
        if self.shape != tuple(shape):
            raise ModelError(f"clean data {source}", got=f"{list(self.shape)}", expected=f"{list(shape)}")
        highest = int(max(self.y_repair.max(), self.y_gate.max()))
        if highest >= classes:
            raise ModelError(
                f"clean data {source}", got=f"label {highest}", expected=f"0 to {classes - 1}, the model's classes"
            )
        right = float(np.mean(answers(self.x_gate[:_CHECKED]) == self.y_gate[:_CHECKED]))
        if right < 1.0 - MAX_ERRORS:
            raise ModelError(
                f"clean data {source}",
                got=f"labels of which the model gives {right:.0%}",
                expected=f"at least {1.0 - MAX_ERRORS:.0%}",
                do="check the labels: 0 is the model's first class, and folders of classes count in the order of their "
                "names as text",
            )


def parts_of(source: str, *, fpr: float, seed: int) -> Parts:
    """Divide a source's training side.

    Args:
        source: as ``data.load`` takes it.
        fpr: the false-positive rate that the gate's part must be enough to calibrate for.
        seed: of the division.

    Raises:
        ConfigError: there is no such data.
        ModelError: it is no images, or a part of it is too small.
    """
    clean = datasets.pool(source, "train")
    if not clean.is_image:
        got = f"{clean.x_train.dtype}{list(clean.shape)}"
        raise ModelError(f"clean data {source}", got=got, expected="uint8 images [N, H, W, C]")
    count = len(clean.x_train)
    groups = datasets.groups(source, count)
    together = np.arange(count) if groups is None else groups
    rng = np.random.default_rng(seed)
    names = rng.permutation(np.unique(together))
    repairing = np.isin(together, names[: round(len(names) * REPAIR_SHARE)])
    order = rng.permutation(count)
    repair, rest = order[repairing[order]], order[~repairing[order]]
    needed = 2 * inputs_needed(fpr)
    if len(repair) < MIN_INPUTS or len(rest) < needed:
        raise ModelError(
            f"clean data {source}",
            got=f"{count} inputs{'' if groups is None else f' in {len(names)} groups'}, of which {len(repair)} would "
            f"repair and {len(rest)} calibrate",
            expected=f"at least {MIN_INPUTS} and {needed}: about a third repairs, the rest calibrates",
            do="bring more clean inputs" if groups is None else "bring more inputs, or smaller groups",
        )
    x, y = clean.x_train.astype(np.uint8), clean.y_train
    return Parts(
        x_repair=x[repair],
        y_repair=y[repair],
        x_gate=x[rest],
        y_gate=y[rest],
        groups=None if groups is None else groups[rest],
    )
