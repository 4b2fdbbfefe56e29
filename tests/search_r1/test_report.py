"""The closing table: search policy and reading apart, from trajectory records."""

import json

from search_r1.report import summary, table, write_report
from tests.search_r1.evaluation.records import passage, record


def one(em, found, gold):
    return record("q", [("x", [passage(i) for i in found])], em=em, gold=gold)


def test_policy_and_reading_are_told_apart():
    records = [one(1.0, "1", "1"), one(0.0, "12", "2"), one(0.0, "3", "1"), one(1.0, "", "1")]
    assert summary(records) == {
        "EM": 0.5,
        "searches": 1.0,
        "answered": 1.0,
        "gold retrieved": 0.5,
        "EM if gold retrieved": 0.5,
    }
    assert summary(records[2:])["EM if gold retrieved"] is None


def test_without_known_passages_there_is_a_dash():
    assert "| set | 1 | 1.000 | 0.00 | 1.000 | - | - |" in table([record("q", [], em=1.0, gold=())])


def test_report_of_a_run_that_only_validated(tmp_path):
    (tmp_path / "trajectories").mkdir()
    (tmp_path / "trajectories" / "val_000000.jsonl").write_text(
        json.dumps(one(1.0, "1", "1")) + "\n"
    )
    (tmp_path / "metrics.jsonl").write_text(
        json.dumps({"training/global_step": 0, "val/test_score/all": 1.0}) + "\n"
    )
    assert "step 0" in write_report(tmp_path)
    assert (tmp_path / "curves.png").stat().st_size > 0
