"""The repair worker as a child process: its progress, its result, and its ends."""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec
import pytest

from edgeguard.hub.cases import Dormant, Job, Progress, Result
from edgeguard.hub.worker import Failed, Worker, finished
from edgeguard.repair import case
from tests.simulators.fleet import wait_until

SAY = "import json, sys, time, os\ndef say(**m): print(json.dumps(m), flush=True)\njob = json.load(open(sys.argv[1]))\n"
RESULT = '{"verdict": "confirmed", "gate_passed": True, "output": "o.tflite", "summary": {"a": 1}}'


def job(folder: Path) -> Job:
    return Job(
        guarded="g", keras="k", data="digits", label=7, flagged_mean=(1.5,), unflagged_mean=(), unflagged_std=(),
        out_dir=str(folder / "case"), seed=3,
    )  # fmt: skip


def start(folder: Path, script: str, *, deadline_s: float = 1e12) -> Worker:
    path = folder / "worker.py"
    path.write_text(SAY + script)
    return Worker((sys.executable, str(path)), job(folder), deadline_s=deadline_s)


def hear_all(worker: Worker) -> list[Progress | Result | Failed]:
    heard: list[Progress | Result | Failed] = []

    def ended() -> bool:
        heard.extend(worker.poll(0.0))
        return bool(heard) and not isinstance(heard[-1], Progress)

    wait_until(ended)
    return heard


def test_progress_comes_in_order_and_the_result_last(tmp_path: Path) -> None:
    script = f"""
say(stage="confirming", text="inverting", done=1, total=2)
say(stage="repairing", text="pruning", done=job["label"], total=9)
say(result={RESULT})
"""
    assert hear_all(start(tmp_path, script)) == [
        Progress(stage="confirming", text="inverting", done=1, total=2),
        Progress(stage="repairing", text="pruning", done=7, total=9),
        Result(verdict="confirmed", gate_passed=True, output="o.tflite", summary={"a": 1}),
    ]


def test_a_result_that_lies_in_the_folder_is_taken(tmp_path: Path) -> None:
    script = f'json.dump({RESULT}, open(job["out_dir"] + "/result.json", "w"))'
    (last,) = hear_all(start(tmp_path, script))
    assert isinstance(last, Result)
    assert finished(tmp_path / "case") == last


def test_other_lines_are_ignored(tmp_path: Path) -> None:
    script = f'print("hello"); print("{{"); say(stage="dancing"); say(result={{}}); say(result={RESULT})'
    assert len(hear_all(start(tmp_path, script))) == 1


@pytest.mark.parametrize(
    ("script", "word"),
    [
        ("sys.exit('no clean data')", "no clean data"),
        ("sys.exit(0)", "exit status 0"),
        ("os.kill(os.getpid(), 9)", "exit status -9"),
        ("say(result={'verdict': 'splendid'})", "exit status 0"),
        ('open(job["out_dir"] + "/result.json", "w").write("{")', "exit status 0"),
    ],
)
def test_an_end_without_a_result_is_a_failure_with_its_last_words(tmp_path: Path, script: str, word: str) -> None:
    (last,) = hear_all(start(tmp_path, script))
    assert isinstance(last, Failed)
    assert word in last.reason


def test_an_exit_that_says_the_job_cannot_be_done_is_final_and_gives_its_reason(tmp_path: Path) -> None:
    script = 'print("first\\ndata x: got nothing", file=sys.stderr); sys.exit(2)'
    assert hear_all(start(tmp_path, script)) == [Failed("data x: got nothing", final=True)]


def test_a_crash_is_not_final(tmp_path: Path) -> None:
    (last,) = hear_all(start(tmp_path, "sys.exit('out of memory')"))
    assert isinstance(last, Failed)
    assert not last.final


def test_a_program_that_does_not_exist_is_an_error_of_the_system(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nosuch"):
        Worker(("nosuch-program",), job(tmp_path), deadline_s=0)


def test_a_worker_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    worker = start(tmp_path, "time.sleep(600)", deadline_s=5.0)
    assert worker.poll(4.9) == []
    (last,) = worker.poll(5.1)
    assert isinstance(last, Failed)


def test_stopping_ends_what_the_worker_started_too(tmp_path: Path) -> None:
    script = """
import subprocess
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open(job["out_dir"] + "/pid.tmp", "w").write(str(child.pid))
os.rename(job["out_dir"] + "/pid.tmp", job["out_dir"] + "/pid")
time.sleep(600)
"""
    worker = start(tmp_path, script)
    pid = tmp_path / "case" / "pid"
    wait_until(pid.exists)
    worker.stop()
    wait_until(lambda: _state(int(pid.read_text())) in ("", "Z"))


def test_more_output_than_a_pipe_holds_does_not_block_it(tmp_path: Path) -> None:
    script = f'for i in range(5000): say(stage="confirming", text="x" * 100, done=i)\nsay(result={RESULT})'
    heard = hear_all(start(tmp_path, script))
    assert len(heard) == 5001


def test_the_job_says_all_that_the_worker_needs(tmp_path: Path) -> None:
    hear_all(start(tmp_path, "sys.exit()"))
    content = (tmp_path / "case" / "job.json").read_bytes()
    assert msgspec.json.decode(content, type=Job) == job(tmp_path)


def test_the_child_understands_what_the_hub_writes_and_the_hub_what_the_child_says(tmp_path: Path) -> None:
    hint = Dormant(layer="relu2", channels=(3,))
    ours = msgspec.structs.replace(
        job(tmp_path), channels=(1, 2), dormant=(hint,), stop_after="inspect", resume="r"
    )  # fmt: skip
    theirs = msgspec.json.decode(msgspec.json.encode(ours), type=case.Job)
    assert msgspec.to_builtins(theirs) == msgspec.to_builtins(ours)
    said = case.Result(verdict="confirmed", repaired=False, gate_passed=False, summary={"finding": {"reason": "why"}})
    heard = msgspec.json.decode(msgspec.json.encode(said), type=Result)
    assert msgspec.to_builtins(heard) == msgspec.to_builtins(said)
    assert heard.reason == "why"


def _state(pid: int) -> str:
    """The state letter of a process, empty when there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return ""
