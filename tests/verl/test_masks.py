"""Retrieved tokens get no gradient anywhere: not in policy loss, entropy, KL, advantages, nor the
value loss."""

import torch

from tests.verl.batches import ragged_batch
from tests.verl.masks import GAE, everything, perturbed
from verl.protocol import DataProto
from verl.trainer.config import AlgorithmConfig
from verl.trainer.ppo.advantage import apply_kl_penalty, build_kl_controller
from verl.utils.torch_functional import logprobs_from_logits


def setup() -> tuple[DataProto, torch.Tensor, torch.Tensor]:
    data = ragged_batch(torch.float32)
    scores = torch.zeros_like(data.batch["advantages"])
    for row, mask in enumerate(data.batch["response_mask"]):
        scores[row, mask.nonzero()[-1]] = float(row % 2)
    g = torch.Generator().manual_seed(5)
    logits = torch.randn(*scores.shape, 50, generator=g)
    return (
        data.with_tensors(token_level_scores=scores),
        logits,
        torch.randn(scores.shape, generator=g),
    )


def test_masked_targets_change_nothing_by_a_single_bit():
    data, logits, values = setup()
    masked = data.batch["response_mask"] == 0
    before = everything(data, logits, values)
    after = everything(data, perturbed(logits, masked), perturbed(values, masked))
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_the_last_observation_position_does_count():
    """Its logits choose the first token of the policy's next turn."""
    data, logits, values = setup()
    mask = data.batch["response_mask"]
    first = (mask == 1) & (torch.nn.functional.pad(mask, (1, 0))[:, :-1] == 0)
    before = everything(data, logits, values)
    after = everything(data, perturbed(logits, first), values)
    assert not torch.equal(before[0], after[0])
    assert not torch.equal(everything(data, logits, perturbed(values, first))[1], before[1])


def test_gradient_reaches_no_masked_logit():
    data, logits, values = setup()
    logits.requires_grad_()
    everything(data, logits, values)[0].backward()
    reached = logits.grad.abs().sum(-1) > 0
    assert torch.equal(reached, data.batch["response_mask"] == 1)


def test_the_rewards_of_a_row_sum_to_its_score_on_policy_tokens():
    data, logits, _ = setup()
    data = data.with_tensors(old_log_probs=logprobs_from_logits(logits, data.batch["responses"]))
    plain, _ = apply_kl_penalty(data, AlgorithmConfig(), build_kl_controller(GAE))
    rewards = plain.batch["token_level_rewards"]
    scores = data.batch["token_level_scores"]
    assert (
        torch.equal(rewards.sum(1), scores.sum(1))
        and not rewards[data.batch["response_mask"] == 0].any()
    )
