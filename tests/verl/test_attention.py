"""Which attention a model gets."""

import pytest
import torch
from transformers import Gemma2Config, Qwen2Config

from verl.workers import attention
from verl.workers.attention import PACKED, choose_attention


@pytest.mark.parametrize(
    ("installed", "on_gpu", "dtype", "config", "expected"),
    [
        (True, True, torch.bfloat16, Qwen2Config, "flash_attention_2"),
        (True, True, torch.bfloat16, Gemma2Config, "flash_attention_2"),
        (True, True, torch.float32, Qwen2Config, PACKED),
        (True, False, torch.bfloat16, Qwen2Config, PACKED),
        (False, True, torch.bfloat16, Qwen2Config, PACKED),
        (False, True, torch.bfloat16, Gemma2Config, "eager"),
    ],
)
def test_flash_attention_is_chosen_where_it_is_installed_and_can_do_it(
    monkeypatch, installed, on_gpu, dtype, config, expected
):
    monkeypatch.setattr(attention, "is_flash_attn_2_available", lambda: installed)
    assert choose_attention(config(), on_gpu, dtype) == expected


def test_a_module_of_that_name_from_another_package_is_not_flash_attention_2(tmp_path, monkeypatch):
    """flash-attn-4 has it too, and transformers raises when it is to be used as version 2."""
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert choose_attention(Qwen2Config(), on_gpu=True, dtype=torch.bfloat16) == PACKED
