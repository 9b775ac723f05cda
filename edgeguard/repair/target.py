"""What a repair works on: a trainable Keras model, or a ``.tflite`` file itself, behind one interface.

Rules enforced here:

* the original is never changed: methods work on copies;
* a layer is pruned by making a channel constantly zero before its activation, so that shapes stay what they are;
* weights of a ``.tflite`` file are written in their own type and scale: float32, or int8 with zero as zero, the bias
  with them. What is read by several operators, or of another type, is left alone and not offered;
* no training framework is loaded for a ``.tflite`` file.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from ai_edge_litert import schema_py_generated as schema

from converters import flatbuffer, guard
from converters.taps import MAX_NAME
from edgeguard.contract.guard import Tap
from edgeguard.errors import ModelError
from edgeguard.inspection.networks import run

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Branch:
    """A part that reads the input by a way of its own and is merged behind the rest.

    ``layer`` is what weighs the merged numbers, ``columns`` which of its inputs come from the branch, ``weights`` how
    many numbers the branch has.
    """

    layer: str
    columns: range
    weights: int
    name: str


class Target(Protocol):
    """A model under repair; methods change it in place."""

    trainable: bool
    """Whether gradients can be taken: a Keras model."""

    def copy(self) -> Target:
        """Another one, whose weights are its own."""

    def layers(self) -> tuple[str, ...]:
        """Weighted layers with channels, convolutions and dense ones, in the order from the input."""

    def maker(self, tap: Tap) -> str:
        """The layer that makes a tapped activation. Raises ModelError where there is none to prune."""

    def kernel(self, layer: str) -> Floats:
        """Its weights ``[channels, inputs per channel]`` as they act, batch-norm included."""

    def inputs(self, layer: str) -> int:
        """How many channels each of its channels reads; they are what varies fastest along a kernel's row."""

    def silence(self, layer: str, channels: Iterable[int]) -> None:
        """Make channels constantly zero before their activation."""

    def zero(self, layer: str, weights: Bools) -> None:
        """Set single weights ``[channels, inputs per channel]`` to zero."""

    def branches(self) -> tuple[Branch, ...]:
        """Parts merged behind the rest that read the input by a way of their own; the largest part is no branch."""

    def cut(self, branch: Branch) -> None:
        """Take a branch out: nothing that it says is weighed any more, and where that can be it is no longer there."""

    def tapped(self, taps: Sequence[Tap]) -> tuple[str, ...]:
        """Which of the activations that a guard taps are still there, as ``taps.plan_taps`` takes their names."""

    def classes(self, images: npt.NDArray[np.uint8]) -> Ints:
        """The class that it gives each image [N, H, W, C]."""


