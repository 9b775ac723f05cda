"""The attacks by name. A module is loaded when its attack is asked for, so that naming one costs nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Final

from edgeguard.attacks.base import Attack
from edgeguard.errors import ConfigError

_CLASSES: Final[Mapping[str, str]] = {
    "badnets": "edgeguard.attacks.badnets.BadNets",
    "blended": "edgeguard.attacks.blended.Blended",
    "sig": "edgeguard.attacks.sig.Sig",
    "wanet": "edgeguard.attacks.wanet.WaNet",
    "refool": "edgeguard.attacks.refool.Refool",
    "robnet": "edgeguard.attacks.robnet.RobNet",
    "trojannet": "edgeguard.attacks.trojannet.TrojanNet",
    "hidden_trigger": "edgeguard.attacks.hidden_trigger.HiddenTrigger",
    "input_aware": "edgeguard.attacks.input_aware.InputAware",
    "pruning_aware": "edgeguard.attacks.pruning_aware.PruningAware",
    "quantisation": "edgeguard.attacks.quantisation.Quantisation",
    "adaptive": "edgeguard.attacks.adaptive.Adaptive",
    "dba": "edgeguard.attacks.dba.Dba",
}


class _Lazy(Mapping[str, type[Attack]]):
    def __getitem__(self, name: str) -> type[Attack]:
        module, _, attribute = _CLASSES[name].rpartition(".")
        return getattr(import_module(module), attribute)

    def __contains__(self, name: object) -> bool:
        return name in _CLASSES

    def __iter__(self) -> Iterator[str]:
        return iter(_CLASSES)

    def __len__(self) -> int:
        return len(_CLASSES)


ATTACKS: Final[Mapping[str, type[Attack]]] = _Lazy()
"""Every attack of the red team, data poisoning first."""


def find(name: str) -> type[Attack]:
    """The attack of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in ATTACKS:
        raise ConfigError(f"attack {name!r}", got="no such attack", expected=" or ".join(ATTACKS))
    return ATTACKS[name]
