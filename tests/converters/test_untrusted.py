"""Whatever a hostile file does to a child process becomes one error here, and this process goes on."""

from __future__ import annotations

import os
import resource
import signal
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from converters import structure, untrusted
from converters.untrusted import Child, Limits, TensorFacts, UntrustedError, probe
from edgeguard.detection import runtime
from edgeguard.errors import ConfigError, ModelError
from tests.simulators.attacked import Attacked

# Functions that do in a child what hostile bytes could make a native runtime do.
HOSTILE = """
import ctypes, os, resource, signal, sys, time

def killed(content, argument): os.kill(os.getpid(), signal.SIGKILL)
def crashes(content, argument): ctypes.string_at(0)
def aborts(content, argument): os.abort()
def exits(content, argument): os._exit(7)
def leaves(content, argument): sys.exit(7)
def sleeps(content, argument): time.sleep(600)
def stops(content, argument): os.kill(os.getpid(), signal.SIGSTOP)
def loops(content, argument):
    while True: pass
def grows(content, argument):
    held = []
    while True: held.append(bytearray(1 << 26))
def grows_natively(content, argument):
    calloc = ctypes.CDLL(None).calloc
    calloc.restype = ctypes.c_void_p
    while True: ctypes.memset(calloc(1, 1 << 26), 1, 1 << 26)
def raises(content, argument): raise KeyError("what the bytes said\\non two lines")
def forges(content, argument):
    for number in range(3, 64):
        try: os.write(number, b"\\xff\\xff\\xff\\x7f and more")
        except OSError: pass
    time.sleep(600)
def lies(content, argument): return {"no": "number"}
def floods(content, argument): return "x" * (1 << 22)
def prints(content, argument): print("noise", flush=True); os.write(1, b"more noise"); return 5
def counts(content, argument): return len(content)
def echoes(content, argument): return argument
def process(content, argument): return os.getpid()
def modules(content, argument): return sorted(sys.modules)
def folder(content, argument): return os.getcwd()
def writes(content, argument):
    with open(argument, "wb") as file: file.write(bytes(1 << 24))
def limits(content, argument):
    return [list(resource.getrlimit(r)) for r in (resource.RLIMIT_AS, resource.RLIMIT_CORE)]
"""
SHORT = Limits(memory_bytes=1 << 30, cpu_seconds=20, wall_seconds=2.0)


