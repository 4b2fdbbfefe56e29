"""Configuration of the workers: model, optimizer, sharding, actor, reference, critic, rollout.

Batch sizes are global numbers: counted over all ranks.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from verl.utils.config import Config, OneOf
from verl.utils.endpoint import EndpointConfig

Dtype = Literal["float32", "bfloat16", "float16"]
LossMode = Annotated[str, OneOf("verl.trainer.ppo.core_algos.POLICY_LOSSES")]
LossAggMode = Annotated[str, OneOf("verl.trainer.ppo.core_algos.LOSS_AGG_MODES")]
KLPenalty = Annotated[str, OneOf("verl.trainer.ppo.core_algos.KL_PENALTIES")]


class FrozenModelConfig(Config):
    """A model of which nothing is trained."""

    path: str
    """Hugging Face directory or hub name of the weights; of a trained model, the initial ones."""
    trust_remote_code: bool = False
    """Run Python code that comes with the weights."""
    use_torch_compile: bool = False
    """Compile every decoder layer where this model is trained or computes log-probs."""
    pack_rows: bool | None = None
    """Whether trajectories share a forward pass. Null: they do if a probe on a shallow random copy
    of the model shows that they do not affect each other; otherwise each passes alone, which is
    exact and slower. True: they do, without a probe."""
    reads_images: bool = False
    """Read the images of questions and passages, with the tower for images that the model has,
    which is not trained (docs/images.md)."""
    override_config: dict[str, Any] = {}
    """Entries of the Hugging Face config to replace wherever the model is used (for instance
    rope_parameters); attn_implementation chooses the attention, except that of an engine."""

    @property
    def architecture(self) -> dict[str, Any]:
        """The entries that say what the model is, not how training computes it."""
        return {k: v for k, v in self.override_config.items() if k != "attn_implementation"}

    def frozen(self) -> "ModelConfig":
        """This model without anything that only its training would need."""
        return ModelConfig(**self.model_dump(include=set(FrozenModelConfig.model_fields)))


class ModelConfig(FrozenModelConfig):
    """A model that is trained."""

    tokenizer_path: str | None = None
    """Hugging Face directory or hub name of the tokenizer; null: the one beside the weights."""
    enable_gradient_checkpointing: bool = True
    """Recompute activations of each decoder layer in the backward pass."""
    lora_rank: NonNegativeInt = 0
    """Rank of trained adapters (LoRA, arXiv 2106.09685) over frozen weights; 0: train all
    weights."""
    lora_alpha: PositiveInt = 16
    """Adapters are scaled by lora_alpha / lora_rank."""
    target_modules: str | list[str] = "all-linear"
    """Names of the linear layers that get adapters."""


class OptimConfig(Config):
    lr: PositiveFloat = 1e-6
    """Peak learning rate of AdamW."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW betas."""
    weight_decay: NonNegativeFloat = 0.01
    """AdamW weight decay."""
    lr_warmup_steps_ratio: float = Field(default=0.0, ge=0, le=1)
    """Linear warm-up, as a share of trainer.total_training_steps."""
    lr_scheduler_type: Literal["constant", "cosine"] = "constant"
    """Shape of the schedule after the warm-up. It moves once per training step, as in the
    original."""
    min_lr_ratio: float = Field(default=0.0, ge=0, le=1)
    """Learning rate at the end of cosine, as a share of lr."""


class FSDPConfig(Config):
    param_offload: bool = False
    """Keep parameters and gradients on the CPU between uses (FSDP2 CPU offload; the optimizer then
    runs there too)."""
    optimizer_offload: bool = False
    """Keep the optimizer's state on the CPU between updates; it steps on the GPU."""
    reshard_after_forward: bool = True
    """Free the gathered parameters between forward and backward."""
    model_dtype: Dtype = "float32"
    """Dtype of the master weights."""
    dtype: Dtype = "bfloat16"
    """Dtype of the computation; gradients are always reduced in float32."""


class PolicyLossConfig(Config):
    loss_mode: LossMode = "vanilla"
    """The loss of the policy; docs/algorithms.md has each. vanilla is PPO's clip."""
    llds_coef: NonNegativeFloat = 0.0
    """Weight of the likelihood-preserving regulariser of LLDS (2512.04220), which uses .1 to .2."""


