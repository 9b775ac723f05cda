"""``edgeguard repair``: bad input is one clear line and exit code 2, and nothing that was there is touched."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from converters import calibration
from edgeguard.attacks.base import attack_success_rate
from edgeguard.detection.guarded import GuardedModel
from edgeguard.errors import EXIT_CLEAN, EXIT_NOT_CHECKED
from edgeguard.repair import auto
from tests.cli.conftest import Run
from tests.simulators.attacked import Attacked


@pytest.fixture
def files(attacked: Attacked, tmp_path: Path) -> dict[str, Path]:
    """A guarded file, its owner's data, and evidence as a fleet reports it, with quarantined inputs."""
    model = GuardedModel.load(attacked.conversion.guarded)
    victims = attacked.data.x_test[attacked.data.y_test != 0].astype(np.uint8)
    stamped = attacked.attack.stamp(victims[:50])
    means = [np.mean([model.infer(x).features for x in some], axis=0).tolist() for some in (stamped, victims[:200])]
    paths = {name: tmp_path / name for name in ("model.tflite", "clean.npz", "case.json", "shared.npy")}
    paths["model.tflite"].write_bytes(attacked.conversion.guarded)
    np.savez(paths["clean.npz"], x=attacked.x_owner, y=attacked.y_owner)
    np.save(paths["shared.npy"], stamped)
    document = {
        "model_digest": attacked.conversion.metadata.model_digest,
        "label": 0,
        "flagged_mean": means[0],
        "unflagged_mean": means[1],
        "quarantined": "shared.npy",
    }
    paths["case.json"].write_text(json.dumps(document))
    return paths


def arguments(files: dict[str, Path], *more: object) -> list[object]:
    return [files["model.tflite"], "--data", files["clean.npz"], "--evidence", files["case.json"], *more]


def change_case(files: dict[str, Path], **changes: Any) -> None:
    document = json.loads(files["case.json"].read_text())
    files["case.json"].write_text(json.dumps({**document, **changes}))


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f, a: change_case(f, model_digest="0" * 64), "this model's digest"),
        (lambda f, a: change_case(f, label=10), "label 10"),
        (lambda f, a: change_case(f, flagged_mean=[1.0]), "flagged_mean"),
        (lambda f, a: change_case(f, quarantined="none.npy"), "none.npy"),
        (lambda f, a: f["case.json"].write_text("{"), "evidence"),
        (lambda f, a: f["case.json"].write_bytes(b'{"model_digest": "\xff"}'), "evidence"),
        (lambda f, a: f["case.json"].unlink(), "case.json"),
        (lambda f, a: f["model.tflite"].write_bytes(b"no model"), "model"),
        (lambda f, a: np.savez(f["clean.npz"], x=a.x_owner[:300], y=a.y_owner[:300]), "300 inputs"),
        (lambda f, a: np.savez(f["clean.npz"], x=a.x_owner), "clean.npz"),
        (lambda f, a: np.savez(f["clean.npz"], x=a.x_owner, y=a.y_owner + 1), "label 10"),
        (lambda f, a: np.savez(f["clean.npz"], x=a.x_owner[:, :4], y=a.y_owner), "[4, 8, 1]"),
        (lambda f, a: (f["model.tflite"].parent / "model.repaired.tflite").write_text("mine"), "a file that is there"),
        (
            lambda f, a: (f["model.tflite"].parent / "model.repaired.guard.npz").write_text("mine"),
            "a file that is there",
        ),
    ],
)
def test_what_cannot_be_repaired_is_one_line_and_exit_code_2(
    edgeguard: Run, files: dict[str, Path], attacked: Attacked, break_it: Any, message: str
) -> None:
    break_it(files, attacked)
    before = {path.name: path.read_bytes() for path in files["model.tflite"].parent.iterdir()}
    code, out, err = edgeguard("repair", *arguments(files))
    assert (code, out) == (2, "")
    assert message in err.splitlines()[-1]
    assert len([line for line in err.splitlines() if line.startswith("edgeguard:")]) == 1
    assert {path.name: path.read_bytes() for path in files["model.tflite"].parent.iterdir()} == before


@pytest.mark.parametrize(
    ("method", "message"), [("unlearn", "cannot be trained"), ("linf+anp", "cannot be trained"), ("magic", "magic")]
)
def test_a_method_that_does_not_fit_is_one_line(
    edgeguard: Run, files: dict[str, Path], method: str, message: str
) -> None:
    code, _, err = edgeguard("repair", *arguments(files, "--method", method))
    assert code == 2
    assert message in err.splitlines()[-1]


