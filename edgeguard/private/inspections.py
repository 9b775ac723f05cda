"""One party's part in a private inspection and in the mending after it: take, agree, compute, keep shares, open.

Rules enforced here:

* parties compute on what both owners gave to all three alike, or not at all;
* every so many steps each party keeps its shares, 0600, and a run that broke off goes on from the last moment that all
  three kept in the same run; a result is kept by all three before it is opened, and given again instead of computed
  again, for what it was computed from alone: a pad hides one value once;
* opened are flags, whether there was enough to compare, three counts of a mending, and padded values. Nothing else;
* what goes over a line is as much whatever is found: padded values are opened always, and kept where a label is
  flagged;
* kept shares are deleted once all three have the result; those that a mending needs, after the mending.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import msgspec
import numpy as np

from edgeguard import disk
from edgeguard.contract.private import Inspection, Part, Role, Submission, Verdict
from edgeguard.errors import ConfigError, TrustError
from edgeguard.private import computation, owners, sharing
from edgeguard.private.child import Progress
from edgeguard.private.computation import Computation, Kept
from edgeguard.private.parties import Own, Parties

ROLES: tuple[Role, ...] = get_args(Role)
SEARCH = ("taken", "speed", "weight", "unit")
BASIS = ("sums", "products")
TRIGGER = "trigger"
DECIDED = ("flagged", "comparable", TRIGGER, "padded")
JUDGED = ("kept", "before", "after", "padded")
INSPECTED, MENDED = "inspected.json", "mended.json"
MAX_BYTES = 64 << 20
"""Bytes: triggers of the most classes and values that there can be, in base64, and what is around them."""
_STATES = "state-*.json"


class Inspected(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an inspection opened. ``given``: digest of what it was computed from; ``labels``: the flagged ones;
    ``padded``: their triggers, for the model's owner."""

    inspection: str
    given: str
    verdict: Verdict
    labels: tuple[int, ...]
    padded: bytes


