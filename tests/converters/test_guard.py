"""Guarding changes nothing but what it adds, can be taken out again, and is fingerprinted."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from converters import calibration, flatbuffer, guard, micro, pipeline, sources, taps, verify
from converters.guard import Compiled
from edgeguard.contract.guard import FEATURES, SCORES, logit_columns
from edgeguard.detection import runtime
from edgeguard.detection.guarded import TfliteModel
from edgeguard.detection.statistics import fit, raw_scores, set_thresholds, tails
from edgeguard.errors import ConfigError, ModelError
from tests.simulators import needs
from tests.simulators.attacked import Attacked

THIRD_PARTY = (
    "mlperf_tiny_resnet8_int8.tflite",
    "mlperf_tiny_resnet8_float32.tflite",
    "mlperf_tiny_kws_float32.tflite",
)


def rebuilt(attacked: Attacked) -> tuple[bytes, Compiled]:
    """The attacked model's guard, fitted again from its parts."""
    bare, owner = attacked.conversion.bare, attacked.x_owner
    plan = taps.plan_taps(flatbuffer.parse(bare))
    measured = calibration.measure(guard.bake_features(bare, plan), plan, owner)
    features, predicted = measured.features, measured.predicted
    layout = guard.layout(plan)
    statistics = fit(features[:300], guard.blocks(layout), logit_columns(layout))
    scale = tails(raw_scores(statistics, features[:300]), 0.01)
    raw = raw_scores(statistics, features[300:])
    compiled = Compiled(statistics, set_thresholds(raw, predicted[300:], plan.classes, 0.01, scale=scale).thresholds)
    return guard.bake(bare, plan, compiled, attacked.conversion.metadata)[0], compiled


def test_the_models_own_outputs_are_bit_identical_on_random_bytes(attacked: Attacked) -> None:
    rng = np.random.default_rng(0)
    for name in runtime.available():
        before = TfliteModel(attacked.conversion.bare, runtime=name)
        after = TfliteModel(attacked.conversion.guarded, runtime=name)
        for _ in range(100):
            tensor = rng.integers(-128, 128, (1, 8, 8, 1), dtype=np.int8)
            assert before.invoke(tensor)[0].tobytes() == after.invoke(tensor)[0].tobytes()


def test_the_guard_outputs_follow_the_models_own_and_stand_in_the_signature(attacked: Attacked) -> None:
    model = flatbuffer.parse(attacked.conversion.guarded)
    graph = model.subgraphs[0]
    names = [flatbuffer.text(graph.tensors[o].name) for o in graph.outputs]
    assert names[-2:] == [SCORES, FEATURES]
    assert [flatbuffer.text(o.name) for o in model.signatureDefs[0].outputs][-2:] == [SCORES, FEATURES]


def test_stripping_a_guard_gives_the_bare_model_back(attacked: Attacked) -> None:
    model = flatbuffer.parse(attacked.conversion.guarded)
    guard.strip(model)
    assert flatbuffer.fingerprint(model) == flatbuffer.fingerprint(flatbuffer.parse(attacked.conversion.bare))


@pytest.mark.parametrize("name", ["edgeguard_Identity", SCORES])
def test_an_output_of_the_model_that_is_named_like_a_guards_is_never_taken_for_one(
    attacked: Attacked, name: str
) -> None:
    model = flatbuffer.parse(attacked.conversion.bare)
    model.subgraphs[0].tensors[int(model.subgraphs[0].outputs[0])].name = name.encode()
    content = flatbuffer.pack(model)
    with pytest.raises(ModelError, match="that prefix for the guard alone"):
        calibration.plan(content)


def test_there_is_a_detector_for_each_norm_with_the_logits_and_one_of_the_logits_alone(attacked: Attacked) -> None:
    taps = attacked.conversion.metadata.taps
    of = {kind: {c for tap in taps if tap.kind == kind for c in tap.columns} for kind in ("linf", "l1", "logit")}
    linf, l1, logit = guard.blocks(taps)
    assert (linf.detector, l1.detector, logit.detector) == ("linf", "l1", "logit")
    assert set(linf.columns) == of["linf"] | of["logit"]
    assert set(l1.columns) == of["l1"] | of["logit"]
    assert set(logit.columns) == of["logit"]
    assert linf.stretch > l1.stretch == logit.stretch == 1.0
    assert (linf.factors, l1.factors, logit.factors) == (0, None, None)


