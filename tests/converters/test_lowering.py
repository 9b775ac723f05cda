"""Every source becomes float and int8 TFLite; what is wrong with it, or with the child that reads it, is one error."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from ai_edge_litert import schema_py_generated as schema
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from converters import flatbuffer, lowering, quantise, sources
from converters.lowering import Lowered, lower
from converters.untrusted import Child, Limits, UntrustedError
from edgeguard.data import load
from edgeguard.detection.guarded import TfliteModel
from edgeguard.errors import ConfigError, EdgeGuardError, LinkError, ModelError, TrustError

Array = npt.NDArray[Any]

SHAPE = (8, 8, 1)
DIGITS = load("digits")
PIXELS = DIGITS.x_train[:300].astype(np.uint8)

# What a framework could do to the child that loads it, as a module that stands in its place.
FRAMEWORKS = {
    "missing": "raise ModuleNotFoundError(\"No module named 'keras'\", name='keras')",
    "crashes": "import os; os.abort()",
    "exhausted": "raise ImportError('libbig.so: failed to map segment from shared object')",
    "sleeps": "import time; time.sleep(600)",
    "raises": "raise RuntimeError('the driver is too old')",
}
# Functions that a child runs.
FUNCTIONS = """
import os, time
from converters import untrusted
from edgeguard import errors

def raises(content, argument):
    raise getattr(errors, argument)("what it is", got="this\\x1b[31m", expected=7, do="do that")
def missing(content, argument): import no_such_package
def steps(content, argument):
    for step in range(3): untrusted.report("step\\n", step, 3)
    return 5
def echoes(content, argument): return argument
def tells_and_sleeps(content, argument):
    with open(argument, "w") as file: file.write(str(os.getpid()))
    time.sleep(600)
def writes(content, argument):
    with open(argument, "wb") as file: file.write(bytes(1 << 20))
"""


def small_model() -> Any:
    """Convolution, batch normalisation, ReLU, dense, softmax; pixels in, trained for a second."""
    import keras

    keras.utils.set_random_seed(1)
    x = inputs = keras.Input(SHAPE, name="pixels")
    x = keras.layers.Rescaling(1.0 / 255.0)(x)
    x = keras.layers.Conv2D(6, 3, name="conv")(x)
    x = keras.layers.BatchNormalization(name="bn")(x)
    x = keras.layers.ReLU(name="relu")(x)
    x = keras.layers.Flatten()(x)
    x = keras.layers.Dense(40, activation="relu", name="wide")(x)
    model = keras.Model(inputs, keras.layers.Dense(10, activation="softmax", name="classes")(x), name="small")
    model.compile("adam", "sparse_categorical_crossentropy")
    model.fit(DIGITS.x_train, DIGITS.y_train, epochs=8, verbose=0)
    return model


def converted(model: Any, kind: str) -> bytes:
    """A Keras model as float TFLite, as people export it: with an open batch, weights of that kind."""
    import tensorflow as tf

    converter = tf.lite.TFLiteConverter.from_keras_model(model)
    if kind != "float32":
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
    if kind == "float16":
        converter.target_spec.supported_types = [tf.float16]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return bytes(converter.convert())


def io_types(content: bytes) -> list[str]:
    model = TfliteModel(content)
    return [model.input_dtype.name, *(np.dtype(output["dtype"]).name for output in model.outputs)]


def weight_scales(content: bytes) -> list[int]:
    """How many scales the constants of a model have."""
    model = flatbuffer.parse(content)
    int8 = lowering.Kind.INT8
    weights = [t for t in model.subgraphs[0].tensors if t.type == int8 and flatbuffer.constant(model, t)]
    return sorted(len(tensor.quantization.scale) for tensor in weights)


@pytest.fixture(scope="module")
def keras_model() -> Any:
    return small_model()


@pytest.fixture(scope="module")
def folder(keras_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model as a Keras file, and what was made of that."""
    folder = tmp_path_factory.mktemp("sources")
    keras_model.save(folder / "small.keras")
    return folder


@pytest.fixture(scope="module")
def notes() -> list[tuple[str, int, int]]:
    return []


