"""systemd: notifications that never wait, a watchdog that only work feeds, and a unit that is hardened and well-formed.

The watchdog's tests play systemd's part with a real socket and a real child process.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeguard import settings as agents
from edgeguard.errors import ConfigError
from firmware_bridge.systemd import CREDENTIAL, GROUP, KEY_CREDENTIAL, Notifier, Settings, Watchdog, unit
from tests.simulators import needs

SETTINGS = Settings(python=Path("/bin/sh"), config=Path("/etc/edgeguard/agent.toml"))


# Notifications


@pytest.fixture(params=["file", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[socket.socket, str]]:
    """The service manager's end, and what NOTIFY_SOCKET says of it."""
    name = str(tmp_path / "notify") if request.param == "file" else f"@edgeguard-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
        end.bind(name.replace("@", "\0") if request.param == "abstract" else name)
        end.setblocking(False)
        yield end, name


def test_each_message_is_one_datagram_of_the_protocol(manager: tuple[socket.socket, str]) -> None:
    end, name = manager
    notifier = Notifier({"NOTIFY_SOCKET": name})
    assert all((notifier.ready(), notifier.status("42 inputs"), notifier.watchdog(), notifier.stopping()))
    assert [end.recv(100) for _ in range(4)] == [b"READY=1", b"STATUS=42 inputs", b"WATCHDOG=1", b"STOPPING=1"]
    notifier.close()


def test_a_status_cannot_smuggle_in_another_message(manager: tuple[socket.socket, str]) -> None:
    end, name = manager
    notifier = Notifier({"NOTIFY_SOCKET": name})
    notifier.status("model \udcff\nWATCHDOG=1\r\nMAINPID=1")
    assert end.recv(100) == b"STATUS=model ? WATCHDOG=1 MAINPID=1"
    notifier.close()


@pytest.mark.parametrize("environment", [{}, {"NOTIFY_SOCKET": ""}])
def test_without_a_manager_nothing_is_sent(environment: dict[str, str]) -> None:
    notifier = Notifier(environment)
    assert not notifier.ready()
    notifier.close()


@pytest.mark.parametrize("name", ["/nowhere/notify", "/" + "long" * 100, "relative", "vsock:2:1", "/a\0b", "@"])
def test_an_address_where_nobody_listens_does_not_raise(name: str) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": name})
    assert not notifier.ready()
    notifier.close()


@pytest.mark.timeout(30)
def test_a_manager_that_does_not_read_does_not_block(manager: tuple[socket.socket, str]) -> None:
    end, name = manager
    notifier = Notifier({"NOTIFY_SOCKET": name})
    started = time.monotonic()
    sent = sum(notifier.watchdog() for _ in range(10_000))
    assert sent < 10_000
    assert time.monotonic() - started < 5
    end.recv(100)
    assert notifier.watchdog(), "there is room again"
    notifier.close()


# The watchdog's rule


@pytest.mark.parametrize(
    ("environment", "period_s"),
    [
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "7"}, 30.0),
        ({"WATCHDOG_USEC": "500000"}, 0.5),
        ({}, None),
        ({"WATCHDOG_PID": "7"}, None),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "8"}, None),  # meant for a parent or a sibling
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": ""}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "-1"}, None),
        ({"WATCHDOG_USEC": "30s"}, None),
        ({"WATCHDOG_USEC": "9" * 40}, None),
    ],
)
def test_the_watchdog_is_the_one_that_systemd_set_for_this_process(
    environment: dict[str, str], period_s: float | None
) -> None:
    watchdog = Watchdog.from_environment(environment, pid=7)
    assert (watchdog and watchdog.period_s) == period_s


def test_a_loop_that_has_not_inferred_yet_owes_a_self_test() -> None:
    watchdog = Watchdog(period_s=30)
    assert watchdog.self_test_due(now=5.0)
    assert watchdog.wait_s(now=5.0) == 0
    assert watchdog.completed(now=5.0)
    assert not watchdog.self_test_due(now=5.0)


def test_a_busy_loop_feeds_a_few_times_per_period_and_runs_no_self_test() -> None:
    watchdog = Watchdog(period_s=30)
    fed = 0
    for step in range(3000):  # five minutes of 100 ms each
        fed += watchdog.completed(now=step / 10)
        assert not watchdog.self_test_due(now=step / 10)
    assert fed == 5 * 60 / 30 * 4


