"""Scores, comparisons and behaviour, by hand and against independent computations."""

import json
import random

import pytest
from scipy import stats

from search_r1.evaluate import given_overrides
from search_r1.evaluation import behaviour, report, scores, summary, table
from search_r1.evaluation.behaviour import near_duplicates, read_history, search_counts
from search_r1.launch import composed
from tests.retrieval import write_lines
from tests.search_r1.evaluation.records import passage, record
from verl.utils.errors import DataError


@pytest.mark.parametrize("by_title", [False, True])
def test_a_history_by_hand(by_title):
    searches = [
        ("where is A", [passage("1"), passage("9")]),
        ("Where is A?", [passage("1"), passage("8", "The city of ROME.")]),
        ("B", [passage("2")]),
        ("B again", [passage("2")]),
    ]
    history = read_history(record("q", searches, em=1.0, by_title=by_title))
    assert [s.new for s in history.searches] == [["1", "9"], ["8"], ["2"], []]
    assert [len(s.gold_seen) for s in history.searches] == [1, 1, 2, 2] and history.complete_at == 3
    assert [s.has_answer for s in history.searches] == [False, True, True, True]
    assert (
        behaviour.duplicates(history) == 1
        and near_duplicates(history) == 1
        and behaviour.superfluous(history) == 1
    )


def test_nearly_the_same_query():
    def of(*queries):
        return read_history(record("q", [(query, []) for query in queries]))

    assert (
        near_duplicates(
            of("capital of the old country France", "old capital of country France now")
        )
        == 1
    )
    assert (
        near_duplicates(of("capital of France", "capital of Spain")) == 0
        and near_duplicates(of("", "")) == 1
    )


def test_a_query_drifts_if_it_names_nothing_that_was_asked_or_found():
    searches = [
        ("mayor of Lund in 1990", [passage("1", "The mayor was Ada Berg.")]),
        ("birthplace of Berg", []),
        ("How old is Paris", []),
        ("the mayor of", []),
        ("population growth", []),
        ("", []),
    ]
    history = read_history(record("Where was the mayor of Lund born?", searches))
    assert [step.drifts for step in history.searches] == [False, False, True, False, True, True]
    asked = record("", [("capital of Peru", [])]) | {"prompt": "What is the capital of Peru?"}
    assert not read_history(asked).searches[0].drifts


def test_behaviour_by_hand():
    records = [
        record("a", [("x", [passage("1")]), ("y", [passage("2")])], em=1.0),
        record("b", [("x", [passage("1")])], em=0.0),
        record("c", [], em=0.0, stop="max_turns"),
        record("d", [("x", [passage("7")]), ("x", [passage("7")])], em=0.0, gold=()),
    ]
    histories = [read_history(r) for r in records]
    found = behaviour.behaviour(histories)
    expected = {
        "searches": 5 / 4,
        "no_search": 1 / 4,
        "answered": 3 / 4,
        "valid_actions": (1 + 1 + 0 + 1) / 4,
        "duplicate_queries": 1 / 5,
        "near_duplicate_queries": 1 / 5,
        "query_drift": 4 / 5,
        "new_passages": 4 / 5,
        "own_tokens": (5 + 3 + 1 + 5) / 4,
        "retrieved_tokens": (10 + 5 + 0 + 10) / 4,
        "answer_in_information": 0.0,
        "stop/answer": 3 / 4,
        "stop/max_turns": 1 / 4,
        "gold_retrieved": 1 / 3,
        "gold_recall": (1 + 0.5 + 0) / 3,
        "right_if_gold_retrieved": 1.0,
        "premature_answers": 1 / 3,
        "searches_after_gold": 0.0,
        "search_latency_s/p50": 0.5,
        "search_latency_s/p95": 0.5,
        "gold_recall/turn_1": 0.5,
        "gold_recall/turn_2": 1.0,
    }
    assert found == pytest.approx(expected)
    assert search_counts(histories) == {0: 1, 1: 1, 2: 2}


def test_over_and_under_search():
    records = [
        record("known, searched", [("x", [])]),
        record("known, not searched", [], em=1.0),
        record("unknown, guessed wrong", []),
        record("unknown, searched", [("x", [])], em=1.0),
    ]
    closed = {f"set: {r['extra_info']['question']}": float(i < 2) for i, r in enumerate(records)}
    found = behaviour.over_and_under_search([read_history(r) for r in records], closed)
    assert found == {"known": 0.5, "over_search": 0.5, "under_search": 0.5}


def test_bootstrap_interval_covers_as_it_says():
    rng = random.Random(0)
    hits = 0
    for trial in range(100):
        values = [float(rng.random() < 0.3) for _ in range(200)]
        low, high = scores.bootstrap_interval(values, seed=trial)
        hits += low <= 0.3 <= high
    assert 88 <= hits <= 100
    assert scores.bootstrap_interval([1.0, 1.0]) == (1.0, 1.0)


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (3, 1), (10, 2), (40, 8), (7, 7), (0, 6)])
def test_mcnemar_is_the_exact_binomial_test(gained, lost):
    expected = stats.binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    assert scores.mcnemar(gained, lost) == pytest.approx(expected)


def test_paired_comparison():
    a = {str(i): float(i < 50) for i in range(100)}
    b = {str(i): float(i < 60 and i != 3) for i in range(100)}
    found = scores.compare(a, b)
    assert found.difference == pytest.approx(0.09) and found.interval[0] < 0.09 < found.interval[1]
    assert (
        found.lost == ["3"]
        and len(found.gained) == 10
        and found.p_value == pytest.approx(scores.mcnemar(10, 1))
    )
    with pytest.raises(ValueError, match="1 are only in the first"):
        scores.compare(a, {k: v for k, v in b.items() if k != "7"})


