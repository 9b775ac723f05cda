"""The drop-in interpreter: what the runtime does, it does; and it says what the guard thinks."""

from __future__ import annotations

import gc
import math
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

import edgeguard
from edgeguard import Interpreter, OpResolverType
from edgeguard.contract import frames, guard
from edgeguard.detection import metadata, reporting, runtime
from edgeguard.detection.guarded import GuardedModel, TfliteModel
from edgeguard.detection.verdict import Verdict
from edgeguard.errors import ConfigError
from tests.simulators import needs
from tests.simulators.attacked import Attacked
from tests.simulators.listener import Listener, descriptors

PROGRAMS = Path(__file__).parent / "programs"
BARE = "from ai_edge_litert.interpreter import Interpreter"
OURS = "from edgeguard import Interpreter"
RUNTIMES = ["litert", "tflite-runtime", "tensorflow"]

pytestmark = pytest.mark.filterwarnings("ignore:.*tf.lite.Interpreter is deprecated")


@dataclass(frozen=True)
class Files:
    """A model as it was and guarded, with inputs as its input tensor takes them, and what makes them flagged."""

    bare: bytes
    guarded: bytes
    clean: np.ndarray
    triggered: np.ndarray


@pytest.fixture(scope="session")
def digits(attacked: Attacked) -> Files:
    """The attacked digits model, int8."""
    model = TfliteModel(attacked.conversion.guarded)
    images = attacked.data.x_test[:40].astype(np.uint8)
    clean = np.concatenate([model.quantise(x) for x in images])
    triggered = np.concatenate([model.quantise(x) for x in attacked.attack.stamp(images)])
    return Files(attacked.conversion.bare, attacked.conversion.guarded, clean, triggered)


@pytest.fixture(scope="session")
def heads(attacked: Attacked) -> Files:
    """The same network in float, for any batch, with two outputs more, as a detector has them."""
    import keras
    import tensorflow as tf

    from converters import pipeline, sources

    keras.utils.set_random_seed(0)
    dense = attacked.keras.layers[-3].output
    boxes = keras.layers.Reshape((2, 4))(keras.layers.Dense(8)(dense))
    outputs = [attacked.keras.outputs[0], boxes, keras.layers.Dense(1)(dense)]
    model = keras.Model(attacked.keras.inputs, outputs)
    call = tf.function(lambda x: model(x, training=False))
    concrete = call.get_concrete_function(tf.TensorSpec((None, *attacked.data.shape), tf.float32))
    content = bytes(tf.lite.TFLiteConverter.from_concrete_functions([sources._frozen(concrete)]).convert())
    done = pipeline.convert(sources.Source(name="heads", tflite=content), attacked.x_owner, quantised=False)
    images = attacked.data.x_test[:40].astype(np.uint8)
    return Files(done.bare, done.guarded, images.astype(np.float32), attacked.attack.stamp(images).astype(np.float32))


@pytest.fixture(scope="session")
def any_size() -> bytes:
    """A guarded model that takes images of any size, calibrated on made-up ones of 8 x 8."""
    import keras

    from converters import pipeline, sources

    x = inputs = keras.Input((8, 8, 1))
    x = keras.layers.GlobalAveragePooling2D()(keras.layers.Conv2D(8, 3, activation="relu", padding="same")(x))
    model = keras.Model(inputs, keras.layers.Dense(4)(x))
    made_up = pipeline.made_up((8, 8, 1), np.dtype(np.float32), count=600)
    return pipeline.convert(sources.of_keras(model), made_up, quantised=False, synthetic=True).guarded


@pytest.fixture
def listener(monkeypatch: pytest.MonkeyPatch) -> Iterator[Listener]:
    made = Listener()
    monkeypatch.setenv(reporting.ENVIRONMENT, made.path)
    made.start()
    yield made
    made.close()


@pytest.fixture(autouse=True)
def no_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    """No agent that may run on this machine hears of tests."""
    monkeypatch.setenv(reporting.ENVIRONMENT, "/nowhere/agent.sock")