def test_a_self_test_that_fails_stays_due_and_feeds_nothing() -> None:
    watchdog = Watchdog(period_s=30)
    watchdog.completed(now=0.0)
    assert [watchdog.self_test_due(now) for now in (9.0, 10.0, 11.0, 3600.0)] == [False, True, True, True]


def test_an_hour_without_inputs_is_an_hour_of_rare_self_tests_and_no_late_feed() -> None:
    watchdog = Watchdog(period_s=30)
    now, tests, fed_at = 0.0, 0, 0.0
    while now < 3600:
        now += watchdog.wait_s(now)
        assert watchdog.self_test_due(now)
        now, tests = now + 0.05, tests + 1
        if watchdog.completed(now):
            assert now - fed_at < 30
            fed_at = now
    assert tests == pytest.approx(360, abs=3)


@given(
    st.lists(
        st.tuples(st.floats(0, 100), st.floats(0.001, 12)),  # seconds until the next input comes, and that it takes
        min_size=1,
        max_size=60,
    )
)
def test_no_pattern_of_inputs_makes_a_loop_late_whose_inferences_are_fast_enough(
    inputs: list[tuple[float, float]],
) -> None:
    watchdog = Watchdog(period_s=30)
    now = fed_at = 0.0
    for gap, duration in inputs:
        arrives = now + gap
        while True:
            wait = watchdog.wait_s(now)
            is_input = arrives <= now + wait
            now = max(now, arrives) if is_input else now + wait
            assert is_input or watchdog.self_test_due(now)
            now += duration
            if watchdog.completed(now):
                assert now - fed_at < 30
                fed_at = now
            if is_input:
                break


# The watchdog against a child process

LOOP = """
import os, sys, threading, time
from firmware_bridge.systemd import Notifier, Watchdog

notifier = Notifier(os.environ)
watchdog = Watchdog.from_environment(os.environ, os.getpid())


def infer():
    time.sleep(0.01)
    if watchdog.completed(time.monotonic()):
        notifier.watchdog()


def other_thread():
    while True:  # a thread that lives on proves nothing about the loop
        notifier.status(f"alive at {time.monotonic()}")
        time.sleep(0.05)


notifier.ready()
threading.Thread(target=other_thread, daemon=True).start()
started = time.monotonic()
while True:
    now = time.monotonic()
    if sys.argv[1] == "wedges" and now - started > 1.5:
        threading.Event().wait()
    if sys.argv[1] == "busy" or watchdog.self_test_due(now):
        infer()
    else:
        time.sleep(watchdog.wait_s(now))
"""
PERIOD_S = 1.0


class Ending(NamedTuple):
    """How a supervised child fared."""

    killed_at: float | None
    feeds: int


def supervised(behaviour: str, folder: Path, *, seconds: float) -> Ending:
    """What systemd does with Type=notify: SIGABRT once no WATCHDOG=1 came for WatchdogSec after READY=1."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
        end.bind(str(folder / "notify"))
        environment = os.environ | {
            "NOTIFY_SOCKET": str(folder / "notify"),
            "WATCHDOG_USEC": str(int(PERIOD_S * 1e6)),
            "PYTHONPATH": str(Path(__file__).parents[2]),
        }
        shell = 'export WATCHDOG_PID=$$; exec "$@"'
        child = subprocess.Popen(["/bin/sh", "-c", shell, "sh", sys.executable, "-c", LOOP, behaviour], env=environment)
        try:
            end.settimeout(30)
            while end.recv(200) != b"READY=1":
                pass
            started = fed_at = time.monotonic()
            feeds = 0
            while time.monotonic() - started < seconds:
                if time.monotonic() - fed_at >= PERIOD_S:
                    child.send_signal(signal.SIGABRT)
                    assert child.wait(10) == -signal.SIGABRT
                    return Ending(time.monotonic() - started, feeds)
                end.settimeout(max(0.001, fed_at + PERIOD_S - time.monotonic()))
                try:
                    message = end.recv(200)
                except TimeoutError:
                    continue
                if message == b"WATCHDOG=1":
                    fed_at, feeds = time.monotonic(), feeds + 1
            assert child.poll() is None
            return Ending(None, feeds)
        finally:
            child.kill()
            child.wait()


def test_a_loop_that_wedges_is_killed_within_two_periods_though_its_threads_live_on(tmp_path: Path) -> None:
    ending = supervised("wedges", tmp_path, seconds=10)
    assert ending.killed_at is not None
    assert 1.5 < ending.killed_at < 1.5 + 2 * PERIOD_S
    assert ending.feeds > 1


@pytest.mark.parametrize(("behaviour", "periods"), [("idle", 4), ("busy", 2)])
def test_a_loop_that_works_is_not_killed_and_feeds_a_few_times_per_period(
    behaviour: str, periods: int, tmp_path: Path
) -> None:
    ending = supervised(behaviour, tmp_path, seconds=periods * PERIOD_S)
    assert ending.killed_at is None
    assert periods <= ending.feeds <= 4 * periods + 1


# The unit file


def lines(settings: Settings) -> list[str]:
    return unit(settings).splitlines()


def analyze(folder: Path, settings: Settings, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run systemd-analyze on the unit of these settings."""
    program = needs.program("systemd-analyze", "systemd")
    path = folder / "edgeguard.service"
    path.write_text(unit(settings))
    return subprocess.run([program, *arguments, str(path)], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("camera", "network"), [(False, False), (False, True), (True, False), (True, True)])
