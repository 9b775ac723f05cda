"""The last checks of a fetched model before it may replace the running one.

``python -m edgeguard.agent.admission FILE`` runs them in a short-lived child, so that a model that crashes its
runtime takes no agent with it, and the daemon needs no memory for a model that it will refuse. Rules enforced here:

* the file is the one that was verified, and describes itself as its signer does;
* it takes and gives what the running model does: input, outputs, classes;
* it runs, and passes the self-test of the sidecar that its release brought: known inputs, expected classes, scores in
  range;
* on the self-test inputs of the anchor it says what is known there for at least ``MIN_AGREEMENT`` of them. The anchor
  is the sidecar of the last release that was signed offline, or of the installed model: no repair can choose it, nor
  walk away from it in small steps;
* what the hub's online key may have signed, a repair, needs both sidecars: what cannot be checked is refused. A release
  that was signed offline may come without.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np

from edgeguard.contract.messages import Digest
from edgeguard.detection import replacement, sidecar
from edgeguard.detection.guarded import GuardedModel
from edgeguard.detection.sidecar import Sidecar
from edgeguard.errors import EXIT_CLEAN, EXIT_USAGE, ConfigError, EdgeGuardError, ModelError, TrustError

MAX_ANSWER_BYTES = 16 * 1024


@dataclass(frozen=True, kw_only=True)
class Fetched:
    """A verified file waits to be admitted; the digests are those that its signer vouched for.

    ``sidecar`` and ``sidecar_digest`` are None for a release that brought none; ``repair``: the hub's online key may
    have signed it.
    """

    sequence: int
    path: Path
    file_digest: str
    model_digest: str
    guard_digest: str
    sidecar: Path | None = None
    sidecar_digest: str | None = None
    repair: bool = False


class Question(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the child needs to know. Paths as text.

    ``anchor``: digest of that sidecar, None where the running model's own is it; ``held``: where it may lie.
    """

    fetched: str
    file_digest: Digest
    model_digest: Digest
    guard_digest: Digest
    sidecar: str | None
    sidecar_digest: Digest | None
    repair: bool
    running: str
    running_digest: Digest
    anchor: Digest | None = None
    held: tuple[str, ...]
    runtime: str
    threads: int

    @classmethod
    def of(
        cls,
        fetched: Fetched,
        *,
        running: Path,
        running_digest: str,
        anchor: str | None = None,
        held: tuple[str, ...],
        runtime: str,
        threads: int,
    ) -> Question:
        """Whether this fetched file may take the place of that running one."""
        return cls(
            fetched=str(fetched.path),
            file_digest=fetched.file_digest,
            model_digest=fetched.model_digest,
            guard_digest=fetched.guard_digest,
            sidecar=None if fetched.sidecar is None else str(fetched.sidecar),
            sidecar_digest=fetched.sidecar_digest,
            repair=fetched.repair,
            running=str(running),
            running_digest=running_digest,
            anchor=anchor,
            held=held,
            runtime=runtime,
            threads=threads,
        )


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What the child found. ``failed``: it could not find out."""

    state: Literal["admitted", "refused", "failed"]
    reason: str = ""


def admit(
    content: bytes,
    fetched: Fetched,
    running: GuardedModel,
    *,
    load: Callable[[bytes], GuardedModel],
    held: Sidecar | None,
    brought: bytes | None,
) -> GuardedModel:
    """Check a fetched model.

    Args:
        content: the fetched file.
        fetched: what its signer said of it, as the fetch verified it.
        running: the model that runs.
        load: opens a model.
        held: the anchor, None where it is not on this device.
        brought: the sidecar that the release brought, None for one without.

    Raises:
        TrustError: the file is not the one that was verified, describes itself otherwise than its signer, decides
            otherwise than the anchor's model, or that cannot be checked though it must be.
        ModelError: it does not load or run, takes or gives something else than the running model, or fails its
            self-test.
    """
    digest = hashlib.sha256(content).hexdigest()
    if digest != fetched.file_digest:
        raise TrustError("fetched model", got=f"SHA-256 {digest}", expected=fetched.file_digest)
    model = load(content)
    for name in ("model_digest", "guard_digest"):
        if getattr(model.metadata, name) != getattr(fetched, name):
            raise TrustError(
                f"fetched model: {name}", got=getattr(model.metadata, name), expected=getattr(fetched, name)
            )
    replacement.check_interface(model, running, name="fetched model")
    model.infer(np.zeros(model.metadata.input.shape, model.metadata.input.dtype))
    _self_test(model, brought, fetched)
    _agreement(model, held, must=fetched.repair)
    return model


def _self_test(model: GuardedModel, brought: bytes | None, fetched: Fetched) -> None:
    found = None if brought is None else sidecar.digest(brought)
    if found != fetched.sidecar_digest:
        raise TrustError("fetched sidecar", got=f"SHA-256 {found}", expected=fetched.sidecar_digest)
    named = model.metadata.sidecar_digest
    if named is None or brought is None:
        if fetched.repair:
            raise TrustError("repaired model", got="no sidecar", expected="one, whose self-test it passes")
        return
    held = sidecar.decode(brought, digest=named, metadata=model.metadata, name="fetched sidecar")
    outcome = sidecar.self_test(held, model.infer)
    if not outcome.passed:
        raise ModelError("fetched model: self-test", got="; ".join(outcome.wrong)[:200] or "not passed")


def _agreement(model: GuardedModel, held: Sidecar | None, *, must: bool) -> None:
    """Compare the model's classes with those that the anchor knows of its clean inputs."""
    known = None
    if held is not None and model.metadata.class_output is not None:
        known = replacement.agreement(held, lambda x: model.infer(x).verdict.predicted)
    if known is None or not known.says_something:
        if must:
            raise TrustError(
                "repaired model",
                got=f"{0 if known is None else known.count} different self-test inputs of the last release signed "
                "offline to compare classes on",
                expected=f"at least {replacement.MIN_KNOWN}",
                do="put the installed model's sidecar NAME.guard.npz beside it, or sign the release offline",
            )
        return
    if not known.holds:
        raise TrustError(
            "fetched model",
            got=f"the known class for {known.same} of {known.count} clean inputs",
            expected=f"at least {sidecar.MIN_AGREEMENT:.0%}",
        )


