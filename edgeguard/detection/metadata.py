"""Reads the guard's metadata out of a TFLite flatbuffer, with the ``flatbuffers`` package and nothing else.

The file is hostile until checked: every offset and length is checked against the file before it is followed, so that
a damaged file raises ModelError and nothing else.
"""

from __future__ import annotations

import struct

from flatbuffers.table import Table

from edgeguard.contract.guard import METADATA_NAME, GuardMetadata, decode_metadata
from edgeguard.errors import ModelError

IDENTIFIER = b"TFL3"
_MAX_ENTRIES = 1 << 20
_MAX_METADATA = 8 << 20

# Slots of the TFLite schema (tensorflow/lite/schema/schema.fbs, version 3): Model, Metadata, Buffer.
_MODEL_BUFFERS, _MODEL_METADATA = 12, 16
_METADATA_NAME, _METADATA_BUFFER = 4, 6
_BUFFER_DATA = 4


def read(content: bytes) -> GuardMetadata:
    """The metadata of a guarded file.

    Args:
        content: the whole ``.tflite`` file.

    Raises:
        ModelError: not a TFLite file, damaged, without a guard, or with guard metadata that does not hold together.
    """
    return decode_metadata(read_raw(content))


def read_raw(content: bytes) -> bytes:
    """The JSON of the guard's metadata, as it stands in the file. Raises like :func:`read`."""
    if len(content) < 8 or content[4:8] != IDENTIFIER:
        raise ModelError(
            "model file",
            got=f"{len(content)} bytes that do not start as a TFLite file",
            expected="a .tflite file (identifier TFL3 at byte 4)",
            do="convert the model first: edgeguard convert",
        )
    try:
        found = _find(content)
    except (struct.error, IndexError, ValueError, TypeError, OverflowError) as error:
        raise ModelError("model file", got=f"a damaged flatbuffer ({error})", do="fetch or convert it again") from error
    if found is None:
        raise ModelError(
            "model file",
            got="a TFLite model without a guard",
            do="add one: edgeguard convert MODEL --data CALIBRATION",
        )
    return found


def _find(content: bytes) -> bytes | None:
    root = Table(content, _u32(content, 0))
    metadata = _vector(content, root, _MODEL_METADATA)
    buffers = _vector(content, root, _MODEL_BUFFERS)
    for position in metadata:
        entry = Table(content, position)
        name = _bytes(content, entry, _METADATA_NAME, limit=256)
        if name != METADATA_NAME.encode():
            continue
        offset = _slot(content, entry, _METADATA_BUFFER)
        index = _u32(content, offset) if offset else 0
        if not 0 < index < len(buffers):
            raise ValueError(f"metadata names buffer {index} of {len(buffers)}")
        return _bytes(content, Table(content, buffers[index]), _BUFFER_DATA, limit=_MAX_METADATA)
    return None


def _u32(content: bytes, position: int) -> int:
    value: int = struct.unpack_from("<I", content, position)[0]
    return value


def _slot(content: bytes, table: Table, slot: int) -> int:
    """Absolute position of a field of a table, 0 where it is absent."""
    vtable = table.Pos - struct.unpack_from("<i", content, table.Pos)[0]
    if vtable < 0:
        raise ValueError("a table points before the file")
    size = struct.unpack_from("<H", content, vtable)[0]
    if slot + 2 > size:
        return 0
    relative = struct.unpack_from("<H", content, vtable + slot)[0]
    return int(table.Pos) + relative if relative else 0


def _vector(content: bytes, table: Table, slot: int) -> list[int]:
    """Absolute positions of the tables in a vector of tables."""
    field = _slot(content, table, slot)
    if not field:
        return []
    start = field + _u32(content, field)
    count = _u32(content, start)
    if count > _MAX_ENTRIES or start + 4 + 4 * count > len(content):
        raise ValueError(f"a vector of {count} entries at {start}")
    return [start + 4 + 4 * i + _u32(content, start + 4 + 4 * i) for i in range(count)]


def _bytes(content: bytes, table: Table, slot: int, *, limit: int) -> bytes:
    field = _slot(content, table, slot)
    if not field:
        return b""
    start = field + _u32(content, field)
    length = _u32(content, start)
    if length > limit or start + 4 + length > len(content):
        raise ValueError(f"{length} bytes at {start}")
    return content[start + 4 : start + 4 + length]
