"""The trainer: one training step is the list of verbs in `fit`."""

import time
from pathlib import Path
from typing import Any

from verl.agent import Trajectory
from verl.protocol import DataProto
from verl.rollout.agent_worker import Job
from verl.rollout.manager import Submitted
from verl.rollout.records import trajectory_records
from verl.trainer.config import PPOConfig
from verl.trainer.ppo import validation
from verl.trainer.ppo.advantage import (
    apply_kl_penalty,
    build_kl_controller,
    compute_advantage,
    restore_kl,
)
from verl.trainer.ppo.ahead import RolloutAhead
from verl.trainer.ppo.batching import (
    Drawn,
    NothingToLearn,
    RolloutFailed,
    build_batch,
    check_failures,
    rollout_metrics,
    score_groups,
    surviving,
)
from verl.trainer.ppo.checkpoints import Checkpoints
from verl.trainer.ppo.collapse import Alarm, CollapseWatch, TrainingCollapsed
from verl.trainer.ppo.filters import correct_rollout, differing_groups, filter_loss, first_groups
from verl.trainer.ppo.metrics import (
    compute_data_metrics,
    compute_throughput_metrics,
    console_line,
    staleness_metrics,
)
from verl.trainer.ppo.mismatch import FirstBatch
from verl.trainer.ppo.processes import Processes
from verl.trainer.supervise import Stop
from verl.utils.checkpoint_storage import CheckpointError
from verl.utils.dataset import RLHFDataset, questions_digest
from verl.utils.errors import RewardError
from verl.utils.tracking import Timers, Tracking, truncate_metrics


class TrainingDiverged(RuntimeError):
    """Losses or gradients stayed non-finite for too many training steps in a row."""