def ask(question: Question, path: Path) -> subprocess.Popen[bytes]:
    """Start the child. Raises ConfigError where it cannot be."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(msgspec.json.encode(question))
        return subprocess.Popen(
            [sys.executable, "-m", "edgeguard.agent.admission", str(path)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C in a terminal is the agent's to handle
        )
    except OSError as error:
        raise ConfigError("check of a fetched model", got=str(error), do=f"check {path.parent}") from error


def read_answer(process: subprocess.Popen[bytes]) -> Answer | None:
    """What the child found, or None while it works. To be asked no more once it answered.

    One that was ended by a signal crashed on the model, which is refused for it.
    """
    code = process.poll()
    if code is None:
        return None
    with process:
        content = process.stdout.read(MAX_ANSWER_BYTES) if process.stdout else b""
    try:
        return msgspec.json.decode(content, type=Answer)
    except (msgspec.DecodeError, RecursionError):
        state: Literal["refused", "failed"] = "refused" if code < 0 else "failed"
        return Answer(state=state, reason=f"the check of the fetched model ended without an answer, exit code {code}")


def answer(question: Question) -> Answer:
    """Load both models and check. Nothing is raised."""
    fetched = Fetched(
        sequence=0,
        path=Path(question.fetched),
        file_digest=question.file_digest,
        model_digest=question.model_digest,
        guard_digest=question.guard_digest,
        sidecar_digest=question.sidecar_digest,
        repair=question.repair,
    )

    def load(content: bytes) -> GuardedModel:
        return GuardedModel.load(content, threads=question.threads, runtime=question.runtime)

    try:
        running = _read(Path(question.running))
        found = hashlib.sha256(running).hexdigest()
        if found != question.running_digest:
            return Answer(state="failed", reason="the slot of the running model changed meanwhile")
        model = load(running)
        admit(
            _read(fetched.path),
            fetched,
            model,
            load=load,
            held=_held(question, model),
            brought=_read(Path(question.sidecar)) if question.sidecar else None,
        )
    except (TrustError, ModelError) as error:
        return Answer(state="refused", reason=str(error)[:500])
    except EdgeGuardError as error:
        return Answer(state="failed", reason=str(error)[:500])
    except Exception as error:  # whatever a hostile model found
        return Answer(state="failed", reason=f"{type(error).__name__}: {error}"[:500])
    return Answer(state="admitted")


def _held(question: Question, running: GuardedModel) -> Sidecar | None:
    """The anchor from the first place that has it. Every model since takes and gives what the running one does."""
    digest = question.anchor or running.metadata.sidecar_digest
    for place in question.held if digest else ():
        with suppress(EdgeGuardError):
            content = _read(Path(place))
            return sidecar.decode(content, digest=str(digest), metadata=running.metadata, any_guard=True)
    return None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"file {path}", got=error.strerror, expected="a file that can be read") from error


def main() -> int:
    """Answer one question on standard output."""
    with suppress(OSError):  # a service may be forbidden to
        os.nice(10)
    try:
        question = msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=Question)
    except (OSError, IndexError, msgspec.DecodeError) as error:
        sys.stdout.buffer.write(msgspec.json.encode(Answer(state="failed", reason=f"question: {error}"[:500])))
        return EXIT_USAGE
    sys.stdout.buffer.write(msgspec.json.encode(answer(question)))
    return EXIT_CLEAN


if __name__ == "__main__":
    sys.exit(main())
