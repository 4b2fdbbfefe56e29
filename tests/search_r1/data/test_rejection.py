"""Rejection sampling: what is kept, and what is trained on."""

import json

import pytest

from search_r1.data.rejection import main
from verl.trainer.sft import read_examples

SEGMENTS = [
    {"source": "model", "token_ids": [5, 6]},
    {"source": "forced", "token_ids": [7]},
    {"source": "observation", "token_ids": [8, 9]},
    {"source": "model", "token_ids": [10]},
]


def write(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return str(path)


def test_keeps_right_trajectories_and_trains_on_the_policys_tokens(tmp_path, capsys):
    scores = (1.0, 0.0, float("nan"))
    records = [{"prompt_ids": [1, 2], "segments": SEGMENTS, "reward": {"score": s}} for s in scores]
    source = write(tmp_path / "t.jsonl", records)
    out = tmp_path / "rows.jsonl"
    with open(source, "a") as file:
        file.write("\n")
    assert main(["--trajectories", source, "--out", str(out)]) == 0
    assert "1 of 3" in capsys.readouterr().out
    (row,) = read_examples([str(out)])
    assert row["input_ids"] == [1, 2, 5, 6, 7, 8, 9, 10]
    assert row["loss_mask"] == [0, 0, 1, 1, 0, 0, 0, 1]


def test_each_context_of_a_trajectory_is_an_example(tmp_path):
    record = {
        "prompt_ids": [1, 2],
        "segments": SEGMENTS,
        "reward": {"score": 1.0},
        "rewrites": [{"at": 2, "prompt_ids": [1, 3]}, {"at": 4, "prompt_ids": [4]}],
    }
    source = write(tmp_path / "t.jsonl", [record])
    out = tmp_path / "rows.jsonl"
    assert main(["--trajectories", source, "--out", str(out)]) == 0
    first, second = read_examples([str(out)])
    assert first["input_ids"] == [1, 2, 5, 6, 7] and first["loss_mask"] == [0, 0, 1, 1, 0]
    assert second["input_ids"] == [1, 3, 8, 9, 10] and second["loss_mask"] == [0, 0, 0, 0, 1]


@pytest.mark.parametrize(
    "records, message",
    [
        ([{"prompt_ids": [1]}], "line 1"),
        ([], "none of 0"),
        (["x"], "line 1: not a trajectory"),
        (
            [{"prompt_ids": [1], "segments": [{"token_ids": [2]}], "reward": {"score": 1}}],
            "line 1: not a trajectory",
        ),
        (
            [{"prompt_ids": ["1"], "segments": [], "reward": {"score": 1}}],
            "line 1: expected integers",
        ),
        (
            [{"prompt_ids": [1], "segments": [], "reward": {"score": "high"}}],
            "line 1: not a trajectory",
        ),
    ],
)
def test_names_what_is_wrong(tmp_path, records, message):
    source = write(tmp_path / "t.jsonl", records)
    with pytest.raises(SystemExit, match=message):
        main(["--trajectories", source, "--out", str(tmp_path / "rows.jsonl")])


def test_names_a_missing_file(tmp_path):
    with pytest.raises(SystemExit, match="absent"):
        main(
            [
                "--trajectories",
                str(tmp_path / "absent.jsonl"),
                "--out",
                str(tmp_path / "rows.jsonl"),
            ]
        )
