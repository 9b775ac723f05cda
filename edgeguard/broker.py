"""What agent and hub share of an MQTT connection: credentials, TLS, and one attempt to see if a broker is there."""

from __future__ import annotations

import time
from typing import Any

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion

from edgeguard.errors import ConfigError, LinkError
from edgeguard.settings import BrokerConfig, password

CONNECT_TIMEOUT_S = 5.0


def prepare(client: mqtt.Client, broker: BrokerConfig, secret: str | None) -> None:
    """Give a client that was not yet connected its time limit, user, password and TLS.

    Raises:
        ConfigError: the authority's certificate cannot be read.
    """
    client.connect_timeout = CONNECT_TIMEOUT_S
    if broker.username:
        client.username_pw_set(broker.username, secret)
    if broker.ca:
        try:
            client.tls_set(ca_certs=str(broker.ca))
        except (OSError, ValueError) as error:
            raise ConfigError(f"broker.ca {broker.ca}", got=error, expected="a PEM certificate") from error


def check_files(broker: BrokerConfig) -> None:
    """Read what a connection needs from disk, without connecting.

    Raises:
        ConfigError: the password file or the authority's certificate cannot be read.
    """
    prepare(mqtt.Client(CallbackAPIVersion.VERSION2), broker, password(broker))


def check(broker: BrokerConfig) -> None:
    """Connect once, as nobody in particular, and disconnect.

    Raises:
        LinkError: there is no such host, nobody listens, or the broker refuses.
        ConfigError: the password file or the authority's certificate cannot be read.
    """
    client = mqtt.Client(CallbackAPIVersion.VERSION2, protocol=mqtt.MQTTv311, reconnect_on_failure=False)
    prepare(client, broker, password(broker))
    answer: list[str] = []

    def on_connect(_c: mqtt.Client, _u: Any, _f: Any, code: Any, _p: Any) -> None:
        answer.append(f"refused: {code}" if code.is_failure else "")
        client.disconnect()

    client.on_connect = on_connect
    client.on_disconnect = lambda _c, _u, _f, code, _p: answer.append(str(code))
    deadline = time.monotonic() + CONNECT_TIMEOUT_S
    try:
        client.connect(broker.host, broker.port, broker.keepalive_s)
        while not answer and time.monotonic() < deadline:
            client.loop(timeout=0.2)
    except (OSError, ValueError) as error:
        answer.append(reason(error))
    failure = answer[0] if answer else f"no answer within {CONNECT_TIMEOUT_S:g} s"
    if failure:
        raise LinkError(
            f"broker {broker.host}:{broker.port}",
            got=failure,
            expected="an MQTT broker",
            do="start it, or correct [broker] in the configuration",
        )


def reason(error: Exception) -> str:
    """Why a connection failed, in few words."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
