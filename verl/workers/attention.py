"""Attention over packed sequences: within each sequence only, and without padding.

One row holds all sequences of a micro-batch, one after the other. `cu_seq_lens` [n + 1] says where
each starts, and where the last one ends.
"""

from inspect import signature
from typing import Any

import torch
from torch.nn.attention import varlen
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig
from transformers.masking_utils import flash_attention_mask
from transformers.utils.import_utils import is_flash_attn_2_available

PACKED = "packed"
"""Name of `packed_attention` among the attention implementations of transformers."""
NAMES_GROUPS = "enable_gqa" in signature(varlen.varlen_attn).parameters
"""Whether torch's kernel has an argument for heads that share keys and values.

That of torch 2.11 has none, and takes it from the shapes."""


def choose_attention(config: PretrainedConfig, on_gpu: bool, dtype: torch.dtype) -> str:
    """flash_attention_2 if it is installed and the dtype allows it, else packed attention.

    On a GPU packed attention runs the same kernel, which comes with torch. Whether
    flash_attention_2 is installed is asked of transformers, because it does not work with other
    packages whose module is flash_attn, such as flash-attn-4. Models that cap their attention
    scores (Gemma 2) get eager attention instead of packed attention, because torch's kernels cannot
    cap. The memory of eager attention grows with the square of a micro-batch's tokens.
    """
    if on_gpu and dtype != torch.float32 and is_flash_attn_2_available():
        return "flash_attention_2"
    return "eager" if getattr(config.get_text_config(), "attn_logit_softcapping", None) else PACKED


def packed_arguments(lengths: torch.Tensor) -> dict[str, Any]:
    """Arguments that a model passes on to its attention, for packed sequences of `lengths` [n]."""
    starts = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    longest = int(lengths.max())
    return {
        "cu_seq_lens_q": starts,
        "cu_seq_lens_k": starts,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Causal attention of [1, H, T, D] within each sequence, as [1, T, H, D].

    It implements transformers' interface of attention functions. On a GPU in half precision it runs
    torch's variable-length kernel, otherwise torch's sdpa for one sequence after the other. Raises
    ValueError for arguments that neither supports.
    """
    if softcap is not None or s_aux is not None or cu_seq_lens_q is None or max_length_q is None:
        raise ValueError(
            "packed attention has neither capped scores nor sinks: set "
            "++actor_rollout_ref.model.override_config.attn_implementation, to eager for instance"
        )
    if query.is_cuda and query.dtype != torch.float32:
        from torch.nn.attention.varlen import varlen_attn

        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        grouped: Any = {"enable_gqa": q.shape[1] != k.shape[1]} if NAMES_GROUPS else {}
        out: Any = varlen_attn(
            q,
            k,
            v,
            cu_seq_lens_q,
            cu_seq_lens_q,
            max_length_q,
            max_length_q,
            scale=scaling,
            window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
            **grouped,
        )
        return out[None], None
    out = _one_by_one(query, key, value, cu_seq_lens_q, scaling, sliding_window)  # pyright: ignore
    return out, None


@torch.compiler.disable
def _one_by_one(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    starts: torch.Tensor,
    scaling: float | None,
    sliding_window: int | None,
) -> torch.Tensor:
    sizes = starts.diff().tolist()
    grouped = query.shape[1] != key.shape[1]
    outputs = []
    for q, k, v in zip(*(x.split(sizes, dim=2) for x in (query, key, value)), strict=True):
        size = q.shape[2]
        mask = None
        if sliding_window is not None and size > sliding_window:
            distance = torch.arange(size, device=q.device)[:, None] - torch.arange(
                size, device=q.device
            )
            mask = (distance >= 0) & (distance < sliding_window)
        output = scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=grouped
        )
        outputs.append(output.transpose(1, 2))
    return torch.cat(outputs, dim=1)  # contiguous, which some families need


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, flash_attention_mask)
