"""GPU memory of a configuration, before it runs: what is alive on one GPU at the peak of each phase, in GiB.

Needs no GPU, and of the model only its Hugging Face config. Exit status: 0 if it fits, 1 if it does not (the largest
entries are named, and the keys that shrink them), 2 if the configuration cannot work. Formulas: docs/memory.md.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from math import ceil
from typing import Any, Literal

from verl.trainer import memory
from verl.trainer.memory import GIB, Entries, Pass, Role, Sizes, peak
from verl.utils.errors import ConfigError
from verl.workers.config import ModelConfig

SECTIONS = {"actor": "actor_rollout_ref.actor", "ref": "actor_rollout_ref.ref", "critic": "critic"}
Peaks = Mapping[str, tuple[Entries, str]]
"""By phase what is alive at its peak, and where in it that is."""


def longest_trajectory(config: Any) -> tuple[int, float, str]:
    """Its tokens, the share of them that is trained on at most, and the keys that say so."""
    data, turns, keys = config.data, config.agent.get("max_turns"), "data.max_*_length"
    turn = data.max_response_length + data.max_obs_length
    tokens = data.max_prompt_length + turn  # the last turn may begin with max_prompt_length
    if not isinstance(turns, int):
        return tokens, 1.0, f"{keys}; the number of turns is unknown, so all tokens count as trained"
    tokens = min(tokens, data.max_start_length + turns * turn + data.max_response_length)
    if not config.actor_rollout_ref.actor.state_masking:
        return tokens, 1.0, f"{keys}, agent.max_turns, actor.state_masking=false"
    return tokens, min(1.0, (turns + 1) * data.max_response_length / tokens), f"{keys}, agent.max_turns"


def roles_of(config: Any, length: int, share: float) -> list[Role]:
    """The models that training keeps on a rank. Raises ConfigError where a model's config cannot be used."""
    main, critic, world = (
        config.actor_rollout_ref,
        config.critic,
        config.trainer.nnodes * config.trainer.n_gpus_per_node,
    )
    batch = config.data.train_batch_size * main.rollout.n

    def work(name: str, section: Any, what: str, rows: int) -> Pass:
        limit, most = (getattr(section, f"{what}_{key}_per_gpu") for key in ("max_token_len", "micro_batch_size"))
        tokens = min(max(limit, length), min(ceil(rows / world), most or rows) * length)
        key = f"{name}.{what}_max_token_len_per_gpu" if limit > length else "data.max_*_length"
        return Pass(tokens, share * tokens, key)

    def trained(name: Any, section: Any, model: ModelConfig, infer: Pass) -> Role:
        update = work(SECTIONS[name], section, "ppo", section.ppo_mini_batch_size)
        sizes, parameters = read_model(model, "value" if name == "critic" else "lm")
        return Role(
            name, sizes, parameters, section.fsdp_config, world, infer, update, model.enable_gradient_checkpointing
        )

    log_probs = work("actor_rollout_ref.rollout", main.rollout, "log_prob", batch)
    roles = [trained("actor", main.actor, main.model, log_probs)]
    if config.use_reference:
        log_probs = work(SECTIONS["ref"], main.ref, "log_prob", batch)
        roles.append(Role("ref", roles[0].sizes, 0, main.ref.fsdp_config, world, log_probs))
    if config.use_critic:
        roles.append(trained("critic", critic, critic.model, work("critic", critic, "ppo", batch)))
    return roles


