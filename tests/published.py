"""The command lines that the original Search-R1 and verl publish for main_ppo."""

ORIGINAL = {
    "data.train_files": "data/nq_hotpotqa_train/train.parquet",
    "data.val_files": "data/nq_hotpotqa_train/test.parquet",
    "data.train_data_num": "null",
    "data.val_data_num": "null",
    "data.train_batch_size": "512",
    "data.val_batch_size": "256",
    "data.max_prompt_length": "4096",
    "data.max_response_length": "500",
    "data.max_start_length": "2048",
    "data.max_obs_length": "500",
    "data.shuffle_train_dataloader": "True",
    "actor_rollout_ref.model.path": "Qwen/Qwen2.5-7B",
    "actor_rollout_ref.model.enable_gradient_checkpointing": "true",
    "actor_rollout_ref.model.use_remove_padding": "True",
    "actor_rollout_ref.actor.optim.lr": "1e-6",
    "actor_rollout_ref.actor.optim.lr_warmup_steps_ratio": "0.285",
    "actor_rollout_ref.actor.ppo_mini_batch_size": "256",
    "actor_rollout_ref.actor.ppo_micro_batch_size": "64",
    "actor_rollout_ref.actor.fsdp_config.param_offload": "true",
    "actor_rollout_ref.actor.fsdp_config.grad_offload": "true",
    "actor_rollout_ref.actor.fsdp_config.optimizer_offload": "true",
    "actor_rollout_ref.rollout.log_prob_micro_batch_size": "128",
    "actor_rollout_ref.rollout.tensor_model_parallel_size": "1",
    "actor_rollout_ref.rollout.name": "vllm",
    "actor_rollout_ref.rollout.gpu_memory_utilization": "0.6",
    "actor_rollout_ref.ref.log_prob_micro_batch_size": "128",
    "actor_rollout_ref.ref.fsdp_config.param_offload": "True",
    "actor_rollout_ref.rollout.temperature": "1",
    "actor_rollout_ref.actor.state_masking": "true",
    "algorithm.no_think_rl": "false",
    "trainer.logger": "['wandb']",
    "+trainer.val_only": "false",
    "+trainer.val_before_train": "true",
    "trainer.default_hdfs_dir": "null",
    "trainer.n_gpus_per_node": "8",
    "trainer.nnodes": "1",
    "trainer.save_freq": "100",
    "trainer.test_freq": "100",
    "trainer.project_name": "Search-R1",
    "trainer.experiment_name": "nq-search-r1",
    "trainer.total_epochs": "15",
    "trainer.total_training_steps": "1005",
    "trainer.default_local_dir": "verl_checkpoints/nq-search-r1",
    "max_turns": "4",
    "retriever.url": '"http://127.0.0.1:8000/retrieve"',
    "retriever.topk": "3",
}
"""What every script has, at the values of most."""
PPO = ORIGINAL | {
    "algorithm.adv_estimator": "gae",
    "actor_rollout_ref.rollout.n_agent": "1",
    "critic.optim.lr": "1e-5",
    "critic.model.use_remove_padding": "True",
    "critic.optim.lr_warmup_steps_ratio": "0.015",
    "critic.model.path": "Qwen/Qwen2.5-7B",
    "critic.model.enable_gradient_checkpointing": "true",
    "critic.ppo_micro_batch_size": "8",
    "critic.model.fsdp_config.param_offload": "true",
    "critic.model.fsdp_config.grad_offload": "true",
    "critic.model.fsdp_config.optimizer_offload": "true",
    "algorithm.kl_ctrl.kl_coef": "0.001",
    "trainer.critic_warmup": "0",
}
GRPO = ORIGINAL | {
    "algorithm.adv_estimator": "grpo",
    "actor_rollout_ref.rollout.n_agent": "5",
    "actor_rollout_ref.actor.use_kl_loss": "true",
    "actor_rollout_ref.actor.kl_loss_coef": "0.001",
    "actor_rollout_ref.actor.kl_loss_type": "low_var_kl",
}
NQ = {"max_turns": "2", "trainer.test_freq": "50"}
V01 = {
    "actor_rollout_ref.actor.optim.lr_warmup_steps_ratio": "0.95",
    "trainer.total_training_steps": "305",
}
FULL_NUCLEUS = {"actor_rollout_ref.rollout.top_p": "1.0"}
FORMAT = {
    "reward_model.structure_format_score": "0.2",
    "reward_model.final_format_score": "0.1",
    "reward_model.retrieval_score": "0",
}
ON_GPUS = {
    "actor_rollout_ref.actor.fsdp_config.param_offload": "False",
    "actor_rollout_ref.actor.fsdp_config.grad_offload": "False",
    "actor_rollout_ref.ref.fsdp_config.param_offload": "False",
    "actor_rollout_ref.rollout.gpu_memory_utilization": "0.5",
    "actor_rollout_ref.rollout.tensor_model_parallel_size": "2",
    "trainer.nnodes": "4",
}
LARGE = {
    "actor_rollout_ref.actor.ppo_micro_batch_size": "32",
    "actor_rollout_ref.rollout.log_prob_micro_batch_size": "32",
    "actor_rollout_ref.ref.log_prob_micro_batch_size": "32",
}
EVALUATION = {
    name: value
    for name, value in PPO.items()
    if name
    not in (
        "trainer.save_freq",
        "trainer.test_freq",
        "trainer.total_epochs",
        "trainer.total_training_steps",
    )
} | {"+trainer.val_only": "true", "trainer.logger": "[]"}

