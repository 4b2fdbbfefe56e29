"""Question files: what is wrong is named with file and row; a fixed sample is the same whatever
stands beside it."""

from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.models import make_tokenizer
from tests.templates import make_family_tokenizer
from tests.verl.questions import row
from verl.trainer.preparation import load_dataset
from verl.utils.answers import answers_of
from verl.utils.dataset import (
    RLHFDataset,
    read_questions,
    read_row,
    sample_per_source,
    sample_spread,
)
from verl.utils.errors import DataError


def dataset(folder, rows, limit=50):
    pq.write_table(pa.Table.from_pylist(rows), folder / "q.parquet")
    return RLHFDataset([str(folder / "q.parquet")], make_tokenizer(folder), limit)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (row(target=()), "row 1: reward_model.ground_truth holds no answer"),
        (row(target=(" ",)), "row 1: reward_model.ground_truth holds no answer"),
        (row(text=" "), "row 1: prompt is empty"),
        (
            row(text="word " * 60),
            r"row 1: the prompt has \d+ tokens, more than data.max_start_length=50",
        ),
    ],
)
def test_bad_rows_are_named(tmp_path, bad, message):
    with pytest.raises(DataError, match=message):
        dataset(tmp_path, [row(), bad])


def test_a_prompt_that_the_chat_template_refuses_is_named(tmp_path):
    refused = row()
    refused["prompt"].insert(0, {"role": "system", "content": "Be brief."})
    pq.write_table(pa.Table.from_pylist([row(), refused]), tmp_path / "q.parquet")
    with pytest.raises(
        DataError,
        match=r"q.parquet, row 1: prompt: .*roles system, user \(System role not supported\)",
    ):
        RLHFDataset(
            [str(tmp_path / "q.parquet")], make_family_tokenizer(tmp_path, "gemma-instruct"), 50
        )


def with_truth(truth):
    return {**row(), "reward_model": {"style": "rule", "ground_truth": truth}}


@pytest.mark.parametrize(
    ("truth", "read"),
    [
        ("A", "A"),
        (1947, "1947"),
        (3.0, "3"),
        (3.5, "3.5"),
        (True, "True"),
        (["A", None, " ", 7], ["A", "7"]),
        ({"target": 1947}, {"target": "1947"}),
        ({"target": [1, 2], "note": "kept"}, {"target": ["1", "2"], "note": "kept"}),
        ({"target": np.array(["A", "B"])}, {"target": ["A", "B"]}),
        ({"target": [np.float64("nan"), np.int64(3)]}, {"target": ["3"]}),
    ],
)
def test_answers_are_read_as_texts(truth, read):
    assert read_row(with_truth(truth))["reward_model"] == {"style": "rule", "ground_truth": read}


def test_a_text_as_prompt_is_one_message_of_the_user():
    message = {"role": "user", "content": "Who?"}
    for prompt in ("Who?", [message], np.array([message])):
        assert read_row({**row(), "prompt": prompt})["prompt"] == [message]


SQUAD = {"text": ["A"], "answer_start": [3]}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (
            with_truth(SQUAD),
            r"reward_model\.ground_truth: expected a text, .*got a dict \(keys: text, "
            r"answer_start\)",
        ),
        (
            with_truth({"target": SQUAD}),
            r"reward_model\.ground_truth\.target: expected .*got a dict \(keys: text",
        ),
        (
            with_truth({"target": [["A"]]}),
            r"reward_model\.ground_truth\.target: expected .*got a list that holds str",
        ),
        (with_truth({"target": None}), r"reward_model\.ground_truth holds no answer"),
        (with_truth(None), r"reward_model\.ground_truth holds no answer"),
        (
            {**row(), "reward_model": "A"},
            "reward_model: expected an object with ground_truth, got str '",
        ),
        ({**row(), "reward_model": None}, r"reward_model\.ground_truth holds no answer"),
        ({**row(), "prompt": 3}, "prompt: expected a text, or a list of messages .*got int"),
        (
            {**row(), "prompt": ["Who?"]},
            "prompt: expected a text, or a list of messages .*got a list that holds str",
        ),
        (
            {**row(), "prompt": [{"content": "Who?"}]},
            r"prompt\[0\]\.role: expected a text, got None",
        ),
        (
            {**row(), "prompt": [{"role": "user", "content": [{"type": "text"}]}]},
            r"prompt\[0\]\.content: expected a text, got a list that holds a dict",
        ),
        ({**row(), "prompt": ""}, "prompt is empty"),
        ({**row(), "prompt": None}, "prompt is empty"),
        ({**row(), "data_source": None}, "data_source: expected a text, got None"),
        ({**row(), "data_source": 7}, "data_source: expected a text, got int"),
        ({**row(), "extra_info": "x"}, "extra_info: expected an object, got str '"),
    ],
)
def test_what_cannot_be_read_is_named_by_file_row_and_key(tmp_path, bad, message):
    with pytest.raises(DataError, match=rf"q\.parquet, row 0: {message}"):
        dataset(tmp_path, [bad])


