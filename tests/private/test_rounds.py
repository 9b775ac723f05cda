"""Three real processes, real sockets, TLS between them: a round over a folder, and one over mosquitto."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeguard.contract.private import Round
from edgeguard.errors import ConfigError
from edgeguard.private import child, parties, rounds, sharing, transport
from edgeguard.private.parties import Own
from edgeguard.settings import BrokerConfig
from tests.simulators import needs
from tests.simulators import private as making
from tests.simulators.mosquitto import Mosquitto

needs.python_module("spu", "spu", until=(3, 11))

CHANNELS, DEVICES = 8, 5
TIMEOUT_S = 120


@pytest.fixture
def owns(tmp_path: Path) -> tuple[Own, ...]:
    return making.parties(tmp_path / "parties")


def ascending(device: int) -> list[int]:
    """The first two channels are the least active ones, in one order or the other."""
    return [0, 1, *range(2, CHANNELS)] if device % 2 else [1, 0, *range(2, CHANNELS)]


def submit_all(asked: Round, owns: Sequence[Own], folder: Path) -> None:
    folder.mkdir()
    for number in range(DEVICES):
        values = sharing.values_of(asked, ascending(number))
        rounds.write_submission(making.submission(asked, owns, f"cam-{number}", values), folder / f"cam-{number}.json")


def test_a_package_that_is_missing_is_named_and_nobody_else_is_blamed() -> None:
    def work(*_: Any) -> None:
        raise ModuleNotFoundError("No module named 'spu'", name="spu")

    with pytest.raises(ConfigError, match=r"package spu.*edgeguard\[private\]"):
        child.run_apart(work, lambda *_: None)


def command(own: Own, asked: Path, *more: str) -> list[str]:
    return [
        sys.executable,
        "-c",
        "from edgeguard.cli import main; main()",
        "private",
        "party",
        str(own.folder),
        "--round",
        str(asked),
        *more,
    ]


def start(own: Own, asked: Path, *more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(own, asked, *more), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def ended(processes: Sequence[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    found = []
    for process in processes:
        out, err = process.communicate(timeout=TIMEOUT_S)
        found.append((process.returncode, out, err))
    return found


def test_three_parties_open_the_prune_list_and_nothing_else(owns: tuple[Own, ...], tmp_path: Path) -> None:
    asked = making.a_round(owns, channels=CHANNELS, prune=2)
    rounds.write(asked, tmp_path / "round.json")
    submit_all(asked, owns, tmp_path / "sent")
    (tmp_path / "sent" / "liar.json").write_bytes(b'{"v": 1}')
    sent = ("--submissions", str(tmp_path / "sent"), "--timeout", "60", "--json")
    results = ended([start(own, tmp_path / "round.json", *sent) for own in owns])
    for code, out, err in results:
        assert code == 0, err
        shown = json.loads(out.splitlines()[-1])
        assert shown.pop("refused").keys() == {"liar"}
        assert shown == {"round": asked.id, "layer": asked.layer, "channels": [0, 1], "devices": DEVICES}


def test_devices_publish_and_parties_hear_them_over_mosquitto(owns: tuple[Own, ...], mosquitto: Mosquitto) -> None:
    asked = making.a_round(owns, channels=CHANNELS)
    broker = BrokerConfig(host=mosquitto.host, port=mosquitto.port)
    for number in range(DEVICES):
        values = sharing.values_of(asked, ascending(number))
        transport.publish(broker, "gate", making.submission(asked, owns, f"cam-{number}", values))
    # Whoever comes later hears them as well.
    for own in owns:
        ballots = rounds.Ballots(asked, own)
        transport.listen(broker, "gate", ballots.add, lambda b=ballots: len(b) == DEVICES, 30)  # type: ignore[misc]
        assert set(ballots.digests()) == {f"cam-{n}" for n in range(DEVICES)}


def test_a_party_that_stops_ends_the_run_with_one_line_and_no_result(owns: tuple[Own, ...], tmp_path: Path) -> None:
    """The third party connects, and is gone before it says which round it has."""
    asked = making.a_round(owns, channels=CHANNELS)
    rounds.write(asked, tmp_path / "round.json")
    submit_all(asked, owns, tmp_path / "sent")
    sent = ("--submissions", str(tmp_path / "sent"), "--timeout", "8", "--json")
    running = [start(own, tmp_path / "round.json", *sent) for own in owns[:2]]
    leaves = (
        "import os, sys; from pathlib import Path\n"
        "from edgeguard.private import computation, parties\n"
        "own = parties.own(Path(sys.argv[1]))\n"
        "with computation.connect(own, computation.Addresses.of(own), sys.argv[2]):\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    third = subprocess.run(
        [sys.executable, "-c", leaves, str(owns[2].folder), asked.digest], check=False, timeout=TIMEOUT_S
    )
    assert third.returncode == -9
    for code, out, err in ended(running):
        assert (code, out) == (2, "")
        assert "start all three parties again" in err.splitlines()[-1]


def test_parties_with_different_rounds_do_not_compute(owns: tuple[Own, ...], tmp_path: Path) -> None:
    """The same run, but one party was given another number of channels to open."""
    for number, own in enumerate(owns):
        asked = making.a_round(owns, channels=CHANNELS, prune=2 if number else 3)
        rounds.write(asked, own.folder / "round.json")
    program = (
        "import sys; from pathlib import Path\n"
        "from edgeguard.errors import TrustError\n"
        "from edgeguard.private import computation, parties, rounds\n"
        "own = parties.own(Path(sys.argv[1]))\n"
        "asked = rounds.read(own.folder / 'round.json')\n"
        "with computation.connect(own, computation.Addresses.of(own), 'run') as joint:\n"
        "    try:\n"
        "        rounds.run(asked, rounds.Ballots(asked, own), joint, lambda *a: None)\n"
        "    except TrustError as error:\n"
        "        print(error)\n"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", program, str(o.folder)], stdout=subprocess.PIPE, text=True)
        for o in owns
    ]
    for process in processes:
        out, _ = process.communicate(timeout=TIMEOUT_S)
        assert "round; got not the same at all three parties" in out


@contextlib.contextmanager
def recorded(port: int) -> Iterator[tuple[int, list[bytes]]]:
    """A port that passes everything on to ``port``, and what went through it, by connection and direction."""
    heard: list[bytes] = []
    server = socket.create_server(("127.0.0.1", 0))

    def pump(source: socket.socket, sink: socket.socket, place: int) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                heard[place] += data
                sink.sendall(data)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = server.accept()
                try:
                    far = socket.create_connection(("127.0.0.1", port))
                except OSError:
                    near.close()
                    continue
                for one, other in ((near, far), (far, near)):
                    heard.append(b"")
                    threading.Thread(target=pump, args=(one, other, len(heard) - 1), daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    yield server.getsockname()[1], heard
    server.close()


_EXCHANGE = (
    "import json, sys; from pathlib import Path\n"
    "from edgeguard.errors import EdgeGuardError\n"
    "from edgeguard.private import computation, parties\n"
    "own = parties.own(Path(sys.argv[1]))\n"
    "addresses = computation.Addresses(hosts=tuple(sys.argv[2].split(',')))\n"
    "try:\n"
    "    with computation.connect(own, addresses, 'run', connect_s=4, timeout_s=6) as joint:\n"
    "        print(json.dumps(joint.exchange('in clear ' * 8 + str(own.index))))\n"
    "except EdgeGuardError as error:\n"
    "    print(type(error).__name__)\n"
)


def exchange(owns: Sequence[Own], addresses: Sequence[Sequence[str]]) -> list[str]:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _EXCHANGE, str(own.folder), ",".join(hosts)], stdout=subprocess.PIPE, text=True
        )
        for own, hosts in zip(owns, addresses, strict=True)
    ]
    return [process.communicate(timeout=TIMEOUT_S)[0].strip() for process in processes]


def hosts_of(owns: Sequence[Own]) -> list[str]:
    return [f"127.0.0.1:{party.port}" for party in owns[0].parties.parties]


def test_what_parties_say_to_each_other_cannot_be_read_on_the_line(owns: tuple[Own, ...]) -> None:
    direct = hosts_of(owns)
    with recorded(owns[1].parties.parties[1].port) as (port, heard):
        through = [direct[0], f"127.0.0.1:{port}", direct[2]]
        said = exchange(owns, [through, direct, through])
    assert all(len(json.loads(text)) == 3 for text in said), said
    sent = [content for content in heard if content]
    assert sum(map(len, sent)) > 1000
    assert not any(b"in clear" in content for content in sent)
    # Each direction begins with a handshake record of TLS 1.x (RFC 8446, 5.1).
    assert all(content[:2] == b"\x16\x03" for content in sent)


def test_who_has_not_the_partys_key_does_not_get_in(owns: tuple[Own, ...], tmp_path: Path) -> None:
    """A stranger claims to be the third party: its own keys, the real three's public descriptions."""
    stranger = tmp_path / "stranger"
    stranger.mkdir(mode=0o700)
    false = making.parties(tmp_path / "false")[2]
    for name in (parties.TOGETHER, parties.PUBLIC, parties.SEALING_KEY):
        (stranger / name).write_bytes((owns[2].folder / name).read_bytes())
        (stranger / name).chmod(0o600)
    for name, source in ((parties.TLS_KEY, false), (parties.OWN, false)):
        (stranger / name).write_bytes((source.folder / name).read_bytes())
        (stranger / name).chmod(0o600)
    program = _EXCHANGE.replace(
        "own = parties.own(Path(sys.argv[1]))\n",
        "own = parties.own(Path(sys.argv[1]))\n"
        f"Path(sys.argv[1], parties.OWN).write_bytes(Path({str(false.folder / parties.OWN)!r}).read_bytes())\n",
    )
    hosts = ",".join(hosts_of(owns))
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(folder), hosts], stdout=subprocess.PIPE, text=True)
        for code, folder in ((_EXCHANGE, owns[0].folder), (_EXCHANGE, owns[1].folder), (program, stranger))
    ]
    said = [process.communicate(timeout=TIMEOUT_S)[0].strip() for process in processes]
    assert [text.splitlines()[-1] for text in said] == ["LinkError"] * 3


def test_a_round_computed_by_three_equals_the_one_computed_in_clear(owns: tuple[Own, ...], tmp_path: Path) -> None:
    """Votes this time, some of them lies, against NumPy."""
    asked = making.a_round(owns, channels=CHANNELS, kind="votes", prune=3)
    rounds.write(asked, tmp_path / "round.json")
    (tmp_path / "sent").mkdir()
    rng = np.random.default_rng(3)
    votes: list[Any] = []
    for number in range(DEVICES + 1):
        values = sharing.values_of(asked, rng.permutation(CHANNELS).tolist())
        if number == DEVICES:
            values = values * 1000
        else:
            votes.append(values)
        made = making.submission(asked, owns, f"cam-{number}", values)
        rounds.write_submission(made, tmp_path / "sent" / f"cam-{number}.json")
    expected = sorted(np.lexsort((np.arange(CHANNELS), -np.sum(votes, axis=0)))[:3].tolist())
    sent = ("--submissions", str(tmp_path / "sent"), "--timeout", "60", "--json")
    results = ended([start(own, tmp_path / "round.json", *sent) for own in owns])
    assert [json.loads(out.splitlines()[-1])["channels"] for _, out, _ in results] == [expected] * 3
