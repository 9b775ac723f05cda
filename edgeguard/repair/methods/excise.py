"""Cuts out an inserted module: a small network beside the model that reads the input by itself and speaks at the end.

Tang, Du, Liu, Yang, Hu: An Embarrassingly Simple Approach for Trojan Attack in Deep Neural Networks, KDD 2020. Such a
module shares no weights with its host and is merged with it behind its answers. It is taken out of the graph; the host
answers as it did before it was tampered with. An ensemble would lose clean answers by that, and is left alone.
"""

from __future__ import annotations

from typing import Any, ClassVar

from edgeguard.repair.methods.base import Bench, Knowledge

MAX_SHARE = 0.2
"""A branch of more than this share of all weights is a part of the model, not a module that somebody added."""


class Excision:
    """Cut every small branch that the clean answers do not need."""

    name: ClassVar[str] = "excise"
    paper: ClassVar[str] = "against Tang et al., KDD 2020"
    cost: ClassVar[int] = 0
    trains: ClassVar[bool] = False

    def missing(self, known: Knowledge) -> str:
        """See :class:`Method`."""
        return ""

    def apply(self, target: Any, known: Knowledge, bench: Bench) -> tuple[str, ...]:
        """See :class:`Method`."""
        whole = sum(target.kernel(layer).size for layer in target.layers())
        done: list[str] = []
        for branch in target.branches():
            if branch.weights > MAX_SHARE * whole:
                continue
            changed = target.copy()
            changed.cut(branch)
            if bench.keeps(changed):
                target.cut(branch)
                done.append(f"module {branch.name} of {branch.weights} numbers cut off {branch.layer}")
        return tuple(done)