@pytest.fixture(autouse=True)
def hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The functions above, as the module ``hostile`` of the child."""
    (tmp_path / "hostile.py").write_text(HOSTILE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


@pytest.mark.parametrize(
    ("function", "limits", "kind", "message"),
    [
        ("killed", Limits(), "crashed", r"crashed hostile:killed \(signal 9, SIGKILL\)"),
        ("crashes", Limits(), "crashed", r"\(signal 11, SIGSEGV\)"),
        ("aborts", Limits(), "crashed", r"\(signal 6, SIGABRT\)"),
        ("exits", Limits(), "crashed", r"\(exit code 7\)"),
        ("leaves", Limits(), "crashed", r"\(exit code 7\)"),
        ("forges", Limits(), "crashed", "an answer of hostile:forges that is none"),
        ("floods", Limits(), "crashed", "an answer of hostile:floods that is none"),
        ("lies", Limits(), "crashed", "an answer of hostile:lies that is none"),
        ("sleeps", SHORT, "timed out", "at most 2 s"),
        ("stops", SHORT, "timed out", "at most 2 s"),
        ("loops", SHORT, "timed out", "at most 2 s"),
        ("loops", Limits(cpu_seconds=1), "timed out", "1 s of processor time"),
        ("grows", SHORT, "out of memory", "at most 1024 MiB"),
        ("grows_natively", SHORT, "crashed", r"\(signal 11, SIGSEGV\)"),
    ],
)
def test_an_end_of_the_child_is_one_error_and_the_next_call_works(
    function: str, limits: Limits, kind: str, message: str
) -> None:
    with Child(limits) as child:
        with pytest.raises(UntrustedError, match=message) as caught:
            child.call(f"hostile:{function}", b"bytes", returns=int)
        assert caught.value.kind == kind
        assert "\n" not in str(caught.value)
        assert child.call("hostile:counts", b"bytes", returns=int) == 5


def test_what_a_function_raises_is_a_refusal_and_the_child_lives_on() -> None:
    with Child() as child:
        before = child.call("hostile:process", b"", returns=int)
        with pytest.raises(ModelError, match=r"KeyError.*what the bytes said") as caught:
            child.call("hostile:raises", b"", returns=int)
        assert not isinstance(caught.value, UntrustedError)
        assert child.call("hostile:process", b"", returns=int) == before


def test_what_is_printed_does_not_stand_among_the_answers() -> None:
    with Child() as child:
        assert child.call("hostile:prints", b"", returns=int) == 5
        assert child.call("hostile:echoes", b"", "an argument", returns=str) == "an argument"


def test_a_large_file_reaches_the_child_whole() -> None:
    with Child() as child:
        assert child.call("hostile:counts", bytes(32 << 20), returns=int) == 32 << 20


def test_a_child_that_died_between_two_calls_is_one_error() -> None:
    with Child() as child:
        os.kill(child.call("hostile:process", b"", returns=int), signal.SIGKILL)
        with pytest.raises(UntrustedError, match="SIGKILL"):
            child.call("hostile:counts", bytes(32 << 20), returns=int)
        assert child.call("hostile:counts", b"abc", returns=int) == 3


def test_the_child_has_its_limits_and_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "written"
    with Child(SHORT) as child:
        found = child.call("hostile:limits", b"", returns=list[list[int]])
        assert found == [[SHORT.memory_bytes, SHORT.memory_bytes], [0, 0]]
        with pytest.raises(ModelError, match="OSError"):
            child.call("hostile:writes", b"", str(path), returns=int)
        number = child.call("hostile:process", b"", returns=int)
    assert path.stat().st_size <= 1 << 16
    with pytest.raises(ProcessLookupError):
        os.kill(number, 0)
    assert resource.getrlimit(resource.RLIMIT_AS) != (SHORT.memory_bytes, SHORT.memory_bytes)


def test_the_child_does_not_look_for_modules_where_the_files_lie(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "msgspec.py").write_text("raise SystemExit(9)")
    monkeypatch.chdir(tmp_path / "here")
    with Child() as child:
        assert child.call("hostile:counts", b"abc", returns=int) == 3
        assert Path(child.call("hostile:folder", b"", returns=str)) != Path.cwd()


def test_a_whole_file_runs_on_every_runtime(attacked: Attacked) -> None:
    facts = probe(attacked.conversion.guarded)
    assert facts.runtimes == tuple(n for n in runtime.available() if n != "tensorflow")
    assert facts.refused == {}
    assert facts.inputs == (TensorFacts((1, 8, 8, 1), "int8"),)
    assert [one.shape for one in facts.outputs] == [
        (1, 10),
        (1, 3),
        (1, sum(tap.channels for tap in attacked.conversion.metadata.taps)),
    ]


def test_running_a_file_loads_no_tensorflow(attacked: Attacked) -> None:
    with Child() as child:
        for name in untrusted.runtimes_to_try():
            untrusted.run_on(child, attacked.conversion.bare, name)
        found = child.call("hostile:modules", b"", returns=list[str])
    assert "numpy" in found
    assert {"tensorflow", "keras", "onnx", "edgeguard.hub"}.isdisjoint(found)


def test_tensorflow_is_tried_only_where_it_is_asked_for_or_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "tensorflow" not in untrusted.runtimes_to_try()
    monkeypatch.setenv(runtime.ENVIRONMENT, "tensorflow")
    assert untrusted.runtimes_to_try()[0] == "tensorflow"
    monkeypatch.setenv(runtime.ENVIRONMENT, "none")
    with pytest.raises(ConfigError):
        untrusted.runtimes_to_try()


def test_a_file_that_no_runtime_takes_is_refused_with_their_reasons(attacked: Attacked) -> None:
    from converters import flatbuffer

    model = structure.check(attacked.conversion.bare)
    for code in model.operatorCodes:
        code.version = 999
    with pytest.raises(ModelError, match=r"refused by litert") as caught:
        probe(flatbuffer.pack(model))
    assert not isinstance(caught.value, UntrustedError)


@pytest.mark.parametrize("noise", [b"", b"\xff" * 100, b"\0" * 100])
def test_noise_crashes_a_runtime_or_is_refused_and_is_an_error_either_way(noise: bytes) -> None:
    with pytest.raises(ModelError):
        probe(b"\x10\0\0\0TFL3" + noise)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_damaged_file_runs_or_is_refused_but_nothing_else_happens(attacked: Attacked, data: st.DataObject) -> None:
    content = bytearray(attacked.conversion.bare)
    for position in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=3)):
        content[position] ^= 1 << data.draw(st.integers(0, 7))
    try:
        structure.check(bytes(content))
        facts = probe(bytes(content))
    except ModelError:
        return
    assert facts.runtimes


def test_facts_cross_the_boundary_as_plain_values(attacked: Attacked) -> None:
    facts = probe(attacked.conversion.bare)
    again: Any = msgspec.json.decode(msgspec.json.encode(facts), type=untrusted.ModelFacts)
    assert again == facts
    assert np.dtype(facts.inputs[0].dtype) == np.int8
