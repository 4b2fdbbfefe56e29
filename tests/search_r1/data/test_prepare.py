"""Question files of all kinds, good and bad."""

import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from search_r1.data import prepare
from search_r1.prompts import SEARCH_PROMPT
from tests.models import make_tokenizer
from verl.utils.dataset import RLHFDataset
from verl.utils.errors import DataError

NATIVE = (
    Path(__file__).resolve().parents[4]
    / "shared/data/searchr1_native_parquet/nq_search.test.parquet"
)


def write(path, *lines):
    path.write_text(
        "".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines)
    )
    return path


def run(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["prepare", *map(str, flags)])
    prepare.main()


def test_row_in_the_training_schema(tmp_path):
    path = write(
        tmp_path / "mine.jsonl",
        {
            "question": " who {x} ",
            "golden_answers": ["A", " ", "B"],
            "gold_ids": [1, "2"],
            "hops": "2",
            "id": 7,
            "z": 0,
        },
        " \n",
        {"question": "when?", "answer": 1947, "data_source": "nq", "gold_titles": "T"},
    )
    first, second = prepare.prepare(path, "search")
    assert first == {
        "data_source": "mine",
        "prompt": [{"role": "user", "content": SEARCH_PROMPT.replace("{question}", "who {x}?")}],
        "ability": "fact-reasoning",
        "reward_model": {"style": "rule", "ground_truth": {"target": ["A", "B"]}},
        "extra_info": {
            "question": "who {x}",
            "index": 0,
            "gold_ids": ["1", "2"],
            "hops": 2,
            "id": "7",
        },
    }
    assert second["data_source"] == "nq" and second["reward_model"]["ground_truth"]["target"] == [
        "1947"
    ]
    assert second["extra_info"] == {"question": "when?", "index": 1, "gold_titles": ["T"]}


def test_csv_and_parquet_mean_the_same_as_jsonl(tmp_path):
    records = [{"question": "a, b", "answers": ["x", "y"]}, {"question": "c?", "answers": ["z"]}]
    expected = prepare.prepare(write(tmp_path / "q.jsonl", *records), "short")
    csv = write(
        tmp_path / "q.csv", "\ufeffquestion,answers\n", '"a, b","[""x"", \'y\']"\n', "c?,z\n"
    )
    assert prepare.prepare(csv, "short") == expected
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "q.parquet")
    assert prepare.prepare(tmp_path / "q.parquet", "short") == expected


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("q.csv", "question;answers\na, b;['x', 'y']\nc?;z\n"),
        ("q.csv", 'id\tquestion \tanswers\n1\ta, b\t"[""x"", \'y\']"\n2\tc?\tz\n'),
        ("q.tsv", "question\tanswers\na, b\t['x', 'y']\nc?\tz\n"),
        ("q.tsv", "a, b\t['x', 'y']\nc?\tz\n"),
        ("q.csv", "\n\nquestion|answers\na, b|['x', 'y']\n\nc?|z\n"),
        (
            "q.json",
            '{"data": [{"question": "a, b", "answers": ["x", "y"]}, '
            '{"question": "c?", "answer": "z"}]}',
        ),
        (
            "q.json",
            '{"version": 1, "data": [{"title": "T", "paragraphs": [{"context": "x y z", "qas": [\n'
            '{"question": "a, b", "answers": [{"text": "x", "answer_start": 0}, '
            '{"text": "y", "answer_start": 2}]},\n'
            '{"question": "c?", "answers": [{"text": "z", "answer_start": 4}]}]}]}]}',
        ),
        (
            "q.json",
            '{"Data": [{"Question": "a, b", "Answer": {"Value": "x", "Aliases": ["y"]}},\n'
            '{"Question": "c?", "Answer": {"Value": "z", "Aliases": []}}]}',
        ),
    ],
)
def test_tables_with_any_separator_and_whole_objects_mean_the_same(tmp_path, name, content):
    rows = prepare.prepare(write(tmp_path / name, content), "short")
    found = [
        (row["extra_info"]["question"], row["reward_model"]["ground_truth"]["target"])
        for row in rows
    ]
    assert found == [("a, b", ["x", "y"]), ("c?", ["z"])]


