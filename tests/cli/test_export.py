"""``edgeguard export``: a guarded file becomes C that says of its outputs what Python says."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

from converters import micro, microcontroller
from edgeguard.cli.export import COMPILER, firmware_of
from edgeguard.detection.guarded import TfliteModel
from firmware_bridge import c99
from firmware_bridge.link import messages
from tests.cli.conftest import Run
from tests.firmware_bridge import firmware
from tests.firmware_bridge.firmware import Microcontroller
from tests.simulators import needs
from tests.simulators.attacked import Attacked

STATUS = {"clean": 0, "flagged": 1, "not checked": 2}


@pytest.fixture(scope="module")
def exported(guarded_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder, written by the same functions as the command's."""
    folder = tmp_path_factory.mktemp("exported")
    return firmware.write(folder, firmware_of(guarded_file.read_bytes(), guarded_file, 4))


@pytest.fixture(scope="module")
def program(exported: Path) -> Path:
    return firmware.build(exported, "harness.c")


@pytest.fixture(scope="module")
def described(guarded_file: Path) -> microcontroller.Described:
    return microcontroller.describe(guarded_file.read_bytes())


def test_the_folder_holds_what_a_firmware_project_needs(edgeguard: Run, guarded_file: Path, tmp_path: Path) -> None:
    code, out, _ = edgeguard("export", guarded_file, "--c", "-o", tmp_path / "fw", "--json")
    assert code == 0
    printed = json.loads(out)
    assert set(printed["files"]) >= {
        *(
            f"{name}{suffix}"
            for name in (*c99.SOURCES, "edgeguard_model", "edgeguard_golden")
            for suffix in (".h", ".c")
        ),
        *("CMakeLists.txt", "main.c", "edgeguard_operators.h", "sizes.json"),
    }
    assert printed["sizes"]["model_bytes"] == guarded_file.stat().st_size
    assert json.loads((tmp_path / "fw" / "sizes.json").read_text()) == printed["sizes"]
    assert "0x" in (tmp_path / "fw" / "edgeguard_model.c").read_text()


