"""``edgeguard hub init``, ``enroll``, ``revoke``: what they say, what they never say, and how they fail."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest

from edgeguard.hub import config
from edgeguard.hub.access import Tokens
from edgeguard.hub.store import Store
from tests.cli.conftest import Run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "fleet"


def init(edgeguard: Run, folder: Path, *more: str) -> str:
    """Set a fleet up; what was printed."""
    code, out, err = edgeguard("hub", "init", folder, "--fleet", "gate", "--host", "broker.example", *more)
    assert (code, err) == (0, "")
    return out


def secrets(folder: Path) -> list[str]:
    """The lines of all keys and passwords in a set-up."""
    files = [path for path in folder.rglob("*") if path.name in ("key.pem", "server.key", "password")]
    return [line for path in files for line in path.read_text().splitlines() if "-----" not in line]


def test_init_says_what_it_made_and_what_to_do(edgeguard: Run, folder: Path) -> None:
    out = init(edgeguard, folder, "--host", "10.0.0.1", "--port", "1883", "--hub-port", "1884", "--days", "30")
    assert "broker.example, 10.0.0.1; port 1883 for devices, 1884 for the hub" in out
    assert f"mosquitto -c {folder}/mosquitto.conf" in out
    assert f"edgeguard hub enroll NAME --folder {folder}" in out
    assert "hub's certificate" in out
    assert "29 days" in out
    assert "listener 1883\n" in (folder / "mosquitto.conf").read_text()


def test_init_again_changes_nothing_and_says_what_is_there(edgeguard: Run, folder: Path) -> None:
    init(edgeguard, folder)
    edgeguard("hub", "enroll", "camera-1", "--folder", folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for again in ((), ("--fleet", "gate"), ("--host", "broker.example")):
        code, out, err = edgeguard("hub", "init", folder, *again)
        assert (code, err) == (0, "")
        assert "set up already; nothing was changed" in out
        assert "1; 0 revoked" in out
        assert "the next ends on" in out
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    "asked", [("--fleet", "other"), ("--host", "other.example"), ("--passwords",), ("--port", "1883"), ("--user", "x")]
)
def test_init_again_with_something_else_is_refused(edgeguard: Run, folder: Path, asked: tuple[str, ...]) -> None:
    init(edgeguard, folder)
    code, out, err = edgeguard("hub", "init", folder, *asked)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert f"set-up {folder}" in err
    assert "choose another folder" in err


def test_init_renews_what_expires(edgeguard: Run, folder: Path) -> None:
    init(edgeguard, folder, "--days", "30")
    before = {path: path.read_bytes() for path in folder.rglob("*.pem")}
    code, out, _ = edgeguard("hub", "init", folder, "--renew")
    assert code == 0
    assert "restart both" in out
    changed = {str(path.relative_to(folder)) for path, content in before.items() if path.read_bytes() != content}
    assert changed == {"broker/server.pem", "broker/hub.pem", "hub/certificate.pem", "hub/key.pem"}


@pytest.mark.parametrize("passwords", [(), ("--passwords",)])
def test_no_key_and_no_password_is_printed(edgeguard: Run, folder: Path, passwords: tuple[str, ...]) -> None:
    said = init(edgeguard, folder, *passwords)
    for command in (("enroll", "camera-1"), ("enroll", "camera-1"), ("enroll", "camera-1", "--renew")):
        said += "".join(edgeguard("hub", *command, "--folder", folder)[1:])
    hidden = secrets(folder)
    assert len(hidden) > 3
    assert not [line for line in hidden if line in said]


def test_init_makes_a_first_token_that_works_and_prints_none(edgeguard: Run, folder: Path) -> None:
    out = init(edgeguard, folder, "--token", "ops")
    path = folder / "ops.token"
    assert str(path) in out
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    secret = path.read_text().strip()
    assert secret not in out
    code, listed, _ = edgeguard("hub", "token", "list", "--json", "--config", folder / "hub.toml")
    assert code == 0
    assert [(one["name"], one["role"]) for one in json.loads(listed)] == [("ops", "admin")]
    loaded = config.load(folder / "hub.toml")
    store = Store(config.store_url(loaded), fleet="gate")
    assert Tokens(store, clock_ms=lambda: 0).find(secret) is not None
    store.close()


def test_init_makes_an_account_for_home_assistant_and_switches_its_sensors_on(edgeguard: Run, folder: Path) -> None:
    out = init(edgeguard, folder, "--home-assistant")
    assert f"{folder}/devices/home-assistant" in out
    assert sorted(path.name for path in (folder / "devices" / "home-assistant").iterdir()) == [
        "ca.pem", "certificate.pem", "key.pem",
    ]  # fmt: skip
    assert [target.kind for target in config.load(folder / "hub.toml").notify] == ["homeassistant"]
    code, _, err = edgeguard("hub", "enroll", "home-assistant", "--renew", "--folder", folder)
    assert (code, "a Home Assistant of this name" in err) == (2, True)


def test_enroll_makes_an_account_for_a_party_of_private_rounds(edgeguard: Run, folder: Path) -> None:
    init(edgeguard, folder)
    code, out, _ = edgeguard("hub", "enroll", "north", "--party", "--folder", folder)
    assert (code, "north: enrolled" in out) == (0, True)
    assert "topic read edgeguard/v1/gate/+/private" in (folder / "broker" / "acl").read_text().splitlines()
    code, _, err = edgeguard("hub", "enroll", "north", "--renew", "--folder", folder)
    assert (code, "a party of private rounds of this name" in err) == (2, True)
    edgeguard("hub", "revoke", "north", "--folder", folder)
    assert "+/private" not in (folder / "broker" / "acl").read_text()


def test_doctor_names_what_ends_soon_and_what_to_do(edgeguard: Run, folder: Path) -> None:
    init(edgeguard, folder, "--days", "90")
    edgeguard("hub", "enroll", "camera-1", "--days", "10", "--folder", folder)
    code, out, err = edgeguard("hub", "doctor", "--folder", folder)
    assert (code, err) == (1, "")
    assert out.startswith("camera-1: valid until")
    assert "edgeguard hub enroll camera-1 --renew" in out
    assert edgeguard("hub", "doctor", "--within", "5", "--folder", folder)[0] == 0
    _, out, _ = edgeguard("hub", "doctor", "--within", "100", "--json", "--folder", folder)
    assert [one["who"] for one in json.loads(out)] == ["camera-1", "the broker", "the hub"]
    edgeguard("hub", "revoke", "camera-1", "--folder", folder)
    assert edgeguard("hub", "doctor", "--folder", folder)[:2] == (0, "no certificate ends within 30 days\n")


@pytest.mark.parametrize(("passwords", "reload"), [((), False), (("--passwords",), True)])
def test_enroll_says_what_to_copy_and_whether_to_reload(
    edgeguard: Run, folder: Path, passwords: tuple[str, ...], reload: bool
) -> None:
    init(edgeguard, folder, *passwords)
    code, out, _ = edgeguard("hub", "enroll", "camera-1", "--folder", folder)
    assert code == 0
    assert f"copy to the board, then delete here: {folder}/devices/camera-1" in out
    assert ("systemctl reload mosquitto" in out) == reload
    assert ("valid until" in out) != bool(passwords)
    assert "is enrolled already" in edgeguard("hub", "enroll", "camera-1", "--folder", folder)[1]
    assert "camera-1: renewed" in edgeguard("hub", "enroll", "camera-1", "--renew", "--folder", folder)[1]


def test_a_gateway_is_told_what_it_speaks_for(edgeguard: Run, folder: Path) -> None:
    init(edgeguard, folder)
    edgeguard("hub", "enroll", "gateway", "--gateway-for", "a", "--folder", folder)
    _, out, _ = edgeguard("hub", "enroll", "gateway", "--gateway-for", "b", "--gateway-for", "c", "--folder", folder)
    assert "gateway: now speaks for the microcontrollers a, b, c" in out
    assert "systemctl reload mosquitto" in out
    assert "microcontrollers a" in (folder / "devices" / "gateway" / "agent.toml").read_text()


def test_revoke_says_that_the_broker_must_reload(edgeguard: Run, folder: Path) -> None:
    init(edgeguard, folder)
    edgeguard("hub", "enroll", "camera-1", "--folder", folder)
    first, second = (edgeguard("hub", "revoke", "camera-1", "--folder", folder) for _ in range(2))
    assert first[0] == second[0] == 0
    assert "camera-1: revoked" in first[1]
    assert "it can connect until" in first[1]
    assert "systemctl reload mosquitto" in first[1]
    assert second[1] == "camera-1: was revoked before\n"
    assert not (folder / "devices" / "camera-1").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("init", "{folder}", "--host", "b"), "give --fleet and --host"),
        (("init", "{folder}", "--fleet", "gate"), "give --fleet and --host"),
        (("init", "{folder}", "--fleet", "Gate", "--host", "b"), "fleet id"),
        (("init", "{folder}", "--fleet", "gate", "--host", "b c"), "host 'b c'"),
        (("init", "{folder}/..", "--fleet", "gate", "--host", "b"), "something is there already"),
        (("init", "{folder}", "--renew"), "registry.json"),
        (("enroll", "camera-1", "--folder", "{folder}"), "name the folder that edgeguard hub init made"),
        (("enroll", "Camera", "--folder", "{folder}"), "device id"),
        (("revoke", "camera-1", "--folder", "{folder}"), "name the folder that edgeguard hub init made"),
    ],
)
def test_what_cannot_be_done_is_told_in_one_line(
    edgeguard: Run, folder: Path, arguments: tuple[str, ...], said: str
) -> None:
    (folder.parent / "another").touch()
    code, out, err = edgeguard("hub", *(argument.format(folder=folder) for argument in arguments))
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert said in err
    assert not folder.exists()
