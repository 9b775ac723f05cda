"""EdgeGuard: guards neural networks against backdoors where they run, and heals them where they are made.

The folders follow the loop: ``converters`` put a detector inside a model, ``detection`` reads it on the device,
``agent`` reports, ``hub`` decides, ``inspection`` and ``repair`` confirm and heal, ``release`` rolls out.
This module imports nothing, so that a device pays only for what it uses.
"""

__version__ = "0.1.0"
