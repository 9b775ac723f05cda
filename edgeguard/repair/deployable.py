"""Whether devices will take a repaired file in place of the one that they run: asked before it is offered.

Rules enforced here:

* what a device would refuse at once is no repair: another interface, or other classes than it knows of its self-test
  inputs (:mod:`edgeguard.detection.replacement`);
* where the sidecar of the running file is not at hand, or says too little, only devices can tell. So it is after a
  repair of a repair: they hold against the last release that was signed offline.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edgeguard.detection import replacement, sidecar
from edgeguard.detection.guarded import GuardedModel
from edgeguard.detection.sidecar import Sidecar
from edgeguard.errors import EdgeGuardError, ModelError


@dataclass(frozen=True)
class Running:
    """The file that devices run, and what they know of its answers; None where that is not at hand."""

    model: GuardedModel
    held: Sidecar | None

    @classmethod
    def at(cls, path: Path, model: GuardedModel) -> Running:
        """With the sidecar that lies beside the file."""
        described = model.metadata
        if described.sidecar_digest is None or described.class_output is None:
            return cls(model, None)
        try:
            content = sidecar.path_beside(path).read_bytes()
            held = sidecar.decode(content, digest=described.sidecar_digest, metadata=described, name="sidecar")
        except (OSError, EdgeGuardError):
            held = None
        return cls(model, held)

    def check(self, guarded: bytes) -> None:
        """Raise ModelError for a repaired file that devices would refuse."""
        new = GuardedModel.load(guarded)
        replacement.check_interface(new, self.model, name="repaired model")
        if self.held is None:
            return
        known = replacement.agreement(self.held, lambda x: new.measure(x).predicted)
        if known.says_something and not known.holds:
            raise ModelError(
                "repaired model",
                got=f"the known class for {known.same} of {known.count} self-test inputs",
                expected="nine in ten, or devices refuse it",
            )
