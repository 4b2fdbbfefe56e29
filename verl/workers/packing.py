"""A probe that decides whether trajectories may share a forward pass of a model.

In most families packed rows do not affect each other. But recurrent layers carry the state of one
row into the next, some attention crosses the borders of rows, and some kinds of RoPE depend on the
longest row. Configurations do not say so reliably, so it is tried.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from verl.protocol import DataProto
from verl.utils.errors import ConfigError
from verl.workers.attention import PACKED, choose_attention
from verl.workers.config import FrozenModelConfig
from verl.workers.forward import forward_log_probs, forward_values
from verl.workers.shallow import (
    LENGTH_DEPENDENT,
    WINDOW,
    Head,
    rope_kinds,
    rope_limit,
    shallow_model,
)

BOUND = 1e-3
"""Largest difference of a log-prob or value, in float32, that counts as rounding."""
LENGTHS = (11, 29, 17)
"""Tokens of each row of a probe: there are short rows before and after a longer one."""
PROMPT = 3
OTHERS = ("sdpa", "eager")
"""Attention implementations of transformers that are tried, one row at a time, if the chosen one
does not work."""


@dataclass(frozen=True)
class Packing:
    """How rows go through a model, and what the probe saw."""

    attention: str
    """Attention implementation of transformers."""
    packs: bool
    """Whether rows may share a forward pass; otherwise each passes alone."""
    gap: float = 0.0
    """Largest difference from the model's plain forward pass of each row, in nats or units of the
    value."""
    reason: str = ""
    """What was tried before, and how large its differences were."""


def packing_of(
    config: FrozenModelConfig,
    head: Head,
    on_gpu: bool,
    dtype: torch.dtype,
    longest: int | None = None,
) -> Packing:
    """Decides how rows of this model go through it. `longest`: most tokens of a row, if known.

    If `pack_rows` is set, it is not checked. Raises ConfigError for a model that is not causal, or
    that cannot be run in the way in which training runs models.
    """
    hf_config = AutoConfig.from_pretrained(
        config.path, trust_remote_code=config.trust_remote_code, **config.architecture
    )
    if config.reads_images:
        hf_config = hf_config.get_text_config()  # rows share the passes of the language model
    chosen = config.override_config.get("attn_implementation")
    attention = chosen or choose_attention(hf_config, on_gpu, dtype)
    if config.pack_rows is not None:
        return Packing(
            attention, config.pack_rows, reason=f"model.pack_rows={str(config.pack_rows).lower()}"
        )
    try:
        probe = Probe(hf_config, head, longest, config.trust_remote_code)
    except Exception as error:
        raise ConfigError(
            [
                f"model.path={config.path}: no shallow copy of {hf_config.model_type} can be "
                f"built, so that nothing is known of it ({_first_line(error)}); "
                "model.pack_rows=false trains it a row at a time without a probe"
            ]
        ) from error
    on_cpu = _on_cpu(attention, hf_config)
    found = probe.decide(on_cpu, also=() if chosen else OTHERS)
    if isinstance(found, str):
        raise ConfigError([f"model.path={config.path}: {hf_config.model_type} {found}"])
    return found if found.attention != on_cpu else replace(found, attention=attention)


class Probe:
    """A shallow random copy of a model, and rows to compare its forward passes on."""

    def __init__(
        self,
        hf_config: PretrainedConfig,
        head: Head,
        longest: int | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        kinds = rope_kinds(hf_config) & set(LENGTH_DEPENDENT)
        stretched = bool(kinds) and (longest is None or longest > rope_limit(hf_config))
        self.head: Head = head
        self.model = shallow_model(
            hf_config, head, stretched_rope=stretched, trust_remote_code=trust_remote_code
        )
        forget_lengths(self.model)
        self.rows = _ragged_rows(self.model.config.get_text_config().vocab_size)

    @torch.no_grad()
    def decide(self, attention: str, also: Sequence[str] = OTHERS) -> Packing | str:
        """The first way with the results of the plain forward pass, or why there is none.

        Packed rows are tried before rows that pass alone.
        """
        try:
            if self.model._can_set_attn_implementation():
                _use(self.model, "eager")  # it supports everything that families need
            if not self._is_causal():
                return "is not causal: its states depend on what comes after (an encoder?)"
            truth = self._plain()
        except Exception as error:
            return (
                f"does not run in a plain forward pass on the CPU: {_first_line(error)}. Where "
                "that is a kernel for GPUs (flash-linear-attention, causal-conv1d), "
                "model.pack_rows=false trains a row at a time, unprobed"
            )
        ways = [
            (attention, True),
            (attention, False),
            *((name, False) for name in also if name != attention),
        ]
        seen: list[str] = []
        for name, packs in ways:
            gap = self._gap(name, packs, truth)
            if isinstance(gap, float) and gap <= BOUND:
                return Packing(name, packs, gap, "; ".join(seen))
            what = f"differs by {gap:.2g}" if isinstance(gap, float) else f"fails ({gap})"
            seen.append(
                f"{'rows in one pass' if packs else 'a row alone'} with attention {name} {what}"
            )
        return f"cannot be trained here: {'; '.join(seen)}, against its plain forward pass"

    def _gap(self, attention: str, packs: bool, truth: torch.Tensor) -> float | str:
        """The largest difference of this way from `truth`, or the error that it raises."""
        try:
            _use(self.model, attention)
            if packs:
                return float((self._ours(self.rows) - truth).abs().max())
            alone = torch.cat([self._ours(self.rows[[place]]) for place in range(len(self.rows))])
            return float((alone - truth).abs().max())
        except Exception as error:
            return _first_line(error)

    def _ours(self, rows: DataProto) -> torch.Tensor:
        """Log-probs or values [b, R], by the forward pass of training."""
        if self.head == "value":
            return forward_values(self.model, rows)
        return forward_log_probs(self.model, rows, 1.0, with_entropy=False)[0]

    def _plain(self) -> torch.Tensor:
        """Log-probs or values [b, R], by the model's own forward pass of each row alone."""
        result = torch.zeros(self.rows.batch["responses"].shape)
        for place, length in enumerate(LENGTHS):
            ids = torch.cat(
                [self.rows.batch["prompts"][place], self.rows.batch["responses"][place]]
            )[:length]
            states = self.model(input_ids=ids[None], use_cache=False).logits[0, PROMPT - 1 : -1]
            if self.head == "value":
                values = states[:, 0]
            else:
                values = states.log_softmax(-1).gather(1, ids[PROMPT:, None])[:, 0]
            result[place, : length - PROMPT] = values
        return result

    def _is_causal(self) -> bool:
        """Whether the states of a row do not change when its last tokens do."""
        ids = torch.cat([self.rows.batch["prompts"][1], self.rows.batch["responses"][1]])[None]
        others = ids.clone()
        others[:, -WINDOW:] = ids[:, :WINDOW]
        states, changed = (
            self.model(input_ids=tokens, use_cache=False).logits[0, :-WINDOW]
            for tokens in (ids, others)
        )
        return float((states - changed).abs().max()) <= BOUND


