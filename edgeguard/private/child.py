"""Runs a joint computation in a process of its own: SPU ends its process when a peer disappears, and prints at will.

Rules enforced here:

* a whole result counts, whatever becomes of the child after it: parties leave one after another;
* a child that ends without one is a party that was lost, and an error.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import TypeVar

from edgeguard.errors import ConfigError, EdgeGuardError, LinkError, ModelError

Progress = Callable[[str, int, int], None]
LEAVE_S = 20.0
T = TypeVar("T")


def run_apart(work: Callable[[Progress, Callable[[T], None]], None], progress: Progress) -> T:
    """Run ``work`` in a child.

    Args:
        work: called with a function to report progress with, and one to deliver the result with, which is to be called
            while the link to the others still stands.
        progress: called in this process.

    Raises:
        EdgeGuardError: as ``work`` raised it.
        LinkError: the child ended without a result.
    """
    # Forked, so that what was collected need not be sent; SPU and JAX are loaded in the child only.
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(theirs, work), daemon=True)
    process.start()
    theirs.close()
    try:
        while True:
            kind, value = ours.recv()
            if kind == "progress":
                progress(*value)
            elif kind == "error":
                raise value
            else:
                # Leaving in order takes a moment, in which the others get what they still wait for.
                process.join(LEAVE_S)
                return value
    except EOFError as error:
        raise LinkError("joint computation", got="another party is gone", do="start all three parties again") from error
    finally:
        process.kill()
        process.join()


def _child(pipe: Connection, work: Callable[[Progress, Callable[[T], None]], None]) -> None:
    nothing = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nothing, stream)
    try:
        work(
            lambda text, done, total: pipe.send(("progress", (text, done, total))),
            lambda result: pipe.send(("result", result)),
        )
    except EdgeGuardError as error:
        pipe.send(("error", type(error)(str(error))))
    except ModuleNotFoundError as error:
        missing = ConfigError(f"package {error.name}", got="not installed", do="pip install 'edgeguard[private]'")
        pipe.send(("error", missing))
    except Exception as error:
        pipe.send(("error", ModelError("joint computation", got=f"{type(error).__name__}: {error}")))