def test_answers_that_are_nested_are_refused_wherever_they_are_read():
    with pytest.raises(ValueError, match="got a dict"):
        answers_of(SQUAD)
    assert answers_of(None) == [] and answers_of(np.array(["a"])) == ["a"]


def test_bad_files_are_named(tmp_path):
    tokenizer = make_tokenizer(tmp_path)
    cases = {
        "none.parquet": "no such file",
        "text.parquet": "not a readable parquet",
        "empty.parquet": "no rows",
        "columns.parquet": r"missing column\(s\) \['reward_model'\]",
    }
    (tmp_path / "text.parquet").write_text("hello")
    pq.write_table(pa.Table.from_pylist([row()]).slice(0, 0), tmp_path / "empty.parquet")
    pq.write_table(
        pa.Table.from_pylist([{"data_source": "x", "prompt": []}]), tmp_path / "columns.parquet"
    )
    for name, message in cases.items():
        with pytest.raises(DataError, match=f"{name}: {message}"):
            RLHFDataset([str(tmp_path / name)], tokenizer, 50)


def test_missing_files_name_the_command_that_makes_them(tmp_path):
    data = SimpleNamespace(
        made_by="python make.py", max_start_length=50, apply_chat_template_kwargs={}
    )
    model = SimpleNamespace(reads_images=False)
    config = SimpleNamespace(data=data, actor_rollout_ref=SimpleNamespace(model=model))
    path = str(tmp_path / "train.parquet")
    with pytest.raises(
        DataError,
        match=(
            r"train.parquet: no such file. The files of this configuration are made by: python "
            r"make.py"
        ),
    ):
        load_dataset(config, None, [path], None, 0)
    data.made_by = None
    with pytest.raises(DataError, match=r"train.parquet: no such file$"):
        load_dataset(config, None, [path], None, 0)


def test_a_sample_is_fixed_by_its_seed_and_does_not_depend_on_other_sets(tmp_path):
    rows = [row("a" if i % 3 else "b", f"Who is {i}?") for i in range(300)]
    chosen = sample_per_source(rows, 40, seed=1)
    assert (
        chosen
        == sorted(set(chosen))
        == sample_per_source(rows, 40, seed=1)
        != sample_per_source(rows, 40, seed=2)
    )
    assert [sum(rows[i]["data_source"] == s for i in chosen) for s in "ab"] == [40, 40]
    alone = [r for r in rows if r["data_source"] == "b"]
    assert [alone[i] for i in sample_per_source(alone, 40, seed=1)] == [
        r for i in chosen if (r := rows[i]) in alone
    ]
    assert sample_per_source(rows, 1000, seed=0) == list(range(300))
    found = dataset(tmp_path, rows)
    found.keep(chosen)
    assert len(found) == 80 and found.rows[0] == rows[chosen[0]]


def test_a_sample_is_spread_over_the_sources_in_their_shares_and_part_of_every_larger_one(tmp_path):
    sizes = {"nq": 60, "hotpotqa": 30, "rare": 2}
    rows = [row(source, f"Who is {i}?") for source, size in sizes.items() for i in range(size)]
    chosen = sample_spread(rows, 46, seed=1)
    assert (
        chosen
        == sorted(set(chosen))
        == sample_spread(rows, 46, seed=1)
        != sample_spread(rows, 46, seed=2)
    )
    counts = {source: sum(rows[i]["data_source"] == source for i in chosen) for source in sizes}
    assert counts == {"nq": 30, "hotpotqa": 15, "rare": 1}
    assert len({rows[i]["data_source"] for i in sample_spread(rows, 3, seed=1)}) == 3
    assert set(sample_spread(rows, 20, seed=1)) < set(chosen)
    assert sample_spread(rows, 1000, seed=1) == list(range(92))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "q.parquet")
    data = RLHFDataset(
        [str(tmp_path / "q.parquet")], make_tokenizer(tmp_path), 50, max_samples=46, sample_seed=1
    )
    assert data.rows == [rows[i] for i in chosen] and len(data.prompt_ids) == 46
    places, sampled = read_questions([str(tmp_path / "q.parquet")], 46, 1)
    assert sampled == data.rows and places[0].endswith(f"row {chosen[0]}")
