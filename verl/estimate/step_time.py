"""Seconds of a training step, verb by verb, computed from stated assumptions.

    python -m verl.trainer.step_time --config-name grpo \
        experiment=nq_hotpotqa/qwen2.5-3b-grpo --gpu h100

Every verb is printed with its formula; every assumption is a flag. The figures are computed, not
measured. They are there to judge a first run by: if it is several times slower, something is wrong,
and the timer `timing_s/...` of the slow verb says where. Needs no GPU, and of the model only its
Hugging Face config.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from types import SimpleNamespace
from typing import NamedTuple

from verl.estimate.assumptions import ASSUMPTIONS, GPUS, Gpu, card
from verl.estimate.engine_memory import engine_memory
from verl.estimate.flops import forward_flops, layer_flops, update_flops
from verl.estimate.memory import WIDTH, Role
from verl.estimate.sizing import (
    Longest,
    add_arguments,
    answer,
    load_config,
    load_shapes,
    longest_trajectory,
    num_replicas,
    roles_of,
)
from verl.trainer.config import PPOConfig
from verl.utils.errors import ConfigError
from verl.workers.config import ActorConfig, CriticConfig

PROGRAM = "python -m verl.trainer.step_time"


class Verb(NamedTuple):
    """A part of the step."""

    name: str
    """The name of its timer."""
    seconds: float
    formula: str
    """How the seconds are computed, as text."""


class Batch(NamedTuple):
    """Trajectories that are rolled out together."""

    trajectories: int
    prompts: int


@dataclass(frozen=True)
class StepTime:
    """Computes the verbs of a step."""

    config: PPOConfig
    roles: Sequence[Role]
    longest: Longest
    gpu: Gpu
    a: SimpleNamespace
    """The assumptions by name (ASSUMPTIONS)."""

    @property
    def world(self) -> int:
        """Ranks of the training."""
        return self.roles[0].world

    @property
    def mean_tokens(self) -> float:
        """Tokens of a trajectory, on average."""
        observed = self.a.searches * self.a.observed_tokens
        return self.a.prompt_tokens + self.a.written_tokens + observed

    @property
    def batch(self) -> Batch:
        """The trajectories of a training step."""
        prompts = self.config.data.train_batch_size
        return Batch(prompts * self.config.actor_rollout_ref.rollout.n, prompts)

    @property
    def rolled_out(self) -> Batch:
        """What is rolled out for a step: with ReMax a greedy trajectory of each prompt as well."""
        batch = self.batch
        greedy = batch.prompts if self.config.uses_greedy else 0
        return Batch(batch.trajectories + greedy, batch.prompts)

    @property
    def tokens(self) -> float:
        """Tokens of a batch."""
        return self.batch.trajectories * self.mean_tokens

    @property
    def trained_tokens(self) -> float:
        """Tokens of a batch that are trained on."""
        if not self.config.actor_rollout_ref.actor.state_masking:
            return self.batch.trajectories * (self.mean_tokens - self.a.prompt_tokens)
        return self.batch.trajectories * self.a.written_tokens

    def engine_rate(self, running: float, context: float) -> float:
        """Decoded tokens/s of one engine with `running` trajectories of `context` tokens.

        A decoding step takes as long as the slower of two things: reading the weights and the keys
        and values of the running contexts, or computing the matrix products.
        """
        rollout = self.config.actor_rollout_ref.rollout
        tp = rollout.tensor_model_parallel_size
        if self.a.engine_tokens_per_s and running > 1:
            return self.a.engine_tokens_per_s * tp
        sizes = self.roles[0].sizes
        share = engine_memory(sizes, rollout, self.gpu.memory)
        read = share.weights + running * context * share.kv_bytes_per_token
        reading = read / (self.gpu.bandwidth * self.a.bandwidth_efficiency)
        flops = forward_flops(sizes, running, running, context) / tp
        computing = flops / (self.gpu.flops * self.a.prefill_efficiency)
        return running / (max(reading, computing) + self.a.engine_step_ms / 1000)

    def rollout_seconds(self, batch: Batch) -> tuple[float, str]:
        """Seconds to roll out a batch, and the formula.

        The slower of engines and retriever sets the time for the batch. The longest trajectory,
        which runs alone at the end, is added.
        """
        decode, decoding = self.decode_seconds(batch)
        prefill = self.prefill_seconds(batch)
        searches = batch.trajectories * self.a.searches
        searching = searches / self.a.retriever_queries_per_s
        last, longest = self.longest_seconds()
        formula = (
            f"max(decode {decode:.1f} [{decoding}] + prefill {prefill:.1f}, searches "
            f"{searching:.1f} [{searches:,.0f} at {self.a.retriever_queries_per_s:g}/s]) + longest "
            f"trajectory alone {last:.1f} [{longest}]"
        )
        return max(decode + prefill, searching) + last, formula

    def decode_seconds(self, batch: Batch) -> tuple[float, str]:
        """Seconds in which the engines write a batch, with as many trajectories at once as fit."""
        rollout = self.config.actor_rollout_ref.rollout
        replicas = num_replicas(self.config)
        share = engine_memory(self.roles[0].sizes, rollout, self.gpu.memory)
        room = share.kv_tokens / self.mean_tokens
        running = max(1.0, min(batch.trajectories / replicas, rollout.max_num_seqs, room))
        rate = self.engine_rate(running, self.mean_tokens)
        seconds = batch.trajectories * self.a.written_tokens / (replicas * rate)
        rate_of_gpu = rate / rollout.tensor_model_parallel_size
        return seconds, f"{running:.0f} at once, {rate_of_gpu:,.0f} tokens/s a GPU"

    def prefill_seconds(self, batch: Batch) -> float:
        """Seconds in which the engines read passages, and each prompt once (prefix cache)."""
        passages = self.a.searches * self.a.observed_tokens * batch.trajectories
        read = passages + self.a.prompt_tokens * batch.prompts
        flops = layer_flops(self.roles[0].sizes, read, self.mean_tokens)
        tp = self.config.actor_rollout_ref.rollout.tensor_model_parallel_size
        gpus = num_replicas(self.config) * tp
        return flops / (gpus * self.gpu.flops * self.a.prefill_efficiency)

    def longest_seconds(self) -> tuple[float, str]:
        """Seconds of the longest trajectory on an engine of its own, its searches included."""
        longest = self.longest
        rate = self.engine_rate(1.0, longest.tokens)
        turns = longest.turns if longest.turns is not None else ceil(self.a.searches)
        seconds = longest.written / rate + turns * self.a.search_latency_s
        return seconds, f"{longest.written:,} tokens at {rate:,.0f}/s"

    def passes(self, limit: int, mini_batches: int) -> int:
        """Micro-batches of a rank that hold `limit` tokens each."""
        per_mini_batch = self.tokens / self.world / mini_batches
        return mini_batches * ceil(per_mini_batch / max(limit, self.mean_tokens))

    def computing(self, flops: float) -> tuple[float, str]:
        """Seconds that all ranks together need for `flops`, and the formula."""
        efficiency = self.a.train_efficiency
        seconds = flops / (self.world * self.gpu.flops * efficiency)
        peak = self.gpu.flops / 1e12
        formula = f"{flops:.2e} FLOP / ({self.world} x {peak:g} TFLOP/s x {efficiency:g})"
        return seconds, formula

    def forward(self, name: str, role: Role, limit: int) -> Verb:
        """A verb that is one forward pass over the batch."""
        flops = forward_flops(role.sizes, self.tokens, self.trained_tokens, self.mean_tokens)
        seconds, formula = self.computing(flops)
        if role.fsdp.param_offload:
            moved = self.passes(limit, 1) * shard_bytes(role) / (self.a.pcie_gb_per_s * 1e9)
            seconds += moved
            formula += f" + parameters from the host {moved:.1f}"
        return Verb(name, seconds, formula)

    def update(self, name: str, role: Role, section: ActorConfig | CriticConfig) -> Verb:
        """A verb that is forward and backward passes over the batch, and the optimizer's steps."""
        epochs = section.ppo_epochs
        flops = epochs * update_flops(role, self.tokens, self.trained_tokens, self.mean_tokens)
        seconds, formula = self.computing(flops)
        mini_batches = self.batch.trajectories // section.ppo_mini_batch_size
        steps = epochs * mini_batches
        fsdp = role.fsdp
        state = WIDTH[fsdp.model_dtype] * role.trained / role.world
        if fsdp.param_offload:
            count = epochs * self.passes(section.ppo_max_token_len_per_gpu, mini_batches)
            gathers = 2 if fsdp.reshard_after_forward else 1
            moved = count * (gathers * shard_bytes(role) + state) / (self.a.pcie_gb_per_s * 1e9)
            adamw = steps * 7 * state / (self.a.host_adamw_gb_per_s * 1e9)
            formula += (
                f" + to and from the host {moved:.1f} + {steps} AdamW on the host {adamw:.1f}"
            )
        else:
            moved = 0.0
            adamw = steps * 7 * state / (self.gpu.bandwidth * self.a.bandwidth_efficiency)
            formula += f" + {steps} AdamW {adamw:.1f}"
            if fsdp.optimizer_offload:
                moved = 2 * 2 * state / (self.a.pageable_gb_per_s * 1e9)
                formula += f" + optimizer state to and from the host {moved:.1f}"
        return Verb(name, seconds + moved + adamw, formula)

    def sync(self) -> Verb:
        """The verb that brings the weights to the engines.

        They are gathered in the masters' dtype, then handed over on the same GPU.
        """
        actor = self.roles[0]
        size = actor.sizes.params * WIDTH[actor.fsdp.model_dtype] * (self.world - 1) / self.world
        seconds = size / (self.a.nvlink_gb_per_s * 1e9) + self.a.sync_overhead_s
        formula = (
            f"{size / 1e9:.1f} GB / {self.a.nvlink_gb_per_s:g} GB/s + {self.a.sync_overhead_s:g}"
        )
        if actor.fsdp.param_offload:
            moved = shard_bytes(actor) / (self.a.pcie_gb_per_s * 1e9)
            seconds += moved
            formula += f" + parameters from the host {moved:.1f}"
        return Verb("update_weights", seconds, formula)

    def verbs(self) -> list[Verb]:
        """The step, in the order of `RayPPOTrainer.fit`."""
        main = self.config.actor_rollout_ref
        by_name = {role.name: role for role in self.roles}
        actor = by_name["actor"]
        found = [
            Verb("gen", *self.rollout_seconds(self.rolled_out)),
            self.forward("old_log_prob", actor, main.rollout.log_prob_max_token_len_per_gpu),
        ]
        for name, section in {"ref": main.ref, "teacher": self.config.teacher}.items():
            if name in by_name:
                found.append(
                    self.forward(name, by_name[name], section.log_prob_max_token_len_per_gpu)
                )
        if "critic" in by_name:
            critic = by_name["critic"]
            found.append(
                self.forward("values", critic, self.config.critic.ppo_max_token_len_per_gpu)
            )
            found.append(self.update("update_critic", critic, self.config.critic))
        found += [
            self.update("update_actor", actor, main.actor),
            self.sync(),
            Verb("sleep", self.a.sleep_wake_s, "stated: sleep, and waking within update_weights"),
            Verb("prepare, adv", self.a.driver_s, "stated"),
        ]
        return found

    def validation(self, questions: int) -> Verb:
        """One validation: a rollout of as many trajectories as it has questions and answers."""
        rows = questions * self.config.actor_rollout_ref.rollout.val_kwargs.n
        return Verb("testing", *self.rollout_seconds(Batch(rows, questions)))