def read_model(config: ModelConfig, head: Literal["lm", "value"]) -> tuple[Sizes, int]:
    """Sizes of a model and the number of its trained parameters, from its Hugging Face config alone."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForTokenClassification

    from verl.workers.fsdp_model import decoder_layers
    from verl.workers.lora import add_adapters

    lm, remote = head == "lm", config.trust_remote_code
    overrides = config.architecture | ({} if lm else {"num_labels": 1})
    auto: Any = AutoModelForCausalLM if lm else AutoModelForTokenClassification
    try:
        hf = AutoConfig.from_pretrained(config.path, trust_remote_code=remote, **overrides)
        with torch.device("meta"):
            model = auto.from_config(hf, trust_remote_code=remote)
            model = add_adapters(model, config) if config.lora_rank else model
    except (OSError, ValueError) as error:
        raise ConfigError([f"model.path={config.path}: no config of a model could be read there ({error})"]) from error
    text = hf.get_text_config()
    if any(getattr(text, key, None) for key in ("attn_logit_softcapping", "num_experts", "num_local_experts")):
        raise ConfigError(
            [f"model.path={config.path}: only dense models whose attention is not capped can be estimated"]
        )
    layers = [sum(p.numel() for p in layer.parameters()) for layer in decoder_layers(model)]
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    sizes = Sizes(
        params=sum(p.numel() for p in model.parameters()),
        layer=max(layers),
        layers=len(layers),
        hidden=text.hidden_size,
        queries=width * text.num_attention_heads,
        keys=width * (getattr(text, "num_key_value_heads", None) or text.num_attention_heads),
        intermediate=text.intermediate_size,
        vocab=text.vocab_size if lm else 0,
        head_norms=any(".q_norm." in name for name, _ in model.named_parameters()),
    )
    return sizes, sum(p.numel() for p in model.parameters() if p.requires_grad)


def total(entries: Entries) -> float:
    return sum(entries.values())


def table(peaks: Peaks) -> str:
    """Entries by phase in GiB, their sums, and where in each phase its peak is."""
    names = {key: None for entries, _ in peaks.values() for key, size in entries.items() if size}
    order = sorted(names, key=lambda key: ["actor", "ref", "critic", ""].index(key[0]))
    lines = [f"{'GiB per GPU at the peak of':42}" + "".join(f"{phase:>15}" for phase in peaks)]
    for key in order:
        cells = [entries.get(key, 0.0) / GIB for entries, _ in peaks.values()]
        lines.append(f"{label(*key):42}" + "".join(f"{cell:15.2f}" if cell else f"{'-':>15}" for cell in cells))
    lines.append(f"{'total':42}" + "".join(f"{total(entries) / GIB:15.2f}" for entries, _ in peaks.values()))
    return "\n".join(lines + [f"peak of the {phase}: {moment}" for phase, (_, moment) in peaks.items() if moment])


def label(role: str, name: str) -> str:
    return f"{role}: {name}" if role else name


def verdict(peaks: Peaks, roles: Sequence[Role], limit: float) -> str:
    """What is left of `limit` bytes; or of every phase that exceeds them the three largest entries that keys shrink."""
    over = {phase: entries for phase, (entries, _) in peaks.items() if total(entries) > limit}
    if not over:
        phase, most = max(((phase, total(entries)) for phase, (entries, _) in peaks.items()), key=lambda p: p[1])
        return f"fits: {(limit - most) / GIB:.1f} of {limit / GIB:g} GiB are left at the peak ({phase})"
    by_name: dict[str, Role] = {role.name: role for role in roles}
    found: dict[tuple[str, str], tuple[float, list[str]]] = {}
    for phase, entries in over.items():
        remedies = {key: remedy(key[1], by_name.get(key[0]), phase) for key in entries}
        for key in sorted((k for k in entries if remedies[k]), key=lambda k: -entries[k])[:3]:
            size, keys = found.get(key, (0.0, []))
            found[key] = max(size, entries[key]), list(dict.fromkeys(keys + remedies[key]))
    lines = [f"does not fit in {limit / GIB:g} GiB: " + ", ".join(f"{p} {total(e) / GIB:.1f}" for p, e in over.items())]
    for key, (size, keys) in sorted(found.items(), key=lambda item: -item[1][0]):
        lines += [f"  {size / GIB:.1f} GiB of {label(*key)}", *(f"    {text}" for text in keys)]
    return "\n".join(lines)


def remedy(name: str, role: Role | None, phase: str) -> list[str]:
    """The keys that shrink an entry, the cheapest first."""
    if role is None:
        return ["lower actor_rollout_ref.rollout.gpu_memory_utilization"] if name == memory.ENGINE else []
    section, model = SECTIONS[role.name], "critic.model" if role.name == "critic" else "actor_rollout_ref.model"
    fsdp, work = f"{section}.fsdp_config", role.infer if phase == "log-probs" else role.update
    tokens = [f"lower {work.key}"] if work else []
    adapters = [f"{model}.lora_rank=64"] if role.whole else []
    away = [f"{fsdp}.optimizer_offload=true"] if phase != f"{role.name} update" else []
    offload = [f"{fsdp}.param_offload=true", "more GPUs (trainer.nnodes, trainer.n_gpus_per_node)"]
    return {
        memory.WEIGHTS: offload,
        memory.OPTIMIZER: away + adapters + offload,
        memory.GRADIENTS: adapters + offload,
        memory.GATHERED: [] if role.reshards else [f"{fsdp}.reshard_after_forward=true"],
        memory.REDUCED: adapters,
        memory.KEPT: [f"{model}.enable_gradient_checkpointing=true"] * (not role.checkpointing) + tokens,
    }.get(name, tokens)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints table and verdict; the exit status."""
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from verl.trainer.config import validate
    from verl.trainer.main_ppo import CONFIGS

    parser = argparse.ArgumentParser(
        "python -m verl.trainer.estimate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as in training, experiment=... among them")
    parser.add_argument("--config-name", default="grpo", help="as in training: grpo (default) or ppo")
    parser.add_argument("--gpu-memory-gb", type=float, default=80.0, help="memory of a GPU in GiB (default: 80)")
    parser.add_argument("--trained-share", type=float, help="share of the tokens that the policy writes, where known")
    args = parser.parse_intermixed_args(argv)
    try:
        with initialize_config_dir(CONFIGS, version_base=None):
            raw: Any = OmegaConf.to_container(compose(args.config_name, args.overrides), resolve=True)
        config = validate(raw)
        length, share, keys = longest_trajectory(config)
        if args.trained_share is not None:
            share, keys = args.trained_share, f"{keys}; --trained-share"
        roles = roles_of(config, length, share)
    except (ConfigError, HydraException, OmegaConfBaseException) as error:
        parser.exit(2, f"error: {error}\n")
    rollout, limit = config.actor_rollout_ref.rollout, args.gpu_memory_gb * GIB
    engine = rollout.gpu_memory_utilization * limit if rollout.name == "vllm" else 0.0
    phases = ["rollout", "log-probs", *["critic update"] * config.use_critic, "actor update"]
    peaks = {phase: peak(phase, roles, engine) for phase in phases}
    sizes = f"{roles[0].sizes.params / 1e6:,.1f} M parameters, {roles[0].trained / 1e6:,.1f} M trained"
    sys.stdout.write(
        f"{config.actor_rollout_ref.model.path}: {sizes}; {roles[0].world} GPUs of {args.gpu_memory_gb:g} GiB\n"
        f"longest trajectory: {length:,} tokens, of which at most {share:.0%} are trained ({keys})\n"
        f"micro-batch: {roles[0].update.tokens:,.0f} tokens in the actor's update\n\n"  # pyright: ignore
        f"{table(peaks)}\n\n{verdict(peaks, roles, limit)}\n"
    )
    return int(any(total(entries) > limit for entries, _ in peaks.values()))


if __name__ == "__main__":
    sys.exit(main())
