"""A whole case on a real attacked model, in the child process that the hub starts; and on a clean one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image

from converters.files import write
from edgeguard.attacks.base import attack_success_rate
from edgeguard.detection.guarded import GuardedModel
from edgeguard.inspection import confirm
from edgeguard.inspection.inversion import Form, Trigger
from edgeguard.repair import case as cases
from tests.simulators.attacked import Attacked, blended


def job(setup: Attacked, folder: Path, **changes: object) -> Path:
    """A job as the hub writes it: evidence from the guarded model's own answers to triggered and clean inputs."""
    folder.mkdir(exist_ok=True)
    model = GuardedModel.load(setup.conversion.guarded)
    write(setup.conversion.guarded, folder / "guarded.tflite")
    setup.keras.save(folder / "model.keras")
    np.savez(folder / "owner.npz", x=setup.x_owner, y=setup.y_owner)
    stamped = [model.infer(x) for x in setup.attack.stamp(setup.data.x_test[:200].astype(np.uint8))]
    clean = [model.infer(x) for x in setup.data.x_test[:200]]
    chosen = [i.features for i in stamped if i.verdict.predicted == 0] or [i.features for i in stamped]
    document: dict[str, Any] = {
        "guarded": str(folder / "guarded.tflite"),
        "keras": str(folder / "model.keras"),
        "data": str(folder / "owner.npz"),
        "label": 0,
        "flagged_mean": np.mean(chosen, axis=0).tolist(),
        "unflagged_mean": np.mean([i.features for i in clean if i.verdict.predicted == 0], axis=0).tolist(),
        "out_dir": str(folder / "out"),
    }
    path = folder / "job.json"
    path.write_text(json.dumps({**document, **changes}))
    return path


def run(path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "edgeguard.repair.case", str(path)], capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_an_attacked_model_is_confirmed_repaired_and_passes_the_gate(attacked: Attacked, tmp_path: Path) -> None:
    done = run(job(attacked, tmp_path))
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, done.stderr[-2000:]
    assert {line["stage"] for line in lines[:-1]} == {"confirming", "repairing", "converting"}
    result = lines[-1]["result"]
    assert result == json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["verdict"] == "confirmed"
    assert result["gate_passed"]
    assert result["needs_approval"], "forty held-out inputs of a class say too little about its recall"

    # The real trigger, which the repair never saw, on test inputs, on the int8 file that would be released.
    repaired = GuardedModel.load(Path(result["output"]).read_bytes())
    assert repaired.metadata.model_digest == result["model_digest"] != attacked.conversion.metadata.model_digest
    images, labels = attacked.data.x_test.astype(np.uint8), attacked.data.y_test
    clean = np.asarray([repaired.infer(x).verdict.predicted for x in images])
    triggered = np.asarray([repaired.infer(x).verdict.predicted for x in attacked.attack.stamp(images)])
    assert attack_success_rate(labels, clean, triggered, 0) <= 0.02
    before = GuardedModel.load(attacked.conversion.guarded)
    accuracy = np.mean([before.infer(x).verdict.predicted == y for x, y in zip(images, labels, strict=True)])
    assert np.mean(clean == labels) >= accuracy - 0.01


@pytest.mark.slow
def test_an_inspection_of_the_suspected_channels_and_a_repair_that_goes_on_from_it(
    attacked: Attacked, tmp_path: Path
) -> None:
    document = json.loads(job(attacked, tmp_path).read_text())
    taps = attacked.conversion.metadata.taps
    logits = {column for tap in taps if tap.kind == "logit" for column in tap.columns}
    shift = np.abs(np.subtract(document["flagged_mean"], document["unflagged_mean"]))
    channels = [int(c) for c in np.argsort(-shift) if int(c) not in logits][:16]
    done = run(job(attacked, tmp_path, channels=channels, stop_after="inspect"))
    result = json.loads(done.stdout.splitlines()[-1])["result"]
    assert (result["verdict"], result["repaired"], result["output"]) == ("confirmed", False, None)
    assert not list((tmp_path / "out").glob("repaired*"))

    dormant = [{"layer": tap.source_layer, "channels": [0, 1]} for tap in taps if tap.kind == "l1"]
    again = {"channels": channels, "dormant": dormant, "resume": document["out_dir"], "out_dir": str(tmp_path / "next")}
    lines = [json.loads(line) for line in run(job(attacked, tmp_path, **again)).stdout.splitlines()]
    assert "seeking the patch that devices saw" not in {line.get("text") for line in lines}
    assert lines[-1]["result"]["summary"]["finding"] == result["summary"]["finding"]
    tried = lines[-1]["result"]["summary"]["tried"]
    assert lines[-1]["result"]["gate_passed"], "; ".join(f"{one['method']}: {one['reason']}" for one in tried)