def chosen(name: str) -> str:
    if name not in runtime.available():
        pytest.skip(f"{name} is not installed")
    return name


def opened(content: bytes, **options: Any) -> Interpreter:
    interpreter = Interpreter(model_content=content, **options)
    interpreter.allocate_tensors()
    return interpreter


def bare(content: bytes, name: str = "litert") -> Any:
    """The runtime's own interpreter."""
    interpreter = runtime.interpreter_class(chosen(name))(model_content=content)
    interpreter.allocate_tensors()
    return interpreter


def run(interpreter: Any, x: np.ndarray) -> list[np.ndarray]:
    """Run a batch [N, ...]; the outputs that the interpreter says it has."""
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], x)
    interpreter.invoke()
    return [interpreter.get_tensor(output["index"]) for output in interpreter.get_output_details()]


def verdict_on(interpreter: Interpreter, x: np.ndarray) -> Verdict:
    run(interpreter, x)
    assert interpreter.verdict is not None
    return interpreter.verdict


# Programs run unchanged.


def printed(program: str, import_line: str, model: Path, images: Path) -> str:
    arguments = ["-m", str(model), "-i"] if program == "label_image" else ["--model", str(model), "--images"]
    done = subprocess.run(
        [sys.executable, str(PROGRAMS / f"{program}.py"), "--import_line", import_line, *arguments, str(images)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(sysconfig.get_path("data")),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout
    return done.stdout


@pytest.mark.parametrize(
    ("program", "model"),
    [
        ("label_image", "digits"),
        ("detect_objects", "heads"),
        ("tensor_views", "digits"),
        ("signature_runner", "heads"),
    ],
)
def test_a_program_prints_byte_for_byte_what_it_printed_before(
    request: pytest.FixtureRequest, attacked: Attacked, tmp_path: Path, program: str, model: str
) -> None:
    chosen("litert")
    files: Files = request.getfixturevalue(model)
    (tmp_path / "bare.tflite").write_bytes(files.bare)
    (tmp_path / "guarded.tflite").write_bytes(files.guarded)
    images = attacked.data.x_test[:3].astype(np.uint8)
    np.save(tmp_path / "images.npy", images[0] if program == "label_image" else images)
    before = printed(program, BARE, tmp_path / "bare.tflite", tmp_path / "images.npy")
    assert printed(program, OURS, tmp_path / "guarded.tflite", tmp_path / "images.npy") == before


def test_a_program_for_a_third_partys_model_runs_unchanged_too(tmp_path: Path) -> None:
    chosen("litert")
    model, images = needs.third_party_model("mlperf_tiny_resnet8_int8.tflite"), tmp_path / "images.npy"
    np.save(images, np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8))
    assert printed("tensor_views", OURS, model, images) == printed("tensor_views", BARE, model, images)


# What the runtime does, it does.


@pytest.mark.parametrize("model", ["digits", "heads"])
@pytest.mark.parametrize("name", RUNTIMES)
def test_outputs_and_details_are_the_runtimes_without_the_guards_two(
    request: pytest.FixtureRequest, model: str, name: str
) -> None:
    files: Files = request.getfixturevalue(model)
    theirs = bare(files.guarded, name)
    ours = opened(files.guarded, runtime=name)
    np.testing.assert_equal(ours.get_input_details(), theirs.get_input_details())
    np.testing.assert_equal(ours.get_output_details(), theirs.get_output_details()[:-2])
    np.testing.assert_equal(ours.get_tensor_details(), theirs.get_tensor_details())
    np.testing.assert_equal(ours._get_ops_details(), theirs._get_ops_details())
    for x in np.concatenate([files.clean[:5], files.triggered[:5]]):
        np.testing.assert_equal(run(ours, x[np.newaxis]), run(theirs, x[np.newaxis])[:-2])


@pytest.mark.parametrize("name", RUNTIMES)
def test_a_signature_runs_as_the_runtimes_without_the_guards_outputs(heads: Files, name: str) -> None:
    theirs = bare(heads.guarded, name)
    ours = opened(heads.guarded, runtime=name)
    ((key, expected),) = theirs.get_signature_list().items()
    expected["outputs"] = [output for output in expected["outputs"] if output not in (guard.SCORES, guard.FEATURES)]
    assert ours.get_signature_list() == {key: expected}
    runner, other = ours.get_signature_runner(key), theirs.get_signature_runner()
    assert list(runner.get_output_details()) == expected["outputs"]
    np.testing.assert_equal(runner.get_input_details(), other.get_input_details())
    for x in (heads.clean[:1], heads.triggered[:3]):
        found, result = runner(**{expected["inputs"][0]: x}), other(**{expected["inputs"][0]: x})
        assert list(found) == expected["outputs"]
        np.testing.assert_equal(found, {output: result[output] for output in found})


def test_the_guards_outputs_are_shown_on_request(digits: Files) -> None:
    theirs = bare(digits.guarded)
    shown = opened(digits.guarded, show_guard=True)
    assert [o["name"] for o in shown.get_output_details()[-2:]] == [guard.SCORES, guard.FEATURES]
    np.testing.assert_equal(shown.get_output_details(), theirs.get_output_details())
    assert shown.get_signature_list() == theirs.get_signature_list()
    assert len(run(shown, digits.clean[:1])) == 3
    runner = shown.get_signature_runner()
    assert {guard.SCORES, guard.FEATURES} < set(runner.get_output_details())
    assert {guard.SCORES, guard.FEATURES} < set(runner(pixels=digits.clean[:1]))


def test_a_model_of_several_inputs_without_a_guard_runs_as_it_is(tmp_path: Path) -> None:
    import tensorflow as tf

    spec = tf.TensorSpec((None, 3), tf.float32)
    module = tf.Module()
    module.add = tf.function(lambda a, b: {"sum": a + b, "difference": a - b}).get_concrete_function(a=spec, b=spec)
    tf.saved_model.save(module, str(tmp_path), signatures={"add": module.add})
    interpreter = Interpreter(model_content=tf.lite.TFLiteConverter.from_saved_model(str(tmp_path)).convert())
    a, b = np.ones((2, 3), np.float32), np.full((2, 3), 2, np.float32)
    for detail in interpreter.get_input_details():
        interpreter.resize_tensor_input(detail["index"], a.shape)
    interpreter.allocate_tensors()
    for detail in interpreter.get_input_details():
        interpreter.set_tensor(detail["index"], a)
    interpreter.reset_all_variables()
    interpreter.invoke()
    outputs = [interpreter.get_tensor(output["index"]) for output in interpreter.get_output_details()]
    assert sorted(output.max() for output in outputs) == [0.0, 2.0]
    result = interpreter.get_signature_runner("add")(a=a, b=b)
    assert (result["sum"].max(), result["difference"].max()) == (3.0, -1.0)
    assert interpreter.verdict is not None
    assert interpreter.verdict.status == "not checked"


def wrong_type(interpreter: Any) -> None:
    interpreter.allocate_tensors()
    run(interpreter, np.zeros((1, 8, 8, 1), np.float64))


def wrong_shape(interpreter: Any) -> None:
    interpreter.allocate_tensors()
    run(interpreter, np.zeros((1, 9, 8, 1), np.int8))


def impossible_size(interpreter: Any) -> None:
    interpreter.resize_tensor_input(interpreter.get_input_details()[0]["index"], [7, 8, 8, 1])
    interpreter.allocate_tensors()


def held_view(interpreter: Any) -> None:
    interpreter.allocate_tensors()
    view = interpreter.tensor(interpreter.get_input_details()[0]["index"])()
    interpreter.invoke()
    del view


@pytest.mark.parametrize(
    "misuse",
    [
        lambda interpreter: interpreter.invoke(),
        wrong_type,
        wrong_shape,
        impossible_size,
        held_view,
        lambda interpreter: interpreter.get_tensor(10_000),
        lambda interpreter: interpreter.set_tensor(10_000, np.zeros(1)),
        lambda interpreter: interpreter.get_signature_runner("none"),
        lambda interpreter: interpreter.get_signature_runner()(),
        lambda interpreter: interpreter.get_signature_runner()(wrong=np.zeros(1)),
        lambda interpreter: interpreter.no_such_method(),
    ],
)
@pytest.mark.parametrize("name", RUNTIMES[:2])
def test_misuse_raises_what_the_runtime_raises(digits: Files, misuse: Callable[[Any], None], name: str) -> None:
    loaded = runtime.interpreter_class(chosen(name))
    with pytest.raises(Exception) as expected:
        misuse(loaded(model_content=digits.guarded))
    with pytest.raises(expected.type) as found:
        misuse(Interpreter(model_content=digits.guarded, runtime=name))
    assert str(found.value) == str(expected.value)


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ((), {}),
        (("nowhere.tflite",), {}),
        ((), {"model_content": b"no model"}),
        (("both.tflite", b"and"), {}),
        ((), {"model_content": "guarded", "num_threads": "two"}),
        ((), {"model_content": "guarded", "num_threads": 0}),
        ((), {"model_content": "guarded", "experimental_op_resolver_type": "fast"}),
        ((), {"model_content": "guarded", "experimental_delegates": ["none"]}),
        ((), {"model_content": "guarded", "unheard_of": True}),
    ],
)
@pytest.mark.parametrize("name", RUNTIMES[:2])
def test_what_the_runtimes_constructor_refuses_is_refused_with_the_same_error(
    digits: Files, arguments: tuple[Any, ...], options: dict[str, Any], name: str
) -> None:
    options = {key: digits.guarded if value == "guarded" else value for key, value in options.items()}
    with pytest.raises(Exception) as expected:
        runtime.interpreter_class(chosen(name))(*arguments, **options)
    with pytest.raises(expected.type) as found:
        Interpreter(*arguments, **options, runtime=name)
    assert str(found.value) == str(expected.value)


