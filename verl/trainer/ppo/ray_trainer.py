"""The trainer: one training step is the list of verbs in `fit`."""

import time
from typing import Any, cast

from verl.protocol import DataProto
from verl.trainer.config import PPOConfig
from verl.trainer.ppo.advantage import (
    add_distillation,
    apply_kl_penalty,
    build_kl_controller,
    compute_advantage,
    restore_kl,
)
from verl.trainer.ppo.batch_source import (
    BatchSource,
    NothingToLearn,
    Rollouts,
    branch_metrics,
    trajectory_metrics,
)
from verl.trainer.ppo.checkpoints import Checkpoints
from verl.trainer.ppo.collapse import Alarm, TrainingCollapsed
from verl.trainer.ppo.collapse_guard import CollapseGuard
from verl.trainer.ppo.failures import RolloutFailed
from verl.trainer.ppo.filters import correct_rollout, filter_loss
from verl.trainer.ppo.information_gain import pay_information
from verl.trainer.ppo.joined import with_seq_tokens
from verl.trainer.ppo.metrics import (
    compute_data_metrics,
    compute_throughput_metrics,
    console_line,
    host_metrics,
    staleness_metrics,
)
from verl.trainer.ppo.mismatch import FirstBatch
from verl.trainer.ppo.processes import Processes
from verl.trainer.ppo.step_records import StepRecords
from verl.trainer.ppo.validation import Validator, recorded
from verl.trainer.preparation import Task
from verl.trainer.supervise import Stop
from verl.utils.dataset import RLHFDataset, questions_digest
from verl.utils.errors import RewardError
from verl.utils.tracking import Timers, Tracking

Metrics = dict[str, float]


class TrainingDiverged(RuntimeError):
    """Losses or gradients stayed non-finite for too many training steps in a row."""


ENDINGS = (RolloutFailed, RewardError, TrainingDiverged, NothingToLearn, TrainingCollapsed)
"""Errors that end a run, and that would come again if it were restarted."""


