"""A file that is written line by line, and goes on where a killed process has stopped.

Its first line holds the settings that it is made with.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from search_r1.search.errors import CorpusError


def started(part: Path, settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The rows that stand in `part`, which is begun if it is not there.

    A last line that a killed process left unfinished is cut off. Raises CorpusError when the file
    was begun with other settings.
    """
    header = json.dumps(settings) + "\n"
    if not part.exists():
        part.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(header, encoding="utf-8")
    data = part.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    os.truncate(part, len(whole))
    first, _, rest = whole.partition(b"\n")
    if first + b"\n" != header.encode():
        raise CorpusError(
            f"{part} was begun with other settings ({first.decode(errors='replace')}): give the "
            "same ones to go on, or remove it to begin anew"
        )
    return (json.loads(line) for line in rest.splitlines())


def finish(part: Path, out: Path) -> None:
    """Makes `out` of `part`, without its first line."""
    body = part.with_name(part.name + ".body")
    with part.open("rb") as source, body.open("wb") as target:
        source.readline()
        for line in source:
            target.write(line)
    body.replace(out)
    part.unlink()
