"""``python -m edgeguard.hub --config hub.toml``: runs the hub until SIGTERM or Ctrl-C.

Exit codes: 0 stopped or checked, 2 something that the operator or the model's owner must change, told in one line,
4 a bug, told with its traceback.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from edgeguard.errors import EXIT_CLEAN, EXIT_INTERNAL, EXIT_USAGE, EdgeGuardError
from edgeguard.hub import config, service, workers


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="edgeguard hub", description="The hub of one fleet.")
    parser.add_argument("--config", type=Path, required=True, help="TOML file")
    parser.add_argument("--check", action="store_true", help="check configuration, files, port and broker, then stop")
    parser.add_argument("--workers", type=int, choices=range(65), metavar="N", help="processes that take reports")
    parser.add_argument("--log-level", choices=("debug", "info", "warning", "error"), default="info")
    options = parser.parse_args(arguments)
    logging.basicConfig(
        stream=sys.stderr,
        level=options.log_level.upper(),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    try:
        settings = config.load(options.config)
        if options.workers is not None:
            settings = workers.with_workers(settings, options.workers)
        if options.check:
            service.check(settings)
        else:
            service.run(settings)
    except EdgeGuardError as error:
        print(error, file=sys.stderr)
        return EXIT_USAGE
    except Exception:
        logging.getLogger(__name__).exception("the hub ended on an error of its own")
        return EXIT_INTERNAL
    return EXIT_CLEAN


if __name__ == "__main__":
    sys.exit(main())
