"""A warning when the engine samples from another distribution than the one that is trained."""

from collections.abc import Callable

from verl.protocol import DataProto
from verl.trainer.config import PPOConfig
from verl.trainer.ppo.metrics import rollout_gap

MISMATCH_FLOAT32 = 1e-3
MISMATCH_ROUNDED = 0.03
MISMATCH_WRONG = 0.3
"""Mean differences per token, in nats, between engine and trainer under the same weights.

They are the most that is normal if both compute in float32, the most that is normal otherwise, and
the least that rounding cannot explain. The second and the third are a judgement, not measured on a
GPU."""


class FirstBatch:
    """Compares the probabilities of engine and trainer on the first batch, and warns once.

    That batch was sampled from the trainer's weights. With top_p or top_k there is no comparison,
    because the distributions are known to differ.
    """

    def __init__(self, config: PPOConfig, message: Callable[[str], None]) -> None:
        self.config = config
        self.message = message
        self.compared = False

    def __call__(self, batch: DataProto) -> DataProto:
        """Checks the first batch; returns the batch unchanged."""
        section = self.config.actor_rollout_ref
        correction = self.config.algorithm.rollout_correction
        rollout = section.rollout
        if self.compared or rollout.top_p < 1 or rollout.top_k > 0:
            return batch
        self.compared = True
        corrected = correction.corrects or correction.bypass_mode
        warning = mismatch_warning(batch, rollout.dtype, section.actor.fsdp_config.dtype, corrected)
        if warning is not None:
            self.message(warning)
        return batch


def mismatch_warning(data: DataProto, engine: str, trainer: str, corrected: bool) -> str | None:
    """A warning, with advice, if engine and trainer differ in their log-probs; else None.

    The batch must have been sampled without top_p or top_k, from the weights of its
    `old_log_probs`. `engine`, `trainer`: dtypes of the computation. `corrected`: whether the loss
    corrects for the difference already.
    """
    batch = data.batch
    sampled = batch["response_mask"].bool() & (batch["turns"] >= 0)
    gap = rollout_gap(batch["rollout_log_probs"], batch["old_log_probs"], sampled)
    mean = gap["rollout/logprob_diff_mean"]
    largest = gap["rollout/logprob_diff_max"]
    exact = engine == trainer == "float32"
    bound = MISMATCH_FLOAT32 if exact else MISMATCH_ROUNDED
    if mean <= bound:
        return None
    if exact or mean > MISMATCH_WRONG:
        cure = (
            "This is not rounding: the engine has other weights or computes this family in "
            "another way. Stop the run; check actor_rollout_ref.model (path, override_config) and "
            "docs/results/families.md"
        )
    elif corrected:
        return None
    else:
        cure = (
            "Set algorithm.rollout_correction.rollout_is=token (or rollout_rs=sequence), or bring "
            "the dtypes together: actor_rollout_ref.rollout.dtype and "
            "actor_rollout_ref.actor.fsdp_config.dtype (float16 rounds eight times more finely "
            "than bfloat16)"
        )
    return (
        f"WARNING: engine ({engine}) and trainer ({trainer}) differ by {mean:.2g} nats a token "
        f"under the same weights (at most {largest:.2g}); below {bound:g} is normal. {cure}"
    )
