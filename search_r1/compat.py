"""Translates the keys of the original Search-R1 that this project does not have.

With `compat=search_r1` a command line of the original is accepted as it is
(`verl/trainer/compat.py` says how). docs/migration.md has the table of keys.
"""

from typing import Any

from verl.trainer.compat import (
    ACTOR,
    COMMON,
    ROLLOUT,
    Fate,
    Given,
    Project,
    Refused,
    ignored,
    ignored_if,
)

FORMAT_REWARD = "the format reward (main_ppo_format): reward.em_format=1, reward.em=0"


def format_reward(value: object) -> dict[str, Any]:
    """The reward weights of the original's main_ppo_format, the program that reads these scores."""
    return {"reward.em": 0.0, "reward.em_format": 1.0}


def http_server(value: object, given: Given) -> object:
    """Returns `value` if it is the address of a retrieval server.

    Raises Refused otherwise: a fork of the original has the name of a search engine there.
    """
    if not str(value).startswith(("http://", "https://", "[")):
        raise Refused(
            "expected the address of a server: scripts/retriever/web.sh starts one that searches "
            "the web"
        )
    return value


SEARCH_R1 = Project(
    keys={
        **COMMON,
        f"{ROLLOUT}.n_agent": Fate(f"{ROLLOUT}.n", "trajectories per prompt"),
        f"{ROLLOUT}.n": ignored_if(
            [1], "the group is n_agent there: copies by the engine beside it have no equal"
        ),
        f"{ACTOR}.use_kl_loss": Fate(
            f"{ACTOR}.use_kl_loss",
            "the KL is in the loss or in the reward",
            also=lambda value: {"algorithm.use_kl_in_reward": not value},
        ),
        f"{ACTOR}.optim.warmup_style": ignored(
            "never read there: always constant after the warm-up"
        ),
        f"{ACTOR}.optim.min_lr_ratio": ignored("never read there"),
        f"{ACTOR}.optim.total_training_steps": ignored(
            "trainer.total_training_steps, or what the epochs amount to"
        ),
        f"{ACTOR}.ppo_epochs": ignored("never read there: one pass"),
        "critic.ppo_epochs": ignored("never read there: one pass"),
        f"{ROLLOUT}.max_num_seqs": ignored("never given to the engine there"),
        f"{ROLLOUT}.max_num_batched_tokens": ignored("never given to the engine there"),
        "algorithm.no_think_rl": ignored_if([False], "it only raised an error there"),
        "algorithm.state_masking.start_state_marker": ignored(
            "never read there: masks are carried, not recovered"
        ),
        "algorithm.state_masking.end_state_marker": ignored(
            "never read there: masks are carried, not recovered"
        ),
        "reward_model.structure_format_score": Fate(
            "reward.structure_format_score", FORMAT_REWARD, also=format_reward
        ),
        "reward_model.final_format_score": Fate(
            "reward.final_format_score", FORMAT_REWARD, also=format_reward
        ),
        "reward_model.retrieval_score": Fate(
            "reward.retrieval_score", FORMAT_REWARD, also=format_reward
        ),
        "retriever.url": Fate("retriever.url", "", http_server),
        "reranker.do_rerank": ignored_if(
            [False], "the server reranks: scripts/retriever/rerank.sh, as retriever.url"
        ),
        "reranker.url": ignored("read only with reranker.do_rerank"),
        "reranker.topk": ignored("read only with reranker.do_rerank"),
    },
    defaults={
        "data.train_batch_size": 1024,
        "data.max_prompt_length": 512,
        "data.max_response_length": 512,
        "data.max_start_length": 256,
        "data.max_obs_length": 512,
        "algorithm.adv_estimator": "gae",
        "algorithm.use_kl_in_reward": True,
        f"{ACTOR}.use_kl_loss": False,
        f"{ACTOR}.entropy_coeff": 0.001,
        f"{ACTOR}.state_masking": False,
        f"{ACTOR}.ppo_mini_batch_size": 256,
        f"{ROLLOUT}.n": 1,
        f"{ROLLOUT}.gpu_memory_utilization": 0.5,
        f"{ROLLOUT}.tensor_model_parallel_size": 2,
        "max_turns": 10,
        "trainer.total_epochs": 30,
        "trainer.project_name": "verl_examples",
        "trainer.experiment_name": "gsm8k",
    },
)
"""The original at its last commit. Its default top_p of 0.95 is not taken over: tokens would be
sampled from another distribution than the one that is trained."""
