"""The one place that chooses a TFLite runtime: ai-edge-litert, else tflite-runtime, else TensorFlow's.

``EDGEGUARD_RUNTIME`` (``litert``, ``tflite-runtime`` or ``tensorflow``) forces one.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import os
from dataclasses import dataclass
from typing import Any

from edgeguard.errors import ConfigError, ModelError

ENVIRONMENT = "EDGEGUARD_RUNTIME"


@dataclass(frozen=True)
class _Candidate:
    name: str
    package: str
    distribution: str
    module: str
    attribute: str


_CANDIDATES = (
    _Candidate("litert", "ai_edge_litert", "ai-edge-litert", "ai_edge_litert.interpreter", "Interpreter"),
    _Candidate("tflite-runtime", "tflite_runtime", "tflite-runtime", "tflite_runtime.interpreter", "Interpreter"),
    _Candidate("tensorflow", "tensorflow", "tensorflow", "tensorflow", "lite.Interpreter"),
)


@dataclass(frozen=True)
class RuntimeInfo:
    """A runtime's name and version, and the threads it was given."""

    name: str
    version: str
    threads: int


def known() -> tuple[str, ...]:
    """Names of all runtimes that can be chosen, the preferred one first."""
    return tuple(c.name for c in _CANDIDATES)


def available() -> tuple[str, ...]:
    """Names of the runtimes installed here, the preferred one first. Nothing is imported."""
    return tuple(c.name for c in _CANDIDATES if importlib.util.find_spec(c.package) is not None)


def choose(name: str | None = None) -> str:
    """The runtime to use: ``name``, else what ``EDGEGUARD_RUNTIME`` says, else the first one installed.

    Raises:
        ConfigError: it is unknown or not installed, or none is.
    """
    wanted = name or os.environ.get(ENVIRONMENT)
    installed = available()
    if wanted:
        if wanted not in installed:
            raise ConfigError(
                f"TFLite runtime {wanted!r}",
                got="unknown" if wanted not in {c.name for c in _CANDIDATES} else "not installed",
                expected=f"one of those installed: {', '.join(installed) or 'none'}",
                do=f"install it, or change {ENVIRONMENT}",
            )
        return wanted
    if not installed:
        raise ConfigError("TFLite runtime", got="none installed", do="install one: pip install 'edgeguard[device]'")
    return installed[0]


def interpreter_class(name: str | None = None) -> Any:
    """The Interpreter class of a runtime. Raises ConfigError, see :func:`choose`."""
    return _load(name)[0]


def _load(name: str | None) -> tuple[Any, _Candidate]:
    chosen = next(c for c in _CANDIDATES if c.name == choose(name))
    found: Any = importlib.import_module(chosen.module)
    for attribute in chosen.attribute.split("."):
        found = getattr(found, attribute)
    return found, chosen


def open_interpreter(content: bytes, *, threads: int = 1, name: str | None = None) -> tuple[Any, RuntimeInfo]:
    """An interpreter with its tensors allocated.

    Raises:
        ConfigError: see :func:`choose`.
        ModelError: the runtime does not accept the file.
    """
    loaded, chosen = _load(name)
    try:
        interpreter = loaded(model_content=content, num_threads=threads)
        interpreter.allocate_tensors()
    except (ValueError, RuntimeError) as error:
        raise ModelError(
            "model file", got=f"refused by {chosen.name}: {str(error)[:200]}", do="convert the model again"
        ) from error
    return interpreter, RuntimeInfo(chosen.name, _version(chosen.distribution), threads)


@functools.cache
def _version(distribution: str) -> str:
    """Looked up once: it reads files, which an agent that swaps models need not do again."""
    return importlib.metadata.version(distribution)
