"""GPU memory of a configuration, before it runs: what one GPU holds at the peak of each phase.

Needs no GPU, and of the model only its Hugging Face config. Exit status: 0 if it fits, 1 if it does
not (the largest entries are named, and the keys that shrink them), 2 if the configuration cannot
work. Formulas: docs/memory.md.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from verl.estimate import engine_memory, memory
from verl.estimate.engine_memory import EngineMemory, retriever_memory
from verl.estimate.memory import GIB, Entries, Role, peak, resident
from verl.estimate.sizing import (
    SECTIONS,
    Longest,
    add_arguments,
    answer,
    load_config,
    load_shapes,
    longest_trajectory,
    num_replicas,
    roles_of,
)
from verl.trainer.config import PPOConfig

Peaks = Mapping[str, tuple[Entries, str]]
"""For each phase what is alive at its peak, and the moment of the peak."""
PROGRAM = "python -m verl.trainer.estimate"
NO_RETRIEVER = (
    "; no retriever on these GPUs is counted (--retriever-passages N counts an exact E5 index of N)"
)
OWNERS = ["actor", "ref", "teacher", "critic", "engine", "retriever", ""]
"""Whose entries the table lists, in its order."""


@dataclass(frozen=True)
class Estimate:
    """What one GPU holds, and what decides it."""

    config: PPOConfig
    roles: Sequence[Role]
    longest: Longest
    limit: float
    """Memory of a GPU in bytes."""
    retriever: float
    """Bytes that a retriever takes on each GPU."""
    engine: EngineMemory | None
    """None where the rollout uses an endpoint instead of engines."""
    peaks: Peaks

    @property
    def shares_gpus(self) -> bool:
        """Whether engines and trainer are on the same GPUs."""
        return self.engine is not None and self.config.actor_rollout_ref.hybrid_engine

    @property
    def left(self) -> float:
        """Bytes that are free at the fullest moment; negative where it does not fit."""
        return self.limit - max(total(entries) for entries, _ in self.peaks.values())

    @property
    def free_at_start(self) -> float:
        """Bytes that an engine finds free when it starts.

        The ranks have their weights by then, and the optimizer has no state yet.
        """
        if not self.shares_gpus:
            return self.limit - memory.CONTEXTS_GIB * GIB - self.retriever
        weights = sum(resident(role, updates=False).get(memory.WEIGHTS, 0.0) for role in self.roles)
        return self.limit - memory.CONTEXTS_GIB * GIB - self.retriever - weights

    @property
    def problems(self) -> list[str]:
        """Why the engine would not start."""
        if self.engine is None:
            return []
        found = []
        if self.engine.share > self.free_at_start:
            beside = "trainer and retriever" if self.retriever else "trainer"
            found.append(
                f"the engine refuses to start: it asks for {gib(self.engine.share)} GiB, and the "
                f"{beside} leave{'' if self.retriever else 's'} {gib(self.free_at_start)}: lower "
                "actor_rollout_ref.rollout.gpu_memory_utilization"
            )
        if self.engine.kv_tokens < self.config.max_model_len:
            found.append(
                f"the engine's KV cache has room for {self.engine.kv_tokens:,} tokens and not for "
                f"one sequence of {self.config.max_model_len:,}: raise "
                "actor_rollout_ref.rollout.gpu_memory_utilization, or lower "
                "max_num_batched_tokens and max_num_seqs"
            )
        return found

    @property
    def fits(self) -> bool:
        return self.left >= 0 and not self.problems


def estimate(
    config: PPOConfig, roles: Sequence[Role], longest: Longest, limit: float, retriever: float
) -> Estimate:
    """Computes the memory of every phase on a GPU of `limit` bytes.

    `retriever`: bytes of the GPU that a retriever takes.
    """
    rollout = config.actor_rollout_ref.rollout
    engine = (
        engine_memory.engine_memory(roles[0].sizes, rollout, limit)
        if rollout.name == "vllm"
        else None
    )
    awake = engine.entries() if engine and config.actor_rollout_ref.hybrid_engine else {}
    always: Entries = {("retriever", engine_memory.INDEX): retriever}
    phases = ["rollout", "log-probs", *["critic update"] * config.use_critic, "actor update"]
    peaks = {phase: peak(phase, roles, always, awake) for phase in phases}
    return Estimate(config, roles, longest, limit, retriever, engine, peaks)


def total(entries: Entries) -> float:
    """Bytes of all entries."""
    return sum(entries.values())


def gib(size: float) -> str:
    """Bytes in GiB, as text."""
    return f"{size / GIB:.1f}"


def label(role: str, name: str) -> str:
    """How the report names an entry."""
    return f"{role}: {name}" if role else name


def table(peaks: Peaks) -> str:
    """Entries by phase in GiB, their sums, and where in each phase its peak is."""
    columns = [entries for entries, _ in peaks.values()]
    names: dict[tuple[str, str], None] = {}  # in the order in which they come
    for entries in columns:
        names |= {key: None for key, size in entries.items() if size}
    lines = [f"{'GiB per GPU at the peak of':42}" + "".join(f"{phase:>15}" for phase in peaks)]
    for key in sorted(names, key=lambda key: OWNERS.index(key[0])):
        cells = [entries.get(key, 0.0) / GIB for entries in columns]
        texts = [f"{cell:15.2f}" if cell else f"{'-':>15}" for cell in cells]
        lines.append(f"{label(*key):42}" + "".join(texts))
    sums = [f"{total(entries) / GIB:15.2f}" for entries in columns]
    lines.append(f"{'total':42}" + "".join(sums))
    moments = [f"peak of the {phase}: {moment}" for phase, (_, moment) in peaks.items() if moment]
    return "\n".join(lines + moments)


def engine_text(found: Estimate, mean_tokens: int) -> str:
    """What the engine's KV cache holds, and what the engine finds when it starts."""
    engine = found.engine
    if engine is None:
        return "no engine: another service answers"
    rollout = found.config.actor_rollout_ref.rollout
    rows = found.config.data.train_batch_size * rollout.n / num_replicas(found.config)
    at_longest = engine.kv_tokens // found.longest.tokens
    at_mean = engine.kv_tokens // mean_tokens
    where = "" if found.shares_gpus else " (engines have GPUs of their own)"
    return (
        f"KV cache{where}: {gib(engine.kv_cache)} GiB / {engine.kv_bytes_per_token:,.0f} bytes a "
        f"token = {engine.kv_tokens:,} tokens: {at_longest:,} trajectories of "
        f"{found.longest.tokens:,} tokens at once, {at_mean:,} of {mean_tokens:,};\n"
        f"  an engine's part of a batch is {rows:,.0f} trajectories, of which "
        f"max_num_seqs={rollout.max_num_seqs} decode at once\n"
        f"engine start: asks for {gib(engine.share)} GiB, finds {gib(found.free_at_start)} free"
    )


