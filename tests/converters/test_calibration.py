"""Fitting a guard: what data it takes, what it promises, and doing it again on a device."""

from __future__ import annotations

import io
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest

from converters import calibration, flatbuffer, guard, pipeline, sources, verify
from edgeguard.detection import metadata, sidecar
from edgeguard.detection.guarded import GuardedModel, TfliteModel
from edgeguard.errors import ConfigError, EdgeGuardError, ModelError, TrustError
from tests.simulators.attacked import Attacked

Array = npt.NDArray[Any]
PIXELS = np.random.default_rng(0).integers(0, 256, (400, 8, 8, 1), dtype=np.uint8)


def guarded(attacked: Attacked, inputs: Array, **options: Any) -> calibration.Guarded:
    """The attacked model's bare file, guarded with some inputs."""
    bare, plan = calibration.plan(attacked.conversion.bare)
    return calibration.guard_model(bare, plan, inputs, **options)


def other_half(attacked: Attacked) -> npt.NDArray[np.uint8]:
    """Clean inputs that the attacked model was not calibrated with."""
    return attacked.data.x_test.astype(np.uint8)


def test_calibrating_anew_gives_the_bytes_of_guarding_the_same_file_with_the_same_data(attacked: Attacked) -> None:
    first, anew = guarded(attacked, attacked.x_owner), guarded(attacked, other_half(attacked))
    again = calibration.recalibrate(first.content, other_half(attacked))
    assert again.content == anew.content != first.content


def test_calibrating_anew_keeps_the_model_digest_taps_and_classes_and_changes_the_guard_digest(
    attacked: Attacked,
) -> None:
    before = attacked.conversion.metadata
    after = calibration.recalibrate(attacked.conversion.guarded, other_half(attacked)).metadata
    assert (after.model_digest, after.taps, after.classes, after.fpr) == (
        before.model_digest,
        before.taps,
        before.classes,
        before.fpr,
    )
    assert after.guard_digest != before.guard_digest


def test_calibrating_anew_with_clean_data_of_another_range_keeps_what_the_file_takes(attacked: Attacked) -> None:
    numbers = attacked.x_owner.astype(np.float32)
    model = guarded(attacked, numbers)
    darker = np.minimum(numbers, 0.9 * numbers.max())
    assert calibration.recalibrate(model.content, darker).metadata.input == model.metadata.input


def test_a_file_calibrated_anew_passes_verification(attacked: Attacked) -> None:
    done = calibration.recalibrate(attacked.conversion.guarded, other_half(attacked), fpr=0.02)
    verified = verify.verify(done.bare, done.content, done.compiled, attacked.x_owner)
    assert done.metadata.fpr == 0.02
    assert verified.runtimes[0] == done.metadata.environment.runtime


def test_a_file_without_a_guard_cannot_be_calibrated_anew(attacked: Attacked) -> None:
    with pytest.raises(ModelError, match="without a guard"):
        calibration.recalibrate(attacked.conversion.bare, other_half(attacked))


def test_a_model_that_was_changed_under_its_guard_is_not_calibrated_anew(attacked: Attacked) -> None:
    model = flatbuffer.parse(attacked.conversion.guarded)
    own = [t for t in model.subgraphs[0].tensors if not guard.is_guard_tensor(t)]
    weights = max((model.buffers[t.buffer] for t in own), key=lambda b: 0 if b.data is None else len(b.data))
    weights.data = np.roll(weights.data, 1)
    with pytest.raises(TrustError, match="it was changed"):
        calibration.recalibrate(flatbuffer.pack(model), other_half(attacked))


def test_calibrating_anew_keeps_the_order_of_taps_whatever_the_order_of_the_guards_ops(attacked: Attacked) -> None:
    model = flatbuffer.parse(attacked.conversion.guarded)
    described = attacked.conversion.metadata
    shallow, deep, logits = described.taps[:1], described.taps[1:3], described.taps[3:]
    turned = msgspec.structs.replace(described, taps=deep + shallow + logits)
    assert list(guard.tapped(model, turned).items()) == list(guard.tapped(model, described).items())[::-1]
    lying = msgspec.structs.replace(described, taps=shallow + logits)
    with pytest.raises(ModelError, match="other activations"):
        guard.tapped(model, lying)


