"""Runs a function of ours on untrusted bytes in a child process, and so a model file's first contact with a runtime.

A TFLite runtime is native code that trusts its file. ``probe`` lets it have the file in a child first. Rules enforced:

* the child has limits on memory, processor time and wall time, dumps no core, writes next to nothing, and has all that
  before it sees the bytes;
* it dies with its parent, however that ends;
* whatever becomes of it (a signal, a time-out, exhausted memory, an answer that is none) is one error here; an error
  of ours that it raised is the same error here;
* what it answers is untrusted too: of bounded length, and decoded into the type that was asked for.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import re
import resource
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal, TypeVar

import msgspec

from edgeguard.errors import ConfigError, EdgeGuardError, LinkError, ModelError, TrustError

T = TypeVar("T")
Progress = Callable[[str, int, int], None]

_REQUEST = struct.Struct("<III")
_ANSWER = struct.Struct("<I")
_MAX_ANSWER = 16 << 20
_MAX_FILE = 1 << 16  # TensorFlow tries whether it can write to the temporary folder, and does not start otherwise
_MAX_TEXT = 2000
_HERE = Path(__file__).resolve().parent.parent
# What the loader and native libraries say when no more addresses are to be had.
_EXHAUSTED = re.compile(
    "failed to map segment|cannot allocate memory|bad_alloc|resource temporarily unavailable|oom when allocating",
    re.IGNORECASE,
)
_PR_SET_PDEATHSIG = 1
_ERRORS = {kind.__name__: kind for kind in (ModelError, ConfigError, TrustError, LinkError)}


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a child may use: bytes of address space and of a file, and seconds of processor and wall time per call."""

    memory_bytes: int = 2 << 30
    cpu_seconds: int = 20
    wall_seconds: float = 60.0
    file_bytes: int = _MAX_FILE


class UntrustedError(ModelError):
    """The child did not survive the bytes. ``kind`` says how it ended."""

    def __init__(self, kind: Literal["crashed", "timed out", "out of memory"], **parts: Any) -> None:
        self.kind = kind
        super().__init__("model file", **parts)


class TensorFacts(msgspec.Struct, frozen=True):
    """One input or output, as a runtime reports it."""

    shape: tuple[int, ...]
    dtype: str


class RuntimeFacts(msgspec.Struct, frozen=True):
    """What one runtime made of a file that it ran, on zeros and on random bytes."""

    inputs: tuple[TensorFacts, ...]
    outputs: tuple[TensorFacts, ...]


class ModelFacts(msgspec.Struct, frozen=True):
    """What is known of a file that no runtime crashed on.

    ``runtimes`` ran it, the preferred one first; ``refused`` did not take it, with their reasons. Inputs and outputs
    are as the first of ``runtimes`` reports them.
    """

    runtimes: tuple[str, ...]
    refused: dict[str, str]
    inputs: tuple[TensorFacts, ...]
    outputs: tuple[TensorFacts, ...]


class _Answer(msgspec.Struct, omit_defaults=True):
    """The last word on a call, or, as ``underway``, one before it.

    ``text`` is the reason of a refusal, the package that is ``missing``, or what is under way; ``error`` the name of an
    error of ours with its ``parts``.
    """

    kind: Literal["done", "refused", "raised", "missing", "out of memory", "underway"]
    value: msgspec.Raw = msgspec.Raw(b"null")
    text: str = ""
    steps: tuple[int, int] = (0, 0)
    error: str = "ModelError"
    parts: tuple[str | None, str | None, str | None, str | None] = (None, None, None, None)