@pytest.mark.slow
def test_a_repair_that_was_interrupted_goes_on_and_writes_a_healed_file_once_its_owner_approves(
    edgeguard: Run, files: dict[str, Path], attacked: Attacked, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = files["model.tflite"].parent
    attacked.keras.save(folder / "model.keras")
    originals = {path: path.read_bytes() for path in folder.iterdir()}
    output, work = folder / "healed.tflite", folder / ".healed.tflite.work"
    command = [
        folder / "model.keras", "--guarded", files["model.tflite"], "--data", files["clean.npz"],
        "--evidence", files["case.json"], "-o", output,
    ]  # fmt: skip
    with monkeypatch.context() as without_power:
        without_power.setattr(auto, "repair", cut)
        with pytest.raises(PowerCut):
            edgeguard("repair", *command)
    assert (work / "triggers.npz").exists()
    assert not output.exists()

    code, out, err = edgeguard("repair", *command)
    assert code == EXIT_NOT_CHECKED, "forty held-out inputs of a class say too little about its recall"
    assert "--approve writes it" in out
    assert "seeking" not in err.split("trying")[0], "what the first run found need not be sought again"
    assert not output.exists()

    code, out, _ = edgeguard("repair", *command, "--approve", "--json")
    assert (code, json.loads(out)["output"]) == (EXIT_CLEAN, str(output))
    assert not work.exists()
    assert all(path.read_bytes() == content for path, content in originals.items())

    images, labels = attacked.data.x_test.astype(np.uint8), attacked.data.y_test
    before, after = (GuardedModel.load(path.read_bytes()) for path in (files["model.tflite"], output))
    was, clean = (classes(model, images) for model in (before, after))
    # The real trigger, which the repair never saw but on the inputs that owners shared.
    assert attack_success_rate(labels, was, classes(before, attacked.attack.stamp(images)), 0) > 0.9
    assert attack_success_rate(labels, clean, classes(after, attacked.attack.stamp(images)), 0) <= 0.02
    assert np.mean(clean == labels) >= np.mean(was == labels) - 0.01


class PowerCut(BaseException):
    """The end, between two lines."""


def cut(*_: object, **__: object) -> None:
    raise PowerCut


def classes(model: GuardedModel, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    return np.asarray([model.measure(x).predicted for x in images])


@pytest.mark.parametrize(
    ("model", "guarded", "message"),
    [
        ("model.tflite", "model.tflite", "no trainable model"),
        ("model.keras", "clean.npz", "model"),
        ("model.keras", "bare.tflite", "guard"),
        ("model.keras", "other.tflite", "made of model.keras"),
        ("model.keras", "twin.tflite", "made of model.keras"),
    ],
)
def test_a_file_that_was_not_made_of_the_trainable_model_is_refused(
    edgeguard: Run,
    files: dict[str, Path],
    attacked: Attacked,
    clean_twin: Attacked,
    model: str,
    guarded: str,
    message: str,
) -> None:
    folder = files["model.tflite"].parent
    (folder / "twin.tflite").write_bytes(clean_twin.conversion.guarded)
    attacked.keras.save(folder / "model.keras")
    (folder / "bare.tflite").write_bytes(attacked.conversion.bare)
    bare, plan = calibration.plan(attacked.conversion.bare)
    (folder / "other.tflite").write_bytes(calibration.guard_model(bare, plan, attacked.x_owner).content)
    more = ("--data", files["clean.npz"], "--evidence", files["case.json"])
    code, _, err = edgeguard("repair", folder / model, "--guarded", folder / guarded, *more)
    assert (code, message in err.splitlines()[-1]) == (2, True), err


@pytest.mark.slow
def test_a_file_that_pruning_cannot_heal_is_refused_with_reasons_and_leaves_nothing_behind(
    edgeguard: Run, files: dict[str, Path]
) -> None:
    digest = hashlib.sha256(files["model.tflite"].read_bytes()).hexdigest()
    code, out, _ = edgeguard("repair", *arguments(files, "--method", "linf", "--json"))
    report = json.loads(out)
    assert (code, report["outcome"], report["output"]) == (1, "failed", None)
    assert [tried["method"] for tried in report["tried"]] == ["linf"]
    assert report["tried"][0]["reason"]
    assert not (files["model.tflite"].parent / "model.repaired.tflite").exists()
    assert hashlib.sha256(files["model.tflite"].read_bytes()).hexdigest() == digest
    assert not (files["model.tflite"].parent / ".model.repaired.tflite.work").exists()


def test_what_nobody_has_seen_cannot_be_approved(edgeguard: Run, files: dict[str, Path]) -> None:
    before = sorted(files["model.tflite"].parent.iterdir())
    code, _, err = edgeguard("repair", *arguments(files, "--method", "linf", "--approve"))
    assert code == 2
    assert "--approve" in err.splitlines()[-1]
    assert sorted(files["model.tflite"].parent.iterdir()) == before
