"""Whole trajectories of every family, and what becomes of a token that ends a turn.
docs/templates.md is compared."""

import asyncio
import re

import pytest

from search_r1.agent.baselines import ReActLoop, SearchO1Loop
from search_r1.agent.config import SearchAgentConfig
from search_r1.agent.loop import SearchAgentLoop
from search_r1.prompts import INVALID_ACTION, INVALID_MESSAGE
from tests.e2e.runs import ROOT
from tests.search_r1.agent.scripted import (
    ADA,
    ANSWER,
    BLOCK,
    SEARCH,
    Engine,
    Library,
    check_growing,
    shown,
)
from tests.templates import FAMILIES
from verl.agent import Completion, context_digest

PAGE = ROOT / "docs" / "templates.md"
EXAMPLE = re.compile(r"<!-- (\S+) -->\n```\n(.*?)```", re.DOTALL)
ROW = {"data_source": "set", "extra_info": {"question": "Where was Ada Marin born?"}}
SHOWN = [name for name in FAMILIES if name not in ("gemma-base", "plain")]
"""The two others differ from Llama's base models in their BOS alone."""
VARIANTS = {"qwen3-without-thinking": ("qwen3", {"enable_thinking": False})}
"""Examples of the page that are a family with arguments of its chat template."""
CHAT = [name for name, family in FAMILIES.items() if family.template]
END = {
    "qwen2.5-base": "<|im_end|>",
    "qwen2.5-instruct": "<|im_end|>",
    "qwen3": "<|im_end|>",
    "qwen3-thinking": "<|im_end|>",
    "llama3-instruct": "<|eot_id|>",
    "gemma-instruct": "<end_of_turn>",
    "mistral-instruct": "</s>",
}
"""How the chat template of a family ends a turn."""


def roll(tokenizer, turns, loop_class=SearchAgentLoop, engine=None, **config):
    """The trajectory of a question; every context was the trajectory so far."""
    loop = loop_class(SearchAgentConfig(**({"template": "short"} | config)), tokenizer)
    if loop.search is not None:
        loop.search.client = Library([ADA])
    engine = engine or Engine(tokenizer, turns)
    trajectory = asyncio.run(loop.run([], ROW, engine))
    check_growing(trajectory, engine)
    return trajectory


def lines_of(trajectory, tokenizer):
    """A trajectory as the page writes it."""
    lines = [f"prompt       {tokenizer.decode(trajectory.prompt_ids)}"]
    lines += [f"{s.source!s:<12} {tokenizer.decode(s.token_ids)}" for s in trajectory.segments]
    texts = [line.replace("\n", "\\n") for line in lines]
    for name, text in {
        "INVALID_ACTION": INVALID_ACTION,
        "INVALID_MESSAGE": INVALID_MESSAGE,
    }.items():
        texts = [line.replace(text.replace("\n", "\\n"), f"[{name}]") for line in texts]
    return "".join(f"{line}\n" for line in texts)


def examples():
    return dict(EXAMPLE.findall(PAGE.read_text(encoding="utf-8")))


@pytest.mark.parametrize("name", [*SHOWN, *VARIANTS])
def test_the_page_shows_whole_trajectories_as_they_are(family, name):
    """Search, a turn that ends without an action, one that does so by EOS, an answer."""
    source, kwargs = VARIANTS.get(name, (name, {}))
    tokenizer = family(source)
    opened = source == "qwen3-thinking"
    turns = [
        SEARCH.removeprefix("<think>") if opened else SEARCH,
        f"Torvel.{END.get(source, FAMILIES[source].eos)}",
        f"Torvel!{FAMILIES[source].eos}",
        ANSWER.removeprefix("<think>") if opened else ANSWER,
    ]
    trajectory = roll(tokenizer, turns, apply_chat_template_kwargs=kwargs)
    assert lines_of(trajectory, tokenizer) == examples()[name]
    for segment in trajectory.segments:
        written = tokenizer(tokenizer.decode(segment.token_ids), add_special_tokens=False)[
            "input_ids"
        ]
        assert segment.token_ids == written, "a segment is encoded as its text would be as a whole"


def test_every_example_of_the_page_is_compared():
    assert set(examples()) == {*SHOWN, *VARIANTS}


@pytest.mark.parametrize("name", CHAT)
def test_control_tokens_of_a_trajectory_are_those_of_the_rendered_conversation(family, name):
    """The trajectory is the conversation that its template would write, with the thoughts of all
    turns left in."""
    tokenizer = family(name)
    trajectory = roll(
        tokenizer, [f"Torvel.{END[name]}", f"No idea.{END[name]}", f"Rome?{END[name]}"], max_turns=2
    )
    prompt = "Question: Where was Ada Marin born?\n"
    conversation = [{"role": "user", "content": prompt}]
    for said in ("Torvel.", "No idea.", "Rome?"):
        conversation += [
            {"role": "assistant", "content": said},
            {"role": "user", "content": INVALID_MESSAGE},
        ]
    rendered = tokenizer.apply_chat_template(conversation, tokenize=False)
    text = tokenizer.decode(trajectory.token_ids)
    if name == "qwen3-thinking":
        # which the template opens for a turn that is to come alone
        text = text.replace("<think>\n", "")
    if name == "mistral-instruct":
        text = text.replace("[/INST]", "[/INST] ")  # a space before what an assistant has said
    assert rendered.startswith(text)
    assert trajectory.stop_reason == "max_turns"


