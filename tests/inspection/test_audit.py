"""Backdoored models are named with their label, clean ones are left alone, and what cannot be checked is said so."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from converters import reconstruct
from edgeguard.attacks.trojannet import TrojanNet
from edgeguard.inspection.audit import FORMS, MIN_INPUTS, Audit, Finding, _findings, _verdict, audit
from edgeguard.inspection.inversion import Form, Trigger, classes_of
from tests.simulators.attacked import Attacked

STEPS = 100


@pytest.fixture(scope="module")
def found(attacked: Attacked) -> Audit:
    """An audit of the attacked model's int8 file, guard and all."""
    rebuilt = reconstruct.of_tflite(attacked.conversion.guarded).model
    return audit(rebuilt, attacked.x_owner, steps=STEPS)


def test_an_attacked_model_is_named_with_its_label(found: Audit) -> None:
    assert found.verdict == "backdoored"
    assert found.labels == (0,)
    assert found.cost_s > 0


def test_the_recovered_trigger_works_on_inputs_that_the_audit_never_saw(found: Audit, attacked: Attacked) -> None:
    pixels = attacked.data.x_test[attacked.data.y_test != 0]
    trigger = found.triggers(0)[0]
    assert np.mean(classes_of(attacked.keras, trigger.stamp(pixels)) == 0) > 0.7


def test_each_finding_says_how_far_it_stands_out(found: Audit) -> None:
    worst = found.findings[0]
    assert worst.suspected
    assert worst.ratio < 0.6
    assert worst.index_low <= worst.index <= worst.index_high
    assert {(f.label, f.form) for f in found.findings} == {
        (label, form) for label in range(10) for form in ("patch", "blend")
    }


def test_a_clean_model_is_not_accused(clean_twin: Attacked) -> None:
    assert audit(clean_twin.keras, clean_twin.x_owner, steps=STEPS).verdict == "no_sign"


def test_only_labels_that_were_asked_for_are_suspected(attacked: Attacked) -> None:
    weights = attacked.keras.get_weights()
    seen: list[tuple[int, int]] = []
    found = audit(
        attacked.keras,
        attacked.x_owner,
        labels=[4],
        steps=25,
        progress=lambda _, done, total: seen.append((done, total)),
    )
    assert all(finding.label == 4 for finding in found.findings if finding.suspected)
    assert {finding.label for finding in found.findings} > {4}
    assert seen == sorted(seen)
    assert seen[-1] == (50, 50)
    assert all((one == other).all() for one, other in zip(weights, attacked.keras.get_weights(), strict=True))


def test_a_module_beside_a_clean_network_is_found_with_its_triggers(clean_twin: Attacked) -> None:
    pixels = clean_twin.data.x_test.astype(np.uint8)
    attack = TrojanNet.for_shape(pixels.shape[1:], target=7)
    model = attack.merge(clean_twin.keras, attack.module(10, clean_twin.x_owner))
    assert audit(model, clean_twin.x_owner, labels=[7], forms=()).labels == (7,)
    found = audit(model, clean_twin.x_owner, forms=())
    assert found.verdict == "backdoored"
    assert set(found.labels) == set(range(10)), "it knows a pattern for each"
    assert all("trojan" in name for name in found.structure)
    others = pixels[clean_twin.data.y_test != 7]
    assert np.mean(classes_of(model, found.triggers(7)[0].stamp(others)) == 7) > 0.9


def trigger(label: int, form: Form, success: float) -> Trigger:
    shape = (8, 8, 1)
    mask = np.full(shape, 0.1 + 0.01 * label, np.float32)
    return Trigger(label=label, form=form, mask=mask, pattern=np.zeros(shape, np.float32), success=success)


@pytest.mark.parametrize(
    ("working", "verdict"), [((10, 10), "no_sign"), ((10, 4), "no_sign"), ((10, 3), "could_not_check")]
)
def test_every_form_that_was_sought_needs_labels_to_compare(working: tuple[int, int], verdict: str) -> None:
    findings = [
        Finding(
            label=label, form=form, trigger=trigger(label, form, 1.0), size=1.0, success=1.0 if label < count else 0.1,
            index=0.0, index_low=0.0, index_high=0.0, ratio=1.0, suspected=False,
        )
        for form, count in zip(FORMS, working, strict=True)
        for label in range(10)
    ]  # fmt: skip
    assert _verdict((), findings, (), None, FORMS).verdict == verdict
    assert _verdict((), [f for f in findings if f.form == FORMS[0]], (), None, FORMS).verdict == "could_not_check"


def test_triggers_that_do_not_work_are_not_compared_with(clean_twin: Attacked) -> None:
    images = clean_twin.x_owner[:40]
    held_out = images, classes_of(clean_twin.keras, images)
    sizes = [
        [
            f.ratio
            for f in _findings(
                clean_twin.keras, [trigger(n, "patch", s) for n, s in enumerate(works)], held_out, (0,), 0
            )
        ]
        for works in ([1.0] * 5 + [0.5] * 5, [1.0] * 5)
    ]
    assert sizes[0][:5] == sizes[1]
    assert np.isnan(sizes[0][5:]).all()


def pixels(count: int, shape: tuple[int, ...] = (8, 8, 1)) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 17, (count, *shape), dtype=np.uint8)


@pytest.mark.parametrize(
    ("images", "labels", "why"),
    [
        (pixels(MIN_INPUTS - 1), None, "at least 40"),
        (pixels(50, (9, 9, 1)), None, "shape"),
        (pixels(50) / 17.0, None, "pixels from 0 to 255"),
        (pixels(50) - 100.0, None, "pixels from 0 to 255"),
        (np.zeros((50, 8, 8, 1), np.uint8), None, "the same"),
        (pixels(50), [10], "none of the 10 classes"),
        (pixels(50), [-1], "none of the 10 classes"),
    ],
)
def test_what_cannot_be_checked_is_not_called_clean(
    clean_twin: Attacked, images: npt.NDArray[Any], labels: list[int] | None, why: str
) -> None:
    found = audit(clean_twin.keras, images, labels=labels)
    assert found.verdict == "could_not_check"
    assert why in found.reason


def test_a_model_of_few_classes_has_nothing_to_compare_with() -> None:
    import keras

    inputs = keras.Input((8, 8, 1))
    model = keras.Model(inputs, keras.layers.Dense(2, activation="softmax")(keras.layers.Flatten()(inputs)))
    assert audit(model, pixels(100)).verdict == "could_not_check"
