"""Compiles the guard into a TFLite graph, takes it out again, and fingerprints both. Flatbuffer in, flatbuffer out.

What is appended, with built-in ops only (so that LiteRT, tflite-runtime and TFLite Micro run it):

    per tap     [ABS] -> REDUCE_MAX (l-infinity norms), MEAN (l1 norms) or both over space;
                int8: CONCATENATION of both, DEQUANTIZE
    features    CONCATENATION of all and of the logits (int8: DEQUANTIZE)             = edgeguard_features [1, D]
    scores      SOFTMAX of the logits, FULLY_CONNECTED to the features expected; SUB of these from the features;
                FULLY_CONNECTED to K factors, CONCATENATION with the deviations; MUL with itself;
                FULLY_CONNECTED with ReLU, weights divided by the thresholds
                                                                                      = edgeguard_scores [1, detectors]

A model without classes has one row of expected features, and one of too many classes is treated alike.

Rules enforced here:

* the model's own tensors, operators and outputs stay as they are and where they are; the guard only appends;
* every tensor of the guard is named ``edgeguard_...``, and no other may be: that is how it is found again;
* guarding a guarded file replaces its guard.

Every op costs 0.2 to 0.3 microseconds, most of it not for what it computes. Hence: float reductions drop their axes,
which saves the RESHAPE; int8 reductions keep them, as the int8 MEAN of tflite-runtime 2.14 is fast for that alone; one
CONCATENATION before one DEQUANTIZE is cheaper than two of these.

Deviations go into the factors, not features: a float32 would lose what matters of the small difference between two
large sums. Where the file would grow too much, the two large matrices are int8 with a DEQUANTIZE each, and features are
brought to their units by a MUL.

A batch axis that is open in the model stays open in the guard.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
from ai_edge_litert import schema_py_generated as schema

from converters import flatbuffer
from converters.flatbuffer import Model, text
from converters.taps import NORMS, Norm, PlannedTap, TapPlan
from edgeguard.contract import guard as contract
from edgeguard.contract.guard import GuardMetadata, Tap
from edgeguard.detection.statistics import STEPS, Block, Statistics
from edgeguard.errors import ModelError, TrustError

Floats = npt.NDArray[np.float64]
Op = schema.BuiltinOperator
Kind = schema.TensorType

SIGNATURE = "serving_default"
_MIN_VERSIONS = {Op.REDUCE_MAX: 2, Op.MEAN: 2, Op.ABS: 2, Op.DEQUANTIZE: 2}
_NO_DIGEST = "0" * 64
LINF_STRETCH = 1.5
_MAX_JOINED = 4  # what XNNPACK's concatenation takes in every runtime


@dataclass(frozen=True)
class Compiled:
    """Statistics with their thresholds: what the score ops are made of.

    ``compact``: the two large matrices are stored in a byte an entry, for three ops more. The scores are the same.
    """

    statistics: Statistics
    thresholds: tuple[float, ...]
    compact: bool = False


def layout(plan: TapPlan) -> tuple[Tap, ...]:
    """Where each norm of each tap lies in ``edgeguard_features``."""
    taps: list[Tap] = []
    offset = 0
    for tap in plan.taps:
        for norm in tap.norms:
            taps.append(
                Tap(
                    tensor=tap.name[:512],
                    source_layer=tap.source_layer,
                    kind=norm,
                    offset=offset,
                    channels=tap.channels,
                )
            )
            offset += tap.channels
    if plan.logits is not None:
        logits = plan.logits
        taps.append(
            Tap(
                tensor=logits.name[:512],
                source_layer=logits.source_layer,
                kind="logit",
                offset=offset,
                channels=logits.channels,
            )
        )
    return tuple(taps)


def blocks(taps: Sequence[Tap]) -> tuple[Block, ...]:
    """One detector per norm, over all taps and the logits; and one of the logits alone.

    What a trigger does to ten logits is lost among two hundred norms that it leaves as they were. The l-infinity norms
    are there for local triggers, which move them far: small deviations of theirs are mostly clean inputs', and would
    raise the threshold for the other detectors. Nor do they take factors, which are there to tell small deviations.
    """
    parts = {kind: tuple(tuple(tap.columns) for tap in taps if tap.kind == kind) for kind in (*NORMS, "logit")}
    found = [
        Block(detector="linf", parts=(*parts["linf"], *parts["logit"]), stretch=LINF_STRETCH, factors=0),
        Block(detector="l1", parts=(*parts["l1"], *parts["logit"])),
    ]
    return (*found, Block(detector="logit", parts=parts["logit"])) if parts["logit"] else tuple(found)


def normalise(model: Model) -> None:
    """Give a model without a signature one, in place, so that its outputs have names to be read by."""
    if model.signatureDefs:
        return
    graph = model.subgraphs[0]
    model.signatureDefs = [
        schema.SignatureDefT(
            inputs=_maps(graph, graph.inputs),
            outputs=_maps(graph, graph.outputs),
            signatureKey=SIGNATURE.encode(),
        )
    ]


def _maps(graph: Any, indices: Sequence[int]) -> list[Any]:
    return [schema.TensorMapT(name=text(graph.tensors[int(i)].name) or f"t{i}", tensorIndex=int(i)) for i in indices]


def is_guard_tensor(tensor: Any) -> bool:
    """True for a tensor that belongs to the guard."""
    return text(tensor.name).startswith(contract.PREFIX)


def strip(model: Model) -> None:
    """Take a guard out, in place. A model without one is left as it is.

    Raises:
        ModelError: tensors of the model's own are named like a guard's, or its own ops read the guard's. Nothing is
            taken out that is not a whole guard: it could be an output of the model.
    """
    graph = model.subgraphs[0]
    own = next((i for i, t in enumerate(graph.tensors) if is_guard_tensor(t)), len(graph.tensors))
    if own == len(graph.tensors):
        return
    operators = [op for op in graph.operators if max(int(o) for o in op.outputs) < own]
    added = [text(graph.tensors[int(o)].name) for o in graph.outputs if int(o) >= own]
    if (
        added != [contract.SCORES, contract.FEATURES]
        or not any(text(m.name) == contract.METADATA_NAME for m in model.metadata or [])
        or not all(is_guard_tensor(t) for t in graph.tensors[own:])
        or any(int(i) >= own for op in operators for i in op.inputs)
    ):
        raise ModelError(
            "model file",
            got=f"tensors named {contract.PREFIX}... among its own",
            expected="that prefix for the guard alone",
            do="rename the model's tensors",
        )
    graph.tensors = graph.tensors[:own]
    graph.operators = operators
    graph.outputs = np.asarray([o for o in graph.outputs if o < own], dtype=np.int32)
    for signature in model.signatureDefs or []:
        signature.outputs = [o for o in signature.outputs if o.tensorIndex < own]
    model.metadata = [m for m in model.metadata or [] if text(m.name) != contract.METADATA_NAME]
    _trim(model)


def check_digests(model: Model, described: GuardMetadata) -> None:
    """Raise TrustError unless a guarded model is what its metadata says: neither model nor guard was changed."""
    found = (model_digest(model), guard_digest(model))
    for what, digest, expected in zip(
        ("model", "guard"), found, (described.model_digest, described.guard_digest), strict=True
    ):
        if digest != expected:
            raise TrustError(
                "guarded file",
                got=f"a {what} with digest {digest[:16]}...",
                expected=f"{expected[:16]}..., as its metadata says",
                do="fetch or convert it again: it was changed",
            )


def tapped(model: Model, described: GuardMetadata) -> dict[int, tuple[Norm, ...]]:
    """Indices of the activations that a guarded model's guard listens to, in its metadata's order, with their norms.

    Raises:
        ModelError: they are not those that the metadata names.
    """
    graph = model.subgraphs[0]
    guards = {i for i, tensor in enumerate(graph.tensors) if is_guard_tensor(tensor)}
    found: list[int] = []
    for operator in graph.operators:
        if int(operator.outputs[0]) in guards:
            found += [int(i) for i in operator.inputs if int(i) not in guards]
    by_name = {text(graph.tensors[index].name)[:512]: index for index in found}
    named = dict.fromkeys(tap.tensor for tap in described.taps)
    if set(by_name) != set(named) or len(by_name) != len(set(found)):
        raise ModelError(
            "guarded file",
            got="a guard that listens to other activations than its metadata names",
            do="convert the model again",
        )
    norms: dict[int, tuple[Norm, ...]] = {}
    for tap in described.taps:
        if tap.kind != "logit":
            index = by_name[tap.tensor]
            norms[index] = (*norms.get(index, ()), tap.kind)
    return norms


def _trim(model: Model) -> None:
    """Drop operator codes and buffers behind the last one in use, in place."""
    graph = model.subgraphs[0]
    codes = max((op.opcodeIndex for op in graph.operators), default=-1) + 1
    model.operatorCodes = model.operatorCodes[:codes]
    used = {t.buffer for t in graph.tensors} | {m.buffer for m in model.metadata or []}
    model.buffers = model.buffers[: max(used, default=0) + 1]


def model_digest(model: Model) -> str:
    """SHA-256 of the model without its guard, in canonical form: with a signature, without unused trailing parts."""
    bare = flatbuffer.parse(flatbuffer.pack(model))
    strip(bare)
    _trim(bare)
    normalise(bare)
    return flatbuffer.fingerprint(bare)


def guard_digest(model: Model) -> str:
    """SHA-256 of a guarded model's guard: its ops, its constants, and its metadata but for this very digest."""
    graph = model.subgraphs[0]
    names = [text(t.name) for t in graph.tensors]
    parts: list[object] = []
    for tensor in graph.tensors:
        if is_guard_tensor(tensor):
            parts.append([text(tensor.name), [int(n) for n in tensor.shape], int(tensor.type)])
            parts.append(flatbuffer.constant(model, tensor))
    for operator in graph.operators:
        if is_guard_tensor(graph.tensors[int(operator.outputs[0])]):
            code = flatbuffer.builtin_code(model, operator)
            parts.append([code, [names[int(i)] for i in operator.inputs], [names[int(o)] for o in operator.outputs]])
    parts.append([names[int(o)] for o in graph.outputs])
    for signature in model.signatureDefs or []:
        parts.append([[text(o.name), int(o.tensorIndex)] for o in signature.outputs])
    for entry in model.metadata or []:
        if text(entry.name) == contract.METADATA_NAME:
            described = contract.decode_metadata(bytes(np.asarray(model.buffers[entry.buffer].data, dtype=np.uint8)))
            parts.append(contract.encode_metadata(msgspec.structs.replace(described, guard_digest=_NO_DIGEST)))
    return flatbuffer.fingerprint(parts)