@pytest.fixture(scope="module")
def from_file(folder: Path, notes: list[tuple[str, int, int]]) -> Lowered:
    """The Keras file, lowered in a process of its own that must not have loaded a framework afterwards."""
    program = """
import json, sys
from pathlib import Path
import numpy as np
from converters.lowering import lower

folder, notes = Path(sys.argv[1]), []
made = lower(
    folder / "small.keras", np.load(folder / "pixels.npy"), keras=".keras", progress=lambda *note: notes.append(note)
)
(folder / "trainable.keras").write_bytes(made.keras)
(folder / "float.tflite").write_bytes(made.float_tflite)
(folder / "int8.tflite").write_bytes(made.int8_tflite)
loaded = sorted({"tensorflow", "keras", "onnx"} & set(sys.modules))
print(json.dumps([made.name, made.layers, notes, loaded]))
"""
    np.save(folder / "pixels.npy", PIXELS)
    done = subprocess.run([sys.executable, "-c", program, folder], capture_output=True, text=True, check=True)
    name, layers, said, loaded = json.loads(done.stdout)
    assert loaded == []
    notes.extend(tuple(note) for note in said)
    return Lowered(
        name=name,
        layers=tuple(layers),
        float_tflite=(folder / "float.tflite").read_bytes(),
        int8_tflite=(folder / "int8.tflite").read_bytes(),
    )


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which a child looks for modules first."""
    (tmp_path / "functions.py").write_text(FUNCTIONS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


def test_a_keras_file_becomes_what_the_model_in_memory_becomes(from_file: Lowered, keras_model: Any) -> None:
    here = lower(sources.of_keras(keras_model, "small"), PIXELS)
    assert from_file == here
    assert from_file.layers == tuple(layer.name for layer in keras_model.layers)


def test_the_trainable_model_comes_along_and_answers_alike(from_file: Lowered, folder: Path, keras_model: Any) -> None:
    import keras

    again = keras.models.load_model(folder / "trainable.keras")
    np.testing.assert_array_equal(again.predict(PIXELS, verbose=0), keras_model.predict(PIXELS, verbose=0))


def test_a_model_in_memory_comes_along_too_where_there_is_one(keras_model: Any, tmp_path: Path) -> None:
    import keras

    source = sources.of_keras(keras_model)
    copy = lower(source, PIXELS, quantise=False, keras=".h5").keras
    assert copy is not None
    (tmp_path / "copy.h5").write_bytes(copy)
    assert keras.models.load_model(tmp_path / "copy.h5", compile=False).count_params() == keras_model.count_params()
    without = sources.Source(name="saved", function=source.function)
    with pytest.raises(ModelError, match="no trainable model"):
        lower(without, PIXELS, quantise=False, keras=".keras")


def test_what_the_child_does_is_told(from_file: Lowered, notes: Sequence[tuple[str, int, int]]) -> None:
    assert [text for text, _, _ in notes] == [
        "starting TensorFlow",
        "reading the model",
        "making it float TFLite",
        "making it int8",
    ]


def test_the_int8_file_is_int8_throughout_with_weights_per_channel(from_file: Lowered) -> None:
    assert from_file.int8_tflite is not None
    assert io_types(from_file.int8_tflite) == ["int8", "int8"]
    assert weight_scales(from_file.int8_tflite) == [6, 10, 40]


def test_without_quantising_there_is_only_the_float_file(keras_model: Any) -> None:
    made = lower(sources.of_keras(keras_model), PIXELS, quantise=False)
    assert made.int8_tflite is None
    assert made.float_tflite is not None
    assert io_types(made.float_tflite) == ["float32", "float32"]


def test_a_dynamic_range_file_is_quantised_with_the_input_asked_for(keras_model: Any, from_file: Lowered) -> None:
    content = converted(keras_model, "int8")
    made = lower(sources.Source(name="weights", tflite=content), PIXELS, input_type="uint8")
    assert made.float_tflite == content
    assert made.layers == ()
    assert made.int8_tflite is not None
    assert io_types(made.int8_tflite) == ["uint8", "int8"]
    assert weight_scales(made.int8_tflite) == [6, 10, 40]
    assert from_file.int8_tflite is not None
    for other in (content, from_file.int8_tflite):
        parity = quantise.compare(other, made.int8_tflite, DIGITS.x_test, DIGITS.y_test)
        assert parity.agreement is not None
        assert parity.agreement >= quantise.MIN_AGREEMENT
        assert parity.float_accuracy is not None
        assert parity.float_accuracy > 0.9


@pytest.mark.skipif("EDGEGUARD_MODELS" not in os.environ, reason="EDGEGUARD_MODELS is not set")
def test_a_third_party_file_without_a_signature_is_quantised() -> None:
    path = Path(os.environ["EDGEGUARD_MODELS"]) / "mlperf_tiny_kws_float32.tflite"
    inputs = np.random.default_rng(0).normal(size=(600, 49, 10, 1)).astype(np.float32)
    made = lower(path, inputs)
    assert made.name == path.stem
    assert made.float_tflite is not None
    assert made.int8_tflite is not None
    assert quantise.float_operators(flatbuffer.parse(made.int8_tflite)) == ()
    agreement = quantise.compare(made.float_tflite, made.int8_tflite, inputs[:200]).agreement
    assert agreement is not None
    assert agreement > 0.95


@pytest.mark.parametrize("kind", ["float16", "int8"])
def test_small_constants_become_float32_and_the_answers_stay(keras_model: Any, kind: str) -> None:
    content = converted(keras_model, kind)
    model = flatbuffer.parse(content)
    lowering.with_float_constants(model)
    plain = flatbuffer.pack(model)
    graph = flatbuffer.parse(plain).subgraphs[0]
    assert {t.type for t in graph.tensors} <= {lowering.Kind.FLOAT32, lowering.Kind.INT32}
    assert len(graph.operators) == len(flatbuffer.parse(converted(keras_model, "float32")).subgraphs[0].operators)
    # Half precision is exact; a dynamic-range kernel also rounds the activations.
    tolerance = 1e-6 if kind == "float16" else 0.02
    np.testing.assert_allclose(TfliteModel(plain).predict(PIXELS), TfliteModel(content).predict(PIXELS), atol=tolerance)


@settings(max_examples=60, deadline=None)
@given(
    whole=arrays.arrays(np.int8, st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))),
    axis=st.integers(-1, 2),
    data=st.data(),
)
def test_a_quantised_constant_becomes_scale_times_distance_from_zero(
    whole: npt.NDArray[np.int8], axis: int, data: st.DataObject
) -> None:
    count = 1 if axis < 0 else whole.shape[axis]
    scales = np.asarray(data.draw(st.lists(st.floats(0.015625, 4, width=32), min_size=count, max_size=count)), "f4")
    zeros = np.asarray(data.draw(st.lists(st.integers(-128, 127), min_size=count, max_size=count)), "i8")
    tensor = schema.TensorT(
        shape=np.asarray(whole.shape, "i4"),
        type=lowering.Kind.INT8,
        quantization=schema.QuantizationParametersT(scale=scales, zeroPoint=zeros, quantizedDimension=max(axis, 0)),
    )
    found = lowering._real_values(tensor, whole.tobytes())
    assert found is not None
    for index in np.ndindex(whole.shape):
        channel = index[axis] if axis >= 0 else 0
        assert found[index] == np.float32(float(scales[channel]) * (int(whole[index]) - int(zeros[channel])))


def test_a_file_that_is_int8_already_stays_as_it_is(from_file: Lowered, tmp_path: Path) -> None:
    assert from_file.int8_tflite is not None
    path = tmp_path / "done.tflite"
    path.write_bytes(from_file.int8_tflite)
    for asked in (None, "int8"):
        made = lower(path, PIXELS, input_type=asked)
        assert made == Lowered(name="done", float_tflite=None, int8_tflite=from_file.int8_tflite)
    with pytest.raises(ModelError, match="quantised already and takes int8; expected uint8"):
        lower(path, PIXELS, input_type="uint8")


def test_a_float_file_may_stay_float(keras_model: Any) -> None:
    content = converted(keras_model, "float16")
    made = lower(sources.Source(name="half", tflite=content), PIXELS, quantise=False)
    assert made == Lowered(name="half", float_tflite=content, int8_tflite=None)


def test_an_operator_without_an_int8_form_is_refused_by_its_name() -> None:
    import keras

    inputs = keras.Input(SHAPE)
    x = keras.layers.Flatten()(keras.ops.sin(keras.layers.Conv2D(2, 3)(inputs)))
    with pytest.raises(ModelError, match="no int8 form: SIN") as caught:
        lower(sources.of_keras(keras.Model(inputs, keras.layers.Dense(3)(x))), PIXELS)
    assert "--float" in str(caught.value.do)


def test_an_operator_that_tflite_does_not_have_is_refused_by_its_name() -> None:
    import keras

    inputs = keras.Input(SHAPE)
    x = keras.layers.Flatten()(keras.ops.erf(inputs))
    with pytest.raises(ModelError, match="operators that TFLite does not have: Erf"):
        lower(sources.of_keras(keras.Model(inputs, keras.layers.Dense(3)(x))), PIXELS)


@pytest.mark.parametrize("shape", [(12,), (20, 3), (6, 6, 2)])
def test_inputs_of_any_usual_rank_are_taken(shape: tuple[int, ...]) -> None:
    import keras

    inputs = keras.Input(shape)
    x = keras.layers.Conv1D(4, 3)(inputs) if len(shape) == 2 else inputs
    model = keras.Model(inputs, keras.layers.Dense(3)(keras.layers.Flatten()(x)))
    values = np.random.default_rng(1).normal(size=(30, *shape)).astype(np.float32)
    made = lower(sources.of_keras(model), values)
    assert made.int8_tflite is not None
    assert TfliteModel(made.int8_tflite).input_shape == shape


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SavedModels whose input is of whole numbers: with one signature of its own name, and with two."""
    import tensorflow as tf

    class Model(tf.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            self.weights = tf.Variable(np.random.default_rng(0).normal(size=(64, 5)).astype(np.float32))

        @tf.function(input_signature=[tf.TensorSpec((None, *SHAPE), tf.uint8)])
        def answer(self, image: Any) -> Any:
            return tf.reshape(tf.cast(image, tf.float32) / 255.0, (-1, 64)) @ self.weights

    folder, model = tmp_path_factory.mktemp("saved"), Model()
    tf.saved_model.save(model, folder / "one", signatures={"classify": model.answer})
    tf.saved_model.save(model, folder / "two", signatures={"first": model.answer, "second": model.answer})
    return folder


def test_the_only_signature_of_a_saved_model_is_used_and_its_whole_numbers_stay(saved: Path) -> None:
    made = lower(sources.read(saved / "one"), PIXELS)
    assert made.name == "one"
    assert made.float_tflite is not None
    assert made.int8_tflite is not None
    assert io_types(made.int8_tflite) == ["uint8", "int8"]
    parity = quantise.compare(made.float_tflite, made.int8_tflite, PIXELS)
    assert parity.agreement is not None
    assert parity.agreement >= 0.95


def test_several_signatures_are_refused_and_listed(saved: Path) -> None:
    with pytest.raises(ModelError, match="the signatures first, second; expected serving_default"):
        sources.read(saved / "two")


def test_several_inputs_are_refused() -> None:
    import keras

    both = [keras.Input((4,), name=name) for name in ("left", "right")]
    with pytest.raises(ModelError, match="2 inputs; expected one input"):
        sources.of_keras(keras.Model(both, keras.layers.Dense(2)(keras.layers.Concatenate()(both))))


@pytest.mark.parametrize(("shape", "found"), [((), r"\[\]"), ((2, 4), r"\[2, 4\]")])
def test_a_tflite_file_without_a_batch_of_one_is_refused(shape: tuple[int, ...], found: str) -> None:
    import tensorflow as tf

    concrete = tf.function(tf.abs).get_concrete_function(tf.TensorSpec(shape, tf.float32))
    content = sources.to_float(sources.Source(name="abs", function=concrete))
    with pytest.raises(ModelError, match=f"an input of shape {found}; expected a batch of 1"):
        lower(sources.Source(name="abs", tflite=content), PIXELS)


def test_calibration_inputs_of_another_shape_are_refused(keras_model: Any) -> None:
    with pytest.raises(ModelError, match=r"\[4, 8, 1\]; expected \[8, 8, 1\]"):
        lower(sources.of_keras(keras_model), PIXELS[:, :4])


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("nothing.keras", {}, ConfigError, "no such file"),
        ("empty", {}, ModelError, r"no saved_model\.pb"),
        ("noise.tflite", {}, ModelError, "not TFLite"),
        ("damaged.tflite", {}, ModelError, "model file"),
        ("empty", {"keras": Path("x.keras")}, ModelError, "no trainable model"),
        ("damaged.tflite", {"keras": Path("x.h5")}, ModelError, "no trainable model"),
        ("noise.onnx", {"quantise": False, "input_type": "int8"}, ConfigError, "stays float"),
    ],
)
def test_what_cannot_be_lowered_is_one_error_in_one_line(
    tmp_path: Path, name: str, options: dict[str, Any], error: type[EdgeGuardError], message: str
) -> None:
    (tmp_path / "empty").mkdir()
    for noise in ("noise.tflite", "noise.onnx"):
        (tmp_path / noise).write_bytes(b"noise" * 100)
    (tmp_path / "damaged.tflite").write_bytes(b"\x10\0\0\0TFL3" + b"\xff" * 64)
    with pytest.raises(error, match=message) as caught:
        lower(tmp_path / name, PIXELS, **options)
    assert "\n" not in str(caught.value)


