"""Each operator of the ONNX import, over its attributes, against onnxruntime."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from benchmarks.onnx_conformance import agree, by_onnxruntime, predict
from converters.onnx_import import import_onnx
from edgeguard.errors import ModelError

OPSET = 17
RNG = np.random.default_rng(7)


def weights(*shape: int) -> np.ndarray:
    """Numbers that are different everywhere."""
    return np.asarray(RNG.normal(0, 1, shape), np.float32)


def ints(*values: int) -> np.ndarray:
    return np.asarray(values, np.int64)


def model_of(
    operator: str,
    shapes: list[list[Any]],
    constants: list[Any],
    outputs: int = 1,
    opset: int = OPSET,
    **attributes: Any,
) -> Any:
    """A model of one node: inputs of ``shapes`` first, then constants (None is an input left out)."""
    inputs = [f"x{i}" for i in range(len(shapes))]
    names = [f"c{i}" if c is not None else "" for i, c in enumerate(constants)]
    results = [f"y{i}" for i in range(outputs)]
    graph = helper.make_graph(
        [helper.make_node(operator, [*inputs, *names], results, name="node", **attributes)],
        "one",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in zip(inputs, shapes, strict=True)],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in results],
        [numpy_helper.from_array(c, n) for c, n in zip(constants, names, strict=True) if c is not None],
    )
    for output in graph.output:
        output.type.tensor_type.shape.Clear()
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    inferred = onnx.shape_inference.infer_shapes(model)
    for output, known in zip(model.graph.output, inferred.graph.output, strict=True):
        output.CopyFrom(known)
    return model


def check(model: Any, *, positive: bool = False) -> Any:
    """Compare a model with onnxruntime on random inputs; the imported one."""
    data = {}
    for value in model.graph.input:
        shape = [d.dim_value or 3 for d in value.type.tensor_type.shape.dim]
        array = RNG.normal(0, 2, shape).astype(np.float32)
        data[value.name] = np.abs(array) + 0.1 if positive else array
    imported = import_onnx(model)
    for got, want in zip(predict(imported, data), by_onnxruntime(model, [data])[0], strict=True):
        assert agree(want, got), (
            f"{want.shape} {got.shape} {np.abs(want - got).max() if want.shape == got.shape else ''}"
        )
    return imported


IMAGE = [["n", 4, 9, 8]]
SIGNAL = [["n", 4, 11]]


@pytest.mark.parametrize(
    ("shapes", "kernel", "attributes"),
    [
        (IMAGE, (6, 4, 3, 3), {}),
        (IMAGE, (6, 4, 3, 3), {"pads": [1, 1, 1, 1]}),
        (IMAGE, (6, 4, 3, 3), {"pads": [1, 1, 1, 1], "strides": [2, 2]}),
        (IMAGE, (6, 4, 3, 2), {"pads": [0, 1, 2, 0]}),
        (IMAGE, (6, 4, 3, 3), {"dilations": [2, 2], "pads": [2, 2, 2, 2]}),
        (IMAGE, (6, 4, 3, 3), {"dilations": [2, 1], "strides": [2, 2]}),
        (IMAGE, (6, 4, 3, 3), {"auto_pad": "SAME_UPPER", "strides": [2, 2]}),
        (IMAGE, (6, 4, 4, 4), {"auto_pad": "SAME_LOWER"}),
        (IMAGE, (6, 4, 3, 3), {"auto_pad": "VALID", "kernel_shape": [3, 3]}),
        (IMAGE, (6, 2, 3, 3), {"group": 2}),
        (IMAGE, (4, 1, 3, 3), {"group": 4, "pads": [1, 1, 1, 1]}),
        (IMAGE, (8, 1, 3, 3), {"group": 4, "strides": [2, 2]}),
        (IMAGE, (4, 1, 3, 3), {"group": 4, "strides": [2, 1]}),
        (IMAGE, (4, 1, 3, 3), {"group": 4, "strides": [2, 2], "dilations": [2, 2]}),
        (SIGNAL, (6, 4, 3), {"strides": [2]}),
        (SIGNAL, (6, 4, 3), {"dilations": [3], "pads": [3, 2]}),
        (SIGNAL, (6, 2, 3), {"group": 2}),
        (SIGNAL, (8, 1, 3), {"group": 4}),
        ([["n", 2, 5, 6, 4]], (3, 2, 2, 3, 2), {"pads": [1, 0, 0, 0, 1, 1]}),
    ],
)
@pytest.mark.parametrize("bias", [True, False])
def test_convolution(shapes: list[list[Any]], kernel: tuple[int, ...], attributes: dict[str, Any], bias: bool) -> None:
    constants = [weights(*kernel), *([weights(kernel[0])] if bias else [])]
    model = check(model_of("Conv", shapes, constants, **attributes)).model
    assert [layer.name for layer in model.layers if layer.weights] == ["node"]
    assert model.get_layer("node").trainable_weights


@pytest.mark.parametrize(
    ("shapes", "kernel", "attributes"),
    [
        (IMAGE, (4, 5, 3, 3), {}),
        (IMAGE, (4, 5, 3, 3), {"strides": [2, 3]}),
        (IMAGE, (4, 5, 3, 3), {"strides": [2, 2], "pads": [1, 1, 1, 1], "output_padding": [1, 1]}),
        (IMAGE, (4, 5, 3, 3), {"strides": [3, 3], "output_padding": [2, 1]}),
        (IMAGE, (4, 5, 2, 2), {"strides": [3, 3]}),
        (IMAGE, (4, 5, 3, 3), {"pads": [0, 1, 2, 0]}),
        (IMAGE, (4, 5, 3, 3), {"strides": [2, 2], "auto_pad": "SAME_UPPER"}),
        (IMAGE, (4, 5, 4, 4), {"strides": [3, 3], "auto_pad": "SAME_LOWER"}),
        (IMAGE, (4, 5, 3, 3), {"strides": [2, 2], "output_shape": [18, 17]}),
        (IMAGE, (4, 5, 3, 3), {"dilations": [2, 2], "pads": [1, 0, 1, 2]}),
        (IMAGE, (4, 3, 3, 3), {"group": 2, "strides": [2, 2]}),
        (SIGNAL, (4, 5, 4), {"strides": [2], "pads": [1, 1]}),
    ],
)
def test_transposed_convolution(shapes: list[list[Any]], kernel: tuple[int, ...], attributes: dict[str, Any]) -> None:
    channels = kernel[1] * attributes.get("group", 1)
    check(model_of("ConvTranspose", shapes, [weights(*kernel), weights(channels)], **attributes))


POOLS = [
    (IMAGE, {"kernel_shape": [3, 3]}),
    (IMAGE, {"kernel_shape": [2, 2], "strides": [2, 2]}),
    (IMAGE, {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}),
    (IMAGE, {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [0, 1, 2, 0]}),
    (IMAGE, {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1}),
    (IMAGE, {"kernel_shape": [3, 3], "strides": [3, 3], "pads": [1, 1, 1, 1], "ceil_mode": 1}),
    (IMAGE, {"kernel_shape": [3, 3], "strides": [2, 2], "auto_pad": "SAME_UPPER"}),
    (IMAGE, {"kernel_shape": [2, 2], "auto_pad": "SAME_LOWER"}),
    (IMAGE, {"kernel_shape": [3, 2], "auto_pad": "VALID"}),
    (SIGNAL, {"kernel_shape": [4], "strides": [3], "pads": [1, 2]}),
    ([["n", 2, 5, 6, 4]], {"kernel_shape": [2, 3, 2]}),
]


@pytest.mark.parametrize(("shapes", "attributes"), POOLS)
@pytest.mark.parametrize("operator", ["MaxPool", "AveragePool"])
def test_pooling(operator: str, shapes: list[list[Any]], attributes: dict[str, Any]) -> None:
    check(model_of(operator, shapes, [], **attributes))


@pytest.mark.parametrize(("shapes", "attributes"), POOLS)
def test_an_average_may_include_the_padding(shapes: list[list[Any]], attributes: dict[str, Any]) -> None:
    check(model_of("AveragePool", shapes, [], count_include_pad=1, **attributes))


@pytest.mark.parametrize("attributes", [{"dilations": [2, 2]}, {"dilations": [3, 1], "pads": [1, 1, 0, 1]}])
def test_pooling_with_holes(attributes: dict[str, Any]) -> None:
    check(model_of("MaxPool", IMAGE, [], kernel_shape=[2, 3], **attributes))


@pytest.mark.parametrize("operator", ["GlobalAveragePool", "GlobalMaxPool"])
@pytest.mark.parametrize("shapes", [IMAGE, SIGNAL])
def test_global_pooling(operator: str, shapes: list[list[Any]]) -> None:
    check(model_of(operator, shapes, []))


@pytest.mark.parametrize(
    ("operator", "attributes"),
    [
        *(
            (name, {})
            for name in ("Abs", "Erf", "Exp", "HardSigmoid", "HardSwish", "Neg", "Relu", "Sigmoid", "Softplus")
        ),
        *((name, {}) for name in ("Softsign", "Tanh", "Identity", "Dropout", "Selu")),
        ("LeakyRelu", {"alpha": 0.3}),
        ("Elu", {"alpha": 1.7}),
        ("Selu", {"alpha": 1.2, "gamma": 2.0}),
        ("HardSigmoid", {"alpha": 0.3, "beta": 0.4}),
        ("HardSigmoid", {"alpha": 1 / 6}),
        ("Softmax", {"axis": 1}),
        ("Softmax", {}),
        ("LogSoftmax", {"axis": 2}),
    ],
)
def test_activation(operator: str, attributes: dict[str, Any]) -> None:
    check(model_of(operator, IMAGE, [], **attributes))


@pytest.mark.parametrize("operator", ["Sqrt", "Log", "Reciprocal"])
def test_functions_of_positive_numbers(operator: str) -> None:
    check(model_of(operator, IMAGE, []), positive=True)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu(approximate: str) -> None:
    check(model_of("Gelu", SIGNAL, [], opset=20, approximate=approximate))


@pytest.mark.parametrize(("low", "high"), [(0.0, 6.0), (0.0, None), (None, 0.5), (-1.0, 1.0)])
@pytest.mark.parametrize("opset", [6, 17])
def test_clip_by_attributes_and_by_inputs(low: float | None, high: float | None, opset: int) -> None:
    limits: dict[str, Any] = {name: value for name, value in (("min", low), ("max", high)) if value is not None}
    if opset == 6:
        check(model_of("Clip", IMAGE, [], opset=6, **limits))
    else:
        constants = [None if v is None else np.asarray(v, np.float32) for v in (low, high)]
        check(model_of("Clip", IMAGE, constants if high is not None else constants[:1]))


@pytest.mark.parametrize(("low", "high"), [(2.0, -2.0), (0.0, -1.0)])
def test_where_the_limits_cross_the_upper_one_wins(low: float, high: float) -> None:
    check(model_of("Clip", IMAGE, [np.asarray(low, np.float32), np.asarray(high, np.float32)]))


@pytest.mark.parametrize("slope", [(1,), (4, 1, 1), (4, 9, 8), (9, 1), (1, 4, 1, 1)])
def test_a_learnt_slope_broadcasts(slope: tuple[int, ...]) -> None:
    model = check(model_of("PRelu", IMAGE, [weights(*slope)])).model
    assert model.get_layer("node").trainable_weights


@pytest.mark.parametrize("axis", [1, 2, 3])
@pytest.mark.parametrize("operator", ["Softmax", "LogSoftmax"])
def test_a_softmax_before_opset_13_is_over_all_axes_from_its_axis_on(operator: str, axis: int) -> None:
    check(model_of(operator, IMAGE, [], opset=11, axis=axis))


@pytest.mark.parametrize("shapes", [IMAGE, SIGNAL, [["n", 4]]])
def test_batch_normalisation(shapes: list[list[Any]]) -> None:
    constants = [weights(4), weights(4), weights(4), np.abs(weights(4)) + 0.5]
    model = check(model_of("BatchNormalization", shapes, constants, epsilon=1e-3)).model
    assert len(model.get_layer("node").trainable_weights) == 2


@pytest.mark.parametrize("size", [1, 3, 5, 9])
def test_local_response_normalisation(size: int) -> None:
    check(model_of("LRN", [["n", 7, 5, 6]], [], size=size, alpha=0.4, beta=0.6, bias=1.5))


OPERANDS = [
    ([["n", 4, 9, 8]], [(1,)]),
    ([["n", 4, 9, 8]], [()]),
    ([["n", 4, 9, 8]], [(4, 1, 1)]),
    ([["n", 4, 9, 8]], [(8,)]),
    ([["n", 4, 9, 8]], [(1, 4, 9, 8)]),
    ([["n", 4, 9, 8], ["n", 4, 9, 8]], []),
    ([["n", 4, 9, 8], ["n", 4, 1, 1]], []),
    ([["n", 4, 1, 1], ["n", 4, 9, 8]], []),
    ([[3, 4, 5], [5]], []),
    ([[3], [2, 3]], []),
]


@pytest.mark.parametrize(("shapes", "constants"), OPERANDS)
@pytest.mark.parametrize("operator", ["Add", "Sub", "Mul", "Div", "Max", "Min", "Sum", "Mean"])
def test_operands_broadcast(operator: str, shapes: list[list[Any]], constants: list[tuple[int, ...]]) -> None:
    check(
        model_of(operator, shapes, [np.asarray(np.abs(weights(*s)) + 1, np.float32) for s in constants]),
        positive=operator == "Div",
    )


@pytest.mark.parametrize(
    ("shapes", "constant"),
    [
        ([["n", 4, 4]], (4, 1)),
        ([["n", 5, 4, 4]], (4, 1)),
        ([[3, 3, 4]], (3, 1, 1)),
        ([["n", 4, 1]], (4,)),
        ([[1, 4, 4], [1, 4, 1]], None),
        ([["n", 3, 3], ["n", 1, 1]], None),
        ([["n", 3, 3], ["n", 3, 1]], None),
    ],
)
def test_a_sum_is_not_taken_for_a_bias_along_another_axis_of_the_same_length(
    shapes: list[list[Any]], constant: tuple[int, ...] | None
) -> None:
    check(model_of("Add", shapes, [] if constant is None else [weights(*constant)]))


def test_a_constant_may_stand_on_the_left() -> None:
    model = model_of("Sub", IMAGE, [weights(4, 1, 1)])
    names = list(model.graph.node[0].input)
    model.graph.node[0].input[:] = names[::-1]
    check(model)


@pytest.mark.parametrize("exponent", [2.0, 3.0, 0.5, -1.0])
def test_power(exponent: float) -> None:
    check(model_of("Pow", IMAGE, [np.asarray(exponent, np.float32)]), positive=True)


@pytest.mark.parametrize(("broadcast", "shape"), [(1, (4, 9)), (2, (9,))])
def test_before_opset_7_a_sum_names_the_axis_where_its_second_operand_starts(
    broadcast: int, shape: tuple[int, ...]
) -> None:
    b = weights(*shape)
    model = model_of("Add", IMAGE, [b], opset=6, broadcast=1, axis=broadcast)
    imported = import_onnx(model)
    x = weights(3, 4, 9, 8)
    wide = b.reshape(shape + (1,) * (4 - broadcast - len(shape)))
    assert agree(x + wide, predict(imported, {"x0": x})[0])


@pytest.mark.parametrize("attributes", [{}, {"transB": 1}, {"alpha": 0.5, "beta": 2.0}])
@pytest.mark.parametrize("bias", [(5,), (1, 5), (1,), ()])
def test_gemm(attributes: dict[str, Any], bias: tuple[int, ...]) -> None:
    kernel = weights(5, 7) if attributes.get("transB") else weights(7, 5)
    model = check(model_of("Gemm", [["n", 7]], [kernel, weights(*bias)], **attributes)).model
    assert type(model.get_layer("node")).__name__ == "Dense"


@pytest.mark.parametrize("attributes", [{"transA": 1}, {"transA": 1, "transB": 1, "beta": 0.5}])
def test_gemm_of_transposed_inputs_keeps_the_stated_batch(attributes: dict[str, Any]) -> None:
    second = [5, 7] if "transB" in attributes else [7, 5]
    check(model_of("Gemm", [[7, 3], second], [weights(3, 5)], **attributes))


@pytest.mark.parametrize(
    ("shapes", "constants"),
    [
        ([["n", 7]], [(7, 5)]),
        ([["n", 6, 7]], [(7, 5)]),
        ([["n", 2, 6, 7]], [(7, 5)]),
        ([["n", 6, 7], ["n", 7, 5]], []),
        ([["n", 2, 6, 7]], [(2, 7, 5)]),
        ([[3, 4], [4, 5]], []),
    ],
)
def test_matrix_products(shapes: list[list[Any]], constants: list[tuple[int, ...]]) -> None:
    check(model_of("MatMul", shapes, [weights(*shape) for shape in constants]))


@pytest.mark.parametrize("operator", ["ReduceMean", "ReduceMax", "ReduceMin"])
@pytest.mark.parametrize("axes", [[2, 3], [1], [-1], [1, 2, 3]])
@pytest.mark.parametrize("keepdims", [0, 1])
def test_reductions(operator: str, axes: list[int], keepdims: int) -> None:
    check(model_of(operator, IMAGE, [], axes=axes, keepdims=keepdims))


@pytest.mark.parametrize("keepdims", [0, 1])
def test_axes_of_a_sum_are_an_attribute_or_an_input(keepdims: int) -> None:
    check(model_of("ReduceSum", IMAGE, [], opset=11, axes=[2], keepdims=keepdims))
    check(model_of("ReduceSum", IMAGE, [ints(2)], keepdims=keepdims))
    check(model_of("ReduceSum", IMAGE, [], noop_with_empty_axes=1))


@pytest.mark.parametrize(
    ("operator", "opset", "constants", "attributes"),
    [
        ("Reshape", 17, [ints(0, -1)], {}),
        ("Reshape", 17, [ints(-1, 2, 2, 9, 8)], {}),
        ("Reshape", 17, [ints(0, 2, -1, 4)], {}),
        ("Flatten", 17, [], {}),
        ("Transpose", 17, [], {"perm": [0, 2, 3, 1]}),
        ("Transpose", 17, [], {"perm": [1, 0, 3, 2]}),
        ("Transpose", 17, [], {}),
        ("Slice", 17, [ints(1, 2), ints(100, -1), ints(2, 3)], {}),
        ("Slice", 17, [ints(-1), ints(-100), ints(1), ints(-2)], {}),
        ("Slice", 9, [], {"starts": [1, 0], "ends": [3, 5], "axes": [1, 2]}),
        ("Pad", 17, [ints(0, 0, 1, 2, 0, 0, 3, 0)], {}),
        ("Pad", 17, [ints(0, 1, 0, 2, 0, 1, 3, 0), np.asarray(2.5, np.float32)], {}),
        ("Pad", 17, [ints(0, 0, -1, 2, 0, 0, 3, -2)], {}),
        ("Pad", 17, [ints(0, 0, 1, 2, 0, 0, 3, 0)], {"mode": "edge"}),
        ("Pad", 17, [ints(0, 0, 1, 2, 0, 0, 3, 0)], {"mode": "reflect"}),
        ("Pad", 18, [ints(1, 2), None, ints(3)], {}),
        ("Pad", 9, [], {"pads": [0, 0, 1, 2, 0, 0, 3, 0], "value": 1.0}),
        ("Gather", 17, [np.asarray(2)], {"axis": 1}),
        ("Gather", 17, [ints(3, -1, 0)], {"axis": 2}),
        ("Gather", 17, [ints(3, 1, 0, 2).reshape(2, 2)], {"axis": 1}),
        ("Unsqueeze", 17, [ints(1, -1)], {}),
        ("Unsqueeze", 11, [], {"axes": [2]}),
        ("Cast", 17, [], {"to": TensorProto.FLOAT}),
        ("DepthToSpace", 17, [], {"blocksize": 2}),
        ("DepthToSpace", 17, [], {"blocksize": 2, "mode": "CRD"}),
    ],
)
def test_what_moves_elements(operator: str, opset: int, constants: list[Any], attributes: dict[str, Any]) -> None:
    check(model_of(operator, IMAGE, constants, opset=opset, **attributes))


@pytest.mark.parametrize(
    ("opset", "constants", "attributes"), [(17, [ints(2)], {}), (11, [], {"axes": [2]}), (17, [], {})]
)
def test_squeeze(opset: int, constants: list[Any], attributes: dict[str, Any]) -> None:
    check(model_of("Squeeze", [["n", 4, 1, 8]], constants, opset=opset, **attributes))


@pytest.mark.parametrize(
    ("opset", "constants", "attributes"),
    [(17, [ints(1, 3)], {}), (11, [], {"split": [3, 1]}), (17, [], {}), (18, [], {"num_outputs": 2})],
)
def test_split(opset: int, constants: list[Any], attributes: dict[str, Any]) -> None:
    check(model_of("Split", IMAGE, constants, outputs=2, opset=opset, axis=1, **attributes))


@pytest.mark.parametrize("axis", [1, -1])
def test_concat(axis: int) -> None:
    check(model_of("Concat", [["n", 4, 5, 5], ["n", 4, 5, 5], ["n", 4, 5, 5]], [], axis=axis))


NO_ROI = np.zeros(0, np.float32)


@pytest.mark.parametrize("mode", ["half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric"])
@pytest.mark.parametrize(
    ("kind", "nearest"), [("nearest", "floor"), ("nearest", "ceil"), ("linear", ""), ("cubic", "")]
)
@pytest.mark.parametrize("sizes", [(18, 16), (4, 4), (13, 5)])
def test_resize_to_sizes(mode: str, kind: str, nearest: str, sizes: tuple[int, int]) -> None:
    attributes: dict[str, Any] = {"mode": kind, "coordinate_transformation_mode": mode}
    if nearest:
        attributes["nearest_mode"] = nearest
    check(model_of("Resize", [[1, 4, 9, 8]], [NO_ROI, NO_ROI, ints(1, 4, *sizes)], **attributes))


@pytest.mark.parametrize(("operator", "opset"), [("Resize", 10), ("Upsample", 9)])
@pytest.mark.parametrize("mode", ["nearest", "linear"])
def test_resize_by_scales_as_older_opsets_have_it(operator: str, opset: int, mode: str) -> None:
    check(model_of(operator, [[1, 4, 9, 8]], [np.asarray([1, 1, 2, 3], np.float32)], opset=opset, mode=mode))


def test_an_embedding_is_a_trainable_layer() -> None:
    table = weights(10, 3)
    graph = helper.make_graph(
        [helper.make_node("Gather", ["table", "index"], ["y"], name="words")],
        "embedding",
        [helper.make_tensor_value_info("index", TensorProto.INT64, ["n", 5])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 5, 3])],
        [numpy_helper.from_array(table, "table")],
    )
    imported = import_onnx(helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8))
    index = np.asarray([[0, 9, 3, 3, 1]])
    assert agree(table[index], predict(imported, {"index": index})[0])
    assert imported.model.get_layer("words").trainable_weights


@pytest.mark.parametrize(
    ("operator", "opset", "constants", "attributes", "words"),
    [
        ("Resize", 13, [NO_ROI, np.ones(4, np.float32)], {"coordinate_transformation_mode": "tf_crop_and_resize"},
         "coordinate_transformation_mode = tf_crop_and_resize"),
        ("BatchNormalization", 17, [weights(4)] * 4, {"training_mode": 1}, "training_mode = 1"),
        ("BatchNormalization", 7, [weights(4)] * 4, {"spatial": 0}, "spatial = 0"),
        ("ConvTranspose", 17, [weights(4, 2, 3, 3)], {"dilations": [2, 2], "strides": [2, 2]}, "dilations = [2, 2]"),
        ("Cast", 19, [], {"to": TensorProto.FLOAT8E4M3FN}, "to = FLOAT8E4M3FN"),
        ("Dropout", 17, [np.asarray(0.5, np.float32), np.asarray(True)], {}, "training_mode = True"),
        ("Upsample", 9, [np.ones(4, np.float32)], {"mode": "cubic"}, "mode = cubic"),
        ("Reshape", 17, [ints(3, 100)], {}, "does not fit"),
        ("Conv", 17, [weights(6, 3, 3, 3)], {}, "3, 3, 3"),
    ],
)  # fmt: skip
def test_what_is_not_handled_is_refused_by_name(
    operator: str, opset: int, constants: list[Any], attributes: dict[str, Any], words: str
) -> None:
    outputs = 3 if "training_mode" in attributes else 1
    graph = helper.make_graph(
        [helper.make_node(operator, ["x", *(f"c{i}" for i in range(len(constants)))],
                          [f"y{i}" for i in range(outputs)], name="here", **attributes)],
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4, 9, 8])],
        [helper.make_tensor_value_info("y0", TensorProto.FLOAT, ["a", "b", "c", "d"])],
        [numpy_helper.from_array(c, f"c{i}") for i, c in enumerate(constants)],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    with pytest.raises(ModelError) as refusal:
        import_onnx(model)
    assert f"{operator} (here)" in str(refusal.value)
    assert words in str(refusal.value)