class ActorConfig(Config):
    policy_loss: PolicyLossConfig = PolicyLossConfig()
    ppo_mini_batch_size: PositiveInt = 256
    """Trajectories per optimizer step."""
    ppo_micro_batch_size_per_gpu: PositiveInt | None = None
    """Most trajectories in a forward-backward pass of one rank; null: limited by tokens only. The
    gradient does not depend on it."""
    ppo_max_token_len_per_gpu: PositiveInt = 16384
    """Most tokens in such a pass, to which its memory is proportional. A longer trajectory passes
    alone."""
    ppo_epochs: PositiveInt = 1
    """Passes over each rollout batch."""
    clip_ratio: PositiveFloat = 0.2
    """PPO clip range."""
    clip_ratio_low: PositiveFloat | None = None
    """Lower clip range; null: clip_ratio."""
    clip_ratio_high: PositiveFloat | None = None
    """Upper clip range; null: clip_ratio."""
    clip_ratio_c: float = Field(default=3.0, gt=1)
    """Dual-clip bound for negative advantages (arXiv 1912.09729)."""
    loss_agg_mode: LossAggMode = "token-mean"
    """token-mean is what the original's code does; seq-mean-token-mean is the paper's printed
    formula."""
    loss_scale_factor: PositiveFloat | None = None
    """Constant divisor of loss_agg_mode=seq-mean-token-sum-norm (Dr. GRPO): the most tokens that
    the policy may write in a trajectory."""
    entropy_coeff: float = 0.0
    """Weight of the entropy bonus. The original's default is 0.001."""
    use_kl_loss: bool = False
    """Add the KL to the reference to the loss (GRPO)."""
    kl_loss_coef: NonNegativeFloat = 0.001
    """Weight of the KL in the loss."""
    kl_loss_type: KLPenalty = "low_var_kl"
    """Estimator of the KL in the loss."""
    grad_clip: PositiveFloat = 1.0
    """Maximum norm of the gradient."""
    state_masking: bool = True
    """False trains on retrieved tokens too: the paper's ablation."""
    optim: OptimConfig = OptimConfig()
    fsdp_config: FSDPConfig = FSDPConfig()


class RefConfig(Config):
    log_prob_micro_batch_size_per_gpu: PositiveInt | None = None
    """Most trajectories in a forward pass of one rank."""
    log_prob_max_token_len_per_gpu: PositiveInt = 32768
    """Most tokens in such a pass."""
    fsdp_config: FSDPConfig = FSDPConfig(model_dtype="bfloat16")


class TeacherConfig(RefConfig):
    """A model that says how it would have written the tokens of the policy.

    On-policy distillation: `weight` times the teacher's log-prob minus the policy's is added to the
    advantage of each token that the policy wrote.
    """

    weight: NonNegativeFloat = 0.0
    """Weight of the teacher beside the advantage by the reward; 0: there is no teacher."""
    model: FrozenModelConfig


class CriticConfig(Config):
    model: ModelConfig
    ppo_mini_batch_size: PositiveInt = 256
    """Trajectories per optimizer step."""
    ppo_micro_batch_size_per_gpu: PositiveInt | None = None
    """Most trajectories in a forward-backward pass of one rank."""
    ppo_max_token_len_per_gpu: PositiveInt = 16384
    """Most tokens in such a pass."""
    ppo_epochs: PositiveInt = 1
    """Passes over each rollout batch."""
    cliprange_value: PositiveFloat = 0.5
    """Clip range of the value update."""
    loss_agg_mode: LossAggMode = "token-mean"
    """As in the actor, except for seq-mean-token-sum-norm, which has no divisor here."""
    grad_clip: PositiveFloat = 1.0
    """Maximum norm of the gradient."""
    optim: OptimConfig = OptimConfig(lr=1e-5)
    fsdp_config: FSDPConfig = FSDPConfig()


class BranchesConfig(Config):
    """Trajectories that begin with the first turns of another one (arXiv 2509.21240)."""

    rounds: NonNegativeInt = 0
    """Rounds in which further trajectories branch off a tree, which begins with one trajectory. 0:
    every trajectory begins at its prompt."""
    per_round: PositiveInt = 1
    """Trajectories that branch off a tree in each round. Each goes on after a turn drawn from all
    that the tree has by then, the last ones of trajectories apart. A tree has 1 + rounds *
    per_round trajectories, and rollout.n is that of all trees of a prompt."""

    @property
    def tree_size(self) -> int:
        """Trajectories of a tree."""
        return 1 + self.rounds * self.per_round


