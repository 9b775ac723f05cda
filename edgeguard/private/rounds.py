"""One party's part in a round: open what devices submitted, agree on whose submissions count, compute, open the result.

Rules enforced here:

* a submission that cannot be opened, or is for something else, is refused with its reason and costs its device alone;
* devices count whose submission all three parties hold alike: one that dropped out, came late at a party, or told two
  parties different things is left out by all;
* fewer than the round asks for: nothing is computed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from edgeguard.contract.private import Round, Submission
from edgeguard.errors import ConfigError, TrustError
from edgeguard.private import computation, sharing
from edgeguard.private.computation import Computation
from edgeguard.private.parties import Own, read_json

STEPS = 5
MAX_SUBMISSION_BYTES = 256 * 1024
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a round opened: the channels to prune, ascending; of how many devices all three parties held submissions.

    ``refused``: by device, why this party did not take its submission.
    """

    channels: tuple[int, ...]
    devices: int
    refused: dict[str, str]


class Ballots:
    """The shares that this party holds for one round. ``add`` may be called with anything, in any order."""

    def __init__(self, asked: Round, own: Own) -> None:
        self._asked = asked
        self._own = own
        self._held: dict[str, sharing.Opened] = {}
        self.refused: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self._held)

    def add(self, device: str, content: bytes) -> bool:
        """Take a submission. The same again, or one to another round, changes nothing; another leaves its device out.

        Args:
            device: who published it, as the broker's topic or the folder says.
            content: the message.

        Returns:
            Whether the device's submission counts at this party.
        """
        if device in self.refused:
            return False
        try:
            found = self._open(device, content)
        # msgspec raises UnicodeDecodeError where a string in it is not UTF-8.
        except (TrustError, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            self._held.pop(device, None)
            self.refused[device] = str(error)[:300]
            return False
        if found is not None:
            self._held[device] = found
        return found is not None

    def _open(self, device: str, content: bytes) -> sharing.Opened | None:
        """The share in a submission; None for one to another round, which brokers repeat until there is a newer one."""
        if len(content) > MAX_SUBMISSION_BYTES:
            raise TrustError(f"submission of {device}", got=f"{len(content)} bytes")
        submission = msgspec.json.decode(content, type=Submission)
        if submission.round != self._asked.digest:
            return None
        found = sharing.opened(self._asked, submission, device, self._own.index, self._own.sealing)
        if device in self._held and self._held[device].digest != found.digest:
            raise TrustError(f"submission of {device}", got="two different ones to one round")
        return found

    def digests(self) -> dict[str, str]:
        """Of each device whose submission counts, its digest."""
        return {device: found.digest for device, found in self._held.items()}

    def matrix(self, devices: Iterable[str]) -> sharing.Values:
        """This party's shares [N, C] of these devices."""
        return np.stack([self._held[device].values for device in devices])


def meet(
    asked: Round,
    ballots: Ballots,
    own: Own,
    progress: Progress,
    deliver: Callable[[Result], None],
    *,
    timeout_s: int,
) -> None:
    """Meet the two other parties, compute a round with them, and deliver the result before leaving them.

    Args:
        asked: the round.
        ballots: what this party holds.
        own: this party.
        progress: called with what is done now.
        deliver: called once all three have the result.
        timeout_s: silence of a party after which the run ends.

    Raises:
        ConfigError, LinkError, TrustError: see :func:`run`.
    """
    progress("waiting for the other parties", 1, STEPS)
    addresses = computation.Addresses.of(own)
    with computation.connect(own, addresses, asked.digest, connect_s=timeout_s, timeout_s=timeout_s) as joint:
        deliver(run(asked, ballots, joint, progress))


def run(asked: Round, ballots: Ballots, joint: Computation, progress: Progress) -> Result:
    """Compute a round with the two others.

    Raises:
        ConfigError: too few devices.
        LinkError: a party is gone.
        TrustError: a party has another round or program.
    """
    # JAX is needed from here on only.
    from edgeguard.private import programs

    progress("comparing the round with the other parties", 2, STEPS)
    joint.agree("round", asked.digest)
    progress("comparing whose submissions all three hold", 3, STEPS)
    views = joint.exchange(ballots.digests())
    if not all(isinstance(v, dict) and all(isinstance(d, str) for d in v.values()) for v in views):
        raise TrustError("list of submissions of a party", got="something else")
    devices = sharing.common(views)
    if len(devices) < asked.min_devices:
        raise _too_few(asked, f"{len(devices)} that all three parties hold")
    progress(f"computing over {len(devices)} devices", 4, STEPS)
    mask, enough = joint.run(programs.program(asked), ballots.matrix(devices))
    if not bool(enough):
        raise _too_few(asked, "too few that are valid")
    progress("done", STEPS, STEPS)
    channels = tuple(int(c) for c in np.flatnonzero(mask))
    # Nobody leaves before all three have opened the result.
    joint.agree("result", str(channels))
    return Result(channels=channels, devices=len(devices), refused=dict(ballots.refused))


def read(path: Path) -> Round:
    """A round from its file. Raises ConfigError."""
    return read_json(path, Round)


def write(asked: Round, path: Path) -> None:
    """A round to a new file. Raises ConfigError if there is one."""
    write_new(path, msgspec.json.encode(asked))


def write_submission(submission: Submission, path: Path) -> None:
    """A submission to a new file, ``<device>.json`` in the folder that parties read. Raises ConfigError."""
    write_new(path, msgspec.json.encode(submission))


def once(path: Path, make: Callable[[], Submission]) -> Submission:
    """The submission that was made before for the same round, or a new one, kept in a file.

    A device that submits two different things to one round is left out of it. One that cannot know whether the first
    arrived has to send it again as it was.

    Raises:
        ConfigError: the file cannot be read or written.
    """
    if path.exists():
        return read_json(path, Submission)
    made = make()
    write_new(path, msgspec.json.encode(made))
    return made


def collect(folder: Path, ballots: Ballots) -> None:
    """Take the submissions in a folder: ``<device>.json`` each. Raises ConfigError if there is no folder."""
    if not folder.is_dir():
        raise ConfigError(f"folder of submissions {folder}", got="none there", do="check the path")
    for path in sorted(folder.glob("*.json")):
        if re.fullmatch(r"[a-z0-9._~-]{1,127}", path.stem) and path.stat().st_size <= MAX_SUBMISSION_BYTES:
            ballots.add(path.stem, path.read_bytes())


def write_new(path: Path, content: bytes, *, mode: int = 0o644) -> None:
    """A new file; never over another. Raises ConfigError."""
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(content)
    except FileExistsError as error:
        raise ConfigError(f"file {path}", got="there already", do="choose another name") from error
    except OSError as error:
        raise ConfigError(f"file {path}", got=error.strerror, do="check the folder") from error


def _too_few(asked: Round, got: str) -> ConfigError:
    return ConfigError(
        f"round {asked.id}", got=f"submissions: {got}", expected=f"at least {asked.min_devices}", do="ask more devices"
    )
