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


HERMES_TOOLS = (
    "{%- if tools %}"
    "{{- '<|im_start|>system\n# Tools\n\n<tools>' }}"
    "{%- for tool in tools %}{{- '\n' + (tool | tojson) }}{%- endfor %}"
    "{{- '\n</tools>\n\nFor each call, return a json object within <tool_call></tool_call>"
    "<|im_end|>\n' }}"
    "{%- endif %}"
)
XML_TOOLS = HERMES_TOOLS.replace("a json object", "XML")
HERMES_CALL = (
    '{{- \'<tool_call>\n{"name": "\' + call.function.name + \'", "arguments": \' }}'
    "{{- call.function.arguments | tojson }}{{- '}\n</tool_call>' }}"
)
XML_CALL = (
    "{{- '<tool_call>\n<function=' + call.function.name + '>\n' }}"
    "{%- for key, value in call.function.arguments.items() %}"
    "{{- '<parameter=' + key + '>\n' }}"
    "{{- value if value is string else value | tojson }}{{- '\n</parameter>\n' }}"
    "{%- endfor %}"
    "{{- '</function>\n</tool_call>' }}"
)
TOOL_CONVERSATION = (
    "{%- set ns = namespace(query=0) %}"
    "{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.query = loop.index0 %}"
    "{%- endif %}{%- endfor %}"
    "{%- for m in messages %}"
    "{%- if m.role == 'assistant' %}"
    "{%- set content = m.content or '' %}"
    "{%- if STRIPS and '</think>' in content and loop.index0 < ns.query %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') %}"
    "{%- endif %}"
    "{{- '<|im_start|>assistant\n' + content }}"
    "{%- for call in m.tool_calls or [] %}"
    "{%- if content or not loop.first %}{{- '\n' }}{%- endif %}CALL"
    "{%- endfor %}"
    "{{- '<|im_end|>\n' }}"
    "{%- elif m.role == 'tool' %}"
    "{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}"
    "{{- '<|im_start|>user' }}"
    "{%- endif %}"
    "{{- '\n<tool_response>\n' + m.content + '\n</tool_response>' }}"
    "{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\n' }}"
    "{%- endif %}"
    "{%- else %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
"""Results that follow each other share a user's message. Where it STRIPS, thoughts before the last
question are left out; those between calls and results stay."""
QWEN25_TOOLS = HERMES_TOOLS + TOOL_CONVERSATION.replace("CALL", HERMES_CALL).replace(
    "STRIPS", "false"
)
QWEN3_TOOLS = HERMES_TOOLS + TOOL_CONVERSATION.replace("CALL", HERMES_CALL).replace(
    "STRIPS", "true"
)
QWEN3_THINKING_TOOLS = QWEN3_TOOLS.replace(
    "{{- '<|im_start|>assistant\n' }}{%- endif %}",
    "{{- '<|im_start|>assistant\n<think>\n' }}{%- endif %}",
)
QWEN35_TOOLS = XML_TOOLS + TOOL_CONVERSATION.replace("CALL", XML_CALL).replace("STRIPS", "true")
LLAMA3_TOOLS = (
    "{{- bos_token }}"
    "{%- if tools %}{{- '<|start_header_id|>system<|end_header_id|>\n\n' }}"
    "{%- for tool in tools %}{{- tool | tojson + '\n' }}{%- endfor %}{{- '<|eot_id|>' }}"
    "{%- endif %}"
    "{%- for m in messages %}"
    "{%- if m.tool_calls %}"
    "{%- if m.tool_calls | length != 1 %}"
    "{{- raise_exception('This model only supports single tool-calls at once!') }}{%- endif %}"
    "{%- set call = m.tool_calls[0].function %}"
    '{{- \'<|start_header_id|>assistant<|end_header_id|>\n\n{"name": "\' + call.name }}'
    "{{- '\", \"parameters\": ' }}{{- call.arguments | tojson }}{{- '}<|eot_id|>' }}"
    "{%- elif m.role == 'tool' %}"
    "{{- '<|start_header_id|>ipython<|end_header_id|>\n\n' + m.content + '<|eot_id|>' }}"
    "{%- else %}"
    "{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + "
    "'<|eot_id|>' }}"
    "{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- "
    "endif %}"
)
"""One call in a turn, and the call is all that the turn says."""
MISTRAL_TOOLS = (
    "{{- bos_token }}"
    "{%- if tools %}"
    "{{- '[AVAILABLE_TOOLS] ' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}{%- endif %}"
    "{%- for m in messages %}"
    "{%- if m.role == 'user' %}{{- '[INST] ' + m.content + '[/INST]' }}"
    "{%- elif m.role == 'tool' %}"
    '{{- \'[TOOL_RESULTS] {"content": \' + (m.content | tojson) + \', "call_id": "\' }}'
    "{{- m.tool_call_id + '\"}[/TOOL_RESULTS]' }}"
    "{%- elif m.tool_calls %}"
    "{{- '[TOOL_CALLS] [' }}"
    "{%- for call in m.tool_calls %}"
    '{{- \'{"name": "\' + call.function.name + \'", "arguments": \' }}'
    "{{- call.function.arguments | tojson }}{{- ', \"id\": \"' + call.id + '\"}' }}"
    "{%- if not loop.last %}{{- ', ' }}{%- endif %}"
    "{%- endfor %}{{- ']' + eos_token }}"
    "{%- else %}{{- ' ' + m.content + eos_token }}{%- endif %}"
    "{%- endfor %}"
)
"""Results are JSON, and calls have ids, which the policy writes."""


@dataclass(frozen=True)
class Family:
    """What distinguishes a tokenizer for an agent."""

    special: tuple[str, ...]
    eos: str
    template: str | None
    bos: str | None = None
    pad: str | None = None
    tokens: tuple[str, ...] = ()
    """Added tokens that are not special: `<think>` of Qwen3."""


THOUGHTS = ("<think>", "</think>")
CALLS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
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
    "qwen3": Family(QWEN_SPECIAL, "<|im_end|>", QWEN3, pad="<|endoftext|>", tokens=THOUGHTS),
    "qwen3-thinking": Family(
        QWEN_SPECIAL, "<|im_end|>", QWEN3_THINKING, pad="<|endoftext|>", tokens=THOUGHTS
    ),
    "llama3-base": Family(LLAMA_SPECIAL, "<|end_of_text|>", None, bos="<|begin_of_text|>"),
    "llama3-instruct": Family(LLAMA_SPECIAL, "<|eot_id|>", LLAMA3, bos="<|begin_of_text|>"),
    "gemma-base": Family(GEMMA_SPECIAL, "<eos>", None, bos="<bos>", pad="<pad>"),
    "gemma-instruct": Family(GEMMA_SPECIAL, "<eos>", GEMMA, bos="<bos>", pad="<pad>"),
    "mistral-instruct": Family(("<s>", "</s>", "[INST]", "[/INST]"), "</s>", MISTRAL, bos="<s>"),
    "plain": Family(("<|endoftext|>",), "<|endoftext|>", None),
}

