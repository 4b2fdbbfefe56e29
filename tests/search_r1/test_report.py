"""The closing table: search policy and reading apart, from trajectory records."""

import json

from search_r1.report import summary, table, write_report


def record(em, passages, gold, hops=1, queries=1, source="nq"):
    segments = [
        {"source": "observation", "info": {"query": "q", "passages": [{"id": i} for i in passages]}}
        for _ in range(queries)
    ]
    return {
        "data_source": source, "reward": {"em": em}, "stop_reason": "answer", "segments": segments,
        "extra_info": {"gold_ids": gold, "hops": hops},
    }  # fmt: skip


def test_policy_and_reading_are_told_apart():
    records = [record(1, ["1"], ["1"]), record(0, ["1", "2"], ["2"]), record(0, ["3"], ["1"]), record(1, [], ["1"])]
    assert summary(records) == {
        "EM": 0.5, "searches": 1.0, "answered": 1.0, "right entity": 0.5, "EM if gold retrieved": 0.5
    }  # fmt: skip


def test_without_known_passages_there_is_a_dash():
    assert "| nq | 1 | 1.000 | 0.00 | 1.000 | - | - |" in table([record(1, [], [], queries=0)])


def test_report_of_a_run_that_only_validated(tmp_path):
    (tmp_path / "trajectories").mkdir()
    (tmp_path / "trajectories" / "val_000000.jsonl").write_text(json.dumps(record(1, ["1"], ["1"])) + "\n")
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"training/global_step": 0, "val/test_score/all": 1.0}) + "\n")
    assert "step 0" in write_report(tmp_path)
    assert (tmp_path / "curves.png").stat().st_size > 0
