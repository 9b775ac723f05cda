"""What agent and hub share of an MQTT connection: protocol version, credentials, TLS, and one attempt to see if a
broker is there.

Rules enforced here:

* agent and hub each speak the version of MQTT that their configuration names; brokers deliver between versions;
* TLS is 1.2 or later, and the broker's certificate is checked against its host name;
* a file that cannot be used is named, with what is wrong with it; nobody is ever asked for a pass phrase;
* each connection reads certificates and key anew: renewed ones hold from the next on, without a restart;
* a session that outlives its connection ends some days after it: a hub that is gone for good does not fill a broker.
"""

from __future__ import annotations

import functools
import logging
import ssl
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from edgeguard.errors import ConfigError, LinkError
from edgeguard.settings import BrokerConfig, key_file, password

CONNECT_TIMEOUT_S = 5.0
SESSION_EXPIRY_S = 7 * 24 * 3600
"""How long a broker keeps a session that was not clean (MQTT 5, 3.1.2.11.2); of MQTT 3.1.1 the broker decides alone."""
RECEIVE_MAXIMUM = 4096
"""Messages of QoS 1 that a broker may send ahead of their acknowledgements (MQTT 5, 3.1.2.11.3)."""

log = logging.getLogger(__name__)


def client(
    broker: BrokerConfig,
    client_id: str,
    secret: str | None,
    *,
    clean_session: bool,
    reconnects: bool = False,
    kind: Callable[..., mqtt.Client] = mqtt.Client,
) -> mqtt.Client:
    """A client of the configured protocol, not yet connected: see :func:`connect`.

    Args:
        broker: the broker.
        client_id: the client's id; empty for nobody in particular.
        secret: the password, where there is one.
        clean_session: without it the broker keeps subscriptions, and messages of QoS 1, while the client is away.
        reconnects: its loop connects again by itself when a connection ends.
        kind: makes it from the arguments of paho's client.

    Raises:
        ConfigError: a certificate or key cannot be used.
    """
    is_5 = broker.protocol == "5"
    made = kind(
        CallbackAPIVersion.VERSION2,
        client_id=client_id,
        clean_session=None if is_5 else clean_session,
        protocol=mqtt.MQTTv5 if is_5 else mqtt.MQTTv311,
        reconnect_on_failure=reconnects,
    )
    prepare(made, broker, secret)
    return made


def connect(
    client: mqtt.Client,
    broker: BrokerConfig,
    *,
    clean_session: bool,
    later: bool = False,
    max_packet: int | None = None,
) -> None:
    """Connect a client that :func:`client` made.

    Args:
        client: the client.
        broker: the broker.
        clean_session: as it was given to :func:`client`.
        later: only once the client's loop runs, which then raises what this does not.
        max_packet: with MQTT 5 the broker shall keep larger packets, in bytes, to itself.

    Raises:
        OSError: there is no such host, or nobody listens.
        ValueError: the host is no name.
    """
    more: dict[str, Any] = {}
    if broker.protocol == "5":
        properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        properties.SessionExpiryInterval = 0 if clean_session else SESSION_EXPIRY_S
        properties.ReceiveMaximum = RECEIVE_MAXIMUM
        if max_packet is not None:
            properties.MaximumPacketSize = max_packet
        more = {"clean_start": clean_session, "properties": properties}
    open_ = client.connect_async if later else client.connect
    open_(broker.host, broker.port, broker.keepalive_s, **more)


def keep_to_limits(client: mqtt.Client, properties: Properties | None) -> None:
    """Publish no faster than the broker's CONNACK allows: to be called in ``on_connect``.

    A broker ends the connection of a client that has more unacknowledged messages under way than the Receive Maximum
    of the CONNACK (MQTT 5, 4.9), which paho does not look at.
    """
    allowed = getattr(properties, "ReceiveMaximum", None)
    if allowed and not 0 < client.max_inflight_messages <= allowed:
        # The public setter refuses to do so on an open connection. Nothing is under way in on_connect.
        client._max_inflight_messages = allowed


def prepare(client: mqtt.Client, broker: BrokerConfig, secret: str | None) -> None:
    """Give a client that was not yet connected its time limit, user, password and TLS.

    Raises:
        ConfigError: a certificate or key cannot be used.
    """
    client.connect_timeout = CONNECT_TIMEOUT_S
    if broker.username:
        client.username_pw_set(broker.username, secret)
    if broker.ca:
        client.tls_set_context(tls(broker, broker.ca))


def tls(broker: BrokerConfig, ca: Path) -> ssl.SSLContext:
    """What a TLS connection to the broker rests on, with the client's own certificate where it has one.

    Raises:
        ConfigError: a certificate or key cannot be read, needs a pass phrase, or they do not belong together.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    _load("broker.ca", ca, "a PEM certificate", context.load_verify_locations)
    certificate, key = broker.certificate, key_file(broker)
    if certificate and key:
        # Alone first: of the pair, OpenSSL does not say which file it could not read.
        _load(
            "broker.certificate",
            certificate,
            "a PEM certificate",
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations,
        )
        _load(
            "broker.key",
            key,
            f"the PEM private key of {certificate}",
            lambda path: context.load_cert_chain(certificate, path, _no_pass_phrase(path)),
        )
        _warn_of_readers(key)
    return context


def check_files(broker: BrokerConfig) -> None:
    """Read what a connection needs from disk, without connecting.

    Raises:
        ConfigError: the password file, a certificate or the key cannot be used.
    """
    prepare(mqtt.Client(CallbackAPIVersion.VERSION2), broker, password(broker))


def check(broker: BrokerConfig) -> None:
    """Connect once, as nobody in particular, and disconnect.

    Raises:
        LinkError: there is no such host, nobody listens, or the broker refuses.
        ConfigError: the password file, a certificate or the key cannot be used.
    """
    one = client(broker, "", password(broker), clean_session=True)
    answer: list[str] = []

    def on_connect(_c: mqtt.Client, _u: Any, _f: Any, code: Any, _p: Any) -> None:
        answer.append(f"refused: {code}" if code.is_failure else "")
        one.disconnect()

    one.on_connect = on_connect
    one.on_disconnect = lambda _c, _u, _f, code, _p: answer.append(str(code))
    deadline = time.monotonic() + CONNECT_TIMEOUT_S
    try:
        connect(one, broker, clean_session=True)
        while not answer and time.monotonic() < deadline:
            one.loop(timeout=0.2)
    except (OSError, ValueError) as error:
        answer.append(reason(error))
    failure = answer[0] if answer else f"no answer within {CONNECT_TIMEOUT_S:g} s"
    if failure:
        raise LinkError(
            f"broker {broker.host}:{broker.port}",
            got=failure,
            expected=f"an MQTT {broker.protocol} broker",
            do="start it, or correct [broker] in the configuration",
        )


def reason(error: Exception) -> str:
    """Why a connection failed, in few words."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _load(name: str, path: Path, expected: str, read: Callable[[Path], None]) -> None:
    try:
        read(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{name} {path}", got=reason(error), expected=expected, do="check the file") from error


def _no_pass_phrase(path: Path) -> Callable[[], str]:
    """What OpenSSL asks for the pass phrase of an encrypted key; without it, it asks on the terminal."""

    def asked() -> str:
        raise ConfigError(
            f"broker.key {path}", got="a key that a pass phrase encrypts", expected="one without", do="decrypt it"
        )

    return asked


@functools.cache  # one line in the log for each process, not for each connection
def _warn_of_readers(key: Path) -> None:
    if key.stat().st_mode & stat.S_IROTH:
        log.warning("broker.key %s: every user of this machine can read it; chmod o= it", key)
