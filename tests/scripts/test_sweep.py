"""Every run of the sweep of algorithms composes and validates, and becomes a row of a table."""

import json
import sys

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from search_r1.launch import read_setup
from search_r1.prompts import SHORT_CONDENSE_PROMPT
from search_r1.search.retrieval_server import parse_arguments
from tests.e2e.runs import ROOT
from tests.search_r1.evaluation.records import passage, record
from verl.trainer.compose import as_plain
from verl.trainer.config import build_agent, build_reward, validate
from verl.trainer.driver import check_trainable

sys.path.insert(0, str(ROOT / "scripts" / "bench"))
import arms
import frontier
import sweep

ALGORITHMS = ROOT / "scripts" / "sweeps" / "algorithms.yaml"
MASKING = ROOT / "scripts" / "sweeps" / "masking.yaml"
ASYNCHRONY = ROOT / "scripts" / "sweeps" / "asynchrony.yaml"
OVER_SEARCH = ROOT / "scripts" / "sweeps" / "over_search.yaml"
FOLDING = ROOT / "scripts" / "sweeps" / "folding.yaml"
CONDENSING = ROOT / "scripts" / "sweeps" / "condensing.yaml"
CREDIT = ROOT / "scripts" / "sweeps" / "credit.yaml"
DISTILLATION = ROOT / "scripts" / "sweeps" / "distillation.yaml"
COLLAPSE = ROOT / "scripts" / "sweeps" / "collapse.yaml"
CLAIMS = sorted((ROOT / "scripts" / "sweeps").glob("claims_*.yaml"))


@pytest.mark.parametrize("run", sweep.read_sweep(ALGORITHMS))
def test_runs_take_equal_samples_and_optimizer_steps(run):
    (_, script, *overrides), _ = sweep.read_sweep(ALGORITHMS)[run]
    with initialize_config_dir(str(ROOT / "configs"), version_base=None):
        name = script.removeprefix("train_").removesuffix(".sh")
        config = validate(OmegaConf.to_container(compose(name, overrides), resolve=True))
    assert (
        config.data.train_batch_size * config.actor_rollout_ref.rollout.n == 240
        and config.num_mini_batches["mini_batch"] == 1
    )
    assert config.trainer.default_local_dir == f"runs/algorithms/{run}"


@pytest.mark.parametrize(
    ("path", "run"),
    [(path, run) for path in CLAIMS for run in sweep.read_sweep(path) if run.endswith("-seed0")],
    ids=lambda value: value if isinstance(value, str) else value.stem,
)
def test_runs_of_the_claims_take_equal_samples_and_optimizer_steps(path, run, tokenizer):
    (_, script, *overrides), _ = sweep.read_sweep(path)[run]
    with initialize_config_dir(str(ROOT / "configs"), version_base=None):
        composed = compose(script.removeprefix("train_").removesuffix(".sh"), overrides)
    config = validate(OmegaConf.to_container(composed, resolve=True))
    check_trainable(config, build_agent(config, tokenizer), build_reward(config, tokenizer))
    trajectories = config.data.train_batch_size * config.actor_rollout_ref.rollout.n
    assert trajectories == 240 and config.num_mini_batches["mini_batch"] == 1
    assert config.trainer.total_training_steps == 15
    flags = read_setup(as_plain(composed)).server_flags
    parse_arguments(["--index_path", "i", "--corpus_path", "c", *flags])


@pytest.mark.parametrize(
    ("path", "run"),
    [(path, run) for path in (ASYNCHRONY, COLLAPSE) for run in sweep.read_sweep(path)],
)
def test_runs_of_other_sweeps_compose(path, run):
    (_, script, *overrides), status = sweep.read_sweep(path)[run]
    with initialize_config_dir(str(ROOT / "configs"), version_base=None):
        composed = compose(script.removeprefix("train_").removesuffix(".sh"), overrides)
    config = validate(OmegaConf.to_container(composed, resolve=True))
    assert status == int(config.trainer.collapse_watch.response == "stop")
    assert bool(read_setup(as_plain(composed)).server_flags) == (path == ASYNCHRONY)


@pytest.mark.parametrize("masked", [True, False])
def test_masked_and_unmasked_runs_read_the_same_world(masked):
    (_, _, *overrides), _ = sweep.read_sweep(MASKING)[
        "masked-seed0" if masked else "unmasked-seed0"
    ]
    with initialize_config_dir(str(ROOT / "configs"), version_base=None):
        composed = compose("grpo", overrides)
    config = validate(OmegaConf.to_container(composed, resolve=True)).actor_rollout_ref
    assert (
        config.actor.state_masking is masked
        and read_setup(as_plain(composed)).world_options.filler == 2
    )


