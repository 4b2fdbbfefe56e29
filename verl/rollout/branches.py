"""Trajectories that branch off another one of the same prompt: a tree of them (arXiv 2509.21240).

A tree begins with one trajectory. In every round further ones begin with the first turns of a
trajectory that the tree has, and go on by themselves. What engine and environment said in these
turns is given again (`Tape`), so nothing of it is sampled or looked up a second time, and the agent
loop needs no way to begin in the middle: it goes through the same turns as if they were new.
"""

import asyncio
import random
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from verl.agent import AgentLoop, Completion, context_digest

Give = Callable[[str], Any]
Tell = Callable[[str, Any], object]
Answering = Callable[[Give, Tell], AbstractContextManager[None]]
"""See `AgentLoop.answering`."""


class Tape:
    """What engine and environment say in a trajectory, of which the first part may be given."""

    def __init__(self, prefix: "Prefix | None" = None) -> None:
        self.completions: list[Completion] = []
        """One for each turn, in their order."""
        self.responses: list[tuple[int, str, Any]] = []
        """Responses of the environment with their keys, each after how many turns it came."""
        self.given: list[Completion] = []
        self.given_responses: dict[str, list[Any]] = {}
        if prefix is not None:
            self._take(prefix)
        self.num_shared = len(self.given)
        """Turns that are given."""

    def _take(self, prefix: "Prefix") -> None:
        self.given = prefix.tape.completions[: prefix.turns]
        for turns_before, key, response in prefix.tape.responses:
            if turns_before <= prefix.turns:
                self.given_responses.setdefault(key, []).append(response)

    def completion(self, context: Sequence[int]) -> Completion | None:
        """The next turn, if it is given; None for one that is to be sampled.

        Raises RuntimeError if the agent loop asks in another context than the turn was said in.
        """
        turn = len(self.completions)
        if turn >= len(self.given):
            return None
        completion = self.given[turn]
        if completion.context_digest != context_digest(context):
            raise RuntimeError(
                f"rollout.branches: turn {turn + 1} was said in another context than the one in "
                "which the agent loop asks for it again: its contexts do not follow from what "
                "engine and tools said alone, so that it cannot branch (AgentLoop.can_branch)"
            )
        return completion

    def give(self, key: str) -> Any | None:
        """Takes the next response to a question with this key; None for one to be asked."""
        given = self.given_responses.get(key)
        return given.pop(0) if given else None

    def tell(self, key: str, response: Any) -> None:
        """Keeps a response of the environment."""
        self.responses.append((len(self.completions), key, response))


@dataclass(frozen=True)
class Prefix:
    """The first turns of a trajectory, with what the environment answered to them."""

    tape: Tape
    turns: int


class Trees:
    """The trajectories from which others branch off, as they end."""

    def __init__(self, parents: Collection[str]) -> None:
        """`parents`: their sessions; no other trajectory is kept."""
        self.ended = {session: asyncio.Event() for session in parents}
        self.tapes: dict[str, Tape] = {}
        """By session that of each that has not failed."""

    def answering(self, agent: AgentLoop) -> Answering:
        """What trajectories of this loop run in; the loop is not asked if none branches off."""
        return agent.answering if self.ended else unanswered

    def end(self, session: str, tape: Tape | None) -> None:
        """Keeps the tape of a trajectory that has ended; None for one that failed."""
        if session not in self.ended:
            return
        if tape is not None:
            self.tapes[session] = tape
        self.ended[session].set()

    async def prefix(self, begins_from: Sequence[str], seed: int | None) -> Prefix | None:
        """Waits for the trajectories `begins_from`, and draws where to branch off them.

        None: at the prompt, which is so if there is none to branch off.
        """
        for session in begins_from:
            await self.ended[session].wait()
        tapes = [self.tapes[session] for session in begins_from if session in self.tapes]
        places = branch_places(tapes)
        return random.Random(seed).choice(places) if places else None


def branch_places(tapes: Sequence[Tape]) -> list[Prefix]:
    """Every turn after which one of these trajectories went on, those that they share once.

    After its last turn a trajectory has ended, so that one of a single turn has no such place.
    """
    places: dict[int, Prefix] = {}
    for tape in tapes:
        for turns in range(1, len(tape.completions)):
            context = tape.completions[turns].context_digest
            places.setdefault(context, Prefix(tape, turns))
    return list(places.values())


def unanswered(give: Give, tell: Tell) -> AbstractContextManager[None]:
    """Stands in for `AgentLoop.answering` where no trajectory branches off: asks nobody."""
    return nullcontext()
