"""TFLite flatbuffers as objects: checked parsing, packing with aligned buffers, and a fingerprint of the content.

Uses the schema classes that ship with ai-edge-litert (pure Python) and the ``flatbuffers`` package.

Rules enforced here:

* a file is checked before it is used: identifier, one subgraph, every tensor, buffer, operator code and signature index
  in range;
* constant data starts at a multiple of 16 bytes, as the schema demands: microcontrollers fault on less;
* a fingerprint is taken over the content, not the bytes, so that it does not depend on who packed the file.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Sequence
from typing import Any

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema

from edgeguard.detection.metadata import IDENTIFIER
from edgeguard.errors import ModelError

Model = Any
"""``schema.ModelT``: the object form of a file."""

_OPTIONAL = -1


class _AlignedBuilder(flatbuffers.Builder):  # type: ignore[misc]
    """Places byte vectors, which hold constants, at multiples of 16."""

    def CreateNumpyVector(self, x: Any) -> int:  # noqa: N802 - overrides the library's name
        if x.dtype != np.uint8:
            return int(super().CreateNumpyVector(x))
        self.StartVector(1, x.size, 16)
        self.head = self.Head() - x.size
        self.Bytes[self.Head() : self.Head() + x.size] = x.tobytes()
        return int(self.EndVector())


def parse(content: bytes) -> Model:
    """Unpack and check a ``.tflite`` file.

    Raises:
        ModelError: not a TFLite file, damaged, or with other than one subgraph.
    """
    if len(content) < 8 or content[4:8] != IDENTIFIER:
        raise ModelError(
            "model file",
            got=f"{len(content)} bytes that do not start as a TFLite file",
            expected="a .tflite file (identifier TFL3 at byte 4)",
        )
    try:
        model = schema.ModelT.InitFromPackedBuf(content, 0)
        _check(model)
    except (
        struct.error,
        IndexError,
        ValueError,
        TypeError,
        AttributeError,
        OverflowError,
        MemoryError,
    ) as error:
        raise ModelError(
            "model file", got=f"a damaged flatbuffer ({str(error)[:200]})", do="export it again"
        ) from error
    return model


def _check(model: Model) -> None:
    if not model.subgraphs or len(model.subgraphs) != 1:
        raise ValueError(f"{len(model.subgraphs or [])} subgraphs where one is expected")
    graph = model.subgraphs[0]
    tensors, buffers, codes = (
        len(graph.tensors or []),
        len(model.buffers or []),
        len(model.operatorCodes or []),
    )
    _in_range("output", _list(graph.outputs), tensors)
    _in_range("input", _list(graph.inputs), tensors)
    for tensor in graph.tensors or []:
        _in_range("tensor buffer", [tensor.buffer], buffers)
    for operator in graph.operators or []:
        _in_range("operator code", [operator.opcodeIndex], codes)
        _in_range("operator input", [i for i in _list(operator.inputs) if i != _OPTIONAL], tensors)
        _in_range("operator output", _list(operator.outputs), tensors)
    for entry in model.metadata or []:
        _in_range("metadata buffer", [entry.buffer], buffers)
    for signature in model.signatureDefs or []:
        for entry in [*(signature.inputs or []), *(signature.outputs or [])]:
            _in_range("signature tensor", [entry.tensorIndex], tensors)


def _list(values: Iterable[int] | None) -> list[int]:
    return [] if values is None else [int(v) for v in values]


def _in_range(what: str, indices: Sequence[int], count: int) -> None:
    for index in indices:
        if not 0 <= index < count:
            raise ValueError(f"{what} {index} of {count}")


def pack(model: Model) -> bytes:
    """The file that holds ``model``."""
    builder = _AlignedBuilder(1 << 16)
    builder.Finish(model.Pack(builder), file_identifier=IDENTIFIER)
    return bytes(builder.Output())


def text(name: bytes | str | None) -> str:
    """A flatbuffer string as str."""
    return name.decode("utf-8", "replace") if isinstance(name, bytes) else name or ""


def builtin_code(model: Model, operator: Any) -> int:
    """The BuiltinOperator of an operator, also in files from before the code outgrew a byte."""
    code = model.operatorCodes[operator.opcodeIndex]
    return max(int(code.builtinCode), int(code.deprecatedBuiltinCode))


def constant(model: Model, tensor: Any) -> bytes:
    """The bytes of a constant tensor; empty for an activation."""
    data = model.buffers[tensor.buffer].data
    return b"" if data is None else bytes(np.asarray(data, dtype=np.uint8))


def fingerprint(*parts: object) -> str:
    """SHA-256 over the content of flatbuffer objects and plain values.

    Fields that hold their default (None, 0, False, empty) are left out, so that a later schema with more fields gives
    the same fingerprint to the same model.
    """
    digest = hashlib.sha256()
    for part in parts:
        _feed(digest, part)
    return digest.hexdigest()


def _feed(digest: hashlib._Hash, value: object) -> None:
    if isinstance(value, np.ndarray):
        canonical = np.ascontiguousarray(value)
        digest.update(f"a{canonical.dtype.str}{canonical.shape}".encode())
        digest.update(canonical.tobytes())
    elif isinstance(value, bytes | str):
        raw = value.encode() if isinstance(value, str) else value
        digest.update(f"s{len(raw)}:".encode())
        digest.update(raw)
    elif value is None or isinstance(value, bool | int | float | np.generic):
        digest.update(f"v{value!r};".encode() if not isinstance(value, np.generic) else f"v{value.item()!r};".encode())
    elif isinstance(value, list | tuple):
        digest.update(f"l{len(value)}:".encode())
        for item in value:
            _feed(digest, item)
    else:
        fields = {k: v for k, v in vars(value).items() if not _is_default(v)}
        digest.update(f"o{type(value).__name__}{len(fields)}:".encode())
        for key in sorted(fields):
            digest.update(f"{key}=".encode())
            _feed(digest, fields[key])


def _is_default(value: object) -> bool:
    if isinstance(value, np.ndarray | list | tuple | bytes | str):
        return len(value) == 0
    return value is None or value == 0