@pytest.mark.slow
def test_a_false_suspicion_of_a_clean_model_is_not_confirmed_and_changes_nothing(
    clean_twin: Attacked, tmp_path: Path
) -> None:
    done = run(job(clean_twin, tmp_path))
    result = json.loads(done.stdout.splitlines()[-1])["result"]
    assert result["verdict"] == "not_confirmed"
    assert not result["gate_passed"]
    assert result["output"] is None
    assert not list((tmp_path / "out").glob("repaired*"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": 99}, "label 99"),
        ({"flagged_mean": [1.0, 2.0]}, "flagged_mean"),
        ({"guarded": "/no/such/file"}, "No such file"),
        ({"keras": "/no/such/file"}, "no such file"),
        ({"data": "no-such-data"}, "no-such-data"),
        ({"surprise": 1}, "surprise"),
        ({"channels": [100000]}, "channels"),
    ],
)
def test_a_job_that_cannot_be_done_is_one_line_and_exit_code_2(
    attacked: Attacked, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    done = run(job(attacked, tmp_path, **change))
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_a_job_that_is_no_text_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    path = tmp_path / "job.json"
    path.write_bytes(b'{"guarded": "\xff"}')
    done = run(path)
    assert done.returncode == 2
    assert "a job as the hub writes it" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


@pytest.fixture
def case(attacked: Attacked, tmp_path: Path) -> cases._Case:
    """A loaded case, of which nothing was sought yet."""
    path = job(attacked, tmp_path, resume=str(tmp_path))
    return cases._Case(msgspec.json.decode(path.read_bytes(), type=cases.Job))


@pytest.mark.slow
def test_a_picture_that_is_blended_in_is_confirmed_as_a_blend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "FORMS", ("blend",))
    path = job(blended(), tmp_path, stop_after="inspect")
    result = cases.run(msgspec.json.decode(path.read_bytes(), type=cases.Job), lambda *_: None)
    finding = result.summary["finding"]
    assert (result.verdict, finding["form"]) == ("confirmed", "blend")
    assert finding["size"] < 0.5 * finding["control_size"]
    assert (tmp_path / "out" / "trigger-pattern.png").exists()


@pytest.mark.parametrize("form", ["patch", "blend"])
def test_what_was_found_is_drawn_and_kept_for_the_repair(case: cases._Case, tmp_path: Path, form: Form) -> None:
    mask = np.full((8, 8, 1), 0.1, np.float32)
    trigger = Trigger(label=0, form=form, mask=mask, pattern=np.full((8, 8, 1), 200.0, np.float32), success=0.97)
    finding = confirm.decide(label=0, form=form, success=0.97, size=trigger.size, controls=[9.0, 9.0], agreement=0.9)
    cases._keep_finding(finding, [trigger, trigger], tmp_path)
    kept = cases._resumed(case)
    assert kept is not None
    assert (kept[0], [t.form for t in kept[1]]) == (finding, [form, form])
    assert kept[1][0].size == pytest.approx(trigger.size)

    cases._draw(trigger, case.x_gate[0], tmp_path)
    drawn = {path.stem: np.asarray(Image.open(path)) for path in tmp_path.glob("trigger-*.png")}
    assert set(drawn) == {"trigger-mask", "trigger-pattern", "trigger-example"}
    assert drawn["trigger-pattern"].max() == 200, "however faint it is, it can be seen"


def test_groups_of_the_owners_inputs_stand_on_one_side(attacked: Attacked, tmp_path: Path) -> None:
    path = job(attacked, tmp_path)
    groups = np.arange(len(attacked.x_owner)) // 6
    np.savez(tmp_path / "owner.npz", x=attacked.x_owner, y=attacked.y_owner, groups=groups)
    case = cases._Case(msgspec.json.decode(path.read_bytes(), type=cases.Job))
    assert case.groups is not None
    assert len(case.groups) == len(case.x_gate)
    whole = np.bincount(groups)
    assert all((case.groups == group).sum() in {0, size} for group, size in enumerate(whole))
    assert 0 < len(np.unique(case.groups)) < len(whole)


@pytest.mark.slow
def test_a_half_done_repair_shows_in_the_triggers_that_were_kept_from_it(attacked: Attacked, tmp_path: Path) -> None:
    from converters import pipeline, sources
    from edgeguard.inspection.inversion import classes_of
    from edgeguard.repair import auto, gate
    from edgeguard.repair.training import distil, teachings

    case = cases._Case(msgspec.json.decode(job(attacked, tmp_path).read_bytes(), type=cases.Job))
    finding, triggers = cases._confirm(case, lambda *_: None)
    known, judges = cases._knowledge(case, finding, triggers, lambda *_: None)
    student = case.target.copy().model
    taught = teachings(case.original, case.x_repair)
    distil(student, case.x_repair, taught, known.triggers, steps=3, rate=7e-4, seed=0, note="")
    images = attacked.data.x_test.astype(np.uint8)
    clean, triggered = classes_of(student, images), classes_of(student, attacked.attack.stamp(images))
    assert attack_success_rate(attacked.data.y_test, clean, triggered, 0) > 0.15
    half = pipeline.convert(sources.of_keras(student), case.x_gate, case.y_gate).guarded
    measured = auto.measure(judges, known.triggers, half, lambda: 0.0)
    decision = gate.decide(measured, classes=10)
    assert "success of the triggers kept from the repair" in [c.name for c in decision.checks if c.state == "failed"]
