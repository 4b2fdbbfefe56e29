"""What an evaluation writes: a record for each sample, with the ends of tokens if asked."""

import json
from types import SimpleNamespace

import pytest

from tests.configs import composed
from tests.verl.fake_roles import GROUP, SMALL, Questions, make_processes
from verl.rollout.job import make_jobs
from verl.trainer.config import validate
from verl.trainer.evaluation import evaluate


class Asked:
    """Engines that answer each question as it is asked."""

    capacity = 2

    def __init__(self, config) -> None:
        self.rollout = make_processes(config, None).rollout

    def submit(self, rows, prompts, sampling, seed):
        return make_jobs(rows, prompts, sampling, seed), 0, self.rollout.scores

    def first_done(self, pending):
        return 0

    def collect(self, submitted):
        return self.rollout.collect(submitted)


@pytest.mark.parametrize("tokens", [True, False])
def test_each_sample_has_a_record(tmp_path, tokens):
    samples = f"actor_rollout_ref.rollout.val_kwargs.n={GROUP}"
    sampled = "actor_rollout_ref.rollout.val_kwargs.temperature=1.0"
    choice = f"trainer.trajectory_records.tokens={str(tokens).lower()}"
    config = validate(composed("grpo", *SMALL, samples, sampled, choice))
    path = tmp_path / "evaluation.jsonl"
    for _ in range(2):  # the second time there is nothing left to ask
        evaluate(config, Questions(), Asked(config), SimpleNamespace(decode=str), path)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [record["row"] for record in records]
    assert sorted(rows) == sorted(list(range(len(Questions()))) * GROUP)
    ends = [segment.get("token_ends") for record in records for segment in record["segments"]]
    assert all((len(e) == 4) if tokens else e is None for e in ends)
