"""The questions that a policy solves sometimes, by its trajectories."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from search_r1.data.pass_rate import main
from search_r1.data.rows import training_row

NAMES = ["never", "seldom", "half", "often", "always", "unasked"]
SOLVED = {"never": 0, "seldom": 1, "half": 2, "often": 3, "always": 4}
"""How many of the four trajectories of a question have solved it."""


def question(number, name):
    return training_row(f"Who {name}?", ["A"], "set", f"Who {name}?", index=number)


def write_questions(path, names=NAMES):
    rows = [question(number, name) for number, name in enumerate(names)]
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def records_of(row, rewards):
    """Trajectories as an evaluation writes them."""
    return [
        {
            "prompt_ids": [1],
            "segments": [{"source": "model", "token_ids": [2]}],
            "data_source": row["data_source"],
            "reward": reward,
            "ground_truth": row["reward_model"]["ground_truth"],
            "extra_info": row["extra_info"],
        }
        for reward in rewards
    ]


def write_records(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def files(tmp_path):
    """Questions, and two files that have half of the trajectories of each."""
    questions = write_questions(tmp_path / "train.parquet")
    records = []
    for row in pq.read_table(questions).to_pylist():
        solved = SOLVED.get(row["extra_info"]["question"][4:-1])
        if solved is not None:
            scores = [1.2] * solved + [0.2] * (4 - solved)
            records += records_of(row, [{"score": s, "em": float(s > 1)} for s in scores])
    parts = [
        write_records(tmp_path / "1.jsonl", records[::2]),
        write_records(tmp_path / "2.jsonl", records[1::2]),
    ]
    return questions, parts


def run(files, out, *more):
    questions, parts = files
    named = ["--questions", str(questions), "--trajectories", *map(str, parts)]
    return main([*named, "--out", str(out), *more])


def kept(out):
    return [row["extra_info"]["question"][4:-1] for row in pq.read_table(out).to_pylist()]


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        ([], ["seldom", "half", "often"]),
        (["--low", "0.25", "--high", "0.5"], ["seldom", "half"]),
        (["--low", "0", "--high", "0.2"], ["never"]),
        (["--metric", "em", "--solved_at", "0.5", "--low", "0.75"], ["often"]),
        (["--solved_at", "0.1", "--high", "1"], ["never", "seldom", "half", "often", "always"]),
    ],
)
def test_questions_with_a_pass_rate_within_the_limits_are_kept(files, tmp_path, flags, names):
    out = tmp_path / "new" / "kept.parquet"
    assert run(files, out, *flags) == 0
    assert kept(out) == names
    assert pq.read_schema(out) == pq.read_schema(files[0])


def test_every_question_is_accounted_for(files, tmp_path, capsys):
    assert run(files, tmp_path / "kept.parquet") == 0
    assert capsys.readouterr().out.endswith(
        "kept.parquet: 6 questions, 3 kept, 1 solved too often, 1 solved too seldom, 1 without a "
        "trajectory; 4 to 4 trajectories a question\n"
    )


def test_questions_that_trajectories_cannot_tell_apart_are_refused(tmp_path):
    rows = [{**question(0, name), "extra_info": {"split": "train"}} for name in ("one", "two")]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "q.parquet")
    records = write_records(tmp_path / "r.jsonl", records_of(rows[0], [{"score": 1.0}]))
    with pytest.raises(SystemExit, match=r"row 1: .* are those of .*row 0, .*extra_info\.index"):
        run((tmp_path / "q.parquet", [records]), tmp_path / "out.parquet")


def test_the_same_question_may_stand_there_twice(tmp_path):
    rows = [question(0, "one")] * 2
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "q.parquet")
    rewards = [{"score": 1.0}, {"score": 0.0}]
    records = write_records(tmp_path / "r.jsonl", records_of(rows[0], rewards))
    assert run((tmp_path / "q.parquet", [records]), tmp_path / "out.parquet") == 0
    assert kept(tmp_path / "out.parquet") == ["one", "one"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--metric", "f1"], "--metric f1: .* has no such number, only em, score"),
        (["--low", "0.6", "--high", "0.7"], "no question has a pass rate from 0.6 to 0.7"),
    ],
)
def test_a_filter_that_keeps_nothing_says_why(files, tmp_path, flags, message):
    with pytest.raises(SystemExit, match=message):
        run(files, tmp_path / "out.parquet", *flags)
    assert not (tmp_path / "out.parquet").exists()


def test_trajectories_of_other_questions_are_refused(files, tmp_path):
    other = write_questions(tmp_path / "other.parquet", ["elsewhere"])
    with pytest.raises(SystemExit, match="no trajectory answers a question of --questions"):
        run((other, files[1]), tmp_path / "out.parquet")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--low", "0.6", "--high", "0.5"], "--low 0.6: expected no more than --high 0.5"),
        (["--high", "1.5"], "is a share, from 0 to 1"),
    ],
)
def test_wrong_limits_are_refused(files, tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit):
        run(files, tmp_path / "out.parquet", *flags)
    assert message in capsys.readouterr().err


def test_the_questions_are_never_written_over(files, capsys):
    with pytest.raises(SystemExit):
        run(files, files[0])
    assert "the questions are read from this file" in capsys.readouterr().err and len(
        pq.read_table(files[0])
    ) == len(NAMES)