class SamplingConfig(Config):
    """How tokens are drawn. Log-probs of training are scaled by the same temperature."""

    temperature: NonNegativeFloat = 1.0
    """0 is greedy."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus sampling; below 1 the sampler's distribution differs from the trainer's."""
    top_k: int = -1
    """Sample from this many most probable tokens; -1: from all."""
    n: PositiveInt = 1
    """Trajectories per prompt: the group size of GRPO (`n_agent` of the original)."""

    def params(self) -> dict[str, Any]:
        """The parameters of a request to the engine."""
        return {
            **self.model_dump(include={"temperature", "top_p", "top_k"}),
            "log_probs": self.trains,
        }

    @property
    def trains(self) -> bool:
        """Whether the tokens are trained on, so that their log-probs are needed."""
        return True

    @property
    def branching(self) -> BranchesConfig:
        """How trajectories of a prompt branch off each other: not at all."""
        return BranchesConfig()


class ValSamplingConfig(SamplingConfig):
    temperature: NonNegativeFloat = 0.0
    """0 is greedy."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus sampling."""
    n: PositiveInt = 1
    """Trajectories per question, for pass@k and their mean."""

    @property
    def trains(self) -> bool:
        return False


class OpenAIConfig(EndpointConfig):
    """The endpoint of `rollout.name=openai`; `model.path` is the model's name there."""

    api: Literal["chat", "completions"] = "chat"
    """chat: turns as messages. completions: one text, with the tokenizer's chat template where it
    has one."""
    max_tokens_key: str = "max_tokens"
    """Name of the limit of tokens in a request; some models want max_completion_tokens."""
    extra_body: dict[str, Any] = {}
    """Further entries of every request."""


class RolloutConfig(SamplingConfig):
    name: Literal["vllm", "openai"] = "vllm"
    """The rollout engine. openai: an OpenAI-compatible endpoint, text in and text out, for
    evaluation only."""
    endpoint: OpenAIConfig = OpenAIConfig()
    dtype: Dtype = "bfloat16"
    """Dtype of the engine's weights and KV cache."""
    nnodes: PositiveInt = 1
    """Nodes of the engines, where they have GPUs of their own (hybrid_engine=false)."""
    n_gpus_per_node: PositiveInt = 1
    """GPUs of the engines on each of these nodes."""
    num_replicas: PositiveInt | None = None
    """Engines; null: as many as their GPUs hold (GPUs / tensor_model_parallel_size), one on CPU."""
    num_val_replicas: NonNegativeInt = 0
    """Further engines for validation alone, on GPUs of nnodes x n_gpus_per_node. They keep the
    weights of a validation until it ends, while training goes on. 0: validations use the engines of
    the training, which waits for them."""
    tensor_model_parallel_size: PositiveInt = 1
    """GPUs per engine."""
    gpu_memory_utilization: float = Field(default=0.6, gt=0, le=1)
    """Share of a GPU's memory that an engine takes."""
    cpu_kvcache_gb: PositiveFloat = 1.0
    """KV cache of an engine on CPU, in GiB."""
    cpu_threads: PositiveInt | None = None
    """Threads of an engine on CPU; null: its share of the cores, less one that feeds it."""
    enforce_eager: bool = False
    """Neither compile nor capture CUDA graphs. An engine on CPU never does."""
    max_model_len: PositiveInt | None = None
    """Longest context in tokens; null: data.max_prompt_length + data.max_response_length."""
    max_num_seqs: PositiveInt = 256
    """Concurrent sequences per engine."""
    max_num_batched_tokens: PositiveInt = 8192
    """Tokens per engine step."""
    enable_prefix_caching: bool = True
    """Turn k+1 reuses the KV cache of turn k."""
    load_format: Literal["auto", "dummy"] = "dummy"
    """dummy skips reading the weights from disk: the first weight sync brings them."""
    engine_kwargs: dict[str, Any] = {}
    """Further arguments of vLLM's AsyncEngineArgs."""
    log_prob_micro_batch_size_per_gpu: PositiveInt | None = None
    """Most trajectories in a forward pass of one rank when the actor recomputes log-probs."""
    log_prob_max_token_len_per_gpu: PositiveInt = 32768
    """Most tokens in such a pass."""
    num_agent_workers: PositiveInt = 8
    """CPU processes that run agent loops, rewards included."""
    per_request_seed: bool = False
    """Seed every engine call on its own, so that its tokens do not depend on what else runs; this
    costs some speed."""
    branches: BranchesConfig = BranchesConfig()
    val_kwargs: ValSamplingConfig = ValSamplingConfig()

    @property
    def branching(self) -> BranchesConfig:
        return self.branches


class ActorRolloutRefConfig(Config):
    hybrid_engine: bool = True
    """The engines share the GPUs with the training and sleep while it updates; false: they have
    GPUs of their own, as training on stale data (async_training) needs."""
    model: ModelConfig
    actor: ActorConfig = ActorConfig()
    ref: RefConfig = RefConfig()
    rollout: RolloutConfig = RolloutConfig()
