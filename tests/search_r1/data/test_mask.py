"""Masked sentences of a corpus as questions: the rules for spans, and what can be answered."""

import asyncio

import pyarrow.parquet as pq
import pytest
from omegaconf import OmegaConf

from search_r1.data import mask
from search_r1.finetune import Finetune
from search_r1.launch import files_of
from search_r1.search.engines.bm25 import BM25Retriever
from search_r1.search.server.app import create_app
from search_r1.search.server.service import ServerSettings
from tests.configs import composed
from tests.retrieval import serving, wait_until_ready, write_corpus
from tests.search_r1.agent.scripted import Engine, check_growing
from verl.trainer.config import build_agent, build_reward, validate
from verl.trainer.preparation import load_train_set
from verl.utils.dataset import read_row
from verl.utils.reward import score

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


@pytest.fixture
def masked(tmp_path):
    """Two masked questions, and the address of a server that searches their corpus."""
    path = write_corpus(tmp_path, ROWS)
    index = ["--index_path", str(tmp_path / "bm25"), "--corpus_path", str(path)]
    made = ["--out", str(tmp_path / "made"), "--count", "2", "--test-size", "1"]
    assert mask.main([*index, *made]) == 0
    bm25 = BM25Retriever(tmp_path / "bm25", path)
    with serving(create_app(lambda: bm25, ServerSettings())) as base:
        wait_until_ready(f"{base}/health")
        yield tmp_path / "made", f"{base}/retrieve"


def recipe(folder, url, *more):
    return composed(
        "grpo",
        "experiment=masksearch/qwen2.5-3b-grpo",
        f"data.train_files={folder}/train.parquet",
        f"data.val_files={folder}/test.parquet",
        f"retriever.url={url}",
        *more,
    )


def test_a_masked_question_is_rolled_out_and_rewarded_as_the_recipe_says(masked, tokenizer):
    """With the prompt of the data set, the recipe's loop, BM25 and the recipe's reward."""
    config = validate(recipe(*masked))
    questions = load_train_set(config, tokenizer)
    (row,) = questions.rows
    (prompt_ids,) = questions.prompt_ids
    (span,) = row["reward_model"]["ground_truth"]["target"]
    sentence = row["extra_info"]["question"].split("\n")[0]
    turns = [
        f"<think> t </think> <search> {sentence.replace('[MASK]', '')} </search>",
        f"<think> t </think> <answer> {span} </answer>",
    ]
    agent = build_agent(config, tokenizer)

    async def rolled():
        engine = Engine(tokenizer, turns)
        try:
            trajectory = await agent.run(prompt_ids, row, engine)
        finally:
            await agent.close()
        check_growing(trajectory, engine)
        return trajectory

    trajectory = asyncio.run(rolled())
    asyncio.run(score(build_reward(config, tokenizer), trajectory, row))
    assert trajectory.reward["score"] == trajectory.reward["em"] == 1.0
    assert agent.reduce_metrics([trajectory])["env/gold_recall"] == 1.0


def test_masked_questions_are_rows_of_fine_tuning_too(masked, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    raw = recipe(
        *masked, "method=sft", f"actor_rollout_ref.model.tokenizer_path={tmp_path}/tokenizer"
    )
    rows = list(Finetune(OmegaConf.create(raw), []).answers(files_of(raw["data"]["train_files"])))
    ((question, span),) = [
        (row["extra_info"]["question"], row["reward_model"]["ground_truth"]["target"][0])
        for row in pq.read_table(masked[0] / "train.parquet").to_pylist()
    ]
    (row,) = rows
    trained = [i for i, on in zip(row["input_ids"], row["loss_mask"], strict=True) if on]
    assert f"<answer> {span} </answer>" in tokenizer.decode(trained)
    assert question in tokenizer.decode(row["input_ids"][: -len(trained)])
