"""A trajectory is gone through again up to a place where it was changed."""

import asyncio

from search_r1.session import InferenceSession, Memory
from search_r1.tools.base import SEARCH_TOOL, ToolResponse
from search_r1.tools.toolbox import call_key
from tests.configs import composed
from tests.search_r1.agent.scripted import ANSWER, SEARCH, Engine, make_loop, shown
from verl.trainer.config import validate

FACTS = "Ada Marin: Torvel"
EDITED = "<think> no </think> <answer> Oslo </answer>"
REQUEST = "{context}\nQuery: {query}\nFacts:"


class Playing:
    """A scripted engine, as a session calls engines."""

    def __init__(self, engine):
        self.engine = engine

    async def generate(self, session, prompt_ids, wanted):
        return await self.engine(prompt_ids, max_tokens=wanted["max_tokens"], stop=wanted["stop"])

    def forget(self, session):
        pass


def session_of(tokenizer, turns):
    """A session in which results are condensed by calls that are not trained."""
    config = validate(composed("grpo", "experiment=closed_world/grpo"))
    session = InferenceSession(config)
    session.tokenizer = tokenizer
    condense = {"by": "policy", "max_tokens": 24, "train": False, "prompt": REQUEST}
    session.agent = make_loop(tokenizer, condense=condense)
    session.engine = Playing(Engine(tokenizer, turns))
    return session


def ask(session, turns=(), found=None, memory=None):
    """The trajectory and its memory; with a memory it follows another one."""
    script = (memory or Memory()).script(list(turns), found or {})
    kept = Memory()
    trajectory = asyncio.run(session.ask("Where was Ada born", script=script, memory=kept))
    return trajectory, kept


def test_calls_that_are_not_trained_say_again_what_they_said(tokenizer):
    session = session_of(tokenizer, [SEARCH, FACTS, ANSWER])
    first, memory = ask(session)
    assert len(memory.said) == 3 and len(memory.turns) == 2
    assert any(FACTS in text for source, text in shown(first, tokenizer) if source != "model")

    # nothing is sampled and nothing is looked up: the engine has nothing more to say
    before = [segment.token_ids for segment in first.segments]
    again, later = ask(session, [memory.turns[0], EDITED], memory=memory)
    assert [segment.token_ids for segment in again.segments[:-1]] == before[:-1]
    assert shown(again, tokenizer)[-1] == ("model", EDITED)
    assert session.agent.search.client.queries == ["Ada"]

    # an edit of an edit knows what was found too
    third, _ = ask(session, later.turns, memory=later)
    assert shown(third, tokenizer) == shown(again, tokenizer)
    assert session.agent.search.client.queries == ["Ada"]


def test_after_the_edit_the_engine_goes_on(tokenizer):
    session = session_of(tokenizer, [SEARCH, FACTS, ANSWER, "Marin: Nowhere", EDITED])
    _, memory = ask(session)
    found = {call_key(SEARCH_TOOL, {"query": "Ada"}): ToolResponse("Ada Marin was born nowhere.")}
    changed, _ = ask(session, memory.turns[:1], found, memory)
    texts = [text for _, text in shown(changed, tokenizer)]
    assert texts[0] == SEARCH and "Marin: Nowhere" in texts[1] and texts[2] == EDITED


def test_a_script_takes_what_came_before_the_edit():
    first, later = ToolResponse("first"), ToolResponse("later")
    memory = Memory([[1], [9], [2, 0], [3]], [(1, "a", first), (3, "b", later)], [[1], [2], [3]])
    script = memory.script([[1], "edited"], {})
    assert script.said == [[1], [9], "edited"] and script.found == {"a": first, "b": later}
    script = memory.script(["edited"], {"b": first})
    assert script.said == ["edited"] and script.found == {"a": first, "b": first}
    # of a trajectory that is forgotten, the turns alone are known
    assert Memory().script([[1], "edited"], {}).said == [[1], "edited"]
