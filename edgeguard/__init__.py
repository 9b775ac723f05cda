"""EdgeGuard: guards neural networks against backdoors where they run, and heals them where they are made.

The folders follow the loop: ``converters`` put a detector inside a model, ``detection`` reads it on the device,
``agent`` reports, ``hub`` decides, ``inspection`` and ``repair`` confirm and heal, ``release`` rolls out.

``edgeguard.Interpreter`` stands in for a TFLite runtime's Interpreter, ``load_delegate`` and ``OpResolverType`` for
what stands beside it there. They are imported when they are asked for: this module alone imports nothing, so that a
device pays only for what it uses.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgeguard.detection.interpreter import Interpreter, OpResolverType, load_delegate

__version__ = "0.1.0"
__all__ = ["Interpreter", "OpResolverType", "load_delegate"]


def __getattr__(name: str) -> object:
    if name in __all__:
        from edgeguard.detection import interpreter

        return getattr(interpreter, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