class Child:
    """A process that runs functions on untrusted bytes, one after the other; it is replaced when it dies.

    Use it as a context manager. Not for several threads at once, nor beyond the thread that made the first call: the
    kernel takes its end for the parent's.
    """

    def __init__(self, limits: Limits | None = None) -> None:
        self._limits = limits or Limits()
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def call(
        self,
        function: str,
        content: bytes,
        argument: str = "",
        *,
        returns: type[T],
        doing: str = "",
        progress: Progress | None = None,
    ) -> T:
        """``function(content, argument)``, run in the child.

        Args:
            function: ``module:name`` of a function that returns what msgspec can encode.
            content: untrusted bytes.
            argument: a text of ours.
            returns: the type to decode the answer into.
            doing: what crashed, for the message; the function's name unless told.
            progress: called with what the function says by :func:`report`.

        Raises:
            UntrustedError: the child crashed, took too long, or ran out of memory.
            EdgeGuardError: the function raised it.
            ModelError: the function raised anything else: it refused the bytes.
            ModuleNotFoundError: it needs a package that is not installed.
        """
        process = self._process or self._start()
        expired = threading.Event()
        what = doing or function

        def stop() -> None:
            expired.set()
            process.kill()

        timer = threading.Timer(self._limits.wall_seconds, stop)
        timer.start()
        try:
            answer = _exchange(process, function, content, argument, progress)
            value = msgspec.json.decode(answer.value, type=returns) if answer and answer.kind == "done" else None
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            self._end()
            raise UntrustedError("crashed", got=f"an answer of {what} that is none", do="do not use it") from error
        except BaseException:  # an interruption: what the child still says would pass for its next answer
            self._end()
            raise
        finally:
            timer.cancel()
            timer.join()  # from here on it is known whether the child was killed
        if answer is None or expired.is_set():
            raise self._obituary(what, expired=expired.is_set())
        if answer.kind == "out of memory":
            self._end()
            raise self._out_of_memory(what)
        if answer.kind != "done":
            raise _raised(answer)
        return value  # type: ignore[return-value]  # decoded as such

    def _start(self) -> subprocess.Popen[bytes]:
        limits = self._limits
        numbers = f"{limits.memory_bytes}, {limits.cpu_seconds}, {limits.file_bytes}, {os.getpid()}"
        program = f"from converters import untrusted; untrusted.serve({numbers})"
        self._process = subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=_HERE,  # the first entry of the child's path: never a folder that holds untrusted files
            # Each thread's arena would take 64 MiB of the addresses that the child may have.
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "TF_CPP_MIN_LOG_LEVEL": "3", "MALLOC_ARENA_MAX": "2"},
            start_new_session=True,
        )
        return self._process

    def _end(self) -> int:
        """Kill the child, if there is one; its exit code, or minus the signal that had ended it before."""
        process, self._process = self._process, None
        if process is None:
            return 0
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=0 if process.poll() is None else None)
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):
                if pipe is not None:
                    pipe.close()
        process.kill()
        return process.wait()

    def _obituary(self, doing: str, *, expired: bool) -> UntrustedError:
        process = self._process
        if process is not None and not expired:  # its end of the pipe closes a little before it is gone
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=5)
        code = self._end()
        if expired or code == -signal.SIGXCPU:
            limits = self._limits
            allowed = f"{limits.wall_seconds:g} s, of them {limits.cpu_seconds} s of processor time"
            return UntrustedError(
                "timed out", got=f"no end of {doing}", expected=f"at most {allowed}", do="do not use it"
            )
        how = f"signal {-code}, {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return UntrustedError("crashed", got=f"a file that crashed {doing} ({how})", do="do not use it")

    def _out_of_memory(self, doing: str) -> UntrustedError:
        limit = f"at most {self._limits.memory_bytes >> 20} MiB"
        return UntrustedError("out of memory", got=f"no memory left in {doing}", expected=limit, do="do not use it")


def _exchange(
    process: subprocess.Popen[bytes], function: str, content: bytes, argument: str, progress: Progress | None
) -> _Answer | None:
    """Send a request and read up to the last answer; None when the child dies meanwhile."""
    assert process.stdin is not None and process.stdout is not None
    names = (function.encode(), argument.encode())
    try:
        process.stdin.write(_REQUEST.pack(len(names[0]), len(names[1]), len(content)) + names[0] + names[1])
        process.stdin.write(content)
        process.stdin.flush()
    except OSError:
        return None
    while True:
        raw = _read_answer(process.stdout)
        if raw is None:
            return None
        answer = msgspec.json.decode(raw, type=_Answer)
        if answer.kind != "underway":
            return answer
        if progress is not None:
            progress(_one_line(answer.text)[:80], *answer.steps)


def _read_answer(pipe: IO[bytes]) -> bytes | None:
    head = pipe.read(_ANSWER.size)
    if len(head) < _ANSWER.size:
        return None
    length = _ANSWER.unpack(head)[0]
    if length > _MAX_ANSWER:
        return b""  # which is no answer
    body = pipe.read(length)
    return body if len(body) == length else None


def _raised(answer: _Answer) -> Exception:
    """The error that a child's answer stands for."""
    if answer.kind == "missing":
        return ModuleNotFoundError(f"No module named {answer.text!r}", name=answer.text)
    if answer.kind == "raised":
        what, got, expected, do = (None if part is None else _one_line(part)[:_MAX_TEXT] for part in answer.parts)
        return _ERRORS.get(answer.error, ModelError)(what or "model file", got=got, expected=expected, do=do)
    return ModelError("model file", got=_one_line(answer.text)[:300], do="convert it again")


def _one_line(text: str) -> str:
    """Untrusted text that a terminal shows as it is."""
    return "".join(c if c.isprintable() else " " for c in text)


def probe(content: bytes, *, limits: Limits | None = None) -> ModelFacts:
    """Let every installed runtime load and run a file in a child process: TensorFlow's only where there is no other.

    Args:
        content: a ``.tflite`` file that passed ``structure.check``.
        limits: of the child.

    Raises:
        UntrustedError: a runtime crashed, took too long, or ran out of memory.
        ModelError: every runtime refused the file.
        ConfigError: there is no TFLite runtime.
    """
    ran: dict[str, RuntimeFacts] = {}
    refused: dict[str, str] = {}
    with Child(limits) as child:
        for name in runtimes_to_try():
            try:
                ran[name] = run_on(child, content, name)
            except UntrustedError:
                raise
            except ModelError as error:
                refused[name] = str(error.got)
    if not ran:
        raise ModelError("model file", got="; ".join(refused.values()), do="convert the model again")
    first = next(iter(ran.values()))
    return ModelFacts(tuple(ran), refused, first.inputs, first.outputs)


