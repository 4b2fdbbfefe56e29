"""The benchmarks' native forms, their real files, and the commands that make training files of
them."""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from search_r1.data import benchmarks
from search_r1.data.benchmarks import Source, build, leakage, parse_sources, read
from search_r1.data.shapes import normalise
from search_r1.prompts import RAG_PROMPT, SEARCH_PROMPT
from tests.retrieval import retrieval_server, write_corpus, write_lines
from verl.utils.errors import DataError

ROOT = Path(__file__).resolve().parents[3]
REAL = ROOT.parent / "shared" / "data"
FACTS = {"supporting_facts": [["A", 0], ["B", 2], ["A", 1]]}
POPQA = {"question": "q", "subj": "s", "prop": "p", "obj": "o", "s_wiki_title": "S"}

RECORDS = [
    ({"question": "q", "answer": ["a", "b"]}, {"golden_answers": ["a", "b"]}),
    ({"Question": "q", "Answer": "a"}, {"golden_answers": "a"}),
    (
        {
            "question": "q",
            "answers": ["a"],
            "ctxs": [{"title": "X", "isgold": False}, {"title": "A", "isgold": True}],
        },
        {"golden_answers": ["a"], "gold_titles": ["A"]},
    ),
    (
        {"question": "q", "answers": ["a"], "ctxs": [{"title": "X", "hasanswer": True}]},
        {"golden_answers": ["a"]},
    ),
    (
        {"_id": "7", "question": "q", "answer": "a", "context": [], **FACTS},
        {"id": "7", "golden_answers": ["a"], "gold_titles": ["A", "B"], "hops": 2},
    ),
    (
        {
            "question": "q",
            "answer": "a",
            "supporting_facts": {"title": ["A", "A"], "sent_id": [0, 1]},
        },
        {"golden_answers": ["a"], "gold_titles": ["A"], "hops": 1},
    ),
    (
        {
            "id": "3hop1__1_2",
            "question": "q",
            "answer": "a",
            "answer_aliases": ["b"],
            "paragraphs": [
                {"title": "A", "is_supporting": True},
                {"title": "X", "is_supporting": False},
            ],
        },
        {"id": "3hop1__1_2", "golden_answers": ["a", "b"], "gold_titles": ["A"], "hops": 3},
    ),
    (
        {**POPQA, "possible_answers": '["o", "x"]'},
        {"golden_answers": ["o", "x"], "gold_titles": ["S"], "hops": 1},
    ),
    (
        {**POPQA, "o_aliases": '["y"]'},
        {"golden_answers": ["o", "y"], "gold_titles": ["S"], "hops": 1},
    ),
    (
        {"QuestionId": "tc_1", "Question": "q", "Answer": {"Value": "a", "Aliases": ["b", "a"]}},
        {"id": "tc_1", "golden_answers": ["a", "b"]},
    ),
    ({"question": "q", "answer": {"value": "a", "aliases": []}}, {"golden_answers": ["a"]}),
    ({"qid": "x", "question": "q", "answer": True}, {"id": "x", "golden_answers": ["yes"]}),
    ({"qid": "x", "question": "q", "answer": False}, {"id": "x", "golden_answers": ["no"]}),
    (
        {
            "utterance": "q",
            "targetValue": '(list (description "Padmé Amidala") (description Leia))',
        },
        {"golden_answers": ["Padmé Amidala", "Leia"]},
    ),
    (
        {
            "id": 1,
            "question": "q",
            "golden_answers": ["a"],
            "metadata": {"supporting_facts": {"title": ["A", "B"]}},
        },
        {"id": 1, "golden_answers": ["a"], "gold_titles": ["A", "B"], "hops": 2},
    ),
    (
        {
            "prompt": [{"content": "other"}],
            "reward_model": {"ground_truth": "a"},
            "extra_info": {"question": "q"},
        },
        {"golden_answers": "a"},
    ),
    (
        {"question": "q", "answers": {"text": ["a", "b", "a"], "answer_start": [3, 9]}},
        {"golden_answers": ["a", "b"]},
    ),
    ({"question": "q", "answers": [{"text": "a", "answer_start": 3}]}, {"golden_answers": ["a"]}),
    (
        {"question": "q", "answers": "{'text': ['a'], 'answer_start': [3]}"},
        {"golden_answers": ["a"]},
    ),
    ({"question": "q", "answers": "['a', 'b']"}, {"golden_answers": ["a", "b"]}),
    ({"question": "q", "answers": [], "answer": "a"}, {"golden_answers": "a"}),
    ({"question": "q", "answer": "[sic]"}, {"golden_answers": "[sic]"}),
    (
        {
            "id": "5a",
            "question": "q",
            "answer": "a",
            "supporting_facts": {"title": ["A"], "sent_id": [0]},
        },
        {"id": "5a", "golden_answers": ["a"], "gold_titles": ["A"], "hops": 1},
    ),
    (
        {
            "id": "9",
            "question": {"text": "q", "tokens": ["q"]},
            "document": {},
            "annotations": {
                "id": ["1", "2", "3"],
                "yes_no_answer": [-1, 1, -1],
                "short_answers": [
                    {"text": ["a", "b"], "start_token": [1, 4]},
                    {"text": []},
                    {"text": ["a"]},
                ],
            },
        },
        {"id": "9", "golden_answers": ["a", "b", "yes"]},
    ),
    (
        {
            "example_id": 8,
            "question_text": "q",
            "document_text": "<P> An old a b </P> town",
            "annotations": [
                {"yes_no_answer": "NONE", "short_answers": [{"start_token": 3, "end_token": 6}]}
            ],
        },
        {"id": 8, "golden_answers": ["a b"]},
    ),
    ({"url": "http://x", "question": "q", "answers": ["a"]}, {"golden_answers": ["a"]}),
    ({"prompt": "q", "reward_model": {"ground_truth": {"text": ["a"]}}}, {"golden_answers": ["a"]}),
]


