"""The closed world's tokenizer: a byte-level BPE trained on its passages and traces."""

import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from search_r1.prompts import format_passages
from search_r1.world.names import FIRST
from search_r1.world.traces import POOR, TraceSegment, TraceWriter

PAD = "<|pad|>"
EOS = "<|end|>"
TAGS = [
    f"<{slash}{tag}>" for tag in ("think", "search", "information", "answer") for slash in ("", "/")
]
PYTHON_TAGS = [f"<{slash}{tag}>" for tag in ("python", "result") for slash in ("", "/")]
SUMMARY_TAGS = ["<summary>", "</summary>"]
VOCAB_SIZE = 1024
PAIRS = tuple(f"{number:02}" for number in range(100))
"""Pairs of digits. Where numbers are divided into them, a year is two ids and a difference one,
whatever stands before it, so that both are copied like names."""
NAME = re.compile(rf"\b({'|'.join(FIRST)})([a-z]{{3}})\b")


Writer = Callable[[random.Random], Callable[[], list[TraceSegment]]]
"""Makes what draws traces, from a generator of random numbers."""


def poor_traces(rng: random.Random) -> TraceWriter:
    """Makes what draws the traces of the poor policy."""
    return TraceWriter(rng, POOR)


def training_texts(
    rng: random.Random, count: int = 1500, writer: Writer = poor_traces
) -> Iterator[str]:
    """Yields traces without tags.

    The halves of each name are divided by a line break, so that no pair of them becomes one token.
    """
    draw = writer(rng)
    tags = "|".join(TAGS + PYTHON_TAGS + SUMMARY_TAGS)
    for _ in range(count):
        text = "\n".join(p.text or format_passages(p.passages) for p in draw())
        yield NAME.sub(r"\1\n\2", re.sub(tags, "", text))


def train_tokenizer(
    texts: Iterable[str],
    syllables: Sequence[str],
    numbers: bool = False,
    further_tags: Sequence[str] = (),
) -> PreTrainedTokenizerFast:
    """Trains a tokenizer of at most VOCAB_SIZE ids, in which each of `syllables` is one id.

    A capitalised syllable is one id together with the space or quote before it. Each tag of the
    protocol, and each of `further_tags`, is one ordinary token, not a special one, so that decoding
    keeps it.

    With `numbers`, each pair of digits is one id too, and so are the tags of programs.
    """
    tags = [*TAGS, *(PYTHON_TAGS if numbers else ()), *further_tags]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizer(numbers)
    bpe.decoder = decoders.ByteLevel()
    parts = [*spellings(syllables), *(PAIRS if numbers else ())]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    size = VOCAB_SIZE - 2 - len(tags)
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator([*texts, *parts * 40], trainer)
    bpe.add_special_tokens([AddedToken(t, special=True) for t in (PAD, EOS)])
    bpe.add_tokens([AddedToken(t, special=False, normalized=False) for t in tags])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        eos_token=EOS,
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
    )


def pre_tokenizer(numbers: bool) -> pre_tokenizers.PreTokenizer:
    """Makes what divides texts into words of bytes, with `numbers` also numbers into pairs."""
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Split(Regex(r"\d{1,2}"), "isolated")
    return pre_tokenizers.Sequence([digits, words]) if numbers else words


def spellings(syllables: Sequence[str]) -> Iterator[str]:
    """Yields each syllable as texts have it, with what stands before a name if it begins one."""
    for syllable in syllables:
        yield from [f" {syllable}", f'"{syllable}'] if syllable[0].isupper() else [syllable]
