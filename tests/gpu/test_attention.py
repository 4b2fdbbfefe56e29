"""Half precision on a GPU, against float32 with one sequence at a time.

The kernels are torch's variable-length one and FlashAttention's.
"""

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.models import make_tiny_qwen2
from tests.verl.batches import ragged_batch
from verl.workers.attention import PACKED, packed_arguments, packed_attention
from verl.workers.forward import forward_log_probs

LENGTHS = [1, 7, 64, 130, 33]
WIDTH = 64
WINDOW = 5


def attend(
    device: str, dtype: torch.dtype, heads: int, kv_heads: int, window: int | None
) -> list[torch.Tensor]:
    """Output and gradients of packed sequences, for one input.

    The output is [1, T, H, D]; the gradients of query, key and value are [1, H, T, D].
    """
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        # numbers of both dtypes
        return torch.randn(shape, generator=generator).bfloat16().to(device, dtype)

    query, key, value = (
        draw(1, n, sum(LENGTHS), WIDTH).requires_grad_() for n in (heads, kv_heads, kv_heads)
    )
    arguments = packed_arguments(torch.tensor(LENGTHS, device=device))
    out, _ = packed_attention(
        torch.nn.Module(),
        query,
        key,
        value,
        None,
        scaling=WIDTH**-0.5,
        sliding_window=window,
        **arguments,
    )
    out.backward(draw(*out.shape))
    return [
        x.detach().float().cpu() for x in (out, query.grad, key.grad, value.grad) if x is not None
    ]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("heads", "kv_heads", "window"),
    [(4, 4, None), (4, 2, None), (4, 2, WINDOW)],
    ids=["plain", "grouped", "window"],
)
def test_the_variable_length_kernel_is_attention_a_sequence_at_a_time(
    monkeypatch, heads, kv_heads, window
):
    expected = attend("cpu", torch.float32, heads, kv_heads, window)
    monkeypatch.setattr("verl.workers.attention._one_by_one", None)  # the kernel, or nothing
    found = attend("cuda", torch.bfloat16, heads, kv_heads, window)
    assert len(found) == 4
    for ours, exact in zip(
        found, expected, strict=True
    ):  # bfloat16 on the CPU: .03 apart; a window of 6: 2 to 3
        torch.testing.assert_close(ours, exact, atol=0.05, rtol=0.02)


def log_probs_and_gradient(
    path: str, attention: str, device: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a model in bfloat16."""
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.bfloat16, attn_implementation=attention
    )
    model.to(device).eval()
    data = ragged_batch(torch.float32).to(device)
    log_probs, _ = forward_log_probs(model, data, 0.7, with_entropy=False)
    (log_probs * data.batch["advantages"]).sum().backward()
    return log_probs.detach().cpu(), torch.cat(
        [p.grad.flatten().float().cpu() for p in model.parameters()]
    )


@pytest.mark.gpu("flash_attn")
def test_flash_attention_is_packed_attention(tmp_path):
    path = str(make_tiny_qwen2(tmp_path))
    (ours, gradient), (flash, flash_gradient) = (
        log_probs_and_gradient(path, name, "cuda") for name in (PACKED, "flash_attention_2")
    )
    # eager attention on the CPU: .005, .05 and .013 apart; one that looks into other rows: .5, 3
    # and 1.3
    assert (ours - flash).abs().mean() < 0.02 and (ours - flash).abs().max() < 0.2
    assert (gradient - flash_gradient).norm() < 0.05 * gradient.norm()
