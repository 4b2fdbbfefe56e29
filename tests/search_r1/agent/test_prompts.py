"""The texts that published checkpoints depend on, against real rollouts of one."""

import hashlib
import json
import re
from pathlib import Path

import pytest

from search_r1.prompts import INVALID_ACTION, build_prompt, format_passages
from search_r1.tools.formats import SEARCH_R1

ROLLOUTS = Path(__file__).resolve().parents[4] / "shared/data/searchr1_trajectories"


def test_question_mark_is_added_once():
    assert build_prompt("  who is {x} ", "short") == "Question: who is {x}?\n"
    assert build_prompt("who?", "short") == "Question: who?\n"
    with pytest.raises(KeyError):
        build_prompt("who", "long")


def test_passages_are_numbered_and_keep_the_titles_quotes():
    assert format_passages([('"A"', " b "), ("", "c")]) == 'Doc 1(Title: "A")  b \nDoc 2(Title: ) c'
    assert format_passages([]) == ""


@pytest.mark.skipif(not ROLLOUTS.is_dir(), reason="needs ../shared/data/searchr1_trajectories")
@pytest.mark.parametrize("run", ["nq_qwen2.5-3b-base-grpo", "bamboogle_qwen2.5-3b-instruct-grpo"])
def test_prompts_of_real_rollouts_byte_for_byte(run):
    for record in json.loads((ROLLOUTS / run / "intermediate_data.json").read_text()):
        user = record["output"]["query"].split("<|im_start|>user\n")[1].split("<|im_end|>")[0]
        assert user == build_prompt(record["question"], "search")


@pytest.mark.skipif(not ROLLOUTS.is_dir(), reason="needs ../shared/data/searchr1_trajectories")
@pytest.mark.parametrize("run", ["nq_qwen2.5-3b-base-grpo", "bamboogle_qwen2.5-3b-instruct-grpo"])
def test_information_blocks_of_real_rollouts_byte_for_byte(run):
    """Each block is taken apart into titles and texts, and put together again."""
    blocks = []
    for record in json.loads((ROLLOUTS / run / "intermediate_data.json").read_text()):
        text = record["output"]["final_response"]
        blocks += re.findall(
            r"</search>(\n\n<information>Doc 1.*?)</information>\n\n", text, re.DOTALL
        )
    assert len(blocks) > 100
    for block in blocks:
        documents = re.split(r"\n(?=Doc \d+\(Title: )", block.removeprefix(SEARCH_R1.head))
        pairs = [
            re.fullmatch(r'Doc \d+\(Title: ("[^\n]*?"|[^\n]*?)\) (.*)', d, re.DOTALL).groups()
            for d in documents
        ]
        assert SEARCH_R1.head + format_passages(pairs) == block.rstrip(" ")


def test_invalid_action_sentence_is_pinned():
    assert hashlib.sha256(INVALID_ACTION.encode()).hexdigest().startswith("2b4e05101bcbf539")
