"""Methods of repair, one file each, behind one interface: :class:`edgeguard.repair.methods.base.Method`."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from edgeguard.repair.methods.anp import NeuronPruning
from edgeguard.repair.methods.base import Method
from edgeguard.repair.methods.clp import LipschitzPruning
from edgeguard.repair.methods.excise import Excision
from edgeguard.repair.methods.extreme import ExtremeWeights
from edgeguard.repair.methods.federated import MajorityVote, RankAggregation
from edgeguard.repair.methods.fine_pruning import FinePruning
from edgeguard.repair.methods.linf import LinfPruning
from edgeguard.repair.methods.unlearning import Unlearning

METHODS: Mapping[str, Method] = MappingProxyType(
    {
        method.name: method
        for method in (
            Excision(),
            LipschitzPruning(),
            LinfPruning(),
            RankAggregation(),
            MajorityVote(),
            ExtremeWeights(),
            Unlearning(),
            FinePruning(),
            NeuronPruning(),
        )
    }
)
"""By name, in the order of their cost. No framework is loaded before a method that trains is applied."""

__all__ = ["METHODS"]
