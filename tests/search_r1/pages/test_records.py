"""What a page reads: files in their order, records as they are, and lines that cannot be read."""

import json
import math

import pytest

from search_r1.pages.records import parse, read_entries, record_files, shown
from tests.search_r1.pages.made_records import said, sample, write, write_run
from verl.utils.errors import DataError


def test_the_files_of_a_run_stand_in_the_order_of_its_steps(tmp_path):
    for name in ("val_000010", "train_000010", "train_000002", "val_000000"):
        write(tmp_path / f"trajectories/{name}.jsonl", [sample("q", "a", uid="u")])
    names = [path.stem for path in record_files(tmp_path)]
    assert names == ["val_000000", "train_000002", "train_000010", "val_000010"]
    entries = list(read_entries(tmp_path))
    assert [(e.kind, e.step) for e in entries] == [
        ("val", 0),
        ("train", 2),
        ("train", 10),
        ("val", 10),
    ]
    assert entries[0].name == "val_000000:1"
    assert [e.step for e in read_entries(tmp_path, steps=[10])] == [10, 10]


def test_a_result_of_an_evaluation_has_no_step(tmp_path):
    path = write(tmp_path / "nq.jsonl", [{"row": 0, **sample("q", "a", uid="u")}] * 3)
    entries = list(read_entries(path, limit=2))
    assert {(e.kind, e.step) for e in entries} == {("evaluation", None)}
    assert [e.line for e in entries] == [1, 2]


def test_a_folder_without_records_is_an_error(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match="neither a file of trajectory records"):
        list(read_entries(tmp_path))


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"prompt": "q', "cut off"),
        ('{"prompt": "q\n', "not JSON"),
        ("[1]\n", "not a record but a list"),
        ("{}\n", "prompt is missing"),
        (json.dumps(sample("q", "a", uid="u") | {"segments": {}}) + "\n", "segments is {}"),
        (json.dumps(sample("q", "a", uid="u") | {"segments": [{"text": 1}]}), "segment 0 has no"),
        (json.dumps(sample("q", "a", uid="u") | {"reward": None}), "reward is missing"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_what_is_no_record_says_why(line, problem):
    found, why = parse(line)
    assert found is None and problem in why


@pytest.mark.parametrize(
    "wrong",
    [
        {"extra_info": ["a list"]},
        {"info": "a text"},
        {"segments": [{"source": "observation", "text": "", "info": {"query": 1, "passages": 7}}]},
        {"segments": [said("x") | {"token_ids": 5}]},
    ],
)
def test_a_record_that_no_page_understands_is_an_entry_with_a_problem(tmp_path, wrong):
    """It must not keep the others from being shown."""
    path = write(
        tmp_path / "x.jsonl", [sample("q", "a", uid="u") | wrong, sample("q", "a", uid="u")]
    )
    summaries = [shown(entry)[0] for entry in read_entries(path)]
    assert len(summaries) == 2 and "problem" not in summaries[1]


def test_the_broken_lines_of_a_run_are_entries(tmp_path):
    entries = [e for e in read_entries(write_run(tmp_path)) if e.record is None]
    assert [e.name for e in entries] == ["train_000002:4", "train_000002:5"]
    assert entries[1].excerpt == '{"uid": "e", "pro' and "cut off" in entries[1].problem


def test_numbers_that_json_lacks_become_null():
    text = json.dumps(sample("q", "a", uid="u") | {"reward": {"score": math.nan}})
    found, _ = parse(text)
    assert found is not None and found["reward"]["score"] is None


def test_gold_passages_are_marked_and_unread_ids_left_out(tmp_path):
    path = write(tmp_path / "x.jsonl", [sample("q", "Lyon", uid="u", advantage=1.0)])
    (entry,) = read_entries(path)
    summary, content = shown(entry)
    passages = content["segments"][1]["info"]["passages"]
    assert [passage["gold"] for passage in passages] == [True, False]
    assert "token_ids" not in content["segments"][1] and "prompt_ids" not in content
    assert content["segments"][0]["token_ids"][:2] == [100, 101]
    assert (content["answer"], content["gold"]) == ("Lyon", ["Paris"])
    assert summary["searches"] == 1 and summary["queries"] == ["capital"]
    assert summary["detail"] == "tokens" and summary["em"] == 0