@pytest.mark.parametrize(("record", "expected"), RECORDS)
def test_native_forms(record, expected):
    assert normalise(record) == {"question": "q", **expected}


def test_a_record_that_only_looks_like_one_is_named(tmp_path):
    path = write_lines(
        tmp_path / "hotpotqa.json",
        [
            {"question": "q", "answer": "a", "supporting_facts": [3]},
            {"question": "", "answer": "a"},
        ],
    )
    with pytest.raises(DataError, match=r"line 1: looks like HotpotQA(.|\n)*line 2: no question"):
        read(Source("hotpotqa", path), "test")


def test_answers_that_are_nested_otherwise_are_refused_with_their_place(tmp_path):
    """A printed dict as gold answer would be a reward of 0 for ever."""
    records = [
        {"question": "q", "answers": {"spans": ["a"], "number": ""}},
        {"question": "q", "golden_answers": [["a"]]},
        {"question": {"words": ["q"]}, "answers": ["a"]},
        {"question": "q", "answers": {"text": [], "answer_start": []}},
    ]
    path = write_lines(tmp_path / "drop.jsonl", records)
    expected = "expected a text, a number or a list of them"
    with pytest.raises(DataError) as error:
        read(Source("drop", path), "test")
    assert str(error.value).split("\n") == [
        f"{path}, line 1: golden_answers: {expected}, got a dict (keys: spans, number)",
        f"{path}, line 2: golden_answers: {expected}, got a list that holds str 'a'",
        f"{path}, line 3: question: expected a text, got a dict (keys: words)",
        f"{path}, line 4: no answer (looked for golden_answers, answers, answer)",
    ]


def test_rows_without_an_answer_are_left_out_and_counted_when_that_is_asked_for(tmp_path, capsys):
    """SQuAD 2 and the hub's Natural Questions have thousands."""
    rows = [
        {"question": "q", "answers": {"text": [text] if text else []}}
        for text in ("a", "", "b", "")
    ]
    path = write_lines(tmp_path / "squad.jsonl", rows)
    _, kept = read(Source("squad", path), "test", skip_bad=True)
    assert [row["golden_answers"] for row in kept] == [["a"], ["b"]]
    assert f"2 rows left out, the first: {path}, line 2: no answer" in capsys.readouterr().err