def test_report_of_two_results(tmp_path, capsys):
    first = [record(q, [], em=0.0, source=s) for s in "AB" for q in ("x", "y")]
    second = [
        record(q, [("x", [passage("1"), passage("2")])], em=float(s == "A"), source=s)
        for s in "AB"
        for q in ("x", "y")
    ]
    paths = [write_lines(tmp_path / f"{i}.jsonl", rows) for i, rows in enumerate((first, second))]
    out = tmp_path / "out"
    flags = [
        str(paths[1]),
        str(paths[0]),
        "--closed-book",
        str(paths[0]),
        "--out",
        str(out),
    ]
    assert report.main(flags) == 0
    text = capsys.readouterr().out
    assert "| A | 2 | 1.000 | 1.000-1.000 |" in text and "| average |  | 0.500 |" in text
    assert "EM +0.500" in text and "2 gained, 0 lost" in text
    found = json.loads((out / "summary.json").read_text())
    assert found["all"]["behaviour"]["under_search"] == 0 and found["comparison"]["gained"] == [
        "A: x",
        "A: y",
    ]
    assert text.startswith((out / "table.md").read_text()) and "page.html" in text
    assert (out / "page.html").read_text().startswith("<!DOCTYPE html>")


def test_several_samples_of_a_question_count_once():
    rows = [record("x", [], em=1.0), record("x", [], em=0.0), record("y", [], em=0.0)]
    found = report.summarize(rows)["all"]
    assert found["questions"] == 2 and found["samples"] == 3 and found["em"] == 0.25
    assert "pass@k" not in found, "one question has a single sample"


def test_pass_at_k_by_hand():
    """x: 1 of 3 right, y: 3 of 3, z: 0 of 3. pass@2 of x: 1 - C(2,2)/C(3,2) = 2/3."""
    rows = [
        record(q, [], em=em)
        for q, ems in {"x": (1.0, 0.0, 0.0), "y": (1.0,) * 3, "z": (0.0,) * 3}.items()
        for em in ems
    ]
    found = summary.summarize(rows)["all"]["pass@k"]
    assert found == pytest.approx({"1": (1 / 3 + 1) / 3, "2": (2 / 3 + 1) / 3, "3": 2 / 3})
    assert "pass@3 0.667" in report.table(summary.summarize(rows))


def test_sets_of_mixed_hops_are_split():
    rows = [record(str(i), [], em=float(i % 2)) for i in range(4)]
    for i, row in enumerate(rows):
        row["extra_info"]["hops"] = 2 + i % 2
    found = summary.summarize(rows)["set"]["by_hops"]
    assert {hops: figures["em"] for hops, figures in found.items()} == {"2": 0.0, "3": 1.0}
    assert "| set, 3-hop | 2 | 1.000 |" in report.table(summary.summarize(rows))


def test_the_papers_table_has_published_rows_beside_ours(tmp_path, capsys):
    sets = ["nq", "triviaqa", "popqa", "hotpotqa", "2wikimultihopqa", "musique", "bamboogle"]
    whole = summary.summarize([record(s, [], em=1.0, source=s) for s in sets])
    part = summary.summarize(
        [record("x", [], em=1.0, source="nq"), record("y", [], em=0.0, source="own")]
    )
    for name, found in {"whole": whole, "part": part}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "summary.json").write_text(json.dumps(found))
    runs = [f"mine={tmp_path}/whole", str(tmp_path / "part")]
    assert table.main([*runs, "--published", "Qwen2.5-7B", "--out", str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    head, _, mine, other, *published = text.splitlines()
    assert head == (
        "| method | NQ | TriviaQA | PopQA | HotpotQA | 2Wiki | MuSiQue | Bamboogle | own | "
        "average |"
    )
    assert mine.startswith("| **mine** | 1.000 (1.000-1.000) |") and mine.endswith("| - | - |"), (
        "it lacks own"
    )
    assert other.startswith("| **part** | 1.000 (1.000-1.000) | - |") and other.endswith(
        "0.000 (0.000-0.000) | - |"
    )
    assert all("Qwen2.5-7B, " in line for line in published)
    assert any("Search-R1-base (PPO)" in line and "| 0.480 | 0.638 |" in line for line in published)
    assert (tmp_path / "out" / "table.md").read_text() == text
    assert "published" not in table.paper_table({"closed": summary.summarize([record("x", [])])})
    with pytest.raises(SystemExit, match="--published GPT: there are Llama"):
        table.main([runs[0], "--published", "GPT"])
    with pytest.raises(SystemExit, match=r"summary\.json: no such file"):
        table.main([str(tmp_path)])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{broken", "line 1: not a traj"),
        ('{"reward": {}}', "lacks data_source"),
        ("", "no records"),
    ],
)
def test_bad_files_are_named(tmp_path, text, message):
    path = tmp_path / "r.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        report.read_records(path)
    with pytest.raises(SystemExit, match="error: "):
        report.main([str(path)])


def test_an_evaluation_asks_everything_although_the_recipe_validates_on_a_sample():
    def sample(*overrides):
        config, _ = composed("grpo", ["experiment=nq_hotpotqa/grpo", *overrides])
        return config.data.val_sample_per_source

    given = given_overrides("Qwen/Qwen2.5-3B", None)
    assert sample() == 500
    assert sample(*given) is None
    assert sample(*given, "data.val_sample_per_source=7") == 7
