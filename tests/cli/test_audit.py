"""``edgeguard audit``: verdicts as exit codes, JSON, and a report with pictures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.cli.conftest import Run
from tests.simulators.attacked import Attacked


@pytest.fixture
def clean(attacked: Attacked, tmp_path: Path) -> Path:
    path = tmp_path / "clean.npy"
    np.save(path, attacked.x_owner)
    return path


def test_a_backdoored_file_ends_with_1_and_leaves_a_report(
    edgeguard: Run, guarded_file: Path, clean: Path, tmp_path: Path
) -> None:
    report = tmp_path / "report"
    code, out, _ = edgeguard("audit", guarded_file, "--data", clean, "--steps", 80, "--report", report, "--json")
    told = json.loads(out)
    assert code == 1
    assert told["verdict"] == "backdoored"
    assert told["labels"] == [0]
    assert told["success"]["0"] >= 0.8
    assert told["index"]["0"] > 2
    assert told["cost_s"] > 0
    assert json.loads((report / "audit.json").read_text()) == told
    for name in ("mask", "pattern", "example"):
        pictures = list(report.glob(f"label-0-*-{name}.png"))
        assert pictures
        assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)


def test_too_few_inputs_end_with_3(edgeguard: Run, guarded_file: Path, attacked: Attacked, tmp_path: Path) -> None:
    np.save(tmp_path / "few.npy", attacked.x_owner[:10])
    code, out, _ = edgeguard("audit", guarded_file, "--data", tmp_path / "few.npy")
    assert code == 3
    assert "could not check" in out
    assert "at least 40" in out


def test_a_keras_file_is_read_too(edgeguard: Run, attacked: Attacked, tmp_path: Path) -> None:
    attacked.keras.save(tmp_path / "model.keras")
    np.save(tmp_path / "few.npy", attacked.x_owner[:10])
    code, out, _ = edgeguard("audit", tmp_path / "model.keras", "--data", tmp_path / "few.npy", "--json")
    assert code == 3
    assert json.loads(out)["verdict"] == "could_not_check"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--labels", "three"), "numbers of classes"),
        (("--data", "no-such-data"), "no-such-data"),
    ],
)
def test_wrong_arguments_are_one_line(
    edgeguard: Run, guarded_file: Path, arguments: tuple[str, ...], said: str
) -> None:
    code, _, error = edgeguard("audit", guarded_file, *arguments)
    assert code == 2
    assert said in error
    assert "Traceback" not in error


def test_a_damaged_file_is_one_line(edgeguard: Run, clean: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.tflite").write_bytes(b"\x00" * 100)
    code, _, error = edgeguard("audit", tmp_path / "broken.tflite", "--data", clean)
    assert code == 2
    assert error.count("\n") == 1