def test_rows_and_leakage(tmp_path):
    train = write_lines(
        tmp_path / "train.jsonl",
        [{"question": "Who is A", "answer": "x"}, {"question": "b?", "answer": "y"}],
    )
    test = write_lines(
        tmp_path / "test.jsonl", [{"question": "who is the A?", "answer": "x", **FACTS}]
    )
    rows = build(parse_sources(f"nq={train},hotpotqa={test}"), "train", "search")
    assert [r["data_source"] for r in rows] == ["nq", "nq", "hotpotqa"]
    assert [r["extra_info"]["index"] for r in rows] == [0, 1, 0]
    assert rows[0]["prompt"] == [
        {"role": "user", "content": SEARCH_PROMPT.replace("{question}", "Who is A?")}
    ]
    assert rows[2]["extra_info"]["gold_titles"] == ["A", "B"] and rows[2]["reward_model"][
        "ground_truth"
    ]["target"] == ["x"]
    assert leakage(rows[:2], rows[2:]) == ["who is the A?"]


def test_prompts_with_the_passages_of_one_retrieval(tmp_path):
    write_corpus(
        tmp_path,
        [
            {"id": "0", "contents": '"Torvel"\nTorvel lies in Marna.'},
            {"id": "1", "contents": '"X"\ny'},
        ],
    )
    path = write_lines(tmp_path / "nq.jsonl", [{"question": "where is Torvel", "answer": "Marna"}])
    script = [
        sys.executable,
        "scripts/data_process/nq_rag.py",
        "--local_dir",
        str(tmp_path / "out"),
    ]
    with retrieval_server(tmp_path) as (url, _):
        done = subprocess.run(
            [*script, "--data_sources", f"nq={path}", "--retriever_url", url],
            cwd=ROOT,
            capture_output=True,
            text=True,
            env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        )
    assert done.returncode == 0, done.stderr
    assert "1 of the test questions are also training questions" in done.stdout
    (row,) = pq.read_table(tmp_path / "out" / "test.parquet").to_pylist()
    context = 'Doc 1(Title: "Torvel") Torvel lies in Marna.'
    assert row["prompt"][0]["content"] == RAG_PROMPT.format(
        question="where is Torvel?", context=context
    )


