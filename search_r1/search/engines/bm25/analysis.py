"""Turns text into index terms, as Anserini does.

Text is split into words by the rules of Unicode. Possessives and stop words are left out, and the
words are stemmed by Porter's algorithm.
"""

import re

import regex
import Stemmer

# The word boundaries of Unicode's annex 29, as far as they matter: letters are joined by . : ' and
# figures by . , ; ' Whole runs of word characters are taken at once (++), and what joins them is
# looked for between runs only.
ASCII_WORD = re.compile(
    r"\w++(?:(?:(?<=[A-Za-z])[.:'](?=[A-Za-z])|(?<=\d)[.,;'](?=\d))\w++)*+", re.ASCII
)
RUN = r"[\p{L}\p{Nd}\p{M}\p{Cf}_--[\p{Han}\p{Hiragana}]]++"
JOINER = r"(?:(?<=[\p{L}\p{M}])[.:'·’‘](?=\p{L})|(?<=\p{Nd})[.,;'’‘](?=\p{Nd}))"
WORD = regex.compile(rf"[\p{{Han}}\p{{Hiragana}}]|{RUN}(?:{JOINER}{RUN})*+", regex.VERSION1)
POSSESSIVE = re.compile(r"['’＇][sS]$")
STOP_WORDS = frozenset(
    re.findall(
        r"\w+",
        "a an and are as at be but by for if in into is it no not of on or such that the their "
        "then there these they this to was will with",
    )
)
"""Lucene's stop words."""
MAX_KEPT_STEMS = 1 << 21
"""The number of words whose stems are kept in memory."""
HAS_SYLLABLE = re.compile(r"[aeiou][^aeiou]|[^aeiou]y[^aeiou]")  # Porter's m > 0


def words(text: str) -> list[str]:
    """The words of a text as they stand there, stop words among them."""
    return (ASCII_WORD if text.isascii() else WORD).findall(text)


class Analyzer(dict[str, str | None]):
    """`analyzer(text)` returns the stems of its words. The stems are kept for later texts."""

    def __init__(self) -> None:
        self.stemmer = Stemmer.Stemmer("porter")

    def __call__(self, text: str) -> list[str]:
        return [stem for word in words(text) if (stem := self[word]) is not None]

    def __missing__(self, word: str) -> str | None:
        """The stem of a word, None for a stop word."""
        plain = POSSESSIVE.sub("", word).replace("İ", "I").lower()
        stem = None if plain in STOP_WORDS else self.stem(plain)
        if len(self) < MAX_KEPT_STEMS:
            self[word] = stem
        return stem

    def stem(self, word: str) -> str:
        """Porter's stem of a word, with Lucene's treatment of two endings.

        Lucene follows Porter's own programs, which differ from his paper in "logi" and "bli".
        """
        if len(word) < 3:
            return word
        stem = self.stemmer.stemWord(word)
        if stem.endswith("logi") and HAS_SYLLABLE.search(stem[:-4]):
            return stem[:-1]
        if stem.endswith("bli") and HAS_SYLLABLE.search(stem[:-3]):
            long = stem.endswith("ibli") and len(HAS_SYLLABLE.findall(stem[:-4])) > 1
            return stem[:-4] if long else stem[:-1]
        return stem