def shard_bytes(role: Role) -> float:
    """Bytes of a rank's part of the weights."""
    return WIDTH[role.fsdp.model_dtype] * role.sizes.params / role.world


def num_validations(config: PPOConfig) -> int:
    """Validations of a whole run: before training, every `test_freq` steps, and after the last."""
    trainer = config.trainer
    steps = trainer.total_training_steps or 0
    regular = steps // trainer.test_freq if trainer.test_freq > 0 else 0
    last = trainer.test_freq <= 0 or steps % trainer.test_freq > 0
    return int(trainer.val_before_train) + regular + int(last)


def refuse_other_schedules(config: PPOConfig) -> None:
    """Raises ConfigError where the verbs of a step do not follow each other."""
    rollout = config.actor_rollout_ref.rollout
    if not config.actor_rollout_ref.hybrid_engine or rollout.name != "vllm":
        raise ConfigError(
            [
                "step time is computed for engines on the trainer's GPUs alone "
                "(actor_rollout_ref.hybrid_engine=true, rollout.name=vllm): elsewhere rollout and "
                "update overlap"
            ]
        )


def report(found: StepTime, questions: int | None) -> str:
    """The verbs, their sum, and the hours of the run, as text.

    `questions`: number of validation questions; None: `data.val_data_num`.
    """
    verbs = found.verbs()
    step = sum(verb.seconds for verb in verbs)
    config = found.config
    trained = found.trained_tokens / found.tokens
    per_gpu = found.tokens / step / found.world
    lines = [
        f"{config.actor_rollout_ref.model.path} on {found.world} GPUs: "
        f"{found.batch.trajectories:,} trajectories of {found.mean_tokens:,.0f} tokens, "
        f"{trained:.0%} of them trained; computed, not measured",
        *(line(verb.name, verb.seconds, verb.formula) for verb in verbs),
        line("step", step, f"{per_gpu:,.0f} tokens/s a GPU (perf/throughput)"),
    ]
    questions = config.data.val_data_num if questions is None else questions
    validation = found.validation(questions) if questions else None
    if validation is not None:
        formula = f"{questions:,} questions: {validation.formula}"
        lines.append(line(validation.name, validation.seconds, formula))
    if config.trainer.total_training_steps:
        lines.append(hours(config, step, validation))
    return "\n".join(lines) + "\n"


