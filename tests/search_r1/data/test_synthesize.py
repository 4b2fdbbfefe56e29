"""Questions that a model writes for passages, asked for and searched for over HTTP."""

import json

import pyarrow.parquet as pq
import pytest
from fastapi import Response

from search_r1.data import synthesize
from tests.openai_server import Player
from tests.retrieval import retrieval_server, serving, write_corpus
from verl.utils.dataset import read_row

ROWS = [
    {"id": 0, "contents": '"Ada Marin"\nAda Marin was born in Torvel in 1947.'},
    {"id": "1", "contents": '"Tide mill"\nA tide mill was driven by the sea at Kelbo.'},
    {"id": "2", "contents": '"Rye"\nRye bread is baked in Kelbo by one guild.'},
    {"id": "3", "contents": '"Moon"\nA crater on the moon has the name Vandel.'},
    {"id": "4", "contents": '"Boats"\nBoats of oak were sold at 40 crowns.'},
    {"id": "5", "contents": '"Snow"\nSnow falls here.'},
    {"id": "6", "contents": '"Lamps"\nLamps were lit by Orrin.'},
    {"id": "7", "contents": '"Clocks"\nClocks were wound daily by Tessa Quill.'},
]
SCRIPTS = {
    "Ada Marin": ["Question: In which town was Ada Marin born?\nAnswer: Torvel"],
    "Tide mill": [
        "<think>mill</think>\nQuestion: Where did the sea drive a mill?\n\nAnswer: Kelbo"
    ],
    "Rye": ["Question: Where does the guild of Kelbo bake?\nAnswer: Kelbo"],
    "Moon": ["Question: What is the name of the crater?\nAnswer: Vandelo"],
    "Boats": ["The answer is 40 crowns."],
    "Snow": ["NONE"],
    "Lamps": ["Question: Who did it?\nAnswer: Orrin"],
    "Clocks": ["Question: Where did the sea drive a mill?\nAnswer: Clocks"],
}
"""Two can be kept. Nothing is found by the question of Lamps, and that of Clocks is one of
another passage."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder, ROWS)
    return folder


@pytest.fixture(scope="module")
def retriever(corpus):
    with retrieval_server(corpus) as (url, _):
        yield url


def command(corpus, url, retriever, out, *more):
    asked = ["--url", f"{url}/v1", "--model", "m", "--retriever_url", retriever]
    sizes = ["--count", "2", "--test-size", "1", "--template", "short"]
    return ["--corpus_path", str(corpus / "corpus.jsonl"), *asked, "--out", str(out), *sizes, *more]


def asked_about(out):
    lines = (out / synthesize.ASKED).read_text().splitlines()[1:]
    return {row.pop("id"): row for row in map(json.loads, lines)}


def rows_of(out):
    names = ("train.parquet", "test.parquet")
    return [read_row(row) for name in names for row in pq.read_table(out / name).to_pylist()]


def test_every_passage_is_kept_or_rejected_for_its_reason(corpus, retriever, tmp_path):
    player = Player(SCRIPTS)
    out = tmp_path / "made"
    with serving(player.app) as url, pytest.raises(SystemExit) as ended:
        synthesize.main(command(corpus, url, retriever, out, "--count", "3"))
    told = str(ended.value)
    assert "only 2 questions were kept, --count asks for 3 (8 passages; rejected: " in told
    assert asked_about(out) == {
        "0": {
            "question": "In which town was Ada Marin born?",
            "answer": "Torvel",
            "gold_ids": ["0"],
        },
        "1": {
            "question": "Where did the sea drive a mill?",
            "answer": "Kelbo",
            "gold_ids": ["1"],
        },
        "2": {"rejected": "answer in the question"},
        "3": {"rejected": "answer not in the passage"},
        "4": {"rejected": "no question and answer in the reply"},
        "5": {"rejected": "nothing to ask"},
        "6": {"rejected": "not found by its question"},
        "7": {"rejected": "not found by its question"},
    }
    for reason in ("answer in the question 1", "not found by its question 2"):
        assert reason in told
    (request,) = player.requests["Moon"]
    assert request["model"] == "m" and ROWS[3]["contents"] in request["messages"][0]["content"]
    assert not (out / "train.parquet").exists()


def test_the_files_are_those_that_training_reads_and_do_not_depend_on_a_stop(
    corpus, retriever, tmp_path, capsys
):
    """The first start is refused in the middle, and what it has asked is not asked again."""
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    refusing = Player({**SCRIPTS, "Tide mill": [Response(status_code=400)]})
    one_by_one = ["--max_concurrent", "1"]
    told = r"status 400.*the same command goes on"
    with serving(refusing.app) as url, pytest.raises(SystemExit, match=told):
        synthesize.main(command(corpus, url, retriever, stopped, *one_by_one))
    before = asked_about(stopped)
    player = Player(SCRIPTS)
    with serving(player.app) as url:
        assert synthesize.main(command(corpus, url, retriever, stopped)) == 0
        told = capsys.readouterr().out
        again = {
            str(row["id"]) for key in player.requests for row in ROWS if key in row["contents"]
        }
        assert not again & before.keys() and "1 training and 1 test questions of" in told
        assert synthesize.main(command(corpus, url, retriever, whole)) == 0
        assert "already made" not in capsys.readouterr().out
        assert synthesize.main(command(corpus, url, retriever, whole)) == 0
        assert "already made" in capsys.readouterr().out
    assert rows_of(stopped) == rows_of(whole)
    by_passage = {row["extra_info"]["id"]: row for row in rows_of(whole)}
    assert by_passage.keys() == {"0", "1"}
    row = by_passage["0"]
    assert row["data_source"] == "synthesized" and row["extra_info"]["gold_ids"] == ["0"]
    assert row["reward_model"]["ground_truth"]["target"] == ["Torvel"]
    assert "In which town was Ada Marin born?" in row["prompt"][0]["content"]


def test_other_replies_are_not_mixed_with_those_that_stand_there(corpus, retriever, tmp_path):
    with serving(Player(SCRIPTS).app) as url:
        assert synthesize.main(command(corpus, url, retriever, tmp_path)) == 0
        with pytest.raises(SystemExit, match="begun with other settings"):
            synthesize.main(command(corpus, url, retriever, tmp_path, "--topk", "1"))


def test_a_passage_with_the_answer_is_as_good_as_the_passage_itself(tmp_path):
    """By the question the first passage is not found; another one, which is, has the answer."""
    rows = [
        {"id": "a", "contents": '"Marin"\nShe went to Torvel.'},
        {"id": "b", "contents": '"Birth"\nThe town of birth of the poet is Torvel.'},
        {"id": "c", "contents": '"Other"\nNothing of it.'},
    ]
    write_corpus(tmp_path, rows)
    reply = "Question: What is the town of birth of the poet?\nAnswer: Torvel"
    player = Player({"Marin": [reply], "Birth": ["NONE"], "Other": ["NONE"]})
    out = tmp_path / "made"
    with (
        retrieval_server(tmp_path) as (retriever, _),
        serving(player.app) as url,
        pytest.raises(SystemExit, match="only 1 questions were kept"),
    ):
        synthesize.main(command(tmp_path, url, retriever, out, "--topk", "1"))
    assert asked_about(out)["a"]["gold_ids"] == ["b", "a"]


def test_a_question_that_is_asked_twice_is_kept_once():
    first = {"id": "1", "question": "Who sank?", "answer": "A", "gold_ids": ["1"]}
    questions = [first, {"id": "2", "rejected": "x"}, {**first, "id": "3", "question": "who sank"}]
    assert synthesize.distinct(questions) == [first]
    told = synthesize.rejections(questions)
    assert told == "3 passages; rejected: x 1, asked before 1"


@pytest.mark.parametrize(
    ("question", "answer", "reason"),
    [
        ("Who was born in 1947?", "Ada Marin", None),
        ("When was she born?", "the 1947", None),
        ("When was she born?", "194", "answer not in the passage"),
        ("When was she born?", "--", "answer not in the passage"),
        ("Was ada marin born?", "Ada Marin", "answer in the question"),
        ("Where?", "Ada Marin was born in Torvel in 1947 and Ada Marin", "answer too long"),
    ],
)
def test_answers_are_compared_in_whole_words(question, answer, reason):
    assert synthesize.misfit(question, answer, ROWS[0]["contents"]) == reason


@pytest.mark.parametrize(
    ("missing", "flag"), [("endpoint", "--url"), ("server", "--retriever_url")]
)
def test_an_endpoint_or_a_server_that_is_not_there_is_named(corpus, tmp_path, missing, flag):
    nobody = "http://127.0.0.1:9"
    with serving(Player(SCRIPTS).app) as url:
        there = nobody if missing == "endpoint" else url
        with pytest.raises(SystemExit, match=rf"error: {flag}: "):
            synthesize.main(command(corpus, there, f"{nobody}/retrieve", tmp_path))


def test_a_test_set_as_large_as_all_questions_is_refused(capsys):
    names = ["--corpus_path=c", "--url=u", "--model=m", "--retriever_url=r", "--out=o"]
    with pytest.raises(SystemExit):
        synthesize.parse_arguments([*names, "--count=5", "--test-size=5"])
    assert "expected less than --count 5" in capsys.readouterr().err
