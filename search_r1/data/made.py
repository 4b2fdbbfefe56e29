"""Makes the files of a folder again when their inputs change, but never replaces a user's files.

A record beside the files holds their inputs, and a hash of each file, which tells whether it was
changed by hand afterwards.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from verl.utils.errors import DataError

RECORD = "made_from.json"


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_current(folder: Path, inputs: dict[str, Any], names: Sequence[str]) -> bool:
    """Whether the files `names` of `folder` are there and were made from `inputs`.

    If not, the caller may make them. Files that were changed by hand stay current as long as their
    inputs do not change. Raises DataError when making the files would replace any that were not
    made here or were changed by hand.
    """
    there = [name for name in names if (folder / name).exists()]
    if not there:
        return False
    record = read_record(folder)
    if record is None:
        raise DataError(
            f"{folder / there[0]} is there, and nothing beside it ({RECORD}) says what it was made "
            "from: remove it, or name another folder"
        )
    differing = sorted(key for key in inputs if record["inputs"].get(key) != inputs[key])
    if not differing and len(there) == len(names):
        return True
    changed = [name for name in there if record["files"].get(name) != sha256(folder / name)]
    if changed:
        why = f"its {', '.join(differing)} changed" if differing else "files beside it are missing"
        raise DataError(
            f"{folder / changed[0]} would be made anew, because {why}, but it was changed by hand "
            "since: remove it, or name another folder"
        )
    return False


def read_record(folder: Path) -> dict[str, Any] | None:
    """Reads the record of a folder, None without one.

    Raises DataError when its file is not such a record.
    """
    path = folder / RECORD
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        _ = record["inputs"].keys(), record["files"].keys()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path}: not a record of what files were made from ({error!r}): remove it"
        ) from error
    return record


@contextmanager
def making(folder: Path, inputs: dict[str, Any]) -> Iterator[Path]:
    """Yields a temporary folder to write files in.

    When the block ends without an error, they are moved to `folder` together with a record.
    """
    pending = folder / "making.tmp"
    shutil.rmtree(pending, ignore_errors=True)  # left by a process that was killed
    pending.mkdir(parents=True)
    try:
        yield pending
        files = sorted(path for path in pending.iterdir())
        record = {"inputs": inputs, "files": {path.name: sha256(path) for path in files}}
        (folder / RECORD).unlink(missing_ok=True)
        for path in files:
            path.replace(folder / path.name)
        (pending / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        (pending / RECORD).replace(folder / RECORD)
    finally:
        shutil.rmtree(pending)