def line(name: str, seconds: float, formula: str) -> str:
    """One row of the report."""
    return f"{name:16}{seconds:8.1f} s  {formula}"


def hours(config: PPOConfig, step: float, validation: Verb | None) -> str:
    """The hours of the whole run, whose steps take `step` seconds each."""
    steps = config.trainer.total_training_steps or 0
    count = num_validations(config)
    training = steps * step / 3600
    testing = count * validation.seconds / 3600 if validation else 0.0
    what = "validations not counted (--val-questions)"
    if validation:
        what = f"{count} validations {testing:.1f} h"
    return (
        f"{steps:,} steps {training:.1f} h, {what}: {training + testing:.1f} h; "
        "checkpoints not counted"
    )


def build_parser(prog: str = PROGRAM) -> argparse.ArgumentParser:
    """The flags of the command: each assumption is one."""
    parser = argparse.ArgumentParser(
        prog,
        description=(__doc__ or "").replace(PROGRAM, prog),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    parser.add_argument(
        "--gpu", choices=GPUS, default="h100", help="card, for peak FLOP/s and memory bandwidth"
    )
    parser.add_argument(
        "--val-questions", type=int, help="questions of a validation (default: data.val_data_num)"
    )
    for name, (default, meaning) in ASSUMPTIONS.items():
        flag = "--" + name.replace("_", "-")
        parser.add_argument(
            flag, type=float, default=default, help=f"{meaning} (default: {default:g})"
        )
    return parser


def step_time(args: argparse.Namespace) -> StepTime:
    """Computes what the command line asks for. Raises ConfigError or an error of Hydra."""
    config = load_config(args.config_name, args.overrides)
    refuse_other_schedules(config)
    longest = longest_trajectory(config)
    roles = roles_of(config, longest, load_shapes(args.shapes))
    assumptions = SimpleNamespace(**{name: getattr(args, name) for name in ASSUMPTIONS})
    return StepTime(config, roles, longest, card(args.gpu, args.gpu_memory_gb), assumptions)


def main(argv: Sequence[str] | None = None, prog: str = PROGRAM) -> int:
    """Prints the step; the exit status is 0, or 2 where the configuration cannot work."""
    args, found = answer(build_parser(prog), argv, step_time)
    sys.stdout.write(report(found, args.val_questions))
    return 0