def test_the_unit_is_hardened(camera: bool, network: bool, tmp_path: Path) -> None:
    helped = subprocess.run(
        [needs.program("systemd-analyze", "systemd"), "--help"], capture_output=True, text=True, check=True
    )
    if "--offline" not in helped.stdout:
        needs.missing("systemd-analyze security --offline", "it came with systemd 250")
    settings = dataclasses.replace(SETTINGS, camera=camera, network=network)
    done = analyze(tmp_path, settings, "security", "--offline=true")
    found = re.search(r"Overall exposure level for edgeguard.service: ([\d.]+)", done.stdout)
    assert found, done.stderr
    assert float(found[1]) <= 2.0


def test_the_unit_passes_systemds_own_check_but_for_what_older_versions_do_not_know(tmp_path: Path) -> None:
    settings = dataclasses.replace(
        SETTINGS,
        config=Path("/etc/edgeguard/our agent 100%.toml"),
        camera=True,
        network=False,
        password_file=Path("/etc/edgeguard/pass word"),
        key_file=Path("/etc/edgeguard/own.key"),
        writable=(Path("/srv/in box"),),
    )
    done = analyze(tmp_path, settings, "verify")
    complaints = [line for line in done.stderr.splitlines() if not re.search("Restart(Steps|MaxDelaySec)", line)]
    assert (done.returncode, complaints) == (0, [])


@pytest.mark.parametrize("name", ["plain", "with space", "100%i", "$HOME", "a;b", "über", "#x"])
def test_systemd_reads_the_path_that_was_meant(name: str, tmp_path: Path) -> None:
    python = Path(f"/srv/nowhere/{name}/python")
    done = analyze(tmp_path, dataclasses.replace(SETTINGS, python=python), "verify")
    assert f"Command {python} is not executable: No such file or directory" in done.stderr


def test_paths_are_escaped_by_the_rules_of_the_line_that_they_stand_in() -> None:
    found = lines(
        Settings(
            python=Path("/opt/my venv/bin/python"),
            config=Path("/etc/100% ours/$agent.toml"),
            password_file=Path("/etc/pass %i word"),
            writable=(Path("/srv/in box"), Path("/srv/100%")),
        )
    )
    assert 'ExecStart=":/opt/my venv/bin/python" -m edgeguard.agent --config "/etc/100%% ours/$agent.toml"' in found
    assert f"LoadCredential={CREDENTIAL}:/etc/pass %%i word" in found
    assert 'ReadWritePaths="-/srv/in box"' in found
    assert "ReadWritePaths=-/srv/100%%" in found


@pytest.mark.parametrize(
    "path",
    [
        "/etc/a\nExecStartPost=/bin/evil",
        "/etc/a\rb",
        "/etc/a\x00b",
        "/etc/a\u2028b",
        '/etc/a"b',
        "/etc/a'b",
        "/etc/a\\",
        "/etc/a ",
        "/etc/../a",
        "etc/a",
        "/etc/\udcff",
    ],
)
@pytest.mark.parametrize("key", ["python", "config", "password_file", "key_file", "writable"])
def test_a_path_that_no_line_can_hold_is_refused(key: str, path: str) -> None:
    with pytest.raises(ConfigError, match="unit: path"):
        unit(_with(key, Path(path)))


