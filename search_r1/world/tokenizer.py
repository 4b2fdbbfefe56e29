"""The closed world's tokenizer: a byte-level BPE trained on its passages and traces."""

import random
import re
from collections.abc import Iterable, Iterator, Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from search_r1.prompts import format_passages
from search_r1.world.generate import FIRST
from search_r1.world.traces import POOR, TraceWriter

PAD = "<|pad|>"
EOS = "<|end|>"
TAGS = [
    f"<{slash}{tag}>" for tag in ("think", "search", "information", "answer") for slash in ("", "/")
]
VOCAB_SIZE = 1024
NAME = re.compile(rf"\b({'|'.join(FIRST)})([a-z]{{3}})\b")


def training_texts(rng: random.Random, count: int = 1500) -> Iterator[str]:
    """Yields traces without tags.

    The halves of each name are divided by a line break, so that no pair of them becomes one token.
    """
    writer = TraceWriter(rng, POOR)
    for _ in range(count):
        text = "\n".join(p.text or format_passages(p.passages) for p in writer())
        yield NAME.sub(r"\1\n\2", re.sub("|".join(TAGS), "", text))


def train_tokenizer(texts: Iterable[str], syllables: Sequence[str]) -> PreTrainedTokenizerFast:
    """Trains a tokenizer of at most VOCAB_SIZE ids, in which each of `syllables` is one id.

    A capitalised syllable is one id together with the space or quote before it. Each tag of the
    protocol is one ordinary token, not a special one, so that decoding keeps it.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    halves: list[str] = []
    for syllable in syllables:
        halves += [f" {syllable}", f'"{syllable}'] if syllable[0].isupper() else [syllable]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    size = VOCAB_SIZE - 2 - len(TAGS)
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator([*texts, *halves * 40], trainer)
    bpe.add_special_tokens([AddedToken(t, special=True) for t in (PAD, EOS)])
    bpe.add_tokens([AddedToken(t, special=False, normalized=False) for t in TAGS])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        eos_token=EOS,
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
    )