@pytest.mark.parametrize("compact", [False, True])
def test_matrices_stored_in_bytes_make_a_smaller_file_of_the_same_scores(compact: bool, attacked: Attacked) -> None:
    bare, compiled = attacked.conversion.bare, rebuilt(attacked)[1]
    plan = taps.plan_taps(flatbuffer.parse(bare))
    stored = replace(compiled, compact=compact)
    content = guard.bake(bare, plan, stored, attacked.conversion.metadata)[0]
    assert verify.verify(bare, content, stored, attacked.x_owner[:20]).runtimes
    smaller = len(rebuilt(attacked)[0]) - len(content)
    assert smaller > 3000 if compact else smaller == 0


def test_a_guard_whose_matrices_do_not_fit_stores_them_in_bytes_and_then_takes_fewer_factors(
    attacked: Attacked, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare, plan = calibration.plan(attacked.conversion.bare)

    def made(most: int) -> calibration.Guarded:
        monkeypatch.setattr(calibration, "MIN_GROWTH", most)
        monkeypatch.setattr(calibration, "GROWTH_SHARE", 0.0)
        return calibration.guard_model(bare, plan, attacked.x_owner)

    roomy = made(1 << 20)
    growth = len(roomy.content) - len(bare)
    tight = made(growth - 1)
    assert (roomy.compiled.compact, tight.compiled.compact) == (False, True)
    assert tight.compiled.statistics.projection.shape == roomy.compiled.statistics.projection.shape
    tighter = made(len(tight.content) - len(bare) - 1)
    assert len(tighter.compiled.statistics.projection) < len(tight.compiled.statistics.projection)
    assert tighter.compiled.compact


def test_guarding_anew_replaces_the_guard_and_keeps_the_model_digest(attacked: Attacked) -> None:
    other, metadata = rebuilt(attacked)[0], attacked.conversion.metadata
    again = pipeline.convert(sources.Source(name="again", tflite=other), attacked.x_owner, taps=1)
    assert again.metadata.model_digest == metadata.model_digest
    assert again.metadata.guard_digest != metadata.guard_digest
    assert len(TfliteModel(again.guarded).outputs) == 3


def test_the_same_model_and_data_give_the_same_bytes(attacked: Attacked) -> None:
    assert rebuilt(attacked)[0] == rebuilt(attacked)[0]


@pytest.mark.parametrize("what", ["constant", "metadata", "signature"])
def test_the_guard_digest_notices_a_changed(what: str, attacked: Attacked) -> None:
    model = flatbuffer.parse(attacked.conversion.guarded)
    before = guard.guard_digest(model)
    assert before == attacked.conversion.metadata.guard_digest
    if what == "constant":
        tensor = next(t for t in model.subgraphs[0].tensors if t.name == b"edgeguard_table")
        data = np.array(model.buffers[tensor.buffer].data)
        data[0] ^= 1
        model.buffers[tensor.buffer].data = data
    elif what == "signature":
        scores, features = model.signatureDefs[0].outputs[-2:]
        scores.tensorIndex, features.tensorIndex = features.tensorIndex, scores.tensorIndex
    else:
        entry = next(m for m in model.metadata if m.name == b"edgeguard")
        changed = msgspec.structs.replace(attacked.conversion.metadata, fpr=0.02)
        model.buffers[entry.buffer].data = np.frombuffer(msgspec.json.encode(changed), dtype=np.uint8)
    assert guard.guard_digest(model) != before
    assert guard.model_digest(model) == attacked.conversion.metadata.model_digest


def test_the_model_digest_notices_a_changed_weight(attacked: Attacked) -> None:
    model = flatbuffer.parse(attacked.conversion.bare)
    largest = max(model.buffers, key=lambda b: 0 if b.data is None else len(b.data))
    largest.data = np.array(largest.data)
    largest.data[7] ^= 1
    assert guard.model_digest(model) != attacked.conversion.metadata.model_digest


def test_constants_start_at_multiples_of_sixteen_bytes(attacked: Attacked) -> None:
    content = attacked.conversion.guarded
    constants = [
        bytes(np.asarray(b.data, dtype=np.uint8))
        for b in flatbuffer.parse(content).buffers
        if b.data is not None and len(b.data) >= 64 and np.any(b.data)  # zeros are found anywhere
    ]
    assert len(constants) > 5
    assert [content.find(constant) % 16 for constant in constants] == [0] * len(constants)


def test_verification_catches_a_guard_that_scores_otherwise(attacked: Attacked) -> None:
    content, compiled = rebuilt(attacked)
    wrong = Compiled(compiled.statistics, tuple(t * 1.01 for t in compiled.thresholds))
    verify.verify(attacked.conversion.bare, content, compiled, attacked.x_owner[:5])
    with pytest.raises(ModelError, match="as NumPy computes them"):
        verify.verify(attacked.conversion.bare, content, wrong, attacked.x_owner[:5])


def test_verification_catches_a_guard_that_changes_the_model(attacked: Attacked, clean_twin: Attacked) -> None:
    content, compiled = rebuilt(attacked)
    with pytest.raises(ModelError, match="bit-identical"):
        verify.verify(clean_twin.conversion.bare, content, compiled, attacked.x_owner[:5])


def test_a_tap_knows_the_layer_that_it_listens_to(attacked: Attacked) -> None:
    layers = {tap.source_layer for tap in attacked.conversion.metadata.taps}
    assert layers == {"relu2", "relu3", "logits"}
    for tap in attacked.conversion.metadata.taps:
        assert attacked.keras.get_layer(tap.source_layer).output.shape[-1] == tap.channels


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("net/relu2_1/Relu;net/bn2/add", "relu2"),
        ("net/conv_2/Conv2D", "conv_2"),
        ("Identity", ""),
        ("", ""),
    ],
)
def test_a_layer_is_found_in_a_tensors_name(name: str, layer: str) -> None:
    assert taps.source_layer(name, ["relu2", "conv_2", "conv"]) == layer


