"""Reads a document of a corpus from a line or a row, and writes it as a line of JSON."""

import json
import math
import re
from datetime import date, time, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

from search_r1.search.errors import CorpusError

SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]|\xed[\xa0-\xbf]")
"""Half of a surrogate pair in a line of JSON: as an escape, or as bytes that are not UTF-8 but are
accepted by Python's reader."""


def contents(title: str, text: str) -> str:
    """The field `contents` of a document: `"Title"`, a line break, the text."""
    title = title.strip('"')
    return f'"{title}"\n{text}'


def to_document(record: bytes | dict[str, Any], location: str) -> dict[str, Any]:
    """Reads a document from a line or a row.

    Raises CorpusError naming `location` unless it has `id` and `contents`, or `id`, `title` and
    `text`.
    """
    try:
        document = json.loads(record) if isinstance(record, bytes) else record
    except ValueError as error:
        raise CorpusError(f"{location}: not JSON ({error})") from error
    if isinstance(record, bytes) and SURROGATE.search(record) and not is_encodable(document):
        raise CorpusError(
            f"{location}: half of a surrogate pair, which no answer can carry (such as \\ud83d "
            "alone)"
        )
    if isinstance(document, dict) and document.get("id") is not None:
        if isinstance(document.get("contents"), str):
            return document
        if isinstance(document.get("title"), str) and isinstance(document.get("text"), str):
            return {**document, "contents": contents(document["title"], document["text"])}
    raise CorpusError(
        f'{location}: expected an object with "id" and "contents" (a string), or "id", "title" '
        'and "text"'
    )


def is_encodable(document: object) -> bool:
    """Whether every text in the document can be written as UTF-8.

    Half of a surrogate pair cannot, unless it stands beside its other half.
    """
    try:
        json.dumps(document, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def encoded(document: dict[str, Any], location: str) -> bytes:
    """The document as a line of JSON, without the line break.

    Dates and times are written as ISO 8601. Exact decimals, durations and UUIDs are written as
    texts. Numbers that are not finite are written as null, because an answer of the server cannot
    hold them. Raises CorpusError naming `location` for a value that JSON cannot represent.
    """
    try:
        return as_json(document).encode()
    except UnicodeEncodeError as error:
        raise CorpusError(
            f"{location}: half of a surrogate pair, which no answer can carry"
        ) from error
    except (TypeError, ValueError) as error:
        raise CorpusError(f"{location}: {error}") from error


def as_json(document: dict[str, Any]) -> str:
    """The document as JSON. Raises TypeError or ValueError for what JSON cannot represent."""
    try:
        return json.dumps(document, ensure_ascii=False, allow_nan=False, default=as_text)
    except ValueError:  # copies only the few documents with numbers that are not finite
        return json.dumps(finite(document), ensure_ascii=False, allow_nan=False, default=as_text)


def as_text(value: object) -> str:
    """The text that represents a value of a type that JSON lacks.

    Raises TypeError if there is no such text.
    """
    if isinstance(value, date | time):
        return value.isoformat()
    if isinstance(value, Decimal | timedelta | UUID):
        return str(value)
    raise TypeError(
        f"JSON has no form for a value of type {type(value).__name__}: leave its column out"
    )


def finite(value: object) -> object:
    """`value` with None instead of numbers that are not finite."""
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
