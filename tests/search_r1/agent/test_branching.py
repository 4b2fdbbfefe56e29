"""The loop of Search-R1 begins with turns of another trajectory: the same tokens, and no search."""

import pytest

from search_r1.agent.baselines import IRCoTLoop
from search_r1.agent.config import SearchAgentConfig
from tests.search_r1.agent.scripted import ANSWER, SEARCH, Engine, Library, make_loop, shown
from verl.agent import Source
from verl.rollout.agent_worker import AgentLoopWorker
from verl.rollout.job import make_jobs
from verl.workers.config import BranchesConfig, RolloutConfig

SAMPLING = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "log_probs": True}
OTHER = "<think> u </think> <search> Oslo </search>"


class Playing:
    """A scripted engine, as an agent worker calls engines."""

    def __init__(self, engine):
        self.engine = engine

    async def generate(self, session, prompt_ids, sampling):
        return await self.engine(prompt_ids, max_tokens=sampling["max_tokens"], stop=())

    def forget(self, session):
        pass


async def roll_out(tokenizer, loop, turns, seed=0):
    """The trajectories of a tree of two, the second of which branches off the first."""
    worker = AgentLoopWorker.__new__(AgentLoopWorker)
    worker.agent = loop
    worker.engines = Playing(Engine(tokenizer, turns))
    worker.reward = lambda trajectory, row: {"score": 1.0}
    worker.limit(4)
    sampling = RolloutConfig(n=2, branches=BranchesConfig(rounds=1))
    prompt = tokenizer("Where was Ada born", add_special_tokens=False)["input_ids"]
    jobs = make_jobs([{"data_source": "d"}], [prompt], sampling, seed)
    return await worker.run(jobs, SAMPLING), worker.engines.engine


async def test_a_branch_has_the_tokens_of_its_first_turns_and_searches_only_for_its_own(tokenizer):
    loop = make_loop(tokenizer, max_turns=2)
    (first, branch), engine = await roll_out(tokenizer, loop, [SEARCH, ANSWER, OTHER, ANSWER])
    assert branch.shared_turns == 1 and branch.context_violations == 0
    assert branch.segments[0] == first.segments[0], "with log-probs, version and facts"
    assert branch.segments[1].token_ids == first.segments[1].token_ids
    assert shown(branch, tokenizer)[2] == ("model", OTHER)
    assert loop.search.client.queries == ["Ada", "Oslo"], "the shared search was not made again"
    assert engine.turns == [], "four turns were sampled, and the fifth is shared"
    assert branch.info["searches"] == 2 and branch.stop_reason == "answer"
    own = [segment for segment in branch.segments if segment.source is Source.MODEL]
    assert [segment.info["turn"] for segment in own] == [1, 2, 3]


async def test_a_token_that_is_left_out_of_a_turn_is_left_out_of_it_again(tokenizer):
    """The policy ended its turn by a token that has no place in the trajectory."""
    ended = SEARCH + tokenizer.eos_token
    loop = make_loop(tokenizer, max_turns=2)
    loop.ends_of_template = []  # as with a template that ends turns by another token
    (first, branch), _ = await roll_out(tokenizer, loop, [ended, ANSWER, ANSWER])
    assert branch.shared_turns == 1
    assert branch.segments[0] == first.segments[0] and "left_out" in first.segments[0].info


async def test_calls_of_one_turn_are_each_given_their_own_response(tokenizer):
    """The library finds something else each time, also for the same query."""

    class Changing(Library):
        async def search(self, query, noise=None):
            found = await super().search(query)
            self.passages = [found[0].__class__("9", '"New"', f"after {len(self.queries)}", 1.0)]
            return found

    loop = make_loop(tokenizer, max_turns=3)
    loop.search.client = Changing(loop.search.client.passages)
    turns = [SEARCH, SEARCH, SEARCH, ANSWER, ANSWER, ANSWER, ANSWER]
    (first, branch), _ = await roll_out(tokenizer, loop, turns, seed=4)
    shared = 2 * branch.shared_turns
    assert shared and [s.token_ids for s in branch.segments[:shared]] == [
        s.token_ids for s in first.segments[:shared]
    ]


@pytest.mark.parametrize(
    "config",
    [
        {"context": {"keep_observations": 1}},
        {"context": {"fold_at": 100}},
        {"condense": {"by": "policy", "train": False}},
        {"condense": {"by": "policy"}},
    ],
)
def test_a_loop_whose_contexts_do_not_only_grow_cannot_branch(tokenizer, config):
    assert make_loop(tokenizer).can_branch
    assert not make_loop(tokenizer, **config).can_branch
    assert not IRCoTLoop(SearchAgentConfig(), tokenizer).can_branch