class KerasTarget:
    """A Keras model from pixels to a softmax over classes."""

    trainable = True

    def __init__(self, model: Any) -> None:
        self.model = model

    def copy(self) -> KerasTarget:
        """See :class:`Target`."""
        import keras

        twin = keras.models.clone_model(self.model)
        twin.set_weights(self.model.get_weights())
        return KerasTarget(twin)

    def layers(self) -> tuple[str, ...]:
        """See :class:`Target`."""
        import keras

        kinds = keras.layers.Conv2D | keras.layers.Dense | keras.layers.DepthwiseConv2D
        return tuple(layer.name for layer in self.model.layers if isinstance(layer, kinds))

    def maker(self, tap: Tap) -> str:
        """See :class:`Target`."""
        known = set(self.layers())
        names = {layer.name for layer in self.model.layers}
        if tap.source_layer not in names:
            raise ModelError(
                "trainable model",
                got=f"no layer {tap.source_layer!r}, which the guard taps",
                expected="the model that the guarded file was converted from",
            )
        layer = self.model.get_layer(tap.source_layer)
        while layer.name not in known:
            source = layer.input
            if isinstance(source, list) or not hasattr(source, "_keras_history"):
                raise ModelError(f"layer {tap.source_layer}", got="no single layer before it", expected="a convolution")
            layer = source._keras_history.operation
            if not layer.weights and not hasattr(layer, "input"):
                raise ModelError(f"layer {tap.source_layer}", got="no weights before it", expected="a convolution")
        return str(layer.name)

    def kernel(self, layer: str) -> Floats:
        """See :class:`Target`."""
        own = self.model.get_layer(layer)
        weights = _by_channel(own.get_weights()[0], depthwise=_is_depthwise(own))
        norm = self.norm_behind(own)
        if norm is None:
            return weights
        gamma, _, _, variance = _norm_weights(norm)
        return np.asarray(weights * (gamma / np.sqrt(variance + norm.epsilon))[:, np.newaxis], dtype=np.float32)

    def inputs(self, layer: str) -> int:
        """See :class:`Target`."""
        own = self.model.get_layer(layer)
        return 1 if _is_depthwise(own) else int(own.get_weights()[0].shape[-2])

    def silence(self, layer: str, channels: Iterable[int]) -> None:
        """See :class:`Target`."""
        own = self.model.get_layer(layer)
        chosen = sorted(channels)
        norm = self.norm_behind(own)
        if norm is None:
            values = own.get_weights()
            by_channel = _by_channel(values[0], depthwise=_is_depthwise(own)).copy()
            by_channel[chosen] = 0.0
            values[0] = _by_channel_back(by_channel, values[0].shape, depthwise=_is_depthwise(own))
            if own.use_bias:
                values[1][chosen] = 0.0
            own.set_weights(values)
            return
        for variable in (norm.gamma, norm.beta):
            if variable is not None:
                value = variable.numpy()
                value[chosen] = 0.0
                variable.assign(value)
        if norm.gamma is None or norm.beta is None:
            raise ModelError(f"layer {norm.name}", got="a batch-norm without scale or centre", expected="both")

    def zero(self, layer: str, weights: Bools) -> None:
        """See :class:`Target`."""
        own = self.model.get_layer(layer)
        values = own.get_weights()
        by_channel = np.where(weights, 0.0, _by_channel(values[0], depthwise=_is_depthwise(own)))
        values[0] = _by_channel_back(by_channel, values[0].shape, depthwise=_is_depthwise(own))
        own.set_weights(values)

    def branches(self) -> tuple[Branch, ...]:
        """See :class:`Target`."""
        import keras

        found: list[Branch] = []
        for dense in self.model.layers:
            if not isinstance(dense, keras.layers.Dense) or isinstance(dense.input, list):
                continue
            merge = dense.input._keras_history.operation
            if not isinstance(merge, keras.layers.Concatenate) or len(dense.input.shape) != 2:
                continue
            parts = [(_name_of(part), _ancestors(part), int(part.shape[-1])) for part in merge.input]
            sizes = [sum(int(np.prod(w.shape)) for layer in own.values() for w in layer.weights) for _, own, _ in parts]
            found += _separate(dense.name, [(n, set(own), w) for n, own, w in parts], sizes)
        return tuple(found)

    def cut(self, branch: Branch) -> None:
        """See :class:`Target`."""
        import keras

        dense = self.model.get_layer(branch.layer)
        values = dense.get_weights()
        values[0][list(branch.columns)] = 0.0
        dense.set_weights(values)
        parts = [part for part in dense.input._keras_history.operation.input if _name_of(part) != branch.name]
        behind = _chain(dense)
        if behind is None:
            return
        x = parts[0] if len(parts) == 1 else keras.layers.Concatenate()(parts)
        kept = keras.layers.Dense(
            dense.units, dense.activation, use_bias=dense.use_bias, name=f"{dense.name}_without_module"
        )
        x = kept(x)
        kept.set_weights([np.delete(values[0], list(branch.columns), axis=0), *values[1:]])
        for layer in behind:
            x = layer(x)
        # A copy has layers that stand in one graph alone.
        self.model = KerasTarget(keras.Model(self.model.inputs, x)).copy().model

    def tapped(self, taps: Sequence[Tap]) -> tuple[str, ...]:
        """See :class:`Target`."""
        there = {layer.name for layer in self.model.layers}
        return _tapped(taps, lambda tap: tap.source_layer, there)

    def classes(self, images: npt.NDArray[np.uint8]) -> Ints:
        """See :class:`Target`."""
        return run(self.model, images).argmax(axis=1).astype(np.int64)

    def norm_behind(self, layer: Any) -> Any:
        """The batch-norm that alone reads a layer, None where there is none."""
        import keras

        nodes = layer._outbound_nodes
        after = nodes[0].operation if len(nodes) == 1 else None
        return after if isinstance(after, keras.layers.BatchNormalization) else None