class Mended(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a mending opened: counts of ``held_out`` inputs, see :class:`mending.Judged`; ``padded``: the last layer."""

    inspection: str
    given: str
    held_out: int
    kept: int
    turned_before: int
    turned_after: int
    padded: bytes


class _State(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A party's shares after ``done`` steps, one more for the decision and two for a mending, of what was given by this
    digest. Shares of two runs do not fit each other: ``run`` is what the three drew together at its beginning."""

    inspection: str
    given: str
    run: str
    done: int
    kept: dict[str, Kept]


@dataclass(frozen=True, kw_only=True)
class Held:
    """This party's shares of both owners' parts, and a digest of what was given."""

    values: Mapping[Role, sharing.Values]
    digest: str


def give(part: Part, values: sharing.Values, parties: Parties, random: bytes) -> Submission:
    """An owner's part, sealed for the three parties. Raises TrustError."""
    return sharing.submit(part, part.role, values, parties, random)


def take(asked: Inspection, folder: Path, own: Own) -> Held:
    """Open this party's shares of what both owners gave: ``model-owner.json`` and ``data-owner.json``.

    Raises:
        ConfigError: one is not there.
        TrustError: one is not for this inspection, or this party.
    """
    values: dict[Role, sharing.Values] = {}
    digests = []
    for role in ROLES:
        part = owners.part(asked, role)
        path = folder / f"{role}.json"
        try:
            # Three shares of 8 bytes in base64, and as much again for what is around them.
            if path.stat().st_size > 3 * 22 * part.channels + 65536:
                raise TrustError(f"file {path}", got="more than can belong to this inspection")
            submission = msgspec.json.decode(path.read_bytes(), type=Submission)
        except OSError as error:
            raise ConfigError(f"file {path}", got=error.strerror, do=f"get it from the {role}") from error
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise TrustError(f"file {path}", got=error) from error
        opened = sharing.opened(part, submission, role, own.index, own.sealing)
        values[role] = opened.values
        digests.append(opened.digest)
    return Held(values=values, digest=" ".join(digests))


def inspect(
    asked: Inspection,
    held: Held,
    own: Own,
    work: Path,
    progress: Progress,
    deliver: Callable[[Inspected], None],
    *,
    timeout_s: int,
    addresses: computation.Addresses | None = None,
) -> None:
    """Meet the two others, inspect, and deliver the result.

    Args:
        asked: the inspection.
        held: what was given to this party.
        own: this party.
        work: this party's folder for this inspection.
        progress: called with what is done now.
        deliver: called once all three have the result.
        timeout_s: silence of a party after which the run ends.
        addresses: where the three are, if not where their descriptions say.

    Raises:
        LinkError: a party is gone.
        TrustError: a party has something else.
    """
    with computation.connect(
        own, addresses or computation.Addresses.of(own), asked.digest, connect_s=timeout_s, timeout_s=timeout_s
    ) as joint:
        deliver(_inspect(asked, held, joint, work, progress))


def mend(
    asked: Inspection,
    held: Held,
    own: Own,
    work: Path,
    progress: Progress,
    deliver: Callable[[Mended], None],
    *,
    timeout_s: int,
    addresses: computation.Addresses | None = None,
) -> None:
    """Meet the two others, mend what an inspection flagged, and deliver the result; see :func:`inspect`.

    Raises:
        ConfigError: there was no inspection of what was given, or it flagged nothing.
        LinkError, TrustError: see :func:`inspect`.
    """
    found = result(work / INSPECTED, Inspected, held)
    if found is None or not found.labels:
        got = "nothing flagged" if found else "no inspection"
        raise ConfigError(f"mending in {work}", got=got, expected="an inspection that flagged a label")
    with computation.connect(
        own, addresses or computation.Addresses.of(own), asked.digest, connect_s=timeout_s, timeout_s=timeout_s
    ) as joint:
        deliver(_mend(asked, held, joint, work, progress))


def result(path: Path, kind: type[Any], held: Held | None = None) -> Any:
    """What was opened before; None where nothing was.

    Raises:
        ConfigError: it cannot be read, or was computed from something else than ``held``.
    """
    try:
        with path.open("rb") as file:
            found = msgspec.json.decode(file.read(MAX_BYTES), type=kind)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"result {path}", got=error, do="get it from another party") from error
    if held is not None and found.given != held.digest:
        raise ConfigError(f"result {path}", got="one of other shares", do="make a new plan")
    return found


def _inspect(asked: Inspection, held: Held, joint: Computation, work: Path, progress: Progress) -> Inspected:
    from edgeguard.private import inspecting

    layers, pad = _load(asked, held, joint, progress)
    run, state = _chosen(asked, held, joint, work, 1, asked.steps + 1)
    if state is not None:
        joint.restore(state.kept)
    done = 0 if state is None else state.done
    if done <= asked.steps:
        _search(asked, held, run, joint, work, progress, layers, done)
        progress("deciding", asked.steps, asked.steps)
        joint.prepare(
            lambda x, taken, pad, *w: _shown(inspecting.decide(asked, w, x, taken), pad, owners.trigger_values(asked)),
            ("held_out", "taken", pad, *layers),
            DECIDED,
        )()
        _keep(asked, held, run, work, asked.steps + 1, joint.keep(DECIDED))
    # All three have kept these very shares before anything is open: a run that breaks off here opens the same again.
    joint.agree("inspection", asked.digest)
    flagged, comparable = joint.open("flagged"), joint.open("comparable")
    labels = tuple(int(label) for label in np.flatnonzero(flagged))
    verdict: Verdict = "backdoored" if labels else "no_sign" if bool(comparable) else "could_not_check"
    padded = joint.open("padded").astype("<i8").tobytes()
    found = Inspected(
        inspection=asked.digest, given=held.digest, verdict=verdict, labels=labels, padded=padded if labels else b""
    )
    disk.write(work / INSPECTED, msgspec.json.encode(found), mode=0o600)
    joint.agree("result", str(labels))
    discard(work, {_name(asked.steps + 1)} if labels else set())
    return found


