"""The script of the paper's table composes, evaluates each method and trains what learns."""

import os
import shlex
import subprocess

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from tests.e2e.runs import ROOT
from verl.trainer.config import validate

SCRIPT = ROOT / "scripts" / "nq_hotpotqa" / "table.sh"
TRAINED = {"sft", "r1", "rejection", "search_r1_ppo", "search_r1_grpo"}


def commands(*arguments, **env):
    done = subprocess.run(
        ["bash", str(SCRIPT), *arguments],
        env={**os.environ, "DRY_RUN": "1", **env},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return [shlex.split(line[2:]) for line in done.stdout.splitlines()]


def composed(command):
    name = command[command.index("--config-name") + 1] if "--config-name" in command else "grpo"
    overrides = [a for a in command if "=" in a and not a.startswith("--")]
    with initialize_config_dir(str(ROOT / "configs"), version_base=None):
        return OmegaConf.to_container(
            compose(name, ["actor_rollout_ref.model.path=M", *overrides]), resolve=True
        )


def test_every_method_is_evaluated_and_trained_where_it_learns():
    *lines, table = commands("org/Model-7B", "retriever.topk=5")
    trainings = [c for c in lines if c[3:5] == ["search_r1.cli", "train"]]
    evaluations = [c for c in lines if c[3:5] == ["search_r1.cli", "evaluate"]]
    methods = {c[6].removeprefix("experiment=baseline/"): c for c in evaluations}
    assert len(methods) == len(evaluations) == 12
    assert {c[7].removeprefix("experiment=baseline/") for c in trainings} == TRAINED
    assert {m for m, c in methods.items() if c[5].endswith("/hf")} == TRAINED
    for command in trainings + evaluations:
        config = validate(composed(command))
        assert config.agent["retriever"]["topk"] == 5
        if command in trainings and "rejection" not in str(command) and "sft" not in str(command):
            estimator = "gae" if "search_r1_ppo" in str(command) else "grpo"
            assert config.algorithm.adv_estimator == estimator and config.use_critic == (
                estimator == "gae"
            )
    assert table[3] == "search_r1.evaluation.table" and table[-2:] == [
        "--out",
        str(ROOT / "runs" / "table"),
    ]


@pytest.mark.parametrize(
    ("method", "agent", "searches", "template"),
    [
        ("direct", "SearchAgentLoop", False, "direct"),
        ("cot", "SearchAgentLoop", False, "cot"),
        ("rag", "RagLoop", True, "rag"),
        ("ircot", "IRCoTLoop", True, "ircot"),
        ("search_o1", "SearchO1Loop", True, "search_o1"),
        ("self_rag", "SelfRagLoop", True, "rag"),
        ("react", "ReActLoop", True, "react"),
        ("search", "SearchAgentLoop", True, None),
        ("r1", "SearchAgentLoop", False, "r1"),
    ],
)
def test_a_method_is_its_config(method, agent, searches, template):
    (evaluate,) = commands("M", METHODS=method)[:1]
    _ = None
    config = composed([a for a in evaluate if not a.endswith("M/hf")])
    assert config["agent"]["_target_"].endswith(f".{agent}")
    assert config["agent"]["do_search"] == searches and config["agent"]["template"] == template