def bake_features(content: bytes, plan: TapPlan) -> bytes:
    """The model with ``edgeguard_features`` alone: what the statistics are measured with."""
    model = flatbuffer.parse(content)
    strip(model)
    normalise(model)
    writer = _Writer(model, open_batch=plan.dynamic_batch)
    writer.publish(_features(writer, plan)[0], contract.FEATURES)
    return flatbuffer.pack(model)


def bake(content: bytes, plan: TapPlan, compiled: Compiled, metadata: GuardMetadata) -> tuple[bytes, GuardMetadata]:
    """The guarded file. The two digests in ``metadata`` are set here.

    Args:
        content: the model, guarded or not.
        plan: as ``taps.plan_taps`` made it for this very model without guard.
        compiled: statistics and thresholds.
        metadata: what the file shall say of itself.

    Returns:
        The file, and the metadata as it stands in it.
    """
    model = flatbuffer.parse(content)
    strip(model)
    normalise(model)
    own = model_digest(model)
    writer = _Writer(model, open_batch=plan.dynamic_batch)
    features, logits = _features(writer, plan)
    writer.publish(_scores(writer, compiled, features, logits), contract.SCORES)
    writer.publish(features, contract.FEATURES)
    described = msgspec.structs.replace(metadata, model_digest=own, guard_digest=_NO_DIGEST)
    contract.check_metadata(described)
    slot = writer.add_metadata(contract.encode_metadata(described))
    described = msgspec.structs.replace(described, guard_digest=guard_digest(model))
    model.buffers[slot].data = np.frombuffer(contract.encode_metadata(described), dtype=np.uint8)
    return flatbuffer.attach(flatbuffer.pack(model), flatbuffer.associated(content)), described


