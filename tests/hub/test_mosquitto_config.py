"""Who may do what at a mosquitto that runs with exactly the written files: by certificates, and by passwords."""

from __future__ import annotations

import base64
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import msgspec
import pytest

from edgeguard.contract import topics
from edgeguard.contract.messages import MAX_PAYLOAD
from edgeguard.hub.setup import mosquitto, pki
from edgeguard.settings import BrokerConfig
from tests.simulators import needs
from tests.simulators.enrolled import FLEET, Fleet, now, topic
from tests.simulators.fleet import wait_until

OWN = (*topics.DEVICE_CHANNELS, "reply/ping")
TOLD = (topics.ACK, "cmd/ping", topics.MODEL_DESIRED)
DEVICES = ("camera-1", "camera-2", "gateway", "gateway~mcu-1", "gateway~mcu-2", "gateway~mcu-9", "camera-1~mcu-1")


@pytest.fixture(scope="module", params=[False, True], ids=["certificates", "passwords"])
def started(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    fleet = Fleet(tmp_path_factory.mktemp("fleet") / "set up", passwords=request.param)
    fleet.enroll("camera-1")
    fleet.enroll("camera-2")
    fleet.enroll("gateway", mcus=["mcu-1", "mcu-2"])
    fleet.start()
    yield fleet
    fleet.end()


@pytest.fixture
def fleet(started: Fleet) -> Iterator[Fleet]:
    yield started
    started.close_peers()


class TestAccess:
    """Shown by delivery to whoever may read a topic: MQTT 3.1.1 does not tell a client that it may not publish."""

    def written(self, fleet: Fleet, who: str) -> set[str]:
        """The topics, of all that somebody could want to write to, from which a message of ``who`` arrives."""
        hub = fleet.hub()
        readers = {one: fleet.device(one, subscribe=("#",)) for one in ("camera-1", "camera-2", "gateway")}
        writer = hub if who == "hub" else readers[who]
        wanted = [topic(device, channel) for device in DEVICES for channel in (*OWN, *TOLD)]
        wanted += [topic("camera-1", "report/more"), topic("camera-1", "model"), topic("", "report")]
        wanted += ["edgeguard/v1/other/camera-1/report", "report", "homeassistant/sensor/x/config"]
        for one in wanted:
            writer.publish(one, b"?")
        # A broker delivers what one client publishes in its order: when the last has come, nothing else is on its way.
        if writer is not hub:
            writer.publish(topic(who, topics.REPORT), b"last")
            hub.wait_for(b"last")
        for name, reader in readers.items():
            hub.publish(topic(name, topics.ACK), b"last")
            reader.wait_for(b"last")
        return {name for peer in (hub, *readers.values()) for name, payload in peer.got if payload == b"?"}

    def test_a_device_writes_its_own_channels_and_nothing_else(self, fleet: Fleet) -> None:
        assert self.written(fleet, "camera-1") == {topic("camera-1", channel) for channel in OWN}

    def test_a_gateway_writes_its_own_and_those_of_its_own_microcontrollers(self, fleet: Fleet) -> None:
        ids = ("gateway", "gateway~mcu-1", "gateway~mcu-2")
        assert self.written(fleet, "gateway") == {topic(device, channel) for device in ids for channel in OWN}

    def test_the_hub_writes_what_devices_read_and_they_read_their_own_alone(self, fleet: Fleet) -> None:
        told = {topic(device, channel) for device in DEVICES[:5] for channel in TOLD}
        assert self.written(fleet, "hub") == told

    @pytest.mark.parametrize(
        ("who", "ids"), [("camera-1", {"camera-1"}), ("gateway", {"gateway", "gateway~mcu-1", "gateway~mcu-2"})]
    )
    def test_nobody_reads_what_is_another_s(self, fleet: Fleet, who: str, ids: set[str]) -> None:
        hub, other = fleet.hub(), fleet.device("camera-2")
        reader = fleet.device(who, subscribe=("#", f"{topics.PREFIX}/{FLEET}/+/+", "$SYS/#"))
        for channel in OWN:
            other.publish(topic("camera-2", channel))
        for device in DEVICES:
            for channel in TOLD:
                hub.publish(topic(device, channel))
        hub.publish(topic("_hub", "notice"))
        hub.publish(topic(who, topics.ACK), b"last")
        reader.wait_for(b"last")
        assert {name for name, _ in reader.got} == {topic(device, channel) for device in ids for channel in TOLD}

    @pytest.mark.parametrize(("of", "arrives"), [("camera-1", True), ("camera-2", False)])
    def test_a_will_is_written_by_the_same_rules(self, fleet: Fleet, of: str, arrives: bool) -> None:
        hub, other = fleet.hub(), fleet.device("camera-2")
        device = fleet.device("camera-1", will=(topic(of, topics.STATUS), b"will"))
        if device.connected:  # mosquitto may refuse such a client at once
            device.break_off()
            assert device.ended.wait(10)
        if arrives:
            hub.wait_for(b"will")
        else:
            # By the time that the broker takes the same client again, it has done with the earlier connection.
            assert fleet.device("camera-1").connected
            other.publish(topic("camera-2", topics.REPORT), b"last")
            hub.wait_for(b"last")
            assert b"will" not in {payload for _, payload in hub.got}


class TestHomeAssistant:
    @pytest.fixture(params=[False, True], ids=["certificates", "passwords"])
    def watched(self, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Fleet]:
        fleet = Fleet(tmp_path / "set up", passwords=request.param)
        fleet.enroll("camera-1")
        fleet.enroll("home", watcher=True)
        fleet.start()
        yield fleet
        fleet.end()

    def test_it_reads_what_the_hub_shows_it_and_has_no_rights_of_a_device(self, watched: Fleet) -> None:
        folder = watched.folder / "devices" / "home"
        assert not (folder / "agent.toml").exists()
        known = (
            {"username": "home", "password_file": folder / "password"}
            if watched.passwords
            else {"certificate": folder / "certificate.pem", "key": folder / "key.pem"}
        )
        broker = BrokerConfig(host="127.0.0.1", port=watched.port, ca=folder / "ca.pem", **known)
        hub, camera = watched.hub(), watched.device("camera-1")
        home = watched.peer(broker, subscribe=("#",))
        shown = ("homeassistant/binary_sensor/x/config", topic("_hub", "sensor/hub"))
        for name in (*shown, topic("_hub", "notice"), topic("camera-1", topics.ACK)):
            hub.publish(name, b"said")
        camera.publish(topic("camera-1", topics.REPORT), b"said")
        for name in (topic("home", topics.REPORT), topic("camera-1", topics.REPORT), topic("_hub", "sensor/hub")):
            home.publish(name, b"forged")
        hub.publish(topic("_hub", "sensor/last"), b"last")
        home.wait_for(b"last")
        camera.publish(topic("camera-1", topics.REPORT), b"last")
        hub.wait_for(b"last")
        assert {name for name, payload in home.got if payload != b"last"} == set(shown)
        assert b"forged" not in {payload for _, payload in hub.got}


class TestPrivateRounds:
    @pytest.fixture(params=[False, True], ids=["certificates", "passwords"])
    def private(self, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Fleet]:
        fleet = Fleet(tmp_path / "set up", passwords=request.param)
        fleet.enroll("camera-1")
        fleet.enroll("camera-2")
        fleet.enroll("home", watcher=True)
        fleet.enroll("north", party=True)
        fleet.start()
        yield fleet
        fleet.end()

    def test_a_device_submits_under_its_own_name_and_parties_alone_hear_it(self, private: Fleet) -> None:
        hub, camera, north = private.hub(), private.device("camera-1"), private.device("north", subscribe=("#",))
        others = [hub, private.device("camera-2", subscribe=("#",))]
        home = private.folder / "devices" / "home"
        known = (
            {"username": "home", "password_file": home / "password"}
            if private.passwords
            else {"certificate": home / "certificate.pem", "key": home / "key.pem"}
        )
        broker = BrokerConfig(host="127.0.0.1", port=private.port, ca=home / "ca.pem", **known)
        others.append(private.peer(broker, subscribe=("#", f"{topics.PREFIX}/{FLEET}/+/private")))
        camera.publish(topic("camera-2", topics.PRIVATE), b"forged")
        camera.publish(topic("camera-1", topics.REPORT), b"not for parties")
        north.publish(topic("north", topics.REPORT), b"forged")
        north.publish(topic("north", topics.PRIVATE), b"forged")
        camera.publish(topic("camera-1", topics.PRIVATE), b"sealed")
        north.wait_for(b"sealed")
        assert north.got == [(topic("camera-1", topics.PRIVATE), b"sealed")]
        camera.publish(topic("camera-1", topics.REPORT), b"last")
        hub.wait_for(b"last")
        hub.publish(topic("camera-2", topics.ACK), b"last")
        hub.publish(topic("_hub", "sensor/last"), b"last")
        for one in others[1:]:
            one.wait_for(b"last")
        assert not {b"sealed", b"forged"} & {payload for one in others for _, payload in one.got}


class TestIdentity:
    @pytest.mark.parametrize("protocol", ["3.1.1", "5"])
    @pytest.mark.parametrize("claimed", ["camera-1", f"edgeguard-{FLEET}-camera-1", "the hub's"])
    def test_no_device_takes_over_a_session_by_its_client_id(
        self, fleet: Fleet, claimed: str, protocol: Literal["3.1.1", "5"]
    ) -> None:
        victim, hub = fleet.device("camera-1", client_id=f"edgeguard-{FLEET}-camera-1"), fleet.hub()
        name = f"{fleet.hub_config.client_id}-1" if claimed == "the hub's" else claimed
        thief = fleet.peer(msgspec.structs.replace(fleet.agent("camera-2"), protocol=protocol), client_id=name)
        assert thief.connected
        thief.publish(topic("camera-2", topics.REPORT), b"thief")
        victim.publish(topic("camera-1", topics.REPORT), b"victim")
        hub.wait_for(b"thief")
        hub.wait_for(b"victim")
        assert victim.connected
        assert hub.connected

    def test_a_username_does_not_change_who_one_is(self, fleet: Fleet) -> None:
        own = fleet.agent("camera-2")
        posing = fleet.peer(msgspec.structs.replace(own, username="camera-1"))
        if fleet.passwords:
            assert not posing.connected
            return
        hub = fleet.hub()
        posing.publish(topic("camera-1", topics.REPORT), b"posing")
        posing.publish(topic("camera-2", topics.REPORT), b"last")
        hub.wait_for(b"last")
        assert b"posing" not in {payload for _, payload in hub.got}

    def test_nobody_comes_in_without_credentials(self, fleet: Fleet) -> None:
        for port in (fleet.port, fleet.hub_port):
            anonymous = BrokerConfig(host="127.0.0.1", port=port, ca=fleet.folder / "hub" / "ca.pem")
            assert not fleet.can_connect(anonymous)
            assert not fleet.can_connect(msgspec.structs.replace(anonymous, ca=None))
            assert not fleet.can_connect(msgspec.structs.replace(anonymous, username="camera-1"))

    def test_no_device_comes_in_where_the_hub_does(self, fleet: Fleet) -> None:
        assert fleet.can_connect(fleet.agent("camera-1"))
        assert not fleet.can_connect(msgspec.structs.replace(fleet.agent("camera-1"), port=fleet.hub_port))

    def test_a_certificate_of_another_authority_is_refused(self, fleet: Fleet, tmp_path: Path) -> None:
        stranger = pki.authority(FLEET, now=now())
        for made, port in (
            (pki.device(stranger, "camera-1", now=now()), fleet.port),
            (pki.hub(mosquitto.HUB, now=now()), fleet.hub_port),
        ):
            (tmp_path / "c.pem").write_bytes(made.certificate)
            (tmp_path / "k.pem").write_bytes(made.key)
            posing = BrokerConfig(
                host="127.0.0.1",
                port=port,
                ca=fleet.folder / "hub" / "ca.pem",
                certificate=tmp_path / "c.pem",
                key=tmp_path / "k.pem",
            )
            assert not fleet.can_connect(posing)

    def test_the_broker_s_own_certificate_is_no_device_s(self, fleet: Fleet) -> None:
        broker = fleet.folder / "broker"
        posing = BrokerConfig(
            host="127.0.0.1",
            port=fleet.port,
            ca=broker / "ca.pem",
            certificate=broker / "server.pem",
            key=broker / "server.key",
        )
        assert not fleet.can_connect(posing)


class TestWorkers:
    def shared(self, fleet: Fleet, name: str) -> str:
        return f"$share/{name}/{topics.subscription(FLEET, topics.REPORT)}"

    @pytest.mark.parametrize("with_intruder", [False, True])
    def test_the_hub_s_workers_share_what_comes_and_nobody_who_guesses_takes_of_it(
        self, fleet: Fleet, with_intruder: bool
    ) -> None:
        name = fleet.hub_config.ingest.group
        workers = [fleet.hub(number, subscribe=(self.shared(fleet, name),)) for number in (1, 2)]
        if with_intruder:
            guesses = ("hub", "edgeguard-hub", "Hub", "Hub-1", FLEET)
            assert fleet.device("camera-2", subscribe=tuple(self.shared(fleet, guess) for guess in guesses)).connected
        device = fleet.device("camera-1")
        sent = [b"%02d" % number for number in range(40)]
        for payload in sent:
            device.publish(topic("camera-1", topics.REPORT), payload)
        wait_until(lambda: sum(len(worker.got) for worker in workers) >= len(sent), timeout_s=10)
        assert all(worker.connected and worker.got for worker in workers)
        assert sorted(payload for worker in workers for _, payload in worker.got) == sent


class TestText:
    def broker(self, *, passwords: bool = False) -> mosquitto.Broker:
        return mosquitto.Broker(folder=Path("/srv/b"), port=8883, hub_port=8884, user="mosquitto", passwords=passwords)

    @pytest.mark.parametrize("passwords", [False, True])
    @pytest.mark.parametrize(
        "line",
        [
            "allow_anonymous false",
            "acl_file /srv/b/acl",
            "persistence true",
            "persistence_location /srv/b/data/",
            "max_inflight_messages 4096",
            "max_queued_messages 100000",
            "max_queued_bytes 268435456",
            "max_packet_size 655360",
            "listener 8883",
            "listener 8884",
            "use_username_as_clientid true",
        ],
    )
    def test_what_holds_in_both_ways_is_said_once(self, passwords: bool, line: str) -> None:
        text = mosquitto.configuration(self.broker(passwords=passwords))
        assert text.splitlines().count(line) == 1

    @pytest.mark.parametrize(("passwords", "times"), [(False, 2), (True, 1)])
    def test_certificates_are_required_wherever_they_tell_who_one_is(self, passwords: bool, times: int) -> None:
        lines = mosquitto.configuration(self.broker(passwords=passwords)).splitlines()
        assert lines.count("require_certificate true") == lines.count("use_identity_as_username true") == times
        assert lines.count("password_file /srv/b/passwords") == (1 if passwords else 0)

    def test_the_largest_message_fits_into_the_largest_packet(self) -> None:
        assert MAX_PAYLOAD + 65535 + 16 <= mosquitto.MAX_PACKET

    def test_mosquitto_s_own_program_makes_the_same_hash(self, tmp_path: Path) -> None:
        path = tmp_path / "passwords"
        path.write_text("device:s3cret\n")
        subprocess.run([needs.program("mosquitto_passwd", "mosquitto"), "-U", str(path)], check=True)
        user, _, stored = path.read_text().strip().partition(":")
        _, kind, iterations, salt, _ = stored.split("$")
        assert (user, kind, int(iterations)) == ("device", "7", mosquitto.ITERATIONS)
        assert len(base64.b64decode(salt)) == mosquitto.SALT_BYTES
        assert mosquitto.password_hash("s3cret", base64.b64decode(salt)) == stored