def _search(
    asked: Inspection,
    held: Held,
    run: str,
    joint: Computation,
    work: Path,
    progress: Progress,
    layers: tuple[str, ...],
    done: int,
) -> None:
    """The steps that are not done yet."""
    from edgeguard.private import inspecting

    joint.prepare(lambda x, *w: tuple(inspecting.basis(w, x)), ("sought", *layers), BASIS)()
    if not done:
        joint.prepare(
            lambda sums, products, *w: tuple(inspecting.begin(asked, w, inspecting.Basis(sums, products))),
            (*BASIS, *layers),
            SEARCH,
        )()
    joint.tell("rate", np.zeros((), np.float64))
    step = joint.prepare(
        lambda rate, *v: tuple(
            inspecting.step(v[6:], inspecting.Basis(*v[:2]), inspecting.Search(*v[2:6]), rate),
        ),
        ("rate", *BASIS, *SEARCH, *layers),
        SEARCH,
    )
    for number in range(done, asked.steps):
        joint.tell("rate", np.asarray(inspecting.rate_at(asked, number), np.float64))
        step()
        progress("seeking triggers", number + 1, asked.steps)
        if (number + 1) % asked.every == 0 or number + 1 == asked.steps:
            _keep(asked, held, run, work, number + 1, joint.keep(SEARCH))
    joint.forget(BASIS)


def _shown(found: Any, pad: Any, count: int) -> tuple[Any, ...]:
    from edgeguard.private import inspecting

    padded = inspecting.to_fixed(found.trigger.reshape(-1)) + pad[:count]
    return (found.flagged, found.comparable, found.trigger, padded)


def _mend(asked: Inspection, held: Held, joint: Computation, work: Path, progress: Progress) -> Mended:
    layers, pad = _load(asked, held, joint, progress)
    run, state = _chosen(asked, held, joint, work, asked.steps + 1, asked.steps + 2)
    if state is None:
        raise ConfigError(f"shares in {work}", got="not those of an inspection that ended", do="make a new plan")
    if state.done == asked.steps + 2:
        joint.restore(state.kept)
    else:
        joint.restore({TRIGGER: state.kept[TRIGGER]})
        _unlearn(asked, joint, progress, layers, pad)
        _keep(asked, held, run, work, asked.steps + 2, joint.keep(JUDGED))
    # As for an inspection: what is opened is kept by all three.
    joint.agree("mending", run)
    kept, before, after, padded = (joint.open(name) for name in JUDGED)
    found = Mended(
        inspection=asked.digest,
        given=held.digest,
        held_out=asked.held_out,
        kept=int(kept),
        turned_before=int(before),
        turned_after=int(after),
        padded=padded.astype("<i8").tobytes(),
    )
    disk.write(work / MENDED, msgspec.json.encode(found), mode=0o600)
    joint.agree("result", f"{kept} {before} {after}")
    discard(work)
    return found


def _unlearn(asked: Inspection, joint: Computation, progress: Progress, layers: tuple[str, ...], pad: str) -> None:
    """Mend the last layer, judge it and pad it: the secrets :data:`JUDGED`."""
    from edgeguard.private import inspecting, mending

    lesson, last = ("hidden", "wanted", "pace"), tuple(f"last{i}" for i in range(4))

    def begin(x: Any, trigger: Any, *w: Any) -> tuple[Any, ...]:
        taught, first = mending.begin(asked, w, x, trigger)
        return (*taught, *first)

    joint.prepare(begin, ("sought", TRIGGER, *layers), (*lesson, *last))()
    step = joint.prepare(
        lambda *v: tuple(mending.step(mending.Lesson(*v[:3]), mending.Last(*v[3:]))), (*lesson, *last), last
    )
    for number in range(asked.mending_steps):
        step()
        progress("mending the last layer", number + 1, asked.mending_steps)

    def end(x: Any, trigger: Any, pad: Any, *rest: Any) -> tuple[Any, ...]:
        now, w = mending.Last(*rest[:4]), rest[4:]
        flat = inspecting.to_fixed(mending.in_a_row(now))
        return (*mending.judge(w, now, x, trigger), flat + pad[owners.trigger_values(asked) :])

    joint.prepare(end, ("held_out", TRIGGER, pad, *last, *layers), JUDGED)()