def _features(writer: _Writer, plan: TapPlan) -> tuple[int, int | None]:
    """The features, and the real logits among them where there are any."""
    parts = [writer.norms(tap, number) for number, tap in enumerate(plan.taps)]
    if sum(len(norms) for norms in parts) > _MAX_JOINED:
        parts = [[writer.concatenate(norms, f"edgeguard_norms{n}")] for n, norms in enumerate(parts)]
    flat = [part for norms in parts for part in norms]
    logits = None if plan.logits is None else writer.real(plan.logits.tensor, "edgeguard_logits")
    answer = [] if logits is None else [logits]
    if len({writer.rank(part) for part in (*flat, *answer)}) > 1:  # activations of one, two and no spatial axes
        same = len({writer.rank(part) for part in flat}) == 1
        if same and len(flat) > 1:
            flat = [writer.concatenate(flat, "edgeguard_joined")]
        flat = [
            part if writer.rank(part) == 2 else writer.reshape(part, f"edgeguard_flat{number}")
            for number, part in enumerate(flat)
        ]
    flat += answer
    if len(flat) > 1 and writer.rank(flat[0]) == 2:
        return writer.concatenate(flat, contract.FEATURES), logits
    joined = writer.concatenate(flat, "edgeguard_joined") if len(flat) > 1 else flat[0]
    return writer.reshape(joined, contract.FEATURES), logits


