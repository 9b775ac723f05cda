"""A guarded model on a runtime: one input in, the model's own outputs, its features and a verdict out.

Rules enforced here:

* an input of another shape or type, or with NaN, is refused before it reaches the model;
* the file must have the two guard outputs, of the lengths that its metadata says; otherwise it is not run;
* activations out of all bounds, and a score that is NaN, are "not checked", never
  "clean"; so is every input of a model calibrated on made-up data.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeguard.contract.guard import FEATURES, SCORES, GuardMetadata
from edgeguard.detection import metadata as metadata_reader
from edgeguard.detection.runtime import RuntimeInfo, open_interpreter
from edgeguard.detection.verdict import Verdict, judge, not_checked
from edgeguard.errors import ModelError

Array = npt.NDArray[Any]

MAX_NORM = 1e15
"""A larger norm has a square that float32 cannot hold: its score would be infinite less infinite, or nothing."""


@dataclass(frozen=True, slots=True)
class Inference:
    """The outcome for one input. ``outputs`` are the model's own, dequantised, without the batch axis."""

    outputs: tuple[Array, ...]
    features: npt.NDArray[np.float32]
    verdict: Verdict


class TfliteModel:
    """Any single-input TFLite model with a batch of one: quantises the input, runs, and reads raw outputs."""

    def __init__(self, content: bytes, *, threads: int = 1, runtime: str | None = None) -> None:
        """Raises ModelError where the runtime refuses the file or it has several inputs."""
        self._interpreter, self.runtime = open_interpreter(content, threads=threads, name=runtime)
        inputs = self._interpreter.get_input_details()
        if len(inputs) != 1:
            raise ModelError("model file", got=f"{len(inputs)} inputs", expected="one input")
        self._input = inputs[0]
        self.outputs: list[dict[str, Any]] = self._interpreter.get_output_details()
        self._indices = tuple(int(output["index"]) for output in self.outputs)
        self.input_shape = tuple(int(n) for n in self._input["shape"][1:])
        self.input_dtype: np.dtype[Any] = np.dtype(self._input["dtype"])
        scale, zero_point = self._input["quantization"]
        self.input_quantization = (float(scale), int(zero_point))
        """Scale and zero point of the input; a scale of 0 where it is not quantised."""

    def quantise(self, x: Array) -> Array:
        """One input (no batch axis) as the input tensor takes it, with a batch axis of one."""
        if not np.issubdtype(self.input_dtype, np.integer):
            return x[np.newaxis].astype(self.input_dtype)
        scale, zero_point = self.input_quantization
        limits = np.iinfo(self.input_dtype)
        if not scale:
            return np.clip(np.round(x), limits.min, limits.max)[np.newaxis].astype(self.input_dtype)
        steps = np.round(x.astype(np.float32) / np.float32(scale)) + zero_point
        return np.clip(steps, limits.min, limits.max)[np.newaxis].astype(self.input_dtype)

    def invoke(self, tensor: Array) -> list[Array]:
        """Run on an input tensor as :meth:`quantise` makes it; the raw output tensors, with their batch axis."""
        try:
            self._interpreter.set_tensor(self._input["index"], tensor)
            self._interpreter.invoke()
        except (ValueError, RuntimeError) as error:
            raise ModelError("model file", got=f"refused to run: {str(error)[:200]}", do="convert it again") from error
        read = self._interpreter.get_tensor
        return [read(index) for index in self._indices]

    def predict(self, x: Array, output: int = 0) -> Array:
        """One dequantised output for a batch of inputs [N, ...], run one by one."""
        return np.stack([dequantise(self.invoke(self.quantise(one))[output][0], self.outputs[output]) for one in x])


def dequantise(raw: Array, detail: dict[str, Any]) -> Array:
    """An output tensor in real numbers, float32; float tensors come back as they are."""
    scale, zero_point = detail["quantization"]
    if not np.issubdtype(raw.dtype, np.integer) or not scale:
        return raw
    return np.asarray((raw.astype(np.float32) - zero_point) * np.float32(scale))


