"""What is alive on one GPU at the peak of each phase, as pure functions of sizes.

docs/memory.md has the formulas.

The phases are rollout, log-probs (actor, reference, values), critic update and actor update; they
do not overlap. A phase is estimated at several moments, and the one that takes most is its peak.
All figures are bytes, and each rank has one GPU.
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
"""CUDA contexts of trainer and engine, NCCL, library workspaces, fragmentation: a guess."""
CHUNKS_INFER = 2
"""Float32 copies of a chunk of logits that `verl.utils.torch_functional` holds at once.

This is the number in a pass without a gradient."""
CHUNKS_TRAIN = 4
"""The same in a pass with a gradient."""
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
    """The sizes of a decoder of the Llama family: numbers of parameters, and widths."""

    params: int
    """Parameters of the whole model."""
    layer: int
    """Parameters of the largest layer. FSDP shards every layer as one group."""
    layers: int
    hidden: int
    queries: int
    """num_attention_heads * head_dim."""
    keys: int
    """num_key_value_heads * head_dim."""
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
    """The largest micro-batch of a pass."""

    tokens: float
    trained: float
    """Tokens that are trained on, which alone have logits."""
    key: str
    """The key of the configuration that bounds `tokens`."""


@dataclass(frozen=True)
class Role:
    """One model on one of `world` ranks."""

    name: Literal["actor", "ref", "teacher", "critic"]
    sizes: Sizes
    trained: int
    """Parameters with a gradient: all, those of the adapters, or none."""
    fsdp: FSDPConfig
    world: int
    infer: Pass
    update: Pass | None = None
    checkpointing: bool = True

    @property
    def width(self) -> int:
        """Bytes of one number in the dtype of the computation."""
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
        """Bytes of the sharded gradients, in the dtype of their parameters."""
        # PEFT keeps adapters in float32
        width = WIDTH[self.fsdp.model_dtype] if self.whole else FLOAT32
        return self.trained * width / self.world

    def gathered(self, layers: int) -> float:
        """Bytes of gathered parameters: the root and `layers` layers, or all without resharding."""
        if not self.reshards:
            return self.width * self.sizes.params
        return self.width * (self.sizes.root + layers * self.sizes.layer)

    @property
    def gathering(self) -> float:
        """Bytes of gathered parameters while the root is being gathered.

        The root is then held twice: in the buffer of the all-gather and in its final place. On one
        rank its cast takes the place of the buffer.
        """
        s = self.sizes
        casts = self.fsdp.dtype != self.fsdp.model_dtype
        if self.world == 1:
            return self.gathered(0) + self.width * s.vocab * s.hidden * casts
        return self.gathered(1) + self.width * s.root * (1 + casts / self.world)


def layer_saved(s: Sizes, width: int) -> float:
    """Bytes per token that a layer keeps for its backward pass.

    A norm keeps a float32 copy of its input, the normed input, and the output, if that is the input
    of a projection. Attention keeps q, k, v and its output; the MLP the gate, its activation, up,
    and their product.
    """
    normed = 2 * s.hidden + s.head_norms * (s.queries + s.keys)
    norms = (FLOAT32 + width) * normed + 2 * width * s.hidden
    attention = 2 * s.queries + 2 * s.keys
    return norms + width * (attention + 4 * s.intermediate)


def resident(role: Role, updates: bool) -> dict[str, float]:
    """Bytes that a role keeps on the GPU: its shards of the weights and of AdamW's two averages."""
    if role.fsdp.param_offload:
        return {}
    averages = 2 * role.gradients if updates or not role.fsdp.optimizer_offload else 0
    return {
        WEIGHTS: role.sizes.params * WIDTH[role.fsdp.model_dtype] / role.world,
        OPTIMIZER: averages,
    }


def infer_moments(role: Role) -> dict[str, dict[str, float]]:
    """Bytes at the moments of a forward pass without a gradient, one of which is its peak."""
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
    """Bytes at the moments of a forward and backward pass, one of which is its peak.

    The pass is one after the first micro-batch, so that the sharded gradients already exist.
    """
    assert role.update is not None
    ahead = int(role.world > 1)  # layers in the buffer of an all-gather
    stays = 0 if role.reshards else role.gathered(0)
    num_logits = role.sizes.vocab * role.update.trained
    logits = role.width * num_logits
    chunks = CHUNKS_TRAIN * FLOAT32 * min(num_logits, CHUNK_ELEMENTS)
    gathering = role.gathering if role.reshards else stays
    held = activations(role, role.update.tokens)
    top = held.with_last_norm
    whole = unreduced(role)
    moments = {
        "loss": {GATHERED: stays, KEPT: top, LOGITS: 2 * logits, CHUNKS: chunks},
        "gathering": {GATHERED: gathering, KEPT: top, LOGITS: logits},
        "head": {GATHERED: role.gathered(ahead), KEPT: top, LOGITS: logits, REDUCED: whole.head},
        "layer": {
            GATHERED: role.gathered(1 + ahead),
            KEPT: held.kept,
            LAYER: held.of_layer,
            REDUCED: whole.layer,
        },
        "embedding": {GATHERED: role.gathered(0), REDUCED: whole.embedding},
        "reduction": {GATHERED: stays, REDUCED: whole.reduction},
    }
    own = {GRADIENTS: 0.0 if role.fsdp.param_offload else role.gradients}
    return {f"backward, {name}" if name != "loss" else name: own | m for name, m in moments.items()}


