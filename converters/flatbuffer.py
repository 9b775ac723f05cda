"""TFLite flatbuffers as objects: checked parsing, packing with aligned buffers, and a fingerprint of the content.

Uses the schema classes that ship with ai-edge-litert (pure Python) and the ``flatbuffers`` package.

Rules enforced here:

* a file is checked before it is used, see :mod:`converters.structure`;
* constant data starts at a multiple of 16 bytes, as the schema demands: microcontrollers fault on less;
* a fingerprint is taken over the content, not the bytes, so that it does not depend on who packed the file.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Sequence
from typing import Any

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema

from converters import structure
from edgeguard.detection.metadata import IDENTIFIER
from edgeguard.errors import ModelError

_ZIP_END = b"PK\x05\x06"
_ZIP_TAIL = (1 << 16) + 22  # the longest comment, and the record itself
_MAX_ZIP_DIRECTORY = 1 << 13
_MAX_ASSOCIATED_FILES = 16
_MAX_ASSOCIATED_BYTES = 1 << 20
_INPUT_TYPES = {
    schema.TensorType.FLOAT32: "float32",
    schema.TensorType.INT8: "int8",
    schema.TensorType.UINT8: "uint8",
    schema.TensorType.INT16: "int16",
}

Model = Any
"""``schema.ModelT``: the object form of a file."""


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
    return structure.check(content)


def pack(model: Model) -> bytes:
    """The file that holds ``model``."""
    builder = _AlignedBuilder(1 << 16)
    builder.Finish(model.Pack(builder), file_identifier=IDENTIFIER)
    return bytes(builder.Output())


def associated(content: bytes) -> tuple[tuple[str, bytes], ...]:
    """Names and bytes of the files that follow the flatbuffer as a zip archive, as TFLite's metadata has it.

    Label files usually. They are no part of the graph, and of no digest here.

    Raises:
        ModelError: more or larger files than a label file needs, or a damaged archive.
    """
    end = content.rfind(_ZIP_END, max(0, len(content) - _ZIP_TAIL))
    if end < 0 or not zipfile.is_zipfile(io.BytesIO(content)):
        return ()
    # The library lists a directory whole before anything can be asked about it.
    directory = int.from_bytes(content[end + 12 : end + 16], "little")
    if directory > _MAX_ZIP_DIRECTORY:
        raise ModelError(
            "model file",
            got=f"associated files with a directory of {directory} bytes",
            expected=f"at most {_MAX_ZIP_DIRECTORY}",
        )
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            entries = archive.infolist()
            size = sum(entry.file_size for entry in entries)
            if len(entries) <= _MAX_ASSOCIATED_FILES and size <= _MAX_ASSOCIATED_BYTES:
                return tuple((entry.filename, archive.read(entry)) for entry in entries)
    except Exception as error:  # a hostile archive makes zipfile and zlib raise whatever they like
        raise ModelError("model file", got=f"damaged associated files ({error})", do="add them again") from error
    raise ModelError(
        "model file",
        got=f"{len(entries)} associated files of {size} bytes",
        expected=f"at most {_MAX_ASSOCIATED_FILES} of {_MAX_ASSOCIATED_BYTES}",
    )


def attach(content: bytes, files: Sequence[tuple[str, bytes]]) -> bytes:
    """A flatbuffer with associated files behind it, stored, as TFLite's metadata tools do."""
    if not files:
        return content
    whole = io.BytesIO()
    whole.write(content)
    with zipfile.ZipFile(whole, "a", zipfile.ZIP_STORED) as archive:
        for name, data in files:
            archive.writestr(zipfile.ZipInfo(name), data)  # which is dated 1980: the same files give the same bytes
    return whole.getvalue()


def text(name: bytes | str | None) -> str:
    """A flatbuffer string as str."""
    return name.decode("utf-8", "replace") if isinstance(name, bytes) else name or ""


def builtin_code(model: Model, operator: Any) -> int:
    """The BuiltinOperator of an operator, also in files from before the code outgrew a byte."""
    code = model.operatorCodes[operator.opcodeIndex]
    return max(int(code.builtinCode), int(code.deprecatedBuiltinCode))


def quantization(tensor: Any) -> tuple[float, int]:
    """Scale and zero point of a tensor that has one of each; a scale of 0 where it is not quantised."""
    found = tensor.quantization
    if found is None or found.scale is None or not len(found.scale):
        return 0.0, 0
    zero_points = found.zeroPoint
    return float(found.scale[0]), 0 if zero_points is None or not len(zero_points) else int(zero_points[0])


def input_of(model: Model) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape (without the batch axis) and type of a model's input.

    Raises:
        ModelError: it has several inputs, or one of a type that no input has.
    """
    graph = model.subgraphs[0]
    if len(graph.inputs) != 1:
        raise ModelError("model file", got=f"{len(graph.inputs)} inputs", expected="one input")
    tensor = graph.tensors[int(graph.inputs[0])]
    if tensor.type not in _INPUT_TYPES:
        raise ModelError("model file", got=f"an input of type {tensor.type}", expected="float32, int8, uint8 or int16")
    shape = () if tensor.shape is None else tuple(int(n) for n in tensor.shape)
    if not shape:
        raise ModelError("model file", got="a scalar input", expected="an input with a batch axis")
    return shape[1:], np.dtype(_INPUT_TYPES[tensor.type])


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