def test_what_an_importer_refuses_in_the_child_arrives_as_it_was_said(tmp_path: Path) -> None:
    from onnx import TensorProto, helper, save

    nodes = [helper.make_node(kind, [f"t{i}"], [f"t{i + 1}"]) for i, kind in enumerate(("Relu", "Det", "Sinh"))]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 1, 8, 8]) for name in ("t0", "t3")]
    graph = helper.make_graph(nodes, "graph", ends[:1], ends[1:])
    path = tmp_path / "model.onnx"
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    with pytest.raises(ModelError) as there:
        lower(path, PIXELS)
    with pytest.raises(ModelError) as here:
        sources.read(path)
    assert vars(there.value) == vars(here.value)
    assert "Det, Sinh" in str(there.value.got)


@pytest.mark.parametrize(
    ("framework", "kind", "message"),
    [
        ("crashes", "crashed", "crashed TensorFlow .*SIGABRT"),
        ("exhausted", "out of memory", "no memory left in TensorFlow"),
        ("sleeps", "timed out", "no end of TensorFlow; expected at most 2 s"),
    ],
)
def test_a_child_that_ends_is_one_error_of_its_kind(
    folder: Path, modules: Path, framework: str, kind: str, message: str
) -> None:
    (modules / "keras.py").write_text(FRAMEWORKS[framework])
    with pytest.raises(UntrustedError, match=message) as caught:
        lower(folder / "small.keras", PIXELS, limits=Limits(wall_seconds=2.0))
    assert caught.value.kind == kind


