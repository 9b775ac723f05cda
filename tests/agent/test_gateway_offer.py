"""What a gateway offers to a microcontroller, and when it takes that back. The line is a list of what was ordered."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edgeguard.agent import config, mcu
from edgeguard.agent.admission import Fetched
from edgeguard.agent.gateway import Gateway, check_firmware
from edgeguard.agent.link import For, Hint
from edgeguard.agent.spool import Spool
from edgeguard.contract.guard import GuardMetadata
from edgeguard.contract.messages import Desired, Reported
from edgeguard.detection import metadata, sidecar
from edgeguard.errors import ConfigError, ModelError
from firmware_bridge.link import messages as wire

PUMP = "gate~pump"
BOOT = "a" * 16


class Site:
    """A gateway whose one port and connection write down what they are told."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.name, self.session = "pump", 1
        self.offers: list[mcu.Offer] = []
        self.withdrawn = 0
        self.reported: list[Reported] = []
        self.happened: list[mcu.Event] = []
        self._model = model
        self.folder = folder / "state" / "mcu" / "pump"
        root = folder / "root.json"
        root.write_text("{}")
        text = {
            "fleet": "demo", "device": "gate", "model": str(model), "state_dir": "state",
            "broker": {"host": "127.0.0.1"},
            "sources": {"serial": [{"name": "pump", "port": "/dev/pump", "model": str(model)}]},
            "update": {
                "metadata_url": "http://127.0.0.1:9/m", "targets_url": "http://127.0.0.1:9/t", "root": str(root),
            },
        }  # fmt: skip
        self.spool = Spool(folder / "spool.sqlite", boot=BOOT, max_bytes=1 << 20)
        agent = config.parse(text, base=folder)
        here: Any = self
        self.gateway = Gateway(agent, [here], boot=BOOT, spool=self.spool, link=here)
        self.pump = self.gateway._behind[PUMP]

    def events(self) -> list[mcu.Event]:
        happened, self.happened = self.happened, []
        return happened

    def offer(self, offer: mcu.Offer) -> None:
        self.offers.append(offer)

    def withdraw(self) -> None:
        self.withdrawn += 1

    def publish(self, channel: str, message: Any, **_: Any) -> None:
        if isinstance(message, Reported):
            self.reported.append(message)

    def came(self, **more: Any) -> wire.Hello:
        """The microcontroller is there, with the gateway's first model."""
        content = self._model.read_bytes()
        fields = {
            "schema": wire.SCHEMA, "boot": 1, "name": "pump", "board": "test", "library": "1.0", "detectors": "linf",
            "model_digest": bytes(32), "guard_digest": bytes(32), "file_digest": hashlib.sha256(content).digest(),
            "sequence": 0, "slot_bytes": 1 << 20, "standing": wire.Standing.CONFIRMED,
        }  # fmt: skip
        hello = wire.Hello(**{**fields, **more})
        self.happened.append(mcu.Came(hello))
        self.gateway.step(0.0)
        return hello

    def hint(self, sequence: int | None) -> None:
        desired = None if sequence is None else Desired(target="m.tflite", sequence=sequence)
        self.gateway.heard(For(PUMP, Hint(desired, fresh=True)))
        self.gateway.step(0.0)

    def close(self) -> None:
        self.gateway.close()
        self.spool.close()


@pytest.fixture
def site(tmp_path: Path, digit_models: tuple[Path, Path]) -> Iterator[Site]:
    one = Site(tmp_path, digit_models[0])
    yield one
    one.close()


@pytest.fixture
def fetched(tmp_path: Path, models_with_sidecars: tuple[Path, Path]) -> Callable[..., Fetched]:
    """A file that was fetched and admitted."""

    def make(content: bytes | None = None, *, beside: bool = False, sequence: int = 2) -> Fetched:
        found = models_with_sidecars[1].read_bytes() if content is None else content
        path = tmp_path / "fetched.tflite"
        path.write_bytes(found)
        brought = tmp_path / "fetched.npz"
        brought.write_bytes(sidecar.path_beside(models_with_sidecars[1]).read_bytes())
        return Fetched(
            sequence=sequence,
            path=path,
            file_digest=hashlib.sha256(found).hexdigest(),
            model_digest="a" * 64,
            guard_digest="b" * 64,
            sidecar=brought if beside else None,
        )

    return make