def _scores(writer: _Writer, compiled: Compiled, features: int, logits: int | None) -> int:
    statistics = compiled.statistics
    unit, width = statistics.unit, len(statistics.unit)
    usual, table, projection = statistics.centre, statistics.table, statistics.projection
    weights = statistics.weights / np.asarray(compiled.thresholds)[:, np.newaxis]
    if not compiled.compact:  # units go into the constants
        usual, table, projection = usual * unit, table * unit, projection / unit
        weights = np.concatenate([weights[:, :width] / unit**2, weights[:, width:]], axis=1)
    store = writer.bytewise if compiled.compact else writer.real_constant
    found = writer.multiply(features, 1.0 / unit, "edgeguard_scaled") if compiled.compact else features
    if logits is None:
        expected = writer.real_constant("edgeguard_expected", usual + table)
    else:
        answers = writer.softmax(logits, "edgeguard_answers")
        expected = writer.dense(answers, store("edgeguard_table", table.T), "edgeguard_expected", usual)
    deviation = extended = writer.subtract(found, expected, "edgeguard_deviation")
    if len(projection):
        projected = writer.dense(deviation, store("edgeguard_projection", projection), "edgeguard_projected")
        extended = writer.concatenate([deviation, projected], "edgeguard_extended")
    squared = writer.multiply(extended, extended, "edgeguard_squared")
    return writer.dense(squared, writer.real_constant("edgeguard_weights", weights), contract.SCORES, relu=True)


