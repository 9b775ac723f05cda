"""Models handed over to a microcontroller: a signed release by way of a real agent, into slots that power may leave."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from edgeguard.contract.messages import Birth, Reported
from edgeguard.detection import metadata
from tests.agent.conftest import Device
from tests.agent.test_update_process import Site
from tests.mcu import build
from tests.mcu.board import Board
from tests.mcu.build import Recording
from tests.mcu.cable import Cable
from tests.simulators.tiny_hub import TinyHub, wait_until

PUMP = "gate~pump"
PART = 20


@pytest.fixture(scope="module")
def program(digit_models: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    from edgeguard import data

    recording = Recording.of(digit_models[0], np.array(data.load("digits").x_test[: 2 * PART]))
    return build.host(tmp_path_factory.mktemp("build"), recording, part=PART)


@pytest.fixture
def cable(tmp_path: Path) -> Iterator[Cable]:
    one = Cable(tmp_path / "dev" / "pump")
    yield one
    one.close()


@pytest.fixture
def board(program: Path, cable: Cable, tmp_path: Path) -> Iterator[Board]:
    one = Board(program, cable, tmp_path / "board")
    yield one
    one.kill()


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    one = Site(tmp_path)
    yield one
    one.close()


@pytest.fixture
def gateway(device: Callable[..., Device], cable: Cable, site: Site, digit_models: tuple[Path, Path]) -> Device:
    port = f'[[sources.serial]]\nname = "pump"\nport = "{cable.name}"\nmodel = "{digit_models[0]}"\n'
    return device("gate", site.config, sources=port)


def release(hub: TinyHub, site: Site, models: tuple[Path, Path]) -> None:
    """Sign the second model for devices that run the first, and tell the microcontroller."""
    made = site.release(models[1], models[0])
    hub.hint(PUMP, made.target, made.sequence)


def runs(hub: TinyHub) -> str | None:
    """The model that the microcontroller said last it runs."""
    births = [birth for birth in hub.all(Birth) if birth.board == "host"]
    return births[-1].model_digest if births else None


def outcome(hub: TinyHub) -> tuple[str, str] | None:
    """What became of the hint, and why: only the microcontroller gets one."""
    told = [reported for reported in hub.all(Reported) if reported.desired_sequence is not None]
    return (told[-1].state, told[-1].reason) if told else None


def digest(path: Path) -> str:
    return metadata.read(path.read_bytes()).model_digest


def resumed_at(gateway: Device) -> list[int]:
    """From which bytes on the model went over."""
    return [int(offset) for offset in re.findall(r"goes over from byte (\d+)", gateway.log)]


def test_a_signed_release_runs_on_the_microcontroller_after_its_self_test(
    hub: TinyHub, gateway: Device, board: Board, site: Site, digit_models: tuple[Path, Path]
) -> None:
    gateway.start()
    board.start()
    wait_until(lambda: hub.inputs() == PART, "what the old model counted")
    release(hub, site, digit_models)
    wait_until(lambda: outcome(hub) == ("updated", ""), "the update")
    assert runs(hub) == digest(digit_models[1])
    wait_until(lambda: hub.inputs() == 2 * PART, "what the new model counted")
    models = {report.model_digest: report.boot for report in hub.reports()}
    assert set(models) == {digest(path) for path in digit_models}
    assert len(set(models.values())) == 2


def test_a_model_that_fails_its_self_test_is_left_and_after_two_trials_not_offered_again(
    hub: TinyHub, gateway: Device, board: Board, site: Site, digit_models: tuple[Path, Path]
) -> None:
    gateway.start()
    board.start({"EDGEGUARD_SELF_TEST": "fail"})
    release(hub, site, digit_models)
    wait_until(lambda: "failed its trials there" in (outcome(hub) or ("", ""))[1], "the last refusal", timeout_s=90)
    assert outcome(hub)[0] == "refused"  # type: ignore[index]
    assert runs(hub) == digest(digit_models[0])
    assert len(resumed_at(gateway)) == 2


@pytest.mark.parametrize("write", [2, 150, 420])
def test_a_power_cut_leaves_the_old_model_running_and_the_transfer_goes_on(
    hub: TinyHub, gateway: Device, board: Board, site: Site, digit_models: tuple[Path, Path], write: int
) -> None:
    gateway.start()
    board.start({"EDGEGUARD_POWER": str(write)})
    wait_until(lambda: runs(hub), "the microcontroller")
    release(hub, site, digit_models)
    wait_until(lambda: board.ended() == 9, "the power cut")
    births = len(hub.all(Birth))
    board.start()
    wait_until(lambda: len(hub.all(Birth)) > births, "the next start")
    assert hub.all(Birth)[births].model_digest == digest(digit_models[0])
    wait_until(lambda: outcome(hub) == ("updated", ""), "the update")
    assert runs(hub) == digest(digit_models[1])
    assert write == 2 or resumed_at(gateway)[-1] > 0


def test_a_gateway_that_is_killed_goes_on_where_the_microcontroller_is(
    hub: TinyHub, gateway: Device, board: Board, site: Site, digit_models: tuple[Path, Path]
) -> None:
    gateway.start()
    board.start()
    release(hub, site, digit_models)
    wait_until(lambda: resumed_at(gateway), "the transfer")
    gateway.kill()
    gateway.start()
    wait_until(lambda: outcome(hub) == ("updated", ""), "the update")
    assert runs(hub) == digest(digit_models[1])