SEARCH_R1: dict[str, dict[str, str]] = {
    "train_ppo.sh": PPO | NQ,
    "train_grpo.sh": GRPO | NQ,
    "v0.1/train_ppo.sh": PPO | V01 | {"critic.optim.lr_warmup_steps_ratio": "0.05"},
    "v0.1/train_grpo.sh": GRPO | V01,
    "v0.2/train_ppo.sh": PPO | FULL_NUCLEUS,
    "v0.2/train_grpo.sh": GRPO,
    "v0.3/train_ppo_format.sh": PPO | FULL_NUCLEUS | FORMAT,
    "v0.3/train_grpo_format.sh": GRPO | FORMAT | {"actor_rollout_ref.actor.optim.lr": "5e-7"},
    "evaluate.sh": EVALUATION,
    "multinode/train_ppo_32b.sh": PPO
    | ON_GPUS
    | LARGE
    | FULL_NUCLEUS
    | {"critic.ppo_micro_batch_size": "32"},
    "multinode/train_grpo_32b.sh": GRPO | ON_GPUS | {"+trainer.val_before_train": "false"},
    "multinode/train_grpo_72b.sh": GRPO
    | ON_GPUS
    | LARGE
    | {"actor_rollout_ref.rollout.tensor_model_parallel_size": "4"},
}
"""The scripts of the original that start main_ppo, by their names."""

VERL = {
    "algorithm.adv_estimator": "grpo",
    "data.train_batch_size": "512",
    "data.val_batch_size": "256",
    "data.max_prompt_length": "4096",
    "data.max_response_length": "3000",
    "data.filter_overlong_prompts": "True",
    "data.truncation": "'error'",
    "data.return_raw_chat": "True",
    "actor_rollout_ref.model.path": "Qwen/Qwen2.5-3B-Instruct",
    "actor_rollout_ref.actor.optim.lr": "1e-6",
    "actor_rollout_ref.actor.optim.lr_warmup_steps_ratio": "0.285",
    "actor_rollout_ref.model.use_remove_padding": "True",
    "actor_rollout_ref.actor.ppo_mini_batch_size": "256",
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu": "8",
    "actor_rollout_ref.actor.use_kl_loss": "True",
    "actor_rollout_ref.actor.kl_loss_coef": "0.001",
    "actor_rollout_ref.actor.kl_loss_type": "low_var_kl",
    "actor_rollout_ref.actor.entropy_coeff": "0",
    "actor_rollout_ref.model.enable_gradient_checkpointing": "True",
    "actor_rollout_ref.actor.fsdp_config.param_offload": "False",
    "actor_rollout_ref.actor.fsdp_config.optimizer_offload": "False",
    "actor_rollout_ref.rollout.max_model_len": "15000",
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu": "8",
    "actor_rollout_ref.rollout.tensor_model_parallel_size": "1",
    "actor_rollout_ref.rollout.name": "sglang",
    "actor_rollout_ref.rollout.gpu_memory_utilization": "0.5",
    "actor_rollout_ref.rollout.n": "5",
    "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu": "8",
    "actor_rollout_ref.ref.fsdp_config.param_offload": "True",
    "algorithm.use_kl_in_reward": "False",
    "trainer.critic_warmup": "0",
    "trainer.logger": "['console','wandb']",
    "trainer.project_name": "'search_r1_like_async_rl'",
    "trainer.experiment_name": "'qwen2.5-3b-instruct_search'",
    "trainer.n_gpus_per_node": "8",
    "trainer.nnodes": "1",
    "trainer.save_freq": "100",
    "trainer.test_freq": "50",
    "data.train_files": "data/searchR1_processed_direct/train.parquet",
    "data.val_files": "data/searchR1_processed_direct/test.parquet",
    "actor_rollout_ref.rollout.multi_turn.tool_config_path": (
        "config/tool_config/search_tool_config.yaml"
    ),
    "trainer.total_epochs": "1",
}
"""verl's examples/sglang_multiturn/search_r1_like."""
VERL_FLAGS = [
    "--config-path=examples/sglang_multiturn/config",
    "--config-name=search_multiturn_grpo",
]


def arguments(keys: dict[str, str]) -> list[str]:
    """The overrides as a shell passes them, its own quotes removed (double ones)."""
    return [f"{key}={value}".replace('"', "") for key, value in keys.items()]