def test_a_package_that_the_child_lacks_is_the_error_that_names_it(folder: Path, modules: Path) -> None:
    (modules / "keras.py").write_text(FRAMEWORKS["missing"])
    with pytest.raises(ModuleNotFoundError) as caught:
        lower(folder / "small.keras", PIXELS)
    assert caught.value.name == "keras"


def test_whatever_else_a_framework_raises_is_a_refusal(folder: Path, modules: Path) -> None:
    (modules / "keras.py").write_text(FRAMEWORKS["raises"])
    with pytest.raises(ModelError, match="RuntimeError: the driver is too old"):
        lower(folder / "small.keras", PIXELS)


@pytest.mark.parametrize("kind", [ConfigError, ModelError, TrustError, LinkError])
def test_an_error_of_ours_crosses_over_with_its_parts(modules: Path, kind: type[EdgeGuardError]) -> None:
    with Child() as child, pytest.raises(kind) as caught:
        child.call("functions:raises", b"", kind.__name__, returns=int)
    error = caught.value
    assert (error.what, error.got, error.expected, error.do) == ("what it is", "this [31m", "7", "do that")


def test_what_a_function_reports_arrives_in_order_before_its_answer(modules: Path) -> None:
    said: list[tuple[str, int, int]] = []
    with Child() as child:
        answer = child.call("functions:steps", b"", returns=int, progress=lambda *note: said.append(note))
        assert answer == 5
        assert child.call("functions:steps", b"", returns=int) == 5
    assert said == [("step ", 0, 3), ("step ", 1, 3), ("step ", 2, 3)]