def test_calibrating_anew_with_another_type_of_data_is_refused(attacked: Attacked) -> None:
    with pytest.raises(ModelError, match=r"float32.*uint8"):
        calibration.recalibrate(attacked.conversion.guarded, other_half(attacked).astype(np.float32))


def test_calibrating_needs_no_training_framework_and_no_onnx(attacked: Attacked, tmp_path: Path) -> None:
    model, data = tmp_path / "m.tflite", tmp_path / "clean.npz"
    model.write_bytes(attacked.conversion.guarded)
    np.savez(data, x=other_half(attacked))
    program = (
        "import sys\n"
        "from edgeguard.cli import app\n"
        f"app(['calibrate', {str(model)!r}, '--data', {str(data)!r}], standalone_mode=False)\n"
        "heavy = {'tensorflow', 'keras', 'onnx', 'scipy', 'sklearn'} & sys.modules.keys()\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    again = metadata.read((tmp_path / "m.calibrated.tflite").read_bytes())
    assert again.model_digest == attacked.conversion.metadata.model_digest


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (PIXELS[:300], "got 300 inputs; expected at least 398"),
        (PIXELS.astype(bool), "type bool"),
        (PIXELS.astype(np.complex64), "type complex64"),
        (np.where(PIXELS == 7, np.nan, PIXELS), "NaN"),
        (np.where(PIXELS == 7, 1e300, PIXELS.astype(np.float64)), "infinite"),
        (np.concatenate([PIXELS[:21]] * 20), "420 inputs, 21 of them different; expected at least 398"),
    ],
    ids=["too few", "bool", "complex", "NaN", "overflow", "repeated"],
)
def test_calibration_data_that_cannot_be_used_is_refused(inputs: Array, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        calibration.prepare(inputs, 0.01)


@pytest.mark.parametrize("count", [8, 9, 40])
def test_inputs_of_one_group_stay_in_one_half_and_neighbouring_groups_part(count: int) -> None:
    groups = np.repeat(np.arange(count) * 7, 5)
    split = calibration.halves(len(groups), groups=groups)
    assert sorted([*split.fit, *split.threshold]) == list(range(len(groups)))
    fit, threshold = set(groups[split.fit]), set(groups[split.threshold])
    assert not fit & threshold
    for first in range(0, count - 1, 2):
        assert len({first * 7, first * 7 + 7} & fit) == 1
    assert list(split.fit) != sorted(split.fit)
    assert len({tuple(sorted(set(groups[calibration.halves(len(groups), s, groups).fit]))) for s in range(9)}) > 1


def test_groups_of_uneven_size_still_give_halves_of_about_one_size() -> None:
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(100), rng.integers(1, 40, 100))
    split = calibration.halves(len(groups), groups=groups)
    assert abs(len(split.fit) - len(split.threshold)) <= 40


def test_groups_that_leave_a_half_too_small_are_refused_with_the_numbers(attacked: Attacked) -> None:
    bare, plan = calibration.plan(attacked.conversion.bare)
    groups = np.repeat([0, 1, 2, 3], [570, 5, 5, 10])
    with pytest.raises(ModelError, match=r"groups that divide into halves of .* at least 199 in each"):
        calibration.guard_model(bare, plan, attacked.x_owner[:590], groups=groups)


def test_one_group_that_is_most_of_a_half_still_gives_a_cascade(attacked: Attacked) -> None:
    bare, plan = calibration.plan(attacked.conversion.bare)
    groups = np.repeat([0, 1, 2, 3], [5, 285, 290, 10])
    assert calibration.guard_model(bare, plan, attacked.x_owner[:590], groups=groups, sidecar=True).sidecar is not None


