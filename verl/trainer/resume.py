"""What a run may change of its configuration when it is resumed.

A checkpoint holds the state that a run has reached: weights, moments of the optimizer, steps, the
position in the data. Everything else comes from the configuration, so a changed key takes effect by
itself, and is logged. A change is refused if it would silently give a saved number another meaning.
The tables below decide about every field of every section; a test finds a field that is missing.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verl.agent import Row
from verl.trainer import config as trainer_config
from verl.trainer.config import PPOConfig
from verl.trainer.ppo.checkpoints import read_state
from verl.trainer.ppo.collapse import CollapseWatchConfig
from verl.trainer.ppo.gate import GateConfig
from verl.utils.config import Config
from verl.utils.dataset import questions_digest
from verl.utils.errors import ConfigError
from verl.utils.model_names import full_path
from verl.workers import config as workers_config

ORDER = "the place in the data that it holds is one in the order that this key draws"
WEIGHTS = "its weights are those of that model"
TOKENS = "its weights have learned the tokens of that tokenizer"
ADAPTERS = "its adapters are of that shape"
SCALE = "its adapters were trained at that scale: another one makes another policy of them"

FIXED: dict[type[Config], dict[str, str]] = {
    trainer_config.DataConfig: {"shuffle_train_dataloader": ORDER},
    trainer_config.TrainerConfig: {"seed": ORDER},
    workers_config.ModelConfig: {
        "path": f"{WEIGHTS} (where only its folder was moved, a link at the old path will do)",
        "tokenizer_path": TOKENS,
        "lora_rank": ADAPTERS,
        "lora_alpha": SCALE,
        "target_modules": ADAPTERS,
        "override_config": WEIGHTS,
    },
}
"""Keys that must not change, and why."""

WITHOUT_MEANING: dict[type[Config], list[str]] = {
    # Instead of these the training questions themselves are compared.
    trainer_config.DataConfig: ["train_files", "train_data_num", "train_sample_seed", "made_by"],
    trainer_config.TrainerConfig: [
        "project_name",
        "experiment_name",
        "default_local_dir",
        "logger",
        "alert_webhook_env",
        "resume_mode",
    ],
    # An endpoint is evaluated, never trained.
    workers_config.OpenAIConfig: [
        "url",
        "api_key_env",
        "timeout_s",
        "max_retries",
        "backoff_s",
        "max_concurrent",
        "api",
        "max_tokens_key",
        "extra_body",
    ],
}
"""Keys that concern a single start; a change is not logged."""

TAKES_EFFECT: dict[type[Config], list[str]] = {
    trainer_config.DataConfig: [
        "val_files",
        "val_data_num",
        "val_sample_per_source",
        "val_sample_seed",
        "train_batch_size",  # the place in the data is a number of questions, not of batches
        "source_weights",  # unless there were none: see check_resume
        "max_start_length",
        "max_prompt_length",
        "max_response_length",
        "max_obs_length",
        "apply_chat_template_kwargs",
    ],
    GateConfig: ["rest_solved", "rest_unsolved", "metric", "solved_at"],
    trainer_config.KLControlConfig: [
        "type",
        "kl_coef",
        "horizon",
        "target_kl",
    ],  # see advantage.restore_kl
    trainer_config.InformationGainConfig: ["weight", "before", "answer"],
    trainer_config.FilterGroupsConfig: ["enable", "metric", "max_num_gen_batches"],
    trainer_config.RolloutCorrectionConfig: [
        "rollout_is",
        "rollout_is_threshold",
        "rollout_rs",
        "rollout_rs_threshold",
        "rollout_rs_threshold_lower",
        "rollout_token_veto_threshold",
        "bypass_mode",
    ],
    trainer_config.AlgorithmConfig: [
        "adv_estimator",  # unless it needs a critic that the checkpoint lacks
        "gamma",
        "lam",
        "norm_adv_by_std_in_grpo",
        "step_advantage_w",
        "loss_filters",
        "use_kl_in_reward",
        "kl_penalty",
    ],
    trainer_config.AsyncTrainingConfig: ["max_staleness", "partial_rollout"],
    trainer_config.TrainerConfig: [
        "total_epochs",
        "total_training_steps",
        "critic_warmup",
        "panels",
        "device",
        "nnodes",
        "n_gpus_per_node",
        "threads_per_rank",
        "ray_address",
        "val_before_train",
        "val_only",
        "test_freq",
        "save_freq",
        "max_ckpt_to_keep",
        "best_metric",
        "async_save",
        "deterministic",
        "save_hf",
        "rollout_data_freq",
        "max_failed_share",
        "max_skipped_steps",
        "max_restarts",
        "hang_timeout_s",
    ],
    trainer_config.TrajectoryRecordsConfig: ["tokens", "prompts"],
    CollapseWatchConfig: [
        "signals",
        "min_signals",
        "patience",
        "min_history",
        "window",
        "response",
        "lr_factor",
        "max_roll_backs",
    ],
    trainer_config.CustomRewardConfig: ["path", "name"],
    PPOConfig: ["agent", "reward"],  # all their keys: a checkpoint holds nothing of a task
    workers_config.FrozenModelConfig: [
        "path",
        "trust_remote_code",
        "use_torch_compile",
        "pack_rows",
        "reads_images",
        "override_config",
    ],
    workers_config.ModelConfig: [
        "trust_remote_code",
        "enable_gradient_checkpointing",
        "use_torch_compile",
        "pack_rows",
        "reads_images",
        "override_config.attn_implementation",
    ],
    workers_config.OptimConfig: [
        "lr",
        "betas",
        "weight_decay",
        "lr_warmup_steps_ratio",
        "lr_scheduler_type",
        "min_lr_ratio",
    ],
    workers_config.FSDPConfig: [
        "param_offload",
        "optimizer_offload",
        "reshard_after_forward",
        "model_dtype",
        "dtype",
    ],
    workers_config.PolicyLossConfig: ["loss_mode", "llds_coef"],
    workers_config.ActorConfig: [
        "ppo_mini_batch_size",
        "ppo_micro_batch_size_per_gpu",
        "ppo_max_token_len_per_gpu",
        "ppo_epochs",
        "clip_ratio",
        "clip_ratio_low",
        "clip_ratio_high",
        "clip_ratio_c",
        "loss_agg_mode",
        "loss_scale_factor",
        "entropy_coeff",
        "use_kl_loss",
        "kl_loss_coef",
        "kl_loss_type",
        "grad_clip",
        "state_masking",
    ],
    workers_config.RefConfig: [
        "log_prob_micro_batch_size_per_gpu",
        "log_prob_max_token_len_per_gpu",
    ],
    workers_config.TeacherConfig: [
        "log_prob_micro_batch_size_per_gpu",
        "log_prob_max_token_len_per_gpu",
        "weight",
    ],
    workers_config.CriticConfig: [
        "ppo_mini_batch_size",
        "ppo_micro_batch_size_per_gpu",
        "ppo_max_token_len_per_gpu",
        "ppo_epochs",
        "cliprange_value",
        "loss_agg_mode",
        "grad_clip",
    ],
    workers_config.ValSamplingConfig: ["temperature", "top_p", "top_k", "n"],
    workers_config.RolloutConfig: [
        "temperature",
        "top_p",
        "top_k",
        "n",
        "name",
        "dtype",
        "nnodes",
        "n_gpus_per_node",
        "num_replicas",
        "num_val_replicas",
        "tensor_model_parallel_size",
        "gpu_memory_utilization",
        "cpu_kvcache_gb",
        "cpu_threads",
        "enforce_eager",
        "max_model_len",
        "max_num_seqs",
        "max_num_batched_tokens",
        "enable_prefix_caching",
        "load_format",
        "engine_kwargs",
        "log_prob_micro_batch_size_per_gpu",
        "log_prob_max_token_len_per_gpu",
        "num_agent_workers",
        "per_request_seed",
    ],
    workers_config.BranchesConfig: ["rounds", "per_round"],
    workers_config.ActorRolloutRefConfig: ["hybrid_engine"],
}
"""Keys that take effect in a resumed run as they are configured; a change is logged."""


@dataclass(frozen=True)
class Change:
    """A value of the configuration that has changed since the checkpoint was written."""

    section: type[Config]
    field: str
    """Name within the section; with the names of entries where the field is a mapping."""
    key: str
    old: object
    new: object

    def __str__(self) -> str:
        return f"{self.key}: {json.dumps(self.old)} -> {json.dumps(self.new)}"

    @property
    def is_told(self) -> bool:
        return self.field.partition(".")[0] not in WITHOUT_MEANING.get(self.section, [])

    @property
    def refusal(self) -> str | None:
        """Why the run cannot go on with the change; None if it can."""
        if self.field in TAKES_EFFECT.get(self.section, []):
            return None
        return FIXED.get(self.section, {}).get(self.field.partition(".")[0])


def check_resume(folder: Path, config: PPOConfig, questions: Sequence[Row]) -> list[Change]:
    """The changes of `config` since the checkpoint in `folder`, all of which take effect.

    Raises ConfigError listing changes that are refused, and CheckpointError when the checkpoint
    cannot be read.
    """
    saved = read_state(folder)
    changes = changes_since(saved["config"], config)
    problems = [
        f"{change.key}={json.dumps(change.new)}: {folder} was saved with {json.dumps(change.old)}, "
        f"and {change.refusal}"
        for change in changes
        if change.refusal
    ]
    estimator = saved["config"]["algorithm"]["adv_estimator"]
    if config.use_critic and not had_critic(saved["config"]):
        problems.append(
            f"algorithm.adv_estimator=gae: {folder} was saved with {estimator}, and holds no critic"
        )
    was_mixed = bool(saved["config"]["data"].get("source_weights"))
    if was_mixed != bool(config.data.source_weights):
        problems.append(
            f"data.source_weights: {folder} was saved {'with' if was_mixed else 'without'} weights "
            "of sources, and the place in the data that it holds is one in the order of "
            f"{'each source' if was_mixed else 'all questions'}"
        )
    if questions_digest(questions) != saved["questions"]:
        problems.append(
            f"data.train_files, data.train_data_num: {folder} was saved with other training "
            "questions (or the same in another order), and the place in the data that it holds is "
            "one among them"
        )
    if problems:
        cure = (
            "put back what was changed, or begin a run in another folder "
            "(trainer.default_local_dir), from an export of this one's policy if it is to go on "
            "from there (actor_rollout_ref.model.path=.../hf)"
        )
        raise ConfigError([*problems, cure])
    return [change for change in changes if change.is_told]


def changes_since(saved: dict[str, Any], config: PPOConfig) -> list[Change]:
    """Every value in which `config` differs from `saved`, the configuration of a checkpoint.

    A key that only one of them has belongs to another version of the code, and is no change. The
    critic's section is compared only if both runs have a critic, and the teacher's only if this run
    has one, or had one.
    """
    present = config.model_dump(mode="json")
    without: list[str] = []
    if not (config.use_critic and had_critic(saved)):
        without.append("critic.")
    if not (config.use_teacher or had_teacher(saved)):
        without.append("teacher.")
    changes = _changes(PPOConfig, saved, present, "")
    return [change for change in changes if not change.key.startswith(tuple(without))]


def had_critic(saved: dict[str, Any]) -> bool:
    """Whether the run of a saved configuration had a critic."""
    return saved["algorithm"]["adv_estimator"] == "gae"


def had_teacher(saved: dict[str, Any]) -> bool:
    """Whether the run of a saved configuration had a teacher."""
    return saved.get("teacher", {}).get("weight", 0) > 0


def _changes(
    section: type[Config], old: dict[str, Any], new: dict[str, Any], prefix: str
) -> Iterator[Change]:
    for name, field in section.model_fields.items():
        if name not in old:
            continue
        nested = field.annotation
        if isinstance(nested, type) and issubclass(nested, Config):
            yield from _changes(nested, old[name], new[name], f"{prefix}{name}.")
            continue
        for path, before, after in unequal(old[name], new[name], name):
            yield Change(section, path, f"{prefix}{path}", before, after)


def unequal(old: object, new: object, path: str) -> Iterator[tuple[str, Any, Any]]:
    """(path, old, new) of the values that differ, entry by entry in mappings.

    A missing entry counts as null.
    """
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from unequal(old.get(key), new.get(key), f"{path}.{key}")
    elif old != new and not same_place(old, new):
        yield path, old, new


def same_place(old: object, new: object) -> bool:
    """Whether both name the same file or folder, such as a relative and an absolute path."""
    return isinstance(old, str) and isinstance(new, str) and full_path(old) == full_path(new)