def verdict(peaks: Peaks, roles: Sequence[Role], limit: float, retriever: float = 0.0) -> str:
    """What is left of `limit` bytes, or what is too large.

    For every phase above the limit it names the three largest entries that keys can shrink, and
    these keys.
    """
    sums = {phase: total(entries) for phase, (entries, _) in peaks.items()}
    beside = f", with {gib(retriever)} GiB of a retriever on each GPU" if retriever else ""
    over = {phase: size for phase, size in sums.items() if size > limit}
    if not over:
        fullest = max(sums, key=lambda phase: sums[phase])
        left = gib(limit - sums[fullest])
        return (
            f"fits: {left} of {limit / GIB:g} GiB are left at the peak "
            f"({fullest}){beside or NO_RETRIEVER}"
        )
    phases = ", ".join(f"{phase} {gib(size)}" for phase, size in over.items())
    lines = [f"does not fit in {limit / GIB:g} GiB: {phases}{beside}"]
    for key, (size, keys) in shrinkable({phase: peaks[phase][0] for phase in over}, roles):
        lines.append(f"  {gib(size)} GiB of {label(*key)}")
        lines += [f"    {text}" for text in keys]
    return "\n".join(lines)


def shrinkable(
    over: Mapping[str, Entries], roles: Sequence[Role]
) -> list[tuple[tuple[str, str], tuple[float, list[str]]]]:
    """The three largest entries of each phase that keys can shrink, with bytes and keys.

    An entry that occurs in several phases is listed once, with its largest size and the keys of all
    these phases.
    """
    by_name: dict[str, Role] = {role.name: role for role in roles}
    found: dict[tuple[str, str], tuple[float, list[str]]] = {}
    for phase, parts in over.items():
        entries = engine_as_one(parts)
        remedies = {key: remedy(key, by_name.get(key[0]), phase) for key in entries}
        shrinking = [key for key in entries if remedies[key]]
        for key in sorted(shrinking, key=lambda key: -entries[key])[:3]:
            size, keys = found.get(key, (0.0, []))
            found[key] = max(size, entries[key]), list(dict.fromkeys(keys + remedies[key]))
    return sorted(found.items(), key=lambda item: -item[1][0])


