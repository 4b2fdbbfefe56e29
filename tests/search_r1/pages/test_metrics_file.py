"""What is read of a file of metrics that a run is writing, and writes anew."""

import json
import os

import pytest

from search_r1.pages.metrics_file import MetricsFile, newest, trained
from tests.search_r1.pages.made_runs import append, make_run, step_line, validation_line


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "run", [0.1, 0.2, 0.3])


@pytest.fixture
def file(run):
    """The file after the first look."""
    file = MetricsFile(run / "metrics.jsonl")
    assert file.poll() == 0
    return file


def scores(file: MetricsFile) -> dict[int, float | None]:
    return {
        step: row["critic/score/mean"]
        for step, row in file.rows.items()
        if "critic/score/mean" in row
    }


def test_only_what_is_new_is_read(run, file):
    assert file.poll() is None
    append(run, step_line(4, 0.4))
    assert file.poll() == 4
    assert scores(file) == {1: 0.1, 2: 0.2, 3: 0.3, 4: 0.4}
    assert len(trained(file.rows)) == 4 and newest(file.rows, "val/test_score/all") == 0.1


def test_a_line_without_its_end_is_told_and_read_when_it_ends(run, file):
    line = step_line(4, 0.4)
    append(run, line[:50])
    assert file.poll() is None and 4 not in file.rows
    assert file.unfinished is not None and file.unfinished.line == 5
    assert file.unfinished.excerpt == line[:50]
    append(run, line[50:])
    assert file.poll() == 4 and file.unfinished is None and file.problems == []


def test_half_a_line_that_is_taken_back_leaves_nothing_behind(run, file):
    path = run / "metrics.jsonl"
    size = path.stat().st_size
    append(run, step_line(4, 0.4)[:50])
    file.poll()
    os.truncate(path, size)
    append(run, step_line(4, 0.5))
    assert file.poll() == 4 and scores(file)[4] == 0.5 and file.problems == []


def test_a_file_that_was_replaced_is_read_anew(run, file):
    """A resumed run drops the lines behind its checkpoint, by another file in the same place."""
    other = run / "other"
    other.write_text(validation_line(0, 0.1) + step_line(1, 0.7))
    other.replace(run / "metrics.jsonl")
    assert file.poll() == -1
    assert scores(file) == {1: 0.7}


def test_a_file_with_the_number_of_the_one_before_is_read_anew(run, file):
    """A file that is replaced twice may get the number of the first one back."""
    lines = [validation_line(0, 0.1), *(step_line(step, 0.9) for step in range(1, 9))]
    number = file.path.stat().st_ino
    file.path.write_text("".join(lines))
    assert file.path.stat().st_ino == number
    assert file.poll() == -1
    assert set(scores(file).values()) == {0.9} and len(scores(file)) == 8


def test_a_file_that_became_shorter_is_read_anew(run, file):
    (run / "metrics.jsonl").write_text(step_line(1, 0.7))
    assert file.poll() == -1
    assert scores(file) == {1: 0.7}


def test_a_file_that_is_gone_leaves_no_rows(run, file):
    (run / "metrics.jsonl").unlink()
    assert file.poll() == -1 and file.rows == {}
    assert file.poll() is None
    append(run, step_line(1, 0.7))
    assert file.poll() == 1


def test_a_step_that_is_trained_again_takes_the_place_of_all_behind_it(run, file):
    append(run, step_line(2, 0.8))
    assert file.poll() == 2
    assert scores(file) == {1: 0.1, 2: 0.8}


def test_a_validation_that_ends_later_is_added_to_its_step(run, file):
    append(run, validation_line(2, 0.9))
    assert file.poll() == 2
    assert scores(file) == {1: 0.1, 2: 0.2, 3: 0.3}
    assert file.rows[2]["val/test_score/all"] == 0.9 and list(file.rows) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not JSON"),
        ("[1]", "no metrics by name but a list"),
        ('{"a": 1}', "training/global_step is None"),
        ('{"training/global_step": "<b>"}', "training/global_step is '<b>'"),
        ('{"training/global_step": true}', "training/global_step is True"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_a_line_of_something_else_is_told_and_left_out(run, file, line, reason):
    append(run, line + "\n", step_line(4, 0.4))
    assert file.poll() == 4
    (problem,) = file.problems
    assert problem.line == 5 and problem.reason.startswith(reason)
    assert problem.excerpt == line[:200]


def test_what_is_no_number_is_left_out_and_what_is_not_finite_is_none(run, file):
    values = {"training/global_step": 4, "a": "x", "b": [1], "c": True, "d": None, "e": 1 / 3}
    append(run, json.dumps({**values, "f": float("inf"), "g": 10**400}) + "\n")
    file.poll()
    assert file.rows[4] == {"d": None, "e": 0.333333, "f": None, "g": None}


def test_many_unreadable_lines_are_counted(run, file):
    append(run, "{\n" * 80)
    file.poll()
    assert len(file.problems) == 50 and file.num_problems == 80