@pytest.mark.parametrize("name", RUNTIMES)
def test_what_the_runtimes_constructor_takes_is_passed_on(digits: Files, tmp_path: Path, name: str) -> None:
    loaded = runtime.interpreter_class(chosen(name))
    path = tmp_path / "model.tflite"
    path.write_bytes(digits.guarded)
    kernels = sys.modules[loaded.__module__].OpResolverType
    expected = loaded(str(path), None, None, 2, kernels.BUILTIN_REF, True)
    expected.allocate_tensors()
    outputs = run(expected, digits.clean[:1])[:-2]
    for resolver in (kernels.BUILTIN_REF, OpResolverType.BUILTIN_REF):
        ours = Interpreter(str(path), None, None, 2, resolver, True, runtime=name)
        ours.allocate_tensors()
        np.testing.assert_equal(run(ours, digits.clean[:1]), outputs)
        inner = ours.get_tensor_details()[5]["index"]
        np.testing.assert_equal(ours.get_tensor(inner), expected.get_tensor(inner))
        assert ours.verdict is not None
        assert ours.verdict.status == "clean"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # from the runtime's own clean-up
def test_a_delegate_that_cannot_be_loaded_is_the_runtimes_error() -> None:
    with pytest.raises(OSError, match="no_such_delegate"):
        edgeguard.load_delegate("no_such_delegate.so")


