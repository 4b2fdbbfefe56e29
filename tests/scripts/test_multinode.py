"""The scripts for several machines.

Ray itself is joined with a token; the SLURM script meets a SLURM of a few lines.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from search_r1.launch import free_port
from tests.e2e.runs import ROOT
from tests.processes import wait_for
from verl.trainer.config import validate
from verl.utils.errors import ConfigError

PYTHON_STUB = """#!{python}
import json, os, sys
if sys.argv[1:2] == ["-c"]:
    print("secret")
else:
    with open("calls", "a") as file:
        token = os.environ.get("SEARCH_R1_RETRIEVER_TOKEN", "")
        file.write(json.dumps([token, *sys.argv[1:]]) + "\\n")
"""
COMMAND_STUB = """#!/usr/bin/env bash
echo {name} "$@" >> commands
{body}
"""
TRAIN_STUB = """trap 'echo > stopped; exit "$STOPPED"' TERM
printf '%s\\n' "$@" > trained.tmp; mv trained.tmp trained
while [[ ! -e finish ]]; do sleep 0.05; done
"""


def executable(path, text):
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def checkout(tmp_path):
    """A checkout whose environment is already set up.

    Only the scripts for several machines are the real ones.
    """
    folder = tmp_path / "checkout"
    shutil.copytree(ROOT / "scripts/multinode", folder / "scripts" / "multinode")
    (folder / "scripts" / "setup.sh").write_text(
        f'export PYTHON="{sys.executable}" PYTHONPATH="{ROOT}"\n'
    )
    return folder


@pytest.fixture
def slurm(checkout):
    """The environment of a job on three nodes.

    What it calls is written to `commands` and `calls`.
    """
    bin_dir = checkout / "bin"
    bin_dir.mkdir()
    executable(bin_dir / "srun", COMMAND_STUB.format(name="srun", body="exec sleep 600"))
    executable(bin_dir / "curl", COMMAND_STUB.format(name="curl", body=""))
    nodes = '[[ "$1" != show ]] || printf "%s\\n" n1 n2 n3'
    executable(bin_dir / "scontrol", COMMAND_STUB.format(name="scontrol", body=nodes))
    executable(bin_dir / "python", PYTHON_STUB.format(python=sys.executable))
    (checkout / "scripts" / "setup.sh").write_text(f'export PYTHON="{bin_dir}/python"\n')
    (checkout / "train_grpo.sh").write_text(TRAIN_STUB)
    job = {
        "SLURM_SUBMIT_DIR": checkout,
        "SLURM_JOB_NODELIST": "n[1-3]",
        "SLURM_NNODES": 3,
        "SLURM_JOB_ID": 7,
    }
    env = {k: v for k, v in os.environ.items() if not k.startswith(("RETRIEVER", "SEARCH_R1"))}
    job |= {
        "SLURM_CPUS_ON_NODE": 64,
        "SLURM_GPUS_ON_NODE": 8,
        "PATH": f"{bin_dir}:{os.environ['PATH']}",
    }
    return env | {k: str(v) for k, v in job.items()}


@contextmanager
def job(checkout, env, *overrides):
    """The SLURM script, training."""
    command = ["bash", "scripts/multinode/train.sbatch", *overrides]
    with subprocess.Popen(
        command, cwd=checkout, env=env, stderr=subprocess.PIPE, text=True
    ) as running:
        wait_for(lambda: (checkout / "trained").exists() or running.poll() is not None)
        yield running
        running.wait(60)


def calls(checkout):
    return [json.loads(line) for line in (checkout / "calls").open()]


def commands(checkout, name):
    return [line.split()[1:] for line in (checkout / "commands").open() if line.startswith(name)]


def started(checkout, count):
    """The first `count` calls of srun, which are made in the background."""
    wait_for(lambda: len(commands(checkout, "srun")) >= count)
    return commands(checkout, "srun")


def composed(overrides):
    with initialize_config_dir(str(ROOT / "configs"), version_base=None):
        return validate(OmegaConf.to_container(compose("grpo", overrides), resolve=True))


def test_slurm_starts_the_head_then_the_others_then_the_training(checkout, slurm):
    slurm |= {
        "RETRIEVER": "--retriever_name bm25 --index_path /data/bm25",
        "RETRIEVER_NODES": "n2,n3",
    }
    with job(
        checkout, slurm, "experiment=nq_hotpotqa/qwen2.5-7b-instruct-grpo", "trainer.save_freq=5"
    ):
        found = started(checkout, 3)
        (checkout / "finish").touch()
    assert len(found) == 3
    server, head, others = (
        next(c for c in found if c[-1] == end) for end in ("8000", "6379", "n1:6379")
    )
    assert "--nodelist=n2,n3" in server and "--nodes=2" in server
    assert server[-8:] == [
        "--retriever_name",
        "bm25",
        "--index_path",
        "/data/bm25",
        "--host",
        "0.0.0.0",
        "--port",
        "8000",
    ]
    assert "--nodelist=n1" in head and head[-3:] == ["head", "--port", "6379"]
    assert (
        "--nodelist=n2,n3" in others and others[-1] == "n1:6379" and "--cpus-per-task=64" in others
    )
    waits = [(token, *arguments[1:]) for token, *arguments in calls(checkout)]
    assert waits == [("secret", "n1:6379", "1", "300"), ("secret", "n1:6379", "3", "300")]
    assert [c[-1] for c in commands(checkout, "curl")] == [
        "http://n2:8000/health",
        "http://n3:8000/health",
    ]

    config = composed((checkout / "trained").read_text().splitlines())
    assert (config.trainer.ray_address, config.trainer.nnodes, config.trainer.n_gpus_per_node) == (
        "n1:6379",
        3,
        8,
    )
    assert config.agent["retriever"]["url"] == [
        "http://n2:8000/retrieve",
        "http://n3:8000/retrieve",
    ]
    assert config.trainer.save_freq == 5 and config.trainer.resume_mode == "auto"


def test_a_retriever_that_runs_already_is_used(checkout, slurm):
    with job(checkout, slurm | {"RETRIEVER_URL": "http://search:9000/retrieve"}):
        started(checkout, 2)
        (checkout / "finish").touch()
    assert len(commands(checkout, "srun")) == 2
    config = composed((checkout / "trained").read_text().splitlines())
    assert config.agent["retriever"]["url"] == "http://search:9000/retrieve"


@pytest.mark.parametrize(
    ("number", "status", "queued"),
    [
        (signal.SIGUSR1, 143, 1),
        (signal.SIGTERM, 143, 0),
        (signal.SIGUSR1, 0, 0),
        (signal.SIGUSR1, 1, 0),
    ],
    ids=["the time limit", "a wish to end", "a run that was done", "a run that failed"],
)
def test_a_signal_stops_the_trainer_and_queues_what_is_not_done(
    checkout, slurm, number, status, queued
):
    slurm |= {"RETRIEVER_URL": "http://search:9000/retrieve", "STOPPED": str(status)}
    with job(checkout, slurm) as running:
        running.send_signal(number)
        assert running.wait(60) == status
    assert (checkout / "stopped").exists()
    assert commands(checkout, "scontrol")[1:] == [["requeue", "7"]] * queued


def test_slurm_script_asks_for_a_retriever(checkout, slurm):
    with job(checkout, slurm) as running:
        assert running.wait(60) == 1 and "RETRIEVER_URL" in running.stderr.read()


def test_an_engine_across_two_nodes_is_refused():
    rollout = "actor_rollout_ref.rollout"
    cluster = ["trainer.nnodes=2", "trainer.n_gpus_per_node=4"]
    assert composed([*cluster, f"{rollout}.tensor_model_parallel_size=4"]).trainer.nnodes == 2
    with pytest.raises(
        ConfigError, match=r"=8 does not divide trainer\.n_gpus_per_node=4: an engine lives on one"
    ):
        composed([*cluster, f"{rollout}.tensor_model_parallel_size=8"])


def test_ray_nodes_join_with_a_token_and_leave(checkout, tmp_path):
    port = free_port()
    home = tmp_path / "home"
    home.mkdir()
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {"HOME": str(home)}
    script = "scripts/multinode/ray_node.sh"
    limits = ["--num-cpus=1", "--object-store-memory=80000000"]

    def node(*arguments):
        command = ["bash", script, *arguments, *limits]
        return subprocess.Popen(
            command, cwd=tmp_path / "checkout", env=env, stdout=subprocess.DEVNULL
        )

    def nodes(count, timeout_s, mode="token"):
        command = [
            sys.executable,
            ROOT / "scripts/multinode/wait_for_nodes.py",
            f"localhost:{port}",
            count,
            timeout_s,
        ]
        done = subprocess.run(
            list(map(str, command)),
            env=env | {"RAY_AUTH_MODE": mode},
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stdout + done.stderr

    running = [node("head", f"--port={port}", "--include-dashboard=false")]
    try:
        assert nodes(1, 60)[0] == 0
        assert (home / ".ray" / "auth_token").exists()
        running.append(node(f"localhost:{port}", "--dashboard-agent-listen-port=0"))
        status, output = nodes(2, 60)
        assert status == 0 and output.count("(1 CPU, 0 GPU)") == 2
        status, output = nodes(3, 1)
        assert status == 1 and "2 of 3 nodes within 1 s" in output and "auth_token" in output
    finally:
        for process in reversed(running):
            process.terminate()
            process.wait(60)
    status, output = nodes(1, 1)
    assert status == 1 and "no Ray answers" in output
