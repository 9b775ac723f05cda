"""From a Keras file to what is shared of it, and back; the owners' commands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import msgspec
import numpy as np
import pytest
from typer.testing import CliRunner

from edgeguard.cli import app
from edgeguard.contract.private import Inspection
from edgeguard.errors import ModelError
from edgeguard.private import dense, inspections, owners
from tests.simulators import private as making


def network(*before: Any, hidden: bool = True) -> Any:
    keras.utils.set_random_seed(0)
    layers = [keras.Input((4, 4, 1)), *before, keras.layers.Flatten()]
    if hidden:
        layers.append(keras.layers.Dense(6, activation="relu", bias_initializer="uniform"))
    return keras.Sequential([*layers, keras.layers.Dense(5, activation="softmax", bias_initializer="uniform")])


def images(count: int = 40) -> Any:
    return np.random.default_rng(0).integers(0, 256, (count, 4, 4, 1)).astype(np.uint8)


def an_inspection(model: Any, space: Any = "pixels", scale: float = 255.0) -> Inspection:
    return making.an_inspection(layers=dense.shared(model, space).layers, space=space, scale=scale)


def answers(arrays: Any, x: Any) -> Any:
    hidden = x
    for kernel, bias in zip(arrays[:-2:2], arrays[1:-2:2], strict=True):
        hidden = np.maximum(hidden @ kernel + bias, 0)
    logits = hidden @ arrays[-2] + arrays[-1]
    return np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)


@pytest.mark.parametrize("hidden", [True, False])
def test_shared_layers_answer_as_the_network_does(hidden: bool) -> None:
    model = network(keras.layers.Rescaling(1 / 255), hidden=hidden)
    asked = an_inspection(model)
    x = dense.inputs(asked, images(), None)
    arrays = dense.shared(model, "pixels").arrays(asked)
    taken = images()[dense.chosen(24, 40)]
    expected = model.predict(taken.astype(np.float32), verbose=0)
    np.testing.assert_allclose(answers(arrays, x), expected, atol=1e-4)


def test_in_the_space_of_features_both_halves_together_answer_as_the_network_does() -> None:
    model = network(keras.layers.Conv2D(3, 3, activation="relu"), hidden=False)
    first = dense.shared(model, "features").dense[0]
    before = dense.extractor(model, first)
    scale = float(before.predict(images().astype(np.float32), verbose=0).max())
    asked = an_inspection(model, "features", scale)
    arrays = dense.shared(model, "features").arrays(asked)
    taken = images()[dense.chosen(24, 40)]
    expected = model.predict(taken.astype(np.float32), verbose=0)
    np.testing.assert_allclose(answers(arrays, dense.inputs(asked, images(), before)), expected, atol=1e-3)


def refused() -> dict[str, Any]:
    layers = keras.layers
    return {
        "a convolution, in pixels": network(layers.Conv2D(3, 3, activation="relu")),
        "three dense layers": keras.Sequential([keras.Input((8,)),
            layers.Dense(7, activation="relu"), layers.Dense(6, activation="relu"), layers.Dense(5)]),
        "another activation": keras.Sequential(
            [keras.Input((8,)), layers.Dense(6, activation="tanh"), layers.Dense(5, activation="softmax")]
        ),
        "no dense layer": keras.Sequential([keras.Input((8, 8, 1)), layers.Flatten()]),
        "another activation before a ReLU": keras.Sequential(
            [keras.Input((8,)), layers.Dense(6, activation="tanh"), layers.ReLU(), layers.Dense(5)]),
        "a ReLU with a threshold": keras.Sequential(
            [keras.Input((8,)), layers.Dense(6), layers.ReLU(threshold=0.5), layers.Dense(5)]),
        "a scale between dense layers": keras.Sequential(
            [keras.Input((8,)), layers.Dense(6, activation="relu"), layers.Rescaling(0.5), layers.Dense(5)]),
        "a scale for each channel": network(layers.Rescaling([0.5])),
        "a scale with an offset": network(layers.Rescaling(1 / 255, offset=-0.5)),
    }  # fmt: skip


def test_a_network_that_cannot_be_computed_as_it_stands_is_refused() -> None:
    for name, model in refused().items():
        with pytest.raises(ModelError):
            pytest.fail(f"{name}: {dense.shared(model, 'pixels').layers}")


def test_inputs_are_taken_from_all_over_a_file_that_is_sorted_by_class() -> None:
    asked = making.an_inspection(layers=(16, 5))
    x = np.repeat(np.arange(10, dtype=np.uint8) * 25, 100)[:, None, None, None] * np.ones((1, 4, 4, 1), np.uint8)
    assert len(np.unique(dense.inputs(asked, x, None))) >= 5


@pytest.mark.parametrize("by", [1 / 255, 2.0])
def test_inputs_of_another_range_than_planned_are_refused(by: float) -> None:
    with pytest.raises(ModelError, match="clean inputs"):
        dense.inputs(making.an_inspection(layers=(16, 5)), images().astype(np.float32) * by, None)


def test_owners_plan_give_and_read_from_the_command_line(tmp_path: Path) -> None:
    owns = making.parties(tmp_path / "parties")
    model, plan, pad = tmp_path / "model.keras", tmp_path / "plan.json", tmp_path / "pad.bin"
    network().save(model)
    np.savez(tmp_path / "clean.npz", x=images(160))
    given = tmp_path / "given"
    given.mkdir()
    together = ["--parties", str(tmp_path / "parties" / "north" / "parties.json")]

    def said(*args: object) -> str:
        ran = CliRunner().invoke(app, ["private", *map(str, args)], catch_exceptions=False)
        assert ran.exit_code == 0, ran.output
        return ran.output

    assert "each party sends" in said("inspect", "plan", plan, "--id", "inspection-1", "--model", model, *together)
    said("inspect", "give", "--plan", plan, "--model", model, "--pad", pad, "-o", given / "model-owner.json", *together)
    said(
        "inspect", "give", "--plan", plan, "--data", tmp_path / "clean.npz", "-o", given / "data-owner.json", *together
    )
    assert pad.stat().st_mode & 0o777 == 0o600
    asked = msgspec.json.decode(plan.read_bytes(), type=Inspection)
    for own in owns:
        assert set(inspections.take(asked, given, own).values) == set(inspections.ROLES)

    # What three parties would open of label 3, and of a mended last layer.
    secret = np.frombuffer(pad.read_bytes(), "<i8")
    a = np.zeros((2, 5, 16))
    a[0, 3, 7] = 0.5
    count = owners.trigger_values(asked)
    padded = np.round(a.ravel() * 2**16).astype("<i8") + secret[:count]
    found = inspections.Inspected(
        inspection=asked.digest, given="", verdict="backdoored", labels=(3,), padded=padded.tobytes()
    )
    (tmp_path / "inspected.json").write_bytes(msgspec.json.encode(found))
    triggers = tmp_path / "triggers.npz"
    said("inspect", "open", "--plan", plan, "--pad", pad, "--result", tmp_path / "inspected.json", "-o", triggers)
    with np.load(triggers) as read:
        assert (read["labels"].tolist(), read["masks"][0, 7], read["patterns"][0, 7]) == ([3], 0.5, 255.0)

    last = np.arange(owners.last_values(asked)) / 100.0
    mended = inspections.Mended(
        inspection=asked.digest, given="", held_out=64, kept=64, turned_before=60, turned_after=0,
        padded=(np.round(last * 2**16).astype("<i8") + secret[count:]).tobytes(),
    )  # fmt: skip
    (tmp_path / "mended.json").write_bytes(msgspec.json.encode(mended))
    output = tmp_path / "mended.keras"
    said("repair", "open", model, "--plan", plan, "--pad", pad, "--result", tmp_path / "mended.json", "-o", output)
    kernel, bias = keras.models.load_model(output).layers[-1].get_weights()
    np.testing.assert_allclose(np.concatenate([kernel.ravel(), bias]), last, atol=1e-4)

    said("repair", "clear", model, "--triggers", triggers, "--data", tmp_path / "clean.npz", "-o", tmp_path / "c.keras")
    assert (tmp_path / "c.keras").exists()