@pytest.mark.parametrize("folder", ["/home/pi", "/root", "/tmp", "/var/tmp", "/run/user/1000"])
@pytest.mark.parametrize("key", ["python", "config", "writable"])
def test_a_path_that_the_sandbox_hides_is_refused(key: str, folder: str) -> None:
    with pytest.raises(ConfigError, match="hidden from the service"):
        unit(_with(key, Path(folder) / "x"))


@pytest.mark.parametrize(("key", "name"), [("password_file", CREDENTIAL), ("key_file", KEY_CREDENTIAL)])
def test_password_and_key_may_lie_where_only_root_looks(key: str, name: str) -> None:
    assert f"LoadCredential={name}:/root/secret" in lines(_with(key, Path("/root/secret")))


def test_the_agent_looks_for_its_credentials_under_the_units_names() -> None:
    assert (agents.CREDENTIAL, agents.KEY_CREDENTIAL) == (CREDENTIAL, KEY_CREDENTIAL)


def _with(key: str, path: Path) -> Settings:
    return dataclasses.replace(SETTINGS, **{key: (path,) if key == "writable" else path})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "settings",
    [
        dataclasses.replace(SETTINGS, watchdog_s=0),
        dataclasses.replace(SETTINGS, memory_max_mib=-1),
        dataclasses.replace(SETTINGS, cpu_quota_percent=0),
        dataclasses.replace(SETTINGS, state_directory="../etc"),
        dataclasses.replace(SETTINGS, runtime_directory="a b"),
    ],
)
def test_a_value_that_means_nothing_is_refused(settings: Settings) -> None:
    with pytest.raises(ConfigError, match="unit: "):
        unit(settings)


def test_the_dynamic_user_is_in_the_sockets_group_and_is_not_named_like_it() -> None:
    found = lines(SETTINGS)
    assert "DynamicUser=yes" in found
    assert f"SupplementaryGroups={GROUP}" in found
    assert [line for line in found if line.startswith("User=")] != [f"User={GROUP}"]


def test_only_a_unit_with_a_camera_opens_devices() -> None:
    with_camera, without = lines(dataclasses.replace(SETTINGS, camera=True)), lines(SETTINGS)
    assert "PrivateDevices=yes" in without
    assert "PrivateDevices=yes" not in with_camera
    assert "DeviceAllow=char-video4linux rw" in with_camera
    assert not any(line.startswith("DeviceAllow") for line in without)


def test_only_a_unit_with_microcontrollers_opens_serial_ports() -> None:
    with_serial, without = lines(dataclasses.replace(SETTINGS, serial=True)), lines(SETTINGS)
    assert "PrivateDevices=yes" not in with_serial
    assert {"DeviceAllow=char-ttyACM rw", "SupplementaryGroups=dialout"} < set(with_serial) - set(without)
    assert "DeviceAllow=char-video4linux rw" not in with_serial


PROGRAM = """
import ctypes, mmap, sys
import numpy as np

PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN = 65, 1
assert ctypes.CDLL(None, use_errno=True).prctl(PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN, 0, 0, 0) == 0
try:
    mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
except PermissionError:
    pass
else:
    raise SystemExit("memory could be made writable and executable")
interpreter = __import__(sys.argv[1], fromlist=["Interpreter"]).Interpreter(model_path=sys.argv[2])
interpreter.allocate_tensors()
(wanted,) = interpreter.get_input_details()
interpreter.set_tensor(wanted["index"], np.ones(wanted["shape"], wanted["dtype"]))
interpreter.invoke()
print(interpreter.get_tensor(interpreter.get_output_details()[0]["index"]).ravel().tolist())
"""


@pytest.mark.parametrize("model", ["mlperf_tiny_resnet8_int8.tflite", "mlperf_tiny_kws_float32.tflite"])
@pytest.mark.parametrize(
    ("runtime", "distribution", "until"),
    [
        ("ai_edge_litert.interpreter", "ai-edge-litert", (3, 13)),
        ("tflite_runtime.interpreter", "tflite-runtime", (3, 11)),
    ],
)
def test_a_runtime_infers_under_memory_deny_write_execute(
    runtime: str, distribution: str, until: tuple[int, int], model: str
) -> None:
    assert "MemoryDenyWriteExecute=yes" in lines(SETTINGS)
    path = needs.third_party_model(model)
    needs.python_module(runtime, distribution, until=until)
    if ctypes.CDLL(None).prctl(66, 0, 0, 0, 0) < 0:  # PR_GET_MDWE
        pytest.skip("the kernel is older than 6.3, which brought the rule that this test runs under")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, runtime, str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)) > 1
