"""Masked sentences of a corpus as questions: the rules for spans, and what can be answered."""

import pyarrow.parquet as pq
import pytest

from search_r1.data import mask
from search_r1.search.engines.bm25 import BM25Retriever
from tests.retrieval import write_corpus
from verl.utils.dataset import read_row

ROWS = [
    {
        "id": "1",
        "contents": '"Ada Marin"\nAda Marin was born in Torvel in 1947 and studied tides there.',
    },
    {
        "id": "2",
        "contents": '"Torvel (town)"\nThe tides of the harbour were studied by one born in 1947.',
    },
    {
        "id": 3,
        "contents": '"Bread"\nIn 1066 nobody in the whole country knew how to bake good rye.',
    },
]


def test_spans_are_dates_numbers_and_names_that_are_titles():
    titles = {"Ada Marin", "Torvel", "Bread", "Bank of Torvel"}
    sentence = (
        "On 3 May 1947 Ada Marin of the Bank of Torvel sold 1,250 boats, 12 oars and 40.5 % of "
        "The Bread Company to Bo Keld by March 2, 1950, not in 1951 or 3120."
    )
    assert mask.spans_of(sentence, titles) == [
        "3 May 1947",
        "March 2, 1950",
        "1951",
        "1,250",
        "40.5 %",
        "3120",
        "Ada Marin",
        "Bank of Torvel",
        "Bread",
    ]


def test_a_question_is_what_another_passage_answers(tmp_path):
    """Passages 1 and 2 share the year alone; Torvel stands in the title of 2, and 1066 nowhere
    else."""
    path = write_corpus(tmp_path, ROWS)
    masker = mask.Masker(BM25Retriever(tmp_path / "bm25", path))
    assert masker.titles == {"Ada Marin", "Torvel", "Bread"}
    assert masker.holders("[MASK] was born in Torvel in 1947 and studied", "Ada Marin", 0) == []
    found = [question for seed in range(8) for question in masker.questions(seed)]
    assert {(question.passage, question.span) for question in found} == {
        ("1", "1947"),
        ("1", "Torvel"),
        ("2", "1947"),
    }
    by_span = {(question.passage, question.span): question for question in found}
    assert by_span["1", "1947"].text == (
        "Ada Marin was born in Torvel in [MASK] and studied tides there."
    )
    assert by_span["1", "1947"].gold_ids == ["2"] and by_span["2", "1947"].gold_ids == ["1"]


def test_no_question_is_made_without_a_mask(tmp_path):
    """1950 is a part of the number 1950.75, which stays as it is."""
    text = "In all the years the price of rye rose to 1950.75 crowns."
    rows = [
        {"id": "1", "contents": f'"Rye"\n{text}'},
        {"id": "2", "contents": '"Prices"\nThe price of rye rose in all the years to 1950.'},
    ]
    path = write_corpus(tmp_path, rows)
    masker = mask.Masker(BM25Retriever(tmp_path / "bm25", path))
    found = [question for seed in range(8) for question in masker.questions(seed)]
    assert all(mask.MASK in question.text for question in found)


def test_a_span_is_masked_wherever_it_stands_whole():
    assert mask.whole("194").sub("_", "194 is not 1947, nor 194.5 or a194, but 194.") == (
        "_ is not 1947, nor 194.5 or a194, but _."
    )


def test_the_files_are_those_that_training_reads(tmp_path, capsys):
    path = write_corpus(tmp_path, ROWS)
    index = ["--index_path", str(tmp_path / "bm25"), "--corpus_path", str(path)]
    command = [*index, "--out", str(tmp_path / "made"), "--count", "2", "--test-size", "1"]
    assert mask.main(command) == 0
    assert "1 training and 1 test questions" in capsys.readouterr().out
    rows = [
        read_row(row)
        for name in ("train.parquet", "test.parquet")
        for row in pq.read_table(tmp_path / "made" / name).to_pylist()
    ]
    assert {row["extra_info"]["id"] for row in rows} == {"1", "2"}
    for row in rows:
        assert row["data_source"] == "masked" and row["extra_info"]["gold_ids"]
        assert "What does [MASK] stand for?" in row["prompt"][0]["content"]
        (span,) = row["reward_model"]["ground_truth"]["target"]
        assert span in ("1947", "Torvel") and span not in row["extra_info"]["question"]
    assert mask.main(command) == 0 and "already made" in capsys.readouterr().out


def test_a_corpus_with_too_few_questions_is_refused(tmp_path):
    path = write_corpus(tmp_path, ROWS)
    index = ["--index_path", str(tmp_path / "bm25"), "--corpus_path", str(path)]
    command = [*index, "--out", str(tmp_path / "made"), "--count", "3", "--test-size", "1"]
    with pytest.raises(SystemExit, match="only 2 passages have a span that another passage holds"):
        mask.main(command)
    assert not (tmp_path / "made").exists()
    with pytest.raises(SystemExit, match="no index here"):
        mask.main([*index[:1], str(tmp_path / "absent"), "--out", str(tmp_path / "made")])
