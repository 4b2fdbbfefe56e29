"""Tokenizers of the families that are trained, on a tiny byte-level BPE.

Special tokens and chat templates are theirs. The templates are written for these tests, after the
formats that the families publish.
"""

from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.models import train_bpe

CHATML = (
    "{%- if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou are a helpful "
    "assistant.<|im_end|>\n' }}"
    "{%- endif %}"
    "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- "
    "endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}"
)
"""Qwen2.5, base and instruct: a default system message."""
QWEN3 = (
    "{%- set last = messages | map(attribute='role') | list | length - 1 %}"
    "{%- for m in messages %}"
    "{%- set content = m.content %}"
    "{%- if m.role == 'assistant' and '</think>' in content %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') %}"
    "{%- endif %}"
    "{{- '<|im_start|>' + m.role + '\n' }}"
    "{%- if m.role == 'assistant' and loop.index0 == last %}{{- '<think>\n\n</think>\n\n' }}{%- "
    "endif %}"
    "{{- content + '<|im_end|>\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- "
    "'<think>\n\n</think>\n\n' }}{%- endif %}"
    "{%- endif %}"
)
"""Strips the thoughts of earlier turns; `enable_thinking=False` fills in an empty one."""
QWEN3_THINKING = QWEN3.replace(
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- "
    "'<think>\n\n</think>\n\n' }}{%- endif %}",
    "{{- '<think>\n' }}",
)
"""Opens the thought in the generation prompt, as Qwen3-Thinking, QwQ and the distilled R1 models
do."""
LLAMA3 = (
    "{{- bos_token }}"
    "{%- for m in messages %}"
    "{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + "
    "'<|eot_id|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- "
    "endif %}"
)
GEMMA = (
    "{{- bos_token }}"
    "{%- if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{%- "
    "endif %}"
    "{%- for m in messages %}"
    "{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
    "{%- endif %}"
    "{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | "
    "trim }}"
    "{{- '<end_of_turn>\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<start_of_turn>model\n' }}{%- endif %}"
)
MISTRAL = (
    "{{- bos_token }}"
    "{%- for m in messages %}"
    "{%- if m.role == 'user' %}{{- '[INST] ' + m.content + '[/INST]' }}"
    "{%- else %}{{- ' ' + m.content + eos_token }}{%- endif %}"
    "{%- endfor %}"
)
"""No generation prompt, and the token that ends a turn is EOS."""


@dataclass(frozen=True)
class Family:
    """What distinguishes a tokenizer for an agent."""

    special: tuple[str, ...]
    eos: str
    template: str | None
    bos: str | None = None
    pad: str | None = None
    thoughts: bool = False
    """Whether `<think>` and `</think>` are tokens (not special ones), as in Qwen3."""


QWEN_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LLAMA_SPECIAL = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
)
GEMMA_SPECIAL = ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>")

FAMILIES = {
    "qwen2.5-base": Family(QWEN_SPECIAL, "<|endoftext|>", CHATML, pad="<|endoftext|>"),
    "qwen2.5-instruct": Family(QWEN_SPECIAL, "<|im_end|>", CHATML, pad="<|endoftext|>"),
    "qwen3": Family(QWEN_SPECIAL, "<|im_end|>", QWEN3, pad="<|endoftext|>", thoughts=True),
    "qwen3-thinking": Family(
        QWEN_SPECIAL, "<|im_end|>", QWEN3_THINKING, pad="<|endoftext|>", thoughts=True
    ),
    "llama3-base": Family(LLAMA_SPECIAL, "<|end_of_text|>", None, bos="<|begin_of_text|>"),
    "llama3-instruct": Family(LLAMA_SPECIAL, "<|eot_id|>", LLAMA3, bos="<|begin_of_text|>"),
    "gemma-base": Family(GEMMA_SPECIAL, "<eos>", None, bos="<bos>", pad="<pad>"),
    "gemma-instruct": Family(GEMMA_SPECIAL, "<eos>", GEMMA, bos="<bos>", pad="<pad>"),
    "mistral-instruct": Family(("<s>", "</s>", "[INST]", "[/INST]"), "</s>", MISTRAL, bos="<s>"),
    "plain": Family(("<|endoftext|>",), "<|endoftext|>", None),
}


def make_family_tokenizer(folder: Path | str, name: str) -> PreTrainedTokenizerFast:
    """Saves the tokenizer of a family in `folder`, and returns it as loaded from there.

    Families with a BOS put it before texts.
    """
    family = FAMILIES[name]
    tokenizer = train_bpe(400)
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in family.special])
    if family.thoughts:
        tokenizer.add_tokens([AddedToken(text, special=False) for text in ("<think>", "</think>")])
    if family.bos:
        bos_id = tokenizer.token_to_id(family.bos)
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{family.bos} $A", special_tokens=[(family.bos, bos_id)]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=family.eos, bos_token=family.bos, pad_token=family.pad
    )
    fast.chat_template = family.template
    fast.save_pretrained(str(folder))
    return AutoTokenizer.from_pretrained(str(folder))