def test_all_problems_of_a_file_are_listed_with_their_lines(tmp_path, monkeypatch):
    path = write(
        tmp_path / "bad.jsonl",
        {"question": "ok", "answer": "x"},
        {"question": " ", "answer": "x"},
        "{broken\n",
        "[1]\n",
        {"question": "q", "answers": []},
        {"question": "q", "answer": "x", "hops": "many"},
    )
    with pytest.raises(DataError) as error:
        prepare.prepare(path, "search")
    expected = [
        "2: no question",
        "3: not JSON",
        "4: expected one object",
        "5: no answer (looked",
        "6: hops: expected int",
    ]
    lines = str(error.value).split("\n")
    assert len(lines) == len(expected)
    assert all(
        line.startswith(f"{path}, line {what}") for line, what in zip(lines, expected, strict=True)
    )
    with pytest.raises(SystemExit, match="no question"):
        run(monkeypatch, "--questions", path, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_list_of_problems_is_capped(tmp_path):
    path = write(tmp_path / "bad.jsonl", *[{"question": "", "answer": "x"}] * 50)
    with pytest.raises(DataError) as error:
        prepare.prepare(path, "search")
    assert str(error.value).count("no question") == 20 and "and 30 more" in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("q.csv", "question,answer\na, b,x\n", "line 2: more cells"),
        ("q.csv", "question,answers\na,[x\n b,[x]\n", "line 3: answers: not a list"),
        ("q.csv", "question,answer\na\n", "line 2: no answer"),
        ("q.csv", "\n\nquestion,answer\na\n", "line 4: no answer"),
        (
            "q.csv",
            "frage;antwort\na;x\n",
            "line 1: no column named question.*; found 'frage;antwort'",
        ),
        ("q.csv", f"question,answer\na,{'x' * 200_000}\n", "not a table"),
        (
            "q.json",
            '{"rows": 3,\n"columns": 2}',
            "one object with the keys rows, columns: expected one object",
        ),
        ("q.doc", "a", "expected .jsonl, .json, .csv"),
        ("q.txt", "a", "line 1: expected a question, a tab"),
        ("q.jsonl", "\n", "no rows"),
        ("q.parquet", "PAR?", "not a readable parquet"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    with pytest.raises(DataError, match=message):
        prepare.prepare(write(tmp_path / name, content), "search")


def test_missing_and_undecodable_file(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        prepare.prepare(tmp_path / "none.jsonl", "search")
    (tmp_path / "latin.jsonl").write_bytes('{"question": "café", "answer": "x"}'.encode("latin-1"))
    with pytest.raises(DataError, match="not UTF-8"):
        prepare.prepare(tmp_path / "latin.jsonl", "search")


def test_native_rows_pass_and_are_checked(tmp_path):
    row = {
        "data_source": "nq",
        "prompt": [{"role": "user", "content": "q"}],
        "reward_model": {"ground_truth": "x"},
    }
    assert prepare.prepare(write(tmp_path / "q.jsonl", row), "search") == [row]
    for bad, message in (
        ({"prompt": []}, "prompt is empty"),
        ({"reward_model": {"ground_truth": []}}, "no answer"),
    ):
        with pytest.raises(DataError, match=message):
            prepare.prepare(write(tmp_path / "q.jsonl", row | bad), "search")


def test_command_writes_what_the_trainer_reads(tmp_path, monkeypatch, capsys):
    """Five questions, one of them twice, of which one copy is held out."""
    names = ["a", "b", "c", "A?", "d"]
    path = write(tmp_path / "q.jsonl", *({"question": n, "answer": n, "hops": 1} for n in names))
    run(
        monkeypatch,
        "--questions",
        path,
        "--out",
        tmp_path / "out",
        "--template",
        "short",
        "--test-size",
        2,
    )
    assert "3 training and 2 test questions; 1 duplicates, 1 of the test" in capsys.readouterr().out
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    test = RLHFDataset([str(tmp_path / "out" / "test.parquet")], tokenizer, 100)
    assert [r["extra_info"] for r in test.rows] == [
        {"question": "A?", "index": 3, "hops": 1},
        {"question": "d", "index": 4, "hops": 1},
    ]
    assert tokenizer.decode(test.prompt_ids[0]).endswith(
        "Question: A?\n<|im_end|>\n<|im_start|>assistant\n"
    )
    with pytest.raises(SystemExit, match="expected 1 to 4 of the 5"):
        run(monkeypatch, "--questions", path, "--out", tmp_path / "out", "--test-size", 5)


@pytest.mark.skipif(not NATIVE.is_file(), reason="needs ../shared/data/searchr1_native_parquet")
def test_the_originals_parquet_loads_and_passes_unchanged(tmp_path):
    rows = prepare.prepare(NATIVE, "search")
    assert rows == pq.read_table(NATIVE).to_pylist() and len(rows) == 3610
    for row in rows:
        question = row["prompt"][0]["content"].split("Question: ")[-1].removesuffix("\n")
        assert row["prompt"][0]["content"] == SEARCH_PROMPT.replace("{question}", question)
    data = RLHFDataset(
        [str(NATIVE)], make_tokenizer(tmp_path), max_prompt_length=2048, max_samples=50
    )
    assert len(data) == 50
