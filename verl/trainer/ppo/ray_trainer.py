"""The trainer: one training step is the list of verbs in `fit`."""

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from verl.agent import Trajectory
from verl.protocol import DataProto
from verl.trainer.config import PPOConfig
from verl.trainer.ppo.advantage import apply_kl_penalty, build_kl_controller, compute_advantage
from verl.trainer.ppo.batching import (
    build_batch,
    check_failures,
    failure_metrics,
    groups_of,
    rollout_metrics,
    surviving,
)
from verl.trainer.ppo.filters import correct_rollout, differing_groups, filter_loss, first_groups
from verl.trainer.ppo.metrics import compute_data_metrics, compute_throughput_metrics
from verl.trainer.ppo.records import trajectory_records
from verl.trainer.ppo.rollout import RolloutManager
from verl.trainer.ppo.validation import validate
from verl.utils.checkpoint import find_latest, mark_complete
from verl.utils.dataset import ResumableSampler, RLHFDataset
from verl.utils.tracking import Timers, Tracking
from verl.workers.rollout.agent_worker import Job


class TrainingDiverged(RuntimeError):
    """Losses or gradients stayed non-finite for too many training steps in a row."""


class NothingToLearn(RuntimeError):
    """A training step is left without a trajectory."""


class RayPPOTrainer:
    """Drives the workers through PPO or GRPO; holds no accelerator."""

    def __init__(
        self,
        config: PPOConfig,
        tokenizer: Any,
        agent: Any,
        reward: Any,
        train_set: RLHFDataset,
        val_set: RLHFDataset,
        roles: dict[str, Any],
        world_size: int,
        rollout: RolloutManager,
        tracking: Tracking,
    ) -> None:
        self.config, self.tokenizer, self.agent, self.reward = config, tokenizer, agent, reward
        self.train_set, self.val_set = train_set, val_set
        self.actor, self.reference, self.critic = (roles.get(k) for k in ("actor", "ref", "critic"))
        self.roles, self.world_size = roles, world_size
        self.rollout, self.tracking = rollout, tracking
        self.sampler = ResumableSampler(
            len(train_set), config.data.train_batch_size, config.trainer.seed, config.data.shuffle_train_dataloader
        )
        self.kl_ctrl = build_kl_controller(config.algorithm)
        self.timers = Timers()
        self.step = self.skipped_in_a_row = 0
        self.metrics: dict[str, float] = {}

    def fit(self) -> None:
        """Trains to `trainer.total_training_steps`, validating, logging and saving on the way."""
        total, start, began = total_training_steps(self.config, len(self.train_set)), self.step, time.monotonic()
        self.sync_weights()
        if self.config.trainer.val_only or (self.step == 0 and self.config.trainer.val_before_train):
            self.validate()
        if self.config.trainer.val_only:
            return
        batches = iter(self.sampler)
        self.timers.pop()
        while self.step < total:
            self.step += 1
            with self.timers("step"):
                batch = self.generate(batches)
                self.sleep()
                batch = self.old_log_prob(batch)
                batch = self.ref_log_prob(batch)
                batch = self.values(batch)
                batch = self.advantage(batch)
                self.update_critic(batch)
                self.update_actor(batch)
                self.sync_weights()
                if self.is_due(self.config.trainer.test_freq, total):
                    self.validate()
                if self.is_due(self.config.trainer.save_freq, total):
                    self.save_checkpoint()
            self.log(batch, total, (time.monotonic() - began) / (self.step - start))

    def is_due(self, frequency: int, total: int) -> bool:
        return self.step == total or (frequency > 0 and self.step % frequency == 0)

    def generate(self, batches: Iterator[list[int]]) -> DataProto:
        """Rolls out and scores a batch of prompts, and drops what cannot be trained on.

        With `algorithm.filter_groups` further batches are drawn until enough groups teach something.
        """
        config, filters = self.config, self.config.algorithm.filter_groups
        jobs: list[Job] = []
        trajectories: list[Trajectory] = []
        drawn: list[Trajectory] = []
        with self.timers("gen"):
            for count in range(1, (filters.max_num_gen_batches if filters.enable else 1) + 1):
                more = self.roll_out(next(batches), count)
                drawn += more[1]
                more = differing_groups(*more, filters.metric) if filters.enable else more
                jobs, trajectories = jobs + more[0], trajectories + more[1]
                self.metrics["training/num_gen_batches"] = float(count)
                if len({job.uid for job in jobs}) >= config.data.train_batch_size:
                    break
        with self.timers("prepare"):
            return self.prepare(*first_groups(jobs, trajectories, config.data.train_batch_size), drawn)

    def prepare(self, jobs: list[Job], trajectories: list[Trajectory], drawn: list[Trajectory]) -> DataProto:
        """What `fit` trains on, of all that were `drawn`; writes trajectories and their metrics."""
        config = self.config
        if not trajectories:
            raise NothingToLearn(
                f"none of {len(drawn)} trajectories is in a group that differs in "
                f"{config.algorithm.filter_groups.metric} (algorithm.filter_groups), so nothing can be learned: "
                "try easier questions, or a denser reward"
            )
        self.metrics["training/num_trajectories"] = float(len(drawn))
        self.metrics |= rollout_metrics(drawn) | self.agent.reduce_metrics(drawn)
        if config.trainer.rollout_data_freq > 0 and self.step % config.trainer.rollout_data_freq == 0:
            self.tracking.log_trajectories("train", trajectory_records(jobs, trajectories, self.tokenizer), self.step)
        return build_batch(
            jobs,
            trajectories,
            pad_token_id=self.tokenizer.pad_token_id,
            num_mini_batches=config.num_mini_batches,
            world_size=self.world_size,
            state_masking=config.actor_rollout_ref.actor.state_masking,
        )

    def roll_out(self, rows: list[int], number: int) -> tuple[list[Job], list[Trajectory]]:
        """The `number`th rollout of this step: the trajectories of some prompts, those that failed left out."""
        config, rollout = self.config, self.config.actor_rollout_ref.rollout
        jobs, results = self.rollout.generate(
            [self.train_set.rows[i] for i in rows],
            [self.train_set.prompt_ids[i] for i in rows],
            rollout,
            seed=config.trainer.seed + 1_000_000 * self.step + 500_000_000 * (number - 1),
        )
        check_failures(results, config.trainer.max_failed_share)
        jobs, trajectories, dropped = surviving(jobs, results, min_group=2 if config.compares else 1)
        if hasattr(self.reward, "score_groups"):
            self.reward.score_groups(groups_of(jobs, trajectories))
        self.metrics |= failure_metrics(results) | dropped
        return jobs, trajectories

    def sleep(self) -> None:
        """Frees the engines' memory for the update."""
        with self.timers("sleep"):
            self.rollout.sleep()

    def old_log_prob(self, batch: DataProto) -> DataProto:
        with self.timers("old_log_prob"):
            return batch.union(self.roles["actor"].compute_log_prob(batch))

    def ref_log_prob(self, batch: DataProto) -> DataProto:
        if self.reference is None:
            return batch
        with self.timers("ref"):
            return batch.union(self.reference.compute_ref_log_prob(batch))

    def values(self, batch: DataProto) -> DataProto:
        if self.critic is None:
            return batch
        with self.timers("values"):
            return batch.union(self.critic.compute_values(batch))

    def advantage(self, batch: DataProto) -> DataProto:
        with self.timers("adv"):
            batch, kl = apply_kl_penalty(batch, self.config.algorithm, self.kl_ctrl)
            batch, shares = compute_advantage(batch, self.config.algorithm)
        self.metrics |= kl | shares
        return batch

    def update_critic(self, batch: DataProto) -> None:
        if self.critic is None:
            return
        with self.timers("update_critic"):
            metrics = self.critic.update_critic(batch)
        metrics["vf_loss"] = metrics.pop("loss")
        self.metrics |= {f"critic/{k}": v for k, v in metrics.items()}

    def update_actor(self, batch: DataProto) -> None:
        if self.step <= self.config.trainer.critic_warmup:
            return
        with self.timers("correct"):
            batch, shares = filter_loss(batch, self.config.algorithm.loss_filters)
            batch, mismatch = correct_rollout(batch, self.config.algorithm.rollout_correction)
        self.metrics |= shares | mismatch
        if not batch.batch["response_mask"].any():
            self.tracking.message(f"step {self.step}: loss filters and rollout correction left nothing to train on")
            return
        with self.timers("update_actor"):
            metrics = self.roles["actor"].update_actor(batch)
        self.metrics |= {f"actor/{k}": v for k, v in metrics.items()}
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if metrics["skipped_steps"] else 0
        if self.skipped_in_a_row >= self.config.trainer.max_skipped_steps:
            raise TrainingDiverged(
                f"loss or gradient was not finite in {self.skipped_in_a_row} training steps in a row (trainer."
                "max_skipped_steps): lower actor_rollout_ref.actor.optim.lr, then run again to resume"
            )

    def sync_weights(self) -> None:
        with self.timers("update_weights"):
            self.rollout.update_weights(self.roles["actor"])

    def validate(self) -> None:
        """Rolls out every held-out question; writes all trajectories and `val/` metrics."""
        with self.timers("testing"):
            metrics, records = validate(self.config, self.val_set, self.rollout, self.agent, self.tokenizer)
        self.tracking.log_trajectories("val", records, self.step)
        self.tracking.message(
            f"step {self.step}: " + "  ".join(f"{k} {v:.3f}" for k, v in sorted(metrics.items()) if "test_score" in k)
        )
        self.metrics |= metrics
        if self.step == 0 or self.config.trainer.val_only:
            self.tracking.log(self.metrics | self.timers.pop(), self.step)
            self.metrics = {}

    def log(self, batch: DataProto, total: int, seconds_per_step: float) -> None:
        """Writes the step's metrics and one line on the console."""
        timing = self.timers.pop()
        metrics = self.metrics | timing | compute_data_metrics(batch, self.config.data.max_prompt_length)
        metrics |= compute_throughput_metrics(batch, timing, self.world_size)
        metrics |= {"training/epoch": float(self.sampler.epoch), "training/policy_version": float(self.rollout.version)}
        self.tracking.log(metrics, self.step)
        self.metrics = {}
        eta = (total - self.step) * seconds_per_step
        self.tracking.message(console_line(metrics, self.step, total, eta))

    def save_checkpoint(self) -> None:
        """Writes everything that resuming needs, then names it the newest."""
        root = Path(self.config.trainer.default_local_dir)
        folder = root / f"global_step_{self.step}"
        with self.timers("save_checkpoint"):
            for role in ("actor", "critic"):
                if role in self.roles:
                    self.roles[role].save_checkpoint(str(folder / role))
            extra = {"sampler": self.sampler.state_dict(), "kl": self.kl_ctrl.value, "wandb": self.tracking.wandb_id}
            torch.save(extra | {"version": self.rollout.version}, folder / "trainer.pt")
            mark_complete(str(root), self.step, self.config.trainer.max_ckpt_to_keep)

    def load_checkpoint(self) -> bool:
        """Continues from the newest checkpoint of the run folder; False if there is none."""
        folder = find_latest(self.config.trainer.default_local_dir)
        if folder is None:
            return False
        for role in ("actor", "critic"):
            if role in self.roles:
                self.roles[role].load_checkpoint(str(folder / role))
        extra = torch.load(folder / "trainer.pt", weights_only=False)
        self.step = int(folder.name.removeprefix("global_step_"))
        self.sampler.load_state_dict(extra["sampler"])
        self.kl_ctrl.value = extra["kl"]
        self.rollout.version = extra["version"] - 1  # the sync that follows brings the version of the saved weights
        self.tracking.message(f"resuming after step {self.step} from {folder}")
        return True


def total_training_steps(config: PPOConfig, num_rows: int) -> int:
    """trainer.total_training_steps, or what trainer.total_epochs amounts to."""
    trainer = config.trainer
    return trainer.total_training_steps or max(1, trainer.total_epochs * num_rows // config.data.train_batch_size)


def console_line(metrics: dict[str, float], step: int, total: int, eta_s: float) -> str:
    """Step, reward, length, searches and speed in one line; task metrics where the task has them."""
    parts = [f"step {step}/{total}", f"reward {metrics['critic/score/mean']:.3f}"]
    labels = {"reward/em": "EM", "env/number_of_valid_search": "searches", "env/finish_ratio": "answered"}
    for key, label in labels.items():
        if key in metrics:
            parts.append(f"{label} {metrics[key]:.2f}")
    parts.append(f"tokens/s {metrics['perf/throughput']:.0f}")
    parts.append(f"{metrics['timing_s/step']:.1f} s/step")
    return "  ".join([*parts, f"ETA {math.ceil(eta_s / 60)} min"])
