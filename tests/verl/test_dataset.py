"""Question files: what is wrong is named with file and row; a fixed sample is the same whatever stands beside it."""

from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.models import make_tokenizer
from tests.templates import make_family_tokenizer
from verl.trainer.main_ppo import load_dataset
from verl.utils.dataset import RLHFDataset, sample_per_source
from verl.utils.errors import DataError


def row(source="set", text="Who?", target=("A",)):
    return {
        "data_source": source, "prompt": [{"role": "user", "content": text}],
        "reward_model": {"ground_truth": {"target": list(target)}},
    }  # fmt: skip


def dataset(folder, rows, limit=50):
    pq.write_table(pa.Table.from_pylist(rows), folder / "q.parquet")
    return RLHFDataset([str(folder / "q.parquet")], make_tokenizer(folder), limit)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (row(target=()), "row 1: reward_model.ground_truth holds no answer"),
        (row(target=(" ",)), "row 1: reward_model.ground_truth holds no answer"),
        (row(text=" "), "row 1: prompt is empty"),
        (row(text="word " * 60), r"row 1: the prompt has \d+ tokens, more than data.max_start_length=50"),
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
        DataError, match=r"q.parquet, row 1: prompt: .*roles system, user \(System role not supported\)"
    ):
        RLHFDataset([str(tmp_path / "q.parquet")], make_family_tokenizer(tmp_path, "gemma-instruct"), 50)


def test_bad_files_are_named(tmp_path):
    tokenizer = make_tokenizer(tmp_path)
    cases = {"none.parquet": "no such file", "text.parquet": "not a readable parquet", "empty.parquet": "no rows",
             "columns.parquet": r"missing column\(s\) \['reward_model'\]"}  # fmt: skip
    (tmp_path / "text.parquet").write_text("hello")
    pq.write_table(pa.Table.from_pylist([row()]).slice(0, 0), tmp_path / "empty.parquet")
    pq.write_table(pa.Table.from_pylist([{"data_source": "x", "prompt": []}]), tmp_path / "columns.parquet")
    for name, message in cases.items():
        with pytest.raises(DataError, match=f"{name}: {message}"):
            RLHFDataset([str(tmp_path / name)], tokenizer, 50)


def test_missing_files_name_the_command_that_makes_them(tmp_path):
    data = SimpleNamespace(made_by="python make.py", max_start_length=50, apply_chat_template_kwargs={})
    path = str(tmp_path / "train.parquet")
    with pytest.raises(
        DataError, match=r"train.parquet: no such file. The files of this configuration are made by: python make.py"
    ):
        load_dataset(SimpleNamespace(data=data), None, [path], None)
    data.made_by = None
    with pytest.raises(DataError, match=r"train.parquet: no such file$"):
        load_dataset(SimpleNamespace(data=data), None, [path], None)


def test_a_sample_is_fixed_by_its_seed_and_does_not_depend_on_other_sets(tmp_path):
    rows = [row("a" if i % 3 else "b", f"Who is {i}?") for i in range(300)]
    chosen = sample_per_source(rows, 40, seed=1)
    assert chosen == sorted(set(chosen)) == sample_per_source(rows, 40, seed=1) != sample_per_source(rows, 40, seed=2)
    assert [sum(rows[i]["data_source"] == s for i in chosen) for s in "ab"] == [40, 40]
    alone = [r for r in rows if r["data_source"] == "b"]
    assert [alone[i] for i in sample_per_source(alone, 40, seed=1)] == [r for i in chosen if (r := rows[i]) in alone]
    assert sample_per_source(rows, 1000, seed=0) == list(range(300))
    found = dataset(tmp_path, rows)
    found.keep(chosen)
    assert len(found) == 80 and found.rows[0] == rows[chosen[0]]
