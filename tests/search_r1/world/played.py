"""Plays traces of the closed world in the real agent loop: an engine that says their turns, and a
library that finds their passages."""

from search_r1.search.client import Passage
from verl.agent import Completion, context_digest


class Engine:
    """Says the turns of a trace, each a list of ids; `calls` are what it was given and said."""

    def __init__(self, turns):
        self.turns = list(turns)
        self.calls = []

    async def __call__(self, prompt_ids, *, max_tokens, stop=(), images=()):
        ids = self.turns.pop(0)
        self.calls.append((list(prompt_ids), ids))
        return Completion(ids, [-0.5] * len(ids), "stop", None, 1, context_digest(prompt_ids))


class Library:
    """Finds the passages of a trace, those of one observation after the other."""

    def __init__(self, observations):
        self.observations = list(observations)

    async def search(self, query, noise):
        found = self.observations.pop(0)
        return [Passage(str(i), title, text, 1.0) for i, (title, text) in enumerate(found)]

    def take_errors(self):
        return {}

    async def close(self):
        pass