class Activations(NamedTuple):
    """Bytes of activations during a backward pass."""

    kept: float
    """What all layers keep from the forward pass."""
    with_last_norm: float
    """The same, and what the last norm keeps."""
    of_layer: float
    """What the layer whose backward pass runs holds beside what is kept."""


def activations(role: Role, tokens: float) -> Activations:
    """The activations of a forward and backward pass over `tokens`."""
    s = role.sizes
    w = role.width
    saved = layer_saved(s, w) * tokens
    # a checkpointed layer keeps its input alone, and all the rest while it runs again
    kept = s.layers * (w * s.hidden * tokens if role.checkpointing else saved)
    return Activations(
        kept=kept,
        with_last_norm=kept + (FLOAT32 + 2 * w) * s.hidden * tokens,
        of_layer=2 * w * s.intermediate * tokens + saved * role.checkpointing,
    )


class Unreduced(NamedTuple):
    """Bytes of gradients that are not reduced yet, at moments of a backward pass."""

    head: float
    layer: float
    embedding: float
    reduction: float


def unreduced(role: Role) -> Unreduced:
    """Bytes of the whole gradients that are not reduced yet, at moments of a backward pass.

    FSDP reduces the gradients of a layer as soon as its backward pass is done, and those of the
    root last. A reduction holds the gradient in float32, first beside the original, then beside the
    rank's part of the sum.
    """
    s = role.sizes
    w = role.width
    # parameters with a gradient, of a layer and of the root; adapters are in layers alone
    layer, root = (s.layer, s.root) if role.whole else (role.trained / s.layers, 0)
    head = w * s.vocab * s.hidden * role.whole
    # a tied embedding and head have a gradient each, which are held beside their sum
    tied = 0 < s.root < 2 * s.vocab * s.hidden
    root_gradients = w * root + 2 * head * tied
    reducing = FLOAT32 + max(w, FLOAT32 / role.world)
    return Unreduced(
        head=head,
        layer=head + reducing * layer,
        embedding=root_gradients + FLOAT32 * layer,
        reduction=reducing * root,
    )


def resting(roles: Sequence[Role], phase: str, active: Role | None = None) -> Entries:
    """Bytes that the roles keep during a phase, beside the passes of the `active` role.

    Without resharding a forward pass leaves its parameters gathered until the next backward pass.
    The reference and the teacher have no backward pass, so their parameters stay gathered.
    """
    entries: Entries = {}
    for role in roles:
        kept = resident(role, updates=phase == f"{role.name} update")
        entries |= {(role.name, name): size for name, size in kept.items()}
        lingers = role.name in ("ref", "teacher") or phase in ("log-probs", "critic update")
        if lingers and role is not active and not role.reshards:
            entries[role.name, GATHERED] = role.gathered(0)
    return entries


def peak(
    phase: str, roles: Sequence[Role], always: Entries, engine: Entries
) -> tuple[Entries, str]:
    """What is alive at the peak of a phase, and at which moment that is.

    `always`: what is there in all phases, beside the roles. `engine`: what an engine holds while it
    is awake.
    """
    always = {("", CONTEXTS): CONTEXTS_GIB * GIB} | always
    if phase == "rollout":
        return resting(roles, phase) | always | engine, ""
    found: list[tuple[Entries, str]] = []
    for role in roles:
        if phase not in ("log-probs", f"{role.name} update"):
            continue
        kept = resting(roles, phase, role) | always
        moments = infer_moments(role) if phase == "log-probs" else update_moments(role)
        for moment, sizes in moments.items():
            passing = {(role.name, name): size for name, size in sizes.items()}
            found.append((kept | passing, f"{role.name}: {moment}"))
    return max(found, key=lambda entries_and_moment: sum(entries_and_moment[0].values()))