@pytest.mark.parametrize("run", sweep.read_sweep(OVER_SEARCH))
def test_runs_against_over_search_differ_in_what_they_are_named_after(run, tokenizer):
    (_, _, *overrides), _ = sweep.read_sweep(OVER_SEARCH)[run]
    with initialize_config_dir(str(ROOT / "configs"), version_base=None):
        config = validate(OmegaConf.to_container(compose("grpo", overrides), resolve=True))
    agent, reward = build_agent(config, tokenizer), build_reward(config, tokenizer)
    check_trainable(config, agent, reward)
    assert len(config.data.val_files) == 3 and config.trainer.total_training_steps == 45
    own = {
        "grpo": reward.config.em == 1,
        "otc": reward.config.otc_grpo == 1 and reward.config.em == 0,
        "ikea": reward.config.ikea == 1 and reward.config.em == 0,
        "call_price": reward.config.call_price == {"search": 0.1},
        "call_price_always": reward.config.price_when == "always",
        "show_remaining": agent.config.show_remaining,
        "turn_schedule": agent.config.max_turns_schedule == [(1, 1), (30, 4)],
    }
    assert own[run.rpartition("-seed")[0]]


@pytest.mark.parametrize("run", sweep.read_sweep(FOLDING))
def test_runs_of_the_study_of_folding_differ_in_their_contexts_alone(run, tokenizer):
    (_, _, *overrides), _ = sweep.read_sweep(FOLDING)[run]
    with initialize_config_dir(str(ROOT / "configs"), version_base=None):
        composed = compose("grpo", overrides)
    config = validate(OmegaConf.to_container(composed, resolve=True))
    agent, reward = build_agent(config, tokenizer), build_reward(config, tokenizer)
    check_trainable(config, agent, reward)
    assert read_setup(as_plain(composed)).world_options.deep
    name = run.rpartition("-seed")[0]
    context = agent.config.context
    assert (context.fold_at is not None) == name.startswith("fold")
    assert context.train_summaries == (name != "fold_untrained")
    assert context.keep_observations == (1 if name == "keep_last" else None)
    assert agent.config.max_prompt_length == (1536 if name == "no_fold_1536" else 512)


@pytest.mark.parametrize("run", sweep.read_sweep(CONDENSING))
def test_runs_of_the_study_of_findings_differ_in_who_condenses(run, tokenizer):
    (_, _, *overrides), _ = sweep.read_sweep(CONDENSING)[run]
    with initialize_config_dir(str(ROOT / "configs"), version_base=None):
        composed = compose("grpo", overrides)
    config = validate(OmegaConf.to_container(composed, resolve=True))
    agent, reward = build_agent(config, tokenizer), build_reward(config, tokenizer)
    check_trainable(config, agent, reward)
    name = run.rpartition("-seed")[0]
    condense = agent.config.condense
    assert condense.by == {"cut": None, "endpoint": "endpoint"}.get(name, "policy")
    assert condense.prompt == (None if name == "cut" else SHORT_CONDENSE_PROMPT)
    assert condense.train == (name != "policy_untrained")
    assert agent.config.max_obs_length == 64


@pytest.mark.parametrize(
    ("sweep_file", "run"),
    [(file, run) for file in (CREDIT, DISTILLATION) for run in sweep.read_sweep(file)],
)
def test_runs_of_the_studies_of_credit_and_of_a_teacher_are_trainable(sweep_file, run, tokenizer):
    (_, _, *overrides), _ = sweep.read_sweep(sweep_file)[run]
    with initialize_config_dir(str(ROOT / "configs"), version_base=None):
        config = validate(OmegaConf.to_container(compose("grpo", overrides), resolve=True))
    agent, reward = build_agent(config, tokenizer), build_reward(config, tokenizer)
    check_trainable(config, agent, reward)
    assert len(config.data.val_files) == 2
    assert len(config.data.train_files) == (1 if "one_two" in run else 2)
    assert config.use_teacher == run.startswith("teacher")
    assert (reward.config.new_evidence > 0) == run.startswith("turns")


def test_arms_are_compared_seed_by_seed(tmp_path, monkeypatch, capsys):
    ends = {
        "base-seed0": 0.5,
        "base-seed1": 0.3,
        "arm-seed0": 0.7,
        "arm-seed1": 0.6,
        "one-seed0": 1,
    }
    rows = [{"run": run, "em": {"1hop": [[0, 0.1], [240, em]]}} for run, em in ends.items()]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(sys, "argv", ["arms.py", str(file), "--base", "base"])
    arms.main()
    out = capsys.readouterr().out
    assert "| `base` | 2 | 240 | 0.400 | 0.400 |" in out
    assert "| `one` | 1 | 240 | 1.000 | 1.000 |" in out
    reach = 12.706 * 0.05
    expected = f"+0.250 [{0.25 - reach:+.2f}, {0.25 + reach:+.2f}]"
    assert out.endswith(f"| `arm` | 240 | {expected} | {expected} |\n")
    monkeypatch.setattr(sys, "argv", ["arms.py", str(file), "--base", "none"])
    with pytest.raises(SystemExit):
        arms.main()
    assert "--base none:" in capsys.readouterr().err