def _load(asked: Inspection, held: Held, joint: Computation, progress: Progress) -> tuple[tuple[str, ...], str]:
    """Bring what the owners gave into the computation: the names of the layers, and of the pad."""
    from edgeguard.private import inspecting

    progress("comparing the inspection with the other parties", 0, asked.steps)
    joint.agree("inspection", asked.digest)
    joint.agree("what the owners gave", held.digest)
    progress("taking what the owners gave", 0, asked.steps)
    layers = tuple(f"layer{i}" for i in range(len(asked.weights)))
    joint.add_up("model", held.values["model-owner"])
    count = owners.weight_values(asked)
    joint.prepare(lambda v: (*inspecting.layers_of(asked, v), v[count:]), ("model",), (*layers, "pad"))()
    joint.add_up("data", held.values["data-owner"])
    joint.prepare(lambda v: inspecting.inputs_of(asked, v), ("data",), ("sought", "held_out"))()
    joint.forget(("model", "data"))
    return layers, "pad"


def _chosen(
    asked: Inspection, held: Held, joint: Computation, work: Path, least: int, most: int
) -> tuple[str, _State | None]:
    """The run, and the state of it that all three go on from; where there is none, the name of a new run.

    Once all three are done here, none has a state left that another may take for one of this run.
    """
    drawn = hashlib.sha256(" ".join(map(str, joint.exchange(secrets.token_hex(16)))).encode()).hexdigest()
    states = _states(asked, held, work)
    common = _common(joint.exchange(sorted(key for key in states if least <= key[0] <= most)))
    # Nothing to mend: what there is stays as it is.
    if common is None and least > 1:
        return drawn, None
    ends = {asked.steps + 1, asked.steps + 2} if common is not None and common[0] == most else set()
    discard(
        work,
        {
            _name(done)
            for done, run in states
            if common in ((done, run), (most, run)) and (done in ends or (done, run) == common)
        },
    )
    joint.agree("where to go on", str(common))
    return (drawn, None) if common is None else (common[1], states[common])


def _common(views: Sequence[Any]) -> tuple[int, str] | None:
    """The last steps done, and their run, that all three kept their shares of; None for none."""
    try:
        seen = [set(msgspec.convert(view, list[tuple[int, str]])) for view in views]
    except msgspec.ValidationError as error:
        raise TrustError("what a party kept", got="something else") from error
    return max(set.intersection(*seen), default=None)


def _states(asked: Inspection, held: Held, work: Path) -> dict[tuple[int, str], _State]:
    """This party's states of what was given, by steps done and run."""
    found = {}
    for path in work.glob(_STATES):
        try:
            state = msgspec.json.decode(path.read_bytes(), type=_State)
        except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ConfigError(f"shares {path}", got=error, do="remove the file") from error
        if (state.inspection, state.given) == (asked.digest, held.digest):
            found[state.done, state.run] = state
    return found


def _keep(asked: Inspection, held: Held, run: str, work: Path, done: int, kept: dict[str, Kept]) -> None:
    """Keep shares, and those before them: another party may not have come as far."""
    work.mkdir(mode=0o700, parents=True, exist_ok=True)
    state = _State(inspection=asked.digest, given=held.digest, run=run, done=done, kept=kept)
    disk.write(work / _name(done), msgspec.json.encode(state), mode=0o600)
    earlier = sorted(number for number, of in _states(asked, held, work) if of == run and number < done)
    for old in earlier[:-1]:
        (work / _name(old)).unlink()


def discard(work: Path, staying: Collection[str] = ()) -> None:
    """Delete the shares that this party kept, but for the files named."""
    for path in work.glob(_STATES):
        if path.name not in staying:
            path.unlink()


def _name(done: int) -> str:
    return f"state-{done:04}.json"
