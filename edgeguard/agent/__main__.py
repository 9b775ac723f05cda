"""``python -m edgeguard.agent --config agent.toml``: run until told to stop (SIGTERM, SIGINT)."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path

from edgeguard.agent import config as configuration
from edgeguard.agent import daemon, startup
from edgeguard.errors import EXIT_CLEAN, EXIT_INTERNAL, EXIT_USAGE, EdgeGuardError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the agent. Returns the exit code: 0 stopped as told, 2 something must be corrected, 4 a bug."""
    parser = argparse.ArgumentParser(prog="edgeguard run", description="Run the EdgeGuard agent on this device.")
    parser.add_argument("--config", type=Path, required=True, help="the agent's TOML configuration")
    parser.add_argument("--check", action="store_true", help="try configuration, model and broker once, then exit")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    # Pillow warns of damaged pictures line by line; the source says once that one was refused.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: stop.set())
    try:
        config = configuration.load(options.config)
        if options.check:
            startup.check(config)
        else:
            daemon.Agent(config).run(stop.is_set)
    except EdgeGuardError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE
    except Exception:
        logging.getLogger(__name__).exception("the agent ended on an error of its own")
        return EXIT_INTERNAL
    return EXIT_CLEAN


if __name__ == "__main__":
    sys.exit(main())
