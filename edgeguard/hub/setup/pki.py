"""Certificates of one fleet: an authority, the broker's, the hub's and the devices', and the list of revoked ones.

Rules enforced here:

* EC P-256 and SHA-256 throughout (RFC 5480, RFC 5758); profile of RFC 5280, as strict verifiers want it;
* a certificate is good for one purpose: the broker's for servers, a device's and the hub's for clients, so that a
  device cannot stand in for the broker;
* a device's identity is its common name, which brokers take as the user name;
* the hub's certificate is signed by itself: the broker trusts this one alone where the hub connects, no authority;
* the list of revoked certificates never expires before the authority does: an expired list locks out every device;
* all begin a day early, for boards whose clock lags.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from edgeguard.errors import ConfigError

DAYS = 825
"""Default validity of the broker's, the hub's and the devices' certificates, in days."""
AUTHORITY_DAYS = 20 * 365

_EARLY = timedelta(days=1)
_NAME = re.compile(r"(?!-)[a-z0-9-]{1,63}(?<!-)(\.(?!-)[a-z0-9-]{1,63}(?<!-))*", re.IGNORECASE)
_NUMBERS = re.compile(r"[0-9.]+|.*\.[0-9]+")


@dataclass(frozen=True, kw_only=True)
class Credentials:
    """A certificate and its private key.

    Attributes:
        certificate: PEM.
        key: PEM, PKCS #8, not encrypted.
        serial: the certificate's serial number in hexadecimal.
        expires: when it ends.
    """

    certificate: bytes
    key: bytes
    serial: str
    expires: datetime

    def __repr__(self) -> str:
        return f"Credentials(serial={self.serial})"  # never the key


def check_host(host: str) -> str:
    """Return a host's name or address unchanged. Raises ConfigError if it is neither."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        if len(host) > 253 or not _NAME.fullmatch(host) or _NUMBERS.fullmatch(host):
            raise ConfigError(
                f"host {host!r}", expected="a host name or an IP address, without a port", do="correct it"
            ) from None
    return host


def authority(fleet: str, *, now: datetime) -> Credentials:
    """A new authority. It signs certificates and lists of revoked ones, and no other authority."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = _name(f"EdgeGuard fleet {fleet}"[:64])
    builder = (
        _builder(name, name, key.public_key(), now=now, end=now + timedelta(days=AUTHORITY_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs=True), critical=True)
    )
    return _signed(builder, key, key)


def server(by: Credentials, hosts: Sequence[str], *, now: datetime, days: int = DAYS) -> Credentials:
    """The broker's certificate.

    Args:
        by: the authority.
        hosts: names and addresses under which clients reach the broker; at least one.
        now: the time.
        days: validity; never beyond the authority's end.

    Raises:
        ConfigError: one of them is no host.
    """
    names: list[x509.GeneralName] = []
    for host in map(check_host, hosts):
        try:
            names.append(x509.IPAddress(ipaddress.ip_address(host)))
        except ValueError:
            names.append(x509.DNSName(host))
    extension = x509.SubjectAlternativeName(names)
    # A common name has 64 characters at most, a host's name 253; clients look at the alternative names alone.
    return _leaf(by, "EdgeGuard broker", ExtendedKeyUsageOID.SERVER_AUTH, extension, now=now, days=days)


def device(by: Credentials, name: str, *, now: datetime, days: int = DAYS) -> Credentials:
    """The certificate by which the broker knows a device: its common name is ``name``, 64 characters at most."""
    return _leaf(by, name, ExtendedKeyUsageOID.CLIENT_AUTH, None, now=now, days=days)


def hub(name: str, *, now: datetime, days: int = DAYS) -> Credentials:
    """The hub's own certificate, signed by itself."""
    return _leaf(None, name, ExtendedKeyUsageOID.CLIENT_AUTH, None, now=now, days=days)


def revocations(by: Credentials, revoked: Mapping[str, datetime], *, now: datetime) -> bytes:
    """The list of revoked certificates (RFC 5280, 5), PEM.

    Args:
        by: the authority.
        revoked: serial number in hexadecimal to when it was revoked.
        now: the time.
    """
    issuer, key = _load(by)
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(issuer.subject)
        .last_update(_seconds(now - _EARLY))
        .next_update(issuer.not_valid_after_utc)
        .add_extension(_issuer_key(key.public_key()), critical=False)
        .add_extension(x509.CRLNumber(int(now.timestamp())), critical=False)
    )
    for serial, at in sorted(revoked.items()):
        entry = x509.RevokedCertificateBuilder().serial_number(int(serial, 16)).revocation_date(_seconds(at))
        builder = builder.add_revoked_certificate(entry.build())
    return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM)


def revoked_serials(crl: bytes) -> set[str]:
    """The serial numbers, in hexadecimal, that a list names. Raises ConfigError if it is none."""
    try:
        return {f"{one.serial_number:x}" for one in x509.load_pem_x509_crl(crl)}
    except ValueError as error:
        raise ConfigError("list of revoked certificates", got=error, do="delete broker/revoked.pem") from error


def _leaf(
    by: Credentials | None,
    name: str,
    purpose: x509.ObjectIdentifier,
    more: x509.ExtensionType | None,
    *,
    now: datetime,
    days: int,
) -> Credentials:
    key = ec.generate_private_key(ec.SECP256R1())
    subject, end = _name(name), now + timedelta(days=days)
    if by is None:
        issuer, signer = subject, key
    else:
        parent, signer = _load(by)
        issuer, end = parent.subject, min(end, parent.not_valid_after_utc)
    builder = (
        _builder(subject, issuer, key.public_key(), now=now, end=end)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        .add_extension(_issuer_key(signer.public_key()), critical=False)
    )
    if more is not None:
        builder = builder.add_extension(more, critical=False)
    return _signed(builder, key, signer)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, *, now: datetime, end: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(_seconds(now - _EARLY))
        .not_valid_after(_seconds(end))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _signed(
    builder: x509.CertificateBuilder, key: ec.EllipticCurvePrivateKey, signer: ec.EllipticCurvePrivateKey
) -> Credentials:
    made = builder.sign(signer, hashes.SHA256())
    return Credentials(
        certificate=made.public_bytes(Encoding.PEM),
        key=key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
        serial=f"{made.serial_number:x}",
        expires=made.not_valid_after_utc,
    )


def load(certificate: bytes, key: bytes) -> Credentials:
    """Credentials from what was written. Raises ConfigError if they are not an authority's certificate and key."""
    try:
        made = x509.load_pem_x509_certificate(certificate)
        private = load_pem_private_key(key, None)
    except (ValueError, TypeError) as error:
        raise ConfigError("authority", got=error, expected="a certificate and a private key in PEM") from error
    if not isinstance(private, ec.EllipticCurvePrivateKey) or made.public_key() != private.public_key():
        raise ConfigError("authority", got="a key that is not the certificate's", do="restore both from a backup")
    return Credentials(
        certificate=certificate, key=key, serial=f"{made.serial_number:x}", expires=made.not_valid_after_utc
    )


def _load(by: Credentials) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    key = load_pem_private_key(by.key, None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return x509.load_pem_x509_certificate(by.certificate), key


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _issuer_key(key: ec.EllipticCurvePublicKey) -> x509.AuthorityKeyIdentifier:
    return x509.AuthorityKeyIdentifier.from_issuer_public_key(key)


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        key_cert_sign=signs,
        crl_sign=signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _seconds(at: datetime) -> datetime:
    """Certificates know whole seconds."""
    return at.replace(microsecond=0)