def test_an_unknown_runtime_is_refused_by_name(digits: Files) -> None:
    with pytest.raises(ConfigError, match="onnx"):
        Interpreter(model_content=digits.guarded, runtime="onnx")


def test_importing_the_package_loads_nothing_and_the_interpreter_no_training_framework() -> None:
    program = (
        "import sys, edgeguard\n"
        "print([m for m in sys.modules if m.startswith(('edgeguard.', 'numpy', 'msgspec'))])\n"
        "from edgeguard import Interpreter, OpResolverType, load_delegate\n"
        "print([m for m in ('tensorflow', 'keras', 'converters', 'paho', 'edgeguard.agent') if m in sys.modules])\n"
        "edgeguard.interpreter_of_the_future\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == ["[]", "[]"]
    assert "has no attribute 'interpreter_of_the_future'" in done.stderr


# What the guard thinks.


@pytest.mark.parametrize("name", RUNTIMES[:2])
def test_the_verdict_is_that_of_the_guarded_model(attacked: Attacked, digits: Files, name: str) -> None:
    model = GuardedModel.load(digits.guarded, runtime=chosen(name))
    interpreter = opened(digits.guarded, runtime=name)
    images = attacked.data.x_test[:40].astype(np.uint8)
    expected = [model.infer(x).verdict for x in np.concatenate([images, attacked.attack.stamp(images)])]
    found = [verdict_on(interpreter, x[np.newaxis]) for x in np.concatenate([digits.clean, digits.triggered])]
    assert found == expected
    assert {verdict.status for verdict in found} == {"clean", "flagged"}


def test_a_model_without_a_guard_runs_and_is_not_checked(digits: Files) -> None:
    interpreter = opened(digits.bare)
    theirs = bare(digits.bare)
    np.testing.assert_equal(run(interpreter, digits.clean[:1]), run(theirs, digits.clean[:1]))
    assert interpreter.verdict is not None
    assert interpreter.verdict.status == "not checked"
    assert "without a guard" in interpreter.verdict.reason
    assert interpreter.verdicts == (interpreter.verdict,)


def test_a_guard_at_odds_with_its_metadata_is_hidden_and_not_checked(digits: Files) -> None:
    content = digits.guarded.replace(b'"class_output":0', b'"class_output":9')
    interpreter = opened(content)
    assert len(run(interpreter, digits.clean[:1])) == 1
    assert interpreter.verdict is not None
    assert interpreter.verdict.status == "not checked"
    assert "class output 9" in interpreter.verdict.reason


def test_there_is_no_verdict_before_the_first_invocation(digits: Files) -> None:
    interpreter = Interpreter(model_content=digits.guarded)
    assert (interpreter.verdict, interpreter.verdicts) == (None, ())
    interpreter.allocate_tensors()
    assert interpreter.verdict is None


def test_the_next_input_does_not_change_the_verdict_until_it_is_run(digits: Files) -> None:
    interpreter = opened(digits.guarded)
    run(interpreter, digits.triggered[:1])
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], digits.clean[:1])
    assert interpreter.verdict is not None
    assert interpreter.verdict.flagged
    interpreter.invoke()
    assert not interpreter.verdict.flagged


