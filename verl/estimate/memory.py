"""What is alive on one GPU at the peak of each phase: pure functions of sizes (docs/memory.md has
them as formulas).

Phases do not overlap: rollout, log-probs (actor, reference, values), critic update, actor update. A
phase has moments, of which the fullest counts. Bytes throughout; a rank is a GPU.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from verl.utils.torch_functional import CHUNK_ELEMENTS
from verl.workers.config import FSDPConfig

GIB = 2**30
FLOAT32 = 4
WIDTH = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of a number."""
CONTEXTS_GIB = 4.0
"""CUDA contexts of trainer and engine, NCCL, library workspaces, fragmentation: a guess, not
measured."""
CHUNKS_INFER = 2
"""float32 copies of a chunk of logits that `verl.utils.torch_functional` has at once, without a
gradient."""
CHUNKS_TRAIN = 4
"""The same with a gradient."""
WEIGHTS = "weights"
OPTIMIZER = "optimizer state"
GRADIENTS = "gradients"
GATHERED = "gathered parameters"
REDUCED = "gradients before reduction"
KEPT = "activations kept"
LAYER = "activations of a layer"
LOGITS = "logits and gradient"
CHUNKS = "float32 chunks of logits"
CONTEXTS = "contexts, fragmentation (a guess)"
Entries = dict[tuple[str, str], float]
"""Bytes by role and name."""


@dataclass(frozen=True)
class Sizes:
    """A decoder of the Llama family: parameters in all and of the largest layer (one group of
    FSDP); its widths."""

    params: int
    layer: int
    layers: int
    hidden: int
    queries: int
    """num_attention_heads * head_dim; `keys`: num_key_value_heads * head_dim."""
    keys: int
    intermediate: int
    vocab: int
    """0 for a value head."""
    head_norms: bool = False
    """Whether queries and keys are normed (Qwen3)."""

    @property
    def root(self) -> int:
        """Parameters outside of the layers: embedding, last norm, head."""
        return self.params - self.layer * self.layers


class Pass(NamedTuple):
    """Tokens of a micro-batch; those that are trained on, which alone have logits; the key that
    bounds the former."""

    tokens: float
    trained: float
    key: str


@dataclass(frozen=True)
class Role:
    """One model on one of `world` ranks. `trained`: its parameters with a gradient (all, of the
    adapters, or none)."""

    name: Literal["actor", "ref", "critic"]
    sizes: Sizes
    trained: int
    fsdp: FSDPConfig
    world: int
    infer: Pass
    update: Pass | None = None
    checkpointing: bool = True

    @property
    def width(self) -> int:
        """Bytes of a number in the computation."""
        return WIDTH[self.fsdp.dtype]

    @property
    def whole(self) -> bool:
        """Whether all parameters are trained."""
        return self.trained == self.sizes.params

    @property
    def reshards(self) -> bool:
        return self.fsdp.reshard_after_forward

    @property
    def gradients(self) -> float:
        """Bytes of the sharded gradients, in the dtype of their parameters (PEFT keeps adapters in
        float32)."""
        return self.trained * (WIDTH[self.fsdp.model_dtype] if self.whole else FLOAT32) / self.world

    def gathered(self, layers: int) -> float:
        """Bytes of gathered parameters: the root and so many layers; all, if nothing is
        resharded."""
        return self.width * (
            self.sizes.root + layers * self.sizes.layer if self.reshards else self.sizes.params
        )

    @property
    def gathering(self) -> float:
        """Bytes while the root arrives: in a buffer, on its way to where it is used; on one rank,
        from its cast."""
        s = self.sizes
        casts = self.fsdp.dtype != self.fsdp.model_dtype
        if self.world == 1:
            return self.gathered(0) + self.width * s.vocab * s.hidden * casts
        return self.gathered(1) + self.width * s.root * (1 + casts / self.world)


def layer_saved(s: Sizes, width: int) -> float:
    """Bytes per token that a layer keeps for its backward pass.

    A norm: a float32 copy of its input, the normed input, and the output, if that is the input of a
    projection. Attention: q, k, v, output. MLP: gate, its activation, up, their product.
    """
    normed = 2 * s.hidden + s.head_norms * (s.queries + s.keys)
    norms = (FLOAT32 + width) * normed + 2 * width * s.hidden
    attention = 2 * s.queries + 2 * s.keys
    return norms + width * (attention + 4 * s.intermediate)


def resident(role: Role, updates: bool) -> dict[str, float]:
    """Bytes that a role keeps on the GPU: its shard of the weights and of AdamW's two averages."""
    if role.fsdp.param_offload:
        return {}
    averages = 2 * role.gradients if updates or not role.fsdp.optimizer_offload else 0
    return {
        WEIGHTS: role.sizes.params * WIDTH[role.fsdp.model_dtype] / role.world,
        OPTIMIZER: averages,
    }


