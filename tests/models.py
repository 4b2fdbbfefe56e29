"""Tiny models made on the spot: random weights and a byte-level BPE, no download."""

from itertools import pairwise
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
QWEN_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| "
    r"?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = [
    "<think> I need the birthplace of Ada Marin. </think> <search> Ada Marin born in </search>\n\n",
    '<information>Doc 1(Title: "Ada Marin") Ada Marin was born in Torvel.</information>\n\n',
    "<think> She was born in Torvel. </think> <answer> Torvel </answer>",
    "Answer the question. Question: In which country lies the city where Ada Marin was born?",
]


def train_bpe(vocab: int) -> Tokenizer:
    """A byte-level BPE of at most `vocab` ids, without special tokens.

    It cuts pieces as Qwen does.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS * 20, trainers.BpeTrainer(vocab_size=vocab, initial_alphabet=alphabet)
    )
    return tokenizer


def make_tokenizer(folder: Path | str, *, vocab: int = 400) -> PreTrainedTokenizerFast:
    """Saves a byte-level BPE with Qwen's special tokens and chat template in `folder`; returns it.

    It has at most `vocab` ids. Pieces are cut as Qwen cuts them, so that one token runs past a tag
    (`>\\n\\n`), as in its vocabulary.
    """
    tokenizer = train_bpe(vocab - len(SPECIAL_TOKENS))
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in SPECIAL_TOKENS])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(str(folder))
    return fast


def make_tiny_qwen2(
    folder: Path | str,
    *,
    tied: bool = False,
    layers: int = 2,
    width: int = 64,
    vocab: int = 400,
    seed: int = 0,
) -> Path:
    """Saves a random Qwen2 in float32 and its tokenizer in `folder`; returns the folder.

    Biases and norms are random too.
    """
    tokenizer = make_tokenizer(folder, vocab=vocab)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=max(1, width // 64),
        max_position_embeddings=2048,
        tie_word_embeddings=tied,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(config)
    perturb(model, seed=seed, scale=0.1)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    return Path(folder)


@torch.no_grad()
def perturb(model: torch.nn.Module, *, seed: int, scale: float) -> None:
    """Adds Gaussian noise of `scale` to every parameter, in place."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=scale)


@torch.no_grad()
def rig(model: Qwen2ForCausalLM, chain: list[int]) -> None:
    """Makes an untied model say `chain` greedily: after `chain[i]` comes `chain[i + 1]`.

    The ids must differ. Attention and MLP write nothing, so that the last hidden state is the
    embedding of the last token, and the head is a table of who follows whom.
    """
    assert len(set(chain)) == len(chain), "a token has one successor"
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    model.model.norm.weight.fill_(1.0)
    embeddings = model.model.embed_tokens.weight
    model.lm_head.weight.zero_()
    for before, after in pairwise(chain):
        model.lm_head.weight[after] = torch.nn.functional.normalize(embeddings[before], dim=0) * 4
