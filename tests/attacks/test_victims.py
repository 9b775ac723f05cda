"""The networks that the red team attacks, and how they are trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeguard.attacks.base import Task
from edgeguard.attacks.networks import MOBILENET_LIKE, NETWORKS, RESNET8_LIKE
from edgeguard.attacks.victims import Training

RNG = np.random.default_rng(0)
TASK = Task(images=RNG.integers(0, 256, (64, 8, 8, 1), dtype=np.uint8), labels=np.arange(64) % 4, classes=4)


def linear(shape: tuple[int, ...], classes: int, *, seed: int = 0) -> Any:
    """One dense layer: how a network is trained and kept does not depend on which it is."""
    import keras

    keras.utils.set_random_seed(seed)
    layers = keras.layers
    return keras.Sequential([keras.Input(shape), layers.Flatten(), layers.Dense(classes, activation="softmax")])


def wide(shape: tuple[int, ...], classes: int, *, seed: int = 0) -> Any:
    """Two dense layers."""
    import keras

    keras.utils.set_random_seed(seed)
    layers = keras.layers
    return keras.Sequential(
        [keras.Input(shape), layers.Flatten(), layers.Dense(8), layers.Dense(classes, activation="softmax")]
    )


def training(epochs: int = 1, cache: Path | None = None) -> Training:
    return Training(epochs=epochs, network=linear, architecture="linear", cache=cache)


def weights(model: Any) -> list[Any]:
    return [np.asarray(one) for one in model.get_weights()]


def same(one: Any, other: Any) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(weights(one), weights(other), strict=True))


@pytest.mark.parametrize("shape", [(8, 8, 1), (28, 28, 1), (32, 32, 3)])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_takes_pixels_and_answers_with_probabilities(name: str, shape: tuple[int, ...]) -> None:
    model = NETWORKS[name](shape, 7)
    answer = np.asarray(model(RNG.integers(0, 256, (3, *shape)).astype(np.float32)))
    assert answer.shape == (3, 7)
    assert np.allclose(answer.sum(axis=1), 1, atol=1e-5)
    assert 30_000 < model.count_params() < 350_000


@pytest.mark.parametrize("name", NETWORKS)
def test_a_networks_first_weights_follow_from_its_seed(name: str) -> None:
    first, again, other = (NETWORKS[name]((8, 8, 1), 4, seed=seed) for seed in (1, 1, 2))
    assert same(first, again)
    assert not same(first, other)


def test_the_mobile_network_adds_linear_bottlenecks_and_clips_activations_at_six() -> None:
    layers = NETWORKS[MOBILENET_LIKE]((28, 28, 1), 4).layers
    assert {type(layer).__name__ for layer in layers} >= {"DepthwiseConv2D", "Add"}
    assert {layer.max_value for layer in layers if type(layer).__name__ == "ReLU"} == {6.0}
    additions = [layer for layer in layers if type(layer).__name__ == "Add"]
    assert additions
    assert all(type(add.input[1]._keras_history.operation).__name__ == "BatchNormalization" for add in additions)


def test_the_residual_network_applies_relu_after_each_addition() -> None:
    model = NETWORKS[RESNET8_LIKE]((28, 28, 1), 4)
    additions = [layer for layer in model.layers if type(layer).__name__ == "Add"]
    assert len(additions) == 3
    for layer in additions:
        (node,) = layer._outbound_nodes
        assert type(node.operation).__name__ == "ReLU"


def test_training_from_scratch_is_kept_and_found_again(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    told = replace(training(2, tmp_path), progress=lambda _, done, total: calls.append((done, total)))
    first = told.fit(TASK, seed=3)
    assert calls == [(1, 2), (2, 2)]
    assert len(weights(first)) == 2
    assert same(first, told.fit(TASK, seed=3))
    assert calls == [(1, 2), (2, 2)]


@pytest.mark.parametrize("change", ["seed", "epochs", "architecture", "labels", "pixels"])
def test_another_training_is_not_taken_for_the_one_that_was_kept(tmp_path: Path, change: str) -> None:
    training(1, tmp_path).fit(TASK, seed=0)
    task = {
        "labels": replace(TASK, labels=TASK.labels[::-1].copy()),
        "pixels": replace(TASK, images=np.invert(TASK.images)),
    }.get(change, TASK)
    other = training(2 if change == "epochs" else 1, tmp_path)
    if change == "architecture":
        other = replace(other, network=wide, architecture="wide")
    other.fit(task, seed=1 if change == "seed" else 0)
    assert len(list((tmp_path / "models").iterdir())) == 2


def test_training_from_a_model_changes_that_model_and_keeps_nothing(tmp_path: Path) -> None:
    model, before = (training().fresh(TASK, seed=0) for _ in range(2))
    assert training(1, tmp_path).fit(TASK, seed=0, model=model) is model
    assert not same(model, before)
    assert not list(tmp_path.iterdir())


def test_training_without_a_cache_is_repeatable() -> None:
    assert same(training().fit(TASK, seed=5), training().fit(TASK, seed=5))


def test_augmenting_moves_and_relights_images_a_little_and_leaves_labels() -> None:
    import tensorflow as tf

    from edgeguard.attacks import victims

    square = np.zeros((200, 32, 32, 3), np.uint8)
    square[:, 12:20, 8:16] = 200
    change = victims._augmentation(0)
    changed, labels = change(tf.constant(square), tf.range(200))
    pixels = np.asarray(changed)
    assert np.array_equal(labels, np.arange(200))
    assert pixels.shape == square.shape
    assert pixels.min() >= 0
    assert pixels.max() <= 255
    lit = pixels[..., 0] > pixels[..., 0].mean(axis=(1, 2), keepdims=True) + 50
    rows = (lit * np.arange(32)[:, np.newaxis]).sum(axis=(1, 2)) / lit.sum(axis=(1, 2))
    columns = (lit * np.arange(32)).sum(axis=(1, 2)) / lit.sum(axis=(1, 2))
    for middle, places in ((15.5, rows), (11.5, columns)):
        assert np.abs(places - middle).max() < 4
        assert np.std(places) > 0.5
        assert abs(places.mean() - middle) < 0.5
    again, _ = change(tf.constant(square), tf.range(200))
    assert not np.array_equal(pixels, np.asarray(again))
