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
from edgeguard.errors import ConfigError, ModelError
from edgeguard.inspection.inversion import Trigger
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
    out = said(
        "inspect", "give", "--plan", plan, "--model", model, "--pad", pad, "-o", given / "model-owner.json", *together
    )
    said(
        "inspect", "give", "--plan", plan, "--data", tmp_path / "clean.npz", "-o", given / "data-owner.json", *together
    )
    assert pad.stat().st_mode & 0o777 == 0o600
    asked = msgspec.json.decode(plan.read_bytes(), type=Inspection)
    for own in owns:
        held = inspections.take(asked, given, own)
        assert set(held.values) == set(inspections.ROLES)
    # The owner compares what it was told with what parties say.
    assert held.digest.split(" ")[0] in out

    # What three parties would open of label 3, and of a mended last layer.
    secret = np.frombuffer(msgspec.json.decode(pad.read_bytes(), type=owners.Pad).values, "<i8")
    a = np.zeros((2, 5, 16))
    a[0, 3, 7] = 0.5
    count = owners.trigger_values(asked)
    padded = np.round(a.ravel() * 2**16).astype("<i8") + secret[:count]
    found = inspections.Inspected(
        inspection=asked.digest, given=held.digest, verdict="backdoored", labels=(3,), padded=padded.tobytes()
    )
    (tmp_path / "inspected.json").write_bytes(msgspec.json.encode(found))
    triggers = tmp_path / "triggers.npz"
    said("inspect", "open", "--plan", plan, "--pad", pad, "--result", tmp_path / "inspected.json", "-o", triggers)
    assert triggers.stat().st_mode & 0o777 == 0o600
    with np.load(triggers) as read:
        assert (read["labels"].tolist(), read["masks"][0, 7], read["patterns"][0, 7]) == ([3], 0.5, 255.0)

    last = np.arange(owners.last_values(asked)) / 100.0
    mended = inspections.Mended(
        inspection=asked.digest, given=held.digest, held_out=64, kept=64, turned_before=60, turned_after=0,
        padded=(np.round(last * 2**16).astype("<i8") + secret[count:]).tobytes(),
    )  # fmt: skip
    (tmp_path / "mended.json").write_bytes(msgspec.json.encode(mended))
    output = tmp_path / "mended.keras"
    said("repair", "open", model, "--plan", plan, "--pad", pad, "--result", tmp_path / "mended.json", "-o", output)
    kernel, bias = keras.models.load_model(output).layers[-1].get_weights()
    np.testing.assert_allclose(np.concatenate([kernel.ravel(), bias]), last, atol=1e-4)

    said("repair", "clear", model, "--triggers", triggers, "--data", tmp_path / "clean.npz", "-o", tmp_path / "c.keras")
    assert (tmp_path / "c.keras").exists()

    # Another network of the same shape, in whose place the mended layer would be nonsense.
    other = network()
    other.layers[-1].set_weights([weights + 0.01 for weights in other.layers[-1].get_weights()])
    other.save(model)
    ran = CliRunner().invoke(
        app,
        [
            "private",
            "repair",
            "open",
            *map(
                str,
                (model, "--plan", plan, "--pad", pad, "--result", tmp_path / "mended.json", "-o", tmp_path / "d.keras"),
            ),
        ],
    )
    assert isinstance(ran.exception, ModelError)
    assert "other weights" in str(ran.exception)
    assert not (tmp_path / "d.keras").exists()


def test_colours_of_a_pixel_are_taken_each_by_as_much_as_was_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Rescaling(1 / 255), keras.layers.Flatten(), keras.layers.Dense(5, activation="softmax")]
    keras.Sequential([keras.Input((4, 4, 3)), *layers]).save(tmp_path / "model.keras")
    pictures = np.random.default_rng(0).integers(0, 256, (60, 4, 4, 3)).astype(np.uint8)
    np.savez(tmp_path / "own.npz", x=pictures)
    masks = np.zeros((1, 48))
    masks[0, 4] = 1.0  # green of the second pixel
    np.savez(tmp_path / "triggers.npz", labels=[2], masks=masks, patterns=255.0 * masks)
    stamp, seen = Trigger.stamp, []

    def stamped(trigger: Trigger, images: Any) -> Any:
        seen.append((images[0], stamp(trigger, images)[0]))
        return stamp(trigger, images)

    names = ("model.keras", "triggers.npz", "own.npz", "new.keras")
    model, triggers, own, new = (str(tmp_path / name) for name in names)
    monkeypatch.setattr(Trigger, "stamp", stamped)
    command = ["private", "repair", "clear", model, "--triggers", triggers, "--data", own, "-o", new]
    assert CliRunner().invoke(app, command, catch_exceptions=False).exit_code == 0
    plain, worn = seen[0]
    changed = np.zeros((4, 4, 3))
    changed[0, 1, 1] = 255.0 - plain[0, 1, 1]
    np.testing.assert_array_equal(worn - plain, changed)


@pytest.mark.parametrize(
    "words",
    [
        ("inspect", "plan", "{here}/plan.json", "--id", "inspection-1", "--parties", "{here}/none.json", "--model",
         "{here}/file", "--features", "--extractor", "{here}/before"),
        ("inspect", "give", "--plan", "{here}/none.json", "--parties", "{here}/none.json", "--model", "{here}/file",
         "--pad", "{here}/file", "-o", "{here}/new"),
        ("inspect", "give", "--plan", "{here}/none.json", "--parties", "{here}/none.json", "--model", "{here}/file",
         "--pad", "{here}/new", "-o", "{here}/no folder/new"),
        ("inspect", "give", "--plan", "{here}/none.json", "--parties", "{here}/none.json", "--model", "{here}/file",
         "--pad", "{here}/new", "-o", "{here}/new"),
        ("repair", "open", "{here}/file", "--plan", "{here}/none.json", "--pad", "{here}/none", "--result",
         "{here}/file", "-o", "{here}/mended"),
        ("repair", "clear", "{here}/file", "--triggers", "{here}/file", "--data", "none", "-o", "{here}/mended"),
    ],
)  # fmt: skip
def test_an_output_that_cannot_be_written_is_refused_before_any_work(tmp_path: Path, words: tuple[str, ...]) -> None:
    """Nothing else that these commands are given is there, so that it is the output that is refused first."""
    (tmp_path / "file").write_bytes(b"something")
    ran = CliRunner().invoke(app, ["private", *(word.format(here=tmp_path) for word in words)])
    assert isinstance(ran.exception, ConfigError)
    assert any(word in str(ran.exception) for word in ("there already", "no such folder", ".keras", "output too"))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_party_that_will_not_repair_deletes_what_it_kept_for_one(tmp_path: Path) -> None:
    own = making.parties(tmp_path / "parties")[0]
    asked = making.an_inspection([own])
    (tmp_path / "plan.json").write_bytes(msgspec.json.encode(asked))
    work = own.folder / f"inspection-{asked.digest[:16]}"
    inspections._keep(asked, inspections.Held(values={}, digest="given"), "run", work, 13, {})
    (work / inspections.INSPECTED).write_text("{}")
    command = ["private", "repair", "run", str(own.folder), "--plan", str(tmp_path / "plan.json"), "--discard"]
    ran = CliRunner().invoke(app, [*command, "--given", str(tmp_path)], catch_exceptions=False)
    assert (ran.exit_code, [path.name for path in work.iterdir()]) == (0, [inspections.INSPECTED])