class _Writer:
    """Appends tensors and operators to a model."""

    def __init__(self, model: Model, *, open_batch: bool = False) -> None:
        self.model = model
        self._open_batch = open_batch
        self.graph = model.subgraphs[0]
        self.graph.outputs = np.asarray(self.graph.outputs, dtype=np.int32)
        self._codes: dict[int, int] = {}

    def constant(self, name: str, values: npt.NDArray[Any], quantization: tuple[float, int] | None = None) -> int:
        self.model.buffers.append(
            schema.BufferT(data=np.frombuffer(np.ascontiguousarray(values).tobytes(), dtype=np.uint8))
        )
        kinds = {"int32": Kind.INT32, "float32": Kind.FLOAT32, "int8": Kind.INT8}
        return self._tensor(name, values.shape, kinds[values.dtype.name], len(self.model.buffers) - 1, quantization)

    def real_constant(self, name: str, values: Floats) -> int:
        """A float constant."""
        return self.constant(name, values.astype(np.float32))

    def bytewise(self, name: str, values: Floats) -> int:
        """A float constant whose values are whole multiples of 1 / STEPS, stored in a byte each."""
        stored = self.constant(f"{name}_int8", np.round(values * STEPS).astype(np.int8), (1.0 / STEPS, 0))
        out = self.activation(name, values.shape, Kind.FLOAT32, fixed=True)
        options = schema.DequantizeOptionsT()
        self.operator(Op.DEQUANTIZE, [stored], out, schema.BuiltinOptions.DequantizeOptions, options)
        return out

    def activation(
        self,
        name: str,
        shape: tuple[int, ...],
        kind: int,
        quantization: tuple[float, int] | None = None,
        *,
        fixed: bool = False,
    ) -> int:
        # Buffer 0 is the empty one by the schema's convention.
        return self._tensor(name, shape, kind, 0, quantization, fixed=fixed)

    def _tensor(
        self,
        name: str,
        shape: tuple[int, ...],
        kind: int,
        buffer: int,
        quantization: tuple[float, int] | None,
        *,
        fixed: bool = False,
    ) -> int:
        parameters = None
        if quantization is not None and quantization[0]:
            scale, zero_point = quantization
            parameters = schema.QuantizationParametersT(
                scale=np.asarray([scale], dtype=np.float32),
                zeroPoint=np.asarray([zero_point], dtype=np.int64),
            )
        open_batch = self._open_batch and buffer == 0 and not fixed
        self.graph.tensors.append(
            schema.TensorT(
                name=name.encode(),
                shape=np.asarray(shape, dtype=np.int32),
                shapeSignature=np.asarray((-1, *shape[1:]), dtype=np.int32) if open_batch else None,
                type=kind,
                buffer=buffer,
                quantization=parameters,
            )
        )
        return len(self.graph.tensors) - 1

    def shape(self, tensor: int) -> tuple[int, ...]:
        """Shape of a tensor, with the batch axis."""
        return tuple(int(n) for n in self.graph.tensors[tensor].shape)

    def rank(self, tensor: int) -> int:
        """Number of axes of a tensor."""
        return len(self.shape(tensor))

    def operator(self, code: int, inputs: list[int], output: int, options_type: int = 0, options: Any = None) -> None:
        if code not in self._codes:
            self._codes[code] = len(self.model.operatorCodes)
            self.model.operatorCodes.append(
                schema.OperatorCodeT(
                    builtinCode=code, deprecatedBuiltinCode=min(code, 127), version=_MIN_VERSIONS.get(code, 1)
                )
            )
        self.graph.operators.append(
            schema.OperatorT(
                opcodeIndex=self._codes[code],
                inputs=np.asarray(inputs, dtype=np.int32),
                outputs=np.asarray([output], dtype=np.int32),
                builtinOptionsType=options_type,
                builtinOptions=options,
            )
        )

    def real(self, source: int, name: str) -> int:
        """A tensor in real numbers: itself where it is."""
        if self.graph.tensors[source].type == Kind.FLOAT32:
            return source
        out = self.activation(name, self.shape(source), Kind.FLOAT32)
        options = schema.DequantizeOptionsT()
        self.operator(Op.DEQUANTIZE, [source], out, schema.BuiltinOptions.DequantizeOptions, options)
        return out

    def softmax(self, source: int, name: str) -> int:
        """Shares of one, of float logits ``[batch, classes]``."""
        out = self.activation(name, self.shape(source), Kind.FLOAT32)
        self.operator(Op.SOFTMAX, [source], out, schema.BuiltinOptions.SoftmaxOptions, schema.SoftmaxOptionsT(beta=1.0))
        return out

    def absolute(self, tap: PlannedTap, number: int) -> int:
        kind, quantization = Kind.FLOAT32, None
        if tap.dtype == "int8":
            largest = max(127 - tap.zero_point, tap.zero_point + 128)
            kind, quantization = Kind.INT8, (tap.scale * largest / 255.0, -128)
        out = self.activation(f"edgeguard_abs{number}", self.shape(tap.tensor), kind, quantization)
        self.operator(Op.ABS, [tap.tensor], out, schema.BuiltinOptions.AbsOptions, schema.AbsOptionsT())
        return out

    def norms(self, tap: PlannedTap, number: int) -> list[int]:
        """The norms of a tap in real numbers, l-infinity first as in :func:`layout`; a tensor each, or one of both."""
        source = self.absolute(tap, number) if tap.signed else tap.tensor
        if tap.dtype == "float32":
            return [self.reduce(source, tap, norm, number, keep=False) for norm in tap.norms]
        parts = [self.reduce(source, tap, norm, number, keep=True) for norm in tap.norms]
        both = self.concatenate(parts, f"edgeguard_norms{number}") if len(parts) > 1 else parts[0]
        return [self.real(both, f"edgeguard_norms{number}_real")]

    def reduce(self, source: int, tap: PlannedTap, norm: Norm, number: int, *, keep: bool) -> int:
        """One norm over the spatial axes of a tap's non-negative activation."""
        if not tap.axes:
            return source
        axes = self.constant(f"edgeguard_{norm}_axes{number}", np.asarray(tap.axes, dtype=np.int32))
        shape = (1, *(1 for _ in tap.axes if keep), tap.channels)
        tensor = self.graph.tensors[source]
        out = self.activation(f"edgeguard_{norm}{number}", shape, tensor.type, flatbuffer.quantization(tensor))
        code = Op.REDUCE_MAX if norm == "linf" else Op.MEAN
        options = schema.ReducerOptionsT(keepDims=keep)
        self.operator(code, [source, axes], out, schema.BuiltinOptions.ReducerOptions, options)
        return out

    def concatenate(self, parts: list[int], name: str) -> int:
        """Join tensors of one type along the last axis."""
        first = self.graph.tensors[parts[0]]
        shape = (*self.shape(parts[0])[:-1], sum(self.shape(part)[-1] for part in parts))
        out = self.activation(name, shape, first.type, flatbuffer.quantization(first))
        options = schema.ConcatenationOptionsT(axis=len(shape) - 1)
        self.operator(Op.CONCATENATION, parts, out, schema.BuiltinOptions.ConcatenationOptions, options)
        return out

    def reshape(self, source: int, name: str) -> int:
        """Bring a float tensor to ``[batch, width]``."""
        width = self.shape(source)[-1]
        target = np.asarray([-1 if self._open_batch else 1, width], dtype=np.int32)
        out = self.activation(name, (1, width), Kind.FLOAT32)
        options = schema.ReshapeOptionsT(newShape=target)
        shape = self.constant(f"{name}_shape", target)
        self.operator(Op.RESHAPE, [source, shape], out, schema.BuiltinOptions.ReshapeOptions, options)
        return out

    def multiply(self, source: int, by: int | Floats, name: str) -> int:
        """A float tensor times another, or times a constant of its last axis."""
        other = by if isinstance(by, int) else self.constant(f"{name}_by", by.astype(np.float32))
        out = self.activation(name, self.shape(source), Kind.FLOAT32)
        self.operator(Op.MUL, [source, other], out, schema.BuiltinOptions.MulOptions, schema.MulOptionsT())
        return out

    def subtract(self, source: int, other: int, name: str) -> int:
        """A float tensor less another."""
        out = self.activation(name, self.shape(source), Kind.FLOAT32)
        self.operator(Op.SUB, [source, other], out, schema.BuiltinOptions.SubOptions, schema.SubOptionsT())
        return out

    def dense(self, source: int, matrix: int, name: str, bias: Floats | None = None, *, relu: bool = False) -> int:
        """A float tensor times a matrix [rows, width], plus a bias."""
        rows = self.shape(matrix)[0]
        added = self.constant(f"{name}_bias", (np.zeros(rows) if bias is None else bias).astype(np.float32))
        out = self.activation(name, (1, rows), Kind.FLOAT32)
        activation = schema.ActivationFunctionType
        options = schema.FullyConnectedOptionsT(fusedActivationFunction=activation.RELU if relu else activation.NONE)
        self.operator(
            Op.FULLY_CONNECTED,
            [source, matrix, added],
            out,
            schema.BuiltinOptions.FullyConnectedOptions,
            options,
        )
        return out

    def publish(self, tensor: int, key: str) -> None:
        """Make a tensor an output of the graph and of every signature."""
        self.graph.outputs = np.append(self.graph.outputs, np.int32(tensor))
        for signature in self.model.signatureDefs:
            signature.outputs.append(schema.TensorMapT(name=key, tensorIndex=tensor))

    def add_metadata(self, content: bytes) -> int:
        self.model.buffers.append(schema.BufferT(data=np.frombuffer(content, dtype=np.uint8)))
        slot = len(self.model.buffers) - 1
        entry = schema.MetadataT(name=contract.METADATA_NAME.encode(), buffer=slot)
        self.model.metadata = [*(self.model.metadata or []), entry]
        return slot
