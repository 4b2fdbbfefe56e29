"""Reads the rows of trace files, each in the form that its keys tell."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from search_r1.data.rows import read_rows
from search_r1.rewards.matching import gold_answers
from search_r1.traces.chat import question_in, read_messages
from search_r1.traces.records import check_form, is_record, read_record
from search_r1.traces.text import CallTags, read_text
from search_r1.traces.trace import Reason, Rejected, Said, Trace
from verl.utils.answers import kind_of
from verl.utils.errors import DataError

Row = Mapping[str, Any]
TEXT_KEYS = ("response", "completion", "output", "final_response", "gen_text_store")
"""Keys of what a model wrote; `output` may be an object that has one of the others."""
GOLD_KEYS = ("golden_answers", "ground_truth", "answers", "answer")
"""Keys of the accepted answers; a row of verl has them under `reward_model.ground_truth`."""


def read_files(paths: Sequence[Path]) -> list[tuple[str, Row | str]]:
    """The rows of all files, each with its place; a text says what is wrong with a row.

    Raises DataError for a file that cannot be read or has no rows.
    """
    found: list[tuple[str, Row | str]] = []
    for path in paths:
        rows = list(read_rows(path))
        if not rows:
            raise DataError(f"{path}: no traces")
        found += rows
    return found


def read_trace(row: Row, tags: CallTags) -> Trace:
    """The trace of a row. Raises Rejected."""
    return Trace(question_of(row), read_said(row, tags), golds_of(row), score_of(row))


def read_said(row: Row, tags: CallTags) -> Said:
    """What was said in a row: in a record, in messages, or in a text. Raises Rejected."""
    if is_record(row):
        check_form(dict(row))
        return read_record(dict(row))
    if row.get("messages") is not None:
        return read_messages(messages_of(row), tags)
    values = [holder.get(key) for holder in holders(row) for key in TEXT_KEYS]
    texts = [value for value in values if isinstance(value, str)]
    if texts:
        return read_text(texts[0], tags)
    raise Rejected(
        Reason.UNKNOWN_FORM,
        f"expected a record of this project (prompt_ids, segments, reward), messages, or a text "
        f"under one of {', '.join(TEXT_KEYS)}; got {kind_of(dict(row))}",
    )


def holders(row: Row) -> list[Row]:
    """The row, and the object under `output` if there is one."""
    output = row.get("output")
    return [row, output] if isinstance(output, dict) else [row]


def messages_of(row: Row) -> list[Row]:
    """The messages of a row. Raises Rejected for anything else under that key."""
    messages = row["messages"]
    if not is_list_of_objects(messages):
        found = kind_of(messages)
        raise Rejected(Reason.UNKNOWN_FORM, f"messages: expected a list of objects, got {found}")
    for number, message in enumerate(messages):
        calls = message.get("tool_calls")
        if calls is not None and not is_list_of_objects(calls):
            found = kind_of(calls)
            where = f"messages[{number}].tool_calls"
            raise Rejected(Reason.UNKNOWN_FORM, f"{where}: expected a list of objects, got {found}")
    return messages


def is_list_of_objects(value: object) -> bool:
    """Whether a JSON value is a list that holds objects alone."""
    return isinstance(value, list) and all(isinstance(one, dict) for one in value)


def question_of(row: Row) -> str:
    """The question of a row. Raises Rejected where there is none.

    Without `question` or `extra_info.question` it is what follows the last `Question:` in the
    prompt, which is the first message of a user or the text under `prompt`; or else all of that.
    """
    extra = row.get("extra_info")
    named = row.get("question") or (extra.get("question") if isinstance(extra, dict) else None)
    if named:
        return str(named).strip()
    prompt = row.get("prompt") if row.get("messages") is None else question_in(messages_of(row))
    text = prompt if isinstance(prompt, str) and not is_record(row) else ""
    asked = text.rpartition("Question:")[2].strip()
    if not asked:
        expected = "question, extra_info.question, a text under prompt, or a message of a user"
        raise Rejected(Reason.NO_QUESTION, f"expected {expected}")
    return asked


def golds_of(row: Row) -> tuple[str, ...]:
    """The accepted answers of a row; none where it has none. Raises Rejected."""
    model = row.get("reward_model")
    values = {key: row.get(key) for key in GOLD_KEYS}
    values["reward_model.ground_truth"] = (
        model.get("ground_truth") if isinstance(model, dict) else None
    )
    known = [(key, value) for key, value in values.items() if value is not None]
    if not known:
        return ()
    key, value = known[0]
    try:
        return tuple(gold_answers(value))
    except ValueError as error:
        raise Rejected(Reason.UNKNOWN_FORM, f"{key}: {error}") from error


def score_of(row: Row) -> float | None:
    """The reward of a record; None for a trace of any other form."""
    return float(row["reward"]["score"]) if is_record(row) else None
