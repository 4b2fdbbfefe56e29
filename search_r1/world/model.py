"""The base model before training: a small Qwen2 with random weights.

The weights are initialised so that the model learns quickly to look things up. To answer from
passages, a model must find where a name and a relation stood before, and copy what followed. This
is an induction circuit (Olsson et al. 2022, arXiv 2209.11895), which takes tens of minutes on a CPU
to emerge from plain random weights. Here some heads of the first layer look one, two and three
tokens back from the start, and in every layer the key weights equal the query weights, so that
attention starts by matching content (mimetic initialization, Trockman and Kolter 2023, arXiv
2305.09828).
"""

from pathlib import Path

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

HIDDEN = 128
HEADS = 4
LAYERS = 4
HEAD_DIM = HIDDEN // HEADS
THETA = 10_000.0
LOOK_BACK = 3
"""Number of heads of the first layer that look back: head h looks h + 1 tokens back."""
SHARPNESS = 5.0
"""Size of their query and key biases, which puts 0.88 of the attention on that token."""
EMBEDDING_STD = 0.1
OUTPUT_SCALE = 0.3


def random_model(tokenizer: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
    """Makes a float32 model of four layers of width 128 with an untied head.

    Draws from torch's global generator.
    """
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
        bos_token_id=None,
    )
    config.eos_token_id = tokenizer.eos_token_id  # pyright: ignore
    config.pad_token_id = tokenizer.pad_token_id  # pyright: ignore
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        embedding = model.model.embed_tokens.weight
        model.lm_head.weight.copy_(embedding)
        embedding.mul_(EMBEDDING_STD / config.initializer_range)
        attentions = [layer.get_submodule("self_attn") for layer in model.model.layers]
        for attention in attentions:
            match_content(attention)
        look_back(attentions[0], config.initializer_range)
    return model


def grown_model(start: str | Path, tokenizer: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
    """Makes the model in the folder `start` with the vocabulary of another tokenizer.

    Tokens that both tokenizers have keep their vectors; those of the others are random.
    """
    old = Qwen2ForCausalLM.from_pretrained(start)
    places = AutoTokenizer.from_pretrained(start).get_vocab()
    model = random_model(tokenizer)
    kept = {token: place for token, place in tokenizer.get_vocab().items() if token in places}
    here = torch.tensor(list(kept.values()))
    there = torch.tensor([places[token] for token in kept])
    weights = old.state_dict()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if len(weight) == len(tokenizer) and weight.dim() == 2:
                weight[here] = weights[name][there]
            else:
                weight.copy_(weights[name])
    return model


def match_content(attention: nn.Module) -> None:
    """Sets keys equal to queries, and lets each head pass on a projection of what it attends to."""
    q, k, v, o = (getattr(attention, f"{x}_proj").weight for x in "qkvo")
    q.normal_(0, HIDDEN**-0.5)
    k.copy_(q)
    v.normal_(0, HIDDEN**-0.5)
    o.copy_(OUTPUT_SCALE * v.T)


def look_back(attention: nn.Module, std: float) -> None:
    """Makes the first heads attend by position alone, and share one value projection.

    With rotary embeddings, the constant vectors k and q = R(-d) k give every pair of positions a
    score that depends only on their distance, and is highest if the key is d tokens before the
    query.
    """
    q, k, v, o = (getattr(attention, f"{x}_proj") for x in "qkvo")
    half = HEAD_DIM // 2
    frequencies = THETA ** (-torch.arange(half) / half)
    for head in range(LOOK_BACK):
        rows = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
        angle = -(head + 1) * frequencies
        q.bias[rows] = SHARPNESS * torch.cat([angle.cos(), angle.sin()])
        k.bias[rows] = SHARPNESS * torch.cat([torch.ones(half), torch.zeros(half)])
        q.weight[rows].normal_(0, std)
        k.weight[rows].normal_(0, std)
        v.weight[rows] = v.weight[:HEAD_DIM]
        o.weight[:, rows] = o.weight[:, :HEAD_DIM]