def _norm_weights(norm: Any) -> tuple[Floats, Floats, Floats, Floats]:
    width = norm.moving_mean.shape[0]
    gamma = norm.gamma.numpy() if norm.gamma is not None else np.ones(width, np.float32)
    beta = norm.beta.numpy() if norm.beta is not None else np.zeros(width, np.float32)
    return gamma, beta, norm.moving_mean.numpy(), norm.moving_variance.numpy()


def _tapped(taps: Sequence[Tap], name_of: Callable[[Tap], str], there: Collection[str]) -> tuple[str, ...]:
    """The names of taps that are there, each once; the logits have no tap of their own."""
    names = dict.fromkeys(name_of(tap) for tap in taps if tap.kind != "logit")
    return tuple(name for name in names if name in there)


def _name_of(tensor: Any) -> str:
    return str(tensor._keras_history.operation.name)


def _chain(layer: Any) -> list[Any] | None:
    """The layers behind a layer up to the output; None where they are no chain."""
    found: list[Any] = []
    while layer._outbound_nodes:
        if len(layer._outbound_nodes) > 1:
            return None
        layer = layer._outbound_nodes[0].operation
        if isinstance(layer.input, list):
            return None
        found.append(layer)
    return found


def _is_depthwise(layer: Any) -> bool:
    import keras

    return isinstance(layer, keras.layers.DepthwiseConv2D)


def _by_channel(kernel: npt.NDArray[Any], *, depthwise: bool) -> Floats:
    """``[..., inputs, channels]`` (depthwise: ``[rows, columns, inputs, multiplier]``) as ``[channels, rest]``."""
    flat = kernel.reshape(-1, kernel.shape[-2] * kernel.shape[-1] if depthwise else kernel.shape[-1])
    return np.asarray(flat.T, dtype=np.float32)


def _by_channel_back(weights: npt.NDArray[Any], shape: tuple[int, ...], *, depthwise: bool) -> Floats:
    return np.asarray(weights.T.reshape(shape), dtype=np.float32)


def _ancestors(tensor: Any) -> dict[str, Any]:
    """The layers, by name, that a tensor is computed from; the input's and those without weights among them."""
    found: dict[str, Any] = {}
    waiting = [tensor]
    while waiting:
        layer = waiting.pop()._keras_history.operation
        if layer.name in found:
            continue
        found[layer.name] = layer
        if getattr(layer, "_inbound_nodes", None) and layer._inbound_nodes[0].input_tensors:
            waiting += layer._inbound_nodes[0].input_tensors
    return {name: layer for name, layer in found.items() if layer.weights}


def _separate(layer: str, parts: Sequence[tuple[str, set[Any], int]], sizes: Sequence[int]) -> list[Branch]:
    """The parts of a merge that share no weights with any other, but the largest."""
    found: list[Branch] = []
    start = 0
    for place, (name, own, width) in enumerate(parts):
        others = set().union(*(other for at, (_, other, _) in enumerate(parts) if at != place))
        if own and others and own.isdisjoint(others) and sizes[place] < max(sizes):
            found.append(Branch(layer=layer, columns=range(start, start + width), weights=sizes[place], name=name))
        start += width
    return found


