"""What commands print with: aligned facts, and progress on stderr that needs no more than a terminal.

Training frameworks write to stderr from C++ whatever they like. While progress is shown, the process's stderr goes to a
temporary file, and only progress to the real one; the file is shown when something of ours breaks.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO

import typer

from edgeguard.errors import EdgeGuardError

Progress = Callable[[str, int, int], None]


def facts(rows: Sequence[tuple[str, str]]) -> None:
    """Print pairs in two columns."""
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        typer.echo(f"{name:<{width}}  {value}")


@contextmanager
def progress(*, quiet: bool = False) -> Iterator[Progress]:
    """A progress line on stderr: rewritten in place on a terminal, at most one line every two seconds elsewhere.

    Args:
        quiet: show no progress; other libraries' noise is kept away all the same.
    """
    with _own_stderr() as stream:
        terminal = stream.isatty()
        last = 0.0

        def show(text: str, done: int, total: int) -> None:
            nonlocal last
            now = time.monotonic()
            if quiet or (done < total and now - last < (0.1 if terminal else 2.0)):
                return
            last = now
            line = f"[{done}/{total}] {text}"
            stream.write(f"\r\033[K{line}" if terminal else f"{line}\n")
            stream.flush()

        try:
            yield show
        finally:
            if terminal and not quiet:
                stream.write("\r\033[K")
                stream.flush()


@contextmanager
def _own_stderr() -> Iterator[TextIO]:
    """The real stderr for ourselves, while file descriptor 2 leads to a temporary file."""
    sys.stderr.flush()
    real = os.dup(2)
    with os.fdopen(os.dup(real), "w") as stream, tempfile.TemporaryFile() as noise:
        os.dup2(noise.fileno(), 2)
        broken = False
        try:
            yield stream
        except (EdgeGuardError, ModuleNotFoundError):
            raise
        except Exception:
            broken = True
            raise
        finally:
            sys.stderr.flush()
            os.dup2(real, 2)
            os.close(real)
            if broken:
                noise.seek(0)
                os.write(2, noise.read()[-20_000:])
