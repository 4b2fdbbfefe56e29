"""The corpus that a server reads: a file mapped into memory, with the offsets of its lines."""

import mmap
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from search_r1.search.errors import CorpusError
from search_r1.search.index.documents import to_document
from search_r1.search.index.files import replacing
from search_r1.search.index.manifest import SAMPLES, check_corpus
from search_r1.search.index.reader import DOCUMENTS, HUB, OFFSETS, PLAIN, is_array


class Corpus:
    """`corpus[i]` is document `i` in the order of the file.

    The file is mapped into memory; only the offsets of its lines are loaded.
    """

    def __init__(self, path: Path, offsets: np.ndarray) -> None:
        self.path = path
        self.offsets = offsets
        with path.open("rb") as file:
            self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    @classmethod
    def of_index(cls, index: Path, manifest: dict[str, Any], corpus: Path | None) -> "Corpus":
        """The corpus of an index: the copy in its folder if there is one, else the file `corpus`.

        Raises CorpusError when `corpus` is missing or not the file that the index was built from.
        """
        own_copy = index / DOCUMENTS
        if corpus is not None and not str(corpus).startswith(HUB):
            check_corpus(manifest, index, corpus)
        elif not own_copy.exists():
            raise CorpusError(f"{index} needs its corpus: name the file with --corpus_path")
        path = own_copy if own_copy.exists() or corpus is None else corpus
        return cls(path, np.load(index / OFFSETS, mmap_mode="r"))

    @classmethod
    def of_lines(cls, path: Path) -> "Corpus":
        """A JSONL corpus without an index folder.

        The offsets of its lines are found once, and kept in a file beside it. Raises CorpusError
        for a corpus of another form, which can be served only from the copy in an index that the
        builder made.
        """
        if not path.is_file():
            raise CorpusError(f"{path}: no such file")
        if not path.name.endswith(PLAIN) or is_array(path):
            raise CorpusError(
                f"{path}: expected JSONL, one document a line; other forms are read by the index "
                "builder"
            )
        kept = path.with_name(path.name + ".offsets.npy")
        is_newer = kept.exists() and kept.stat().st_mtime >= path.stat().st_mtime
        if not (is_newer and fits(kept, path)):
            offsets = line_offsets(path)
            try:
                save_whole(kept, offsets)
            except OSError:  # the folder is read-only: they have to be found again next time
                return cls(path, offsets)
        return cls(path, np.load(kept, mmap_mode="r"))

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, i: int) -> dict[str, Any]:
        start = int(self.offsets[i])
        end = self.data.find(b"\n", start)
        line = self.data[start : end if end >= 0 else len(self.data)]
        return to_document(line, f"{self.path}, document {i}")


def save_whole(path: Path, values: np.ndarray) -> None:
    """Saves an array whole or not at all, because several servers may start over one corpus."""
    with replacing(path, several_writers=True) as pending, pending.open("wb") as file:
        np.save(file, values)


def line_offsets(path: Path, block: int = 1 << 26) -> np.ndarray:
    """Finds the byte offset of every line that is not blank: int64 [lines]. Shows a progress bar.

    The file is read in blocks of `block` bytes.
    """
    found = [np.zeros(1, dtype=np.int64)]
    position = 0
    size = path.stat().st_size
    with (
        path.open("rb") as file,
        tqdm(total=size, unit="B", unit_scale=True, desc="line offsets") as bar,
    ):
        while data := file.read(block):
            line_breaks = np.flatnonzero(np.frombuffer(data, dtype=np.uint8) == ord("\n"))
            found.append(line_breaks + position + 1)
            position += len(data)
            bar.update(len(data))
    offsets = np.concatenate(found)
    offsets = offsets[offsets < size]
    return offsets[~blank_lines(path, offsets)] if size else offsets


def blank_lines(path: Path, offsets: np.ndarray) -> np.ndarray:
    """Whether each line holds nothing but white space: bool [lines]."""
    blank = np.zeros(len(offsets), dtype=bool)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        first_bytes = np.frombuffer(data, dtype=np.uint8)[offsets]
        for i in np.flatnonzero(np.isin(first_bytes, list(b" \t\r\n"))):
            end = data.find(b"\n", int(offsets[i]))
            blank[i] = not data[int(offsets[i]) : end if end >= 0 else len(data)].strip()
    return blank


def fits(kept: Path, path: Path) -> bool:
    """Whether the offsets in the file `kept` are those of `path`, judged by 64 of them.

    Each of the 64 must begin a line. The times of the files cannot tell, because the corpus may
    have been replaced by an older file.
    """
    offsets = np.load(kept, mmap_mode="r")
    if not len(offsets) or offsets[-1] >= path.stat().st_size:
        return False
    sample = np.unique(np.linspace(0, len(offsets) - 1, SAMPLES).astype(np.int64))
    with path.open("rb") as file:
        for offset in offsets[sample].tolist():
            file.seek(max(0, offset - 1))
            if offset > 0 and file.read(1) != b"\n":
                return False
        file.seek(int(offsets[-1]))
        file.readline()
        return not file.read(1 << 16).strip()