@pytest.mark.parametrize(
    "script", ["nq_search", "qa_search_train_merge", "qa_search_test_merge", "nq_rag"]
)
def test_entry_points_of_the_original(script):
    command = [sys.executable, f"scripts/data_process/{script}.py", "--help"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0 and "--local_dir" in done.stdout and "--data_sources" in done.stdout


def test_the_hub_is_read_by_split(monkeypatch, tmp_path):
    """A folder stands for the hub's data set: `test` takes the first of test, dev and train that is
    there."""
    pytest.importorskip("datasets", reason="the extra `hub` is not installed")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    for split in ("train", "dev"):
        write_lines(
            tmp_path / f"{split}.jsonl",
            [{"id": f"{split}_0", "question": "q", "golden_answers": ["a"]}],
        )
    import datasets

    load = datasets.load_dataset
    files = {split: str(tmp_path / f"{split}.jsonl") for split in ("train", "dev")}
    monkeypatch.setattr(datasets, "load_dataset", lambda hub, name: load("json", data_files=files))
    assert read(Source("nq"), "test") == (
        "dev",
        [{"id": "dev_0", "question": "q", "golden_answers": ["a"]}],
    )
    assert read(Source("nq"), "train")[0] == "train"
    with pytest.raises(DataError, match="not one of nq"):
        read(Source("squad"), "test")


def test_an_unreachable_hub_names_the_way_out(monkeypatch):
    datasets = pytest.importorskip("datasets", reason="the extra `hub` is not installed")

    def refuse(*_):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(DataError, match=r"no route.*nq=FILE"):
        read(Source("nq"), "test")


COUNTS = {
    "nq_open/NQ-open.dev.jsonl": (3610, 0),
    "nq_open/NQ-open.efficientqa.dev.1.1.jsonl": (1800, 0),
    "nq_open/NQ-open.efficientqa.test.1.1.jsonl": (1769, 0),
    "nq_open/dpr/topics.dpr.nq.dev.txt": (8757, 0),
    "nq_gold_passages/nq-open-oracle.jsonl.gz": (2655, 2655),
    "triviaqa/topics.dpr.trivia.dev.txt": (8837, 0),
    "popqa/popqa_1000_with_paragraphs.json": (1000, 1000),
    "hotpotqa/dev500_native/test.jsonl": (500, 500),
    "hotpotqa/react_simplified/hotpot_dev_v1_simplified.json": (7405, 0),
    "hotpotqa/train500_gold_paras/grpo_val.jsonl": (500, 500),
    "hotpotqa/hipporag_train100/hotpotqa_train.json": (100, 100),
    "2wikimultihopqa/dev200_native/wikihop.json": (200, 200),
    "2wikimultihopqa/qa_only/test.parquet": (12576, 0),
    "2wikimultihopqa/train500_native/wikihop_train_preprocess.json": (500, 500),
    "musique/dev200_native/musique.json": (200, 200),
    "musique/hipporag_train100/musique_train.json": (100, 100),
    "musique/qa_only/train.parquet": (19938, 0),
    "musique/qa_only/test.parquet": (2417, 0),
    "bamboogle/toolstar_test.jsonl": (125, 0),
    "bamboogle/simpledeepsearcher_bamboogle.json": (125, 0),
    "bamboogle/agentic_rag_test.jsonl": (125, 0),
    "searchr1_eval_subsets/popqa/test.jsonl": (1000, 1000),
    "searchr1_eval_subsets/nq/test.jsonl": (1000, 0),
    "searchr1_eval_subsets/triviaqa/test.jsonl": (1000, 0),
    "searchr1_eval_subsets/bamboogle/test.jsonl": (125, 0),
    "searchr1_native_parquet/nq_search.test.parquet": (3610, 0),
    "r1_searcher/training_set/stage_1.jsonl": (350, 0),
    "r1_searcher/training_set/stage_2.jsonl": (8148, 0),
    "r1_searcher/eval_set/2wiki_500.jsonl": (500, 0),
    "r1_searcher/eval_set/hotpotqa_500.jsonl": (500, 0),
    "r1_searcher/eval_set/musique_500.jsonl": (500, 0),
    "nq_open/dpr/topics.dpr.nq.test.txt": (3610, 0),
    "seven_way_eval_deepresearcher/test.parquet": (3197, 0),
    "seven_way_eval_deepresearcher/dev.parquet": (875, 0),
    "nq_train_silver.jsonl": (2478, 0),
}


@pytest.mark.skipif(not REAL.is_dir(), reason="needs ../shared/data")
@pytest.mark.parametrize("file", COUNTS)
def test_real_files_convert_whole(file):
    """(questions, those with gold titles) of every file."""
    _, rows = read(Source("x", REAL / file), "test")
    assert (len(rows), sum("gold_titles" in row for row in rows)) == COUNTS[file]


@pytest.mark.skipif(not REAL.is_dir(), reason="needs ../shared/data")
def test_the_originals_parquet_is_what_we_make_of_the_same_questions():
    theirs = pq.read_table(REAL / "searchr1_native_parquet" / "nq_search.test.parquet").to_pylist()
    ours = {
        row["question"]: row
        for row in build([Source("nq", REAL / "nq_open/NQ-open.dev.jsonl")], "test", "search")
    }
    assert len(ours) == len(theirs) == 3610
    for row in theirs:
        mine = ours[row["question"]]
        same = ("question", "golden_answers", "data_source", "prompt", "ability", "reward_model")
        assert {key: mine[key] for key in same} == {key: row[key] for key in same}
        assert mine["extra_info"]["split"] == row["extra_info"]["split"]


def test_written_files_are_read_by_pyarrow_with_mixed_gold(tmp_path):
    rows = [{"question": "a", "answer": "x"}, {"question": "b", "answer": "y", **FACTS}]
    made = build([Source("s", write_lines(tmp_path / "s.jsonl", rows))], "test", "fast")
    line = benchmarks.write(made, tmp_path / "deep" / "test.parquet")
    assert "2 questions (s 2); 0 duplicates" in line
    back = pq.read_table(tmp_path / "deep" / "test.parquet").to_pylist()
    assert back[1]["extra_info"]["hops"] == 2 and back[0]["extra_info"]["hops"] is None
    assert isinstance(pa.Table.from_pylist(back), pa.Table) and json.dumps(back)