ENDINGS = (RolloutFailed, RewardError, TrainingDiverged, NothingToLearn, TrainingCollapsed)
"""What ends a run and would come again if it were only started again."""


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
        processes: Processes,
        tracking: Tracking,
        timers: Timers,
        stop: Stop,
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.agent = agent
        self.reward = reward
        self.val_set = val_set
        self.questions = questions_digest(train_set.rows)
        self.total = config.total_training_steps(len(train_set))
        self.roles = processes.roles
        self.world_size = processes.group.world_size
        self.actor = self.roles["actor"]
        self.reference = self.roles.get("ref")
        self.critic = self.roles.get("critic")
        self.rollout = processes.rollout
        self.val_rollout = processes.val_rollout
        self.tracking = tracking
        self.timers = timers
        self.stop = stop
        self.ahead = RolloutAhead(config, train_set, self.rollout)
        self.kl_ctrl = build_kl_controller(config.algorithm)
        self.collapse_watch = CollapseWatch(config.trainer.collapse_watch)
        self.checkpoints = Checkpoints(config.trainer, self.roles, tracking.message)
        self.validating: tuple[int, Submitted] | None = None
        """A validation under way, and the step of its weights."""
        self.validating_again = False
        """The run ended before the validation of the step that it resumes from."""
        self.compare = FirstBatch(config, tracking.message)
        self.step = self.skipped_in_a_row = 0
        self.metrics: dict[str, float] = {}

    def fit(self) -> None:
        """Trains to `trainer.total_training_steps`, validating, logging and saving on the way.

        After a request to stop it finishes the step and writes a checkpoint.
        """
        start = self.step
        began = time.monotonic()
        self.sync_weights()
        if (
            self.step == 0
            and self.collapse_response == "roll_back"
            and not self.checkpoints.exists(0)
        ):
            self.save_checkpoint()
        if self.begins_with_validation() and not self.stop.requested:
            self.validate()
        if self.step >= self.total and not self.config.trainer.val_only and not self.stop.requested:
            self.tracking.message(
                f"nothing left to train, all {self.total} training steps are done; "
                "trainer.total_training_steps says "
                "how many there are"
            )
        self.timers.pop()
        while (
            self.step < self.total and not self.config.trainer.val_only and not self.stop.requested
        ):
            self.step += 1
            with self.timers("step"):
                batch = self.generate()
                self.sleep()
                batch = self.old_log_prob(batch)
                batch = self.ref_log_prob(batch)
                batch = self.values(batch)
                batch = self.advantage(batch)
                self.update_critic(batch)
                self.update_actor(batch)
                self.check_finite()
                self.sync_weights()
                alarm = self.watch(batch)
                if self.is_due(self.config.trainer.test_freq):
                    self.validate()
                if self.is_due(self.config.trainer.save_freq) or self.stop.requested:
                    self.save_checkpoint(alarm)
            self.log(batch, (time.monotonic() - began) / max(1, self.step - start))
            if not self.config.trainer.async_save:
                self.checkpoints.complete()
            if alarm is not None:
                self.respond(alarm)
        self.finish()

    @property
    def collapse_response(self) -> str:
        return self.config.trainer.collapse_watch.response

    def begins_with_validation(self) -> bool:
        trainer = self.config.trainer
        return (
            trainer.val_only
            or self.validating_again
            or (self.step == 0 and trainer.val_before_train)
        )

    def is_due(self, frequency: int) -> bool:
        return self.step == self.total or (frequency > 0 and self.step % frequency == 0)

    def generate(self) -> DataProto:
        """Waits for a batch of trajectories, scored, and drops what cannot be trained on.

        With `algorithm.filter_groups` further batches are drawn until enough groups teach
        something.
        """
        config = self.config
        filters = self.config.algorithm.filter_groups
        most = filters.max_num_gen_batches if filters.enable else 1
        drawn = Drawn()
        jobs: list[Job] = []
        trajectories: list[Trajectory] = []
        with self.timers("gen"):
            while (
                drawn.num_batches < most
                and len({job.uid for job in jobs}) < config.data.train_batch_size
            ):
                more = self.roll_out(drawn)
                more = differing_groups(*more, filters.metric) if filters.enable else more
                jobs = jobs + more[0]
                trajectories = trajectories + more[1]
        with self.timers("save_checkpoint"):
            self.checkpoints.complete()
        with self.timers("prepare"):
            return self.prepare(
                *first_groups(jobs, trajectories, config.data.train_batch_size), drawn
            )

    def prepare(self, jobs: list[Job], trajectories: list[Trajectory], drawn: Drawn) -> DataProto:
        """What `fit` trains on, of all that was `drawn`; writes trajectories and their metrics."""
        config = self.config
        if not trajectories:
            raise NothingToLearn(drawn.nothing_left(config.algorithm.filter_groups))
        self.metrics |= (
            drawn.metrics()
            | rollout_metrics(drawn.surviving)
            | self.agent.reduce_metrics(drawn.surviving)
        )
        if (
            config.trainer.rollout_data_freq > 0
            and self.step % config.trainer.rollout_data_freq == 0
        ):
            self.tracking.log_trajectories(
                "train", trajectory_records(jobs, trajectories, self.tokenizer), self.step
            )
        batch = build_batch(
            jobs,
            trajectories,
            pad_token_id=self.tokenizer.pad_token_id,
            num_mini_batches=config.num_mini_batches,
            world_size=self.world_size,
            state_masking=config.actor_rollout_ref.actor.state_masking,
        )
        self.metrics |= staleness_metrics(batch, self.rollout.version)
        return batch

    def roll_out(self, drawn: Drawn) -> tuple[list[Job], list[Trajectory]]:
        """The trajectories of the next batch of prompts, those that failed left out; adds all of
        them to `drawn`."""
        config = self.config
        jobs, results = self.ahead.next(self.total - self.step + 1)
        min_group = 2 if config.uses_groups else 1
        results = score_groups(self.reward, jobs, results, min_group)
        check_failures(results, config.trainer.max_failed_share)
        jobs, trajectories, dropped = surviving(jobs, results, min_group)
        drawn.add(results, trajectories, dropped)
        return jobs, trajectories

    def sleep(self) -> None:
        """Frees the engines' memory for the update."""
        with self.timers("sleep"):
            self.rollout.sleep()

    def old_log_prob(self, batch: DataProto) -> DataProto:
        with self.timers("old_log_prob"):
            return self.compare(batch.union(self.actor.compute_log_prob(batch)))

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
        self.keep_nonfinite("critic", batch, metrics)
        self.metrics |= {f"critic/{k}": v for k, v in metrics.items()}

    def update_actor(self, batch: DataProto) -> None:
        if self.step <= self.config.trainer.critic_warmup:
            return
        with self.timers("correct"):
            batch, shares = filter_loss(batch, self.config.algorithm.loss_filters)
            batch, mismatch = correct_rollout(batch, self.config.algorithm.rollout_correction)
        self.metrics |= shares | mismatch
        if not batch.batch["response_mask"].any():
            self.tracking.message(
                f"step {self.step}: loss filters and rollout correction left nothing to train on"
            )
            return
        with self.timers("update_actor"):
            metrics = self.actor.update_actor(batch)
        self.keep_nonfinite("actor", batch, metrics)
        self.metrics |= {f"actor/{k}": v for k, v in metrics.items()}

    def check_finite(self) -> None:
        """Raises TrainingDiverged when an optimizer step was skipped in `trainer.max_skipped_steps`
        steps in a row."""
        skipped = any(self.metrics.get(f"{role}/skipped_steps") for role in ("actor", "critic"))
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        if self.skipped_in_a_row >= self.config.trainer.max_skipped_steps:
            raise TrainingDiverged(
                f"loss or gradient was not finite in {self.skipped_in_a_row} training steps in a "
                "row (trainer."
                "max_skipped_steps): lower the learning rate (of the critic too), then run again "
                "to resume"
            )

    def keep_nonfinite(self, role: str, batch: DataProto, metrics: dict[str, float]) -> None:
        """Writes the batch to the run folder when an optimizer step was skipped, to reproduce what
        happened."""
        if metrics["skipped_steps"]:
            where = self.tracking.keep(batch, f"nonfinite/{role}_{self.step:06d}.pt")
            self.tracking.message(
                f"step {self.step}: loss or gradient of the {role} not finite, "
                f"{metrics['skipped_steps']:.0f} "
                f"optimizer step(s) skipped; the batch {where}"
            )

    def sync_weights(self) -> None:
        # an engine that is replaced while the others settle takes these weights already
        self.rollout.version += 1
        with self.timers("settle"):
            self.ahead.settle()
        with self.timers("update_weights"):
            self.rollout.update_weights(self.rollout.version)

    def watch(self, batch: DataProto) -> Alarm | None:
        """Adds the figures of the batch, and asks the collapse watch about all of the step's."""
        self.metrics |= compute_data_metrics(batch, self.config.data.max_prompt_length)
        alarm = self.collapse_watch.observe(self.step, self.metrics)
        if self.collapse_response == "roll_back":
            moved = min(self.collapse_watch.since.values(), default=self.step + 1)
            # What a step shows was rolled out by the weights of the step before, or of older ones.
            self.checkpoints.suspect_from = moved - 1 - self.config.async_training.max_staleness
        return alarm

    def validate(self) -> None:
        """Rolls out every held-out question under the present weights.

        Engines of its own go on with it while the next steps are trained; otherwise this waits for
        the result.
        """
        with self.timers("testing"):
            self.finish_validation()
            if self.val_rollout is not self.rollout:
                self.val_rollout.update_weights(self.rollout.version)
            self.validating = (
                self.step,
                validation.submit(self.config, self.val_set, self.val_rollout),
            )
            self.checkpoints.awaited = self.step
            if self.val_rollout is self.rollout or self.step == 0:
                self.finish_validation()

    def finish_validation(self) -> None:
        """Waits for the validation under way, if there is one; writes all its trajectories and
        `val/` metrics."""
        if self.validating is None:
            return
        (step, submitted) = self.validating
        self.validating = None
        jobs, results = self.val_rollout.collect(submitted)
        metrics, records = validation.score(self.config, jobs, results, self.agent, self.tokenizer)
        self.tracking.log_trajectories("val", records, step)
        self.tracking.message(
            f"step {step}: "
            + "  ".join(f"{k} {v:.3f}" for k, v in sorted(metrics.items()) if "test_score" in k)
        )
        self.checkpoints.score(step, metrics)
        if step == self.step and self.metrics:  # its line is not written yet
            self.metrics |= metrics
        else:
            self.tracking.log(metrics, step)

    def log(self, batch: DataProto, seconds_per_step: float) -> None:
        """Writes the step's metrics and one line on the console."""
        if self.validating is not None and self.val_rollout.is_done(self.validating[1]):
            self.finish_validation()
        timing = self.timers.pop()
        metrics = (
            self.metrics | timing | compute_throughput_metrics(batch, timing, self.config.num_gpus)
        )
        epoch = self.ahead.sampler.epoch
        version = self.rollout.version
        metrics |= {"training/epoch": float(epoch), "training/policy_version": float(version)}
        self.tracking.log(metrics, self.step)
        self.metrics = {}
        self.tracking.message(
            console_line(
                metrics, self.step, self.total, (self.total - self.step) * seconds_per_step
            )
        )

    def respond(self, alarm: Alarm) -> None:
        """Keeps the state of the alarm, and does what `trainer.collapse_watch.response` says.

        Raises TrainingCollapsed when the run is to end, or there is nothing left to roll back to.
        """
        config = self.config.trainer.collapse_watch
        rolled_back = len(self.checkpoints.roll_backs())
        name = f"step_{self.step}" + (f"-{rolled_back}" if rolled_back else "")
        folder = self.tracking.run_dir / "alarms" / name
        self.tracking.message(
            f"{alarm.message()}\nresponse: {config.response}; the state is in {folder}"
        )
        try:
            self.checkpoints.snapshot(folder, self.state_dict())
            (folder / "alarm.txt").write_text(alarm.message() + "\n")
        except (CheckpointError, OSError) as error:
            self.tracking.message(f"the state of the alarm could not be written: {error}")
        if config.response == "continue":
            return
        if config.response == "stop" or rolled_back >= config.max_roll_backs:
            raise TrainingCollapsed(
                f"{alarm.message()}\nafter {rolled_back} roll-backs; the state is in {folder}"
            )
        self.roll_back(alarm, folder)

    def roll_back(self, alarm: Alarm, folder: Path) -> None:
        """Goes on from the newest checkpoint whose rollouts showed no signal, with a lower learning
        rate."""
        factor = self.config.trainer.collapse_watch.lr_factor
        healthy = self.checkpoints.rewind(alarm.step, factor)
        if healthy is None:
            raise TrainingCollapsed(f"{alarm.message()}\nno checkpoint is old enough to be healthy")
        self.validating = None
        truncate_metrics(str(self.tracking.run_dir), healthy, moved_to=folder / "metrics.jsonl")
        self.sleep()
        self.load_checkpoint(healthy)
        self.sync_weights()
        self.tracking.message(f"rolled back to step {healthy}; learning rates times {factor}")

    def finish(self) -> None:
        """Writes what is still under way: a validation (after a request to stop, the resumed
        run's), the last step."""
        if not self.stop.requested:
            self.finish_validation()
        with self.timers("save_checkpoint"):
            self.checkpoints.complete()
        if self.checkpoints.newest < self.step and not self.config.trainer.val_only:
            self.save_checkpoint()
        with self.timers("save_checkpoint"):
            self.checkpoints.complete(must_succeed=True)

    def state_dict(self) -> dict[str, Any]:
        """What resuming needs beside the states of the workers: values that JSON holds."""
        return {
            "config": self.config.model_dump(mode="json"),
            "questions": self.questions,
            "step": self.step,
            "sampler": self.ahead.state_dict(),
            "kl": self.kl_ctrl.value,
            "watch": self.collapse_watch.state_dict(),
            "skipped_in_a_row": self.skipped_in_a_row,
            "version": self.rollout.version,
            "validating": self.validating is not None,
            "wandb": self.tracking.wandb_id,
        }

    def save_checkpoint(self, alarm: Alarm | None = None) -> None:
        """Writes everything that resuming needs, then names it the newest.

        Not in a step with an alarm that is to be answered: a run that dies before would resume as
        if it had been.
        """
        if alarm is not None and self.collapse_response != "continue":
            return
        if self.validating is not None and self.validating[0] < self.step:
            with self.timers("testing"):
                # its weights are in no checkpoint that the run would resume from
                self.finish_validation()
        with self.timers("save_checkpoint"):
            self.checkpoints.save(self.step, self.state_dict())

    def load_checkpoint(self, step: int) -> None:
        """Goes on after `step`, of which there is a checkpoint: with its state, and with the
        present configuration."""
        state = self.checkpoints.load(step)
        self.step = state["step"]
        self.skipped_in_a_row = state["skipped_in_a_row"]
        self.ahead.load_state_dict(state["sampler"])
        restore_kl(
            self.kl_ctrl,
            self.config.algorithm,
            state["config"]["algorithm"]["kl_ctrl"],
            state["kl"],
        )
        self.collapse_watch.load_state_dict(state["watch"])
        done = validation.recorded(self.tracking.run_dir, step)
        self.checkpoints.score(step, done)
        self.validating_again = state["validating"] and not done
        # the sync that follows brings the version of the saved weights
        self.rollout.version = state["version"] - 1
        self.tracking.message(f"resuming after step {self.step}")