def infer_moments(role: Role) -> dict[str, dict[str, float]]:
    """Bytes at the moments of a forward pass without gradient, one of which is its peak."""
    s = role.sizes
    w = role.width
    tokens, trained, _ = role.infer
    ahead = int(role.world > 1)  # layers in the buffer of an all-gather
    logits = w * s.vocab * trained
    layer = w * (max(3 * s.intermediate, 6 * s.hidden) + 4 * s.hidden) * tokens
    chunks = CHUNKS_INFER * FLOAT32 * min(s.vocab * trained, CHUNK_ELEMENTS)
    return {
        "gathering": {GATHERED: role.gathering},
        "decoder layer": {GATHERED: role.gathered(1 + ahead), LAYER: layer},
        "head": {GATHERED: role.gathered(ahead), LAYER: 2 * w * s.hidden * tokens, LOGITS: logits},
        "log-probs": {
            GATHERED: 0 if role.reshards else role.gathered(0),
            LOGITS: logits,
            CHUNKS: chunks,
        },
    }


def update_moments(role: Role) -> dict[str, dict[str, float]]:
    """Bytes at the moments of a forward and backward pass, one of which is its peak; not of the
    first micro-batch."""
    assert role.update is not None
    s = role.sizes
    w = role.width
    tokens, trained, _ = role.update
    ahead = int(role.world > 1)  # layers in the buffer of an all-gather
    logits = w * s.vocab * trained
    saved = layer_saved(s, w) * tokens
    # parameters with a gradient, of a layer and of the root
    layer, root = (s.layer, s.root) if role.whole else (role.trained / s.layers, 0)
    head = w * s.vocab * s.hidden * role.whole
    tied = 0 < s.root < 2 * s.vocab * s.hidden
    # gradients of embedding and head; tied ones are beside their sum
    both = w * root + 2 * head * tied
    kept = s.layers * (w * s.hidden * tokens if role.checkpointing else saved)
    top = kept + (FLOAT32 + 2 * w) * s.hidden * tokens  # with what the last norm keeps
    backward = 2 * w * s.intermediate * tokens + saved * role.checkpointing
    # the float32 copy beside its source, then beside the rank's sum
    reduced = FLOAT32 + max(w, FLOAT32 / role.world)
    stays = 0 if role.reshards else role.gathered(0)
    chunks = CHUNKS_TRAIN * FLOAT32 * min(s.vocab * trained, CHUNK_ELEMENTS)
    moments = {
        "loss": {GATHERED: stays, KEPT: top, LOGITS: 2 * logits, CHUNKS: chunks},
        "gathering": {
            GATHERED: role.gathering if role.reshards else stays,
            KEPT: top,
            LOGITS: logits,
        },
        "head": {GATHERED: role.gathered(ahead), KEPT: top, LOGITS: logits, REDUCED: head},
        "layer": {
            GATHERED: role.gathered(1 + ahead),
            KEPT: kept,
            LAYER: backward,
            REDUCED: head + reduced * layer,
        },
        "embedding": {GATHERED: role.gathered(0), REDUCED: both + FLOAT32 * layer},
        "reduction": {GATHERED: stays, REDUCED: reduced * root},
    }
    own = {GRADIENTS: 0.0 if role.fsdp.param_offload else role.gradients}
    return {f"backward, {name}" if name != "loss" else name: own | m for name, m in moments.items()}


def resting(roles: Sequence[Role], phase: str, active: Role | None = None) -> Entries:
    """Bytes that the roles keep during a phase, without the passes of the `active` one.

    Without resharding a forward pass leaves its parameters gathered until a backward pass, if there
    is one.
    """
    entries: Entries = {}
    for role in roles:
        kept = resident(role, updates=phase == f"{role.name} update")
        entries |= {(role.name, name): size for name, size in kept.items()}
        lingers = role.name == "ref" or phase in ("log-probs", "critic update")
        if lingers and role is not active and not role.reshards:
            entries[role.name, GATHERED] = role.gathered(0)
    return entries


def peak(
    phase: str, roles: Sequence[Role], always: Entries, engine: Entries
) -> tuple[Entries, str]:
    """What is alive at the peak of a phase, and when that is.

    `always`: what stays through all phases beside the roles. `engine`: the engine while it is
    awake.
    """
    always = {("", CONTEXTS): CONTEXTS_GIB * GIB} | always
    if phase == "rollout":
        return resting(roles, phase) | always | engine, ""
    passes = {
        role: infer_moments(role) if phase == "log-probs" else update_moments(role)
        for role in roles
        if phase in ("log-probs", f"{role.name} update")
    }
    found = [
        (
            resting(roles, phase, role)
            | always
            | {(role.name, name): size for name, size in entries.items()},
            f"{role.name}: {moment}",
        )
        for role, moments in passes.items()
        for moment, entries in moments.items()
    ]
    return max(found, key=lambda f: sum(f[0].values()))
