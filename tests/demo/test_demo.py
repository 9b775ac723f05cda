"""The demo keeps its promises: the whole loop on digits, with the demo's own broker and with mosquitto."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeguard.attacks.badnets import BadNets
from edgeguard.demo.feeder import Feeder
from edgeguard.demo.record import Metrics, checks_of
from tests.simulators.mosquitto import Mosquitto

GOOD: dict[str, Any] = {
    "data": "digits",
    "clean_accuracy_before": 0.99,
    "clean_accuracy_after": 0.98,
    "asr_before": 1.0,
    "asr_after": 0.01,
    "auroc": 1.0,
    "tpr": 0.99,
    "tpr_successful": 0.99,
    "fpr": 0.01,
    "latency_bare_us": 5.0,
    "latency_guarded_us": 7.0,
    "inputs_sent": 100,
    "inputs_processed": 100,
    "reports_published": 10,
    "reports_stored": 10,
    "devices": 3,
    "devices_updated": 3,
    "tampered_refused": True,
    "wall_s": 60.0,
    "n_clean": 449,
    "n_triggered": 410,
}


@pytest.mark.slow
@pytest.mark.parametrize("own_broker", [True, False], ids=["amqtt", "mosquitto"])
def test_the_whole_loop_on_digits_keeps_every_promise(mosquitto: Mosquitto, tmp_path: Path, own_broker: bool) -> None:
    script = Path(sys.executable).parent / "edgeguard"
    (tmp_path / "tmp").mkdir()
    broker = [] if own_broker else ["--broker", f"{mosquitto.host}:{mosquitto.port}"]
    devices = 3 if own_broker else 2
    done = subprocess.run(
        [script, "demo", "--devices", str(devices), *broker, "--json", "result.json", "--report", "report"],
        cwd=tmp_path,
        env={**os.environ, "EDGEGUARD_CACHE": str(tmp_path / "cache"), "TMPDIR": str(tmp_path / "tmp")},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    metrics = Metrics(**json.loads((tmp_path / "result.json").read_text()))
    assert metrics.devices == devices
    assert all(check.passed for check in checks_of(metrics))
    assert (tmp_path / "report" / "index.html").stat().st_size > 10_000
    assert not list((tmp_path / "tmp").glob("edgeguard-demo-*")), "the working folder stayed behind"


def test_a_good_run_keeps_every_promise() -> None:
    assert all(check.passed for check in checks_of(Metrics(**GOOD)))


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"asr_before": 0.94}, "asr_before"),
        ({"tpr": 0.94}, "tpr"),
        ({"fpr": 0.031}, "fpr"),
        ({"asr_after": 0.051}, "asr_after"),
        ({"clean_accuracy_after": 0.96}, "clean_accuracy_after"),
        ({"inputs_processed": 99}, "inputs_processed"),
        ({"inputs_processed": 0, "inputs_sent": 0}, "inputs_processed"),
        ({"reports_stored": 11}, "reports_stored"),
        ({"reports_stored": 0, "reports_published": 0}, "reports_stored"),
        ({"devices_updated": 2}, "devices_updated"),
        ({"tampered_refused": False}, "tampered_refused"),
        ({"tpr": float("nan")}, "tpr"),
        ({"asr_after": float("nan")}, "asr_after"),
    ],
)
def test_each_promise_can_fail_on_its_own(change: dict[str, Any], rule: str) -> None:
    failed = [check for check in checks_of(Metrics(**{**GOOD, **change})) if not check.passed]
    assert len(failed) == 1
    assert failed[0].rule.startswith(rule)


def test_the_feeder_counts_exactly_what_it_hands_over(tmp_path: Path) -> None:
    folders = {name: tmp_path / name for name in ("a", "b")}
    for folder in folders.values():
        folder.mkdir()
    images = np.random.default_rng(0).integers(0, 200, (50, 8, 8, 1), dtype=np.uint8)
    attack = BadNets.for_shape((8, 8, 1))
    feeder = Feeder(folders, images, attack, triggered=0.5, interval_s=0.01, seed=0)
    feeder.start()
    deadline = time.monotonic() + 30
    while any(len(list(folder.glob("*.npy"))) < 3 for folder in folders.values()):
        assert time.monotonic() < deadline, "the feeder is stuck"
    feeder.stop()
    batches = {name: [np.load(path) for path in sorted(folder.glob("*.npy"))] for name, folder in folders.items()}
    assert feeder.sent == sum(len(batch) for device in batches.values() for batch in device)
    assert all((folder / "end").exists() for folder in folders.values())
    assert not list(tmp_path.rglob("*.tmp"))
    # No device sees another's inputs: compare what the trigger does not touch.
    seen = [{x[:6].tobytes() for batch in device for x in batch} for device in batches.values()]
    assert not seen[0] & seen[1]
