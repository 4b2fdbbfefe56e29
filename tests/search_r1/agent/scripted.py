"""A scripted engine and a library of passages made by hand, for trajectories of agent loops."""

from search_r1.agent.config import SearchAgentConfig
from search_r1.agent.loop import SearchAgentLoop
from search_r1.search.client import Passage, SearchError
from search_r1.search.noise import NO_NOISE
from verl.agent import Completion, Source, context_digest

ADA = Passage("7", '"Ada Marin"', "Ada Marin was born in Torvel.", 2.5)
BLOCK = '<information>Doc 1(Title: "Ada Marin") Ada Marin was born in Torvel.</information>\n\n'


PROMPT = "Question: Where was Ada Marin born?\n"
SEARCH = "<think> t </think> <search> Ada </search>"
ANSWER = "<think> t </think> <answer> Torvel </answer>"


class Engine:
    """Says the given turns: texts that stand for what was sampled, stop strings and special tokens
    included."""

    def __init__(self, tokenizer, turns):
        self.tokenizer = tokenizer
        self.turns = list(turns)
        self.calls = []

    async def __call__(self, prompt_ids, *, max_tokens, stop=(), images=()):
        ids = self.tokenizer(self.turns.pop(0), add_special_tokens=False)["input_ids"][:max_tokens]
        self.calls.append((list(prompt_ids), max_tokens, list(stop)))
        return Completion(
            ids, [-0.5] * len(ids), "stop", None, len(self.calls), context_digest(prompt_ids)
        )


class Library:
    """Finds the same passages for every query, or fails."""

    def __init__(self, passages, fail_at=None):
        self.passages = passages
        self.fail_at = fail_at
        self.queries = []

    async def search(self, query, noise=NO_NOISE):
        self.queries.append(query)
        if len(self.queries) == self.fail_at:
            raise SearchError("the library is on fire")
        return self.passages

    def take_errors(self):
        return {"timeout": 1} if len(self.queries) == 1 else {}

    async def close(self):
        pass


def shown(trajectory, tokenizer):
    return [(str(s.source), tokenizer.decode(s.token_ids)) for s in trajectory.segments]


def check_growing(trajectory, engine):
    """Every context was the trajectory so far, and the policy's tokens alone are trained."""
    assert trajectory.context_violations == 0
    for given_ids, _, _ in engine.calls:
        assert given_ids == trajectory.token_ids[: len(given_ids)]
    mask = [int(s.source is Source.MODEL) for s in trajectory.segments for _ in s.token_ids]
    assert trajectory.response_mask == mask


def make_loop(tokenizer, passages=(ADA,), fail_at=None, **config):
    """A loop of Search-R1 whose searches a `Library` answers; `config` are keys of `agent`."""
    loop = SearchAgentLoop(SearchAgentConfig(**config), tokenizer)
    if loop.search is not None:
        loop.search.client = Library(list(passages), fail_at)
    return loop
