"""The certificates of a fleet: what they are good for, and for whom, as OpenSSL sees it."""

from __future__ import annotations

import ipaddress
import ssl
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from edgeguard.errors import ConfigError
from edgeguard.hub.setup import pki
from edgeguard.hub.setup.pki import Credentials

NOW = datetime.now(timezone.utc)


@pytest.fixture(scope="module")
def authority() -> Credentials:
    return pki.authority("gate", now=NOW)


def context(protocol: int, folder: Path, own: Credentials | None, trusts: Credentials) -> ssl.SSLContext:
    """One side of a connection, as strict as Python can be."""
    made = ssl.SSLContext(protocol)
    made.verify_flags |= ssl.VERIFY_X509_STRICT
    made.load_verify_locations(cadata=trusts.certificate.decode())
    if own is not None:
        (folder / "c.pem").write_bytes(own.certificate)
        (folder / "k.pem").write_bytes(own.key)
        made.load_cert_chain(folder / "c.pem", folder / "k.pem")
    return made


def shake_hands(client: ssl.SSLContext, server: ssl.SSLContext, host: str) -> None:
    """A TLS handshake in memory. Raises ssl.SSLError if either side refuses the other."""
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [client.wrap_bio(down, up, server_hostname=host), server.wrap_bio(up, down, server_side=True)]
    for _ in range(5):
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue


def connect(
    folder: Path, server: Credentials, authority: Credentials, host: str, *, client: Credentials | None = None
) -> None:
    """A client that trusts the authority connects; with ``client``, to a server that asks for its certificate."""
    listening = context(ssl.PROTOCOL_TLS_SERVER, folder, server, authority)
    if client is not None:
        listening.verify_mode = ssl.CERT_REQUIRED
    shake_hands(context(ssl.PROTOCOL_TLS_CLIENT, folder, client, authority), listening, host)


@pytest.mark.parametrize("host", ["broker.example", "192.168.1.5", "2001:db8::1", "x"])
def test_the_broker_is_known_by_each_of_its_names_and_addresses(
    authority: Credentials, host: str, tmp_path: Path
) -> None:
    server = pki.server(authority, ["broker.example", "192.168.1.5", "2001:db8::1", "x"], now=NOW)
    connect(tmp_path, server, authority, host)
    with pytest.raises(ssl.SSLCertVerificationError, match="mismatch"):
        connect(tmp_path, server, authority, "other.example")


def test_a_device_is_known_by_its_name(authority: Credentials, tmp_path: Path) -> None:
    device = pki.device(authority, "camera-1", now=NOW)
    connect(tmp_path, pki.server(authority, ["b"], now=NOW), authority, "b", client=device)
    subject = x509.load_pem_x509_certificate(device.certificate).subject
    assert subject.rfc4514_string() == "CN=camera-1"


def test_a_device_cannot_stand_in_for_the_broker(authority: Credentials, tmp_path: Path) -> None:
    with pytest.raises(ssl.SSLError, match="certificate"):
        connect(tmp_path, pki.device(authority, "b", now=NOW), authority, "b")


def test_the_broker_cannot_stand_in_for_a_device(authority: Credentials, tmp_path: Path) -> None:
    server = pki.server(authority, ["b"], now=NOW)
    with pytest.raises(ssl.SSLError, match="certificate"):
        connect(tmp_path, server, authority, "b", client=server)


def test_the_hub_is_no_device_of_the_authority(authority: Credentials, tmp_path: Path) -> None:
    with pytest.raises(ssl.SSLError, match="certificate"):
        connect(tmp_path, pki.server(authority, ["b"], now=NOW), authority, "b", client=pki.hub("_hub", now=NOW))


