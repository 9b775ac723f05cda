"""The ``edgeguard`` command: one module per subcommand, heavy imports inside commands, one line per error.

Exit codes: 0 clean, 1 findings, 2 usage or configuration, 3 nothing could be checked, 4 internal.
"""

from __future__ import annotations

import errno
import os
import sys
import traceback
from typing import NoReturn

import typer

from edgeguard import __version__
from edgeguard.cli import (
    attack,
    audit,
    bench,
    calibrate,
    config,
    convert,
    demo,
    doctor,
    export,
    hub,
    inspect,
    private,
    release,
    repair,
    run,
    score,
    service,
)
from edgeguard.errors import EXIT_INTERNAL, EXIT_USAGE, EdgeGuardError

_EXTRAS = {
    **dict.fromkeys(("ai_edge_litert",), "device"),
    **dict.fromkeys(("tuf", "securesystemslib"), "update"),
    **dict.fromkeys(("keras", "tensorflow", "sklearn", "onnx"), "convert"),
    **dict.fromkeys(("cryptography", "scipy", "sqlalchemy", "starlette", "uvicorn", "jinja2", "matplotlib"), "hub"),
    **dict.fromkeys(("alembic", "fastapi", "prometheus_client", "psycopg", "pydantic"), "hub"),
    **dict.fromkeys(("amqtt",), "demo"),
    **dict.fromkeys(("nacl", "spu", "jax"), "private"),
}
"""Which extra brings a package that a command may miss."""

_OPERATOR = frozenset({
    errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOENT,
    errno.EISDIR, errno.ENOTEMPTY, errno.EBUSY,
})  # fmt: skip
"""Failures of the file system that the operator can mend."""

app = typer.Typer(
    name="edgeguard",
    help="Guards neural networks against backdoors on the device, and heals them where they are made.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for module in (
    demo,
    convert,
    calibrate,
    inspect,
    audit,
    score,
    bench,
    run,
    doctor,
    export,
    service,
    config,
    hub,
    release,
    repair,
    attack,
    private,
):
    module.register(app)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"edgeguard {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def main() -> None:
    """Entry point of the console script."""
    try:
        app()
    except EdgeGuardError as error:
        print(f"edgeguard: {error}", file=sys.stderr)
        sys.exit(EXIT_USAGE)
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            _internal()
        print(
            f"edgeguard: package {error.name} is not installed; this command needs more: "
            f"pip install 'edgeguard[{extra}]'",
            file=sys.stderr,
        )
        sys.exit(EXIT_USAGE)
    except BrokenPipeError:
        # The reader went away (``| head``); there is nobody left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        if error.errno not in _OPERATOR:
            _internal()
        where = f"file {error.filename}" if error.filename else "disk or file system"
        print(f"edgeguard: {where}; got {error.strerror}; free space, or choose another place", file=sys.stderr)
        sys.exit(EXIT_USAGE)
    except Exception:
        _internal()


def _internal() -> NoReturn:
    """Report a mistake of ours."""
    traceback.print_exc()
    print("edgeguard: internal error; please report it with the lines above", file=sys.stderr)
    sys.exit(EXIT_INTERNAL)
