"""A trainer over roles and engines that write down what they are asked.

The configuration, the batches and everything that the driver computes are real.
"""

from pathlib import Path
from types import SimpleNamespace

import torch

from verl.agent import Segment, Source, Trajectory
from verl.protocol import DataProto
from verl.rollout.agent_worker import Failure
from verl.rollout.job import make_jobs
from verl.trainer.config import PPOConfig
from verl.trainer.ppo.ray_trainer import RayPPOTrainer
from verl.trainer.preparation import Task
from verl.utils.tracking import Timers, Tracking

ROWS = 6
PROMPTS = 2
GROUP = 4
ACTOR = "actor_rollout_ref.actor"
ROLLOUT = "actor_rollout_ref.rollout"
SMALL = [
    f"data.train_batch_size={PROMPTS}",
    f"{ROLLOUT}.n={GROUP}",
    f"{ACTOR}.ppo_mini_batch_size={PROMPTS * GROUP}",
    "trainer.device=cpu",
    "trainer.n_gpus_per_node=1",
    "trainer.total_training_steps=3",
    "trainer.test_freq=-1",
    "trainer.save_freq=-1",
    "trainer.val_before_train=false",
    "trainer.best_metric=null",
    "trainer.logger=[]",
    "data.shuffle_train_dataloader=false",
    "trainer.critic_warmup=0",
    "trainer.rollout_data_freq=-1",
]


def question(number: int) -> dict:
    truth = {"ground_truth": "yes"}
    return {"data_source": "tiny", "prompt": str(number), "number": number, "reward_model": truth}


class Questions:
    rows = [question(number) for number in range(ROWS)]
    prompt_ids = [[number + 1] for number in range(ROWS)]

    def __len__(self) -> int:
        return ROWS


class Rollout:
    """Engines whose trajectories of a prompt score `scores[prompt]`; None fails. Four tokens each.

    A greedy trajectory scores `greedy[prompt]`, else .5."""

    def __init__(self, said: list, scores: dict) -> None:
        self.said = said
        self.scores = scores
        self.greedy: dict = {}
        self.version = -1

    def submit(self, rows, prompts, sampling, seed, name="rollout"):
        is_greedy = name == "rollout" and sampling.temperature == 0
        what = "greedy" if is_greedy else name
        self.said.append((f"submit {what}", tuple(row["number"] for row in rows), self.version))
        jobs = make_jobs(rows, prompts, sampling, seed) if name == "rollout" else []
        scores = self.scores
        if is_greedy:
            scores = {row["number"]: [self.greedy.get(row["number"], 0.5)] for row in rows}
        return jobs, self.version, scores

    def collect(self, submitted):
        jobs, version, scores = submitted
        if not jobs:
            return [], []
        self.said.append(("collect", self.version))
        copies: dict[str, int] = {}
        results: list = []
        for job in jobs:
            copy = copies[job.uid] = copies.get(job.uid, -1) + 1
            score = scores[job.row["number"]][copy]
            segment = Segment(Source.MODEL, [5, 6, 7, 8], [-1.0] * 4, policy_version=version)
            failed = Failure("down", 1)
            done = Trajectory(job.prompt_ids, [segment], "answer", {"score": score})
            results.append(failed if score is None else done)
        return jobs, results

    def drain(self, submitted):
        self.said.append(("drain", len(submitted), self.version))

    def sleep(self):
        self.said.append(("sleep",))

    def report_progress_to(self, on_progress):
        self.on_progress = on_progress

    def is_done(self, submitted):
        return True

    def announce_version(self, version):
        self.version = version

    def update_weights(self, version):
        self.said.append(("update_weights", version))


class Role:
    """A worker group: log-probs of -1 for the actor, of -1.5 for reference and teacher, values
    of 0."""

    def __init__(self, name: str, said: list) -> None:
        self.name = name
        self.said = said
        self.batches = []
        self.skipped_steps = 0.0
        self.checkpoints: list[tuple[str, bool]] = []
        """The folder of each one written, and whether in the background."""
        self.lr_factors: list[float] = []

    def describe(self):
        return [f"a {self.name} that writes down what it is asked"]

    def _column(self, batch: DataProto, name: str, value: float) -> DataProto:
        self.said.append((name,))
        return DataProto({name: torch.full(batch.batch["responses"].shape, value)})

    def compute_log_prob(self, batch):
        return self._column(batch, "old_log_probs", -1.0)

    def compute_entropy(self, batch):
        return self._column(batch, "entropy", 0.5)

    def compute_ref_log_prob(self, batch):
        return self._column(batch, "ref_log_prob", -1.5)

    def compute_values(self, batch):
        return self._column(batch, "values", 0.0)

    def _update(self, batch):
        self.said.append((f"update {self.name}",))
        self.batches.append(batch)
        return {"loss": 0.0, "skipped_steps": self.skipped_steps}

    update_actor = update_critic = _update

    def save_checkpoint(self, path, asynchronous):
        self.checkpoints.append((Path(path).parent.name, asynchronous))

    def finish_checkpoint(self):
        pass

    def load_checkpoint(self, path):
        pass

    def scale_lr(self, factor):
        self.lr_factors.append(factor)

    def save_pretrained(self, path, checkpoint):
        self.said.append(("save_pretrained", path, checkpoint))


class Letters:
    """A tokenizer of letters."""

    pad_token_id = 0
    decode = staticmethod(str)

    def __call__(self, text: str, **_: object) -> dict:
        return {"input_ids": [ord(letter) for letter in text]}


def make_processes(config: PPOConfig, scores: dict | None = None) -> SimpleNamespace:
    """Processes whose `said` is what the roles and engines were asked, in that order."""
    said: list = []
    uses = {
        "actor": True,
        "ref": config.use_reference,
        "teacher": config.use_teacher,
        "critic": config.use_critic,
    }
    names = [name for name, is_used in uses.items() if is_used]
    rollout = Rollout(said, scores or {number: [0.0, 1.0, 0.0, 1.0] for number in range(ROWS)})
    return SimpleNamespace(
        said=said,
        group=SimpleNamespace(world_size=1),
        roles={name: Role(name, said) for name in names},
        rollout=rollout,
        val_rollout=rollout,
        rollouts=[rollout],
        stacks=dict,
        shutdown=lambda: None,
    )


def trainer_over(config: PPOConfig, processes: SimpleNamespace) -> RayPPOTrainer:
    """A trainer of these processes whose `logged` is the metrics of each line."""
    agent = SimpleNamespace(reduce_metrics=lambda trajectories: {})
    tracking = Tracking(config.trainer.default_local_dir, [], "project", "run", {}, {})
    made = RayPPOTrainer(
        config,
        Task(Letters(), agent, None),
        Questions(),
        Questions(),
        processes,
        tracking,
        Timers(),
        SimpleNamespace(requested=0),
    )
    made.logged = []
    made.tracking.log = lambda metrics, step: made.logged.append(metrics)
    return made
