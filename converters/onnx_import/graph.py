"""An ONNX file as a checked graph of plain values.

Rules enforced here:

* a file is untrusted: its size is limited, and it is parsed from memory, so that it opens no other file: weights kept
  in external files, sparse ones and functions of its own are refused;
* the ``onnx`` package's checker passes it before anything is done with it;
* an attribute that nobody read, or a value that nobody handles, is refused by its name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx

from edgeguard.errors import ConfigError, ModelError

MAX_BYTES = 1 << 30
MAX_NODES = 20_000
MAX_RANK = 16
MAX_ELEMENTS = 1 << 28
"""The most that one tensor may hold: 1 GiB of float32."""
MAX_WEIGHTS = 1 << 29
"""The most that all weights and folded constants together may hold."""

Array: TypeAlias = npt.NDArray[Any]
STANDARD_DOMAINS = ("", "ai.onnx")
_MISSING: Any = object()


class Node:
    """One operator: reads its attributes and remembers which were read."""

    def __init__(self, proto: Any, opset: int, name: str) -> None:
        self.operator: str = proto.op_type
        self.opset = opset
        self.name = name
        self.inputs: tuple[str, ...] = tuple(proto.input)
        self.outputs: tuple[str, ...] = tuple(proto.output)
        self._attributes = {a.name: a for a in proto.attribute}
        self._unread = set(self._attributes)

    def take(self, name: str, default: Any = _MISSING) -> Any:
        """The value of an attribute; text as str, a tensor as an array.

        Raises:
            ModelError: it is missing and has no default.
        """
        if name not in self._attributes:
            if default is _MISSING:
                raise ModelError(f"operator {self}", got=f"no attribute {name}", do="export the model again")
            return default
        self._unread.discard(name)
        value = onnx.helper.get_attribute_value(self._attributes[name])
        if isinstance(value, bytes):
            return value.decode("utf-8", "replace")
        if isinstance(value, onnx.TensorProto):
            return array_of(value)
        return value

    def ints(self, name: str, default: Sequence[int] | None = None) -> tuple[int, ...] | None:
        """A list of integers."""
        value = self.take(name, default)
        return None if value is None else tuple(int(v) for v in value)

    def one_of(self, name: str, default: Any, allowed: Sequence[Any]) -> Any:
        """An attribute with few values.

        Raises:
            ModelError: it has another one.
        """
        value = self.take(name, default)
        if value not in allowed:
            self.refuse(name, value, " or ".join(str(a) for a in allowed))
        return value

    def ignore(self, *names: str) -> None:
        """Mark attributes as read that have no meaning at inference."""
        self._unread -= set(names)

    def refuse(self, name: str, value: object, expected: str | None = None) -> None:
        """Refuse an attribute's value.

        Raises:
            ModelError: always.
        """
        raise ModelError(
            f"operator {self}", got=f"{name} = {str(value)[:80]}", expected=expected, do="bring a .tflite of this model"
        )

    def check_all_read(self) -> None:
        """Refuse what no one looked at.

        Raises:
            ModelError: an attribute was not read.
        """
        for name in sorted(self._unread):
            self.refuse(name, self.take(name), f"an {self.operator} without {name}")

    def __str__(self) -> str:
        return f"{self.operator} ({self.name})"


@dataclass(frozen=True)
class Port:
    """An input of the graph; a size that the file leaves open is None."""

    name: str
    shape: tuple[int | None, ...]
    dtype: np.dtype[Any]


@dataclass(frozen=True)
class Graph:
    """What a file says, weights as arrays in ONNX's own order of axes."""

    nodes: tuple[Any, ...]
    opset: int
    constants: Mapping[str, Array]
    inputs: tuple[Port, ...]
    outputs: tuple[str, ...]


def load(source: Any) -> Any:
    """The ``ModelProto`` of a path, of bytes, or the one that is given.

    Raises:
        ConfigError: the file cannot be read.
        ModelError: it is too large or no ONNX file.
    """
    if isinstance(source, onnx.ModelProto):
        _check_text(source.graph)
        return source
    what = "ONNX model"
    if isinstance(source, str | Path):
        what = f"ONNX model {source}"
        try:
            if Path(source).stat().st_size > MAX_BYTES:
                raise ModelError(what, got="a larger file", expected=f"at most {MAX_BYTES >> 20} MiB")
            source = Path(source).read_bytes()
        except OSError as error:
            raise ConfigError(what, got=error.strerror or str(error), do="check the path") from error
    if len(source) > MAX_BYTES:
        raise ModelError(what, got=f"{len(source)} bytes", expected=f"at most {MAX_BYTES >> 20} MiB")
    try:
        model = onnx.load_model_from_string(source)
    except Exception as error:  # DecodeError of whichever protobuf implementation is installed
        raise ModelError(what, got="bytes that are not an ONNX file", do="export it again") from error
    _check_text(model.graph)
    return model


