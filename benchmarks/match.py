"""A match: trainings in processes of their own that take their steps in turn."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from contextlib import ExitStack
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

from benchmarks.contestant import Contestant, Turn, compete
from hf_recycle.errors import UserError

WARM_UP = 2
"""Steps of each training that are not measured: the first ones allocate."""

_PATIENCE = 600  # seconds for one message, compilation included
_PARTING = 30  # seconds to end in


def hold_match(contestants: Sequence[Contestant], rounds: int) -> dict[str, list[Turn]]:
    """Lets every contestant take `rounds` steps, one at a time: A B C, C B A, A B C, ...

    What disturbs the machine for longer than a step disturbs all alike, and turning the order round cancels a drift.
    Processes of their own, because caches, random states and peaks of memory are a process's.

    Returns:
        By name the steps; those of the first are the warm-up's (`WARM_UP`), which tell of losses but not of speed.

    Raises:
        UserError: if a contestant fails; with what it said.
    """
    context = multiprocessing.get_context("spawn")
    turns: dict[str, list[Turn]] = {contestant.name: [] for contestant in contestants}
    with ExitStack() as stack:
        links = {}
        for contestant in contestants:
            link, theirs = context.Pipe()
            process = context.Process(target=compete, args=(contestant, WARM_UP + rounds, theirs))
            process.start()
            theirs.close()
            links[contestant.name] = link
            stack.callback(_end, process, link)
        for number in range(WARM_UP + rounds):
            order = list(links) if number % 2 == 0 else list(links)[::-1]
            for name in order:
                turns[name].append(_take_turn(name, links[name]))
    return turns


def _end(process: BaseProcess, link: Connection) -> None:
    """Lets a training end by itself, so that it tidies up; for a while."""
    link.close()
    process.join(_PARTING)
    process.kill()
    process.join()


def _take_turn(name: str, link: Connection) -> Turn:
    try:
        link.send(None)
        if not link.poll(_PATIENCE):
            raise UserError(f"the training {name!r} took more than {_PATIENCE} s for a step")
        answer = link.recv()
    except (EOFError, BrokenPipeError, ConnectionResetError) as error:
        raise UserError(f"the training {name!r} ended without a word, killed for want of memory perhaps") from error
    if isinstance(answer, str):
        raise UserError(f"the training {name!r} failed: {answer}")
    return answer
