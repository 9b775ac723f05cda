"""Runs a file on TFLite Micro, where its Python package is installed: what a microcontroller would answer.

TFLite Micro is native code without a way to be asked first whether it takes a file, so it runs in a child process with
limits. It is a witness for verification, never what a device of ours runs.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from converters.untrusted import Child
from edgeguard.errors import ModelError

Array = npt.NDArray[Any]

NAME = "tflite-micro"
_PACKAGE = "tflite_micro"
_ARENA = 64 << 20


class _Tensor(msgspec.Struct, frozen=True):
    dtype: str
    shape: tuple[int, ...]
    data: bytes

    @classmethod
    def of(cls, array: Array) -> _Tensor:
        return cls(array.dtype.name, tuple(int(n) for n in array.shape), np.ascontiguousarray(array).tobytes())

    def array(self) -> Array:
        return np.frombuffer(self.data, dtype=np.dtype(self.dtype)).reshape(self.shape)


class _Request(msgspec.Struct, frozen=True):
    model: bytes
    inputs: tuple[_Tensor, ...]
    outputs: int


def available() -> bool:
    """True where the package ``tflite-micro`` is installed."""
    return importlib.util.find_spec(_PACKAGE) is not None


def run(content: bytes, inputs: Sequence[Array], outputs: int) -> list[list[Array]]:
    """The first ``outputs`` raw output tensors for each of ``inputs``, tensors as the model takes them.

    Raises:
        ModelError: TFLite Micro does not take the file, or did not survive it.
    """
    request = msgspec.msgpack.encode(_Request(content, tuple(_Tensor.of(x) for x in inputs), outputs))
    with Child() as child:
        answers = child.call("converters.micro:serve", request, returns=tuple[tuple[_Tensor, ...], ...], doing=NAME)
    try:
        return [[tensor.array() for tensor in answer] for answer in answers]
    except (ValueError, TypeError) as error:  # what the child answers is untrusted too
        raise ModelError("model file", got=f"outputs of {NAME} that are none", do="do not use it") from error


def serve(content: bytes, argument: str) -> tuple[tuple[_Tensor, ...], ...]:
    """Answer one request. Call it in a child only."""
    runtime = importlib.import_module(f"{_PACKAGE}.python.{_PACKAGE}.runtime")
    request = msgspec.msgpack.decode(content, type=_Request)
    try:
        interpreter = runtime.Interpreter.from_bytes(request.model, arena_size=_ARENA)
        answers = []
        for tensor in request.inputs:
            interpreter.set_input(tensor.array(), 0)
            interpreter.invoke()
            answers.append(tuple(_Tensor.of(interpreter.get_output(i)) for i in range(request.outputs)))
    except (RuntimeError, ValueError) as error:
        raise ModelError("model file", got=f"refused by {NAME}: {str(error)[:200]}") from error
    return tuple(answers)
