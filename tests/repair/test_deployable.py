"""Whether devices will take a repaired file in place of the one that they run."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import msgspec
import numpy as np
import pytest

from edgeguard.detection.guarded import GuardedModel
from edgeguard.detection.sidecar import Sidecar
from edgeguard.errors import ModelError
from edgeguard.repair.deployable import Running
from tests.simulators.attacked import Attacked


@pytest.mark.parametrize(("wrong", "refused"), [(0, False), (1, False), (2, True), (16, True)])
def test_a_repair_must_give_the_classes_that_devices_know(attacked: Attacked, wrong: int, refused: bool) -> None:
    model = GuardedModel.load(attacked.conversion.guarded)
    known = np.asarray([model.infer(x).verdict.predicted for x in attacked.x_owner[:16]], dtype=np.int64)
    known[:wrong] = (known[:wrong] + 1) % 10
    held = Sidecar(
        overlays=attacked.x_owner[:1],
        self_test=attacked.x_owner[:16],
        predicted=known,
        scores=np.zeros((16, 1), np.float32),
        stages={},
    )
    with pytest.raises(ModelError, match=r"(14|0) of 16") if refused else nullcontext():
        Running(model, held).check(attacked.conversion.guarded)


def test_a_repair_must_take_and_give_what_the_running_file_does(attacked: Attacked) -> None:
    running = GuardedModel.load(attacked.conversion.guarded)
    running.metadata = msgspec.structs.replace(running.metadata, classes=("x",) * 10)
    with pytest.raises(ModelError, match="repaired model: classes"):
        Running(running, None).check(attacked.conversion.guarded)


def test_the_sidecar_beside_the_file_tells_what_devices_know(audited_file: Path) -> None:
    model = GuardedModel.load(audited_file.read_bytes())
    found = Running.at(audited_file, model)
    assert found.held is not None
    found.check(audited_file.read_bytes())


def test_the_sidecar_of_another_file_tells_nothing(audited_file: Path, tmp_path: Path) -> None:
    model = GuardedModel.load(audited_file.read_bytes())
    (tmp_path / "model.guard.npz").write_bytes(b"")
    assert Running.at(tmp_path / "model.tflite", model).held is None
    assert Running.at(tmp_path / "nothing.tflite", model).held is None
