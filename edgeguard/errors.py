"""The four errors of EdgeGuard, rooted by who must act.

``ConfigError``  the operator: a file, an option, a port, a disk.
``ModelError``   the model's owner: a model or data file that cannot be used.
``TrustError``   security: something is not what its signer made; refuse it and keep what runs.
``LinkError``    the network or a peer: try again later.

A message says what, got, expected, and what to do, on one line. Commands print it and exit with 2.
"""

from __future__ import annotations


class EdgeGuardError(Exception):
    """Base of all errors that are shown to a user as one line.

    Args:
        what: the thing that is wrong, by its name: a file, a key, a tensor.
        got: what was found.
        expected: what would have been right.
        do: what the reader can do now.
    """

    def __init__(self, what: str, *, got: object = None, expected: object = None, do: str | None = None) -> None:
        self.what = what
        self.got = got
        self.expected = expected
        self.do = do
        parts = [what]
        if got is not None:
            parts.append(f"got {got}")
        if expected is not None:
            parts.append(f"expected {expected}")
        if do is not None:
            parts.append(do)
        super().__init__(" ".join("; ".join(parts).split()))


class ConfigError(EdgeGuardError):
    """The operator must change something: a file, an option, a port, a disk."""


class ModelError(EdgeGuardError):
    """The model's owner must change something: the model or data file cannot be used."""


class TrustError(EdgeGuardError):
    """Something is not what its signer made. It is refused, and what runs keeps running."""


class LinkError(EdgeGuardError):
    """The network or a peer failed; the same call may succeed later."""


EXIT_CLEAN = 0
EXIT_FINDINGS = 1
EXIT_USAGE = 2
EXIT_NOT_CHECKED = 3
EXIT_INTERNAL = 4