@pytest.mark.parametrize("groups", [np.zeros(50, np.int64), np.arange(49), np.arange(50) // 20])
def test_groups_that_do_not_fit_or_are_too_few_are_refused(groups: npt.NDArray[np.int64]) -> None:
    with pytest.raises(ModelError, match="at least 4 groups"):
        calibration.halves(50, groups=groups)


@pytest.mark.parametrize("fpr", [0.0, -1.0, 0.6, float("nan")])
def test_a_false_positive_rate_that_is_none_is_refused(fpr: float) -> None:
    with pytest.raises(ConfigError, match="--fpr"):
        calibration.prepare(PIXELS, fpr)


@pytest.mark.parametrize(
    ("inputs", "fits"),
    [
        (PIXELS, True),
        (PIXELS / 255.0, False),
        (PIXELS * 300.0, False),
        (PIXELS - 128.0, False),
        (PIXELS[:, :7], False),
    ],
    ids=["pixels", "0 to 1", "far too large", "centred", "another shape"],
)
def test_data_must_have_the_shape_and_fill_the_range_that_the_model_was_quantised_for(
    inputs: Array, fits: bool
) -> None:
    if fits:
        calibration.check_fit(inputs, (8, 8, 1), np.dtype(np.int8), (1.0, -128))
        return
    with pytest.raises(ModelError, match="calibration set"):
        calibration.check_fit(inputs, (8, 8, 1), np.dtype(np.int8), (1.0, -128))


@pytest.mark.parametrize(
    ("inputs", "fits"),
    [(PIXELS, True), (PIXELS.astype(np.float32), True), (PIXELS / 255.0, False), (PIXELS * 3.0, False)],
    ids=["pixels", "pixels as floats", "0 to 1", "too large"],
)
def test_a_whole_number_input_without_a_scale_takes_whole_numbers_of_its_range(inputs: Array, fits: bool) -> None:
    if fits:
        calibration.check_fit(inputs, (8, 8, 1), np.dtype(np.uint8))
        return
    with pytest.raises(ModelError, match="whole numbers from 0 to 255"):
        calibration.check_fit(inputs, (8, 8, 1), np.dtype(np.uint8))


@pytest.mark.parametrize(("scale", "zero_point"), [(1.0, -128), (1.05, 40), (0.026, 0)])
def test_made_up_inputs_fit_the_range_of_a_quantised_input(scale: float, zero_point: int) -> None:
    inputs = pipeline.made_up((8, 8, 1), np.dtype(np.int8), (scale, zero_point), 400)
    calibration.check_fit(calibration.prepare(inputs, 0.01), (8, 8, 1), np.dtype(np.int8), (scale, zero_point))


def test_data_of_too_few_classes_is_refused_with_numbers(attacked: Attacked) -> None:
    few = np.concatenate([attacked.data.x_train[attacked.data.y_train < 4]]).astype(np.uint8)
    with pytest.raises(ModelError, match=r"4 of its 10 classes.*at least 5"):
        guarded(attacked, few)


def test_the_halves_are_disjoint_and_hold_every_input() -> None:
    split = calibration.halves(501, seed=3)
    assert len(split.fit) == 250
    assert sorted([*split.fit, *split.threshold]) == list(range(501))


def test_a_guard_fitted_on_made_up_inputs_never_calls_an_input_clean(attacked: Attacked) -> None:
    made_up = pipeline.made_up((8, 8, 1), np.dtype(np.int8), (1.0, -128), 400)
    model = GuardedModel.load(guarded(attacked, made_up, synthetic=True).content)
    verdict = model.infer(attacked.x_owner[0]).verdict
    assert (verdict.status, verdict.stages) == ("not checked", ())
    assert "synthetic" in verdict.reason


def test_the_sidecar_belongs_to_the_file_and_passes_its_own_self_test(attacked: Attacked) -> None:
    done = guarded(attacked, attacked.x_owner, sidecar=True)
    assert done.sidecar is not None
    found = sidecar.decode(done.sidecar, digest=str(done.metadata.sidecar_digest), metadata=done.metadata)
    assert sidecar.self_test(found, GuardedModel.load(done.content).infer).passed
    assert not sidecar.self_test(found, attacked_by(attacked)).passed


def attacked_by(attacked: Attacked) -> Any:
    """A model that sees the trigger on every input: what a self-test must notice."""
    model = GuardedModel.load(attacked.conversion.guarded)
    return lambda x: model.infer(attacked.attack.stamp(x[np.newaxis])[0])


def test_a_label_file_inside_the_model_file_stays(attacked: Attacked, tmp_path: Path) -> None:
    labelled = flatbuffer.attach(attacked.conversion.bare, [("labels.txt", b"zero\none\n")])
    bare, plan = calibration.plan(labelled)
    done = calibration.guard_model(bare, plan, attacked.x_owner)
    (tmp_path / "m.tflite").write_bytes(done.content)
    with zipfile.ZipFile(tmp_path / "m.tflite") as archive:
        assert archive.read("labels.txt") == b"zero\none\n"
    TfliteModel(done.content).invoke(np.zeros((1, 8, 8, 1), np.int8))
    assert done.metadata.model_digest == attacked.conversion.metadata.model_digest


def test_an_archive_with_a_huge_directory_is_refused_before_it_is_read(attacked: Attacked) -> None:
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w") as archive:
        for number in range(20_000):
            archive.writestr(str(number), b"")
    with pytest.raises(ModelError, match="a directory of"):
        flatbuffer.associated(attacked.conversion.bare + whole.getvalue())


@pytest.mark.parametrize("damage", ["truncated", "bomb", "many"])
def test_a_hostile_archive_behind_the_model_is_refused_or_dropped(attacked: Attacked, damage: str) -> None:
    files = [("labels.txt", b"zero\none\n")]
    if damage == "bomb":
        files = [("labels.txt", bytes(2 << 20))]
    elif damage == "many":
        files = [(f"{number}.txt", b"x") for number in range(100)]
    content = flatbuffer.attach(attacked.conversion.bare, files)
    if damage == "truncated":
        content = content[:-30]
    try:
        bare, _ = calibration.plan(content)
    except EdgeGuardError:
        return
    assert not flatbuffer.associated(bare)


@pytest.mark.parametrize("runtime", ["litert", "tflite-runtime"])
def test_an_open_batch_axis_stays_open(attacked: Attacked, runtime: str) -> None:
    from edgeguard.detection import runtime as runtimes

    if runtime not in runtimes.available():
        pytest.skip(f"{runtime} is not installed")
    done = pipeline.convert(
        sources.Source(name="open", tflite=with_open_batch(attacked.keras)), attacked.x_owner, quantised=False
    )
    interpreter, _ = runtimes.open_interpreter(done.guarded, name=runtime)
    images = attacked.x_owner[:3].astype(np.float32)
    one_by_one = [TfliteModel(done.guarded, runtime=runtime).invoke(x[np.newaxis]) for x in images]
    entry = interpreter.get_input_details()[0]["index"]
    interpreter.resize_tensor_input(entry, images.shape)
    interpreter.allocate_tensors()
    interpreter.set_tensor(entry, images)
    interpreter.invoke()
    for place, detail in enumerate(interpreter.get_output_details()):
        together = interpreter.get_tensor(detail["index"])
        expected = np.concatenate([outputs[place] for outputs in one_by_one])
        assert together == pytest.approx(expected, rel=1e-3, abs=1e-4)


def with_open_batch(model: Any) -> bytes:
    """A float TFLite file that takes any number of inputs."""
    import tensorflow as tf

    call = tf.function(lambda x: model(x, training=False))
    concrete = call.get_concrete_function(tf.TensorSpec((None, *model.inputs[0].shape[1:]), tf.float32))
    return bytes(tf.lite.TFLiteConverter.from_concrete_functions([sources._frozen(concrete)]).convert())


def test_metadata_of_a_schema_without_the_synthetic_field_still_reads(attacked: Attacked) -> None:
    raw = msgspec.json.decode(metadata.read_raw(attacked.conversion.guarded))
    del raw["calibration"]["synthetic"]
    from edgeguard.contract.guard import decode_metadata

    assert decode_metadata(msgspec.json.encode(raw)) == attacked.conversion.metadata


def test_the_taps_of_a_guarded_file_are_found_again(attacked: Attacked) -> None:
    model = flatbuffer.parse(attacked.conversion.guarded)
    tapped = guard.tapped(model, attacked.conversion.metadata)
    names = [flatbuffer.text(model.subgraphs[0].tensors[i].name) for i in tapped]
    assert names == list(dict.fromkeys(tap.tensor for tap in attacked.conversion.metadata.taps if tap.kind != "logit"))
