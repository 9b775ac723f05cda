"""The commands as a user types them: output, JSON, exit codes, and one line for every kind of bad input."""

from __future__ import annotations

import errno
import hashlib
import json
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgeguard import __version__
from edgeguard.demo import run as demo_run
from edgeguard.detection import metadata
from edgeguard.detection import sidecar as sidecars
from edgeguard.detection.cascade import limits_of
from edgeguard.detection.guarded import GuardedModel, TfliteModel
from tests.simulators.attacked import Attacked

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def doubtful(attacked: Attacked, audited_file: Path, tmp_path: Path) -> Path:
    """A file of three clean inputs that the one pass is not sure of, and of one that it is sure of."""
    model = GuardedModel.load(audited_file.read_bytes())
    sidecar = sidecars.read_beside(audited_file, model.metadata)
    limits = None if sidecar is None else limits_of(sidecar.stages)
    assert limits is not None
    images = attacked.data.x_test.astype(np.uint8)
    scores = np.array([model.infer(x).verdict.score for x in images])
    unsure = np.flatnonzero((scores >= limits.grey) & (scores < 0.8))[:3]
    chosen = [*unsure, scores.argmin()]
    np.savez(tmp_path / "doubtful.npz", x=images[chosen], y=attacked.data.y_test[chosen])
    return tmp_path / "doubtful.npz"


@pytest.fixture
def inputs(attacked: Attacked, tmp_path: Path) -> dict[str, Path]:
    """Files of clean and of triggered inputs."""
    images, labels = attacked.data.x_test[:40].astype(np.uint8), attacked.data.y_test[:40]
    files = {"clean": tmp_path / "clean.npz", "triggered": tmp_path / "triggered.npz", "owner": tmp_path / "owner.npz"}
    np.savez(files["clean"], x=images[labels != 0], y=labels[labels != 0])
    np.savez(files["triggered"], x=attacked.attack.stamp(images[labels != 0]), y=labels[labels != 0])
    np.savez(files["owner"], x=attacked.x_owner, y=attacked.y_owner)
    return files


