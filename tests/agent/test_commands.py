"""Commands: executed at most once per transaction id, whatever is repeated and whenever the agent is killed."""

from __future__ import annotations

import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeguard.agent.commands import AHEAD_MS, KEPT_MS, Answer, Commands, Outcome, refusal
from edgeguard.contract import topics
from edgeguard.contract.messages import (
    REPLIES,
    Alive,
    Command,
    Ping,
    PingReply,
    Recalibrate,
    RecalibrateReply,
    Recalibration,
    Reply,
    Restart,
    decode,
    transaction,
)
from edgeguard.errors import ConfigError, ModelError
from tests.simulators.tiny_hub import wait_until

NOW_MS = 1_790_000_000_000
BOOT = "00000000000000aa"
DIGEST = "a" * 64


def alive(session: int = 1) -> Outcome:
    return Outcome(state="ok", result=Alive(boot=BOOT, session=session, uptime_s=1.5))


def ping(number: int = 1, *, at_ms: int = NOW_MS) -> Ping:
    return Ping(id=transaction(at_ms, f"{number:08x}"))


def read(answer: Answer | None) -> Reply:
    """What an answer says to the hub."""
    assert answer is not None
    return decode(REPLIES[answer.channel.removeprefix("reply/")], answer.payload)


class Desk:
    """A device's commands over its restarts: a clock that a test sets, and a log of what was executed."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "commands.sqlite"
        self.now_s = NOW_MS / 1000
        self.steady_s = 0.0
        self.executed: list[str] = []
        self.answer: Callable[[Command], Outcome] = lambda _: alive(len(self.executed))
        self._commands: Commands | None = None

    def open(self, **options: Any) -> Commands:
        """Start anew, as after a restart."""
        self.close()
        self._commands = Commands(
            self.path,
            {"ping": self._execute, "recalibrate": self._execute},
            clock=lambda: self.now_s,
            steady=lambda: self.steady_s,
            **{"per_minute": 100_000, **options},
        )
        return self._commands

    def close(self) -> None:
        """End without a word."""
        if self._commands is not None:
            self._commands.close()

    def _execute(self, command: Command) -> Outcome:
        self.executed.append(command.id)
        return self.answer(command)


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    one = Desk(tmp_path)
    yield one
    one.close()


def test_a_command_is_executed_and_answered_on_its_reply_channel(desk: Desk) -> None:
    answer = desk.open().take(ping())
    assert answer is not None and answer.channel == topics.reply("ping")
    assert read(answer) == PingReply(id=ping().id, state="ok", result=Alive(boot=BOOT, session=1, uptime_s=1.5))


def test_a_repeated_id_gets_the_same_bytes_and_nothing_is_executed(desk: Desk) -> None:
    commands = desk.open()
    first = commands.take(ping())
    assert [commands.take(ping()), desk.open().take(ping())] == [first, first]
    assert desk.executed == [ping().id]


def test_the_id_alone_decides_whatever_else_the_repetition_says(desk: Desk) -> None:
    commands = desk.open()
    first = commands.take(ping())
    assert commands.take(Recalibrate(id=ping().id, source="owner")) == first
    assert desk.executed == [ping().id]


def test_a_reply_is_on_disk_before_it_can_be_sent(desk: Desk) -> None:
    answer = desk.open().take(ping())
    with sqlite3.connect(desk.path) as other:
        assert answer is not None
        assert other.execute("SELECT reply, final FROM commands").fetchall() == [(answer.payload, 1)]


def test_a_command_is_on_disk_as_begun_before_it_is_executed(desk: Desk) -> None:
    seen: list[tuple[Any, ...]] = []

    def look(command: Command) -> Outcome:
        with sqlite3.connect(desk.path) as other:
            seen.extend(other.execute("SELECT id, reply, final FROM commands"))
        return alive()

    desk.answer = look
    desk.open().take(ping())
    assert seen == [(ping().id, None, 0)]


@pytest.mark.parametrize("state", ["refused", "failed"])
def test_what_was_refused_or_failed_is_remembered_too(desk: Desk, state: Any) -> None:
    desk.answer = lambda _: Outcome(state=state, reason="not today")
    first = desk.open().take(ping())
    desk.answer = lambda _: alive()
    assert desk.open().take(ping()) == first
    assert (read(first).state, read(first).reason, read(first).result) == (state, "not today", None)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ModelError("clean data", got="3 inputs", expected="199"), "clean data; got 3 inputs; expected 199"),
        (ZeroDivisionError("secret"), "internal error: ZeroDivisionError"),
    ],
)
def test_a_handler_that_raises_fails_its_command_and_nothing_else(desk: Desk, error: Exception, reason: str) -> None:
    def broken(_: Command) -> Outcome:
        raise error

    desk.answer = broken
    commands = desk.open()
    reply = read(commands.take(ping(1)))
    assert (reply.state, reply.reason) == ("failed", reason)
    desk.answer = lambda _: alive()
    assert read(commands.take(ping(2))).state == "ok"


def test_a_reason_that_is_too_long_is_cut_so_that_the_hub_takes_the_reply(desk: Desk) -> None:
    desk.answer = lambda _: Outcome(state="failed", reason="x" * 5000)
    assert read(desk.open().take(ping())).reason == "x" * 512


@pytest.mark.parametrize("fields", [{"state": "ok"}, {"state": "refused", "result": Recalibration(guard_digest=None)}])
def test_an_outcome_has_a_result_when_it_is_ok_and_only_then(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="with result"):
        Outcome(**fields)


def test_a_command_without_a_handler_is_refused(desk: Desk) -> None:
    reply = read(desk.open().take(Restart(id=ping().id)))
    assert (reply.state, reply.reason) == ("refused", "not a command that this device takes")


def test_a_long_command_is_accepted_at_once_and_finished_later(desk: Desk) -> None:
    desk.answer = lambda _: Outcome(state="ok", result=Recalibration(guard_digest=None), final=False)
    command = Recalibrate(id=ping().id, source="sidecar")
    commands = desk.open()
    accepted = commands.take(command)
    assert read(accepted) == RecalibrateReply(id=command.id, state="ok", result=Recalibration(guard_digest=None))
    assert commands.take(command) == accepted
    done = commands.finish(command.id, Outcome(state="ok", result=Recalibration(guard_digest=DIGEST)))
    assert done.channel == topics.reply("recalibrate")
    assert commands.take(command) == desk.open().take(command) == done
    assert desk.executed == [command.id]


def test_a_long_command_that_the_end_of_the_agent_cut_short_failed(desk: Desk) -> None:
    desk.answer = lambda _: Outcome(state="ok", result=Recalibration(guard_digest=None), final=False)
    command = Recalibrate(id=ping().id, source="sidecar")
    desk.open().take(command)
    reply = read(desk.open().take(command))
    assert (reply.state, reply.reason) == ("failed", "interrupted, not repeated")


def test_what_is_not_at_work_cannot_be_finished(desk: Desk) -> None:
    commands = desk.open()
    commands.take(ping(1))
    for number in (1, 2):
        with pytest.raises(ValueError, match="not at work"):
            commands.finish(ping(number).id, alive())


@pytest.mark.parametrize(
    ("issued_ms", "forgotten_ms", "has_room", "reason"),
    [
        (NOW_MS, -1, True, None),
        (0, -1, True, None),
        (1, 0, True, None),
        (0, 0, True, "forgotten"),
        (NOW_MS, NOW_MS, True, "forgotten"),
        (NOW_MS, NOW_MS - 1, True, None),
        (NOW_MS + AHEAD_MS, -1, True, None),
        (NOW_MS + AHEAD_MS + 1, -1, True, "a day ahead"),
        (NOW_MS, -1, False, "30 commands a minute"),
    ],
)
def test_which_unknown_ids_are_begun(issued_ms: int, forgotten_ms: int, has_room: bool, reason: str | None) -> None:
    found = refusal(issued_ms, forgotten_ms=forgotten_ms, now_ms=NOW_MS, has_room=has_room)
    assert (found is None) if reason is None else (reason in (found or ""))


def test_more_commands_than_a_minute_may_bring_are_refused_and_may_come_again(desk: Desk) -> None:
    commands = desk.open(per_minute=2)
    states = [read(commands.take(ping(n))).state for n in range(4)]
    assert states == ["ok", "ok", "refused", "refused"]
    desk.steady_s += 60
    assert [read(commands.take(ping(n))).state for n in (2, 3)] == ["ok", "ok"]
    assert desk.executed == [ping(n).id for n in range(4)]


def test_a_repetition_beyond_the_limit_is_not_told_that_it_was_refused(desk: Desk) -> None:
    commands = desk.open(per_minute=1)
    first = commands.take(ping())
    assert commands.take(ping()) is None
    desk.steady_s += 60
    assert commands.take(ping()) == first


def test_the_store_is_bounded_and_what_left_it_is_never_executed_again(desk: Desk) -> None:
    commands = desk.open(kept=5)
    sent = [ping(n, at_ms=NOW_MS + n) for n in range(20)]
    answers = [commands.take(one) for one in sent]
    with sqlite3.connect(desk.path) as other:
        assert other.execute("SELECT COUNT(*) FROM commands").fetchone() == (5,)
    again = desk.open(kept=5)
    assert [again.take(one) for one in sent[-5:]] == answers[-5:]
    for one in sent[:-5]:
        reply = read(again.take(one))
        assert reply.state == "refused" and "forgotten" in reply.reason
    assert desk.executed == [one.id for one in sent]


def test_replies_leave_by_age_when_the_next_command_comes(desk: Desk) -> None:
    commands = desk.open()
    commands.take(ping(1))
    desk.now_s += KEPT_MS / 1000 + 1
    later = ping(2, at_ms=NOW_MS + KEPT_MS)
    assert read(commands.take(later)).state == "ok"
    assert "forgotten" in read(commands.take(ping(1))).reason
    assert desk.executed == [ping(1).id, later.id]


def test_what_left_first_stays_barred_when_an_id_of_an_earlier_time_leaves_later(desk: Desk) -> None:
    commands = desk.open()
    for number, issued_ms in enumerate([NOW_MS, NOW_MS - 1000, NOW_MS + KEPT_MS]):
        assert read(commands.take(ping(number, at_ms=issued_ms))).state == "ok"
        desk.now_s += KEPT_MS / 1000 + 1
    assert "forgotten" in read(commands.take(ping(0))).reason


def test_a_command_at_work_never_leaves(desk: Desk) -> None:
    work = Recalibrate(id=transaction(0, "aaaa"), source="owner")
    desk.answer = lambda c: Outcome(state="ok", result=Recalibration(guard_digest=None), final=False)
    commands = desk.open(kept=2)
    accepted = commands.take(work)
    desk.answer = lambda _: alive()
    desk.now_s += 2 * KEPT_MS / 1000
    for n in range(10):
        commands.take(ping(n, at_ms=NOW_MS + n))
    assert commands.take(work) == accepted


def test_an_id_from_far_ahead_cannot_bar_the_ids_that_follow(desk: Desk) -> None:
    commands = desk.open(kept=1)
    for n in range(3):
        assert "ahead" in read(commands.take(ping(n, at_ms=2**48 - 1))).reason
    assert read(commands.take(ping(9))).state == "ok"


@settings(max_examples=40, deadline=None)
@given(
    steps=st.lists(
        st.one_of(
            st.tuples(st.just("take"), st.integers(0, 25)),
            st.tuples(st.just("clock"), st.integers(-2 * KEPT_MS, 2 * KEPT_MS)),
            st.tuples(st.just("restart"), st.just(0)),
        ),
        max_size=60,
    ),
    times=st.lists(st.integers(-2 * KEPT_MS, KEPT_MS), min_size=26, max_size=26),
)
def test_no_id_is_executed_twice_whatever_comes_and_however_the_clock_jumps(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int]], times: list[int]
) -> None:
    desk = Desk(tmp_path_factory.mktemp("desk"))
    commands = desk.open(kept=3)
    for what, value in steps:
        if what == "take":
            commands.take(ping(value, at_ms=NOW_MS + times[value]))
        elif what == "clock":
            desk.now_s = (NOW_MS + value) / 1000
        else:
            commands = desk.open(kept=3)
    desk.close()
    assert not [one for one, count in Counter(desk.executed).items() if count > 1]


CHILD = """
import os, signal, sys, time
from pathlib import Path
from edgeguard.agent.commands import Commands, Outcome
from edgeguard.contract.messages import Alive, Ping, transaction

