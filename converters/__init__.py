"""Model files in, one verified, guarded, quantised TFLite file out.

    import converters
    done = converters.convert("model.keras", clean_inputs, labels)

The order of work, one module each: ``sources`` reads a model, ``lowering`` makes it float and int8 TFLite in a child
process with limits, ``quantise`` holds the two against each other, ``taps`` plans where the guard listens,
``calibration`` fits it, ``guard`` compiles it into the graph, ``verify`` proves that nothing else changed, and
``pipeline`` does all of it. ``flatbuffer`` and ``structure`` hold what they know of the file format.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from converters.pipeline import Conversion, convert


def __getattr__(name: str) -> object:
    # Children that check one file import this package too: they must not wait for all of it.
    if name in {"Conversion", "convert"}:
        from converters import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["Conversion", "convert"]
