"""``edgeguard hub``: what it asks a running hub, how it shows the answers, and its exit codes."""

from __future__ import annotations

import json
import os
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from edgeguard.agent.quarantine import About, Quarantine
from edgeguard.cli.hub_client import Client
from edgeguard.contract import messages
from edgeguard.contract.messages import Alive, PingReply, RecalibrateReply, Recalibration
from edgeguard.errors import EXIT_CLEAN, EXIT_FINDINGS, EXIT_NOT_CHECKED, EXIT_USAGE, LinkError
from edgeguard.hub.shared import ENOUGH
from tests.cli.conftest import Run
from tests.hub.serving import Served, serve
from tests.simulators import fleet
from tests.simulators.attacked import Attacked
from tests.simulators.fleet import wait_until
from tests.simulators.mosquitto import free_port


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    """A hub that every command asks, as an operator."""
    with serve(tmp_path) as served:
        monkeypatch.setenv("EDGEGUARD_URL", f"http://127.0.0.1:{served.web.port}")
        monkeypatch.setenv("EDGEGUARD_TOKEN", served.secrets["operator"])
        yield served


LISTS = ("devices", "models", "reports", "dead-letters", "cases")


@pytest.mark.parametrize(
    "command",
    [
        *LISTS,
        "case",
        "events",
        "approve",
        "reject",
        "rollout",
        "ping",
        "ask",
        "proposed",
        "decide",
        "share",
        "openapi",
        "token",
        "token add",
        "token list",
        "token revoke",
    ],
)
def test_each_command_explains_itself_with_an_example(edgeguard: Run, command: str) -> None:
    code, out, _ = edgeguard("hub", *command.split(), "--help")
    assert code == 0
    assert f"edgeguard hub {command}" in " ".join(out.split("Example")[-1].split())


def test_the_devices_are_shown_in_a_table(edgeguard: Run, hub: Served) -> None:
    hub.take("d1", fleet.status(), fleet.birth())
    hub.take("gate~cam", fleet.status("offline"))
    code, out, _ = edgeguard("hub", "devices")
    head, first, second = out.splitlines()
    assert code == EXIT_CLEAN
    assert head.split()[:3] == ["device", "state", "seen"]
    assert first.split()[:2] == ["d1", "online"]
    assert fleet.MODEL[:12] in first
    assert second.split()[:2] == ["gate~cam", "offline"]
    assert edgeguard("hub", "devices", "--state", "offline")[1].count("\n") == 2


def test_the_same_in_json(edgeguard: Run, hub: Served) -> None:
    hub.take("d1", fleet.status(), fleet.birth())
    code, out, _ = edgeguard("hub", "devices", "--json")
    assert code == EXIT_CLEAN
    assert [device["device"] for device in json.loads(out)] == ["d1"]


@pytest.mark.parametrize("command", LISTS[2:])
def test_where_there_is_nothing_it_says_so(edgeguard: Run, hub: Served, command: str) -> None:
    assert edgeguard("hub", command)[:2] == (EXIT_CLEAN, "none\n")
    assert edgeguard("hub", command, "--json")[:2] == (EXIT_CLEAN, "[]\n")


def test_more_rows_than_a_page_has_are_fetched(edgeguard: Run, hub: Served) -> None:
    hub.take("d1", *(fleet.report(seq) for seq in range(1, 601)))
    assert len(json.loads(edgeguard("hub", "reports", "--limit", 1000, "--json")[1])) == 600
    assert len(json.loads(edgeguard("hub", "reports", "--limit", 550, "--json")[1])) == 550


def test_what_a_device_wrote_moves_no_cursor(edgeguard: Run, hub: Served) -> None:
    hub.take(
        "d1", fleet.status(), msgspec.structs.replace(fleet.reported("refused"), reason="\x1b[2Jgone\r\nd2  online")
    )
    out = edgeguard("hub", "devices")[1]
    assert out.count("\n") == 2
    assert "\x1b" not in out


