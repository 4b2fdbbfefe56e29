"""metrics.jsonl on a full disk, and cut back to a checkpoint."""

import json
from types import SimpleNamespace

import pytest
import torch

from tests.processes import file_limit
from verl.protocol import DataProto
from verl.trainer.config import TrainerConfig
from verl.trainer.driver import start_tracking
from verl.utils.tracking import STEP, Timers, Tracking, truncate_metrics


def tracking(folder, **panels) -> Tracking:
    return Tracking(str(folder), [], "project", "run", {}, panels)


def rows(path) -> list[dict]:
    text = path.read_text()
    assert text.endswith("\n") or not text, "a half line"
    return [json.loads(line) for line in text.splitlines()]


def test_a_line_per_step(tmp_path):
    tracking(tmp_path, panel="loss").log(
        {"loss": 0.5, "bad": float("nan"), "worse": float("inf")}, 3
    )
    assert rows(tmp_path / "metrics.jsonl") == [
        {STEP: 3, "loss": 0.5, "panel": 0.5, "bad": None, "worse": None}
    ]


@pytest.mark.parametrize("room", [0, 1, 50])
def test_metrics_wait_for_room(tmp_path, room, caplog):
    """`room`: bytes of the disk that are left, less than a line takes."""
    writer = tracking(tmp_path)
    path = tmp_path / "metrics.jsonl"
    writer.log({"padding" * 20: 0.0}, 0)
    with file_limit(path.stat().st_size + room):
        for step in (1, 2, 3):
            writer.log({"padding" * 20: float(step)}, step)
            assert [row[STEP] for row in rows(path)] == [0]
    assert caplog.text.count("kept in memory") == 3
    writer.log({"loss": 4.0}, 4)
    writer.log({"loss": 5.0}, 5)
    assert [row[STEP] for row in rows(path)] == [0, 1, 2, 3, 4, 5]


def test_the_first_line_and_the_last_one_wait_as_well(tmp_path):
    writer = tracking(tmp_path)
    path = tmp_path / "metrics.jsonl"
    with file_limit(10):
        writer.log({"loss": 1.0}, 1)
        assert rows(path) == []
    writer.finish()
    writer.finish()
    assert rows(path) == [{STEP: 1, "loss": 1.0}]


def test_trajectories_that_do_not_fit_leave_nothing_half(tmp_path, caplog):
    record = {"data_source": "d", "prompt": "p" * 500}
    with file_limit(800):
        assert not tracking(tmp_path).log_trajectories("val", [record] * 3, 1).exists()
    assert "not written" in caplog.text
    assert rows(tracking(tmp_path).log_trajectories("val", [record] * 3, 2)) == [record] * 3


def line(step: int, **values) -> str:
    return json.dumps({STEP: step, **values}) + "\n"


def test_lines_after_the_checkpoint_go(tmp_path):
    path = tmp_path / "metrics.jsonl"
    moved = tmp_path / "moved.jsonl"
    truncate_metrics(str(tmp_path), 2)
    assert not path.exists()
    # a validation of step 2 was written after the line of step 3; the last line was cut off by a
    # kill
    lines = [line(0), line(1), line(2, loss=1), line(3), line(2, val=1), line(4)]
    path.write_text("".join(lines) + line(5)[:-4])
    truncate_metrics(str(tmp_path), 4)
    assert path.read_text() == "".join(lines)
    truncate_metrics(str(tmp_path), 2, moved_to=moved)
    assert path.read_text() == line(0) + line(1) + line(2, loss=1) + line(2, val=1)
    assert moved.read_text() == line(3) + line(4)
    truncate_metrics(str(tmp_path), -1)
    assert path.read_text() == "" and [p.name for p in tmp_path.glob("*.tmp")] == []


def test_a_cut_line_that_ends_at_its_newline_is_dropped_too(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(line(1) + line(2).rstrip("\n"))
    truncate_metrics(str(tmp_path), 5)
    assert path.read_text() == line(1)


def test_a_run_that_was_lost_before_its_first_checkpoint_leaves_no_metrics(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(line(1) + line(2)[:-4])
    trainer = TrainerConfig(experiment_name="run", default_local_dir=str(tmp_path), logger=[])
    start_tracking(SimpleNamespace(trainer=trainer, model_dump=dict), None).log({"loss": 0.5}, 1)
    assert rows(path) == [{STEP: 1, "loss": 0.5}]


def test_timers_add_up_and_say_what_begins():
    begun: list[str] = []
    timers = Timers(begun.append)
    for name in ("gen", "adv", "gen"):
        with timers(name):
            pass
    assert begun == ["gen", "adv", "gen"] and set(timers.pop()) == {"timing_s/gen", "timing_s/adv"}
    assert timers.pop() == {}


def test_a_batch_is_kept_or_told_that_it_cannot_be(tmp_path):
    run = tracking(tmp_path)
    batch = DataProto.from_dict({"x": torch.zeros(100_000)})
    with file_limit(1000):
        assert "could not be written" in run.keep(batch, "nonfinite/actor_000001.pt")
    assert (
        run.keep(batch, "nonfinite/actor_000002.pt")
        == f"is in {tmp_path}/nonfinite/actor_000002.pt"
    )
    assert len(DataProto.load(tmp_path / "nonfinite/actor_000002.pt")) == 100_000
