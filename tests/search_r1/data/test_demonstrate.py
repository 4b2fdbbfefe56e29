"""Demonstrations made over HTTP become rows that the agent loop itself would have made."""

import asyncio
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from search_r1.data import demonstrate
from search_r1.prompts import format_passages
from search_r1.search.client import RetrievalClient, RetrieverConfig
from search_r1.traces.convert import Converter, convert
from tests.search_r1.agent.scripted import make_loop
from tests.verl.questions import row

ASKED = {
    "Where was Ada Marin born?": ["Torvel"],
    "Is Marna a land of hills?": ["country", "hills"],
    "Where is Nowhere?": ["Elsewhere"],
}


@pytest.fixture
def questions(tmp_path):
    rows = [
        row(text="asked in a prompt", target=answers) | {"extra_info": {"question": question}}
        for question, answers in ASKED.items()
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    return tmp_path / "train.parquet"


def made(questions, retriever, *more):
    out = questions.with_name("traces.jsonl")
    flags = ["--questions", str(questions), "--retriever_url", retriever, "--out", str(out)]
    assert demonstrate.main([*flags, "--topk", "2", *more]) == 0
    return out, [json.loads(line) for line in out.open()]


def test_questions_whose_passages_hold_an_answer_are_demonstrated(questions, retriever, capsys):
    _, traces = made(questions, retriever)
    assert "2 demonstrations" in capsys.readouterr().out
    found = {trace["question"]: trace for trace in traces}
    assert found.keys() == ASKED.keys() - {"Where is Nowhere?"}
    for question, trace in found.items():
        assert trace["golden_answers"] == ASKED[question]
        assert f"<search> {question} </search>" in trace["response"]
    assert found["Is Marna a land of hills?"]["response"].endswith("<answer> country </answer>")
    assert len(made(questions, retriever, "--count", "1")[1]) == 1


def test_they_are_rows_with_the_observations_of_the_loop(questions, retriever, tokenizer):
    out, traces = made(questions, retriever)
    conversion = convert(Converter(make_loop(tokenizer), "search", 1.0, {}), [out])
    assert len(conversion.examples) == 2 and not conversion.rejected
    client = RetrievalClient(RetrieverConfig(url=retriever, topk=2))

    async def searched():
        try:
            return await client.search(traces[0]["question"])
        finally:
            await client.close()

    passages = format_passages([(hit.title, hit.text) for hit in asyncio.run(searched())])
    example = conversion.examples[0]
    whole = tokenizer.decode(example["input_ids"])
    assert f"<information>{passages}</information>" in whole
    pairs = zip(example["input_ids"], example["loss_mask"], strict=True)
    own = tokenizer.decode([token for token, is_own in pairs if is_own])
    assert "Doc 1(Title" not in own and own.endswith("</answer>")


def test_without_an_answer_or_a_server_there_is_a_clear_error(questions, retriever):
    rows = [row(target=["nobody knows"]) | {"extra_info": {"question": "Where is Torvel?"}}]
    pq.write_table(pa.Table.from_pylist(rows), questions)
    with pytest.raises(SystemExit, match="no search for a question found one of its answers"):
        made(questions, retriever)
    with pytest.raises(SystemExit, match=r"--retriever_url: .*127\.0\.0\.1:9"):
        made(questions, "http://127.0.0.1:9/retrieve")