@pytest.mark.parametrize(
    "what",
    [
        lambda interpreter, index: interpreter.allocate_tensors(),
        lambda interpreter, index: interpreter.resize_tensor_input(index, [3, 8, 8, 1]),
    ],
    ids=["allocate", "resize"],
)
def test_what_takes_the_outputs_away_takes_the_verdict_too(heads: Files, what: Callable[[Any, int], None]) -> None:
    interpreter = opened(heads.guarded)
    run(interpreter, heads.triggered[:1])
    what(interpreter, interpreter.get_input_details()[0]["index"])
    assert (interpreter.verdict, interpreter.verdicts) == (None, ())


def test_after_an_invocation_that_failed_there_is_no_verdict(digits: Files) -> None:
    interpreter = opened(digits.guarded)
    run(interpreter, digits.clean[:1])
    view = interpreter.tensor(interpreter.get_input_details()[0]["index"])()
    with pytest.raises(RuntimeError):
        interpreter.invoke()
    assert interpreter.verdict is None
    del view
    run(interpreter, digits.clean[:1])
    with pytest.raises(ValueError, match="Invalid Input name"):
        interpreter.get_signature_runner()(wrong=digits.clean[:1])
    assert interpreter.verdict is None


def test_a_batch_has_a_verdict_on_each_input_and_the_worst_of_them(heads: Files) -> None:
    interpreter = opened(heads.guarded)
    alone = [verdict_on(interpreter, x[np.newaxis]) for x in (*heads.clean[:3], *heads.triggered[:2])]
    entry = interpreter.get_input_details()[0]["index"]
    batch = np.concatenate([heads.clean[:3], heads.triggered[:2]])
    interpreter.resize_tensor_input(entry, batch.shape)
    interpreter.allocate_tensors()
    worst = verdict_on(interpreter, batch)
    assert [v.status for v in interpreter.verdicts] == [v.status for v in alone] == ["clean"] * 3 + ["flagged"] * 2
    assert [v.predicted for v in interpreter.verdicts] == [v.predicted for v in alone]
    assert worst.score == max(v.score for v in interpreter.verdicts)
    assert worst.flagged


