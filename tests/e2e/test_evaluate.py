"""Evaluation by the engines alone: the command, its resumption, its report."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from search_r1.evaluation import report
from search_r1.search.engines import bm25
from search_r1.world.__main__ import main as make_world
from tests.e2e.runs import ROOT, arguments
from tests.processes import PATIENCE_S
from tests.retrieval import retrieval_server
from tests.trained import make_run
from verl.workers.config import ModelConfig

pytestmark = pytest.mark.cpu_engine

BASE = Path(__file__).parents[2] / "data" / "closed_world" / "base"
QUESTIONS = 40
SAMPLES = 2
SEQUENCES = 16
"""What the engine computes at once: far fewer than there are samples, so that most of them wait."""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    sizes = {
        "train-people": 20,
        "test-people": 80,
        "spare-people": 0,
        "train-questions": 20,
        "test-questions": QUESTIONS,
    }
    make_world(["--out", str(folder), *(f"--{key}={value}" for key, value in sizes.items())])
    bm25.build(folder / "corpus.jsonl", folder / "bm25")
    return folder


def evaluate(folder, world, url, **more):
    settings = {
        "data__train_files": world / "train.parquet",
        "data__val_files": world / "test.parquet",
        "retriever__url": url,
        "actor_rollout_ref__rollout__num_agent_workers": 2,
        "actor_rollout_ref__rollout__max_num_seqs": SEQUENCES,
        "actor_rollout_ref__rollout__val_kwargs__n": SAMPLES,
        "actor_rollout_ref__rollout__val_kwargs__temperature": 1,
        **more,
    }
    command = [sys.executable, "-m", "verl.trainer.main_eval", *arguments(folder, BASE, **settings)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=PATIENCE_S
    )


def test_a_model_is_evaluated_and_what_was_cut_off_is_asked_again(tmp_path, world, capsys):
    path = tmp_path / "run" / "evaluation.jsonl"
    with retrieval_server(world) as (url, _):
        done = evaluate(tmp_path, world, url)
        assert done.returncode == 0, done.stderr[-3000:]
        lines = path.read_text().splitlines(keepends=True)
        rows = [json.loads(line)["row"] for line in lines]
        assert sorted(rows) == sorted([*range(QUESTIONS)] * SAMPLES)
        path.write_text("".join(lines[:-3]) + lines[-3][:100])  # one question lost whole, one half
        again = evaluate(tmp_path, world, url)
        assert again.returncode == 0, again.stderr[-3000:]
        other = evaluate(tmp_path, world, url, actor_rollout_ref__rollout__val_kwargs__n=1)
        assert (
            other.returncode == 1
            and "of another evaluation (not the same: sampling)" in other.stderr
        )
    resumed = path.read_text().splitlines(keepends=True)
    assert resumed[: len(lines) - 4] == lines[:-4]
    assert sorted(json.loads(line)["row"] for line in resumed) == sorted(rows)
    records = [json.loads(line) for line in resumed]
    assert any(s["info"].get("passages") for r in records for s in r["segments"])
    assert report.main([str(path), "--out", str(tmp_path)]) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (
        summary["all"]["questions"] == QUESTIONS
        and summary["all"]["samples"] == QUESTIONS * SAMPLES
    )
    assert "closed_world_2hop" in capsys.readouterr().out


def test_an_unreadable_model_is_a_clear_error(tmp_path, world):
    done = evaluate(
        tmp_path,
        world,
        "http://127.0.0.1:9/retrieve",
        actor_rollout_ref__model__path=tmp_path / "none",
    )
    assert (
        done.returncode == 1
        and "actor_rollout_ref.model.path" in done.stderr
        and "Traceback" not in done.stderr
    )


def test_a_checkpoint_is_evaluated_by_its_name(tmp_path, world):
    make_run(tmp_path / "mine", ModelConfig(path=str(BASE)), ranks=1, lr=1e-6)
    out = tmp_path / "evaluated"
    with retrieval_server(world) as (url, _):
        settings = [
            "experiment=closed_world/grpo",
            f"data.train_files={world}/train.parquet",
            f"data.val_files={world}/test.parquet",
            "data.val_data_num=6",
            f"retriever.url={url}",
            f"trainer.default_local_dir={out}",
            "actor_rollout_ref.rollout.cpu_kvcache_gb=0.2",
        ]
        command = [sys.executable, "-m", "search_r1.evaluate", "mine/best", *settings]
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=PATIENCE_S
        )
    assert done.returncode == 0, done.stderr[-3000:]
    identity = json.loads((out / "evaluation.meta.json").read_text())
    assert identity["model"] == str(tmp_path / "mine" / "global_step_1" / "hf")
    assert [name for name, _, _ in identity["weights"]] == ["model.safetensors"]
    assert json.loads((out / "summary.json").read_text())["all"]["questions"] == 6
