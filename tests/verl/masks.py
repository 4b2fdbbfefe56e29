"""All that training derives from a batch, to show that masked tokens have no part in it."""

import torch

from verl.protocol import DataProto
from verl.trainer.config import AlgorithmConfig
from verl.trainer.ppo.advantage import apply_kl_penalty, build_kl_controller, compute_advantage
from verl.trainer.ppo.core_algos import compute_value_loss
from verl.utils.torch_functional import entropy_from_logits, logprobs_from_logits
from verl.workers.actor import policy_loss
from verl.workers.config import ActorConfig
from verl.workers.update import Counts

ACTOR = ActorConfig(use_kl_loss=True, entropy_coeff=0.01)
GAE = AlgorithmConfig(adv_estimator="gae", gamma=0.97, lam=0.9, use_kl_in_reward=True)


def everything(data: DataProto, logits: torch.Tensor, values: torch.Tensor) -> list[torch.Tensor]:
    """All that training derives from logits [B, R, V] (each predicts the token at its place) and
    values [B, R]."""
    log_probs = logprobs_from_logits(logits, data.batch["responses"])
    data = data.with_tensors(old_log_probs=log_probs - 0.1, values=values)
    data, _ = apply_kl_penalty(data, GAE, build_kl_controller(GAE))
    data, _ = compute_advantage(data, GAE)
    counts = Counts(int(data.batch["response_mask"].sum()), len(data))
    loss, metrics = policy_loss(ACTOR, log_probs, entropy_from_logits(logits), data, counts)
    value_loss, value_metrics = compute_value_loss(
        values + 0.05,
        data.batch["returns"],
        values,
        data.batch["response_mask"],
        cliprange_value=0.5,
    )
    tensors = [
        loss,
        value_loss,
        data.batch["advantages"],
        data.batch["returns"],
        data.batch["token_level_rewards"],
    ]
    return tensors + [x for m in (metrics, value_metrics) for _, x in sorted(m.items())]


def perturbed(x: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    junk = torch.randn(x.shape, generator=torch.Generator().manual_seed(9)) * 10
    return torch.where(where.view(*where.shape, *[1] * (x.dim() - where.dim())), x + junk, x)