class GuardedModel:
    """A guarded ``.tflite`` that is ready to run. Make one with :meth:`load`."""

    def __init__(self, content: bytes, model: TfliteModel, description: GuardMetadata) -> None:
        self.metadata = description
        self.file_digest = hashlib.sha256(content).hexdigest()
        self._model = model
        self._scores, self._features = _guard_outputs(model, description)
        guard_outputs = {self._scores, self._features}
        self._own = [i for i in range(len(model.outputs)) if i not in guard_outputs]
        self._check_classes()
        self._names = tuple(detector.name for detector in description.detectors)
        self._dtype = np.dtype(description.input.dtype)

    @classmethod
    def load(cls, content: bytes, *, threads: int = 1, runtime: str | None = None) -> GuardedModel:
        """Open a guarded file.

        Raises:
            ModelError: not a TFLite file, without a guard, refused by the runtime, or at odds with its metadata.
            ConfigError: there is no TFLite runtime.
        """
        description = metadata_reader.read(content)
        return cls(content, TfliteModel(content, threads=threads, runtime=runtime), description)

    def _check_classes(self) -> None:
        index, classes = self.metadata.class_output, len(self.metadata.classes)
        if index is None:
            return
        shape = (
            tuple(int(n) for n in self._model.outputs[self._own[index]]["shape"])
            if index in range(len(self._own))
            else ()
        )
        if shape != (1, classes):
            raise ModelError(
                "guard metadata",
                got=f"class output {index} of shape {list(shape)}",
                expected=f"[1, {classes}], one score per class",
                do="convert the model again",
            )

    @property
    def runtime(self) -> RuntimeInfo:
        """The runtime that runs it."""
        return self._model.runtime

    def interface(self) -> tuple[object, ...]:
        """What a program relies on: shape and type of the input and of the model's own outputs."""
        own = tuple(
            (
                tuple(int(n) for n in self._model.outputs[i]["shape"]),
                np.dtype(self._model.outputs[i]["dtype"]).name,
            )
            for i in self._own
        )
        return (self._model.input_shape, self.metadata.input.dtype, own)

    def check(self, x: Array) -> None:
        """Raise ModelError unless ``x`` is one input of the shape and type that the metadata says, and finite."""
        expected = self.metadata.input
        if tuple(x.shape) != expected.shape or x.dtype != self._dtype:
            raise ModelError(
                "model input",
                got=f"{x.dtype}{list(x.shape)}",
                expected=f"{expected.dtype}{list(expected.shape)}",
                do="bring the data to the shape and type that the model was converted with",
            )
        if np.issubdtype(x.dtype, np.floating) and not np.isfinite(x).all():
            raise ModelError("model input", got="NaN or infinite values", expected="finite numbers")

    def infer(self, x: Array) -> Inference:
        """Run one input (no batch axis, the owner's own type, e.g. uint8 pixels) through model and guard.

        Raises:
            ModelError: the input does not fit.
        """
        self.check(x)
        raw = self._model.invoke(self._model.quantise(x))
        outputs = tuple(dequantise(raw[i][0], self._model.outputs[i]) for i in self._own)
        scores = dict(zip(self._names, (float(s) for s in raw[self._scores][0]), strict=True))
        class_output = self.metadata.class_output
        predicted = None if class_output is None else int(np.argmax(raw[self._own[class_output]][0]))
        if self.metadata.calibration.synthetic:
            verdict = not_checked(predicted, scores, "calibrated on synthetic inputs, so that scores mean nothing")
        elif not float(np.abs(raw[self._features]).max()) < MAX_NORM:
            verdict = not_checked(predicted, scores, "activations too large to be scored")
        else:
            verdict = judge(predicted, scores, self.metadata.score_to_p)
        return Inference(outputs, raw[self._features][0], verdict)


def _guard_outputs(model: TfliteModel, description: GuardMetadata) -> tuple[int, int]:
    """Positions of the score and feature outputs. They follow the model's own, scores first."""
    count = len(model.outputs)
    expected = (len(description.detectors), description.feature_count)
    if count >= 3:
        last = model.outputs[-2:]
        shapes = tuple(tuple(int(n) for n in output["shape"]) for output in last)
        names = tuple(output["name"] for output in last)
        if shapes == ((1, expected[0]), (1, expected[1])) and names == (SCORES, FEATURES):
            return count - 2, count - 1
    raise ModelError(
        "model file",
        got="guard outputs that do not fit its guard metadata",
        expected=f"scores [1, {expected[0]}] and features [1, {expected[1]}] as the last two outputs",
        do="convert the model again",
    )
