"""Plans which activations of a TFLite graph the guard listens to. Pure: a model in, a plan of plain values out.

Rules enforced here:

* What can be tapped is what a convolution, a dense layer, an addition, a concatenation of channels, or a scaling with a
  fused ReLU makes; where a ReLU or a sigmoid alone reads it, that one's output. Channels lie on the last axis, numbers
  are int8 or float32.
* By default the two deepest on the way to the class output: class evidence is strongest there, and more taps cost time
  without finding more. Depth is the longest way from the input, not the place in the file. Activations with spatial
  axes go first, and of these the ones that cannot be negative, where the deeper half has any: an absolute value of its
  own is an int8 op that XNNPACK does not take, and breaks the graph in two, which costs more than the rest of the
  guard. The output itself and the dense layer before it are not taken: they hold class evidence, but no trace of how
  it came about. Nor is an activation whose means alone make the logits: the guard has these, and so they say the same.
* A separate branch, one that leads to the class output but neither to nor from the deepest activation, gets a tap of
  its own: that is where a malicious module merged before the output sits (TrojanNet, Tang et al., KDD 2020).
* Both norms of the deepest activation, of branches and of those that were named; of others the l1 norm alone: the
  l-infinity norms of a second activation found nothing more, and take time and bytes.
* All norms together stay within ``MAX_FEATURES``. Branches go first, with at most a quarter of it each, for what hides
  there is small; then the deepest activation that fits.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from converters.flatbuffer import Model, builtin_code, constant, text
from edgeguard.contract.messages import MAX_FEATURES
from edgeguard.errors import ConfigError, ModelError

Norm = Literal["linf", "l1"]
NORMS: tuple[Norm, ...] = ("linf", "l1")
NORMS_PER_CHANNEL = len(NORMS)
MAX_BRANCHES = 2
MAX_LOGITS = 256
MAX_NAME = 512
"""How much of a tensor's name stands in the guard's metadata."""

Op = schema.BuiltinOperator
Kind = schema.TensorType

_TYPES: dict[int, Literal["int8", "float32"]] = {Kind.INT8: "int8", Kind.FLOAT32: "float32"}
_WEIGHTED = frozenset({Op.CONV_2D, Op.DEPTHWISE_CONV_2D, Op.TRANSPOSE_CONV, Op.FULLY_CONNECTED})
_MAKERS = _WEIGHTED | {Op.ADD}
_POOLS = frozenset({Op.MAX_POOL_2D, Op.AVERAGE_POOL_2D})
_REDUCERS = frozenset({Op.MEAN, Op.SUM, Op.REDUCE_MAX, Op.AVERAGE_POOL_2D})
_MEANS = frozenset({Op.MEAN, Op.SUM, Op.AVERAGE_POOL_2D})
_ARITHMETIC = frozenset({Op.ADD, Op.SUB, Op.MUL, Op.DIV, Op.MAXIMUM, Op.MINIMUM})
_RESHAPING = frozenset({Op.RESHAPE, Op.SQUEEZE, Op.EXPAND_DIMS})
_CASTING = frozenset({Op.QUANTIZE, Op.DEQUANTIZE})

_RELUS = frozenset({schema.ActivationFunctionType.RELU, schema.ActivationFunctionType.RELU6})
_FUSING = _WEIGHTED | _POOLS | {Op.ADD, Op.SUB, Op.MUL, Op.DIV}
_ACTIVATIONS = frozenset({Op.RELU, Op.RELU6, Op.LOGISTIC})
_PASSED = _ACTIVATIONS | _RESHAPING | {Op.MAX_POOL_2D}
_POSITIVE = _ACTIVATIONS | {Op.ABS, Op.SQUARE, Op.SQUARED_DIFFERENCE, Op.EXP, Op.SQRT, Op.SOFTMAX}
# Their output is not negative where their inputs are not.
_KEEPING = (
    _POOLS
    | _RESHAPING
    | _CASTING
    | {Op.ADD, Op.MUL, Op.MAXIMUM, Op.MINIMUM, Op.CONCATENATION, Op.PACK, Op.UNPACK, Op.SPLIT, Op.SPLIT_V}
    | {Op.SLICE, Op.STRIDED_SLICE, Op.GATHER, Op.PAD, Op.PADV2, Op.MIRROR_PAD, Op.TILE, Op.BROADCAST_TO}
    | {Op.MEAN, Op.SUM, Op.REDUCE_MAX, Op.REDUCE_MIN, Op.TRANSPOSE, Op.RESIZE_BILINEAR, Op.RESIZE_NEAREST_NEIGHBOR}
    | {Op.DEPTH_TO_SPACE, Op.SPACE_TO_DEPTH, Op.SPACE_TO_BATCH_ND, Op.BATCH_TO_SPACE_ND}
)
_SOFTMAX = frozenset({Op.SOFTMAX, Op.LOG_SOFTMAX})
# What may stand between the last weights and the output.
_TAIL = (
    _SOFTMAX
    | _ACTIVATIONS
    | _ARITHMETIC
    | _RESHAPING
    | _CASTING
    | {Op.TANH, Op.ELU, Op.LEAKY_RELU, Op.PRELU, Op.GELU, Op.HARD_SWISH, Op.RELU_N1_TO_1, Op.RELU_0_TO_1}
    | {Op.EXP, Op.NEG, Op.CONCATENATION, Op.PACK, Op.UNPACK, Op.SPLIT, Op.SLICE, Op.STRIDED_SLICE, Op.TRANSPOSE}
    | {Op.L2_NORMALIZATION}
)


@dataclass(frozen=True, kw_only=True)
class PlannedTap:
    """One activation: its tensor, its channels (last axis), the axes to reduce, and how its numbers are stored.

    ``norms`` are what the guard takes of it.
    """

    tensor: int
    name: str
    source_layer: str
    channels: int
    axes: tuple[int, ...]
    signed: bool
    dtype: Literal["int8", "float32"]
    scale: float
    zero_point: int
    norms: tuple[Norm, ...] = NORMS


@dataclass(frozen=True, kw_only=True)
class TapPlan:
    """What to listen to, and which output holds the classes (None for a model without).

    ``logits`` are the classes' scores before the softmax, where the guard can use them. ``dynamic_batch`` is true where
    a tapped tensor's batch is open: it is 1 in the file, any size at run time.
    """

    taps: tuple[PlannedTap, ...]
    class_output: int | None
    classes: int
    logits: PlannedTap | None = None
    dynamic_batch: bool = False


def plan_taps(model: Model, *, count: int = 2, names: Sequence[str] = (), layers: Sequence[str] = ()) -> TapPlan:
    """Choose the taps of a checked, unguarded model; they come in the order of the graph.

    Args:
        model: as ``flatbuffer.parse`` gives it.
        count: how many activations, separate branches aside; fewer where fewer fit.
        names: the activations to take instead: each a tensor's name, a source layer, or a prefix or suffix of one
            (also of one of the names that the converter joined with semicolons) that only one activation has.
        layers: layer names of the trainable model, to name each tap's source layer.

    Raises:
        ConfigError: ``count`` below 1.
        ModelError: a batch other than one, no activation that can be tapped, a name that fits none or several, or
            named activations with more norms than ``MAX_FEATURES``.
    """
    if count < 1:
        raise ConfigError("number of taps", got=count, expected="at least 1")
    graph = _index(model)
    candidates = _candidates(graph, layers)
    class_output, classes = _classes(graph)
    if names:
        chosen = _named(candidates, names)
    else:
        targets = graph.outputs if class_output is None else graph.outputs[class_output : class_output + 1]
        answered = class_output is not None and _logits(graph, class_output, classes, lambda name: "") is not None
        summed_up = _summed_up(graph, targets[0]) if answered else None
        chosen = _chosen(graph, candidates, targets, count, summed_up=summed_up)
    ordered = [c.tap for c in sorted(chosen, key=lambda c: c.order)]
    return _plan(graph, ordered, class_output, classes, lambda name: source_layer(name, layers))


def plan_tensors(model: Model, tensors: Mapping[int, tuple[Norm, ...]], source_layers: Mapping[str, str]) -> TapPlan:
    """The plan that listens to given activations of a checked, unguarded model, in their order: to calibrate anew.

    Args:
        model: as ``flatbuffer.parse`` gives it.
        tensors: indices of the activations, and the norms of each.
        source_layers: the source layer of each, by the tensor's name as the guard's metadata has it.

    Raises:
        ModelError: a batch other than one, or a tensor that cannot be tapped.
    """
    graph = _index(model)
    _check_batch(graph)
    signs = _non_negative(graph)
    made = {o for node in graph.nodes for o in node.outputs}
    taps: list[PlannedTap] = []
    for tensor, norms in tensors.items():
        if tensor not in made or not _is_tappable(graph, tensor):
            raise ModelError(f"tensor {tensor}", got="nothing that can be tapped", expected="an activation")
        name = text(graph.tensors[tensor].name)[:MAX_NAME]
        tap = _describe(graph, tensor, signed=tensor not in signs, layer=source_layers.get(name, ""))
        taps.append(replace(tap, norms=norms))
    return _plan(graph, taps, *_classes(graph), lambda name: source_layers.get(name[:MAX_NAME], ""))


def _plan(
    graph: _Graph,
    taps: Sequence[PlannedTap],
    class_output: int | None,
    classes: int,
    layer_of: Callable[[str], str],
) -> TapPlan:
    room = MAX_FEATURES - sum(len(tap.norms) * tap.channels for tap in taps)
    return TapPlan(
        taps=tuple(taps),
        class_output=class_output,
        classes=classes,
        logits=None if class_output is None or classes > room else _logits(graph, class_output, classes, layer_of),
        dynamic_batch=any(_signature(graph.tensors[tap.tensor])[:1] == (-1,) for tap in taps),
    )


def _logits(graph: _Graph, class_output: int, classes: int, layer_of: Callable[[str], str]) -> PlannedTap | None:
    """What the softmax of the class output takes; the output itself where there is none; None where it cannot be used.

    More than ``MAX_LOGITS`` classes would make the guard larger than it may be.
    """
    output = graph.outputs[class_output]
    ways = graph.ancestors([output], through=_RESHAPING | _CASTING)
    taken = [node.inputs[0] for node in graph.nodes if node.code in _SOFTMAX and not ways.isdisjoint(node.outputs)]
    tensor = taken[0] if taken else output
    if classes > MAX_LOGITS or graph.shape(tensor) != (1, classes) or not _is_tappable(graph, tensor):
        return None
    layer = layer_of(text(graph.tensors[tensor].name))
    return replace(_describe(graph, tensor, signed=True, layer=layer), axes=())


def tappable(model: Model, *, layers: Sequence[str] = ()) -> tuple[PlannedTap, ...]:
    """Every activation of a checked, unguarded model that could be tapped, in the order of the graph.

    Raises:
        ModelError: a batch other than one.
    """
    candidates = _candidates(_index(model), layers)
    return tuple(c.tap for c in candidates if _features([c]) <= MAX_FEATURES)


@dataclass(frozen=True)
class _Node:
    """One operator, absent inputs left out."""

    code: int
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    options: Any


@dataclass(frozen=True)
class _Graph:
    """A model's nodes in the order of execution, and the sweeps over them. Each is linear in the operands."""

    model: Model
    tensors: Sequence[Any]
    nodes: tuple[_Node, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    readers: dict[int, list[int]]
    """Tensor to the nodes that read it."""

    def ancestors(self, tensors: Iterable[int], *, through: frozenset[int] | None = None) -> set[int]:
        """The tensors and all that they are computed from; with ``through``, past these operators alone."""
        found = set(tensors)
        for node in reversed(self.nodes):
            if (through is None or node.code in through) and not found.isdisjoint(node.outputs):
                found.update(node.inputs)
        return found

    def descendants(self, tensors: Iterable[int]) -> set[int]:
        """The tensors and all that is computed from them."""
        found = set(tensors)
        for node in self.nodes:
            if not found.isdisjoint(node.inputs):
                found.update(node.outputs)
        return found

    def related(self, tensor: int) -> set[int]:
        """The tensor, its ancestors and its descendants."""
        return self.ancestors([tensor]) | self.descendants([tensor])

    def shape(self, tensor: int) -> tuple[int, ...]:
        """Sizes of a tensor; an open one counts as 1."""
        return _numbers(self.tensors[tensor].shape)


@dataclass(frozen=True)
class _Candidate:
    """An activation that could be tapped.

    ``depth`` counts makers on the longest way from the input, ``order`` is the place of its maker in the file.
    ``spatial`` is whether it has axes to reduce that were not reduced before it; ``head`` whether no weights follow.
    """

    tap: PlannedTap
    depth: int
    order: int
    spatial: bool
    head: bool


def _index(model: Model) -> _Graph:
    graph = model.subgraphs[0]
    nodes = tuple(
        _Node(
            builtin_code(model, operator),
            tuple(i for i in _numbers(operator.inputs) if i >= 0),
            _numbers(operator.outputs),
            operator.builtinOptions,
        )
        for operator in graph.operators
    )
    readers: dict[int, list[int]] = {}
    for number, node in enumerate(nodes):
        for tensor in dict.fromkeys(node.inputs):
            readers.setdefault(tensor, []).append(number)
    return _Graph(model, graph.tensors, nodes, _numbers(graph.inputs), _numbers(graph.outputs), readers)


def _numbers(values: Any) -> tuple[int, ...]:
    return () if values is None else tuple(np.atleast_1d(values).tolist())


def _signature(tensor: Any) -> tuple[int, ...]:
    return _numbers(tensor.shapeSignature)


def _candidates(graph: _Graph, layers: Sequence[str]) -> list[_Candidate]:
    """In the order of the graph."""
    _check_batch(graph)
    signs = _non_negative(graph)
    # An output that the graph reads on is an activation like others.
    ends = {o for o in graph.outputs if o not in graph.readers}
    tail = graph.ancestors(ends, through=_TAIL)
    pooled = _pooled(graph)
    depths = dict.fromkeys(graph.inputs, 0)
    found: list[_Candidate] = []
    for order, node in enumerate(graph.nodes):
        live = [depths[i] for i in node.inputs if i in depths]
        if not live:  # computed from constants alone, such as weights that are stored in half precision
            continue
        made = node.outputs[0] if node.outputs and _is_maker(graph, node) else None
        depths.update(dict.fromkeys(node.outputs, max(live) + (made is not None)))
        if made is None or made in ends:
            continue
        tensor = _activated(graph, made, signs, ends)
        if not _is_tappable(graph, tensor):
            continue
        layer = source_layer(text(graph.tensors[tensor].name), layers)
        tap = _describe(graph, tensor, signed=tensor not in signs, layer=layer)
        spatial = bool(tap.axes) and tensor not in pooled
        found.append(_Candidate(tap, depths[made], order, spatial, head=made in tail))
    return found


def _check_batch(graph: _Graph) -> None:
    for tensor in graph.inputs:
        batch = graph.shape(tensor)[:1]
        if batch != (1,):
            got = f"a batch of {batch[0]}" if batch else "an input without a batch axis"
            raise ModelError("model file", got=got, expected="a batch of 1", do="export it so")


def _is_maker(graph: _Graph, node: _Node) -> bool:
    if node.code == Op.CONCATENATION:
        rank = len(graph.shape(node.outputs[0]))
        return rank >= 3 and node.options.axis % rank == rank - 1
    return node.code in _MAKERS or (node.code == Op.MUL and _fused(node) in _RELUS)


def _fused(node: _Node) -> int:
    return int(getattr(node.options, "fusedActivationFunction", schema.ActivationFunctionType.NONE))


def _activated(graph: _Graph, tensor: int, signs: set[int], ends: set[int]) -> int:
    """The output of the ReLU or sigmoid that alone reads a tensor; the tensor itself where there is none.

    A maximum over windows commutes with a ReLU, and a reshape may leave positions and channels what they are: both may
    stand between the two.
    """
    at = tensor
    while at not in signs:
        readers = graph.readers.get(at, [])
        node = graph.nodes[readers[0]] if len(readers) == 1 else None
        if node is None or node.code not in _PASSED or node.inputs[0] != at:
            return tensor
        at = node.outputs[0]
        kept = graph.shape(at)[-1:] == graph.shape(tensor)[-1:]
        if at in ends or not kept or _is_extended(graph, at) != _is_extended(graph, tensor):
            return tensor
    return at


def _pooled(graph: _Graph) -> set[int]:
    """The tensors of one position behind a reduction over all: gates, and what classifies. Strides do not count."""
    found: set[int] = set()
    for node in graph.nodes:
        reduced = node.code in _REDUCERS and _is_extended(graph, node.inputs[0])
        if reduced or not found.isdisjoint(node.inputs):
            found.update(i for i in node.outputs if not _is_extended(graph, i))
    return found


def _is_extended(graph: _Graph, tensor: int) -> bool:
    """Whether there is more than one position between batch and channels."""
    shape = graph.shape(tensor)
    sizes = zip(shape, _signature(graph.tensors[tensor]) or shape, strict=True)
    return any(size > 1 or signature == -1 for size, signature in list(sizes)[1:-1])


def _is_tappable(graph: _Graph, index: int) -> bool:
    tensor, shape = graph.tensors[index], graph.shape(index)
    return tensor.type in _TYPES and len(shape) >= 2 and shape[0] == 1 and _signature(tensor)[-1:] != (-1,)


def _describe(graph: _Graph, index: int, *, signed: bool, layer: str) -> PlannedTap:
    tensor, shape = graph.tensors[index], graph.shape(index)
    scale, zero_point = 0.0, 0
    if tensor.type == Kind.INT8:
        scales = () if tensor.quantization is None else _reals(tensor.quantization.scale)
        if len(scales) != 1:
            raise ModelError(f"tensor {label(text(tensor.name))}", got="int8 without one scale", expected="one scale")
        scale, zero_point = scales[0], _zero_point(tensor)
    return PlannedTap(
        tensor=index,
        name=text(tensor.name),
        source_layer=layer,
        channels=shape[-1],
        axes=tuple(range(1, len(shape) - 1)),
        signed=signed,
        dtype=_TYPES[tensor.type],
        scale=scale,
        zero_point=zero_point,
    )


def _reals(values: Any) -> tuple[float, ...]:
    return () if values is None else tuple(float(v) for v in np.atleast_1d(values))


def _zero_point(tensor: Any) -> int:
    return (_numbers(tensor.quantization.zeroPoint) or (0,))[0] if tensor.quantization is not None else 0


def source_layer(tensor_name: str, layers: Sequence[str]) -> str:
    """The layer that a tensor's name speaks of: the converter joins ``model/layer/op`` names with semicolons.

    Keras numbers a layer's name again when it is traced, hence ``relu2_1`` for ``relu2``. Empty when none fits.
    """
    known = set(layers)
    for path in tensor_name.split(";"):
        for part in path.split("/"):
            for name in (part, re.sub(r"_\d+$", "", part)):
                if name in known:
                    return name
    return ""


def _non_negative(graph: _Graph) -> set[int]:
    """The activations that cannot be negative, by how they are made, int8 ones also by their zero point."""
    known: dict[int, bool] = {}
    for node in graph.nodes:
        by_itself = node.code in _POSITIVE or (node.code in _FUSING and _fused(node) in _RELUS)
        keeps = node.code in _KEEPING and _fused(node) == schema.ActivationFunctionType.NONE
        for index in node.outputs:
            tensor = graph.tensors[index]
            if tensor.type in _TYPES:
                known[index] = (
                    (tensor.type == Kind.INT8 and _zero_point(tensor) == -128)
                    or by_itself
                    or (keeps and _all_non_negative(graph, node.inputs, known))
                )
    return {index for index, sign in known.items() if sign}


def _all_non_negative(graph: _Graph, tensors: Sequence[int], known: dict[int, bool]) -> bool:
    """Whether no value among an operator's inputs can be negative; whole numbers are axes and sizes, not values."""
    values_of = [i for i in tensors if graph.tensors[i].type not in {Kind.INT32, Kind.INT64}]
    for index in values_of:
        tensor = graph.tensors[index]
        if index not in known:
            values = np.frombuffer(constant(graph.model, tensor), "<f4") if tensor.type == Kind.FLOAT32 else np.empty(0)
            known[index] = bool(values.size and values.min() >= 0)
        if not known[index]:
            return False
    return bool(values_of)


def _features(candidates: Iterable[_Candidate]) -> int:
    return NORMS_PER_CHANNEL * sum(c.tap.channels for c in candidates)


def _depth(candidate: _Candidate) -> tuple[int, int]:
    return candidate.depth, candidate.order


def _chosen(
    graph: _Graph, candidates: list[_Candidate], targets: Iterable[int], count: int, *, summed_up: int | None
) -> list[_Candidate]:
    """The default choice among what leads to the target outputs; ``summed_up`` only where there is nothing else."""
    relevant = graph.ancestors(targets)
    candidates = [c for c in candidates if c.tap.tensor in relevant]
    bodies = [c for c in candidates if not c.head]
    if not bodies:
        raise ModelError(
            "model file",
            got="no activation that the guard can listen to",
            expected="an int8 or float32 convolution, addition or dense layer before the last",
        )
    # Of any sign and width, so that the join of parallel paths is found though it may not be what is tapped.
    deepest = max([c for c in bodies if c.spatial] or bodies, key=_depth).tap.tensor
    branches = _branches(graph, candidates, deepest)
    ways = graph.ancestors([deepest])
    path = [c for c in bodies if c.tap.tensor in ways]
    path = [c for c in path if c.tap.tensor != summed_up] or path
    narrowest = min(_features([c]) for c in path)
    while branches and narrowest + _features(branches) > MAX_FEATURES:
        branches.pop()
    first, *others = _main(graph, path, count, MAX_FEATURES - _features(branches))
    return [*branches, first, *(replace(c, tap=replace(c.tap, norms=("l1",))) for c in others)]


def _summed_up(graph: _Graph, output: int) -> int | None:
    """The activation whose means over all positions, times one layer's weights and with nothing else, make an output.

    None where there is no such activation, or where it is read for something else too.
    """
    live = graph.descendants(graph.inputs)
    at, weights = output, 0
    for node in reversed(graph.nodes):
        if at not in node.outputs:
            continue
        made = at
        # Whole numbers are axes and sizes, not values.
        taken = {i for i in node.inputs if i in live and graph.tensors[i].type in _TYPES}
        if len(taken) != 1:  # what is merged here adds to what the means say, as a malicious module does
            return None
        (at,) = taken
        weights += node.code in _WEIGHTED
        if _is_extended(graph, at):
            # Of channels, not of positions alone, where they are no longer as many.
            summed = node.code in _MEANS and graph.shape(made)[-1:] == graph.shape(at)[-1:]
            return at if summed and weights == 1 and len(graph.readers[at]) == 1 else None
    return None


def _main(graph: _Graph, path: list[_Candidate], count: int, room: int) -> list[_Candidate]:
    """The deepest of a path that fit: by preference spatial, of several channels, and such that cannot be negative."""
    fitting = [c for c in path if _features([c]) <= room]
    if not fitting:
        raise ModelError(
            "model file",
            got=f"no activation of at most {room // NORMS_PER_CHANNEL} channels",
            expected=f"one whose norms fit into {room} features",
        )
    usable = [c for c in fitting if c.spatial] or fitting
    # A single channel is a gate or the variance of a normalisation.
    usable = [c for c in usable if c.tap.channels > 1] or usable
    half = max(c.depth for c in usable) / 2
    if any(c.depth >= half and not c.tap.signed for c in usable):
        usable = [c for c in usable if not c.tap.signed]
    chosen: list[_Candidate] = []
    held: set[int] = set()
    tried = 0
    for candidate in sorted(usable, key=_depth, reverse=True):
        if tried == count:
            break
        if candidate.tap.tensor in held:
            continue
        tried += 1
        if _features([*chosen, candidate]) <= room:
            chosen.append(candidate)
            # The channels of what was concatenated are in the concatenation already.
            held |= graph.ancestors([candidate.tap.tensor], through=frozenset({Op.CONCATENATION, *_CASTING}))
    return chosen


def _branches(graph: _Graph, candidates: list[_Candidate], deepest: int) -> list[_Candidate]:
    """The deepest of each branch that leads neither to nor from the deepest activation, at most ``MAX_BRANCHES``.

    What cannot be negative is preferred; a branch's own logits are taken only where it has nothing else.
    """
    related = graph.related(deepest)
    left = [c for c in candidates if c.tap.tensor not in related]
    chosen: list[_Candidate] = []
    while left and len(chosen) < MAX_BRANCHES:
        tip = max(left, key=_depth).tap.tensor
        ways = graph.ancestors([tip])
        branch = [c for c in left if c.tap.tensor in ways and _features([c]) <= MAX_FEATURES // 4]
        branch = [c for c in branch if not c.head] or branch
        branch = [c for c in branch if not c.tap.signed] or branch
        if branch:
            chosen.append(max(branch, key=_depth))
            ways |= graph.related(chosen[-1].tap.tensor)
        left = [c for c in left if c.tap.tensor not in ways]
    return chosen


def _named(candidates: list[_Candidate], names: Sequence[str]) -> list[_Candidate]:
    chosen = {c.tap.tensor: c for c in (_find(candidates, name) for name in names)}
    features = _features(chosen.values())
    if features > MAX_FEATURES:
        raise ModelError(
            "taps",
            got=f"{features} features, {NORMS_PER_CHANNEL} per channel",
            expected=f"at most {MAX_FEATURES}",
            do="name fewer or narrower activations",
        )
    return list(chosen.values())


def _find(candidates: list[_Candidate], name: str) -> _Candidate:
    """The candidate that a name speaks of: by tensor, else by layer, else by a part of either."""
    tensors = [c for c in candidates if c.tap.name == name]
    layers = [c for c in candidates if c.tap.source_layer == name]
    parts = [
        c
        for c in candidates
        if any(part.startswith(name) or part.endswith(name) for part in (c.tap.source_layer, *c.tap.name.split(";")))
    ]
    found = tensors or layers or parts
    if len(found) == 1:
        return found[0]
    raise ModelError(
        f"tap {label(name)}",
        got=f"{len(found)} activations of that name" if found else "no activation of that name",
        expected=f"one of {', '.join(label(c.tap.name) for c in (found or candidates)[-20:])}",
        do="name a tensor, a layer, or a beginning or end of one that no other has",
    )


def label(name: str) -> str:
    """A name from a file, fit for a message: a prefix of it, which is enough to name it by."""
    return "".join(c if c.isprintable() else "?" for c in name[:120])


def _classes(graph: _Graph) -> tuple[int | None, int]:
    """Position of the output that holds one score per class, and the number of classes; None and 1 where there is none.

    It is the first ``[1, C]`` output, C > 1, that ends in a softmax; without such, the first that ends in a dense
    layer, but for a reconstruction: as many numbers as the model takes. Quantisation, reshapes and arithmetic may
    follow. A single sigmoid, several ones (labels that do not exclude each other) and an image have no classes, nor has
    an output of rank 4, because the guard takes its softmax over the last axis.
    """
    sizes = {math.prod(graph.shape(i)) for i in graph.inputs}
    logits: tuple[int | None, int] = (None, 1)
    for position, output in enumerate(graph.outputs):
        shape = graph.shape(output)
        if len(shape) != 2 or shape[1] < 2 or shape[0] != 1 or _signature(graph.tensors[output])[1:] == (-1,):
            continue
        codes = _endings(graph, output, shape[1])
        if codes & _SOFTMAX:
            return position, shape[1]
        if codes & _WEIGHTED and logits[0] is None and shape[1] not in sizes:
            logits = position, shape[1]
    return logits


def _endings(graph: _Graph, output: int, classes: int) -> set[int]:
    """The operators that make one number per class, and from which nothing but arithmetic leads to the output."""
    ways = graph.ancestors([output], through=_RESHAPING | _CASTING | _ARITHMETIC)
    return {
        node.code
        for node in graph.nodes
        if any(made in ways and math.prod(graph.shape(made)) == classes for made in node.outputs)
    }
