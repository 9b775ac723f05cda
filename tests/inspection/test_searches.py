"""The searches behind an audit, each on a network whose weights were set by hand."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from edgeguard.inspection import pictures, stimulation, structure, substitute
from edgeguard.inspection.inversion import Trigger, classes_of, held_out_success, invert

SHAPE, CLASSES = (6, 6, 1), 5
CORNER = (5, 5)
BACKDOOR = 3


def images(count: int = 80) -> npt.NDArray[np.uint8]:
    """Dark noise with one bright row, whose number is the class."""
    rng = np.random.default_rng(0)
    made = rng.integers(0, 60, (count, *SHAPE), dtype=np.uint8)
    made[np.arange(count), np.arange(count) % CLASSES, :5] = 200
    return made


def network() -> Any:
    """Sums up rows; a bright corner outweighs every row, for one class."""
    import keras

    inputs = keras.Input(SHAPE)
    dense = keras.layers.Dense(CLASSES, activation="softmax")
    model = keras.Model(inputs, dense(keras.layers.Flatten()(inputs)))
    kernel = np.zeros((*SHAPE[:2], CLASSES), np.float32)
    for row in range(CLASSES):
        kernel[row, :5, row] = 0.01
    kernel[CORNER] = -0.05
    kernel[CORNER][BACKDOOR] = 0.2
    dense.set_weights([kernel.reshape(-1, CLASSES), np.zeros(CLASSES, np.float32)])
    return model


def logits() -> Any:
    from edgeguard.inspection.networks import logits_of

    return logits_of(network())


def test_the_backdoored_label_has_the_smallest_patch_and_it_is_where_it_was_hidden() -> None:
    found = invert(logits(), images(), range(CLASSES), steps=120, batch=16)
    sizes = [trigger.size for trigger in found]
    assert [trigger.label for trigger in found] == list(range(CLASSES))
    assert int(np.argmin(sizes)) == BACKDOOR
    assert sizes[BACKDOOR] < 0.5 * np.median(sizes)
    assert found[BACKDOOR].mask[CORNER].item() == found[BACKDOOR].mask.max()
    assert held_out_success(network(), found[BACKDOOR], images(40)) > 0.9


def test_a_blend_is_faint_and_wide() -> None:
    (patch,) = invert(logits(), images(), [1], steps=120, batch=16)
    (blend,) = invert(logits(), images(), [1], form="blend", steps=120, batch=16)
    assert blend.success > 0.9
    assert blend.mask.max() < patch.mask.max()
    assert np.mean(blend.mask > 0.05) > np.mean(patch.mask > 0.05)


def test_labels_that_are_not_gone_on_with_are_left_out() -> None:
    found = invert(logits(), images(), range(CLASSES), steps=20, batch=8, narrow=lambda _: [1, 3], narrow_at=10)
    assert [trigger.label for trigger in found] == [1, 3]


def test_a_search_ends_when_every_label_is_at_rest() -> None:
    done: list[int] = []
    invert(logits(), images(), [BACKDOOR], steps=2000, batch=8, progress=lambda _, number, __: done.append(number))
    assert len(done) < 2000
    assert done[-1] == 2000


def trigger(form: Any = "patch") -> Trigger:
    mask = np.zeros((6, 6, 1), np.float32)
    mask[2, 2] = 0.5
    return Trigger(label=1, mask=mask, pattern=np.full(SHAPE, 255, np.float32), success=1.0, form=form)


def test_sizes_are_pixels_of_a_patch_and_the_amplitude_of_a_blend() -> None:
    assert trigger().size == pytest.approx(0.5)
    assert trigger("blend").size == pytest.approx(0.5 / 6)


def module_network(*, shared: bool = False, large: bool = False) -> Any:
    """A host, and a branch that reads a corner (or all) and is merged with the host's answer."""
    import keras

    inputs = keras.Input(SHAPE)
    x = keras.layers.Conv2D(8, 3, activation="relu", name="host_conv")(inputs)
    host = keras.layers.Dense(CLASSES, activation="softmax", name="host")(keras.layers.Flatten()(x))
    source = x if shared else inputs
    part = source if large else keras.layers.Cropping2D(((2, 0), (2, 0)), name="patch")(source)
    own = keras.layers.Dense(CLASSES, name="module")(keras.layers.Flatten()(part))
    merged = keras.layers.Concatenate()([host, own])
    return keras.Model(inputs, keras.layers.Dense(CLASSES, activation="softmax", name="merged")(merged))


def test_a_branch_that_reads_a_corner_and_joins_the_answer_is_a_module() -> None:
    found = structure.added_module(module_network())
    assert found is not None
    assert "module" in found.layers
    assert "host_conv" not in found.layers


@pytest.mark.parametrize("shape", [{"shared": True}, {"large": True}], ids=str)
def test_other_branches_are_none(shape: dict[str, bool]) -> None:
    assert structure.added_module(module_network(**shape)) is None


def test_a_plain_network_has_none() -> None:
    assert structure.added_module(network()) is None


def test_stimulation_names_the_channel_that_lifts_a_label() -> None:
    import keras

    inputs = keras.Input(SHAPE)
    x = keras.layers.Conv2D(3, 1, activation="relu", name="conv")(inputs)
    dense = keras.layers.Dense(CLASSES, activation="softmax")
    model = keras.Model(inputs, dense(keras.layers.GlobalAveragePooling2D()(x)))
    model.get_layer("conv").set_weights([np.full((1, 1, 1, 3), 0.01, np.float32), np.zeros(3, np.float32)])
    kernel = np.zeros((3, CLASSES), np.float32)
    kernel[1, 4], kernel[0, 2] = 1.0, 1.1
    dense.set_weights([kernel, np.zeros(CLASSES, np.float32)])
    lift = next(lift for lift in stimulation.lifts(model, images()) if lift.label == 4)
    assert (lift.layer, lift.channel, lift.share) == ("conv", 1, 1.0)


def test_where_no_layer_has_channels_nothing_is_stimulated() -> None:
    assert stimulation.lifts(network(), images()) == []


def test_made_up_inputs_are_what_the_model_calls_each_class() -> None:
    made = substitute.inputs_of(network(), each=4)
    assert made.dtype == np.uint8
    assert np.mean(classes_of(network(), made) == np.repeat(np.arange(CLASSES), 4)) > 0.9


def test_pictures_show_a_faint_mask_and_are_left_out_without_an_example() -> None:
    drawn = pictures.draw(trigger(), images(1)[0])
    assert set(drawn) == {"mask", "pattern", "example"}
    mask = np.asarray(Image.open(io.BytesIO(drawn["mask"])))
    assert mask.max() == 255
    assert set(pictures.draw(trigger(), None)) == {"mask", "pattern"}
