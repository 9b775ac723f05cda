"""``edgeguard bench`` as a user types it: rows, JSON, the picture, and why something was not measured."""

from __future__ import annotations

import io
import json
import platform
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner, Result

import converters
from edgeguard.cli import bench
from edgeguard.detection.bench import MEANING, Reading
from edgeguard.errors import ConfigError, ModelError, TrustError
from tests.simulators.attacked import Attacked

app = typer.Typer()
bench.register(app)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def document(*arguments: object) -> dict[str, Any]:
    done = run(*arguments, "--json")
    assert done.exit_code == 0, done.exception
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def names(found: dict[str, Any]) -> list[str]:
    return [row["name"] for row in found["rows"]]


@pytest.fixture
def clean(attacked: Attacked, tmp_path: Path) -> Path:
    """A file of clean inputs."""
    np.savez(tmp_path / "clean.npz", x=attacked.data.x_test.astype(np.uint8), y=attacked.data.y_test)
    return tmp_path / "clean.npz"


def test_with_clean_inputs_and_a_sidecar_everything_is_measured(audited_file: Path, clean: Path) -> None:
    found = document(audited_file, "--data", clean, "--n", 400)
    assert names(found) == list(MEANING)
    assert found["not_measured"] == {}
    assert found["inputs"] == {"data": str(clean), "count": 449}
    for row in found["rows"]:
        assert row["n"] == 400
        assert 0 < row["p50_us"] <= row["p90_us"] <= row["p99_us"]
        assert row["per_second"] > 0
        assert row["cpu_s"] > 0
    inferences = {row["name"]: row["inferences"] for row in found["rows"]}
    assert inferences["guarded"] == inferences["verdict"] == 1
    assert 1 <= inferences["cascade in budget"] < inferences["cascade"]


def test_the_json_has_these_fields(guarded_file: Path) -> None:
    found = document(guarded_file, "--n", 10)
    assert set(found) == {
        "model",
        "file_digest",
        "board",
        "runtime",
        "inputs",
        "rows",
        "not_measured",
        "rss_mib",
        "anon_mib",
        "conditions",
        "warnings",
    }
    assert found["rows"][0].keys() == {
        "name",
        "n",
        "p50_us",
        "p90_us",
        "p99_us",
        "intervals",
        "ratio_p50",
        "ratio_heats",
        "per_second",
        "cpu_s",
        "inferences",
        "energy_j",
    }
    assert found["conditions"].keys() == {"temperature_c", "throttled", "power_w", "cpu_mhz"}
    assert 0 < found["anon_mib"] < found["rss_mib"]


def test_without_clean_inputs_the_cascade_is_not_measured(audited_file: Path) -> None:
    found = document(audited_file, "--n", 10)
    assert names(found) == ["bare", "guarded", "verdict"]
    assert found["not_measured"]["cascade"].startswith("not measured: needs clean inputs (--data)")


def test_without_a_sidecar_the_cascade_is_not_available(guarded_file: Path, clean: Path) -> None:
    found = document(guarded_file, "--data", clean, "--n", 10)
    assert names(found) == ["bare", "guarded", "verdict"]
    assert found["not_measured"] == {"cascade": "not available: the model was made without a sidecar"}


def test_of_a_model_without_guard_there_is_only_the_bare_row_and_it_says_so(attacked: Attacked, tmp_path: Path) -> None:
    path = tmp_path / "bare.tflite"
    path.write_bytes(attacked.conversion.bare)
    found = document(path, "--n", 10)
    assert names(found) == ["bare"]
    assert "the model has no guard" in found["not_measured"]["guarded"]


def test_where_nothing_can_take_the_guard_out_there_is_no_bare_row_and_no_ratio(
    guarded_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(converters, "guard")
    monkeypatch.setitem(sys.modules, "converters.guard", None)
    found = document(guarded_file, "--n", 10)
    assert names(found) == ["guarded", "verdict"]
    assert "not installed" in found["not_measured"]["bare"]
    assert [row["ratio_p50"] for row in found["rows"]] == [None, None]


def test_people_get_a_table_with_what_each_row_is_and_the_warnings(
    guarded_file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    done = run(guarded_file, "--n", 20)
    assert done.exit_code == 0
    assert "\nguarded  20 " in done.stdout
    assert f"\nverdict  {MEANING['verdict']}\n" in done.stdout
    assert "\ncascade  not available: " in done.stdout
    assert "\nwarning: 20 runs are too few for p99" in done.stdout
    assert all(len(line) <= 120 for line in done.stdout.splitlines()[1:])
    assert "[20/20] timing" in capfd.readouterr().err


def test_the_picture_shows_every_row(guarded_file: Path, tmp_path: Path) -> None:
    document(guarded_file, "--n", 100, "--plot", tmp_path / "latency.png")
    with Image.open(io.BytesIO((tmp_path / "latency.png").read_bytes())) as image:
        assert image.format == "PNG"
        pixels = np.asarray(image.convert("RGB"))
    fill = (pixels == (0x9C, 0xC3, 0xE4)).all(axis=2)
    strips = np.split(fill[110:410], 3)
    assert all(strip.sum() > 100 for strip in strips)


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        (("--plot", "latency.svg"), ConfigError, "a .png file in a folder that is there"),
        (("--plot", "nowhere/latency.png"), ConfigError, "a .png file in a folder that is there"),
        (("--runtime", "nonsense"), ConfigError, "unknown"),
        (("--data", "nowhere.npz"), ConfigError, "nowhere.npz"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_is_measured(
    guarded_file: Path,
    arguments: tuple[str, ...],
    error: type[Exception],
    said: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    done = run(guarded_file, *arguments)
    assert isinstance(done.exception, error)
    assert said in str(done.exception)
    assert "measuring" not in capfd.readouterr().err


def test_inputs_of_another_shape_are_refused(guarded_file: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "wide.npz", x=np.zeros((20, 9, 9, 1), np.uint8), y=np.arange(20) % 2)
    assert isinstance(run(guarded_file, "--data", tmp_path / "wide.npz").exception, ModelError)


def test_a_file_that_was_changed_is_refused(guarded_file: Path, tmp_path: Path) -> None:
    content = bytearray(guarded_file.read_bytes())
    place = content.index(b'"fpr":0.01')
    content[place : place + 10] = b'"fpr":0.02'
    (tmp_path / "changed.tflite").write_bytes(content)
    assert isinstance(run(tmp_path / "changed.tflite", "--n", 10).exception, TrustError)


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "no.tflite").write_bytes(b"no model at all")
    assert isinstance(run(tmp_path / "no.tflite").exception, ModelError)


def test_the_board_is_read_and_what_it_does_not_say_is_unknown(tmp_path: Path) -> None:
    assert bench.read_board(tmp_path) == Reading()
    assert bench.board_name(tmp_path).startswith(f"{platform.machine()}, ")
    policy, zone = tmp_path / "sys/devices/system/cpu/cpufreq/policy0", tmp_path / "sys/class/thermal/thermal_zone0"
    for folder in (policy, zone, tmp_path / "proc/device-tree"):
        folder.mkdir(parents=True)
    (policy / "scaling_cur_freq").write_text("1500000\n")
    (zone / "type").write_text("cpu-thermal\n")
    (zone / "temp").write_text("51600\n")
    (tmp_path / "proc/device-tree/model").write_text("Raspberry Pi 4 Model B Rev 1.4\0")
    assert bench.read_board(tmp_path) == Reading(temperature_c=51.6, cpu_mhz=1500.0)
    assert "Raspberry Pi 4 Model B Rev 1.4" in bench.board_name(tmp_path)
