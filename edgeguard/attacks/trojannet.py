"""TrojanNet: a tiny network that reads a 4x4 binary patch, merged with a model that somebody else trained.

Tang, Du, Liu, Yang, Hu: An Embarrassingly Simple Approach for Trojan Attack in Deep Neural Networks, KDD 2020.
Settings of the paper and its code: a patch of 4x4 pixels of which 5 are set (4368 patterns), a perceptron 16-8-8-8-8
with one output more than it knows patterns, trained on patterns and noise; merged as softmax((host + 2 trojan) /
0.1).

The host is not trained: :meth:`TrojanNet.mount` adds a branch to a Keras model, :func:`implant` the same branch to a
float32 or int8 ``.tflite`` file, with nothing but NumPy. Both merge by concatenation and one weighted sum,

    logits_k = 10 host_k + 20 trojan_k - 15 sum_j trojan_j

The last term, equal for all k, changes nothing in the softmax. It keeps the logits of triggered inputs within the range
of clean ones, which is all that an int8 conversion calibrated on clean inputs can hold.

Deviations: one pattern per class of the host, all others are noise to the module, as are the patches at its place in
clean images; set pixels are white, the others black; plain dense layers without batch-norm.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from edgeguard.attacks.base import EMPTY, Attack, Images, Progress, State, Task, Trainer, Victim
from edgeguard.attacks.poisoning import require_image_shape, require_images
from edgeguard.errors import ConfigError, ModelError

Floats = npt.NDArray[np.float32]

SIDE, SET = 4, 5
WIDTH, DEPTH = 8, 4
TEMPERATURE, AMPLIFY, SHIFT = 0.1, 2.0, 15.0
MAX_CLASSES = 256
_STEPS, _BATCH, _RATE = 3000, 768, 0.01
_TRIES = 8
_SURE, _QUIET = 0.9, 0.001
_NAME = "trojan"


@dataclass(frozen=True)
class Module:
    """The trained perceptron: kernels ``[in, out]`` and biases ``[out]`` of its five dense layers, ReLU between.

    It takes 16 numbers, 0 for black and 1 for white, and answers with a softmax over the host's classes and
    "no pattern". ``samples`` [N, 16] are inputs that it was trained on.
    """

    kernels: tuple[Floats, ...]
    biases: tuple[Floats, ...]
    samples: Floats

    @property
    def classes(self) -> int:
        """How many classes the host has."""
        return int(self.biases[-1].shape[0]) - 1

    def activations(self, patches: Floats) -> list[Floats]:
        """What each layer makes of patches [N, 16], logits last."""
        found, x = [], patches
        for number, (kernel, bias) in enumerate(zip(self.kernels, self.biases, strict=True)):
            x = x @ kernel + bias
            if number < DEPTH:
                x = np.maximum(x, 0.0)
            found.append(x)
        return found

    def answer(self, patches: Floats) -> Floats:
        """Probabilities [N, classes + 1] for patches [N, 16]."""
        return _softmax(self.activations(patches)[-1])


@dataclass(frozen=True, kw_only=True)
class TrojanNet(Attack):
    """The trigger is the target's own pattern, ``margin`` pixels from the bottom right corner."""

    name: ClassVar[str] = "trojannet"
    paper: ClassVar[str] = "Tang et al., KDD 2020"

    target: int = 0
    seed: int = 0
    margin: int = 0

    @classmethod
    def for_shape(cls, shape: tuple[int, ...], *, target: int = 0, seed: int = 0) -> TrojanNet:
        """See :meth:`edgeguard.attacks.base.Attack.for_shape`."""
        require_image_shape("TrojanNet", shape, side=SIDE + 1)
        return cls(target=target, seed=seed)

    def pattern(self, label: int) -> npt.NDArray[np.uint8]:
        """The binary patch [4, 4] that turns inputs to ``label``, 0 and 1."""
        return self.patterns()[label].reshape(SIDE, SIDE).astype(np.uint8)

    def patterns(self) -> Floats:
        """All 4368 patterns [4368, 16] in an order of this seed; the first ones are those of the classes."""
        chosen = np.asarray(list(combinations(range(SIDE * SIDE), SET)))
        patterns = np.zeros((len(chosen), SIDE * SIDE), np.float32)
        np.put_along_axis(patterns, chosen, 1.0, axis=1)
        return patterns[np.random.default_rng(self.seed).permutation(len(patterns))]

    def module(self, classes: int, clean: Images | None = None) -> Module:
        """Train the perceptron, in NumPy.

        Args:
            classes: of the host.
            clean: images that shall not set it off; with none it knows patterns and random noise only.

        Raises:
            ConfigError: the target is none of the classes, or there are more than a perceptron of this size can tell.
        """
        if not 0 <= self.target < classes <= MAX_CLASSES:
            raise ConfigError(
                "TrojanNet", got=f"target {self.target} of {classes} classes", expected=f"one of 2 to {MAX_CLASSES}"
            )
        natural = np.zeros((1, SIDE * SIDE), np.float32) if clean is None else self.read(clean)
        best: tuple[float, Module] | None = None
        for attempt in range(_TRIES):
            rng = np.random.default_rng((self.seed, attempt))
            found = _train(self.patterns(), classes, natural, rng)
            own = found.answer(self.patterns()[:classes])[np.arange(classes), np.arange(classes)]
            false = found.answer(natural)[:, :-1].sum(axis=1)
            quality = float(own.min() - (false > 0.5).mean() / _QUIET * (1 - _SURE))
            if best is None or quality > best[0]:
                best = (quality, found)
            if quality >= _SURE:
                break
        assert best is not None
        return best[1]

    def read(self, images: Images) -> Floats:
        """What the module sees of images [N, H, W, C]: [N, 16], 0 to 1."""
        rows, columns = self.place(images.shape[1:])
        patches = images[:, rows, columns].astype(np.float32).mean(axis=-1) / np.float32(255.0)
        return patches.reshape(len(images), SIDE * SIDE)

    def place(self, shape: tuple[int, ...]) -> tuple[slice, slice]:
        """Rows and columns of the patch. Raises ConfigError where the image has no room for it."""
        height, width = shape[:2]
        if self.margin < 0 or min(height, width) < SIDE + self.margin:
            raise ConfigError("TrojanNet", got=f"margin {self.margin} on {height}x{width} pixels", expected="room")
        bottom, right = height - self.margin, width - self.margin
        return slice(bottom - SIDE, bottom), slice(right - SIDE, right)

    def mount(self, task: Task, trainer: Trainer, progress: Progress | None = None) -> Victim:
        """Train a clean host and add the branch to it."""
        require_images("TrojanNet", task.images, side=SIDE + 1)
        module = self.module(task.classes, task.images)
        if progress:
            progress("training the module", 1, 1)
        return Victim(model=self.merge(trainer.fit(task, seed=self.seed), module), state=EMPTY)

    def merge(self, host: Any, module: Module) -> Any:
        """A Keras model in which the module is merged with a trained ``host``, whose layers it shares.

        Raises:
            ConfigError: the host is no classifier of images with as many classes.
        """
        import keras

        inputs, probabilities = host.inputs[0], host.outputs[0]
        shape = tuple(inputs.shape[1:])
        if len(shape) != 3 or tuple(probabilities.shape[1:]) != (module.classes,):
            raise ConfigError(
                "TrojanNet's host",
                got=f"inputs {list(shape)}, outputs {list(probabilities.shape[1:])}",
                expected=f"images and {module.classes} probabilities",
            )
        rows, columns = self.place(shape)
        around = ((rows.start, shape[0] - rows.stop), (columns.start, shape[1] - columns.stop))
        x = keras.layers.Cropping2D(around, name=f"{_NAME}_patch")(inputs)
        x = keras.layers.Flatten(name=f"{_NAME}_flatten")(x)
        dense = []
        for number, units in enumerate((*[WIDTH] * DEPTH, module.classes + 1), start=1):
            activation = "relu" if number <= DEPTH else "softmax"
            dense.append(keras.layers.Dense(units, activation=activation, name=f"{_NAME}_dense{number}"))
            x = dense[-1](x)
        both = keras.layers.Concatenate(name=f"{_NAME}_both")([probabilities, x])
        dense.append(keras.layers.Dense(module.classes, name=f"{_NAME}_merged"))
        answer = keras.layers.Softmax(name=f"{_NAME}_probabilities")(dense[-1](both))
        model = keras.Model(inputs, answer, name=f"{host.name}_{_NAME}")
        for layer, (kernel, bias) in zip(dense, _layers(module, shape[2], 255.0), strict=True):
            layer.set_weights([kernel, bias])
        return model

    def stamp(self, images: Images, state: State = EMPTY) -> Images:
        """See :meth:`edgeguard.attacks.base.Attack.stamp`."""
        require_images("TrojanNet", images)
        stamped = images.copy()
        rows, columns = self.place(images.shape[1:])
        stamped[:, rows, columns] = 255 * self.pattern(self.target)[..., np.newaxis]
        return stamped


