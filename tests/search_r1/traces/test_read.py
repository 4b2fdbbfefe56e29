"""What is read in traces of other programs, and which are rejected with which reason."""

import pytest

from search_r1.traces.chat import read_calls
from search_r1.traces.read import read_trace
from search_r1.traces.text import SEARCHES
from search_r1.traces.trace import Reason, Rejected, Said, TracedCall, TracedTurn

SEARCH_R1 = (
    "<think> a </think> <search> Ada </search>\n\n<information>Doc 1 Torvel</information>\n\n"
    "<think> b </think> <answer> Torvel </answer>"
)
RESEARCH = (
    "<think> a </think> <search> Ada </search> <result>\nDoc 1 Torvel\n</result>"
    "<think> b </think> <answer> It is \\boxed{\\text{Torvel}} </answer><|im_end|>"
)
R1_SEARCHER = (
    "<think>a<|begin_of_query|> Ada <|end_of_query|>\n\n"
    "<|begin_of_documents|>\n(1)Doc 1 Torvel\n<|end_of_documents|>\n\nb</think>"
    "<answer> Torvel </answer>"
)
ASKED = {"question": "Where was Ada born?"}


def said(first, result, last, answer=" Torvel ", query=" Ada "):
    call = TracedCall("search", query, result)
    return Said((TracedTurn(first, (call,)),), last, answer)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (SEARCH_R1, said("<think> a </think> ", "Doc 1 Torvel", "<think> b </think> ")),
        (RESEARCH, said("<think> a </think> ", "Doc 1 Torvel", "<think> b </think> ")),
        (R1_SEARCHER, said("<think>a </think> ", "(1)Doc 1 Torvel", "<think>b</think>")),
        (
            "I see. So it is \\boxed{Torvel}.",
            Said((), "I see. So it is Torvel.\n", " Torvel "),
        ),
        ("b</think> <answer>Torvel</answer> and more", Said((), "<think>b</think> ", "Torvel")),
    ],
    ids=["search_r1", "research", "r1_searcher", "boxed", "thought opened by the prompt"],
)
@pytest.mark.parametrize("form", ["response", "output", "object", "messages"])
def test_a_text_is_read_whoever_wrote_it(text, expected, form):
    rows = {
        "response": {"response": text},
        "output": {"output": text},
        "object": {"output": {"final_response": text}},
        "messages": {"messages": [{"role": "user"}, {"role": "assistant", "content": text}]},
    }
    trace = read_trace(ASKED | rows[form], SEARCHES)
    assert trace.said == expected and trace.question == ASKED["question"]


def call(name, arguments, identity=None):
    function = {"name": name, "arguments": arguments}
    return {"id": identity, "type": "function", "function": function}


CHAT = [
    {"role": "system", "content": "Be good."},
    {"role": "user", "content": "Answer. Question: Where was Ada born?"},
    {
        "role": "assistant",
        "content": None,
        "reasoning_content": "a",
        "tool_calls": [
            call("web", '{"query": "Ada"}', "x"),
            call("web", {"query": "Bo", "other": None}, "y"),
        ],
    },
    {"role": "tool", "tool_call_id": "y", "content": "about Bo"},
    {"role": "tool", "tool_call_id": "x", "content": [{"type": "text", "text": "about Ada\n"}]},
    {"role": "assistant", "content": "b</think> <answer> Torvel </answer>"},
]


def test_messages_with_calls_are_read_and_results_told_by_their_ids():
    trace = read_trace({"messages": CHAT, "answer": ["Torvel", "Marna"]}, SEARCHES)
    called = (
        TracedCall("web", {"query": "Ada"}, "about Ada"),
        TracedCall("web", {"query": "Bo"}, "about Bo"),
    )
    first = TracedTurn("<think>\na\n</think>\n\n", called)
    assert trace.said == Said((first,), "<think>b</think> ", " Torvel ")
    assert trace.question == "Where was Ada born?" and trace.golds == ("Torvel", "Marna")


