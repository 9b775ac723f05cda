"""Decides what quantising did to a model, and measures what the decision needs.

Rules enforced here:

* an int8 model must answer as its float original did: on at least 98% of the calibration inputs, or with an accuracy
  that is lower by at most half a point; outputs that hold no classes may be off by at most 10% (relative RMS);
* a refusal names the layer where most of the error arises, not the last one that it reaches;
* an int8 model computes in int8: :func:`float_operators` tells what does not.

The inputs are the calibration set, so the figures say what quantising changed, not how well the model generalises.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from ai_edge_litert import schema_py_generated as schema

from converters import flatbuffer
from edgeguard.detection.guarded import TfliteModel, dequantise
from edgeguard.errors import ModelError

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]
ClassOutput = int | None | Literal["first"]

MIN_AGREEMENT = 0.98
MAX_ACCURACY_LOSS = 0.005
MAX_OUTPUT_ERROR = 0.10
_HALF = 0.5
TRACED_INPUTS = 16
_SILENT = 1e-6

Op = schema.BuiltinOperator
Kind = schema.TensorType
_NAMES = {code: name for name, code in vars(Op).items() if isinstance(code, int) and not name.startswith("_")}
_CASTING = frozenset({Op.QUANTIZE, Op.DEQUANTIZE, Op.CAST})
_MOVING = frozenset(
    {Op.RESHAPE, Op.SQUEEZE, Op.EXPAND_DIMS, Op.TRANSPOSE, Op.SLICE, Op.STRIDED_SLICE, Op.SPLIT, Op.SPLIT_V, Op.UNPACK}
    | {Op.SPACE_TO_DEPTH, Op.DEPTH_TO_SPACE, Op.MAX_POOL_2D}
)
_FIXED_SCALE = frozenset({Op.SOFTMAX, Op.LOG_SOFTMAX, Op.LOGISTIC, Op.TANH, Op.L2_NORMALIZATION})


@dataclass(frozen=True, kw_only=True)
class Parity:
    """How an int8 model answers beside its float original, on the calibration set; None where it is not known.

    Attributes:
        agreement: share of inputs with the same top class.
        float_accuracy, int8_accuracy: share of inputs whose top class is the true label.
        output_error: the largest relative RMS error of an output that holds no classes; of each channel where there are
            classes beside it, see :class:`LayerError`.
    """

    agreement: float | None = None
    float_accuracy: float | None = None
    int8_accuracy: float | None = None
    output_error: float | None = None


@dataclass(frozen=True, kw_only=True)
class LayerError:
    """How far an activation of the int8 model is off the float one.

    Attributes:
        tensor: its name in the float model.
        relative_rms: RMS error over RMS value, of each channel, at most 1, and the RMS of these over the channels: a
            channel that is drowned by a larger one counts as much as that. Of the whole tensor after operators whose
            output scale is fixed, such as a softmax, where small values mean little.
        added: by how much that is more than it was in the inputs of the layer.
    """

    tensor: str
    relative_rms: float
    added: float


def compare(
    float_tflite: bytes | None,
    int8_tflite: bytes,
    inputs: Array,
    labels: npt.NDArray[np.int64] | None = None,
    *,
    class_output: ClassOutput = "first",
) -> Parity:
    """Hold an int8 model against its float original.

    Args:
        float_tflite: the original; None where there is none: then only the accuracy can be known.
        int8_tflite: the model to judge.
        inputs: [N, ...] in the owner's own type.
        labels: true classes [N], where they are known.
        class_output: position of the output that holds one number per class, None for a model without classes;
            ``first`` takes the first one of shape [1, C > 1].

    Raises:
        ModelError: a runtime refuses a file.
    """
    if float_tflite is None and labels is None:
        return Parity()
    quantised = TfliteModel(int8_tflite)
    original = None if float_tflite is None else TfliteModel(float_tflite)
    output = _first_classes(quantised) if class_output == "first" else class_output
    if output is None and _is_probability(original or quantised, inputs):
        return _agree(quantised, original, inputs, labels, 0, lambda outputs: (outputs[:, 0] > _HALF).astype(np.int64))
    if output is None:
        return Parity(output_error=None if original is None else _output_error(original, quantised, inputs))
    parity = _agree(quantised, original, inputs, labels, output, lambda outputs: outputs.argmax(axis=-1))
    if original is None or len(original.outputs) == 1:
        return parity
    return replace(parity, output_error=_channel_error(original, quantised, inputs, skipped=output))


def _agree(
    quantised: TfliteModel,
    original: TfliteModel | None,
    inputs: Array,
    labels: npt.NDArray[np.int64] | None,
    output: int,
    classes: Callable[[Array], Array],
) -> Parity:
    answers = classes(quantised.predict(inputs, output))
    references = None if original is None else classes(original.predict(inputs, output))
    return Parity(
        agreement=None if references is None else float(np.mean(answers == references)),
        float_accuracy=None if references is None or labels is None else float(np.mean(references == labels)),
        int8_accuracy=None if labels is None else float(np.mean(answers == labels)),
    )


def _is_probability(model: TfliteModel, inputs: Array) -> bool:
    """Whether the only output is one number between 0 and 1: a sigmoid, which tells two classes apart."""
    if len(model.outputs) != 1 or tuple(int(n) for n in model.outputs[0]["shape"]) != (1, 1):
        return False
    values = model.predict(inputs[:TRACED_INPUTS])
    return bool(values.min() >= 0.0 and values.max() <= 1.0)


def gate(parity: Parity, worst: Callable[[], LayerError]) -> None:
    """Refuse an int8 model that does not answer as the float model did.

    Args:
        parity: from :func:`compare`. What it does not know is not judged.
        worst: finds the layer where most of the error arises; called only for a refusal.

    Raises:
        ModelError: agreement below MIN_AGREEMENT and, where labels say so, accuracy lost beyond MAX_ACCURACY_LOSS; or
            outputs off by more than MAX_OUTPUT_ERROR.
    """
    reasons = _reasons(parity)
    if reasons is None:
        return
    got, expected = reasons
    layer = worst()
    raise ModelError(
        "int8 model",
        got=f"{got}; most of the error arises in {layer.tensor} ({layer.relative_rms:.0%} RMS error)",
        expected=expected,
        do="bring calibration inputs that cover the range of real ones, change that layer, or convert with --float",
    )


def _reasons(parity: Parity) -> tuple[str, str] | None:
    """What was found and what was expected of a model that is to be refused."""
    if parity.output_error is not None and not parity.output_error <= MAX_OUTPUT_ERROR:
        return f"outputs that are {parity.output_error:.1%} off the float model's", f"at most {MAX_OUTPUT_ERROR:.0%}"
    if parity.agreement is None or parity.agreement >= MIN_AGREEMENT:
        return None
    got = f"{parity.agreement:.1%} of its answers agree with the float model"
    expected = f"at least {MIN_AGREEMENT:.0%}"
    if parity.float_accuracy is None or parity.int8_accuracy is None:
        return got, expected
    if parity.float_accuracy - parity.int8_accuracy <= MAX_ACCURACY_LOSS:
        return None
    return (
        f"{got}, accuracy {parity.int8_accuracy:.1%} after {parity.float_accuracy:.1%}",
        f"{expected}, or accuracy within {MAX_ACCURACY_LOSS * 100:g} points",
    )


def float_operators(model: flatbuffer.Model) -> tuple[str, ...]:
    """The operators of a quantised model that compute with float numbers, in order, each once.

    Those that only turn one kind of number into another do not count.
    """
    graph = model.subgraphs[0]
    found = []
    for operator in graph.operators:
        code = flatbuffer.builtin_code(model, operator)
        touched = [i for i in (*_indices(operator.inputs), *_indices(operator.outputs)) if i >= 0]
        if code not in _CASTING and any(graph.tensors[i].type == Kind.FLOAT32 for i in touched):
            custom = flatbuffer.text(model.operatorCodes[operator.opcodeIndex].customCode)
            found.append(custom if code == Op.CUSTOM else _NAMES[code])
    return tuple(dict.fromkeys(found))


def _indices(values: Any) -> list[int]:
    return [] if values is None else [int(i) for i in values]


def _first_classes(model: TfliteModel) -> int | None:
    shapes = [tuple(int(n) for n in output["shape"]) for output in model.outputs]
    return next((i for i, shape in enumerate(shapes) if len(shape) == 2 and shape[0] == 1 and shape[1] > 1), None)


def _output_error(original: TfliteModel, quantised: TfliteModel, inputs: Array) -> float:
    """The largest relative RMS error of an output; infinite where only the original is all zeros."""
    count = min(len(original.outputs), len(quantised.outputs))
    power, error = np.zeros(count), np.zeros(count)
    for one in inputs:
        for position, (reference, found) in enumerate(
            zip(_outputs(original, one), _outputs(quantised, one), strict=False)
        ):
            power[position] += np.square(reference).sum()
            error[position] += np.square(found - reference).sum()
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = np.where(error == 0, 0.0, np.sqrt(error / power))
    return float(shares.max())


def _channel_error(original: TfliteModel, quantised: TfliteModel, inputs: Array, *, skipped: int) -> float:
    """The largest error, as :func:`_relative` has it, of the outputs but for one."""
    sums = [(_Sums(), _Sums()) for _ in original.outputs]
    for one in inputs:
        pairs = zip(_outputs(original, one), _outputs(quantised, one), strict=True)
        for (power, error), (reference, found) in zip(sums, pairs, strict=True):
            power.add(reference)
            error.add(found - reference)
    return max(_relative(power, error, None) for index, (power, error) in enumerate(sums) if index != skipped)


def _outputs(model: TfliteModel, one: Array) -> list[Floats]:
    raws = model.invoke(model.quantise(one))
    return [dequantise(raw, detail).astype(np.float64) for raw, detail in zip(raws, model.outputs, strict=True)]


def layer_errors(float_tflite: bytes, int8_tflite: bytes, inputs: Array) -> tuple[LayerError, ...]:
    """Where an int8 model departs from its float original: the layer that adds most of the error first.

    An activation carries on the error of what it is computed from, so that the last layers are nearly always the worst.
    They are ranked by what they add instead: their own relative error less the largest among their inputs. What has no
    namesake in the other file is looked through; what only moves numbers adds nothing, but may spread them over other
    channels.

    Args:
        float_tflite: the original.
        int8_tflite: what the converter made of it.
        inputs: [N, ...] in the owner's own type; the first TRACED_INPUTS are used.

    Raises:
        ModelError: a file is damaged, or the runtime refuses it.
    """
    original, quantised = _Traced(float_tflite), _Traced(int8_tflite)
    pairs = {original.input: quantised.input, **_match(original, quantised)}
    sums = {index: (_Sums(), _Sums()) for index in pairs}
    for one in inputs[:TRACED_INPUTS]:
        original.run(one)
        quantised.run(one)
        for index, other in pairs.items():
            reference = original.read(index)
            sums[index][0].add(reference)
            sums[index][1].add(quantised.read(other) - reference)
    errors = {index: _relative(power, error, original.makers.get(index)) for index, (power, error) in sums.items()}
    added, reached = dict.fromkeys([original.input], errors[original.input]), {original.input: errors[original.input]}
    for reads, writes in original.edges():
        inherited = max((reached.get(i, 0.0) for i in reads), default=0.0)
        for index in writes:
            reached[index] = errors.get(index, inherited)
            if index in errors and original.makers[index] not in _MOVING:
                added[index] = errors[index] - inherited
    found = [
        LayerError(tensor=original.names[index], relative_rms=errors[index], added=more)
        for index, more in added.items()
    ]
    return tuple(sorted(found, key=lambda error: -error.added))


class _Traced:
    """A model whose activations can be read after it ran. No delegate runs it: delegates keep theirs to themselves."""

    def __init__(self, content: bytes) -> None:
        from ai_edge_litert.interpreter import Interpreter, OpResolverType

        self._model = flatbuffer.parse(content)
        graph = self._model.subgraphs[0]
        self._takes = TfliteModel(content)
        try:
            self._interpreter = Interpreter(
                model_content=content,
                num_threads=1,
                experimental_preserve_all_tensors=True,
                experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
            )
            self._interpreter.allocate_tensors()
        except (ValueError, RuntimeError) as error:
            raise ModelError(
                "model file", got=f"refused by litert: {str(error)[:200]}", do="convert it again"
            ) from error
        self._details = {int(d["index"]): d["quantization"] for d in self._interpreter.get_tensor_details()}
        self.input = int(graph.inputs[0])
        self.names = {i: flatbuffer.text(tensor.name) or f"tensor {i}" for i, tensor in enumerate(graph.tensors)}
        self.shapes = {i: tuple(_indices(tensor.shape)) for i, tensor in enumerate(graph.tensors)}
        self.makers = {
            i: flatbuffer.builtin_code(self._model, operator)
            for operator in graph.operators
            for i in _indices(operator.outputs)
            if graph.tensors[i].type in {Kind.FLOAT32, Kind.INT8, Kind.UINT8, Kind.INT16}
        }
        """The operator that makes each activation."""

    def edges(self) -> Iterator[tuple[list[int], list[int]]]:
        """What each operator reads and writes, in the order of execution."""
        for operator in self._model.subgraphs[0].operators:
            yield _indices(operator.inputs), _indices(operator.outputs)

    def run(self, one: Array) -> None:
        try:
            self._interpreter.set_tensor(self.input, self._takes.quantise(one))
            self._interpreter.invoke()
        except (ValueError, RuntimeError) as error:
            raise ModelError("model file", got=f"refused to run: {str(error)[:200]}", do="convert it again") from error

    def read(self, index: int) -> Floats:
        """An activation of the last run in real numbers."""
        raw = self._interpreter.get_tensor(index).astype(np.float64)
        scale, zero_point = self._details[index]
        return np.asarray((raw - zero_point) * scale if scale else raw)


class _Sums:
    """Sums of squares per channel, the last axis, over any number of arrays."""

    def __init__(self) -> None:
        self.total: Floats = np.zeros(1)

    def add(self, values: Floats) -> None:
        flat = values.reshape(-1, values.shape[-1] if values.ndim else 1)
        self.total = self.total + np.square(flat).sum(axis=0)


def _relative(power: _Sums, error: _Sums, maker: int | None) -> float:
    """:attr:`LayerError.relative_rms`."""
    total = float(power.total.sum())
    if not total:
        return 0.0
    if maker in _FIXED_SCALE:
        return float(np.sqrt(error.total.sum() / total))
    heard = power.total > _SILENT**2 * total
    return float(np.sqrt(np.minimum(1.0, error.total[heard] / power.total[heard]).mean()))


def _match(original: _Traced, quantised: _Traced) -> dict[int, int]:
    """Activations of the original and of the quantised model that are the same, by name and shape.

    The converter joins the names of fused operators with ``;``, and tells namesakes apart by a number at the end. The
    strictest reading of a name comes first; one that fits several activations fits none.
    """
    pairs: dict[int, int] = {}
    readings: Sequence[Callable[[str], object]] = (
        lambda name: name,
        lambda name: re.sub(r"\d+$", "", name),
        lambda name: frozenset(name.split(";")),
        lambda name: name.split(";")[0],
        lambda name: name.split(";")[-1],
    )
    for reading in readings:
        left = _unique(original, reading, without=set(pairs))
        right = _unique(quantised, reading, without=set(pairs.values()))
        pairs |= {left[key]: right[key] for key in left.keys() & right.keys()}
    return pairs


def _unique(model: _Traced, reading: Callable[[str], object], *, without: set[int]) -> dict[object, int]:
    """Activations by their name, as ``reading`` takes it, and shape, as far as these are theirs alone."""
    keys = {i: (reading(model.names[i]), model.shapes[i]) for i in model.makers if i not in without}
    counts = Counter(keys.values())
    return {key: i for i, key in keys.items() if counts[key] == 1}


__all__ = ["LayerError", "Parity", "compare", "float_operators", "gate", "layer_errors"]