@pytest.mark.parametrize("name", THIRD_PARTY)
def test_a_third_party_model_is_guarded_and_verified_within_its_size(name: str) -> None:
    path = needs.third_party_model(name)
    model = TfliteModel(path.read_bytes())
    inputs = pipeline.made_up(model.input_shape, model.input_dtype, model.input_quantization, 420)
    done = pipeline.convert(path, inputs, quantised=False, synthetic=True)
    assert done.metadata.model_digest == guard.model_digest(flatbuffer.parse(path.read_bytes()))
    assert set(done.verified.runtimes) >= {n for n in runtime.available() if n != "tensorflow"}
    assert len(done.guarded) - len(done.bare) <= calibration.allowed_growth(len(done.bare))
    assert flatbuffer.parse(done.bare).signatureDefs


def test_verification_covers_tflite_micro_and_lists_what_did_not_run(attacked: Attacked) -> None:
    verified = attacked.conversion.verified
    assert (micro.NAME in verified.runtimes) == micro.available()
    assert set(verified.runtimes) | set(verified.not_run) == {*runtime.known(), micro.NAME}


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_a_damaged_file_is_refused_or_parsed_but_nothing_else_happens(attacked: Attacked, data: st.DataObject) -> None:
    content = bytearray(attacked.conversion.bare)
    for position in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=6)):
        content[position] = data.draw(st.integers(0, 255))
    try:
        model = flatbuffer.parse(bytes(content))
    except ModelError:
        return
    assert len(model.subgraphs) == 1


@pytest.mark.parametrize(
    ("count", "fpr", "message"),
    [(300, 0.01, "at least 398"), (600, 0.0001, "at least 39"), (600, 0.0, "--fpr"), (600, 0.9, "--fpr")],
)
def test_a_calibration_set_too_small_for_the_rate_asked_is_refused_with_numbers(
    attacked: Attacked, count: int, fpr: float, message: str
) -> None:
    source = sources.Source(name="x", tflite=attacked.conversion.bare)
    with pytest.raises((ModelError, ConfigError), match=message):
        pipeline.convert(source, attacked.x_owner[:count], fpr=fpr)


def test_a_saved_model_converts_like_the_keras_file_that_it_came_from(
    attacked: Attacked, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("saved")
    attacked.keras.export(str(folder / "model"), verbose=False)
    attacked.keras.save(folder / "model.keras")
    from_saved = pipeline.convert(folder / "model", attacked.x_owner)
    from_keras = pipeline.convert(folder / "model.keras", attacked.x_owner)
    answers = [TfliteModel(done.bare).predict(attacked.data.x_test[:100]) for done in (from_saved, from_keras)]
    assert np.array_equal(answers[0], answers[1])


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("model.tflite", b"\0\0\0\0TFL3", ModelError),
        ("model.tflite", b"no model", ModelError),
        ("model.keras", b"no zip", ModelError),
        ("model.onnx", b"\x08\x07", ModelError),
        ("model.tflite", None, ConfigError),
    ],
)
def test_what_is_not_a_model_is_one_clear_error(
    tmp_path_factory: pytest.TempPathFactory, name: str, content: bytes | None, error: type[Exception]
) -> None:
    path = tmp_path_factory.mktemp("bad") / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(error) as caught:
        pipeline.convert(path, np.random.default_rng(0).integers(0, 256, (400, 8, 8, 1), dtype=np.uint8))
    assert "\n" not in str(caught.value)
