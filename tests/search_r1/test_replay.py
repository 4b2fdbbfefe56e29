"""A trajectory is gone through again up to a place where it was changed."""

import asyncio

from search_r1.replay import Call, Memory
from search_r1.session import InferenceSession
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
    assert len(memory.calls) == 3 and len(memory.turns) == 2
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


def test_calls_are_known_by_what_they_were_asked_and_not_by_their_order(tokenizer):
    """Calls that run at once may end, and be repeated, in any order."""
    session = session_of(tokenizer, [SEARCH, FACTS, ANSWER])
    first, memory = ask(session)
    memory.calls.reverse()
    again, _ = ask(session, memory.turns, memory=memory)
    assert shown(again, tokenizer) == shown(first, tokenizer)


def taken(script, *contexts):
    return [script.completion(context) for context in contexts]


def test_a_script_takes_what_came_before_the_edit():
    first, second, later = (ToolResponse(text) for text in ("first", "second", "later"))
    calls = [Call(10, [1]), Call(11, [9]), Call(12, [2, 0]), Call(13, [3])]
    found = [(1, "a", first), (2, "a", second), (3, "a", later)]
    memory = Memory(calls, found, [[1], [2], [3]])
    script = memory.script([[1], "edited"], {})
    assert taken(script, 11, 10, 12, 13) == [[9], [1], "edited", None]
    # the same call was answered twice; what came after the edit is asked for again
    assert [script.response("a") for _ in range(3)] == [first, second, None]
    script = memory.script(["edited"], {"b": later})
    assert taken(script, 10, 11) == ["edited", None]
    assert [script.response(key) for key in ("a", "b", "b")] == [None, later, later]
    # passages that were edited: calls until the next turn stay
    script = memory.script([[1]], {"a": later})
    assert taken(script, 10, 11, 12) == [[1], [9], None]
    assert [script.response("a") for _ in range(2)] == [later, later]


def test_of_a_trajectory_that_is_forgotten_the_turns_alone_are_known():
    assert taken(Memory().script([[1], "edited"], {}), 5, 6, 7) == [[1], "edited", None]