@pytest.mark.parametrize("kind", ["server", "device", "hub"])
def test_only_the_authority_can_sign(authority: Credentials, kind: str) -> None:
    leaf = {
        "server": pki.server(authority, ["b"], now=NOW),
        "device": pki.device(authority, "d", now=NOW),
        "hub": pki.hub("_hub", now=NOW),
    }[kind]
    for made, signs in ((authority, True), (leaf, False)):
        extensions = x509.load_pem_x509_certificate(made.certificate).extensions
        assert extensions.get_extension_for_class(x509.BasicConstraints).value.ca is signs
        assert extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign is signs


def test_keys_are_p_256_and_no_two_are_alike(authority: Credentials) -> None:
    made = [authority, pki.device(authority, "d", now=NOW), pki.device(authority, "d", now=NOW)]
    keys = [x509.load_pem_x509_certificate(one.certificate).public_key() for one in made]
    assert all(isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name == "secp256r1" for key in keys)
    assert len({one.key for one in made}) == len({one.serial for one in made}) == len(made)


@pytest.mark.parametrize(("days", "lasts"), [(825, 825), (30, 30), (36500, pki.AUTHORITY_DAYS)])
def test_a_certificate_lasts_as_long_as_was_asked_for_but_not_beyond_its_authority(
    authority: Credentials, days: int, lasts: int
) -> None:
    made = x509.load_pem_x509_certificate(pki.device(authority, "d", now=NOW, days=days).certificate)
    assert abs(made.not_valid_after_utc - NOW - timedelta(days=lasts)) < timedelta(seconds=2)
    assert made.not_valid_before_utc < NOW - timedelta(hours=23)  # for a board whose clock lags


def test_a_list_of_revoked_certificates_names_them_and_lasts_as_long_as_the_authority(authority: Credentials) -> None:
    one, other = (pki.device(authority, name, now=NOW) for name in ("a", "b"))
    text = pki.revocations(authority, {one.serial: NOW}, now=NOW)
    listed = x509.load_pem_x509_crl(text)
    issuer = x509.load_pem_x509_certificate(authority.certificate)
    key = issuer.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    assert listed.is_signature_valid(key)
    assert listed.next_update_utc == issuer.not_valid_after_utc
    assert listed.get_revoked_certificate_by_serial_number(int(one.serial, 16)) is not None
    assert listed.get_revoked_certificate_by_serial_number(int(other.serial, 16)) is None
    assert pki.revoked_serials(text) == {one.serial}


def test_an_authority_that_is_none_is_told(authority: Credentials) -> None:
    other = pki.authority("other", now=NOW)
    assert pki.load(authority.certificate, authority.key) == authority
    for certificate, key in (
        (b"", authority.key),
        (authority.certificate, b"nonsense"),
        (authority.certificate, other.key),
    ):
        with pytest.raises(ConfigError, match="authority"):
            pki.load(certificate, key)


def test_a_key_does_not_show_in_what_is_printed(authority: Credentials) -> None:
    assert "PRIVATE" not in repr(authority)


@pytest.mark.parametrize("host", ["b", "broker.example", "a-b.c1", "10.0.0.1", "::1", "B.Example"])
def test_a_host_is_a_name_or_an_address(host: str) -> None:
    assert pki.check_host(host) == host


@pytest.mark.parametrize(
    "host",
    [
        *("", " ", "a b", "a/b", "b:8883", "mqtt://b", "*.example", "-a", "a-", "a..b", ".a", "1.2.3", "1.2.3.456"),
        *("a\nb", "a" * 64, "[::1]", "b.example.", "é.example", ".".join(["a" * 60] * 5)),
    ],
)
def test_what_is_no_host_is_told_in_one_line(host: str) -> None:
    with pytest.raises(ConfigError, match="a host name or an IP address") as caught:
        pki.check_host(host)
    assert "\n" not in str(caught.value)


def test_an_address_stands_in_the_certificate_as_one(authority: Credentials) -> None:
    made = x509.load_pem_x509_certificate(pki.server(authority, ["10.0.0.1", "b"], now=NOW).certificate)
    names = made.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.IPAddress) == [ipaddress.ip_address("10.0.0.1")]
    assert names.get_values_for_type(x509.DNSName) == ["b"]