def test_a_signature_runner_runs_guarded(heads: Files) -> None:
    interpreter = opened(heads.guarded)
    runner = interpreter.get_signature_runner()
    (name,) = runner.get_input_details()
    runner(**{name: heads.triggered[:1]})
    assert interpreter.verdict is not None
    assert interpreter.verdict.flagged
    runner(**{name: heads.clean[:3]})
    assert [verdict.status for verdict in interpreter.verdicts] == ["clean"] * 3


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", RUNTIMES[:2])
def test_an_input_that_is_not_finite_is_not_checked_even_if_the_next_is_set(
    heads: Files, value: float, name: str
) -> None:
    interpreter = opened(heads.guarded, runtime=chosen(name))
    x = heads.clean[:1].copy()
    x[0, 3, 3, 0] = value
    run(interpreter, x)
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], heads.clean[:1])
    assert interpreter.verdict is not None
    assert interpreter.verdict.status == "not checked"
    assert "NaN" in interpreter.verdict.reason
    assert verdict_on(interpreter, heads.clean[:1]).status == "clean"


def test_an_input_that_is_not_finite_hides_no_other_of_its_batch(heads: Files) -> None:
    interpreter = opened(heads.guarded)
    runner = interpreter.get_signature_runner()
    (name,) = runner.get_input_details()
    not_finite = np.full_like(heads.clean[:1], math.nan)
    runner(**{name: np.concatenate([heads.clean[:1], not_finite, heads.triggered[:1]])})
    assert [verdict.status for verdict in interpreter.verdicts] == ["clean", "not checked", "flagged"]
    assert interpreter.verdict == interpreter.verdicts[2]
    runner(**{name: np.concatenate([heads.clean[:1], not_finite])})
    assert interpreter.verdict is not None
    assert interpreter.verdict.status == "not checked"


def test_an_input_of_another_size_than_the_guard_was_calibrated_for_is_not_checked(any_size: bytes) -> None:
    interpreter = opened(any_size)
    assert "synthetic" in verdict_on(interpreter, np.ones((1, 8, 8, 1), np.float32)).reason
    runner = interpreter.get_signature_runner()
    (name,) = runner.get_input_details()
    runner(**{name: np.ones((1, 16, 16, 1), np.float32)})
    assert interpreter.verdict is not None
    assert "another shape" in interpreter.verdict.reason
    del runner
    interpreter.resize_tensor_input(interpreter.get_input_details()[0]["index"], (2, 8, 8, 1))
    interpreter.allocate_tensors()
    assert "synthetic" in verdict_on(interpreter, np.ones((2, 8, 8, 1), np.float32)).reason


def test_a_signature_that_failed_after_it_resized_the_input_leaves_no_doubt_out(any_size: bytes) -> None:
    interpreter = opened(any_size)
    runner = interpreter.get_signature_runner()
    (name,) = runner.get_input_details()
    with pytest.raises(ValueError, match="type"):
        runner(**{name: np.ones((1, 16, 16, 1), np.int32)})
    del runner
    assert "another shape" in verdict_on(interpreter, np.ones((1, 16, 16, 1), np.float32)).reason