def row_of(run, em, searches, searched):
    last = {"closed_world_1hop": em[0], "closed_world_common": em[1]}
    return {
        "run": run,
        "last": {name: {"EM": em, "searches": searches} for name, em in last.items()},
        "searched": dict.fromkeys(last, searched),
    }


def test_rows_become_a_frontier(tmp_path, monkeypatch, capsys):
    rows = [
        row_of("grpo-seed0", (0.9, 1.0), 1.0, 1.0),
        row_of("grpo-seed1", (0.7, 1.0), 1.2, 0.5),
        row_of("call_price-seed0", (0.9, 1.0), 0.5, 0.25),
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(sys, "argv", ["frontier.py", str(file)])
    frontier.main()
    head, _, grpo, price = capsys.readouterr().out.splitlines()
    columns = "method seeds EM-common EM-1hop searches-common searches-1hop over-search"
    assert head == f"| {' | '.join(columns.split()).replace('-c', ' c').replace('-1', ' 1')} |"
    assert grpo == (
        "| grpo | 2 | 1.000 (1.000-1.000) | 0.800 (0.700-0.900) | 1.100 (1.000-1.200) "
        "| 1.100 (1.000-1.200) | 0.750 (0.500-1.000) |"
    )
    assert price == "| call_price | 1 | 1.000 | 0.900 | 0.500 | 0.500 | 0.250 |"
    assert (tmp_path / "rows_frontier.png").stat().st_size > 0


def test_rows_without_the_share_searched_are_named(tmp_path, monkeypatch, capsys):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"run": "grpo-seed0", "last": {}}) + "\n")
    monkeypatch.setattr(sys, "argv", ["frontier.py", str(file)])
    with pytest.raises(SystemExit):
        frontier.main()
    assert "without `searched`, of an earlier version: grpo-seed0" in capsys.readouterr().err


def test_an_unknown_key_is_named(tmp_path):
    (tmp_path / "s.yaml").write_text("runs: {a: {seed: 1}}")
    with pytest.raises(
        SystemExit, match=r"s\.yaml, a: unknown seed; expected config, seeds, overrides, status"
    ):
        sweep.read_sweep(tmp_path / "s.yaml")


def test_a_finished_run_becomes_a_row_a_table_and_a_plot(tmp_path):
    scores = [0.1, 0.85, 0.3, 0.9]
    lines: list[dict] = [
        {
            "training/global_step": i,
            "val/test_score/all": s,
            "val/em/one": s / 2,
            "val/em/two": s / 4,
        }
        for i, s in enumerate(scores)
    ]
    for line in lines[1:]:
        line |= {
            "training/num_trajectories": 240,
            "perf/timer_coverage": 0.9 + line["training/global_step"] / 100,
        }
        line |= {
            "perf/time_per_step": 2.0,
            "training/staleness/share_0": 0.25,
            "training/staleness/share_1": 0.75,
        }
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "trajectories").mkdir()
    last = [
        record("q", [("x", [passage("1")])], em=1.0, gold="1"),
        record("r", [], em=0.0, stop="context"),
    ]
    last[0] |= {"info": {"folds": 1, **last[0]["info"]}, "rewrites": [{"at": 2}, {"at": 3}]}
    (tmp_path / "trajectories" / "val_000003.jsonl").write_text(
        "".join(json.dumps(r) + "\n" for r in last)
    )
    row = {"run": "grpo-seed0", "wall_s": 60, **sweep.figures(tmp_path)}
    assert row["curve"] == [(0, 0.1), (240, 0.85), (480, 0.3), (720, 0.9)]
    assert row["em"]["one"] == [(0, 0.05), (240, 0.425), (480, 0.15), (720, 0.45)]
    assert sweep.curve_of(row)[-1] == (720, pytest.approx((0.45 + 0.225) / 2))
    assert sweep.curve_of({"curve": [[0, 0.5]]}) == [[0, 0.5]]
    assert row["searched"] == {"set": 0.5}
    assert row["ended"] == {"set": {"answer": 0.5, "context": 0.5}}
    assert row["contexts"] == {"set": {"folds": 0.5, "contexts": 2.0}}
    assert row["logprob_diff"] == 0.0
    assert row["timer_coverage"] == 0.92 and row["seconds"] == [2.0] * 3 and row["alarms"] == []
    assert row["staleness"] == {"0": 0.25, "1": 0.75} and row["mismatch"] == {}
    assert (
        row["samples_to_reach"] == 240 and row["collapses"] == 1 and row["last"]["set"]["EM"] == 0.5
    )
    assert "| grpo-seed0 | 0.900 | 0.500 | 0.50 | 240 | 0 | 1 | 1.0 |" in sweep.table([row])
    sweep.plot([row], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 0
