"""Rows and table of the study of real words, and the comparison with the original."""

import json
import sys
from types import SimpleNamespace

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from search_r1.evaluation.summary import summarize
from tests.e2e.runs import ROOT
from tests.search_r1.evaluation.records import passage, record
from verl.trainer.config import validate

sys.path.insert(0, str(ROOT / "scripts" / "bench"))
import beside_original
import real_words


def overrides_of(command):
    """The overrides of a command of the study, its method last, as Hydra wants groups."""
    return [part for part in command if "=" in part]


@pytest.mark.parametrize("run", real_words.RUNS)
def test_every_command_composes(run):
    for command in real_words.RUNS[run]:
        with initialize_config_dir(str(ROOT / "configs"), version_base=None):
            composed = compose("grpo", overrides_of(command))
        config = validate(OmegaConf.to_container(composed, resolve=True))
        if overrides_of(command):
            assert config.trainer.default_local_dir.startswith(real_words.WORK)
            assert len(config.data.val_files) == len(real_words.SETS)


def row_of(run, right, tmp_path, monkeypatch):
    """The row of an evaluation in which `right` of four questions of each set were answered."""
    folder = tmp_path / f"evaluate-{run}"
    folder.mkdir()
    records = []
    for place in range(4):
        for source in real_words.SETS:
            gold = record(f"{source} {place}", [("x", [passage("1")])], em=float(place < right))
            records.append(gold | {"data_source": source})
    (folder / "evaluation.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (folder / "summary.json").write_text(json.dumps(summarize(records)))
    monkeypatch.setattr(
        real_words, "evaluation_of", lambda name: str(tmp_path / f"evaluate-{name}")
    )
    return {"run": run, **real_words.figures(run)}


def test_rows_are_compared_question_by_question(tmp_path, monkeypatch):
    rows = [row_of("cold", 1, tmp_path, monkeypatch), row_of("grpo", 3, tmp_path, monkeypatch)]
    assert rows[0]["scores"]["nq"]["em"] == [1.0, 0.0, 0.0, 0.0]
    assert len(rows[0]["shown"]["nq"]) == 3 and "training" not in rows[0]
    lines = real_words.table(rows).splitlines()
    cold, grpo = lines[4], lines[7]
    assert cold.startswith("| cold | both | 0.250 (") and cold.endswith("|  |")
    assert "| grpo | both | 0.750 (" in grpo and "+0.500 (" in grpo
    assert grpo.endswith("p = 0.125 |")  # four questions of eight changed, all for the better


def test_players_take_turns_and_the_first_round_is_not_counted():
    order = []

    def player(name):
        return lambda: order.append(name) or len(order)

    played = beside_original.in_turn(2, {"a": player("a"), "b": player("b")})
    assert order == ["a", "b"] * 3 and played == {"a": [3, 5], "b": [4, 6]}


def test_the_original_gets_the_limits_of_ours():
    with initialize_config_dir(str(ROOT / "configs"), version_base=None):
        config = validate(OmegaConf.to_container(compose("grpo"), resolve=True))
    questions = SimpleNamespace(prompt_ids=[[1, 2], [3]])
    given = beside_original.given_to_theirs(config, questions, "http://x/retrieve")
    assert given["prompts"] == [[1, 2]] * 5 + [[3]] * 5
    assert given["loop"]["max_response_length"] == config.data.max_response_length
    assert given["loop"]["max_turns"] == config.agent["max_turns"]
    assert given["loop"]["topk"] == 3 and given["loop"]["search_url"] == "http://x/retrieve"
    assert given["engine"]["max_model_len"] == config.data.max_prompt_length


def test_the_share_of_right_answers_counts_the_last_answer():
    texts = ["<answer> Peru </answer>", "no answer"] * 5
    played = beside_original.Played(1.0, texts, 0, 0)
    assert beside_original.right(played, [["Peru"], ["Chile"]]) == pytest.approx(0.3)
