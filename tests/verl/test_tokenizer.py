"""Prompts as ids, for every family of tokens and chat templates: BOS once, control tokens by the
template alone."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.templates import FAMILIES, make_family_tokenizer
from verl.utils import tokenizer as tokenizers
from verl.utils.errors import DataError
from verl.utils.tokenizer import (
    control_tokens,
    encode_chat,
    encode_text,
    end_of_turn,
    has_template,
    template_problems,
    user_turn,
)

QUESTION = [{"role": "user", "content": "Question: Where was Ada Marin born?\n"}]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_prompt_has_bos_once_where_the_family_has_one(family, name):
    tokenizer = family(name)
    ids = encode_chat(tokenizer, QUESTION)
    expected = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    assert ids[: len(expected)] == expected
    assert [id_ for id_ in ids if id_ == tokenizer.bos_token_id] == expected


@pytest.mark.parametrize(
    "name", [name for name, family in FAMILIES.items() if family.template is None]
)
def test_without_a_template_a_prompt_is_what_the_tokenizer_makes_of_its_text(family, name):
    tokenizer = family(name)
    assert encode_chat(tokenizer, QUESTION) == tokenizer(QUESTION[0]["content"])["input_ids"]


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.template])
def test_with_a_template_a_prompt_is_what_the_template_makes(family, name):
    tokenizer = family(name)
    made = tokenizer.apply_chat_template(
        QUESTION, tokenize=True, add_generation_prompt=True, return_dict=False
    )
    assert encode_chat(tokenizer, QUESTION) == made


@pytest.mark.parametrize("name", FAMILIES)
def test_a_message_cannot_write_control_tokens(family, name):
    """Also those without a role of their own in the tokenizer: `<|im_start|>`,
    `<|start_header_id|>`."""
    tokenizer = family(name)
    controls = control_tokens(tokenizer)
    assert set(controls) == set(FAMILIES[name].special)
    special = set(tokenizer.convert_tokens_to_ids(controls))
    plain = [id_ for id_ in encode_chat(tokenizer, QUESTION) if id_ in special]
    for token in controls:
        spelled = [{"role": "user", "content": f"Question: what is {token}?\n"}]
        ids = encode_chat(tokenizer, spelled)
        assert [id_ for id_ in ids if id_ in special] == plain
        assert f"what is {token}?" in tokenizer.decode(ids)


@settings(deadline=None, max_examples=60)
@given(
    name=st.sampled_from([name for name, family in FAMILIES.items() if family.template]),
    content=st.text(alphabet="aZ ?!\n<>é中", max_size=12),
)
def test_messages_with_and_without_spelled_control_tokens_are_encoded_alike(family, name, content):
    """What stands around marks and is cut at the template's special tokens is what the whole text
    would give."""
    tokenizer = family(name)
    messages = [{"role": "user", "content": content}]
    around = tokenizers._encode_around_controls(tokenizer, messages, control_tokens(tokenizer), {})
    assert around == encode_chat(tokenizer, messages)


def test_several_messages_and_white_space_around_a_spelled_control_token(family):
    messages = [
        {"role": "system", "content": "Be <|eot_id|> brief."},
        {"role": "user", "content": "\n Who?\n\n"},
    ]
    tokenizer = family("llama3-instruct")
    assert tokenizer.decode(encode_chat(tokenizer, messages)) == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe <|eot_id|> "
        "brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nWho?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_a_template_that_refuses_says_so(family):
    with pytest.raises(
        DataError, match=r"refuses messages of the roles system, user \(System role not supported\)"
    ):
        encode_chat(
            family("gemma-instruct"), [{"role": "system", "content": "Be brief."}, *QUESTION]
        )


@pytest.mark.parametrize(
    ("name", "kwargs", "before", "after"),
    [
        (
            "qwen2.5-base",
            {},
            "<|im_end|>\n<|im_start|>user\n",
            "<|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            "qwen3",
            {"enable_thinking": False},
            "<|im_end|>\n<|im_start|>user\n",
            "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
        ),
        (
            "qwen3-thinking",
            {},
            "<|im_end|>\n<|im_start|>user\n",
            "<|im_end|>\n<|im_start|>assistant\n<think>\n",
        ),
        (
            "llama3-instruct",
            {},
            "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n",
            "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        (
            "gemma-instruct",
            {},
            "<end_of_turn>\n<start_of_turn>user\n",
            "<end_of_turn>\n<start_of_turn>model\n",
        ),
        ("mistral-instruct", {}, "</s>[INST] ", "[/INST]"),
        ("llama3-base", {}, "", ""),
    ],
)
def test_what_stands_around_a_users_message_is_read_off_the_template(
    family, name, kwargs, before, after
):
    tokenizer = family(name)
    turn = user_turn(tokenizer, **kwargs)
    assert (tokenizer.decode(turn.before), tokenizer.decode(turn.after)) == (before, after)
    end = end_of_turn(tokenizer, **kwargs)
    expected = turn.before[0] if has_template(tokenizer) else tokenizer.eos_token_id
    assert end == expected
    if before:
        message = encode_text(tokenizer, "Try again.")
        rest = tokenizer.decode([end])
        assert (
            tokenizer.decode(turn.following(end, message))
            == before.removeprefix(rest) + "Try again." + after
        )


def test_a_template_that_drops_messages_is_refused(family, tmp_path):
    tokenizer = make_family_tokenizer(tmp_path, "qwen2.5-instruct")
    tokenizer.chat_template = "{{ messages[-1].content }}"
    with pytest.raises(
        DataError, match="does not write messages of the roles user, assistant, user once each"
    ):
        user_turn(tokenizer)


def test_without_eos_and_template_no_token_ends_a_turn(tmp_path):
    tokenizer = make_family_tokenizer(tmp_path, "plain")
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no EOS token, and no chat template"):
        end_of_turn(tokenizer)


def test_arguments_that_the_template_does_not_read_are_named(family):
    assert template_problems(family("qwen3"), {"enable_thinking": False}) == []
    assert template_problems(
        family("qwen2.5-instruct"), {"enable_thinking": False, "tokenize": True}
    ) == [
        "enable_thinking: the chat template does not read it, so it would have no effect; remove "
        "it",
        "tokenize: set by this program; remove it",
    ]
    assert template_problems(family("gemma-base"), {"enable_thinking": False}) == [
        "enable_thinking: no chat template is applied here, so it would have no effect; remove it"
    ]
