"""What commands print with: aligned facts, and progress on stderr that needs no more than a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import typer

Progress = Callable[[str, int, int], None]


def facts(rows: Sequence[tuple[str, str]]) -> None:
    """Print pairs in two columns."""
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        typer.echo(f"{name:<{width}}  {value}")


@contextmanager
def progress(*, quiet: bool = False) -> Iterator[Progress]:
    """A progress line on stderr: rewritten in place on a terminal, at most one line every two seconds elsewhere."""
    terminal = sys.stderr.isatty()
    last = 0.0

    def show(text: str, done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        line = f"[{done}/{total}] {text}"
        if quiet or (done < total and now - last < (0.1 if terminal else 2.0)):
            return
        last = now
        if terminal:
            sys.stderr.write(f"\r\033[K{line}")
        else:
            sys.stderr.write(line + "\n")
        sys.stderr.flush()

    try:
        yield show
    finally:
        if terminal and not quiet:
            sys.stderr.write("\r\033[K")
            sys.stderr.flush()