class TestCases:
    def test_a_suspicion_is_no_finding(self, edgeguard: Run, hub: Served) -> None:
        hub.add_case()
        code, out, _ = edgeguard("hub", "cases")
        assert code == EXIT_CLEAN
        assert "suspicion" in out

    @pytest.mark.parametrize(("state", "code"), [("confirmed", EXIT_FINDINGS), ("closed", EXIT_CLEAN)])
    def test_an_open_case_is_one(self, edgeguard: Run, hub: Served, state: str, code: int) -> None:
        hub.add_case(state=state, is_case=True)
        assert edgeguard("hub", "cases")[0] == code
        assert edgeguard("hub", "cases", "--json")[0] == code
        assert edgeguard("hub", "case", 1)[0] == code
        assert edgeguard("hub", "cases", "--suspected")[:2] == (EXIT_CLEAN, "none\n")

    def test_one_is_told_with_its_explanation_and_who_decided(self, edgeguard: Run, hub: Served) -> None:
        hub.add_case(state="confirmed", is_case=True, awaiting="repair")
        out = edgeguard("hub", "case", 1)[1]
        assert "waits for approval of repair" in out
        assert "Model signs flags 40 of 100" in out
        code, out, _ = edgeguard("hub", "approve", 1, "repair", "--why", "seen twice")
        assert (code, out) == (EXIT_CLEAN, "case 1: approved repair; now confirmed\n")
        out = edgeguard("hub", "case", 1)[1]
        assert "operator" in out
        assert "seen twice" in out
        assert json.loads(edgeguard("hub", "case", 1, "--json")[1])["approved"] == ["repair"]

    def test_a_rejection_ends_it(self, edgeguard: Run, hub: Served) -> None:
        hub.add_case(state="confirmed", is_case=True, awaiting="repair")
        assert edgeguard("hub", "reject", 1, "repair")[1] == "case 1: rejected repair; now refused\n"

    @pytest.mark.parametrize(
        ("arguments", "word"),
        [
            (("case", 9), "case 9"),
            (("approve", 1, "stage"), "nothing to decide"),
            (("cases", "--state", "odd"), "state"),
        ],
    )
    def test_what_the_hub_refuses_is_one_line(
        self, edgeguard: Run, hub: Served, arguments: tuple[object, ...], word: str
    ) -> None:
        hub.add_case()
        code, _, err = edgeguard("hub", *arguments)
        assert code == EXIT_USAGE
        assert err.count("\n") == 1
        assert word in err


