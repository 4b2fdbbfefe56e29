"""The policy: log-probs, updates, weights for the rollout engine."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from verl.protocol import ACTOR_MINI_BATCH, DataProto
from verl.rollout.weight_sync import WeightSender
from verl.single_controller.decorator import Dispatch, register
from verl.trainer.ppo.core_algos import (
    POLICY_LOSSES,
    LossInputs,
    agg_loss,
    kl_penalty,
    likelihood_losses,
)
from verl.workers.config import ActorConfig, ModelConfig, RolloutConfig
from verl.workers.forward import entropy_of_rows, forward_log_probs, log_probs_of_rows
from verl.workers.fsdp_model import build_model, build_train_state, describe
from verl.workers.hf_folder import save_trained
from verl.workers.memory import peak_memory
from verl.workers.trained import TrainedWorker
from verl.workers.update import (
    IMAGES,
    INPUTS,
    Budget,
    Counts,
    Metrics,
    map_micro_batches,
    update_mini_batches,
)


def policy_loss(
    config: ActorConfig,
    log_probs: torch.Tensor,
    entropy: torch.Tensor,
    rows: DataProto,
    counts: Counts,
) -> tuple[torch.Tensor, Metrics]:
    """This micro-batch's share of the actor's loss and of each metric.

    The loss is the policy loss minus the entropy bonus, plus the KL to the reference and the
    likelihood loss of LLDS if these are configured. log_probs, entropy: [b, R]. The metric
    `pg_loss` is the policy loss, aggregated by `loss_agg_mode`. All other metrics are means over
    the trained tokens, so that a limit on one of them means the same in every run.
    """
    batch = rows.batch
    mask = batch["response_mask"].bool()
    aggregate = partial(
        agg_loss,
        loss_mask=mask,
        loss_agg_mode=config.loss_agg_mode,
        num_tokens=counts.num_tokens,
        num_seqs=counts.num_seqs,
        loss_scale_factor=config.loss_scale_factor,
        seq_tokens=batch.get("seq_tokens"),
    )
    mean_of_tokens = partial(
        agg_loss, loss_mask=mask, loss_agg_mode="token-mean", num_tokens=counts.num_tokens
    )
    pg_losses, counted = token_losses(config, log_probs, rows)
    loss = aggregate(pg_losses)
    metrics = {name: mean_of_tokens(values) for name, values in counted.items()}
    metrics["pg_loss"] = loss.detach()
    metrics["entropy"] = mean_of_tokens(entropy.detach())
    if config.entropy_coeff:
        loss = loss - config.entropy_coeff * aggregate(entropy)
    if config.use_kl_loss:
        kld = kl_penalty(log_probs, batch["ref_log_prob"], config.kl_loss_type)
        metrics["kl_loss"] = mean_of_tokens(kld.detach())
        loss = loss + config.kl_loss_coef * aggregate(kld)
    if config.policy_loss.llds_coef:
        lost = likelihood_losses(batch["old_log_probs"], log_probs, batch["advantages"], mask)
        metrics["likelihood_loss"] = mean_of_tokens(lost.detach())
        loss = loss + config.policy_loss.llds_coef * aggregate(lost)
    return loss, metrics


def token_losses(
    config: ActorConfig, log_probs: torch.Tensor, rows: DataProto
) -> tuple[torch.Tensor, Metrics]:
    """The policy loss of each trained token, and what is counted beside it, all [b, R].

    Importance weights of `rollout_correction` are applied where the batch has them.
    """
    batch = rows.batch
    inputs = loss_inputs(config, log_probs, rows)
    pg_losses, counted = POLICY_LOSSES[config.policy_loss.loss_mode](inputs)
    if "rollout_is_weights" in batch:
        mask = batch["response_mask"].bool()
        pg_losses = pg_losses * torch.where(mask, batch["rollout_is_weights"], 0.0)
    return pg_losses, {**counted, "ppo_kl": -inputs.log_ratio.detach()}


def loss_inputs(config: ActorConfig, log_probs: torch.Tensor, rows: DataProto) -> LossInputs:
    """The arguments of the functions in POLICY_LOSSES.

    `clip_ratio` is used for a side of the clip range that is not configured by itself.
    """
    low = config.clip_ratio if config.clip_ratio_low is None else config.clip_ratio_low
    high = config.clip_ratio if config.clip_ratio_high is None else config.clip_ratio_high
    return LossInputs.masked(
        old_log_prob=rows.batch["old_log_probs"],
        log_prob=log_probs,
        advantages=rows.batch["advantages"],
        response_mask=rows.batch["response_mask"],
        clip_ratio_low=low,
        clip_ratio_high=high,
        clip_ratio_c=config.clip_ratio_c,
    )


class ActorWorker(TrainedWorker):
    """One rank of the policy."""

    def __init__(
        self, model: ModelConfig, config: ActorConfig, rollout: RolloutConfig, total_steps: int
    ) -> None:
        super().__init__()
        self.model_config = model
        self.config = config
        self.rollout = rollout
        policy = build_model(model, "lm", config.fsdp_config, self.mesh)
        self.set_state(build_train_state(policy, config.optim, total_steps, config.fsdp_config))
        self.senders: dict[str, WeightSender] = {}

    @register(Dispatch.DP_COMPUTE_PROTO, columns=INPUTS, optional=IMAGES)
    def compute_log_prob(self, data: DataProto) -> DataProto:
        """Computes `old_log_probs` [B, R] with the present weights, at the sampling temperature."""
        rollout = self.rollout
        model = self.state.model
        budget = Budget.of(
            model, rollout.log_prob_max_token_len_per_gpu, rollout.log_prob_micro_batch_size_per_gpu
        )
        forward = partial(log_probs_of_rows, model, temperature=rollout.temperature)
        return DataProto({"old_log_probs": map_micro_batches(data, budget, self.device, forward)})

    @register(Dispatch.DP_COMPUTE_PROTO, columns=INPUTS, optional=IMAGES)
    def compute_entropy(self, data: DataProto) -> DataProto:
        """Computes `entropy` [B, R], in nats, of the distributions that tokens were chosen from.

        It takes what memory an update takes, not what log-probs take, so its budget is that one.
        """
        config = self.config
        model = self.state.model
        budget = Budget.of(
            model, config.ppo_max_token_len_per_gpu, config.ppo_micro_batch_size_per_gpu
        )
        forward = partial(entropy_of_rows, model, temperature=self.rollout.temperature)
        return DataProto({"entropy": map_micro_batches(data, budget, self.device, forward)})

    @register(
        Dispatch.DP_COMPUTE_METRIC,
        columns=(*INPUTS, ACTOR_MINI_BATCH, "advantages", "old_log_probs"),
        optional=("ref_log_prob", "rollout_is_weights", "seq_tokens", *IMAGES),
    )
    def update_actor(self, data: DataProto) -> dict[str, float]:
        """Takes one optimizer step per mini-batch of `actor.ppo_mini_batch_size`.

        With `use_kl_loss` the batch must have `ref_log_prob`. On a GPU the metrics also have what
        memory was held since the last update.
        """

        def loss_fn(rows: DataProto, counts: Counts) -> tuple[torch.Tensor, Metrics]:
            log_probs, entropy = forward_log_probs(
                self.state.model,
                rows,
                self.rollout.temperature,
                with_entropy=True,
                entropy_grad=self.config.entropy_coeff != 0,
            )
            assert entropy is not None
            return policy_loss(self.config, log_probs, entropy, rows, counts)

        metrics = update_mini_batches(
            self.state,
            data.to(self.device),
            loss_fn,
            epochs=self.config.ppo_epochs,
            budget=Budget.of(
                self.state.model,
                self.config.ppo_max_token_len_per_gpu,
                self.config.ppo_micro_batch_size_per_gpu,
            ),
            grad_clip=self.config.grad_clip,
        )
        return metrics | peak_memory(self.device)

    @register(Dispatch.ONE_TO_ALL)
    def describe(self) -> str:
        """A description of the policy in one line."""
        return describe(self.state.model)

    @register(Dispatch.ONE_TO_ALL)
    def connect_engines(self, name: str, servers: Sequence[Any], colocated: bool) -> None:
        """Sets the engines to which `send_weights(name)` sends, instead of any before them."""
        if name in self.senders:
            self.senders.pop(name).close()
        self.senders[name] = WeightSender(
            self.state.model,
            servers,
            self.device.type,
            getattr(torch, self.rollout.dtype),
            colocated=colocated,
            ranks_per_server=self.rollout.tensor_model_parallel_size,
        )

    @register(Dispatch.ONE_TO_ALL)
    def free_cached_memory(self) -> None:
        """Frees the memory that torch has cached on this GPU, because an engine will need it."""
        torch.cuda.empty_cache()

    @register(Dispatch.ONE_TO_ALL)
    def send_weights(self, name: str) -> None:
        """Sends the present weights to the engines of that name, which must be waiting for them."""
        self.senders[name].send()

    @register(Dispatch.ONE_TO_ALL)
    def save_pretrained(self, path: str, checkpoint: str | None = None) -> None:
        """Writes the policy in Hugging Face format, with its tokenizer.

        `checkpoint`: the name of the checkpoint with the same weights.
        """
        origin = {} if checkpoint is None else {"checkpoint": checkpoint}
        save_trained(self.state.model, self.model_config, path, origin)