def engine_as_one(entries: Entries) -> Entries:
    """The entries with the engine's parts summed: one key decides how large they are together."""
    others = {key: size for key, size in entries.items() if key[0] != "engine"}
    engine = total({key: size for key, size in entries.items() if key[0] == "engine"})
    return others | ({("engine", "its share"): engine} if engine else {})


def remedy(key: tuple[str, str], role: Role | None, phase: str) -> list[str]:
    """The keys that shrink an entry, the cheapest first."""
    owner, name = key
    if owner == "engine":
        return ["lower actor_rollout_ref.rollout.gpu_memory_utilization"]
    if owner == "retriever":
        return ["a retriever on the CPU or on another machine (retriever.url)"]
    if role is None:
        return []
    model = "critic.model" if role.name == "critic" else "actor_rollout_ref.model"
    fsdp = f"{SECTIONS[role.name]}.fsdp_config"
    work = role.infer if phase == "log-probs" else role.update
    tokens = [f"lower {work.key}"] if work else []
    adapters = [f"{model}.lora_rank=64"] if role.whole else []
    away = [f"{fsdp}.optimizer_offload=true"] if phase != f"{role.name} update" else []
    offload = [f"{fsdp}.param_offload=true", "more GPUs (trainer.nnodes, trainer.n_gpus_per_node)"]
    checkpointing = [] if role.checkpointing else [f"{model}.enable_gradient_checkpointing=true"]
    return {
        memory.WEIGHTS: offload,
        memory.OPTIMIZER: away + adapters + offload,
        memory.GRADIENTS: adapters + offload,
        memory.GATHERED: [] if role.reshards else [f"{fsdp}.reshard_after_forward=true"],
        memory.REDUCED: adapters,
        memory.KEPT: checkpointing + tokens,
    }.get(name, tokens)


def report(found: Estimate, gpu_memory_gb: float, mean_tokens: int) -> str:
    """The whole estimate, as text."""
    actor = found.roles[0]
    longest = found.longest
    assert actor.update is not None
    sizes = f"{actor.sizes.params / 1e6:,.1f} M parameters, {actor.trained / 1e6:,.1f} M trained"
    lines = [
        f"{found.config.actor_rollout_ref.model.path}: {sizes}; {actor.world} GPUs of "
        f"{gpu_memory_gb:g} GiB",
        f"longest trajectory: {longest.tokens:,} tokens, of which at most "
        f"{longest.trained_share:.0%} are trained ({longest.keys})",
        f"micro-batch: {actor.update.tokens:,.0f} tokens in the actor's update",
        "",
        table(found.peaks),
        "",
        engine_text(found, mean_tokens),
        "",
        verdict(found.peaks, found.roles, found.limit, found.retriever),
        *found.problems,
    ]
    return "\n".join(lines) + "\n"


def build_parser(prog: str = PROGRAM) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    parser.add_argument(
        "--trained-share",
        type=float,
        help="share of the tokens that the policy writes, where known",
    )
    parser.add_argument(
        "--mean-tokens", type=int, default=1300, help="of a trajectory, expected (default: 1300)"
    )
    retriever = parser.add_mutually_exclusive_group()
    retriever.add_argument(
        "--retriever-gb-per-gpu", type=float, help="GiB of a retriever on every GPU of the trainer"
    )
    retriever.add_argument(
        "--retriever-passages",
        type=int,
        help=(
            "passages of an exact E5 index over all GPUs of a node (--faiss_gpu); wiki-18 has "
            "21015324"
        ),
    )
    return parser


def estimate_arguments(args: argparse.Namespace) -> Estimate:
    """Estimates what the command line asks for. Raises ConfigError or an error of Hydra."""
    config = load_config(args.config_name, args.overrides)
    longest = longest_trajectory(config)
    if args.trained_share is not None:
        longest = longest._replace(
            trained_share=args.trained_share, keys=f"{longest.keys}; --trained-share"
        )
    roles = roles_of(config, longest, load_shapes(args.shapes))
    retriever = (args.retriever_gb_per_gpu or 0.0) * GIB
    if args.retriever_passages:
        retriever = retriever_memory(args.retriever_passages, config.trainer.n_gpus_per_node)
    return estimate(config, roles, longest, args.gpu_memory_gb * GIB, retriever)


def main(argv: Sequence[str] | None = None, prog: str = PROGRAM) -> int:
    """Prints table and verdict; the exit status says whether the configuration fits."""
    args, found = answer(build_parser(prog), argv, estimate_arguments)
    sys.stdout.write(report(found, args.gpu_memory_gb, args.mean_tokens))
    return int(not found.fits)
