"""The critic: the value of every state in which the policy chose a token."""

from functools import partial

import torch

from verl.protocol import CRITIC_MINI_BATCH, DataProto
from verl.single_controller.decorator import Dispatch, register
from verl.trainer.ppo.core_algos import compute_value_loss
from verl.workers.config import CriticConfig
from verl.workers.forward import forward_values
from verl.workers.fsdp_model import build_model, build_train_state
from verl.workers.trained import TrainedWorker
from verl.workers.update import (
    INPUTS,
    Budget,
    Counts,
    Metrics,
    map_micro_batches,
    update_mini_batches,
)


class CriticWorker(TrainedWorker):
    """One rank of the critic: the initial policy with a new value head."""

    def __init__(self, config: CriticConfig, total_steps: int) -> None:
        super().__init__()
        self.config = config
        model = build_model(config.model, "value", config.fsdp_config, self.mesh)
        self.budget = Budget.of(
            model, config.ppo_max_token_len_per_gpu, config.ppo_micro_batch_size_per_gpu
        )
        self.set_state(build_train_state(model, config.optim, total_steps, config.fsdp_config))

    @register(Dispatch.DP_COMPUTE_PROTO, columns=INPUTS)
    def compute_values(self, data: DataProto) -> DataProto:
        """Computes `values` [B, R]."""
        forward = partial(forward_values, self.state.model)
        return DataProto({"values": map_micro_batches(data, self.budget, self.device, forward)})

    @register(
        Dispatch.DP_COMPUTE_METRIC,
        columns=(*INPUTS, CRITIC_MINI_BATCH, "returns", "values"),
        optional=("seq_tokens",),
    )
    def update_critic(self, data: DataProto) -> dict[str, float]:
        """Takes one optimizer step per mini-batch of `critic.ppo_mini_batch_size`."""

        def loss_fn(rows: DataProto, counts: Counts) -> tuple[torch.Tensor, Metrics]:
            return compute_value_loss(
                vpreds=forward_values(self.state.model, rows),
                returns=rows.batch["returns"],
                values=rows.batch["values"],
                response_mask=rows.batch["response_mask"],
                cliprange_value=self.config.cliprange_value,
                loss_agg_mode=self.config.loss_agg_mode,
                num_tokens=counts.num_tokens,
                num_seqs=counts.num_seqs,
                seq_tokens=rows.batch.get("seq_tokens"),
            )

        return update_mini_batches(
            self.state,
            data.to(self.device),
            loss_fn,
            epochs=self.config.ppo_epochs,
            budget=self.budget,
            grad_clip=self.config.grad_clip,
            column=CRITIC_MINI_BATCH,
        )
