"""Private models at the hub: what their fleet is asked through three parties, and whether a finding is believed.

The hub sees neither the trainable model nor clean data of a private model, and asks devices for none of its channels.
Who brings a finding, and the files it is in, are hostile until checked. Rules enforced here:

* a finding counts when two of the three parties, at least, signed the same one: of three of which two follow the
  protocol, one that did speaks for it. A file that somebody says is a party's is nothing;
* it is for the case's model when the plan that it binds says so, for these parties and as many classes. That the model
  which was shared is the one that devices run is the owner's word, in the plan, and nobody's proof;
* what could not be compared is *could not check*. So is "no sign" where less was looked at than what was ever measured:
  fewer steps or inputs than usual, or features, where most backdoors are missed;
* flagged labels confirm a suspicion of one of them. Others say that something is wrong, and not what was suspected.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from edgeguard.contract.guard import GuardMetadata
from edgeguard.contract.private import Finding, Inspection, Parties, Party, Round, Signed
from edgeguard.errors import ConfigError, TrustError
from edgeguard.hub.cases import Case, Result, private_id
from edgeguard.hub.config import HubConfig, PrivateConfig

AGREEING = 2
"""So many parties must say the same."""
USUAL = Inspection(id="as-usual", parties="0" * 64, layers=(1, 4))
"""An inspection with the number of steps and inputs that is measured."""
_MAX_BYTES = 1 << 20
_Outcome = Literal["confirmed", "not_confirmed", "could_not_check"]


@dataclass(frozen=True, kw_only=True)
class Private:
    """What a hub knows of private mode: its fleet, the three parties, and what rounds ask."""

    fleet: str
    parties: Parties
    config: PrivateConfig

    def round(self, case: Case, guard: GuardMetadata) -> Round:
        """The question to the fleet of a case: which channels of the deepest tapped layer are least active.

        Raises:
            ConfigError: the case's model is not private, or has no layer to ask about.
        """
        taps = [tap for tap in guard.taps if tap.kind == "l1" and tap.channels > 1]
        if not case.private or not taps:
            got = "no tapped layer" if case.private else "a model that is not private"
            raise ConfigError(f"private round of case {case.id}", got=got, expected="a private model with one")
        tap = taps[-1]
        fields = {
            "id": private_id(case),
            "fleet": self.fleet,
            "parties": self.parties.digest,
            "model_digest": case.model_digest,
            "layer": tap.source_layer or tap.tensor,
            "channels": tap.channels,
            "kind": self.config.kind,
            "prune": min(max(1, round(self.config.share * tap.channels)), tap.channels - 1),
            "min_devices": self.config.min_devices,
        }
        try:
            return msgspec.convert(fields, Round)
        except msgspec.ValidationError as error:
            raise ConfigError(f"private round of case {case.id}", got=error, expected="a layer to ask about") from error

    def judge(self, case: Case, guard: GuardMetadata, plan: Inspection, signed: Sequence[Signed]) -> Result:
        """What a finding says of a case.

        Args:
            case: of a private model.
            guard: what the model's guarded file says of itself.
            plan: the inspection, as its owner wrote it.
            signed: what parties signed, each once.

        Raises:
            ConfigError: the plan is for another model, or for other parties.
            TrustError: a signature is not a party's, parties do not agree, or too few signed.
        """
        what = f"plan of case {case.id}"
        if plan.parties != self.parties.digest:
            raise ConfigError(what, got="other parties", expected=self.parties.digest)
        if plan.model_digest != case.model_digest:
            raise ConfigError(what, got=f"model {plan.model_digest}", expected=case.model_digest)
        if plan.classes != len(guard.classes) or case.label not in range(plan.classes):
            raise ConfigError(what, got=f"{plan.classes} classes", expected=f"the model's {len(guard.classes)}")
        finding, names = self._agreed(plan, signed)
        verdict, reason = _verdict(case, plan, finding)
        summary = {
            "finding": {"reason": f"{reason}, as {' and '.join(names)} signed"},
            "private": {
                "plan": plan.id, "inspection": plan.digest, "verdict": finding.verdict,
                "labels": list(finding.labels), "space": plan.space, "steps": plan.steps, "signed": names,
            },
        }  # fmt: skip
        return Result(verdict=verdict, repaired=False, summary=summary)

    def _agreed(self, plan: Inspection, signed: Sequence[Signed]) -> tuple[Finding, list[str]]:
        """What enough parties signed alike, and their names."""
        what = f"finding of inspection {plan.id}"
        for one in signed:
            party = self.parties.parties[one.party]
            if not _has_signed(party, one):
                raise TrustError(what, got=f"a signature that is not {party.name}'s", do="get it from that party again")
            if one.finding.inspection != plan.digest:
                raise TrustError(what, got=f"one of another inspection from {party.name}", do="check plan and results")
        if len({one.party for one in signed}) < max(AGREEING, len(signed)):
            raise TrustError(
                what, got=f"{len({one.party for one in signed})} parties in {len(signed)} results",
                expected=f"at least {AGREEING}, each once",
            )  # fmt: skip
        finding = signed[0].finding
        if any(one.finding != finding for one in signed):
            raise TrustError(what, got="parties that do not agree", do="ask them, and inspect with a new plan")
        if any(label >= plan.classes for label in finding.labels):
            raise TrustError(what, got=f"labels {finding.labels}", expected=f"0 to {plan.classes - 1}")
        return finding, [self.parties.parties[one.party].name for one in sorted(signed, key=lambda one: one.party)]


def read(config: HubConfig) -> Private | None:
    """The parties of a configuration; None where it names none. Raises ConfigError."""
    if config.private is None:
        return None
    path = config.private.parties
    try:
        with path.open("rb") as file:
            parties = msgspec.json.decode(file.read(_MAX_BYTES), type=Parties)
        keys = {_key(party).public_numbers() for party in parties.parties}
    except OSError as error:
        raise ConfigError(f"private.parties {path}", got=error.strerror, do="check the path") from error
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise ConfigError(f"private.parties {path}", got=error, expected="parties.json, as they joined") from error
    if len(keys) < len(parties.parties):
        raise ConfigError(
            f"private.parties {path}", got="one key for two parties", expected="three that do not collude"
        )
    return Private(fleet=config.fleet, parties=parties, config=config.private)


def _verdict(case: Case, plan: Inspection, finding: Finding) -> tuple[_Outcome, str]:
    if finding.verdict == "could_not_check":
        return "could_not_check", "too few labels could be compared"
    if case.label in finding.labels:
        others = [label for label in finding.labels if label != case.label]
        return "confirmed", f"label {case.label} stands out" + (f", and so do {_listed(others)}" if others else "")
    if finding.labels:
        return "could_not_check", f"label {case.label} does not stand out, but {_listed(finding.labels)} do"
    if plan.space == "features":
        return "could_not_check", "no label stands out among features, where most backdoors are missed"
    if plan.steps < USUAL.steps or min(plan.sought, plan.held_out) < USUAL.sought:
        return "could_not_check", f"no label stands out, but fewer than {USUAL.steps} steps or {USUAL.sought} inputs"
    return "not_confirmed", "no label stands out"


def _listed(labels: Sequence[int]) -> str:
    return ", ".join(map(str, labels))


def _has_signed(party: Party, signed: Signed) -> bool:
    try:
        _key(party).verify(bytes.fromhex(signed.signature), signed.finding.signed_bytes, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        return False
    return True


def _key(party: Party) -> ec.EllipticCurvePublicKey:
    key = x509.load_pem_x509_certificate(party.certificate.encode()).public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise ConfigError(f"certificate of party {party.name}", got="another kind of key", expected="an elliptic curve")
    return key