class TfliteTarget:
    """A float32 or int8 ``.tflite`` file; a guard in it is taken off.

    Args:
        content: the file. One from outside must have passed ``converters.untrusted.probe``.

    Raises:
        ModelError: it is damaged.
    """

    trainable = False

    def __init__(self, content: bytes) -> None:
        self._associated = flatbuffer.associated(content)
        self._model = flatbuffer.parse(content)
        guard.strip(self._model)
        guard.normalise(self._model)

    @property
    def content(self) -> bytes:
        """The file as it is now, without a guard."""
        return flatbuffer.attach(flatbuffer.pack(self._model), self._associated)

    def copy(self) -> TfliteTarget:
        """See :class:`Target`."""
        twin = copy.copy(self)
        twin._model = copy.deepcopy(self._model)
        return twin

    def layers(self) -> tuple[str, ...]:
        """See :class:`Target`."""
        return tuple(self._weighted())

    def maker(self, tap: Tap) -> str:
        """See :class:`Target`."""
        graph = self._model.subgraphs[0]
        places = [i for i, t in enumerate(graph.tensors) if flatbuffer.text(t.name)[:MAX_NAME] == tap.tensor]
        by_output = {int(operator.outputs[0]): name for name, operator in self._weighted().items()}
        made = {int(o): operator for operator in graph.operators for o in operator.outputs}
        for place in places:
            at = place
            while at in made and at not in by_output:
                sources = [int(i) for i in made[at].inputs if int(i) in made]
                if len(sources) != 1:
                    break
                at = sources[0]
            if at in by_output:
                return by_output[at]
        raise ModelError(f"tensor {tap.tensor}", got="no single layer that makes it", expected="a convolution to prune")

    def kernel(self, layer: str) -> Floats:
        """See :class:`Target`."""
        operator = self._weighted()[layer]
        tensor = self._tensor(operator.inputs[1])
        values = self._values(tensor).astype(np.float32)
        axis = self._axis(operator)
        by_channel = np.moveaxis(values, axis, 0).reshape(values.shape[axis], -1)
        return np.asarray(by_channel * self._scales(tensor, len(by_channel))[:, np.newaxis], dtype=np.float32)

    def inputs(self, layer: str) -> int:
        """See :class:`Target`."""
        operator = self._weighted()[layer]
        return 1 if self._axis(operator) == 3 else int(self._tensor(operator.inputs[1]).shape[-1])

    def silence(self, layer: str, channels: Iterable[int]) -> None:
        """See :class:`Target`."""
        operator = self._weighted()[layer]
        chosen = sorted(channels)
        kernel = self.kernel(layer)
        mask = np.zeros(kernel.shape, dtype=bool)
        mask[chosen] = True
        self.zero(layer, mask)
        if len(operator.inputs) > 2 and int(operator.inputs[2]) >= 0:
            bias = self._tensor(operator.inputs[2])
            values = self._values(bias).copy()
            values[chosen] = 0
            self._write(bias, values)

    def zero(self, layer: str, weights: Bools) -> None:
        """See :class:`Target`."""
        operator = self._weighted()[layer]
        tensor = self._tensor(operator.inputs[1])
        values = self._values(tensor)
        axis = self._axis(operator)
        moved = np.moveaxis(values, axis, 0)
        changed = np.where(weights.reshape(moved.shape), 0, moved).astype(values.dtype)
        self._write(tensor, np.moveaxis(changed, 0, axis))

    def branches(self) -> tuple[Branch, ...]:
        """See :class:`Target`."""
        op = schema.BuiltinOperator
        graph = self._model.subgraphs[0]
        made = {int(o): operator for operator in graph.operators for o in operator.outputs}
        found: list[Branch] = []
        for name, operator in self._weighted().items():
            merge = made.get(int(operator.inputs[0]))
            if flatbuffer.builtin_code(self._model, operator) != op.FULLY_CONNECTED or merge is None:
                continue
            if flatbuffer.builtin_code(self._model, merge) != op.CONCATENATION:
                continue
            parts = []
            for part in (int(i) for i in merge.inputs):
                width = int(np.atleast_1d(graph.tensors[part].shape)[-1])
                parts.append((flatbuffer.text(graph.tensors[part].name), self._constants_behind(part, made), width))
            sizes = [sum(len(flatbuffer.constant(self._model, self._tensor(i))) for i in own) for _, own, _ in parts]
            found += _separate(name, parts, sizes)
        return tuple(found)

    def cut(self, branch: Branch) -> None:
        """See :class:`Target`."""
        weights = np.zeros(self.kernel(branch.layer).shape, dtype=bool)
        weights[:, list(branch.columns)] = True
        self.zero(branch.layer, weights)
        graph = self._model.subgraphs[0]
        operator = self._weighted()[branch.layer]
        merge = next(o for o in graph.operators if int(operator.inputs[0]) in [int(i) for i in o.outputs])
        parts = [int(i) for i in merge.inputs]
        kept = [i for i in parts if flatbuffer.text(graph.tensors[i].name) != branch.name]
        merged = self._tensor(operator.inputs[0])
        if len(kept) != 1 or flatbuffer.quantization(graph.tensors[kept[0]]) != flatbuffer.quantization(merged):
            return
        tensor = self._tensor(operator.inputs[1])
        values = np.delete(self._values(tensor), list(branch.columns), axis=1)
        self._write(tensor, values)
        tensor.shape = np.asarray(values.shape, np.int32)
        operator.inputs = np.asarray([kept[0], *operator.inputs[1:]], np.int32)
        self._drop_unread()

    def tapped(self, taps: Sequence[Tap]) -> tuple[str, ...]:
        """See :class:`Target`."""
        graph = self._model.subgraphs[0]
        made = {int(o) for operator in graph.operators for o in operator.outputs}
        return _tapped(taps, lambda tap: tap.tensor, {flatbuffer.text(graph.tensors[o].name)[:MAX_NAME] for o in made})

    def _drop_unread(self) -> None:
        """Remove the operators that nothing reads."""
        graph = self._model.subgraphs[0]
        read = {int(i) for i in graph.outputs}
        kept = []
        for operator in reversed(graph.operators):
            if read.isdisjoint(int(o) for o in operator.outputs):
                continue
            kept.append(operator)
            read.update(int(i) for i in operator.inputs)
        graph.operators = kept[::-1]

    def classes(self, images: npt.NDArray[np.uint8]) -> Ints:
        """See :class:`Target`."""
        from edgeguard.detection.guarded import TfliteModel

        answers = TfliteModel(self.content).predict(images)
        return np.asarray(answers.reshape(len(images), -1).argmax(axis=1), dtype=np.int64)

    def _weighted(self) -> dict[str, Any]:
        """Operators with constant weights that they alone read, by the name of what they write."""
        op, kind = schema.BuiltinOperator, schema.TensorType
        graph = self._model.subgraphs[0]
        read = np.concatenate([np.atleast_1d(operator.inputs) for operator in graph.operators])
        found: dict[str, Any] = {}
        for operator in graph.operators:
            code = flatbuffer.builtin_code(self._model, operator)
            if code not in {op.CONV_2D, op.DEPTHWISE_CONV_2D, op.FULLY_CONNECTED}:
                continue
            weights = self._tensor(operator.inputs[1])
            own = (read == int(operator.inputs[1])).sum() == 1 and bool(flatbuffer.constant(self._model, weights))
            zero = flatbuffer.quantization(weights)[1]
            if own and weights.type in {kind.INT8, kind.FLOAT32} and zero == 0:
                found[flatbuffer.text(self._tensor(operator.outputs[0]).name)] = operator
        return found

    def _axis(self, operator: Any) -> int:
        """Along which axis of the weights the channels lie."""
        op = schema.BuiltinOperator
        return 3 if flatbuffer.builtin_code(self._model, operator) == op.DEPTHWISE_CONV_2D else 0

    def _constants_behind(self, tensor: int, made: dict[int, Any]) -> set[int]:
        """The weights and biases that a tensor is computed from."""
        found: set[int] = set()
        waiting, seen = [tensor], set()
        while waiting:
            at = waiting.pop()
            if at in seen:
                continue
            seen.add(at)
            operator = made.get(at)
            inputs = [] if operator is None else [int(i) for i in operator.inputs if int(i) >= 0]
            for index in inputs:
                if index in made:
                    waiting.append(index)
            name = "" if operator is None else self._code_name(operator)
            if name in {"CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED"}:
                found.update(i for i in inputs[1:] if i not in made)
        return found

    def _code_name(self, operator: Any) -> str:
        codes = {v: k for k, v in vars(schema.BuiltinOperator).items() if isinstance(v, int)}
        return codes.get(flatbuffer.builtin_code(self._model, operator), "")

    def _tensor(self, index: Any) -> Any:
        return self._model.subgraphs[0].tensors[int(index)]

    def _values(self, tensor: Any) -> npt.NDArray[Any]:
        kind = schema.TensorType
        dtypes = {kind.INT8: "<i1", kind.FLOAT32: "<f4", kind.INT32: "<i4", kind.INT64: "<i8"}
        raw = flatbuffer.constant(self._model, tensor)
        return np.frombuffer(raw, dtypes[tensor.type]).reshape([int(n) for n in np.atleast_1d(tensor.shape)])

    def _scales(self, tensor: Any, channels: int) -> Floats:
        """One number a channel that turns stored weights into real ones; 1 where they are real."""
        found = tensor.quantization
        if found is None or found.scale is None or not len(found.scale):
            return np.ones(channels, np.float32)
        scales = np.asarray(found.scale, np.float32)
        return np.broadcast_to(scales, (channels,)).astype(np.float32)

    def _write(self, tensor: Any, values: npt.NDArray[Any]) -> None:
        """In a buffer of its own: equal constants may share one."""
        data = np.frombuffer(np.ascontiguousarray(values).tobytes(), np.uint8).copy()
        self._model.buffers.append(schema.BufferT(data=data))
        tensor.buffer = len(self._model.buffers) - 1


__all__ = ["Branch", "KerasTarget", "Target", "TfliteTarget"]
