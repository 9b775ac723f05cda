"""Whole ONNX models: what their import promises, and what it refuses."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import keras
import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from benchmarks import onnx_conformance as conformance
from benchmarks.onnx_conformance import agree, by_onnxruntime, predict
from converters.onnx_import import builder, graph, import_onnx, to_keras, unsupported
from edgeguard.errors import ConfigError, ModelError

RNG = np.random.default_rng(11)


def weights(*shape: int) -> np.ndarray:
    return np.asarray(RNG.normal(0, 0.5, shape), np.float32)


def model_of(nodes: list[Any], inputs: dict[str, list[Any]], outputs: dict[str, Any], **constants: np.ndarray) -> Any:
    """A model at opset 17; sizes given as text are open."""
    made = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in inputs.items()],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in outputs.items()],
        [numpy_helper.from_array(c, n) for n, c in constants.items()],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def node(operator: str, inputs: str, outputs: str, name: str = "", **attributes: Any) -> Any:
    return helper.make_node(operator, inputs.split(), outputs.split(), name=name, **attributes)


def small_network(batch: Any = "n") -> Any:
    """A convolution with squeeze-and-excitation and a residual, a view by computed shape, and a dense layer."""
    return model_of(
        [
            node("Conv", "image w1 b1", "a", "/body/conv.0/Conv", pads=[1, 1, 1, 1]),
            node("Relu", "a", "b", "/body/relu/Relu"),
            node("GlobalAveragePool", "b", "c"),
            node("Conv", "c w2 b2", "d", "/body/se/Conv"),
            node("Sigmoid", "d", "e"),
            node("Mul", "b e", "f", "/body/se/Mul"),
            node("Add", "f b", "g", "/body/Add"),
            node("MaxPool", "g", "h", kernel_shape=[2, 2], strides=[2, 2]),
            node("Shape", "h", "s"),
            node("Gather", "s zero", "s0", axis=0),
            node("Unsqueeze", "s0 front", "s1"),
            node("Concat", "s1 minus", "t", axis=0),
            node("Reshape", "h t", "i"),
            node("MatMul", "i w3", "j", "/head/MatMul"),
            node("Add", "j b3", "k", "/head/Add"),
            node("Softmax", "k", "probabilities", axis=-1),
        ],
        {"image": [batch, 3, 8, 6]},
        {"probabilities": [batch, 5]},
        w1=weights(4, 3, 3, 3), b1=weights(4), w2=weights(4, 4, 1, 1), b2=weights(4), w3=weights(48, 5), b3=weights(5),
        zero=np.asarray(0), front=np.asarray([0]), minus=np.asarray([-1]),
    )  # fmt: skip


@pytest.mark.parametrize("batch", ["n", 1, 3])
def test_a_network_answers_as_onnxruntime_on_any_batch(batch: Any) -> None:
    model = small_network(batch)
    imported = import_onnx(model)
    assert imported.model.inputs[0].shape == (None, 8, 6, 3)
    assert imported.inputs[0].order == (0, 2, 3, 1)
    image = weights(3, 3, 8, 6)
    want = by_onnxruntime(small_network("n") if batch != "n" else model, [{"image": image}])[0][0]
    if batch == "n":
        assert agree(want, predict(imported, {"image": image})[0])
    rows = [predict(imported, {"image": image[i : i + 1]})[0] for i in range(3)]
    assert agree(np.concatenate(rows), predict(imported, {"image": image})[0])


def test_layers_carry_the_names_of_their_nodes() -> None:
    model = to_keras(small_network())
    named = {layer.name: type(layer).__name__ for layer in model.layers}
    assert named["body_conv_0_Conv"] == "Conv2D"
    assert named["body_se_Mul"] == "Multiply"
    assert named["body_Add"] == "Add"
    assert named["head_MatMul"] == "Dense"
    assert all(not name.startswith(("conv2d", "dense")) for name in named)


def test_a_product_and_the_addition_behind_it_are_one_dense_layer_with_a_bias() -> None:
    model = to_keras(small_network())
    assert [w.shape for w in model.get_layer("head_MatMul").trainable_weights] == [(48, 5), (5,)]


def test_arithmetic_on_shapes_disappears() -> None:
    kinds = {type(operation).__name__ for operation in to_keras(small_network()).operations}
    assert kinds == {
        "InputLayer", "Conv2D", "ReLU", "Mean", "Sigmoid", "Multiply", "Add", "MaxPooling2D", "Transpose", "Reshape",
        "Dense", "Softmax",
    }  # fmt: skip


def test_every_weight_can_be_trained_and_the_model_saved_without_code_of_ours(tmp_path: Path) -> None:
    model = to_keras(small_network())
    model.compile("adam", "sparse_categorical_crossentropy")
    before = [np.array(w) for w in model.trainable_weights]
    images, labels = weights(16, 8, 6, 3), RNG.integers(0, 5, 16)
    model.fit(images, labels, epochs=2, verbose=0)
    assert all(not np.array_equal(b, np.array(w)) for b, w in zip(before, model.trainable_weights, strict=True))
    model.save(tmp_path / "m.keras")
    assert all(type(operation).__module__.startswith("keras.") for operation in model.operations)
    loaded = keras.models.load_model(tmp_path / "m.keras")
    assert agree(np.asarray(model(images)), np.asarray(loaded(images)))


def test_an_input_that_is_transposed_at_once_keeps_its_channels_last() -> None:
    model = model_of(
        [node("Transpose", "image", "a", perm=[0, 3, 1, 2]), node("Conv", "a w", "y")],
        {"image": ["n", 8, 6, 3]},
        {"y": ["n", 4, "h", "w"]},
        w=weights(4, 3, 3, 3),
    )
    imported = import_onnx(model)
    assert imported.model.inputs[0].shape == (None, 8, 6, 3)
    assert {type(o).__name__ for o in imported.model.operations} == {"InputLayer", "Conv2D"}
    assert imported.outputs[0].order == (0, 2, 3, 1)
    image = weights(2, 8, 6, 3)
    assert agree(by_onnxruntime(model, [{"image": image}])[0][0], predict(imported, {"image": image})[0])


def test_several_inputs_and_outputs_are_told_apart() -> None:
    model = model_of(
        [node("Conv", "left w", "a"), node("Conv", "right w", "b"), node("Sub", "a b", "d"), node("Abs", "d", "y")],
        {"left": ["n", 3, 8, 6], "right": ["n", 3, 8, 6]},
        {"y": ["n", 4, 6, 4], "b": ["n", 4, 6, 4]},
        w=weights(4, 3, 3, 3),
    )
    imported = import_onnx(model)
    data = {"left": weights(2, 3, 8, 6), "right": weights(2, 3, 8, 6)}
    for want, got in zip(by_onnxruntime(model, [data])[0], predict(imported, data), strict=True):
        assert agree(want, got)


def test_a_stated_batch_stays_where_an_operator_computes_across_it() -> None:
    nodes = [node("ReduceMean", "x", "m", axes=[0]), node("Sub", "x m", "y")]
    assert to_keras(model_of(nodes, {"x": [4, 3]}, {"y": [4, 3]})).inputs[0].shape == (4, 3)
    with pytest.raises(ModelError, match=r"ReduceMean.*across the inputs of a batch.*fixed batch"):
        to_keras(model_of(nodes, {"x": ["n", 3]}, {"y": ["n", 3]}))


def test_nodes_of_one_name_or_none_get_names_of_their_own() -> None:
    nodes = [node("Relu", "x", "a", "same"), node("Tanh", "a", "b", "same"), node("Relu", "b", "y", "SAME")]
    model = to_keras(model_of(nodes, {"x": ["n", 3]}, {"y": ["n", 3]}))
    names = [operation.name.lower() for operation in model.operations]
    assert len(set(names)) == 4


def test_all_operators_that_are_not_covered_are_named_at_once() -> None:
    model = model_of(
        [node("Einsum", "x x", "a", equation="ij,ij->ij"), node("Relu", "a", "b"), node("NonZero", "b", "y")],
        {"x": ["n", 3]},
        {"y": ["n", 3]},
    )
    model.graph.node.append(helper.make_node("Fused", ["x"], ["z"], domain="com.example"))
    assert unsupported(model) == ("Einsum", "NonZero", "com.example.Fused")
    with pytest.raises(ModelError, match=r"Einsum, NonZero, com\.example\.Fused; bring a \.tflite"):
        to_keras(model)


@pytest.mark.parametrize(
    ("nodes", "words"),
    [
        ([node("MaxPool", "x", "y i", "p", kernel_shape=[2, 2]), node("Cast", "i", "z", to=1)], "output i"),
        ([node("Conv", "x x", "y", "c")], "computed from the model's input"),
        ([node("Constant", "", "y", value_float=1.0)], "a constant"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(nodes: list[Any], words: str) -> None:
    outputs = {name: ["a", "b", "c", "d"] for name in ("y", "z") if any(name in n.output for n in nodes)}
    with pytest.raises(ModelError) as refusal:
        to_keras(model_of(nodes, {"x": [1, 1, 8, 8]}, outputs))
    assert words in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_an_open_size_other_than_the_batch_is_refused() -> None:
    with pytest.raises(ModelError, match=r"ONNX input x.*'\?'.*fixed sizes"):
        to_keras(model_of([node("Relu", "x", "y")], {"x": ["n", 3, "height", 8]}, {"y": ["n", 3, "h", 8]}))


def test_weights_in_another_file_are_refused_and_not_opened(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(bytes(48))
    model = model_of([node("MatMul", "x w", "y")], {"x": ["n", 3]}, {"y": ["n", 4]}, w=weights(3, 4))
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../secret")
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    for source in (model, tmp_path / "m.onnx"):
        with pytest.raises(ModelError, match="another file"):
            to_keras(source)


@pytest.mark.parametrize(
    "nodes",
    [
        [node("ConstantOfShape", "huge", "c"), node("Add", "x c", "y")],
        [node("Pad", "x wide", "y")],
        [node("Resize", "x none scale", "y")],
        [node("AveragePool", "x", "y", kernel_shape=[100_000, 1], pads=[90_000, 0, 90_000, 0])],
        [node("Reshape", "x many", "y")],
    ],
)
def test_a_small_file_that_asks_for_much_memory_is_refused(nodes: list[Any]) -> None:
    model = model_of(
        nodes,
        {"x": [1, 1, 2000, 1]},
        {"y": ["a", "b", "c", "d"]},
        huge=np.asarray([1 << 20, 1 << 20]),
        wide=np.asarray([0, 0, 1 << 40, 0, 0, 0, 0, 0]),
        none=np.zeros(0, np.float32),
        scale=np.asarray([1, 1, 1e7, 1], np.float32),
        many=np.asarray([2000] + [1] * 50),
    )
    with pytest.raises(ModelError):
        to_keras(model)


@pytest.mark.parametrize(
    "nodes",
    [
        [*(node("ConstantOfShape", "size", f"c{i}") for i in range(9)), node("Relu", "x", "y")],
        [node("MatMul", "x w", "a"), *(node("MatMul", f"{'abcdefgh'[i]} w", "bcdefghy"[i]) for i in range(8))],
    ],
)
def test_constants_and_weights_are_limited_together(nodes: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(nodes, {"x": ["n", 10]}, {"y": ["n", 10]}, size=np.asarray([100]), w=weights(10, 10))
    assert to_keras(model)
    monkeypatch.setattr(builder, "MAX_WEIGHTS", 850)
    with pytest.raises(ModelError, match="too many weights"):
        to_keras(model)


def test_an_attribute_that_nobody_read_is_refused() -> None:
    one = graph.Node(node("Relu", "x", "y", "here", one=1, two=2), 17, "here")
    one.take("one")
    with pytest.raises(ModelError, match=r"Relu \(here\).*two = 2"):
        one.check_all_read()
    one.ignore("two")
    one.check_all_read()


def test_a_file_that_is_too_large_or_missing_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"none\.onnx"):
        to_keras(tmp_path / "none.onnx")
    monkeypatch.setattr(graph, "MAX_BYTES", 10)
    (tmp_path / "m.onnx").write_bytes(small_network().SerializeToString())
    with pytest.raises(ModelError, match="at most"):
        to_keras(tmp_path / "m.onnx")


@given(st.binary(max_size=200))
def test_random_bytes_are_refused(content: bytes) -> None:
    with pytest.raises(ModelError):
        to_keras(content)


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.integers(0, 3000))
def test_a_truncated_file_is_refused(length: int) -> None:
    content = SMALL[: min(length, len(SMALL) - 1)]
    with pytest.raises(ModelError):
        to_keras(content)


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), min_size=1, max_size=4))
def test_a_damaged_file_is_imported_or_refused(changes: list[tuple[int, int]]) -> None:
    content = bytearray(SMALL)
    for place, value in changes:
        content[place % len(content)] = value
    try:
        model = to_keras(bytes(content))
    except ModelError:
        return
    assert isinstance(model, keras.Model)


def test_a_name_that_is_not_text_is_refused() -> None:
    with pytest.raises(ModelError, match="UTF-8"):
        to_keras(SMALL.replace(b"Sigmoid", b"Sigmo\xff\xff"))


SMALL = small_network().SerializeToString()


def test_a_real_architecture_agrees_and_wrong_padding_or_channels_do_not() -> None:
    measured = conformance.architecture(conformance.DATA / "light" / "light_squeezenet.onnx", inputs=2)
    assert measured.error < 1e-4
    assert measured.controls_differ == {"padding": True, "channels": True}
    assert conformance.judged(measured).status == "passed"


def test_a_benchmark_that_would_not_notice_a_wrong_padding_fails() -> None:
    blind = conformance.Measured("m", 0.0, 1.0, {"padding": False, "channels": True})
    assert conformance.judged(blind).status == "failed"
    assert conformance.judged(conformance.Measured("m", float("inf"), 1.0)).status == "failed"


@pytest.mark.parametrize(
    ("name", "status"),
    [("test_conv_with_strides_and_asymmetric_padding", "passed"), ("test_maxpool_2d_ceil", "passed"),
     ("test_batchnorm_example_training_mode", "skipped"), ("test_add_uint8", "skipped"),
     ("test_lstm_defaults", "not covered")],
)  # fmt: skip
def test_stored_tests_are_counted_by_what_they_show(name: str, status: str) -> None:
    folder = conformance.DATA / "node" / name
    assert conformance.stored("node", folder).status == status


def test_a_wrong_answer_to_a_stored_test_is_a_failure(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(conformance.DATA / "node" / "test_relu", tmp_path / "test_relu"))
    output = folder / "test_data_set_0" / "output_0.pb"
    array = numpy_helper.to_array(TensorProto.FromString(output.read_bytes())) + 1
    output.write_bytes(numpy_helper.from_array(array.astype(np.float32)).SerializeToString())
    assert conformance.stored("node", folder).status == "failed"


def test_the_onnx_package_is_not_shadowed() -> None:
    assert "site-packages" in str(onnx.__file__)