class RayPPOTrainer:
    """Drives the workers through PPO or GRPO; holds no accelerator.

    A verb returns the batch with the columns that it adds, its metrics, or both; `fit` merges them.
    """

    def __init__(
        self,
        config: PPOConfig,
        task: Task,
        train_set: RLHFDataset,
        val_set: RLHFDataset,
        processes: Processes,
        tracking: Tracking,
        timers: Timers,
        stop: Stop,
    ) -> None:
        self.config = config
        self.task = task
        self.questions = questions_digest(train_set.rows)
        self.total = config.total_training_steps(len(train_set))
        self.world_size = processes.group.world_size
        self.actor = processes.roles["actor"]
        self.reference = processes.roles.get("ref")
        self.teacher = processes.roles.get("teacher")
        self.critic = processes.roles.get("critic")
        self.rollout = processes.rollout
        self.val_rollout = processes.val_rollout
        self.tracking = tracking
        self.timers = timers
        self.stop = stop
        self.batches = BatchSource(
            config,
            train_set,
            processes.rollout,
            task.reward,
            pad_token_id=cast(int, task.tokenizer.pad_token_id),
            world_size=self.world_size,
        )
        self.validator = Validator(config, val_set, processes.val_rollout, task, tracking)
        self.validates_again = False
        """Whether the run ended before the validation of the step that it resumes from."""
        self.kl_ctrl = build_kl_controller(config.algorithm)
        self.checkpoints = Checkpoints(config.trainer, processes.roles, tracking.message)
        self.guard = CollapseGuard(config, self.checkpoints, tracking)
        self.compare = FirstBatch(config, tracking.message)
        self.records = StepRecords(config.trainer, task.tokenizer, tracking)
        self.step = 0
        self.policy_version = -1
        """Version of the weights that the engines hold; every sync raises it."""
        self.skipped_in_a_row = 0

    def fit(self) -> None:
        """Trains to `trainer.total_training_steps`, validating, logging and saving on the way.

        After a request to stop it finishes the step and writes a checkpoint. The reward has no verb
        of its own: `generate` returns trajectories that are scored (`BatchSource`).
        """
        start = self.step
        began = time.monotonic()
        self.begin()
        while self.wants_a_step():
            self.step += 1
            with self.timers("step"):
                rollouts = self.generate()
                self.sleep()
                metrics = self.pay_information(rollouts)
                batch, batch_metrics = self.build(rollouts)
                metrics |= batch_metrics
                batch = self.old_log_prob(batch)
                batch = self.ref_log_prob(batch)
                batch = self.teacher_log_prob(batch)
                batch = self.values(batch)
                batch, adv_metrics = self.advantage(batch)
                metrics |= adv_metrics
                metrics |= self.update_critic(batch)
                metrics |= self.update_actor(batch)
                self.check_finite(metrics)
                self.sync_weights()
                metrics |= compute_data_metrics(batch, self.config.data.max_prompt_length)
                alarm = self.guard.observe(self.step, metrics)
                if self.is_due(self.config.trainer.test_freq):
                    metrics |= self.validate()
                if self.is_due(self.config.trainer.save_freq) or self.stop.requested:
                    self.save_checkpoint(alarm)
            if self.validator.is_done:
                metrics |= self.finish_validation()
            self.log(batch, metrics, (time.monotonic() - began) / max(1, self.step - start))
            if not self.config.trainer.async_save:
                self.checkpoints.complete()
            if alarm is not None:
                self.respond(alarm)
        self.finish()

    def begin(self) -> None:
        """Syncs the weights to the engines, then validates and saves them if so configured."""
        self.sync_weights()
        if self.step == 0 and self.guard.rolls_back and not self.checkpoints.exists(0):
            self.save_checkpoint()
        if self.begins_with_validation() and not self.stop.requested:
            self.log_validation(self.validate())
        is_over = self.step >= self.total
        if is_over and not self.config.trainer.val_only and not self.stop.requested:
            self.tracking.message(
                f"nothing left to train, all {self.total} training steps are done; "
                "trainer.total_training_steps says how many there are"
            )
        self.timers.pop()

    def wants_a_step(self) -> bool:
        """Whether there is another step to train."""
        if self.config.trainer.val_only or self.stop.requested:
            return False
        return self.step < self.total

    def begins_with_validation(self) -> bool:
        """Whether the weights that the run starts from are validated."""
        trainer = self.config.trainer
        is_first = self.step == 0 and trainer.val_before_train
        return trainer.val_only or self.validates_again or is_first

    def is_due(self, frequency: int) -> bool:
        """Whether something that is done every `frequency` steps, and at the end, is due now."""
        return self.step == self.total or (frequency > 0 and self.step % frequency == 0)

    def generate(self) -> Rollouts:
        """Waits for the scored trajectories of this step."""
        with self.timers("gen"):
            rollouts = self.batches.roll_out(steps_left=self.total - self.step + 1)
        with self.timers("save_checkpoint"):
            self.checkpoints.complete()
        return rollouts

    def sleep(self) -> None:
        """Frees the engines' memory for the update."""
        with self.timers("sleep"):
            self.rollout.sleep()

    def pay_information(self, rollouts: Rollouts) -> Metrics:
        """Pays turns for their gain of information, if that is configured."""
        config = self.config.algorithm.information_gain
        if not config.weight or not rollouts.trajectories:
            return {}
        with self.timers("information_gain"):
            return pay_information(
                rollouts.jobs,
                rollouts.trajectories,
                self.task.tokenizer,
                config,
                self.actor.compute_log_prob,
                self.world_size,
            )

    def build(self, rollouts: Rollouts) -> tuple[DataProto, Metrics]:
        """Returns the batch of the trajectories to train on.

        Raises NothingToLearn when there are none.
        """
        with self.timers("prepare"):
            batch = self.batches.build(rollouts)
            self.records.begin(self.step, rollouts)
            metrics = rollouts.metrics() | trajectory_metrics(rollouts.surviving)
            metrics |= self.task.agent.reduce_metrics(rollouts.surviving)
            if self.config.actor_rollout_ref.rollout.branches.rounds:
                metrics |= branch_metrics(rollouts.surviving)
            metrics |= staleness_metrics(batch, self.policy_version)
        return batch, metrics

    def old_log_prob(self, batch: DataProto) -> DataProto:
        """Adds the log-probs of the weights before the update.

        Rows of which single tokens are recorded get their entropy, too.
        """
        with self.timers("old_log_prob"):
            batch = self.compare(batch.union(self.actor.compute_log_prob(batch)))
            return self.records.with_entropy(batch, self.actor.compute_entropy)

    def ref_log_prob(self, batch: DataProto) -> DataProto:
        """Adds the log-probs of the initial weights, if a KL is computed."""
        if self.reference is None:
            return batch
        with self.timers("ref"):
            return batch.union(self.reference.compute_ref_log_prob(batch))

    def teacher_log_prob(self, batch: DataProto) -> DataProto:
        """Adds the log-probs of the teacher, if there is one."""
        if self.teacher is None:
            return batch
        with self.timers("teacher"):
            scored = self.teacher.compute_ref_log_prob(batch)
            return batch.with_tensors(teacher_log_prob=scored.batch["ref_log_prob"])

    def values(self, batch: DataProto) -> DataProto:
        """Adds the critic's values, if there is a critic."""
        if self.critic is None:
            return batch
        with self.timers("values"):
            return batch.union(self.critic.compute_values(batch))

    def advantage(self, batch: DataProto) -> tuple[DataProto, Metrics]:
        """Adds rewards (minus the KL, if it is in the reward), advantages and returns.

        A teacher's part is in the advantages, and not in the returns.
        """
        with self.timers("adv"):
            batch, kl_metrics = apply_kl_penalty(batch, self.config.algorithm, self.kl_ctrl)
            batch, metrics = compute_advantage(batch, self.config.algorithm)
            batch, teacher_metrics = add_distillation(batch, self.config.teacher.weight)
        return batch, kl_metrics | metrics | teacher_metrics

    def update_critic(self, batch: DataProto) -> Metrics:
        """Trains the critic, if there is one."""
        if self.critic is None:
            return {}
        with self.timers("update_critic"):
            metrics = self.critic.update_critic(with_seq_tokens(batch))
        metrics["vf_loss"] = metrics.pop("loss")
        self.records.keep_nonfinite(self.step, "critic", batch, metrics)
        return {f"critic/{name}": value for name, value in metrics.items()}

    def update_actor(self, batch: DataProto) -> Metrics:
        """Trains the policy on the rows that loss filters and rollout correction leave.

        The policy does not learn while the critic warms up.
        """
        if self.step <= self.config.trainer.critic_warmup:
            self.records.write(batch, trained=batch.batch["response_mask"])
            return {}
        with self.timers("correct"):
            whole = batch
            batch, shares = filter_loss(batch, self.config.algorithm.loss_filters)
            batch, mismatch = correct_rollout(batch, self.config.algorithm.rollout_correction)
            self.records.write(whole, trained=batch.batch["response_mask"])
        if not batch.batch["response_mask"].any():
            self.tracking.message(
                f"step {self.step}: loss filters and rollout correction left nothing to train on"
            )
            return shares | mismatch
        with self.timers("update_actor"):
            metrics = self.actor.update_actor(with_seq_tokens(batch))
        self.records.keep_nonfinite(self.step, "actor", batch, metrics)
        actor_metrics = {f"actor/{name}": value for name, value in metrics.items()}
        return shares | mismatch | actor_metrics

    def check_finite(self, metrics: Metrics) -> None:
        """Raises TrainingDiverged after `trainer.max_skipped_steps` steps with a skipped update."""
        skipped = any(metrics.get(f"{role}/skipped_steps") for role in ("actor", "critic"))
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        if self.skipped_in_a_row >= self.config.trainer.max_skipped_steps:
            raise TrainingDiverged(
                f"loss or gradient was not finite in {self.skipped_in_a_row} training steps in a "
                "row (trainer.max_skipped_steps): lower the learning rate (of the critic too), "
                "then run again to resume"
            )

    def sync_weights(self) -> None:
        """Syncs the policy's weights to the engines, under the next version."""
        self.policy_version += 1
        self.rollout.announce_version(self.policy_version)
        with self.timers("settle"):
            self.batches.drain_before_sync()
        with self.timers("update_weights"):
            self.rollout.update_weights(self.policy_version)

    def validate(self) -> Metrics:
        """Rolls out every held-out question under the present weights.

        If the validation has its own engines, it goes on while the next steps are trained;
        otherwise this waits for its metrics and returns them.
        """
        with self.timers("testing"):
            self.finish_validation()
            if self.val_rollout is not self.rollout:
                self.val_rollout.update_weights(self.policy_version)
            self.validator.start(self.step)
            self.checkpoints.await_score(self.step)
            if self.val_rollout is self.rollout or self.step == 0:
                return self.finish_validation()
        return {}

    def finish_validation(self) -> Metrics:
        """Waits for the validation under way, if any; returns its metrics if they are of this step.

        Those of an earlier step are logged as a line of their own.
        """
        validated = self.validator.finish()
        if validated is None:
            return {}
        self.checkpoints.score(validated.step, validated.metrics)
        if validated.step == self.step:
            return validated.metrics
        self.tracking.log(validated.metrics, validated.step)
        return {}

    def log_validation(self, metrics: Metrics) -> None:
        """Writes the metrics of a validation outside of a training step."""
        if metrics:
            self.tracking.log(metrics, self.step)

    def log(self, batch: DataProto, metrics: Metrics, seconds_per_step: float) -> None:
        """Writes the step's metrics and one line on the console."""
        self.records.complete()
        timing = self.timers.pop()
        line = metrics | timing | compute_throughput_metrics(batch, timing, self.config.num_gpus)
        line |= host_metrics() | {
            "training/total_steps": float(self.total),
            "training/epoch": float(self.batches.epoch),
            "training/policy_version": float(self.policy_version),
        }
        self.tracking.log(line, self.step)
        seconds_left = (self.total - self.step) * seconds_per_step
        self.tracking.message(console_line(line, self.step, self.total, seconds_left))

    def respond(self, alarm: Alarm) -> None:
        """Responds to a collapse as configured. Raises TrainingCollapsed to end the run."""
        healthy = self.guard.respond(alarm, self.state_dict())
        if healthy is not None:
            self.roll_back(healthy)

    def roll_back(self, healthy: int) -> None:
        """Continues from the checkpoint of the step `healthy`, with a lower learning rate."""
        self.validator.forget()
        self.sleep()
        self.load_checkpoint(healthy)
        self.sync_weights()
        factor = self.config.trainer.collapse_watch.lr_factor
        self.tracking.message(f"rolled back to step {healthy}; learning rates times {factor}")

    def finish(self) -> None:
        """Completes what is under way: a validation, and the checkpoint of the last step.

        After a request to stop, the validation is left to the resumed run.
        """
        if not self.stop.requested:
            self.log_validation(self.finish_validation())
        with self.timers("save_checkpoint"):
            self.checkpoints.complete()
        if self.checkpoints.newest < self.step and not self.config.trainer.val_only:
            self.save_checkpoint()
        with self.timers("save_checkpoint"):
            self.checkpoints.complete(must_succeed=True)

    def save_checkpoint(self, alarm: Alarm | None = None) -> None:
        """Starts to write a checkpoint of the present step.

        A step with an alarm that ends the run or rolls it back is not saved: a run that dies before
        the response would resume as if it had responded. A validation of earlier weights is
        finished first, because a run that resumes here could not repeat it.
        """
        if alarm is not None and self.guard.changes_the_run:
            return
        if self.validator.step is not None and self.validator.step < self.step:
            with self.timers("testing"):
                self.finish_validation()
        with self.timers("save_checkpoint"):
            self.checkpoints.save(self.step, self.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """The state of the driver that a checkpoint holds, as values that JSON can express."""
        return {
            "config": self.config.model_dump(mode="json"),
            "questions": self.questions,
            "step": self.step,
            "sampler": self.batches.state_dict(),
            "kl": self.kl_ctrl.value,
            "watch": self.guard.state_dict(),
            "skipped_in_a_row": self.skipped_in_a_row,
            "version": self.policy_version,
            "validating": self.validator.step is not None,
            "trackers": self.tracking.ids,
        }

    def load_checkpoint(self, step: int) -> None:
        """Restores the checkpoint of `step`; the configuration stays the present one."""
        state = self.checkpoints.load(step)
        self.step = state["step"]
        self.skipped_in_a_row = state["skipped_in_a_row"]
        self.batches.load_state_dict(state["sampler"])
        algorithm = self.config.algorithm
        saved_kl_ctrl = state["config"]["algorithm"]["kl_ctrl"]
        restore_kl(self.kl_ctrl, algorithm, saved_kl_ctrl, state["kl"])
        self.guard.load_state_dict(state["watch"])
        done = recorded(self.tracking.run_dir, step)
        self.checkpoints.score(step, done)
        self.validates_again = state["validating"] and not done
        # the next sync raises it to the version of the saved weights
        self.policy_version = state["version"] - 1
        self.tracking.message(f"resuming after step {self.step}")
