"""An MQTT broker for demonstrations, in a process of its own: amqtt on a loopback port, open to anyone there.

    python -m edgeguard.demo.broker PORT

Not for production: it keeps nothing on disk and asks nobody who they are. Use mosquitto there.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import sys

from amqtt.broker import Broker


def configuration(port: int) -> dict[str, object]:
    """The broker's settings: one listener on loopback, no authentication, no plug-ins that publish."""
    return {
        "listeners": {"default": {"type": "tcp", "bind": f"127.0.0.1:{port}"}},
        "plugins": {"amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}},
    }


async def serve(port: int) -> None:
    """Run until SIGTERM or SIGINT."""
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    broker = Broker(configuration(port))
    await broker.start()
    await stopping.wait()
    await broker.shutdown()


def main() -> int:
    """Entry point of the process."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    asyncio.run(serve(int(sys.argv[1])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