def operators(model: Any) -> set[str]:
    """The operators of a model; those of other domains with the domain in front."""
    return {n.op_type if n.domain in STANDARD_DOMAINS else f"{n.domain}.{n.op_type}" for n in model.graph.node}


def read(model: Any) -> Graph:
    """Check a model and take it apart.

    Raises:
        ModelError: the checker or one of the rules above refuses it.
    """
    graph = model.graph
    if model.functions:
        raise ModelError("ONNX model", got="functions of its own", expected="operators only", do="inline them")
    if len(graph.node) > MAX_NODES:
        raise ModelError("ONNX model", got=f"{len(graph.node)} operators", expected=f"at most {MAX_NODES}")
    if graph.sparse_initializer:
        raise ModelError("ONNX model", got="sparse weights", expected="dense ones")
    for tensor in _tensors(graph):
        _check_stored_here(tensor)
    try:
        onnx.checker.check_model(model)
    except Exception as error:  # ValidationError, and others for fields that are missing altogether
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError("ONNX model", got=reason[0][:200], do="export it again") from error
    versions = [int(o.version) for o in model.opset_import if o.domain in STANDARD_DOMAINS]
    constants = {tensor.name: array_of(tensor) for tensor in graph.initializer}
    return Graph(
        nodes=tuple(graph.node),
        opset=max(versions, default=1),
        constants=constants,
        inputs=tuple(_port(value) for value in graph.input if value.name not in constants),
        outputs=tuple(value.name for value in graph.output),
    )


def array_of(tensor: Any) -> Array:
    """The values of a dense tensor.

    Raises:
        ModelError: they are of a type or number that its header does not say.
    """
    _check_stored_here(tensor)
    try:
        array = np.asarray(onnx.numpy_helper.to_array(tensor))
    except Exception as error:
        raise ModelError(f"ONNX tensor {tensor.name}", got=str(error)[:200], do="export the model again") from error
    if array.dtype.kind not in "biuf":
        raise ModelError(f"ONNX tensor {tensor.name}", got=f"type {array.dtype}", expected="numbers")
    return array


def sanitised(name: str) -> str:
    """A name that Keras and TensorFlow accept."""
    return re.sub(r"[^A-Za-z0-9]+", "_", name).strip("_")[:120] or "unnamed"


def _check_text(graph: Any) -> None:
    """Refuse names that are not UTF-8: protobuf hands them out as bytes."""
    names = [graph.name, *(v.name for v in (*graph.input, *graph.output, *graph.initializer))]
    for node in graph.node:
        names += [node.op_type, node.domain, node.name, *node.input, *node.output, *(a.name for a in node.attribute)]
    if not all(isinstance(name, str) for name in names):
        raise ModelError("ONNX model", got="names that are not UTF-8", do="export it again")


def _tensors(graph: Any) -> Iterable[Any]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors


def _check_stored_here(tensor: Any) -> None:
    """Refuse what would open another file, or has a shape that is none."""
    if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data:
        raise ModelError(
            f"ONNX tensor {tensor.name}",
            got="weights in another file",
            expected="one file",
            do="save it with onnx.save(onnx.load(path), path)",
        )
    if any(size < 0 for size in tensor.dims):
        raise ModelError(f"ONNX tensor {tensor.name}", got=f"shape {list(tensor.dims)}", do="export the model again")


def _port(value: Any) -> Port:
    kind = value.type.tensor_type
    if not value.type.HasField("tensor_type") or not kind.HasField("shape"):
        raise ModelError(f"ONNX input {value.name}", got="no shape", expected="a tensor of known shape")
    try:
        dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type))
    except KeyError as error:
        raise ModelError(f"ONNX input {value.name}", got=f"type {kind.elem_type}") from error
    if dtype.kind not in "biuf":
        raise ModelError(f"ONNX input {value.name}", got=f"type {dtype}", expected="numbers")
    if len(kind.shape.dim) > MAX_RANK:
        raise ModelError(f"ONNX input {value.name}", got=f"{len(kind.shape.dim)} axes", expected=f"at most {MAX_RANK}")
    shape = tuple(int(d.dim_value) if d.HasField("dim_value") and d.dim_value > 0 else None for d in kind.shape.dim)
    return Port(name=value.name, shape=shape, dtype=dtype)