def test_results_of_calls_that_share_an_id_are_told_by_their_order():
    calls = [call("web", '{"query": "Ada"}', "x"), call("web", '{"query": "Bo"}', "x")]
    results = [{"role": "tool", "tool_call_id": "x", "content": text} for text in ("one", "two")]
    assert [called.result for called in read_calls(calls, results)] == ["one", "two"]


@pytest.mark.parametrize(
    ("row", "golds"),
    [
        ({"golden_answers": ["a", 7]}, ("a", "7")),
        ({"reward_model": {"ground_truth": {"target": "a"}}}, ("a",)),
        ({"ground_truth": {"target": ["a"]}}, ("a",)),
        ({}, ()),
    ],
)
def test_accepted_answers_are_found(row, golds):
    assert read_trace({**ASKED, "response": SEARCH_R1, **row}, SEARCHES).golds == golds


def without(*places):
    return [message for place, message in enumerate(CHAT) if place not in places]


@pytest.mark.parametrize(
    ("row", "reason", "found"),
    [
        ({"response": "<think> a <answer> b </answer>"}, Reason.UNBALANCED, "do not alternate"),
        ({"response": "<search> a <answer> b </answer>"}, Reason.UNBALANCED, "</search>"),
        ({"response": "a </search> <answer> b </answer>"}, Reason.UNBALANCED, "nothing opens"),
        ({"response": "<answer> b"}, Reason.UNBALANCED, "</answer>"),
        (
            {"response": "<search> a </search> <information> b <answer> c </answer>"},
            Reason.UNBALANCED,
            "</information>",
        ),
        ({"response": "It is Torvel."}, Reason.NO_ANSWER, "boxed"),
        ({"response": "<answer> </answer>"}, Reason.NO_ANSWER, "empty"),
        ({"response": "<search> a </search> <answer> b </answer>"}, Reason.NO_RESULT, "<result>"),
        (
            {"response": "<information> a </information> <answer> b </answer>"},
            Reason.NO_CALL,
            "<information>",
        ),
        ({"response": f"{SEARCH_R1} {SEARCH_R1}"}, Reason.GOES_ON, "behind"),
        (
            {"response": "a\nMy previous action is invalid. So. <answer> b </answer>"},
            Reason.NO_ACTION,
            "invalid",
        ),
        ({"response": 7}, Reason.UNKNOWN_FORM, "expected a record"),
        ({"messages": "hi"}, Reason.UNKNOWN_FORM, "list of objects"),
        ({"messages": [{"tool_calls": "x"}]}, Reason.UNKNOWN_FORM, r"messages\[0\].tool_calls"),
        ({"response": SEARCH_R1, "answer": [[1]]}, Reason.UNKNOWN_FORM, "answer: "),
        ({"messages": without(3)}, Reason.NO_RESULT, "2 calls with 1 results"),
        ({"messages": without(5)}, Reason.NO_ANSWER, "last message"),
        ({"messages": [*CHAT, CHAT[1]]}, Reason.NO_ACTION, "assistant, user"),
        ({"messages": [*CHAT[:5], CHAT[4], CHAT[5]]}, Reason.NO_CALL, "2 calls with 3 results"),
        ({"prompt_ids": [1], "segments": 1, "reward": {}}, Reason.UNKNOWN_FORM, "segments"),
    ],
)
def test_what_cannot_be_trained_on_is_rejected_with_the_reason(row, reason, found):
    with pytest.raises(Rejected, match=found) as caught:
        read_trace(ASKED | row, SEARCHES)
    assert caught.value.reason is reason


@pytest.mark.parametrize("row", [{}, {"prompt": "Question: "}, {"prompt": [{"role": "user"}]}])
def test_a_trace_without_a_question_is_rejected(row):
    with pytest.raises(Rejected, match="expected question") as caught:
        read_trace({**row, "response": SEARCH_R1}, SEARCHES)
    assert caught.value.reason is Reason.NO_QUESTION