def test_the_installed_script_prints_its_version() -> None:
    script = Path(sys.executable).parent / "edgeguard"
    done = subprocess.run([script, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"edgeguard {__version__}\n"


COMMANDS = ("demo", "convert", "calibrate", "inspect", "score", "bench", "run", "doctor", "hub")


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_explains_itself_with_an_example(edgeguard: Run, command: str) -> None:
    code, out, _ = edgeguard(command, "--help")
    assert code == 0
    assert f"edgeguard {command}" in out.split("Example")[-1]


def test_convert_writes_a_guarded_file_and_says_what_it_did(
    edgeguard: Run, attacked: Attacked, inputs: dict[str, Path], tmp_path: Path
) -> None:
    attacked.keras.save(tmp_path / "digits.keras")
    output = tmp_path / "out.tflite"
    code, out, _ = edgeguard("convert", tmp_path / "digits.keras", "--data", inputs["owner"], "-o", output, "--json")
    document = json.loads(out)
    assert code == 0
    assert set(document) == {
        "output",
        "model_digest",
        "guard_digest",
        "sidecar_digest",
        "bytes",
        "float_accuracy",
        "int8_accuracy",
        "agreement",
        "output_error",
        "taps",
        "fpr",
        "validated",
        "latency",
        "runtimes_verified",
        "runtimes_not_run",
        "peak_memory_bytes",
    }
    assert document["model_digest"] == attacked.conversion.metadata.model_digest
    assert metadata.read(output.read_bytes()).taps == attacked.conversion.metadata.taps
    beside = (tmp_path / "out.guard.npz").read_bytes()
    assert hashlib.sha256(beside).hexdigest() == document["sidecar_digest"]


def test_convert_without_a_sidecar_gives_the_file_that_the_function_gives(
    edgeguard: Run, attacked: Attacked, inputs: dict[str, Path], tmp_path: Path
) -> None:
    attacked.keras.save(tmp_path / "digits.keras")
    output = tmp_path / "out.tflite"
    code, _, _ = edgeguard(
        "convert", tmp_path / "digits.keras", "--data", inputs["owner"], "-o", output, "--no-sidecar"
    )
    assert code == 0
    assert output.read_bytes() == attacked.conversion.guarded
    assert not (tmp_path / "out.guard.npz").exists()


def test_convert_takes_class_names_and_leaves_a_float_model_float_when_asked(
    edgeguard: Run, attacked: Attacked, inputs: dict[str, Path], tmp_path: Path
) -> None:
    attacked.keras.save(tmp_path / "digits.keras")
    (tmp_path / "names.txt").write_text("".join(f"digit {c}\n" for c in range(10)))
    output = tmp_path / "out.tflite"
    code, out, _ = edgeguard(
        "convert", tmp_path / "digits.keras", "--data", inputs["owner"], "-o", output,
        "--labels", tmp_path / "names.txt", "--float", "--keras", tmp_path / "trainable.keras",
    )  # fmt: skip
    assert code == 0
    assert "left float" in out
    assert metadata.read(output.read_bytes()).classes[3] == "digit 3"
    assert TfliteModel(output.read_bytes()).input_dtype == np.float32
    assert (tmp_path / "trainable.keras").stat().st_size > 10_000


def test_convert_lists_what_can_be_tapped_and_takes_a_name_from_the_list(
    edgeguard: Run, attacked: Attacked, inputs: dict[str, Path], tmp_path: Path
) -> None:
    model = tmp_path / "bare.tflite"
    model.write_bytes(attacked.conversion.bare)
    code, out, _ = edgeguard("convert", model, "--taps", "list", "--json")
    listed = json.loads(out)
    assert code == 0
    assert [tap["default"] for tap in listed].count(True) == 2
    first, output = listed[0]["tensor"], tmp_path / "out.tflite"
    code, _, _ = edgeguard("convert", model, "--data", inputs["owner"], "-o", output, "--taps", first)
    assert code == 0
    found = metadata.read(output.read_bytes()).taps
    assert {tap.tensor for tap in found if tap.kind != "logit"} == {first}


def test_convert_on_made_up_data_says_that_nothing_was_validated(
    edgeguard: Run, attacked: Attacked, tmp_path: Path
) -> None:
    model, output = tmp_path / "bare.tflite", tmp_path / "out.tflite"
    model.write_bytes(attacked.conversion.bare)
    code, out, _ = edgeguard("convert", model, "--data", "synthetic", "-o", output)
    assert code == 0
    assert "NOT VALIDATED" in out
    assert metadata.read(output.read_bytes()).calibration.synthetic


def test_calibrate_writes_a_new_file_and_leaves_the_old_one(
    edgeguard: Run, attacked: Attacked, guarded_file: Path, tmp_path: Path
) -> None:
    data, output = tmp_path / "other.npz", tmp_path / "again.tflite"
    np.savez(data, x=attacked.data.x_test.astype(np.uint8))
    before = guarded_file.read_bytes()
    code, out, _ = edgeguard("calibrate", guarded_file, "--data", data, "-o", output, "--json")
    document = json.loads(out)
    assert code == 0
    assert guarded_file.read_bytes() == before
    assert document["model_digest"] == attacked.conversion.metadata.model_digest
    assert document["guard_digest"] != attacked.conversion.metadata.guard_digest


def test_inspect_shows_the_metadata_and_that_the_digests_fit(edgeguard: Run, guarded_file: Path) -> None:
    code, out, _ = edgeguard("inspect", guarded_file)
    assert code == 0
    assert "fit the content" in out
    code, out, _ = edgeguard("inspect", guarded_file, "--json")
    assert json.loads(out)["digests"] == "fit"


def test_inspect_reports_a_model_that_was_changed_under_its_guard(
    edgeguard: Run, attacked: Attacked, tmp_path: Path
) -> None:
    content = bytearray(attacked.conversion.guarded)
    bare = attacked.conversion.bare
    weights = bare[len(bare) // 2 : len(bare) // 2 + 64]
    content[content.index(weights) + 8] ^= 0x40
    (tmp_path / "changed.tflite").write_bytes(content)
    code, out, _ = edgeguard("inspect", tmp_path / "changed.tflite")
    assert code == 1
    assert "do not fit the content" in out


def test_score_gives_a_verdict_per_input(edgeguard: Run, guarded_file: Path, inputs: dict[str, Path]) -> None:
    code, out, _ = edgeguard("score", guarded_file, "--data", inputs["triggered"], "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 1
    assert len(rows) == len(np.load(inputs["triggered"])["x"])
    assert {"index", "predicted", "flagged", "scores", "p_value", "stages", "reason"} <= set(rows[0])
    assert all(row["flagged"] for row in rows)


def test_score_exits_with_0_on_clean_inputs(edgeguard: Run, guarded_file: Path, inputs: dict[str, Path]) -> None:
    code, out, _ = edgeguard("score", guarded_file, "--data", inputs["clean"])
    assert code == 0
    assert "0 flagged, 0 not checked" in out


def test_score_audits_doubtful_inputs_with_the_sidecar(edgeguard: Run, audited_file: Path, doubtful: Path) -> None:
    code, out, _ = edgeguard("score", audited_file, "--data", doubtful, "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [row["audit"] for row in rows] == ["done", "done", "done", "not needed"]
    assert rows[0]["stages"][:2] == ["one-pass", "squeezing"]
    assert set(rows[0]["evidence"]) == set(rows[0]["stages"][1:])
    assert rows[3]["stages"] == ["one-pass"]


def test_score_says_how_many_inferences_an_input_took(edgeguard: Run, audited_file: Path, doubtful: Path) -> None:
    _, out, _ = edgeguard("score", audited_file, "--data", doubtful)
    counts, mean = out.splitlines()[-1].split("; ")
    assert counts == "4 clean, 0 flagged, 0 not checked, 0 not audited"
    # Three of four take one look or three beside the one pass.
    assert (3 * 2 + 1) / 4 <= float(mean.removesuffix(" inferences per input")) <= (3 * 4 + 1) / 4


def test_score_exits_with_3_where_the_audits_allowed_do_not_reach(
    edgeguard: Run, audited_file: Path, doubtful: Path
) -> None:
    code, out, _ = edgeguard("score", audited_file, "--data", doubtful, "--audits", "0")
    assert code == 3
    assert "1 clean, 0 flagged, 0 not checked, 3 not audited; 1.00 inferences per input" in out
    assert out.count("the budget for audits is spent") == 3


def test_score_flags_triggered_inputs_whether_or_not_others_are_audited(
    edgeguard: Run, audited_file: Path, inputs: dict[str, Path]
) -> None:
    for options in ([], ["--audits", "0"], ["--audits", "5"], ["--one-pass"]):
        code, out, _ = edgeguard("score", audited_file, "--data", inputs["triggered"], "--json", *options)
        assert code == 1
        assert all(json.loads(line)["flagged"] for line in out.splitlines())


@pytest.mark.parametrize("as_json", [False, True])
def test_score_in_one_pass_says_what_it_says_without_a_sidecar(
    edgeguard: Run, audited_file: Path, doubtful: Path, tmp_path: Path, as_json: bool
) -> None:
    alone = tmp_path / "alone.guarded.tflite"
    alone.write_bytes(audited_file.read_bytes())
    options = ["--data", doubtful, *(["--json"] if as_json else [])]
    one_pass = edgeguard("score", audited_file, *options, "--one-pass")
    assert one_pass == edgeguard("score", alone, *options)
    assert one_pass[0] == 0
    assert "inferences" not in one_pass[1]


def test_score_says_the_same_when_it_is_run_again(edgeguard: Run, audited_file: Path, inputs: dict[str, Path]) -> None:
    first = edgeguard("score", audited_file, "--data", inputs["owner"], "--json")
    assert '"audit": "done"' in first[1]
    assert first == edgeguard("score", audited_file, "--data", inputs["owner"], "--json")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--audits", "-1"], "audit budget"),
        (["--audits", "nan"], "audit budget"),
        (["--audits", "inf"], "audit budget"),
        (["--audits", "1", "--one-pass"], "expected one of the two"),
    ],
)
def test_score_refuses_audits_that_are_no_amount(
    edgeguard: Run, audited_file: Path, doubtful: Path, options: list[str], message: str
) -> None:
    code, out, err = edgeguard("score", audited_file, "--data", doubtful, *options)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert message in err


def test_score_refuses_the_sidecar_of_another_model(
    edgeguard: Run, audited_file: Path, doubtful: Path, tmp_path: Path
) -> None:
    model = tmp_path / "digits.guarded.tflite"
    model.write_bytes(audited_file.read_bytes())
    content = bytearray(sidecars.path_beside(audited_file).read_bytes())
    content[len(content) // 2] ^= 1
    sidecars.path_beside(model).write_bytes(content)
    code, out, err = edgeguard("score", model, "--data", doubtful)
    assert (code, out) == (2, "")
    assert "digits.guard.npz" in err
    assert "SHA-256" in err
    assert edgeguard("score", model, "--data", doubtful, "--one-pass")[0] == 0


def _bad_inputs(tmp_path: Path, attacked: Attacked, guarded: Path, owner: Path) -> dict[str, tuple[list[object], str]]:
    bare, text, wide, small = (tmp_path / n for n in ("bare.tflite", "text.tflite", "wide.npz", "small.npz"))
    bare.write_bytes(attacked.conversion.bare)
    text.write_text("this is no model")
    np.savez(wide, x=np.zeros((9, 9, 9, 1), np.uint8), y=np.zeros(9, int))
    keras, flat = tmp_path / "digits.keras", tmp_path / "flat.npz"
    attacked.keras.save(keras)
    np.savez(flat, x=np.random.default_rng(0).normal(size=(500, 20)), y=np.zeros(500, int))
    np.savez(small, x=attacked.x_owner[:20], y=attacked.y_owner[:20])
    names, zeros, scaled = tmp_path / "names.txt", tmp_path / "zeros.npz", tmp_path / "scaled.npz"
    names.write_text("one\ntwo\n")
    nothing = attacked.data.x_train[attacked.data.y_train == 0].astype(np.uint8)
    np.savez(zeros, x=nothing)
    np.savez(scaled, x=attacked.x_owner / 255.0)
    config = tmp_path / "agent.toml"
    config.write_text("fleet = 1")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        closed = probe.getsockname()[1]
    return {
        "missing model": (["score", tmp_path / "no.tflite", "--data", "digits"], "No such file"),
        "folder as model": (["score", tmp_path, "--data", "digits"], "directory"),
        "not a model": (["score", text, "--data", "digits"], "TFL3"),
        "model without guard": (["score", bare, "--data", "digits"], "edgeguard convert"),
        "unknown data set": (["score", guarded, "--data", "imagenet"], "imagenet"),
        "data of another shape": (["score", guarded, "--data", wide], "expected uint8[8, 8, 1]"),
        "flat data for a Keras model": (["convert", keras, "--data", flat], "expected [8, 8, 1]"),
        "too few inputs": (["convert", bare, "--data", small], "at least 398"),
        "unreadable source": (["convert", text, "--data", owner], "not TFLite"),
        "no output folder": (["convert", bare, "--data", owner, "-o", tmp_path / "a" / "b.tflite"], "create it first"),
        "unknown tap": (["convert", bare, "--data", owner, "--taps", "no such layer"], "no such layer"),
        "taps that are no number": (["convert", bare, "--data", owner, "--taps", "0"], "taps"),
        "unknown input type": (["convert", bare, "--data", owner, "--input", "int4"], "int8 or uint8"),
        "too few class names": (["convert", bare, "--data", owner, "--labels", names], "expected 10"),
        "no data": (["convert", bare], "--data"),
        "a model without a guard to calibrate": (["calibrate", bare, "--data", owner], "without a guard"),
        "one class to calibrate with": (["calibrate", guarded, "--data", zeros, "--fpr", "0.2"], "at least 5 classes"),
        "scaled data": (["calibrate", guarded, "--data", scaled], "got inputs of type float32"),
        "impossible rate": (["convert", bare, "--data", owner, "--fpr", "2"], "--fpr"),
        "broker address": (["demo", "--broker", "nonsense", "--report", tmp_path / "r"], "HOST:PORT"),
        "broker that is down": (["demo", "--broker", f"127.0.0.1:{closed}", "--report", tmp_path / "r"], "broker"),
        "report folder is a file": (["demo", "--report", text], "text.tflite"),
        "json folder is missing": (["demo", "--report", tmp_path / "r", "--json", tmp_path / "x" / "y"], "x"),
        "demo on unknown data": (["demo", "--data", "imagenet", "--report", tmp_path / "r"], "imagenet"),
        "demo on numbers": (["demo", "--data", tmp_path / "numbers.npz", "--report", tmp_path / "r"], "BadNets"),
    }


CASES = (
    "missing model",
    "folder as model",
    "not a model",
    "model without guard",
    "unknown data set",
    "data of another shape",
    "flat data for a Keras model",
    "too few inputs",
    "unreadable source",
    "no output folder",
    "unknown tap",
    "taps that are no number",
    "unknown input type",
    "too few class names",
    "no data",
    "a model without a guard to calibrate",
    "one class to calibrate with",
    "scaled data",
    "impossible rate",
    "broker address",
    "broker that is down",
    "report folder is a file",
    "json folder is missing",
    "demo on unknown data",
    "demo on numbers",
)


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_line_and_exit_code_2_and_leaves_nothing(
    edgeguard: Run,
    attacked: Attacked,
    guarded_file: Path,
    inputs: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    case: str,
) -> None:
    np.savez(tmp_path / "numbers.npz", x=np.zeros((900, 5)), y=np.arange(900) % 3)
    arguments, message = _bad_inputs(tmp_path, attacked, guarded_file, inputs["owner"])[case]
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    before = set(tmp_path.rglob("*"))
    code, _, err = edgeguard(*arguments)
    lines = [line for line in err.splitlines() if line.startswith("edgeguard:")]
    assert code == 2
    assert len(lines) == 1
    assert message in lines[0]
    assert "Traceback" not in err
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("command", ["run", "hub"])
def test_a_daemon_with_a_broken_configuration_is_one_line_and_exit_code_2(tmp_path: Path, command: str) -> None:
    config = tmp_path / "broken.toml"
    config.write_text('fleet = "demo"\nsurprise = 1\n')
    script = Path(sys.executable).parent / "edgeguard"
    done = subprocess.run([script, command, "--config", config], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "broken.toml" in done.stderr.strip().splitlines()[-1]


def test_a_full_disk_is_one_line_and_exit_code_2(
    edgeguard: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "model.keras"))

    monkeypatch.setattr(demo_run, "run", full)
    code, _, err = edgeguard("demo", "--report", tmp_path / "r")
    assert code == 2
    assert "No space left on device" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(("package", "data"), [("keras", "clean"), ("sklearn", "digits")])
def test_a_missing_package_names_the_extra_that_brings_it(
    edgeguard: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inputs: dict[str, Path], package: str, data: str
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    # The model is read in a child process, which must not find the package either.
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / f"{package}.py").write_text(f"raise ModuleNotFoundError('none', name={package!r})\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "empty"))
    (tmp_path / "model.keras").write_bytes(b"anything")
    found = {"clean": inputs["owner"], "digits": "digits"}[data]
    code, _, err = edgeguard("convert", tmp_path / "model.keras", "--data", found)
    assert code == 2
    assert "edgeguard[convert]" in err
    assert "Traceback" not in err


def test_a_mistake_of_ours_is_exit_code_4_and_says_so(
    edgeguard: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise KeyError("oops")

    monkeypatch.setattr(demo_run, "run", broken)
    code, _, err = edgeguard("demo", "--report", tmp_path / "r")
    assert code == 4
    assert "internal error" in err