def test_a_compiler_without_a_c_library_leaves_the_sizes_unmeasured(
    edgeguard: Run, guarded_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = tmp_path / "bin" / COMPILER
    compiler.parent.mkdir()
    compiler.write_text("#!/bin/sh\necho 'string.h: No such file or directory' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", f"{compiler.parent}:/usr/bin:/bin")
    code, out, _ = edgeguard("export", guarded_file, "--c", "-o", tmp_path / "fw")
    assert code == 0
    assert "not measured" in out
    assert set(json.loads((tmp_path / "fw" / "sizes.json").read_text())["library"].values()) == {None}


def test_exporting_again_keeps_an_example_that_was_edited(edgeguard: Run, guarded_file: Path, tmp_path: Path) -> None:
    assert edgeguard("export", guarded_file, "--c", "-o", tmp_path)[0] == 0
    (tmp_path / "main.c").write_text("/* mine */\n")
    (tmp_path / "edgeguard.c").write_text("/* not mine */\n")
    assert edgeguard("export", guarded_file, "--c", "-o", tmp_path, "--sequence", "9")[0] == 0
    assert (tmp_path / "main.c").read_text() == "/* mine */\n"
    assert (tmp_path / "edgeguard.c").read_text() == c99.library()["edgeguard.c"]


def test_without_a_language_nothing_is_written(edgeguard: Run, guarded_file: Path, tmp_path: Path) -> None:
    code, _, err = edgeguard("export", guarded_file, "-o", tmp_path / "fw")
    assert (code, len(err.splitlines())) == (2, 1)
    assert "--c" in err
    assert not (tmp_path / "fw").exists()


@pytest.mark.parametrize(("damage", "message"), [(b"", "not"), (b"\0" * 100, "not")])
def test_what_is_no_guarded_file_is_refused_in_one_line(
    edgeguard: Run, tmp_path: Path, damage: bytes, message: str
) -> None:
    broken = tmp_path / "broken.tflite"
    broken.write_bytes(damage)
    code, _, err = edgeguard("export", broken, "--c", "-o", tmp_path / "fw")
    assert (code, len(err.strip().splitlines())) == (2, 1)
    assert message in err


def test_a_file_that_was_changed_is_refused(edgeguard: Run, guarded_file: Path, tmp_path: Path) -> None:
    content = bytearray(guarded_file.read_bytes())
    place = content.rindex(b'"threshold":') + len(b'"threshold":')
    content[place] = ord("9") if content[place] != ord("9") else ord("8")
    changed = tmp_path / "changed.tflite"
    changed.write_bytes(content)
    code, _, err = edgeguard("export", changed, "--c", "-o", tmp_path / "fw")
    assert code == 2
    assert "digest" in err


def test_every_exported_source_compiles_without_a_warning(exported: Path, tmp_path: Path) -> None:
    compiler = needs.program("gcc", "gcc libc6-dev")
    for name in ("edgeguard_model", "edgeguard_golden", "main"):
        command = [compiler, *firmware.WARNINGS, "-c", str(exported / f"{name}.c"), "-o", str(tmp_path / "x.o")]
        subprocess.run(command, check=True)


def test_golden_vectors_hold_both_verdicts_and_none_near_the_threshold(
    described: microcontroller.Described,
) -> None:
    assert len(described.golden) == microcontroller.GOLDEN
    for golden in described.golden:
        score = float(golden.scores.max())
        assert (score > 1) == (golden.status == "flagged")
        assert not 0.75 < score < 1.3


def test_the_c_library_says_of_tflite_micros_outputs_what_python_says(
    program: Path, guarded_file: Path, described: microcontroller.Described, tmp_path: Path
) -> None:
    needs.python_module("tflite_micro", "tflite-micro", until=(3, 12))
    model = TfliteModel(guarded_file.read_bytes())
    random = np.random.default_rng(3)
    tensors = [model.quantise(random.integers(0, 256, model.input_shape).astype(np.uint8)) for _ in range(4)]
    answers = micro.run(guarded_file.read_bytes(), tensors, described.outputs)
    with Microcontroller(program, tmp_path / "flash") as mcu:
        for answer in answers:
            own, scores, features = answer[0][0], answer[-2][0], answer[-1][0]
            label = int(own.argmax())
            status, _, _ = mcu.call("j", label, scores.tobytes().hex(), features.tobytes().hex())
            assert int(status) == STATUS["flagged" if scores.max() > 1 else "clean"]


def test_a_features_excess_is_its_deviation_from_what_was_fitted(
    program: Path, attacked: Attacked, described: microcontroller.Described, tmp_path: Path
) -> None:
    compiled = attacked.conversion.result.compiled
    fitted = compiled.statistics
    golden = described.golden[0]
    usual = fitted.centre + fitted.table[golden.label]
    by_detector = fitted.weights[:, : len(usual)] / np.asarray(compiled.thresholds)[:, np.newaxis]
    steps = np.sqrt(by_detector.max(axis=0)) * messages.UNIT
    expected = (golden.features / fitted.unit - usual) * steps
    rounding = 3 + np.abs(golden.features / fitted.unit * steps) / 2**14
    with Microcontroller(program, tmp_path / "flash") as mcu:
        for channel, bits in enumerate(golden.features.view(np.uint32)):
            found = int(mcu.call("e", channel, int(bits), golden.label)[0])
            assert abs(found - expected[channel]) <= rounding[channel]


def test_the_export_and_the_messages_have_the_same_limits() -> None:
    assert microcontroller.UNIT == messages.UNIT
    assert microcontroller.MOST_DETECTORS == messages.DETECTORS
    assert microcontroller.MOST_CLASSES == messages.MAX_LABEL + 1
