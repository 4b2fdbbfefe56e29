"""What estimates start from: the configuration, the sizes of its models, its longest trajectory.

Nothing here needs a GPU or weights. Of a model its Hugging Face config is enough; where that cannot
be downloaded, a file of such configs stands in for the hub (`--shapes`).
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

from verl.estimate.memory import Pass, Role, Sizes
from verl.trainer.compose import as_plain, composed
from verl.trainer.config import PPOConfig, validate
from verl.utils.errors import ConfigError
from verl.workers.config import ActorConfig, CriticConfig, ModelConfig, RefConfig, RolloutConfig

if TYPE_CHECKING:
    from torch.nn import Module
    from transformers import PretrainedConfig, PreTrainedModel

Found = TypeVar("Found")
SECTIONS = {
    "actor": "actor_rollout_ref.actor",
    "ref": "actor_rollout_ref.ref",
    "teacher": "teacher",
    "critic": "critic",
}
"""Where in the configuration a role is described."""
Shapes = Mapping[str, Mapping[str, Any]]
"""By `model.path`: the content of the model's `config.json`."""
REFUSED = {
    "attn_logit_softcapping": "its attention scores are capped, which takes other kernels",
    "num_experts": "it has experts, whose activations depend on the routing",
    "num_local_experts": "it has experts, whose activations depend on the routing",
    "linear_num_value_heads": "it has layers of linear attention, whose states are not counted",
}
"""By entry of a model's config: why a model that has it cannot be estimated."""


class Longest(NamedTuple):
    """The longest trajectory that the budgets allow."""

    tokens: int
    trained_share: float
    """The largest share of its tokens that is trained on."""
    keys: str
    """The configuration keys that bound its length."""
    turns: int | None
    """The most searches; None where the agent does not bound them."""
    written: int
    """The most tokens that the policy writes."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that every estimate takes."""
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="as in training, experiment=... among them",
    )
    parser.add_argument(
        "--config-name", default="grpo", help="as in training: grpo (default) or ppo"
    )
    parser.add_argument(
        "--gpu-memory-gb", type=float, default=80.0, help="memory of a GPU in GiB (default: 80)"
    )
    parser.add_argument(
        "--shapes",
        metavar="FILE",
        help="JSON: configs of models by model.path, instead of the hub's",
    )


def answer(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    compute: Callable[[argparse.Namespace], Found],
) -> tuple[argparse.Namespace, Found]:
    """Parses a command line and returns the arguments and the result of `compute` on them.

    Where the configuration cannot work, prints the reason and ends the program with status 2.
    """
    args = parser.parse_intermixed_args(argv)
    try:
        return args, compute(args)
    except ConfigError as error:
        parser.exit(2, f"error: {error}\n")


def load_config(config_name: str, overrides: Sequence[str]) -> PPOConfig:
    """Returns the configuration of a training. Raises ConfigError listing all that is wrong."""
    return validate(as_plain(composed(config_name, overrides)))


def load_shapes(path: str | None) -> Shapes:
    """Reads configs of models from a JSON file. Raises ConfigError where it has none."""
    if path is None:
        return {}
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(
            [f"--shapes {path}: no JSON of models' configs could be read there ({error})"]
        ) from error


def longest_trajectory(config: PPOConfig) -> Longest:
    """Returns the longest trajectory that `data.max_*_length` and `agent.max_turns` allow."""
    data = config.data
    turns = config.agent.get("max_turns")
    keys = "data.max_*_length"
    turn = data.max_response_length + data.max_obs_length
    tokens = data.max_prompt_length + turn  # the last turn may begin with max_prompt_length
    if not isinstance(turns, int):
        reason = f"{keys}; the number of turns is unknown, so all tokens count as trained"
        return Longest(tokens, 1.0, reason, None, tokens)
    tokens = min(tokens, data.max_start_length + turns * turn + data.max_response_length)
    written = min(tokens, (turns + 1) * data.max_response_length)
    keys = f"{keys}, agent.max_turns"
    if not config.actor_rollout_ref.actor.state_masking:
        return Longest(tokens, 1.0, f"{keys}, actor.state_masking=false", turns, written)
    return Longest(tokens, written / tokens, keys, turns, written)


def world_size(config: PPOConfig) -> int:
    """GPUs of the training."""
    return config.trainer.nnodes * config.trainer.n_gpus_per_node