@pytest.mark.parametrize("name", CHAT)
def test_the_template_ends_turns_with_a_token_that_stays_and_is_trained(family, name):
    tokenizer = family(name)
    trajectory = roll(tokenizer, [f"Torvel.{END[name]}", ANSWER])
    first, reply, _ = trajectory.segments
    assert tokenizer.decode(first.token_ids) == f"Torvel.{END[name]}"
    assert trajectory.response_mask[: len(first.token_ids)] == [1] * len(first.token_ids)
    assert first.info["ended_by"] == first.token_ids[-1] and reply.info["kind"] == "invalid_action"
    assert INVALID_MESSAGE in tokenizer.decode(reply.token_ids)


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("qwen2.5-base", "<|endoftext|>"),
        ("llama3-base", "<|end_of_text|>"),
        ("gemma-instruct", "<eos>"),
        ("gemma-base", "<eos>"),
        ("plain", "<|endoftext|>"),
    ],
)
def test_the_end_of_a_document_is_left_out_and_the_turn_goes_on(family, name, end):
    """As in the original, whose contexts published checkpoints know: no such token, the sentence in
    the same turn."""
    tokenizer = family(name)
    trajectory = roll(tokenizer, [f"Torvel.{end}", end, ANSWER])
    assert shown(trajectory, tokenizer) == [
        ("model", "Torvel."),
        ("observation", INVALID_ACTION),
        ("model", ""),
        ("observation", INVALID_ACTION),
        ("model", ANSWER),
    ]
    assert trajectory.segments[0].info["left_out"] == tokenizer.convert_tokens_to_ids(end)
    assert len(trajectory.segments[0].log_probs) == len(trajectory.segments[0].token_ids)
    assert trajectory.stop_reason == "answer"


def test_a_token_that_only_the_engine_knows_as_an_end_is_left_out(family):
    """One of several EOS of a generation configuration: the engine names it as the reason of its
    stop."""
    tokenizer = family("llama3-instruct")
    other = tokenizer.convert_tokens_to_ids("<|end_of_text|>")

    class Stopping(Engine):
        async def __call__(self, prompt_ids, *, max_tokens, stop=(), images=()):
            completion = await super().__call__(prompt_ids, max_tokens=max_tokens, stop=stop)
            last = completion.token_ids[-1]
            reason = last if last == other else None
            return Completion(
                completion.token_ids,
                completion.log_probs,
                "stop",
                reason,
                1,
                context_digest(prompt_ids),
            )

    trajectory = roll(tokenizer, [], engine=Stopping(tokenizer, ["Torvel.<|end_of_text|>", ANSWER]))
    assert shown(trajectory, tokenizer)[:2] == [
        ("model", "Torvel."),
        ("observation", INVALID_ACTION),
    ]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_token_that_ends_a_trajectory_stays_and_is_trained(family, name):
    tokenizer = family(name)
    eos = FAMILIES[name].eos
    answered = roll(tokenizer, [ANSWER + eos], stop_at_answer=False)
    forced = roll(tokenizer, ["Torvel.", f"Torvel.{eos}"], max_turns=1)
    single = roll(tokenizer, [f"Torvel.{eos}"], do_search=False)
    reasons = [trajectory.stop_reason for trajectory in (answered, forced, single)]
    assert reasons == ["answer", "max_turns", "max_turns"]
    for trajectory in (answered, forced, single):
        assert (
            trajectory.response_ids[-1] == tokenizer.eos_token_id
            and trajectory.response_mask[-1] == 1
        )


@pytest.mark.parametrize("name", CHAT)
def test_passages_for_a_turn_that_ended_after_its_search_are_a_users_message(family, name):
    """ReAct's search ends with its bracket, so that a chat model may end its turn behind it."""
    tokenizer = family(name)
    turns = [f"Thought: t\nAction: Search[Ada]{END[name]}", ANSWER]
    trajectory = roll(tokenizer, turns, ReActLoop, template="react")
    after = tokenizer.decode(trajectory.segments[1].token_ids)
    assert re.search(r"(user\n|user<\|end_header_id\|>\n\n|\[INST\] )Observation: Doc 1", after)
    prompt_end = tokenizer.decode(trajectory.prompt_ids).rpartition(END[name])[2]
    assert prompt_end.endswith("[/INST]") or after.endswith(prompt_end), (
        "the next turn begins as the first one did"
    )
    assert trajectory.info["searches"] == 1 and trajectory.stop_reason == "answer"


def test_a_search_that_was_closed_before_the_turn_ended(family):
    """An engine stops at `</search>`; one that ran on to the end of the turn is understood all the
    same."""
    tokenizer = family("qwen2.5-instruct")
    trajectory = roll(tokenizer, [f"{SEARCH}<|im_end|>", ANSWER])
    assert shown(trajectory, tokenizer)[:2] == [
        ("model", f"{SEARCH}<|im_end|>"),
        ("observation", f"\n<|im_start|>user\n{BLOCK}<|im_end|>\n<|im_start|>assistant\n"),
    ]
    base = family("llama3-base")
    assert shown(roll(base, [f"{SEARCH}<|end_of_text|>", ANSWER]), base)[:2] == [
        ("model", SEARCH),
        ("observation", f"\n\n{BLOCK}"),
    ]


def test_the_methods_correct_an_ended_turn_in_their_own_words(family):
    tokenizer = family("qwen2.5-instruct")
    for loop_class, words in (
        (ReActLoop, "Write Action: Search[query]"),
        (SearchO1Loop, "Search with <|begin_search"),
    ):
        trajectory = roll(tokenizer, ["Torvel.<|im_end|>", ANSWER], loop_class)
        message = f"<|im_start|>user\n{loop_class.words.invalid_message}<|im_end|>"
        assert message in tokenizer.decode(trajectory.segments[1].token_ids)
        assert words in loop_class.words.invalid_message