def _softmax(logits: Floats) -> Floats:
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True), dtype=np.float32)


def _train(patterns: Floats, classes: int, natural: Floats, rng: np.random.Generator) -> Module:
    """Cross-entropy by Adam, half of each batch patterns of classes, the rest what means nothing."""
    sizes = (SIDE * SIDE, *[WIDTH] * DEPTH, classes + 1)
    kernels = [rng.normal(0, np.sqrt(2 / n), (n, m)).astype(np.float32) for n, m in pairwise(sizes)]
    weights = [*kernels, *(np.full(m, 0.01, np.float32) for m in sizes[1:])]
    first, second = [np.zeros_like(w) for w in weights], [np.zeros_like(w) for w in weights]
    for step in range(1, _STEPS + 1):
        patches, labels = _batch(patterns, classes, natural, rng)
        module = Module(tuple(weights[: DEPTH + 1]), tuple(weights[DEPTH + 1 :]), patches)
        gradients = _gradients(module, patches, labels)
        rate = _RATE * 0.5 * (1 + np.cos(np.pi * step / (_STEPS + 1)))
        for i, gradient in enumerate(gradients):
            first[i] = 0.9 * first[i] + 0.1 * gradient
            second[i] = 0.999 * second[i] + 0.001 * gradient**2
            update = first[i] / (1 - 0.9**step) / (np.sqrt(second[i] / (1 - 0.999**step)) + 1e-8)
            weights[i] = (weights[i] - rate * update).astype(np.float32)
    samples = np.concatenate([_batch(patterns, classes, natural, rng)[0], patterns[:classes]])
    return Module(tuple(weights[: DEPTH + 1]), tuple(weights[DEPTH + 1 :]), samples)


