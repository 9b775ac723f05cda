"""The clean, labelled data of a model's owner, in two parts: a third repairs, the rest calibrates and gates.

Rules enforced here:

* the parts share no input, and none of one group, such as the frames of one video;
* each is in random order, so that its first inputs are of every class;
* a part that is too small for what it is there for is refused, whatever the groups make of a third.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgeguard import data as datasets
from edgeguard.detection.statistics import inputs_needed
from edgeguard.errors import ModelError
from edgeguard.inspection.audit import MIN_INPUTS

REPAIR_SHARE = 1 / 3

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