def test_an_interruption_ends_the_child_and_the_next_call_has_another(modules: Path) -> None:
    def interrupted(text: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with Child() as child:
        with pytest.raises(KeyboardInterrupt):
            child.call("functions:steps", b"", returns=int, progress=interrupted)
        assert child.call("functions:echoes", b"", "its own answer", returns=str) == "its own answer"


def test_a_child_dies_with_its_parent(modules: Path) -> None:
    program = """
import sys
from converters.untrusted import Child
with Child() as child: child.call("functions:tells_and_sleeps", b"", sys.argv[1], returns=int)
"""
    told = modules / "pid"
    parent = subprocess.Popen([sys.executable, "-c", program, told])
    try:
        number = int(_wait_for(lambda: told.read_text() if told.exists() else ""))
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    assert _wait_for(lambda: "gone" if not _runs(number) else "") == "gone"


def test_a_child_writes_no_larger_file_than_it_may(modules: Path) -> None:
    with Child(Limits(file_bytes=1 << 20)) as child:
        child.call("functions:writes", b"", str(modules / "file"), returns=type(None))
    with Child(Limits(file_bytes=1 << 10)) as child, pytest.raises(ModelError, match="OSError"):
        child.call("functions:writes", b"", str(modules / "other"), returns=type(None))


def _runs(number: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _wait_for(what: Any, seconds: float = 10.0) -> str:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        found: str = what()
        if found:
            return found
        time.sleep(0.02)
    raise AssertionError("it did not come to pass")