def runtimes_to_try() -> tuple[str, ...]:
    """The installed runtimes, TensorFlow's only where it is the only one. Raises ConfigError when there is none."""
    from edgeguard.detection import runtime

    preferred = runtime.choose(None)
    others = tuple(name for name in runtime.available() if name not in {"tensorflow", preferred})
    return (preferred, *others)


def run_on(child: Child, content: bytes, runtime: str) -> RuntimeFacts:
    """Load and run a file on one runtime in ``child``. Raises like :meth:`Child.call`."""
    return child.call("converters.untrusted:run_model", content, runtime, returns=RuntimeFacts, doing=runtime)


def run_model(content: bytes, name: str) -> RuntimeFacts:
    """Load a file on the runtime ``name`` and run it on zeros and on random bytes. Call it in a child only."""
    import numpy as np

    from edgeguard.detection.runtime import open_interpreter

    interpreter, _ = open_interpreter(content, name=name)
    rng = np.random.default_rng(0)
    inputs, outputs = interpreter.get_input_details(), interpreter.get_output_details()
    for noisy in (False, True):
        for detail in inputs:
            values = np.zeros(detail["shape"], dtype=detail["dtype"])
            if noisy:
                values = np.frombuffer(rng.bytes(values.nbytes), dtype=values.dtype).reshape(values.shape)
            interpreter.set_tensor(detail["index"], values)
        try:
            interpreter.invoke()
        except (ValueError, RuntimeError) as error:
            raise ModelError("model file", got=f"refused by {name}: {str(error)[:200]}") from error
        for detail in outputs:
            interpreter.get_tensor(detail["index"])
    return RuntimeFacts(*(tuple(_facts(detail) for detail in details) for details in (inputs, outputs)))


def _facts(detail: dict[str, Any]) -> TensorFacts:
    import numpy as np

    return TensorFacts(tuple(int(n) for n in detail["shape"]), np.dtype(detail["dtype"]).name)


def report(text: str, done: int, total: int) -> None:
    """Tell the parent what is under way, and how far. Call it in a child only."""
    _child.answer(_Answer("underway", text=text, steps=(done, total)))


def serve(memory_bytes: int, cpu_seconds: int, file_bytes: int, parent: int) -> None:
    """The child: limit itself, then answer requests on standard input until it ends."""
    with contextlib.suppress(AttributeError):  # no prctl: it then ends with its next read
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return
    for kind, most in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, file_bytes),
        (resource.RLIMIT_AS, memory_bytes),
    ):
        hard = resource.getrlimit(kind)[1]  # a child of a child may have less, never more
        least = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (least, least))
    # What the runtime prints must not stand among the answers.
    with os.fdopen(os.dup(1), "wb") as answers:
        os.dup2(2, 1)
        _child.answers = answers
        while _serve_one(sys.stdin.buffer, cpu_seconds):
            pass


class _Child:
    """The pipe to the parent, in a child."""

    answers: IO[bytes]

    def answer(self, answer: _Answer) -> None:
        raw = msgspec.json.encode(answer)
        self.answers.write(_ANSWER.pack(len(raw)) + raw)
        self.answers.flush()


_child = _Child()


def _serve_one(requests: IO[bytes], cpu_seconds: int) -> bool:
    head = requests.read(_REQUEST.size)
    if len(head) < _REQUEST.size:
        return False
    function, argument, content = (requests.read(length) for length in _REQUEST.unpack(head))
    used = resource.getrusage(resource.RUSAGE_SELF)
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime) + 1 + cpu_seconds, hard))
    try:
        module, _, name = function.decode().partition(":")
        value = getattr(importlib.import_module(module), name)(content, argument.decode())
        answer = _Answer("done", msgspec.Raw(msgspec.json.encode(value)))
    except Exception as error:  # the bytes decide what is raised; the parent wants to know, and to go on
        answer = _failure(error)
    _child.answer(answer)
    return True


def _failure(error: Exception) -> _Answer:
    if isinstance(error, MemoryError) or _EXHAUSTED.search(str(error)):
        return _Answer("out of memory")
    if isinstance(error, EdgeGuardError):
        name = next((name for name, kind in _ERRORS.items() if isinstance(error, kind)), "ModelError")
        return _Answer("raised", error=name, parts=_parts(error))
    if isinstance(error, ModuleNotFoundError):
        return _Answer("missing", text=error.name or str(error))
    return _Answer("refused", text=_encodable(f"{type(error).__name__}: {error}"))


def _parts(error: EdgeGuardError) -> tuple[str | None, str | None, str | None, str | None]:
    what, got, expected, do = (
        None if part is None else _encodable(str(part)) for part in (error.what, error.got, error.expected, error.do)
    )
    return what, got, expected, do


def _encodable(text: str) -> str:
    """A text of bounded length without the lone surrogates that a file's name may bring."""
    return text[:_MAX_TEXT].encode("utf-8", "replace").decode("utf-8")


__all__ = [
    "Child",
    "Limits",
    "ModelFacts",
    "RuntimeFacts",
    "TensorFacts",
    "UntrustedError",
    "probe",
    "report",
    "run_on",
]