MISTRAL_SPECIAL = (
    *("<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
    *("[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
)
NATIVE = {
    "qwen2.5-tools": Family(QWEN_SPECIAL, "<|im_end|>", QWEN25_TOOLS, tokens=CALLS[:2]),
    "qwen3-tools": Family(QWEN_SPECIAL, "<|im_end|>", QWEN3_TOOLS, tokens=THOUGHTS + CALLS),
    "qwen3-thinking-tools": Family(
        QWEN_SPECIAL, "<|im_end|>", QWEN3_THINKING_TOOLS, tokens=THOUGHTS + CALLS
    ),
    "qwen3.5-tools": Family(QWEN_SPECIAL, "<|im_end|>", QWEN35_TOOLS, tokens=THOUGHTS + CALLS),
    "llama3-tools": Family(
        (*LLAMA_SPECIAL, "<|python_tag|>"), "<|eot_id|>", LLAMA3_TOOLS, bos="<|begin_of_text|>"
    ),
    "mistral-tools": Family(MISTRAL_SPECIAL, "</s>", MISTRAL_TOOLS, bos="<s>"),
}
"""Families whose templates write tool calls."""


def make_family_tokenizer(folder: Path | str, name: str) -> PreTrainedTokenizerFast:
    """Saves the tokenizer of a family in `folder`, and returns it as loaded from there.

    Families with a BOS put it before texts.
    """
    family = (FAMILIES | NATIVE)[name]
    tokenizer = train_bpe(400)
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in family.special])
    if family.tokens:
        tokenizer.add_tokens([AddedToken(text, special=False) for text in family.tokens])
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