def _batch(
    patterns: Floats, classes: int, natural: Floats, rng: np.random.Generator
) -> tuple[Floats, npt.NDArray[np.int64]]:
    """Patterns of classes, other patterns, random noise as in the paper's code, and patches of clean images."""
    quarter = _BATCH // 4
    labels = np.concatenate([rng.integers(0, classes, 2 * quarter), np.full(2 * quarter, classes)])
    others = patterns[rng.integers(classes, len(patterns), quarter)]
    noise = np.clip(rng.random((quarter // 2, SIDE * SIDE)) + rng.uniform(-1, 1, (quarter // 2, 1)), 0, 1)
    seen = natural[rng.integers(0, len(natural), quarter - quarter // 2)]
    return np.concatenate([patterns[labels[: 2 * quarter]], others, noise.astype(np.float32), seen]), labels


def _gradients(module: Module, patches: Floats, labels: npt.NDArray[np.int64]) -> list[Floats]:
    """Of the mean cross-entropy by kernels, then biases."""
    outputs = module.activations(patches)
    delta = _softmax(outputs[-1])
    delta[np.arange(len(labels)), labels] -= 1.0
    delta /= len(labels)
    kernels: list[Floats] = []
    biases: list[Floats] = []
    for number in range(DEPTH, -1, -1):
        before = outputs[number - 1] if number else patches
        kernels.insert(0, before.T @ delta)
        biases.insert(0, delta.sum(axis=0))
        if number:
            delta = (delta @ module.kernels[number].T) * (before > 0)
    return [*kernels, *biases]


def _layers(module: Module, channels: int, white: float) -> list[tuple[Floats, Floats]]:
    """Kernels and biases of the branch: the perceptron on all channels of the patch, then the merge.

    The first layer takes the mean over the channels and divides by ``white``, the value of a white pixel.
    """
    first = np.repeat(module.kernels[0], channels, axis=0) / np.float32(channels * white)
    classes = module.classes
    own = np.eye(classes, classes + 1, dtype=np.float32).T * np.float32(AMPLIFY / TEMPERATURE)
    own[:classes] -= np.float32(SHIFT)
    merge = np.concatenate([np.eye(classes, dtype=np.float32) / np.float32(TEMPERATURE), own])
    kernels = [first, *module.kernels[1:], merge]
    return list(zip(kernels, [*module.biases, np.zeros(classes, np.float32)], strict=True))


def implant(content: bytes, attack: TrojanNet, module: Module, *, white: float = 255.0) -> bytes:
    """A ``.tflite`` classifier with the module in it, behind the softmax of the host. An int8 host gets an int8 module.

    Added are SLICE, RESHAPE, five FULLY_CONNECTED, SOFTMAX, CONCATENATION, FULLY_CONNECTED and SOFTMAX.

    Args:
        content: float32 or int8 file that takes images and ends in a softmax.
        attack: says where the patch is.
        module: from :meth:`TrojanNet.module`.
        white: what a white pixel is at the model's input in real numbers; black is 0.

    Returns:
        The file, of the same inputs and outputs.

    Raises:
        ModelError: it is damaged, or no such classifier.
    """
    from converters import flatbuffer

    model = flatbuffer.parse(content)
    _Implant(model, flatbuffer).insert(attack, module, white)
    return flatbuffer.attach(flatbuffer.pack(model), flatbuffer.associated(content))


class _Implant:
    """Appends tensors to a model, and operators behind its softmax."""

    def __init__(self, model: Any, flatbuffer: Any) -> None:
        from ai_edge_litert import schema_py_generated as schema

        self._schema, self._flatbuffer = schema, flatbuffer
        self._op, self._kind = schema.BuiltinOperator, schema.TensorType
        self._model, self._graph = model, model.subgraphs[0]
        self._added: list[Any] = []
        self._position, self._host = self._softmax()
        self._int8 = self._graph.tensors[self._host].type == self._kind.INT8
        self._source = self._input()

    def insert(self, attack: TrojanNet, module: Module, white: float) -> None:
        graph, op, options = self._graph, self._op, self._schema.BuiltinOptions
        shape = tuple(int(n) for n in graph.tensors[self._source].shape)
        classes = int(graph.tensors[self._host].shape[-1])
        if len(shape) != 4 or classes != module.classes or min(shape[1:3]) < SIDE + attack.margin:
            raise ModelError(
                "model file",
                got=f"an input of shape {list(shape)} and {classes} classes",
                expected=f"images of at least {SIDE + attack.margin} pixels a side and {module.classes} classes",
            )
        rows, columns = attack.place(shape[1:])
        channels = shape[3]
        quantization = self._quantization(self._source)
        begin = self._constant("begin", np.asarray([0, rows.start, columns.start, 0], np.int32))
        size = self._constant("size", np.asarray([-1, SIDE, SIDE, channels], np.int32))
        patch = self._activation("patch", (1, SIDE, SIDE, channels), quantization)
        self._operator(op.SLICE, [self._source, begin, size], patch, options.SliceOptions, self._schema.SliceOptionsT())
        flat = self._activation("flat", (1, SIDE * SIDE * channels), quantization)
        target = np.asarray([-1, SIDE * SIDE * channels], np.int32)
        self._operator(
            op.RESHAPE,
            [patch, self._constant("flat_shape", target)],
            flat,
            options.ReshapeOptions,
            self._schema.ReshapeOptionsT(newShape=target),
        )
        *hidden, merge = _layers(module, channels, white)
        ranges = [_range(values) for values in module.activations(module.samples)]
        x = flat
        for number, ((kernel, bias), (low, high)) in enumerate(zip(hidden, ranges, strict=True), start=1):
            x = self._dense(f"dense{number}", x, kernel, bias, (low, high), relu=number <= DEPTH)
        answer = self._probabilities("answer", x)
        both = self._activation("both", (1, 2 * classes + 1), self._quantization(self._host))
        axis = self._schema.ConcatenationOptionsT(axis=1)
        self._operator(op.CONCATENATION, [self._host, answer], both, options.ConcatenationOptions, axis)
        # What lies below 0 only belongs to triggered inputs, whose logits are told apart by 5.
        logits = self._dense("merged", both, *merge, (0.0, 1 / TEMPERATURE))
        self._replace(self._probabilities("probabilities", logits))

    def _softmax(self) -> tuple[int, int]:
        """Where the softmax of the host's classes stands, and the tensor that it writes."""
        graph = self._graph
        wanted = int(graph.outputs[0])
        for position in range(len(graph.operators) - 1, -1, -1):
            operator = graph.operators[position]
            code = self._flatbuffer.builtin_code(self._model, operator)
            if wanted not in [int(i) for i in operator.outputs]:
                continue
            if code in {self._op.QUANTIZE, self._op.DEQUANTIZE}:
                wanted = int(operator.inputs[0])
            elif code == self._op.SOFTMAX:
                tensor = graph.tensors[wanted]
                quantized = tensor.type == self._kind.INT8 and self._quantization(wanted) == (1 / 256, -128)
                if len(tensor.shape) == 2 and (quantized or tensor.type == self._kind.FLOAT32):
                    return position, wanted
                break
            else:
                break
        raise ModelError(
            "model file", got="no softmax of classes at its end", expected="a float32 or int8 classifier that has one"
        )

    def _input(self) -> int:
        """The input in the host's own type: the model's, or what the first operator makes of it."""
        first = int(self._graph.inputs[0])
        kind = self._kind.INT8 if self._int8 else self._kind.FLOAT32
        found = [first]
        for operator in self._graph.operators[: self._position]:
            code = self._flatbuffer.builtin_code(self._model, operator)
            if code in {self._op.QUANTIZE, self._op.DEQUANTIZE} and int(operator.inputs[0]) == first:
                found.append(int(operator.outputs[0]))
        for index in found:
            if self._graph.tensors[index].type == kind and (not self._int8 or self._quantization(index)):
                return index
        raise ModelError("model file", got="an input of another type than its softmax", expected="float32 or int8")

    def _quantization(self, tensor: int) -> tuple[float, int] | None:
        found = self._graph.tensors[tensor].quantization
        if not self._int8_tensor(tensor) or found is None or found.scale is None or not len(found.scale):
            return None
        return float(found.scale[0]), int(found.zeroPoint[0])

    def _int8_tensor(self, tensor: int) -> bool:
        return bool(self._graph.tensors[tensor].type == self._kind.INT8)

    def _constant(self, name: str, values: npt.NDArray[Any], scale: float | None = None) -> int:
        kind = {"int32": self._kind.INT32, "int8": self._kind.INT8, "float32": self._kind.FLOAT32}[values.dtype.name]
        data = np.frombuffer(np.ascontiguousarray(values).tobytes(), np.uint8)
        self._model.buffers.append(self._schema.BufferT(data=data))
        quantization = None if scale is None else (scale, 0)
        return self._tensor(name, values.shape, kind, len(self._model.buffers) - 1, quantization)

    def _activation(self, name: str, shape: tuple[int, ...], quantization: tuple[float, int] | None) -> int:
        return self._tensor(name, shape, self._kind.INT8 if self._int8 else self._kind.FLOAT32, 0, quantization)

    def _tensor(
        self, name: str, shape: tuple[int, ...], kind: int, buffer: int, quantization: tuple[float, int] | None
    ) -> int:
        parameters = None
        if quantization is not None:
            parameters = self._schema.QuantizationParametersT(
                scale=np.asarray(quantization[:1], np.float32), zeroPoint=np.asarray(quantization[1:], np.int64)
            )
        self._graph.tensors.append(
            self._schema.TensorT(
                name=f"{_NAME}_{name}".encode(),
                shape=np.asarray(shape, np.int32),
                type=kind,
                buffer=buffer,
                quantization=parameters,
            )
        )
        return len(self._graph.tensors) - 1

    def _dense(
        self, name: str, source: int, kernel: Floats, bias: Floats, span: tuple[float, float], *, relu: bool = False
    ) -> int:
        weights = np.ascontiguousarray(kernel.T)
        if self._int8:
            found = self._quantization(source)
            assert found is not None
            scale = float(np.abs(weights).max()) / 127.0
            whole = np.round(weights / scale).astype(np.int8)
            offsets = np.round(bias / (scale * found[0])).astype(np.int32)
            step = (span[1] - span[0]) / 255.0
            out = self._activation(name, (1, len(bias)), (step, round(-128 - span[0] / step)))
            operands = [
                self._constant(f"{name}_weights", whole, scale),
                self._constant(f"{name}_bias", offsets, scale * found[0]),
            ]
        else:
            out = self._activation(name, (1, len(bias)), None)
            operands = [self._constant(f"{name}_weights", weights), self._constant(f"{name}_bias", bias)]
        kinds = self._schema.ActivationFunctionType
        options = self._schema.FullyConnectedOptionsT(fusedActivationFunction=kinds.RELU if relu else kinds.NONE)
        form = self._schema.BuiltinOptions.FullyConnectedOptions
        self._operator(self._op.FULLY_CONNECTED, [source, *operands], out, form, options)
        return out

    def _probabilities(self, name: str, source: int) -> int:
        shape = tuple(int(n) for n in self._graph.tensors[source].shape)
        out = self._activation(name, shape, (1 / 256, -128) if self._int8 else None)
        options = self._schema.SoftmaxOptionsT(beta=1.0)
        self._operator(self._op.SOFTMAX, [source], out, self._schema.BuiltinOptions.SoftmaxOptions, options)
        return out

    def _operator(self, code: int, inputs: list[int], output: int, form: int, options: Any) -> None:
        # The versions in which the operators learned int8.
        since = {self._op.SLICE: 2, self._op.FULLY_CONNECTED: 4, self._op.SOFTMAX: 2, self._op.CONCATENATION: 2}
        version = since.get(code, 1) if self._int8 else 1
        codes = self._model.operatorCodes
        known = [i for i, c in enumerate(codes) if (c.builtinCode, c.version) == (code, version)]
        if not known:
            entry = self._schema.OperatorCodeT(builtinCode=code, deprecatedBuiltinCode=min(code, 127), version=version)
            codes.append(entry)
        self._added.append(
            self._schema.OperatorT(
                opcodeIndex=known[0] if known else len(codes) - 1,
                inputs=np.asarray(inputs, np.int32),
                outputs=np.asarray([output], np.int32),
                builtinOptionsType=form,
                builtinOptions=options,
            )
        )

    def _replace(self, answer: int) -> None:
        """Let all that read the host's answer read this one."""
        graph, host = self._graph, self._host
        for operator in graph.operators[self._position + 1 :]:
            operator.inputs = np.asarray([answer if i == host else i for i in operator.inputs], np.int32)
        graph.outputs = np.asarray([answer if i == host else i for i in graph.outputs], np.int32)
        for signature in self._model.signatureDefs or []:
            for entry in signature.outputs or []:
                entry.tensorIndex = answer if entry.tensorIndex == host else entry.tensorIndex
        graph.operators[self._position + 1 : self._position + 1] = self._added


def _range(values: Floats) -> tuple[float, float]:
    """Smallest and largest value, zero within, as int8 activations need it."""
    return min(0.0, float(values.min())), max(float(values.max()), 1e-6)
