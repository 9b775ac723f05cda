"""A set-up on disk, made once and changed by enrolling and revoking, and what a running broker makes of it."""

from __future__ import annotations

import os
import pwd
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from edgeguard.agent import config as agent_config
from edgeguard.agent.link import Connected, Link
from edgeguard.contract import topics
from edgeguard.contract.messages import Ack
from edgeguard.errors import ConfigError
from edgeguard.hub import config as hub_config
from edgeguard.hub.setup import enrolment, files, registry, tomls
from edgeguard.settings import BrokerConfig
from tests.simulators import fleet as simulated
from tests.simulators.enrolled import FLEET, Fleet, now, topic
from tests.simulators.fleet import wait_until
from tests.simulators.mosquitto import free_port

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def create(folder: Path, **options: Any) -> registry.Registry:
    """A set-up, by certificates unless ``options`` say otherwise."""
    return enrolment.create(
        folder, **{"fleet": FLEET, "hosts": ["broker.example", "10.0.0.1"], "now": now(), **options}
    )


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a folder but the lock."""
    found = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


@pytest.fixture(params=[False, True], ids=["certificates", "passwords"])
def fleet(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Fleet]:
    """A set-up with one device, and its broker."""
    made = Fleet(tmp_path / "fleet", passwords=request.param)
    made.enroll("camera-1")
    made.start()
    yield made
    made.end()


class TestFiles:
    @pytest.mark.parametrize("mask", [0o000, 0o077])
    @pytest.mark.parametrize("passwords", [False, True])
    def test_secrets_are_readable_to_their_owner_alone_whatever_the_umask(
        self, tmp_path: Path, mask: int, passwords: bool
    ) -> None:
        folder = tmp_path / "fleet"
        before = os.umask(mask)
        try:
            create(folder, passwords=passwords)
            enrolment.enroll(folder, "camera-1", now=now())
        finally:
            os.umask(before)
        for path in folder.rglob("*"):
            is_certificate = path.suffix == ".pem" and path.name not in ("key.pem", "revoked.pem")
            is_public = is_certificate or path.name in ("mosquitto.conf", "agent.toml")
            mode = 0o644 if is_public else 0o600
            if path.is_dir():
                mode = 0o755 if path == folder / "devices" / "camera-1" else 0o700
            assert stat.S_IMODE(path.stat().st_mode) == mode, path
            if path.is_file():
                assert (b"PRIVATE KEY" in path.read_bytes()) == (path.name in ("key.pem", "server.key"))

    def test_the_broker_s_account_owns_its_files_and_no_others(self, tmp_path: Path) -> None:
        folder = tmp_path / "fleet"
        create(folder, user="nobody")
        enrolment.enroll(folder, "camera-1", now=now(), mcus=["mcu"])
        enrolment.revoke(folder, "camera-1", now=now())
        enrolment.renew(folder, now=now())
        owner = pwd.getpwnam("nobody").pw_uid if os.geteuid() == 0 else os.geteuid()
        broker = folder / "broker"
        assert {path.stat().st_uid for path in (broker, *broker.rglob("*"))} == {owner}
        others = [path for path in folder.rglob("*") if not path.is_relative_to(broker)]
        assert folder / "mosquitto.conf" in others  # root reads it
        assert {path.stat().st_uid for path in others} == {os.geteuid()}

    @pytest.mark.parametrize("passwords", [False, True])
    def test_both_daemons_take_their_configurations(self, tmp_path: Path, passwords: bool) -> None:
        folder = tmp_path / "fleet"
        create(folder, passwords=passwords, port=1, hub_port=2)
        hub = hub_config.load(folder / "hub.toml")
        assert hub.broker == BrokerConfig(
            host="broker.example",
            port=2,
            ca=folder / "hub/ca.pem",
            certificate=folder / "hub/certificate.pem",
            key=folder / "hub/key.pem",
        )
        board = enrolment.enroll(folder, "camera-1", now=now()).folder
        assert board is not None
        agent = agent_config.load(board / "agent.toml")
        assert (agent.fleet, agent.device) == (FLEET, "camera-1")
        own: dict[str, Any] = (
            {"username": "camera-1", "password_file": board / "password"}
            if passwords
            else {"certificate": board / "certificate.pem", "key": board / "key.pem"}
        )
        assert agent.broker == BrokerConfig(host="broker.example", port=1, ca=board / "ca.pem", **own)

    def test_secret_names_differ_from_set_up_to_set_up(self, tmp_path: Path) -> None:
        for name in ("a", "b"):
            create(tmp_path / name)
        groups = {hub_config.load(tmp_path / name / "hub.toml").ingest.group for name in ("a", "b")}
        assert len(groups) == 2
        assert min(map(len, groups)) > 32

    @given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
    @example('\x7f\n"\\ä\N{GRINNING FACE}')
    def test_any_name_of_a_model_can_be_read_back(self, name: str) -> None:
        text = tomls.agent(fleet=FLEET, device="d", host="h", port=1, passwords=False, model=name, mcus=())
        assert tomllib.loads(text)["model"] == name

    def test_a_model_lies_beside_the_configuration_with_its_sidecar(self, tmp_path: Path) -> None:
        create(tmp_path / "fleet")
        (tmp_path / "signs.guarded.tflite").write_bytes(b"model")
        (tmp_path / "signs.guard.npz").write_bytes(b"sidecar")
        model = tmp_path / "signs.guarded.tflite"
        board = enrolment.enroll(tmp_path / "fleet", "camera-1", now=now(), model=model).folder
        assert board is not None
        assert agent_config.load(board / "agent.toml").model.read_bytes() == b"model"
        assert (board / "signs.guard.npz").read_bytes() == b"sidecar"


class TestSetUp:
    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({"fleet": "Gate"}, "fleet id.*'Gate'"),
            ({"fleet": "a/b"}, "fleet id"),
            ({"hosts": []}, "host; got none"),
            ({"hosts": ["b:8883"]}, "host 'b:8883'"),
            ({"port": 8884}, "two ports"),
            ({"user": "a b"}, "user 'a b'"),
            ({"user": "x\nallow_anonymous true"}, "user"),
        ],
    )
    def test_what_cannot_be_is_told_in_one_line_and_nothing_is_written(
        self, tmp_path: Path, options: dict[str, Any], said: str
    ) -> None:
        with pytest.raises(ConfigError, match=said) as caught:
            create(tmp_path / "fleet", **options)
        assert "\n" not in str(caught.value)
        assert not list(tmp_path.iterdir())

    def test_a_folder_s_name_cannot_add_lines_to_the_configuration(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="folder"):
            create(tmp_path / "x\nallow_anonymous true")

    def test_a_set_up_is_never_overwritten(self, tmp_path: Path) -> None:
        create(tmp_path / "fleet")
        before = contents(tmp_path)
        with pytest.raises(ConfigError, match="something is there already"):
            create(tmp_path / "fleet")
        assert contents(tmp_path) == before

    def test_other_files_are_never_overwritten(self, tmp_path: Path) -> None:
        (tmp_path / "precious").write_bytes(b"x")
        for folder in (tmp_path, tmp_path / "precious"):
            with pytest.raises(ConfigError, match="something is there already"):
                create(folder)
        assert contents(tmp_path) == {"precious": b"x"}

    def test_a_failure_leaves_nothing_behind(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        real = files.write

        def full(path: Path, content: bytes, *, mode: int = 0o644) -> None:
            if path.name == "registry.json":
                raise OSError(28, "No space left on device")
            real(path, content, mode=mode)

        monkeypatch.setattr(files, "write", full)
        with pytest.raises(OSError, match="No space"):
            create(tmp_path / "fleet")
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("content", [None, b"", b"{}", b'{"version": 2}', b"\xff"])
    def test_what_is_no_set_up_is_told(self, tmp_path: Path, content: bytes | None) -> None:
        if content is not None:
            (tmp_path / "registry.json").write_bytes(content)
        with pytest.raises(ConfigError, match=r"registry\.json"):
            enrolment.enroll(tmp_path, "camera-1", now=now())

    def test_two_commands_at_once_do_not_mix(self, tmp_path: Path) -> None:
        create(tmp_path / "fleet")
        with files.lock(tmp_path / "fleet" / ".lock"), pytest.raises(ConfigError, match="another command"):
            enrolment.enroll(tmp_path / "fleet", "camera-1", now=now())


class TestEnrolment:
    @pytest.fixture(params=[False, True], ids=["certificates", "passwords"])
    def folder(self, request: pytest.FixtureRequest, tmp_path: Path) -> Path:
        create(tmp_path / "fleet", passwords=request.param)
        return tmp_path / "fleet"

    @pytest.mark.parametrize(
        ("device", "mcus", "said"),
        [
            ("Camera", [], "device id.*'Camera'"),
            ("_hub", [], "device id.*'_hub'"),
            ("a/b", [], "device id"),
            ("+", [], "device id"),
            ("", [], "device id"),
            ("a" * 64, [], "device id"),
            ("gateway~mcu", [], "enrol the gateway: edgeguard hub enroll gateway --gateway-for mcu"),
            ("gateway", ["#"], "device id.*'gateway~#'"),
            ("gateway", ["other~mcu"], "without the gateway's"),
            ("gateway", ["a\ntopic readwrite #"], "device id"),
        ],
    )
    def test_a_name_that_is_none_is_told_and_changes_nothing(
        self, folder: Path, device: str, mcus: list[str], said: str
    ) -> None:
        before = contents(folder)
        with pytest.raises(ConfigError, match=said):
            enrolment.enroll(folder, device, now=now(), mcus=mcus)
        assert contents(folder) == before

    @pytest.mark.parametrize("name", ["nothing.tflite", "hub/key.pem", "hub"])
    def test_a_model_that_is_none_is_told(self, folder: Path, name: str) -> None:
        with pytest.raises(ConfigError, match="model"):
            enrolment.enroll(folder, "camera-1", now=now(), model=folder / name)
        assert not enrolment.load(folder).devices

    def test_the_same_command_again_changes_nothing(self, folder: Path) -> None:
        enrolment.enroll(folder, "gateway", now=now(), mcus=["a"])
        before = contents(folder)
        again = enrolment.enroll(folder, "gateway", now=now(), mcus=["a"])
        assert (again.did, again.folder, again.reload) == ("nothing", None, False)
        assert contents(folder) == before

    def test_more_microcontrollers_need_no_new_credentials(self, folder: Path) -> None:
        enrolment.enroll(folder, "gateway", now=now(), mcus=["a"])
        before = contents(folder / "devices")
        more = enrolment.enroll(folder, "gateway", now=now(), mcus=["b", "a"])
        assert (more.did, more.folder, more.reload) == ("extended", None, True)
        assert more.registry.devices["gateway"].mcus == ("a", "b")
        assert contents(folder / "devices") == before

    def test_revoking_again_changes_nothing(self, folder: Path) -> None:
        enrolment.enroll(folder, "camera-1", now=now())
        assert enrolment.revoke(folder, "camera-1", now=now()).did == "revoked"
        before = contents(folder)
        again = enrolment.revoke(folder, "camera-1", now=now())
        assert (again.did, again.reload) == ("nothing", False)
        assert contents(folder) == before

    def test_who_was_never_enrolled_cannot_be_revoked(self, folder: Path) -> None:
        with pytest.raises(ConfigError, match="never enrolled"):
            enrolment.revoke(folder, "camera-l", now=now())

    def test_a_revoked_gateway_comes_back_without_its_microcontrollers(self, folder: Path) -> None:
        enrolment.enroll(folder, "gateway", now=now(), mcus=["a"])
        enrolment.revoke(folder, "gateway", now=now())
        assert enrolment.enroll(folder, "gateway", now=now()).registry.devices["gateway"].mcus == ()

    @pytest.mark.parametrize(
        "change",
        [
            lambda folder: enrolment.enroll(folder, "camera-2", now=now()),
            lambda folder: enrolment.revoke(folder, "camera-1", now=now()),
            lambda folder: enrolment.renew(folder, now=now()),
        ],
        ids=["enroll", "revoke", "renew"],
    )
    def test_nothing_changes_where_the_broker_s_files_are_not(
        self, folder: Path, change: Callable[[Path], object]
    ) -> None:
        enrolment.enroll(folder, "camera-1", now=now())
        (folder / "broker").rename(folder.parent / "moved")
        before = contents(folder)
        with pytest.raises(ConfigError, match="no folder broker/"):
            change(folder)
        assert contents(folder) == before

    def test_nothing_changes_where_the_model_cannot_be_read(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = folder.parent / "signs.guarded.tflite"
        model.write_bytes(b"model")
        before = contents(folder)

        def refuse(path: Path) -> bytes:
            if path == model:
                raise PermissionError(13, "Permission denied", str(path))
            return path.open("rb").read()

        with monkeypatch.context() as patch:
            patch.setattr(Path, "read_bytes", refuse)
            with pytest.raises(PermissionError):
                enrolment.enroll(folder, "camera-2", now=now(), model=model)
        assert contents(folder) == before

    def test_what_was_cut_short_after_the_registry_is_completed_by_the_next_command(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        enrolment.enroll(folder, "camera-1", now=now())
        real = files.write

        def cut(path: Path, content: bytes, *, mode: int = 0o644) -> None:
            if path.parent.name == "broker":
                raise OSError(28, "No space left on device")
            real(path, content, mode=mode)

        with monkeypatch.context() as patch:
            patch.setattr(files, "write", cut)
            with pytest.raises(OSError, match="No space"):
                enrolment.revoke(folder, "camera-1", now=now())
        assert "camera-1" not in enrolment.load(folder).active
        assert enrolment.revoke(folder, "camera-1", now=now()).reload
        assert b"user camera-1\ntopic deny #" in (folder / "broker/acl").read_bytes()

    def test_every_certificate_ever_issued_is_revoked_with_the_device(self, tmp_path: Path) -> None:
        create(tmp_path / "fleet")
        for again in (False, True, True):
            enrolment.enroll(tmp_path / "fleet", "camera-1", now=now(), again=again, days=30)
        done = enrolment.revoke(tmp_path / "fleet", "camera-1", now=now())
        issued = done.registry.devices["camera-1"].certificates
        assert len(done.registry.revoked_serials) == len(issued) == 3
        assert all(timedelta(days=29) < one.expires - now() < timedelta(days=31) for one in issued)


class TestRunningBroker:
    def test_a_device_enrolled_while_the_broker_runs_comes_in_after_a_reload(self, fleet: Fleet) -> None:
        done = fleet.enroll("camera-2")
        assert done.reload == fleet.passwords  # a certificate of the authority needs none
        if done.reload:
            assert not fleet.can_connect(fleet.agent("camera-2"))
            fleet.reload(lambda: fleet.can_connect(fleet.agent("camera-2")))
        hub, device = fleet.hub(), fleet.device("camera-2")
        device.publish(topic("camera-2", topics.REPORT), b"new")
        hub.wait_for(b"new")

    def test_a_microcontroller_is_spoken_for_after_a_reload(self, fleet: Fleet) -> None:
        hub, gateway = fleet.hub(), fleet.device("camera-1")
        fleet.enroll("camera-1", mcus=["mcu"])

        def heard() -> bool:
            gateway.publish(topic("camera-1~mcu", topics.REPORT), b"mcu")
            gateway.publish(topic("camera-1", topics.REPORT), b"own")
            hub.wait_for(b"own")
            return b"mcu" in {payload for _, payload in hub.got}

        assert not heard()
        fleet.reload(heard)

    def test_a_revoked_device_is_out_after_a_reload_and_others_are_not(self, fleet: Fleet) -> None:
        fleet.enroll("camera-2")
        fleet.reload(lambda: fleet.can_connect(fleet.agent("camera-2")))
        old = _copy(fleet.agent("camera-1"), fleet.folder.parent / "kept")
        hub, revoked, other = fleet.hub(), fleet.device("camera-1"), fleet.device("camera-2")
        enrolment.revoke(fleet.folder, "camera-1", now=now())
        fleet.reload(lambda: not fleet.can_connect(old))
        # What it publishes on a connection that is still open is acknowledged to it, but reaches nobody.
        revoked.publish(topic("camera-1", topics.REPORT), b"revoked")
        other.publish(topic("camera-2", topics.REPORT), b"last")
        hub.wait_for(b"last")
        assert b"revoked" not in {payload for _, payload in hub.got}
        assert hub.connected
        assert other.connected
        assert fleet.can_connect(fleet.agent("camera-2"))
        if fleet.passwords:
            assert revoked.ended.wait(10)

        fleet.enroll("camera-1")
        fleet.reload(lambda: fleet.can_connect(fleet.agent("camera-1")))
        again = fleet.device("camera-1")
        again.publish(topic("camera-1", topics.REPORT), b"again")
        hub.wait_for(b"again")
        assert not fleet.can_connect(old)

    def test_renewed_credentials_work_and_an_earlier_certificate_does_until_it_is_revoked(self, fleet: Fleet) -> None:
        old = _copy(fleet.agent("camera-1"), fleet.folder.parent / "kept")
        assert fleet.enroll("camera-1", again=True).did == "renewed"
        fleet.reload(lambda: fleet.can_connect(fleet.agent("camera-1")))
        assert fleet.can_connect(old) == (not fleet.passwords)

    def test_new_certificates_of_broker_and_hub_hold_after_a_restart(self, fleet: Fleet) -> None:
        old = _copy(fleet.hub_config.broker, fleet.folder.parent / "kept")
        enrolment.renew(fleet.folder, now=now())
        fleet.broker.stop()
        fleet.start()
        assert fleet.can_connect(fleet.hub_config.broker)
        assert fleet.can_connect(fleet.agent("camera-1"))
        assert not fleet.can_connect(old)

    @pytest.mark.slow
    @pytest.mark.parametrize("fleet", [False], ids=["certificates"], indirect=True)
    def test_a_report_of_an_enrolled_device_is_stored_and_acknowledged_by_the_hub(
        self, fleet: Fleet, tmp_path: Path
    ) -> None:
        port = free_port()
        path = fleet.folder / "hub.toml"
        # Reports come over the workers' shared subscription, acknowledgements from whichever took them.
        text = path.read_text().replace("port = 8080", f"port = {port}").replace("workers = 0", "workers = 2")
        path.write_text(text)
        board = agent_config.load(fleet.folder / "devices" / "camera-1" / "agent.toml")
        sessions = iter(range(1, 100))
        link = Link(
            board.broker,
            fleet=board.fleet,
            device=board.device,
            boot=simulated.BOOT,
            next_session=lambda: next(sessions),
        )
        with (tmp_path / "hub.log").open("wb") as log:
            hub = subprocess.Popen([sys.executable, "-m", "edgeguard.hub", "--config", str(path)], stderr=log)
        try:
            wait_until(lambda: (tmp_path / "hub.log").read_text().count("connected to") >= 3)
            acks: list[Ack] = []

            def acknowledged() -> bool:
                for event in link.poll(0.5):
                    if isinstance(event, Connected):
                        link.publish(topics.REPORT, simulated.report(1))
                    if isinstance(event, Ack):
                        acks.append(event)
                return bool(acks)

            wait_until(acknowledged)
        finally:
            link.close()
            hub.terminate()
            hub.wait(15)
        assert (acks[0].boot, acks[0].through_seq, acks[0].gaps) == (simulated.BOOT, 1, ())


def _copy(broker: BrokerConfig, to: Path) -> BrokerConfig:
    """The same credentials in files of their own, which no command touches."""
    to.mkdir()
    changed: dict[str, Path] = {}
    for name in ("ca", "certificate", "key", "password_file"):
        path = getattr(broker, name)
        if path is not None:
            changed[name] = to / path.name
            changed[name].write_bytes(path.read_bytes())
    return msgspec.structs.replace(broker, **changed)
