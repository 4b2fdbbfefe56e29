"""A frozen model that gives log-probs: the reference, which is the initial policy, or a teacher."""

from functools import partial

from verl.protocol import DataProto
from verl.single_controller.decorator import Dispatch, register
from verl.single_controller.worker import Worker
from verl.workers.config import FrozenModelConfig, RefConfig
from verl.workers.forward import log_probs_of_rows
from verl.workers.fsdp_model import build_model
from verl.workers.update import IMAGES, INPUTS, Budget, map_micro_batches


class ReferenceWorker(Worker):
    """One rank of the reference or of the teacher.

    There is a reference only if a KL to it is computed, and a teacher only if it has a weight.
    """

    def __init__(self, model: FrozenModelConfig, config: RefConfig, temperature: float) -> None:
        super().__init__()
        self.config = config
        self.temperature = temperature
        # new adapters change nothing, so the reference is the model without them
        frozen = build_model(model.frozen(), "lm", config.fsdp_config, self.mesh)
        self.model = frozen.requires_grad_(False)

    @register(Dispatch.DP_COMPUTE_PROTO, columns=INPUTS, optional=IMAGES)
    def compute_ref_log_prob(self, data: DataProto) -> DataProto:
        """Computes `ref_log_prob` [B, R] at the sampling temperature."""
        config = self.config
        budget = Budget.of(
            self.model,
            config.log_prob_max_token_len_per_gpu,
            config.log_prob_micro_batch_size_per_gpu,
        )
        forward = partial(log_probs_of_rows, self.model, temperature=self.temperature)
        return DataProto({"ref_log_prob": map_micro_batches(data, budget, self.device, forward)})