def forget_lengths(model: PreTrainedModel) -> None:
    """Makes dynamic RoPE depend on the present rows only.

    By itself, transformers keeps the frequencies of the longest row so far.
    """

    def reset(module: Any, _: object) -> None:
        module.max_seq_len_cached = module.original_max_seq_len
        module.inv_freq = module.original_inv_freq.to(module.inv_freq.device)

    for module in model.modules():
        if getattr(module, "rope_type", None) == "dynamic":
            module.register_forward_pre_hook(reset)


def _ragged_rows(vocab: int) -> DataProto:
    """Rows of `LENGTHS` random tokens below `vocab`, trained on all but their prompts."""
    generator = torch.Generator().manual_seed(0)
    width = max(LENGTHS) - PROMPT
    response_lengths = torch.tensor(LENGTHS) - PROMPT
    real = (torch.arange(width) < response_lengths[:, None]).long()
    tokens = torch.randint(2, vocab, (len(LENGTHS), PROMPT + width), generator=generator)
    return DataProto.from_dict(
        {
            "prompts": tokens[:, :PROMPT],
            "responses": tokens[:, PROMPT:],
            "attention_mask": torch.cat(
                [torch.ones(len(LENGTHS), PROMPT, dtype=torch.long), real], dim=1
            ),
            "response_mask": real,
        }
    )


def _on_cpu(attention: str, config: PretrainedConfig) -> str:
    """The implementation that represents `attention` on the CPU.

    It is `PACKED` for kernels of a GPU, which compute the same. But they can also cap attention
    scores (Gemma 2), which `PACKED` cannot; then it is eager attention.
    """
    if not attention.startswith("flash"):
        return attention
    caps_scores = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    return "eager" if caps_scores else PACKED


def _use(model: PreTrainedModel, attention: str) -> None:
    model.set_attn_implementation(attention)
    if model.config._attn_implementation != attention:
        raise ValueError(f"{type(model).__name__} does not take attention {attention}")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