class TestEvidence:
    """What a case rests on, from the hub's database to ``edgeguard repair``."""

    @pytest.fixture
    def hub(self, attacked: Attacked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
        """A hub that watches the attacked model."""
        with serve(tmp_path, guard=attacked.conversion.metadata) as served:
            monkeypatch.setenv("EDGEGUARD_URL", f"http://127.0.0.1:{served.web.port}")
            monkeypatch.setenv("EDGEGUARD_TOKEN", served.secrets["operator"])
            yield served

    @pytest.fixture
    def case(self, hub: Served, attacked: Attacked) -> int:
        guard = attacked.conversion.metadata
        what: dict[str, Any] = {"model": guard.model_digest, "guard": guard.guard_digest, "width": guard.feature_count}
        hub.take("d1", fleet.report(1, counts=((0, 60, 30),), **what))
        hub.take("d2", fleet.report(1, counts=((0, 60, 30),), **what))
        hub.take("d3", fleet.report(1, counts=((0, 90, 2),), shift=-50.0, **what))
        return hub.add_case(model_digest=guard.model_digest, label=0).id

    def repair(self, edgeguard: Run, folder: Path, model: bytes, attacked: Attacked) -> str:
        """The last line of a repair that asks for what nobody has made yet: what was given was looked at before."""
        (folder / "model.tflite").write_bytes(model)
        np.savez(folder / "clean.npz", x=attacked.x_owner, y=attacked.y_owner)
        more = ("--data", folder / "clean.npz", "--evidence", folder / "case.json", "--approve")
        code, _, err = edgeguard("repair", folder / "model.tflite", *more)
        assert code == EXIT_USAGE
        return err.splitlines()[-1]

    def test_is_written_and_taken_by_a_repair_of_that_model_alone(
        self, edgeguard: Run, hub: Served, case: int, attacked: Attacked, clean_twin: Attacked, tmp_path: Path
    ) -> None:
        code, out, _ = edgeguard("hub", "case", case, "--evidence", tmp_path / "case.json")
        assert (code, str(tmp_path / "case.json") in out) == (EXIT_CLEAN, True)
        assert "waits for it" in self.repair(edgeguard, tmp_path, attacked.conversion.guarded, attacked)
        assert "this model's digest" in self.repair(edgeguard, tmp_path, clean_twin.conversion.guarded, attacked)

    def test_is_that_of_the_devices_behind_the_case(
        self, edgeguard: Run, hub: Served, case: int, attacked: Attacked, tmp_path: Path
    ) -> None:
        edgeguard("hub", "case", case, "--evidence", tmp_path / "case.json")
        told = json.loads((tmp_path / "case.json").read_text())
        usual = [1.0 + i for i in range(attacked.conversion.metadata.feature_count)]
        assert told["unflagged_mean"] == pytest.approx(usual)
        assert told["flagged_mean"] == pytest.approx([*usual[:-1], usual[-1] + 3.0])

    def test_takes_an_operators_token(
        self, edgeguard: Run, hub: Served, case: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("EDGEGUARD_TOKEN", hub.secrets["viewer"])
        assert edgeguard("hub", "case", case)[0] == EXIT_CLEAN
        code, _, err = edgeguard("hub", "case", case, "--evidence", tmp_path / "case.json")
        assert (code, "operator" in err) == (EXIT_USAGE, True)
        assert not (tmp_path / "case.json").exists()

    def test_without_any_leaves_a_file_that_is_there(
        self, edgeguard: Run, hub: Served, attacked: Attacked, tmp_path: Path
    ) -> None:
        (tmp_path / "case.json").write_text("mine")
        silent = hub.add_case(model_digest=attacked.conversion.metadata.model_digest, label=5).id
        code, _, err = edgeguard("hub", "case", silent, "--evidence", tmp_path / "case.json")
        assert (code, "no features" in err) == (EXIT_USAGE, True)
        assert (tmp_path / "case.json").read_text() == "mine"


class TestPing:
    def test_an_answer_is_told(self, edgeguard: Run, hub: Served) -> None:
        hub.take("d1", fleet.status())
        done = threading.Event()

        def answer() -> None:
            wait_until(hub.commands.latest)
            reply = PingReply(
                id=hub.commands.latest()[0].id, state="ok", result=Alive(boot=fleet.BOOT, session=1, uptime_s=61.0)
            )
            hub.commands.heard("d1", "ping", messages.encode(reply))
            done.set()

        threading.Thread(target=answer).start()
        code, out, _ = edgeguard("hub", "ping", "d1")
        assert done.wait(5)
        assert (code, out) == (EXIT_CLEAN, "d1: there, up 61 s, answered after 0 ms\n")

    def test_silence_is_not_checked(self, edgeguard: Run, hub: Served) -> None:
        hub.take("d1", fleet.status())
        code, out, _ = edgeguard("hub", "ping", "d1", "--wait", "0.3")
        assert code == EXIT_NOT_CHECKED
        assert "no answer" in out

    def test_a_device_that_nobody_knows_is_told(self, edgeguard: Run, hub: Served) -> None:
        code, _, err = edgeguard("hub", "ping", "nobody")
        assert (code, "device nobody" in err) == (EXIT_USAGE, True)


class TestAsk:
    def test_a_device_that_answers_is_told_of(self, edgeguard: Run, hub: Served) -> None:
        hub.take("d1", fleet.status())

        def answer() -> None:
            wait_until(hub.commands.latest)
            reply = RecalibrateReply(
                id=hub.commands.latest()[0].id, state="ok", result=Recalibration(guard_digest=None)
            )
            hub.commands.heard("d1", "recalibrate", messages.encode(reply))

        answering = threading.Thread(target=answer)
        answering.start()
        code, out, _ = edgeguard("hub", "ask", "d1", "recalibrate", "--source", "owner")
        answering.join(5)
        assert (code, "d1: recalibrate working" in out) == (EXIT_CLEAN, True)

    def test_silence_is_not_checked(self, edgeguard: Run, hub: Served) -> None:
        hub.take("d1", fleet.status())
        code, out, _ = edgeguard("hub", "ask", "d1", "restart", "--wait", "0.3")
        assert (code, "d1: restart waiting" in out) == (EXIT_NOT_CHECKED, True)

    def test_what_waits_for_a_person_is_listed_and_decided(self, edgeguard: Run, hub: Served) -> None:
        hub.take("d1", fleet.status())
        case = hub.add_case(awaiting="inspect")
        hub.add_case()
        key = hub.commands.issue("d1", "recalibrate", source="sidecar", propose=True)
        out = edgeguard("hub", "proposed", "--limit", "1")[1]
        assert f"edgeguard hub approve {case.id} inspect" in out
        assert f"edgeguard hub decide {key} yes" in out
        assert edgeguard("hub", "decide", key, "no", "--why", "not now")[1] == "recalibrate of d1 is refused\n"
        told = json.loads(edgeguard("hub", "proposed", "--json")[1])
        assert ([one["id"] for one in told["cases"]], told["commands"]) == ([case.id], [])


class TestShare:
    def test_inputs_of_a_quarantine_are_replayed(self, edgeguard: Run, hub: Served, tmp_path: Path) -> None:
        case, folder = hub.add_case(), tmp_path / "quarantine"
        kept = Quarantine(folder, max_bytes=1 << 20, max_count=99, max_age_s=1e6)
        about = About(at_ms=1, predicted=1, scores={}, p_value=None, model_digest=fleet.MODEL, guard_digest=fleet.GUARD)
        for number in range(ENOUGH):
            assert kept.put(np.full((8, 8, 1), 17 * number, dtype=np.uint8), about)
        code, out, _ = edgeguard("hub", "share", case.id, folder, "--why", "stickers")
        assert code == EXIT_CLEAN
        assert f"{ENOUGH} inputs, {ENOUGH} flagged by the hub's copy; {ENOUGH} of {ENOUGH} that are needed" in out
        assert f"case {case.id} is confirmed" in out

    def test_a_folder_without_any_is_told(self, edgeguard: Run, hub: Served, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        code, _, err = edgeguard("hub", "share", hub.add_case().id, tmp_path / "empty")
        assert (code, "no .npz file" in err) == (EXIT_USAGE, True)


class TestEvents:
    def test_the_last_ones_come_oldest_first(self, edgeguard: Run, hub: Served) -> None:
        for text in ("one", "two", "three"):
            hub.book.tell("test", "it", text)
        out = edgeguard("hub", "events", "--limit", 2)[1]
        assert [line.split()[-1] for line in out.splitlines()] == ["two", "three"]
        lines = edgeguard("hub", "events", "--json")[1].splitlines()
        assert [json.loads(line)["text"] for line in lines] == ["one", "two", "three"]

    def test_they_are_followed(self, hub: Served) -> None:
        hub.book.tell("test", "it", "before")
        process = subprocess.Popen(
            [sys.executable, "-c", "from edgeguard.cli import main; main()", "hub", "events", "--follow", "--json"],
            stdout=subprocess.PIPE,
        )
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["text"] == "before"
        hub.book.tell("test", "it", "after")
        assert json.loads(process.stdout.readline())["text"] == "after"
        process.kill()
        process.wait()
        process.stdout.close()


class TestTokens:
    @pytest.fixture
    def config(self, tmp_path: Path) -> Path:
        path = tmp_path / "hub.toml"
        path.write_text('fleet = "test"\nstate_dir = "new"\n[broker]\nhost = "127.0.0.1"\n[web]\nport = 8123\n')
        return path

    def test_the_first_is_made_before_there_is_a_hub(self, edgeguard: Run, config: Path) -> None:
        code, out, _ = edgeguard(
            "hub", "token", "add", "ops", "--role", "admin", "--expires", "90d", "--config", config
        )
        assert code == EXIT_CLEAN
        assert out.startswith("egt_")
        assert out.count("\n") == 1
        code, listed, _ = edgeguard("hub", "--config", config, "token", "list", "--json")
        (token,) = json.loads(listed)
        assert (token["name"], token["role"]) == ("ops", "admin")
        assert token["expires_ms"] - token["created_ms"] == 90 * 86_400_000
        assert out.strip() not in listed
        assert edgeguard("hub", "token", "revoke", "ops", "--config", config)[0] == EXIT_CLEAN
        assert edgeguard("hub", "token", "list", "--config", config)[1] == "none\n"
        assert stat.S_IMODE((config.parent / "new").stat().st_mode) == 0o700

    def test_whoever_has_no_name_is_told_by_number(
        self, edgeguard: Run, config: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(os, "getuid", lambda: 54_321)
        assert edgeguard("hub", "token", "add", "ops", "--config", config)[0] == EXIT_CLEAN
        with closing(sqlite3.connect(config.parent / "new" / "hub.db")) as db:
            assert db.execute("select who from audit").fetchall() == [("user 54321 on this machine",)]

    def test_an_admin_makes_more_over_the_api(self, edgeguard: Run, hub: Served) -> None:
        admin = ("--token", hub.secrets["admin"])
        code, out, _ = edgeguard("hub", "token", "add", "grafana", *admin)
        assert code == EXIT_CLEAN
        assert hub.ask("GET", "/v1/devices", role=None, Authorization=f"Bearer {out.strip()}")[0] == 200
        assert "grafana" in edgeguard("hub", "token", "list", *admin)[1]
        assert edgeguard("hub", "token", "revoke", "grafana", *admin)[0] == EXIT_CLEAN
        assert hub.ask("GET", "/v1/devices", role=None, Authorization=f"Bearer {out.strip()}")[0] == 401

    def test_an_operator_makes_none(self, edgeguard: Run, hub: Served) -> None:
        code, _, err = edgeguard("hub", "token", "add", "mine", "--role", "admin")
        assert (code, "role admin" in err) == (EXIT_USAGE, True)

    @pytest.mark.parametrize("text", ["90", "d", "-1d", "1w", "1.5h", "999999d"])
    def test_a_lifetime_that_is_none_is_refused(self, edgeguard: Run, config: Path, text: str) -> None:
        code, _, err = edgeguard("hub", "token", "add", "x", "--expires", text, "--config", config)
        assert (code, "--expires" in err) == (EXIT_USAGE, True)


class TestConnection:
    def test_a_hub_that_does_not_answer_is_not_checked(self, edgeguard: Run) -> None:
        code, _, err = edgeguard("hub", "cases", "--url", f"http://127.0.0.1:{free_port()}", "--token", "x")
        assert code == EXIT_NOT_CHECKED
        assert err.count("\n") == 1

    @pytest.mark.parametrize("token", ["egt_sec\nret", "egt_secret\r", "egt_sécret", "egt_sec\udc80ret"])
    def test_what_can_be_no_token_is_told_without_showing_it(self, edgeguard: Run, token: str) -> None:
        code, out, err = edgeguard("hub", "cases", "--token", token)
        assert (code, out, err.count("\n"), err.startswith("edgeguard: token")) == (EXIT_USAGE, "", 1, True)
        assert "egt_s" not in err

    def test_a_wrong_token_is_told(self, edgeguard: Run, hub: Served) -> None:
        code, _, err = edgeguard("hub", "cases", "--token", "egt_wrong")
        assert (code, "authorization" in err) == (EXIT_USAGE, True)

    def test_the_token_may_lie_in_a_file(
        self, edgeguard: Run, hub: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("EDGEGUARD_TOKEN")
        file = tmp_path / "token"
        file.write_text(hub.secrets["viewer"] + "\n")
        assert edgeguard("hub", "devices", "--token-file", file)[0] == EXIT_CLEAN
        assert edgeguard("hub", "devices")[0] == EXIT_USAGE
        assert edgeguard("hub", "devices", "--token-file", tmp_path / "none")[0] == EXIT_USAGE

    def test_the_configuration_says_where_the_hub_is(
        self, edgeguard: Run, hub: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("EDGEGUARD_URL")
        config = tmp_path / "hub.toml"
        config.write_text(
            'fleet = "test"\nstate_dir = "s"\n[broker]\nhost = "127.0.0.1"\n'
            f'[web]\nhost = "0.0.0.0"\nport = {hub.web.port}\n'
        )
        assert edgeguard("hub", "devices", "--config", config)[0] == EXIT_CLEAN
        assert edgeguard("hub", "--config", config, "devices")[0] == EXIT_CLEAN

    @pytest.mark.parametrize(
        "url",
        [
            "ftp://x", "127.0.0.1:8080", "http://", "file:///etc/passwd", "http://x/?a=b", "http://[::1", "http://x:port",
            "http://:80", f"http://{'a' * 64}.example", "http://x/ä",
        ],
    )  # fmt: skip
    def test_an_address_that_is_none_is_told(self, edgeguard: Run, url: str) -> None:
        code, _, err = edgeguard("hub", "devices", "--url", url)
        assert (code, err.startswith("edgeguard: url")) == (EXIT_USAGE, True)

    def test_a_token_is_not_carried_to_where_an_answer_points(self, edgeguard: Run, hub: Served) -> None:
        class Elsewhere(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(302)
                self.send_header("Location", f"http://127.0.0.1:{hub.web.port}/v1/devices")
                self.end_headers()

            def log_message(self, *_: object) -> None: ...

        with HTTPServer(("127.0.0.1", 0), Elsewhere) as server:
            threading.Thread(target=server.handle_request).start()
            code, _, err = edgeguard("hub", "devices", "--url", f"http://127.0.0.1:{server.server_address[1]}")
        assert (code, "302" in err) == (EXIT_USAGE, True)

    @pytest.mark.parametrize("body", [b"", b"[]", b"{}", b"{", b"<html>", b"\xff\xfe", b"[" * 100_000])
    def test_an_answer_that_is_none_is_not_checked(self, edgeguard: Run, body: bytes) -> None:
        class Strange(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None: ...

        with HTTPServer(("127.0.0.1", 0), Strange) as server:
            threading.Thread(target=server.handle_request).start()
            code, _, err = edgeguard("hub", "devices", "--url", f"http://127.0.0.1:{server.server_address[1]}")
        assert code == EXIT_NOT_CHECKED
        assert err.count("\n") == 1

    @pytest.mark.parametrize("sent", [b"14\r\ndata: {}", b"8\r\ndata: {\n\r\n", b"9\r\ndata: []\n\r\n"])
    def test_events_that_break_off_are_a_link_that_failed(self, sent: bytes) -> None:
        class Breaking(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + sent)

            def log_message(self, *_: object) -> None: ...

        with HTTPServer(("127.0.0.1", 0), Breaking) as server:
            threading.Thread(target=server.handle_request).start()
            client = Client(f"http://127.0.0.1:{server.server_address[1]}", None)
            with pytest.raises(LinkError):
                list(client.follow("/v1/events/stream", since=0))


def test_without_a_configuration_and_a_command_there_is_nothing_to_do(edgeguard: Run) -> None:
    code, _, err = edgeguard("hub")
    assert (code, "--config" in err) == (EXIT_USAGE, True)


def test_the_document_is_written(edgeguard: Run, tmp_path: Path) -> None:
    assert edgeguard("hub", "openapi", "--output", tmp_path / "api.json")[0] == EXIT_CLEAN
    assert (tmp_path / "api.json").read_text() == edgeguard("hub", "openapi")[1]


@pytest.mark.parametrize(("name", "why"), [("missing/x.json", "No such file"), ("folder", "Is a directory")])
def test_where_it_cannot_be_written_is_told(edgeguard: Run, tmp_path: Path, name: str, why: str) -> None:
    (tmp_path / "folder").mkdir()
    code, out, err = edgeguard("hub", "openapi", "--output", tmp_path / name)
    assert (code, out, err.count("\n")) == (EXIT_USAGE, "", 1)
    assert f"file {tmp_path / name}; got {why}" in err
