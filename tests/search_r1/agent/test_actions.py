"""What a turn asks for: the grammar of the original, and the pair that closes first."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search_r1.agent.actions import Answer, Invalid, TextCall, parse_action

TAGS = [
    f"<{slash}{tag}>" for tag in ("think", "search", "information", "answer") for slash in ("", "/")
]
PIECES = st.lists(
    st.one_of(st.sampled_from([*TAGS, "\n", "<", ">", "é", "a b"]), st.text(max_size=5)),
    max_size=12,
)


@pytest.mark.parametrize(
    ("text", "action", "rest"),
    [
        ("<think> t </think> <search> q </search>", TextCall("search", "q"), ""),
        ("<search>\nwho\nwhere </search>\n\n", TextCall("search", "who\nwhere"), "\n\n"),
        ("<answer> A </answer><", Answer("A"), "<"),
        ("<answer></answer>", Answer(""), ""),
        ("<search>  </search>", Invalid(), ""),
        ("<search> q </Search>", Invalid(), ""),
        ("q </search>", Invalid(), ""),
        ("<search> q <answer> a </answer>", Answer("a"), ""),
        ("<search> q <answer> a </answer> b </search>", Answer("a"), " b </search>"),
        ("<answer> x <search> q </search> </answer>", TextCall("search", "q"), " </answer>"),
        ("<search> a <search> b </search>", TextCall("search", "a <search> b"), ""),
        ("<answer> 1 </answer> <answer> 2 </answer>", Answer("1"), " <answer> 2 </answer>"),
        ("", Invalid(), ""),
    ],
)
def test_actions(text, action, rest):
    assert parse_action(text) == (action, len(text) - len(rest))


@settings(deadline=None)
@given(PIECES.map("".join))
def test_agrees_with_a_scan_for_the_first_closing_tag(text):
    """The oracle reads prefixes, as the engine does: the first one that holds a whole pair
    decides."""
    action, end = parse_action(text)
    for length in range(len(text) + 1):
        pair = re.search(r"<(search|answer)>((?:(?!</\1>).)*)</\1>$", text[:length], re.DOTALL)
        if pair:
            content = pair.group(2).strip()
            expected = (
                Answer(content)
                if pair.group(1) == "answer"
                else TextCall("search", content)
                if content
                else Invalid()
            )
            assert (action, end) == (expected, length)
            return
    assert (action, end) == (Invalid(), len(text))


@settings(deadline=None)
@given(PIECES.map("".join), st.text(max_size=20))
def test_what_follows_a_closed_action_changes_nothing(text, rest):
    action, end = parse_action(text)
    if not isinstance(action, Invalid):
        assert parse_action(text[:end] + rest) == (action, end)
