"""A file that is written line by line, and goes on where a killed process has stopped.

While it is written its first line holds the settings that it is made with; afterwards they stand in
a file beside it.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from search_r1.search.errors import CorpusError


def started(part: Path, settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The rows that stand in `part`, which is begun if it has no whole line.

    A last line that a killed process left unfinished is cut off. Raises CorpusError when the file
    was begun with other settings.
    """
    data = part.read_bytes() if part.exists() else b""
    whole = data[: data.rfind(b"\n") + 1]
    header = json.dumps(settings)
    if not whole:
        part.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(header + "\n", encoding="utf-8")
        return iter(())
    os.truncate(part, len(whole))
    first, _, rest = whole.decode(errors="replace").partition("\n")
    if first != header:
        raise CorpusError(
            f"{part} was begun with other settings ({first}): give the same ones to go on, or "
            "remove it to begin anew"
        )
    # not splitlines(), which also cuts at characters that JSON writes as they are, such as U+2028
    return (json.loads(line) for line in rest.split("\n") if line)


def is_finished(out: Path, settings: dict[str, Any]) -> bool:
    """Whether `out` is there, made with these settings.

    Raises CorpusError when it was made with other ones, or by something else.
    """
    if not out.exists():
        return False
    made_from = made_from_file(out)
    first = made_from.read_text(encoding="utf-8") if made_from.exists() else "unknown"
    if first == json.dumps(settings):
        return True
    raise CorpusError(
        f"{out} is there, made with other settings ({first}): name another --out, or remove it"
    )


def made_from_file(out: Path) -> Path:
    """The file that holds the settings with which `out` was made."""
    return out.with_name(out.name + ".made_from")


def finish(part: Path, out: Path, settings: dict[str, Any]) -> None:
    """Makes `out` of `part`, without its first line, and writes the settings beside it."""
    made_from_file(out).write_text(json.dumps(settings), encoding="utf-8")
    body = part.with_name(part.name + ".body")
    with part.open("rb") as source, body.open("wb") as target:
        source.readline()
        for line in source:
            target.write(line)
    body.replace(out)
    part.unlink()
