"""A guarded model on a runtime: verdicts, refused inputs, refused files, the choice of runtime."""

from __future__ import annotations

import math
import subprocess
import sys

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from edgeguard.contract import guard
from edgeguard.detection import metadata, runtime
from edgeguard.detection.guarded import GuardedModel, TfliteModel
from edgeguard.detection.verdict import judge
from edgeguard.errors import ConfigError, ModelError
from tests.simulators import needs
from tests.simulators.attacked import Attacked


def joint_scores(model: GuardedModel, images: np.ndarray) -> np.ndarray:
    return np.asarray([model.infer(x).verdict.score for x in images])


def test_the_attack_on_the_int8_model_is_detected_and_clean_inputs_are_left_alone(attacked: Attacked) -> None:
    model = GuardedModel.load(attacked.conversion.guarded)
    images = attacked.data.x_test.astype(np.uint8)
    others = attacked.data.y_test != attacked.attack.target
    clean = joint_scores(model, images)
    triggered = joint_scores(model, attacked.attack.stamp(images))[others]
    truth = np.r_[np.zeros(len(clean)), np.ones(len(triggered))]
    assert roc_auc_score(truth, np.r_[clean, triggered]) >= 0.99
    assert np.mean(triggered > 1) >= 0.95
    assert np.mean(clean > 1) <= 0.03


def test_on_a_clean_twin_the_detector_stays_silent(clean_twin: Attacked) -> None:
    model = GuardedModel.load(clean_twin.conversion.guarded)
    assert np.mean(joint_scores(model, clean_twin.data.x_test) > 1) <= 0.03


def test_every_runtime_gives_the_same_answers(attacked: Attacked) -> None:
    needs.python_module("tflite_runtime", "tflite-runtime", until=(3, 11))
    names = [n for n in runtime.available() if n != "tensorflow"]
    models = [GuardedModel.load(attacked.conversion.guarded, runtime=name) for name in names]
    for x in attacked.data.x_test[:50]:
        first, *others = [m.infer(x) for m in models]
        for other in others:
            assert other.verdict.predicted == first.verdict.predicted
            assert other.verdict.score == pytest.approx(first.verdict.score, rel=0.1, abs=0.05)


def test_tflite_micro_runs_the_same_file(attacked: Attacked) -> None:
    micro = needs.python_module("tflite_micro.python.tflite_micro.runtime", "tflite-micro", until=(3, 12))
    model = GuardedModel.load(attacked.conversion.guarded)
    interpreter = micro.Interpreter.from_bytes(attacked.conversion.guarded)
    images = attacked.data.x_test[:40].astype(np.uint8)
    for x in np.concatenate([images, attacked.attack.stamp(images)]):
        interpreter.set_input((x.astype(np.int16) - 128).astype(np.int8)[np.newaxis], 0)
        interpreter.invoke()
        expected = model.infer(x)
        assert int(interpreter.get_output(0).argmax()) == expected.verdict.predicted
        assert interpreter.get_output(1).max() == pytest.approx(expected.verdict.score, rel=0.1, abs=0.05)


@pytest.mark.parametrize(
    "x",
    [
        np.zeros((8, 8), np.uint8),
        np.zeros((1, 8, 8, 1), np.uint8),
        np.zeros((8, 8, 3), np.uint8),
        np.zeros((8, 8, 1), np.float32),
        np.full((8, 8, 1), np.nan),
    ],
    ids=["no channel", "batch axis", "colour", "floats", "NaN"],
)
def test_an_input_that_does_not_fit_is_refused_with_what_was_expected(attacked: Attacked, x: np.ndarray) -> None:
    model = GuardedModel.load(attacked.conversion.guarded)
    with pytest.raises(ModelError, match=r"expected uint8\[8, 8, 1\]"):
        model.infer(x)


def test_a_model_without_guard_is_refused_with_advice(attacked: Attacked) -> None:
    with pytest.raises(ModelError, match="edgeguard convert"):
        GuardedModel.load(attacked.conversion.bare)


