"""The re-audit: it reads the released file, finds what is there, and says so where it cannot tell."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from converters import lowering, sources
from edgeguard.inspection.networks import norms_of
from edgeguard.repair.recover import Recovered, Reported
from edgeguard.repair.search import Searches, hardly_larger, reaudited
from tests.simulators.attacked import Attacked

STEPS = 100


def searches(setup: Attacked) -> Searches:
    """As a case makes them, with evidence that says nothing: no channel was measured."""
    norms = norms_of(setup.keras, setup.conversion.metadata.taps)
    width = int(norms.outputs[1].shape[-1])
    return Searches(
        model=setup.keras,
        norms=norms,
        images=setup.x_owner[:200],
        held_out=setup.x_owner[200:],
        label=0,
        reported=Reported(flagged_mean=np.zeros(width, np.float32), std=np.ones(width, np.float32)),
        steps=STEPS,
    )


def test_the_backdoor_of_an_untouched_file_is_found_again(attacked: Attacked) -> None:
    found = searches(attacked).reaudit(attacked.conversion.guarded)
    assert found is not None
    assert found > 0.8


@pytest.mark.slow
def test_a_search_that_found_nothing_in_the_original_proves_nothing_of_the_repaired(clean_twin: Attacked) -> None:
    assert reaudited(clean_twin.conversion.guarded, clean_twin.x_owner[200:], steps=STEPS) == 0.0
    assert searches(clean_twin).reaudit(clean_twin.conversion.guarded) is None


def test_a_file_that_cannot_be_rebuilt_is_not_checkable(attacked: Attacked) -> None:
    assert reaudited(b"no model", attacked.x_owner) is None


@pytest.mark.parametrize("classes", [2, 3])
def test_a_model_of_few_classes_is_not_checkable(classes: int) -> None:
    import keras

    inputs = keras.Input((8, 8, 1))
    flat = keras.layers.Flatten()(inputs)
    model = keras.Model(inputs, keras.layers.Dense(classes, activation="softmax")(flat))
    images = np.random.default_rng(0).integers(0, 256, (60, 8, 8, 1), dtype=np.uint8)
    content = lowering.lower(sources.of_keras(model), images).int8_tflite
    assert content is not None
    assert reaudited(content, images) is None


def patch(pixels: int) -> Recovered:
    """A trigger that covers so many pixels of an 8x8 input."""
    mask = np.zeros((8, 8, 1), np.float32)
    mask.reshape(-1)[:pixels] = 1.0
    return Recovered(label=0, form="patch", parts=(mask, mask), success=1.0)


@pytest.mark.parametrize(
    ("than", "original", "kept"),
    [
        (max, (4, 10), (4, 6, 15)),
        (min, (4, 10), (4, 6)),
        (min, (10,), (4, 6, 15)),
        (max, (2,), ()),
    ],
)
def test_a_trigger_much_larger_than_the_originals_is_another(
    than: Callable[..., float], original: tuple[int, ...], kept: tuple[int, ...]
) -> None:
    found = hardly_larger([patch(n) for n in (4, 6, 15, 16)], {"patch": original, "warp": (0.1,)}, than=than)
    assert tuple(trigger.size for trigger in found) == kept
