"""Which models of the zoo a run measures, so that it measures what there is time for."""

from __future__ import annotations

import argparse

from benchmarks import zoo
from benchmarks.zoo import Cell


def add_to(parser: argparse.ArgumentParser) -> None:
    """The options; each but ``--limit`` may be repeated."""
    parser.add_argument("--data", action="append", metavar="NAME", help="only this data set (may be repeated)")
    parser.add_argument("--attack", action="append", metavar="NAME", help="only this attack, or 'clean'")
    parser.add_argument("--network", action="append", metavar="NAME", help="only this network")
    parser.add_argument("--seed", action="append", type=int, metavar="N", help="only models of this seed")
    parser.add_argument("--limit", type=int, metavar="N", help="stop after N models that had to be measured")


def cells_of(options: argparse.Namespace) -> list[Cell]:
    """The cells that the options ask for, in the zoo's order."""
    wanted = {name: getattr(options, name) for name in ("data", "attack", "network", "seed")}
    return [
        cell
        for cell in zoo.matrix()
        if all(not values or getattr(cell, name) in values for name, values in wanted.items())
    ]