def num_replicas(config: PPOConfig) -> int:
    """Engines of the rollout: copies of the model, each over `tensor_model_parallel_size` GPUs."""
    rollout = config.actor_rollout_ref.rollout
    shared = config.actor_rollout_ref.hybrid_engine
    gpus = world_size(config) if shared else rollout.nnodes * rollout.n_gpus_per_node
    return rollout.num_replicas or max(1, gpus // rollout.tensor_model_parallel_size)


def largest_pass(
    config: PPOConfig,
    name: str,
    section: ActorConfig | RefConfig | CriticConfig | RolloutConfig,
    what: Literal["ppo", "log_prob"],
    rows: int,
    longest: Longest,
) -> Pass:
    """Returns the largest micro-batch of `rows` rows over all ranks.

    `name`: the path of `section`, whose keys begin with `what`.
    """
    limit = getattr(section, f"{what}_max_token_len_per_gpu")
    most_rows = getattr(section, f"{what}_micro_batch_size_per_gpu")
    rows_of_rank = ceil(rows / world_size(config))
    rows_at_once = min(rows_of_rank, most_rows or rows)
    tokens = min(max(limit, longest.tokens), rows_at_once * longest.tokens)
    key = f"{name}.{what}_max_token_len_per_gpu" if limit > longest.tokens else "data.max_*_length"
    return Pass(tokens, longest.trained_share * tokens, key)


def roles_of(config: PPOConfig, longest: Longest, shapes: Shapes) -> list[Role]:
    """Returns the models that training keeps on a rank.

    Raises ConfigError where a model's config cannot be used.
    """
    main = config.actor_rollout_ref
    critic = config.critic
    world = world_size(config)
    batch = config.data.train_batch_size * main.rollout.n

    def trained(name: Literal["actor", "critic"], model: ModelConfig, infer: Pass) -> Role:
        section = main.actor if name == "actor" else critic
        rows = section.ppo_mini_batch_size
        sizes, num_trained = read_model(model, "lm" if name == "actor" else "value", shapes)
        return Role(
            name,
            sizes,
            num_trained,
            section.fsdp_config,
            world,
            infer=infer,
            update=largest_pass(config, SECTIONS[name], section, "ppo", rows, longest),
            checkpointing=model.enable_gradient_checkpointing,
        )

    rollout = "actor_rollout_ref.rollout"
    log_probs = largest_pass(config, rollout, main.rollout, "log_prob", batch, longest)
    roles = [trained("actor", main.model, log_probs)]
    if config.use_reference:
        log_probs = largest_pass(config, SECTIONS["ref"], main.ref, "log_prob", batch, longest)
        roles.append(Role("ref", roles[0].sizes, 0, main.ref.fsdp_config, world, log_probs))
    if config.use_teacher:
        teacher = config.teacher
        log_probs = largest_pass(config, SECTIONS["teacher"], teacher, "log_prob", batch, longest)
        sizes, _ = read_model(teacher.model.frozen(), "lm", shapes)
        roles.append(Role("teacher", sizes, 0, teacher.fsdp_config, world, log_probs))
    if config.use_critic:
        values = largest_pass(config, SECTIONS["critic"], critic, "ppo", batch, longest)
        roles.append(trained("critic", critic.model, values))
    return roles


def hf_config(
    config: ModelConfig, overrides: Mapping[str, Any], shapes: Shapes
) -> "PretrainedConfig":
    """Returns the Hugging Face config of a model. Raises OSError or ValueError without one."""
    from transformers import AutoConfig

    if config.path in shapes:
        return AutoConfig.for_model(**{**shapes[config.path], **overrides})
    return AutoConfig.from_pretrained(
        config.path, trust_remote_code=config.trust_remote_code, **overrides
    )


def read_model(
    config: ModelConfig, head: Literal["lm", "value"], shapes: Shapes
) -> tuple[Sizes, int]:
    """Returns the sizes of a model and the number of its trained parameters, without its weights.

    Raises ConfigError where the config cannot be read, or where the formulas do not hold for the
    model.
    """
    from verl.workers.image_tower import language_model

    try:
        model = model_without_storage(config, head, shapes)
    except (OSError, ValueError) as error:
        reason = f"model.path={config.path}: no config of a model could be read there ({error})"
        raise ConfigError([f"{reason}; --shapes FILE gives one without the hub"]) from error
    text = model.config.get_text_config()
    decoder = language_model(model) if config.reads_images else model
    sizes = sizes_of(model, decoder, text, text.vocab_size if head == "lm" else 0)
    return sizes, sum(p.numel() for p in model.parameters() if p.requires_grad)


def model_without_storage(
    config: ModelConfig, head: Literal["lm", "value"], shapes: Shapes
) -> "PreTrainedModel":
    """Builds a model with its adapters on the meta device.

    Raises ConfigError for one that cannot be estimated, OSError or ValueError without a config.
    """
    import torch
    from transformers import AutoModelForTokenClassification

    from verl.workers.image_tower import freeze_tower, policy_class
    from verl.workers.lora import add_adapters

    is_lm = head == "lm"
    overrides = config.architecture | ({} if is_lm else {"num_labels": 1})
    auto: Any = policy_class(config) if is_lm else AutoModelForTokenClassification
    hf = hf_config(config, overrides, shapes)
    refuse_unknown(config.path, hf.get_text_config())
    with torch.device("meta"):
        model = auto.from_config(hf, trust_remote_code=config.trust_remote_code)
        if config.reads_images:
            freeze_tower(model)
        return add_adapters(model, config) if config.lora_rank else model


def sizes_of(
    model: "PreTrainedModel", decoder: "PreTrainedModel", text: "PretrainedConfig", vocab: int
) -> Sizes:
    """The sizes of a model; `text` is the config of its `decoder`."""
    from verl.workers.fsdp_model import decoder_layers

    layers = [num_parameters(layer) for layer in decoder_layers(decoder)]
    heads = text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    return Sizes(
        params=num_parameters(model),
        layer=max(layers),
        layers=len(layers),
        hidden=text.hidden_size,
        queries=width * heads,
        keys=width * (getattr(text, "num_key_value_heads", None) or heads),
        intermediate=text.intermediate_size,
        vocab=vocab,
        head_norms=any(".q_norm." in name for name, _ in model.named_parameters()),
    )


def num_parameters(module: "Module") -> int:
    """The number of parameters of a module and of the modules in it."""
    return sum(parameter.numel() for parameter in module.parameters())


def refuse_unknown(path: str, text: "PretrainedConfig") -> None:
    """Raises ConfigError for a model whose layers the formulas do not describe."""
    for key, reason in REFUSED.items():
        if getattr(text, key, None):
            raise ConfigError(
                [
                    f"model.path={path} cannot be estimated: {reason} ({key} in its config); "
                    "only dense models whose attention is not capped can"
                ]
            )
