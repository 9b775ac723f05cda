"""What a process uses: on this machine, and from files as the kernel writes them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from firmware_bridge.resources import Resources, read

KIB, MIB = 1 << 10, 1 << 20
TICKS = os.sysconf("SC_CLK_TCK")
SLICE, UNIT = "sys/fs/cgroup/system.slice", "sys/fs/cgroup/system.slice/edgeguard.service"

SMAPS = """\
555555554000-7ffffffff000 ---p 00000000 00:00 0                          [rollup]
Rss:               62208 kB
Pss:               51117 kB
Pss_Anon:          27001 kB
Anonymous:         27648 kB
Swap:                  0 kB
"""
STATUS = "Name:\tpython3\nVmPeak:\t  812340 kB\nVmRSS:\t   62100 kB\nRssAnon:\t   27500 kB\nRssFile:\t   34600 kB\n"

FILES = {
    "proc/self/smaps_rollup": SMAPS,
    "proc/self/status": STATUS,
    "proc/self/stat": f"42 (odd) name) S 1 42 42 0 -1 0 9 0 0 0 {7 * TICKS} {3 * TICKS} 5 5 20 0 4 0 99 0 0\n",
    "proc/self/cgroup": "0::/system.slice/edgeguard.service\n",
    "proc/loadavg": "0.52 0.58 0.59 1/389 31337\n",
    f"{UNIT}/memory.max": "268435456\n",
    f"{UNIT}/memory.current": "73400320\n",
    f"{UNIT}/cpu.max": "50000 100000\n",
    f"{UNIT}/memory.pressure": "some avg10=1.25 avg60=0.40 avg300=0.11 total=99\nfull avg10=0.50 avg60=0 total=9\n",
    f"{UNIT}/cpu.pressure": "some avg10=12.00 avg60=9.00 avg300=7.00 total=99\n",
    f"{SLICE}/memory.max": "max\n",
    f"{SLICE}/cpu.max": "max 100000\n",
}


def tree(root: Path, files: dict[str, str | bytes | None]) -> Path:
    for name, content in {**FILES, **files}.items():
        if content is not None:
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def test_a_limited_service_knows_what_it_uses_and_may_use(tmp_path: Path) -> None:
    assert read(tree(tmp_path, {})) == Resources(
        resident_bytes=62208 * KIB,
        anonymous_bytes=27648 * KIB,
        cpu_seconds=10.0,
        memory_limit_bytes=256 * MIB,
        memory_used_bytes=70 * MIB,
        cpu_limit=0.5,
        memory_pressure=0.0125,
        cpu_pressure=0.12,
        load=0.52,
    )


def test_a_system_that_says_nothing_is_unknown_in_everything(tmp_path: Path) -> None:
    found = read(tmp_path)
    assert {getattr(found, name) for name in Resources.__dataclass_fields__} == {None}


def test_no_limit_is_none(tmp_path: Path) -> None:
    found = read(tree(tmp_path, {f"{UNIT}/memory.max": "max\n", f"{UNIT}/cpu.max": "max 100000\n"}))
    assert (found.memory_limit_bytes, found.cpu_limit) == (None, None)
    assert found.memory_used_bytes == 70 * MIB


def test_a_tighter_limit_of_a_parent_counts(tmp_path: Path) -> None:
    found = read(tree(tmp_path, {f"{SLICE}/memory.max": "134217728\n", f"{SLICE}/cpu.max": "150000 100000\n"}))
    assert (found.memory_limit_bytes, found.cpu_limit) == (128 * MIB, 0.5)


def test_a_container_finds_its_limits_at_the_root_of_what_it_sees(tmp_path: Path) -> None:
    files = {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "1048576\n", "sys/fs/cgroup/cpu.max": "1 4\n"}
    found = read(tree(tmp_path, dict(files)))
    assert (found.memory_limit_bytes, found.cpu_limit) == (MIB, 0.25)


@pytest.mark.parametrize(
    "line", ["0::/../other.service\n", "9:memory:/a\n", "", "0::/gone.service (deleted)\n", "0::/system.slice/\0\n"]
)
def test_a_group_that_cannot_be_seen_is_unknown(tmp_path: Path, line: str) -> None:
    found = read(tree(tmp_path, {"proc/self/cgroup": line, f"{SLICE}/memory.max": None}))
    assert (found.memory_limit_bytes, found.memory_used_bytes, found.cpu_pressure) == (None, None, None)


def test_memory_comes_from_the_status_where_the_sums_may_not_be_read(tmp_path: Path) -> None:
    found = read(tree(tmp_path, {"proc/self/smaps_rollup": None}))
    assert (found.resident_bytes, found.anonymous_bytes) == (62100 * KIB, 27500 * KIB)


@pytest.mark.parametrize(
    ("field", "file", "content"),
    [
        ("memory_limit_bytes", f"{UNIT}/memory.max", "9223372036854771712\n"),
        ("memory_limit_bytes", f"{UNIT}/memory.max", "-1\n"),
        ("memory_used_bytes", f"{UNIT}/memory.current", b"\xff"),
        ("cpu_limit", f"{UNIT}/cpu.max", "50000 0\n"),
        ("cpu_limit", f"{UNIT}/cpu.max", "50000\n"),
        ("memory_pressure", f"{UNIT}/memory.pressure", "some avg10=250.00 avg60=0.00\n"),
        ("cpu_pressure", f"{UNIT}/cpu.pressure", ""),
        ("cpu_seconds", "proc/self/stat", "42 (python3) S 1 42\n"),
        ("cpu_seconds", "proc/self/stat", "42 (python3) S 1 42 42 0 -1 0 9 0 0 0 -7 3 5 5\n"),
        ("load", "proc/loadavg", "high\n"),
    ],
)
def test_a_file_that_cannot_be_is_unknown(tmp_path: Path, field: str, file: str, content: str | bytes) -> None:
    assert getattr(read(tree(tmp_path, {file: content})), field) is None


@settings(deadline=None)
@given(file=st.sampled_from(sorted(FILES)), content=st.binary(max_size=100) | st.from_regex(rb"\A(max|\d+) \d{1,30}\Z"))
def test_no_content_of_any_file_raises(tmp_path_factory: pytest.TempPathFactory, file: str, content: bytes) -> None:
    found = read(tree(tmp_path_factory.mktemp("root"), {file: content}))
    values = [getattr(found, name) for name in Resources.__dataclass_fields__]
    assert all(value is None or value >= 0 for value in values)


BUSY = """
import os, time
from firmware_bridge.resources import read

before = read()
kept = bytearray(os.urandom(16 << 20))
started = time.process_time()
while time.process_time() - started < 0.2:
    sum(kept[:1000])
after = read()
print(after.anonymous_bytes - before.anonymous_bytes, after.cpu_seconds - before.cpu_seconds)
"""


def test_a_process_uses_more_memory_and_time_once_it_did_something() -> None:
    # One of its own: in this one, memory that an earlier test has freed would be taken again.
    done = subprocess.run([sys.executable, "-c", BUSY], capture_output=True, text=True, check=True)
    more_bytes, more_seconds = done.stdout.split()
    assert int(more_bytes) > 12 * MIB
    assert 0.1 < float(more_seconds) < 10


def test_another_process_is_looked_at_by_its_number_and_unknown_once_it_is_gone() -> None:
    program = [sys.executable, "-c", "print('up', flush=True); input()"]
    with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as other:
        assert other.stdout is not None
        other.stdout.readline()
        assert (read(pid=other.pid).resident_bytes or 0) > MIB
    assert read(pid=other.pid).resident_bytes is None