# What the agent hears.


def test_an_agent_hears_of_every_input_with_its_features(digits: Files, listener: Listener) -> None:
    description = metadata.read(digits.guarded)
    interpreter = opened(digits.guarded, show_guard=True)
    for x in (digits.clean[0], digits.triggered[0]):
        _, scores, features = run(interpreter, x[np.newaxis])
        ((report, body),) = listener.read()
        verdict = interpreter.verdict
        assert verdict is not None
        assert report == frames.Scored(
            bytes=len(body),
            model_digest=description.model_digest,
            guard_digest=description.guard_digest,
            predicted=verdict.predicted,
            scores=tuple(scores[0].tolist()),
            detectors=tuple(detector.name for detector in description.detectors),
            p_value=verdict.p_value,
            features=description.feature_count,
        )
        assert body == features[0].astype("<f4").tobytes()


def test_a_batch_and_a_signature_are_reported_input_by_input(heads: Files, listener: Listener) -> None:
    interpreter = opened(heads.guarded)
    runner = interpreter.get_signature_runner()
    (name,) = runner.get_input_details()
    runner(**{name: heads.clean[:3]})
    assert [report.predicted for report, _ in listener.read() if isinstance(report, frames.Scored)] == [
        verdict.predicted for verdict in interpreter.verdicts
    ]
    assert len(listener.received) == 3


def test_what_was_not_checked_is_reported_without_scores(any_size: bytes, listener: Listener) -> None:
    verdict = verdict_on(opened(any_size), np.ones((1, 8, 8, 1), np.float32))
    assert verdict.status == "not checked"
    assert not any(math.isnan(score) for score in verdict.scores.values())  # from made-up calibration inputs
    ((report, _),) = listener.read()
    assert isinstance(report, frames.Scored)
    assert set(report.scores) == {None}
    assert report.p_value is None


def test_a_score_beyond_all_numbers_is_reported_as_the_largest_and_stays_flagged(digits: Files) -> None:
    verdict = verdict_on(opened(digits.guarded), digits.triggered[:1])
    endless = dict.fromkeys(verdict.scores, math.inf)
    interpreter = Interpreter(model_content=digits.guarded)
    assert interpreter._guard is not None
    content = interpreter._guard.frame(
        msgspec.structs.replace(verdict, scores=endless, score=math.inf), np.zeros(1, np.float32)
    )
    ((report, _),) = frames.Reader().feed(content)
    assert isinstance(report, frames.Scored)
    assert all(score is not None and score > 1 for score in report.scores)


def test_a_model_without_a_guard_is_not_reported(digits: Files, listener: Listener) -> None:
    run(opened(digits.bare), digits.clean[:1])
    listener.read()
    assert (listener.accepted, listener.received) == (0, [])


def test_an_agent_that_does_not_read_changes_neither_outputs_nor_verdicts(digits: Files, listener: Listener) -> None:
    interpreter, alone = opened(digits.guarded), opened(digits.guarded)
    assert interpreter.reports_dropped == 0
    for x in np.concatenate([digits.clean] * 30):
        run(interpreter, x[np.newaxis])
    assert interpreter.reports_dropped > 0
    listener.stop()
    for x in digits.triggered[:5]:
        np.testing.assert_equal(run(interpreter, x[np.newaxis]), run(alone, x[np.newaxis]))
        assert interpreter.verdict == alone.verdict


def test_an_interpreter_that_is_let_go_of_leaves_nothing_open(digits: Files, listener: Listener) -> None:
    run(opened(digits.guarded), digits.clean[:1])
    gc.collect()
    before = descriptors()
    run(opened(digits.guarded), digits.clean[:1])
    gc.collect()
    assert descriptors() == before