def test_metadata_is_read_without_any_runtime(attacked: Attacked) -> None:
    assert metadata.read(attacked.conversion.guarded) == attacked.conversion.metadata


@given(st.binary(max_size=200))
def test_random_bytes_are_no_model(content: bytes) -> None:
    with pytest.raises(ModelError):
        metadata.read(content)
    with pytest.raises(ModelError):
        metadata.read(content[:4] + b"TFL3" + content[4:])


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_damaged_file_is_refused_or_read_but_nothing_else_happens(attacked: Attacked, data: st.DataObject) -> None:
    content = bytearray(attacked.conversion.guarded)
    # The header and the tables lie at both ends; constants fill the middle.
    spots = st.one_of(st.integers(0, 300), st.integers(len(content) - 20_000, len(content) - 1))
    for position in data.draw(st.lists(spots, min_size=1, max_size=8)):
        content[position] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, 2))
    damaged = bytes(content[: len(content) // (cut + 1)])
    try:
        found = metadata.read(damaged)
    except ModelError:
        return
    assert isinstance(found, guard.GuardMetadata)


@pytest.mark.parametrize(
    ("scores", "status"),
    [
        ({"linf": 0.3, "l1": 1.0}, "clean"),
        ({"linf": 0.3, "l1": 1.01}, "flagged"),
        ({"linf": math.nan, "l1": 0.1}, "not checked"),
        ({"linf": math.nan, "l1": 9.0}, "not checked"),
        ({}, "not checked"),
    ],
)
def test_a_verdict_follows_the_largest_score_and_not_checked_is_never_clean(
    scores: dict[str, float], status: str
) -> None:
    verdict = judge(3, scores)
    assert verdict.status == status
    assert verdict.flagged == (status == "flagged")
    assert (verdict.stages == ()) == (status == "not checked")


def test_the_p_value_is_that_of_the_next_calibration_score() -> None:
    table = ((0.5, 0.4), (1.0, 0.01), (2.0, 0.001))
    assert judge(0, {"a": 0.7}, table).p_value == 0.01
    assert judge(0, {"a": 50.0}, table).p_value == 0.001


def test_an_unknown_runtime_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="onnx"):
        runtime.choose("onnx")


def test_the_environment_forces_a_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(runtime.ENVIRONMENT, "tensorflow")
    assert runtime.choose() == "tensorflow"


def test_without_other_runtimes_tensorflows_is_used(attacked: Attacked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "available", lambda: ("tensorflow",))
    model = GuardedModel.load(attacked.conversion.guarded)
    assert model.runtime.name == "tensorflow"
    assert model.infer(attacked.data.x_test[0]).verdict.status == "clean"


def test_reading_verdicts_loads_no_training_framework() -> None:
    program = (
        "import sys, edgeguard.detection.guarded, edgeguard.detection.statistics\n"
        "print([m for m in ('tensorflow', 'keras', 'onnx', 'sklearn', 'converters') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_activations_out_of_all_bounds_are_not_checked(attacked: Attacked) -> None:
    from converters import pipeline, sources

    done = pipeline.convert(sources.of_keras(attacked.keras), attacked.x_owner, quantised=False)
    model = GuardedModel.load(done.guarded)
    described = msgspec.structs.replace(
        model.metadata, input=msgspec.structs.replace(model.metadata.input, dtype="float32")
    )
    wide = GuardedModel(done.guarded, TfliteModel(done.guarded), described)
    verdict = wide.infer(attacked.x_owner[0].astype(np.float32) * 1e18).verdict
    assert verdict.status == "not checked"
    assert wide.infer(attacked.x_owner[0].astype(np.float32)).verdict.status == "clean"


def test_a_file_whose_last_outputs_are_not_a_guards_is_not_run(attacked: Attacked) -> None:
    from converters import flatbuffer

    changed = flatbuffer.parse(attacked.conversion.guarded)
    graph = changed.subgraphs[0]
    graph.tensors[int(graph.outputs[-2])].name = b"something_else"
    with pytest.raises(ModelError, match="guard outputs"):
        GuardedModel.load(flatbuffer.pack(changed))