def renamed(described: GuardMetadata) -> GuardMetadata:
    first, *rest = described.detectors
    return msgspec.structs.replace(described, detectors=(msgspec.structs.replace(first, name="other"), *rest))


def synthetic(described: GuardMetadata) -> GuardMetadata:
    calibration = msgspec.structs.replace(described.calibration, synthetic=True)
    return msgspec.structs.replace(described, calibration=calibration)


def wider(described: GuardMetadata) -> GuardMetadata:
    *rest, last = described.taps
    return msgspec.structs.replace(described, taps=(*rest, msgspec.structs.replace(last, channels=last.channels + 1)))


@pytest.mark.parametrize(
    ("change", "what"), [(renamed, "detectors"), (synthetic, "made-up calibration"), (wider, "features")]
)
def test_a_release_that_the_firmware_would_misread_is_refused(
    digit_models: tuple[Path, Path], change: Callable[[GuardMetadata], GuardMetadata], what: str
) -> None:
    old, new = (metadata.read(path.read_bytes()) for path in digit_models)
    check_firmware(new, old)
    with pytest.raises(ModelError, match=what):
        check_firmware(change(new), old)


def test_such_a_release_is_told_and_not_offered(site: Site, fetched: Callable[..., Fetched]) -> None:
    hello = site.came()
    content = fetched().path.read_bytes()
    changed = content.replace(b'"synthetic":false', b'"synthetic":true ')
    assert changed != content
    site.pump._offer(fetched(changed), hello, 0.0)
    assert site.offers == []
    assert site.reported[-1].state == "refused"
    assert "made-up calibration" in site.reported[-1].reason
    site.pump._offer(fetched(content), hello, 0.0)
    assert len(site.offers) == 1


def test_a_release_without_a_sidecar_does_not_inherit_that_of_an_earlier_offer(
    site: Site, fetched: Callable[..., Fetched]
) -> None:
    hello = site.came()
    site.pump._offer(fetched(beside=True), hello, 0.0)
    beside = site.folder / "offered.guard.npz"
    assert beside.is_file()
    site.pump._offer(fetched(), hello, 0.0)
    assert not beside.exists()


@pytest.mark.parametrize(("sequence", "stays"), [(2, True), (3, False), (None, False)])
def test_an_offer_is_withdrawn_where_the_hub_wants_another_release_or_none(
    site: Site, fetched: Callable[..., Fetched], sequence: int | None, stays: bool
) -> None:
    hello = site.came()
    site.pump._offer(fetched(), hello, 0.0)
    site.hint(sequence)
    assert site.withdrawn == (0 if stays else 1)
    assert (site.pump._offered is not None) == stays


def test_a_model_that_is_staged_is_not_withdrawn(site: Site, fetched: Callable[..., Fetched]) -> None:
    hello = site.came()
    offered = fetched()
    site.pump._offer(offered, hello, 0.0)
    site.happened.append(mcu.Ended("staged", offered.file_digest))
    site.hint(None)
    site.hint(3)
    assert site.withdrawn == 0


def test_the_last_hint_holds_for_another_board_on_the_same_port(site: Site) -> None:
    site.came()
    site.hint(2)
    site.came(board="another", boot=2)
    updater = site.pump._updater
    assert updater is not None
    assert updater._desired == Desired(target="m.tflite", sequence=2)


def test_a_copy_that_cannot_be_kept_is_tried_again_and_ends_nothing(
    site: Site, fetched: Callable[..., Fetched]
) -> None:
    hello = site.came()
    offered = fetched()
    site.pump._offer(offered, hello, 0.0)
    (site.folder / "running.tflite").mkdir()
    trial = {"file_digest": bytes.fromhex(offered.file_digest), "sequence": 2, "boot": 2}
    with pytest.raises(ConfigError, match="one to write in"):
        site.came(**trial)
    (site.folder / "running.tflite").rmdir()
    site.gateway.step(1.0)
    assert site.reported[-1].state == "updated"
    assert (site.folder / "running.tflite").is_file()