folder, when, first = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
executed = os.open(folder / "executed", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
answered = os.open(folder / "answered", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

def ping(command):
    os.write(executed, (command.id + "\\n").encode())
    if when == "executing":
        os.kill(os.getpid(), signal.SIGKILL)
    return Outcome(state="ok", result=Alive(boot="00000000000000aa", session=os.getpid(), uptime_s=time.monotonic()))

commands = Commands(folder / "commands.sqlite", {"ping": ping}, per_minute=1_000_000, clock=lambda: 1_790_000_000.0)
print("ready", flush=True)
for number in range(first, first + 100_000):
    answer = commands.take(Ping(id=transaction(1_790_000_000_000 + number, "aaaa")))
    if when == "answering":
        os.write(answered, answer.payload)
        os.kill(os.getpid(), signal.SIGKILL)
    os.write(answered, answer.payload + b"\\n")
"""


def run_until_killed(folder: Path, when: str, first: int = 0, *, after: int | None = None) -> None:
    """Run a child that ends itself at a moment, or is ended a random time after so many executions more."""
    before = executions(folder)
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(folder), when, str(first)], stdout=subprocess.PIPE)
    assert child.stdout is not None and child.stdout.readline() == b"ready\n"
    if after is not None:
        wait_until(lambda: len(executions(folder)) >= len(before) + after, f"{after} executions")
        time.sleep(random.Random(after).uniform(0, 0.02))
        child.kill()
    assert child.wait(30) == -signal.SIGKILL
    child.stdout.close()


def executions(folder: Path) -> list[str]:
    path = folder / "executed"
    return path.read_text().split() if path.exists() else []


def test_killed_between_begun_and_reply_it_is_answered_as_interrupted_and_never_executed_again(
    tmp_path: Path, desk: Desk
) -> None:
    run_until_killed(tmp_path, "executing")
    command = Ping(id=transaction(NOW_MS, "aaaa"))
    assert executions(tmp_path) == [command.id]
    first = desk.open().take(command)
    assert (read(first).state, read(first).reason) == ("failed", "interrupted, not repeated")
    assert desk.open().take(command) == first
    assert desk.executed == []


def test_killed_between_the_stored_reply_and_sending_it_the_same_bytes_are_sent(tmp_path: Path, desk: Desk) -> None:
    run_until_killed(tmp_path, "answering")
    stored = (tmp_path / "answered").read_bytes()
    answer = desk.open().take(Ping(id=transaction(NOW_MS, "aaaa")))
    assert answer is not None and answer.payload == stored
    assert desk.executed == []


def test_killed_at_any_moment_no_id_is_executed_twice_and_no_reply_changes(tmp_path: Path) -> None:
    for after in (5, 9, 6, 7):
        # Each process but the first repeats the last commands of the one before it.
        run_until_killed(tmp_path, "never", max(0, len(executions(tmp_path)) - 5), after=after)
    assert max(Counter(executions(tmp_path)).values()) == 1
    replies: dict[str, list[bytes]] = {}
    for line in (tmp_path / "answered").read_bytes().split(b"\n"):
        if line.endswith(b"}"):
            replies.setdefault(decode(PingReply, line).id, []).append(line)
    assert len(replies) > 20 and any(len(same) > 1 for same in replies.values())
    assert all(len(set(same)) == 1 for same in replies.values())


def not_a_database(path: Path) -> None:
    path.write_bytes(b"this is not a database, but it is long enough to look at" * 40)


def a_newer_version(path: Path) -> None:
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 99")


@pytest.mark.parametrize("spoil", [not_a_database, Path.mkdir, a_newer_version])
def test_a_store_that_cannot_be_used_is_named_in_one_line(desk: Desk, spoil: Callable[[Path], None]) -> None:
    spoil(desk.path)
    with pytest.raises(ConfigError, match=r"commands .*commands\.sqlite; got .*expected") as caught:
        desk.open()
    assert "\n" not in str(caught.value)


def test_a_command_that_cannot_be_stored_as_begun_is_not_executed(desk: Desk) -> None:
    commands = desk.open()
    with sqlite3.connect(desk.path) as other:
        other.execute("CREATE TRIGGER full BEFORE INSERT ON commands BEGIN SELECT RAISE(ABORT, 'disk full'); END")
    with pytest.raises(ConfigError, match="disk full"):
        commands.take(ping())
    assert desk.executed == []


def test_a_reply_that_cannot_be_stored_is_not_sent_and_the_command_not_repeated(desk: Desk) -> None:
    commands = desk.open()
    with sqlite3.connect(desk.path) as other:
        other.execute("CREATE TRIGGER full BEFORE UPDATE ON commands BEGIN SELECT RAISE(ABORT, 'disk full'); END")
    with pytest.raises(ConfigError, match="disk full"):
        commands.take(ping())
    assert commands.take(ping()) is None
    with sqlite3.connect(desk.path) as other:
        other.execute("DROP TRIGGER full")
    assert "interrupted" in read(desk.open().take(ping())).reason
    assert desk.executed == [ping().id]
