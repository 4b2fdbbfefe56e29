"""Reads traces that are records of this project (verl/rollout/records.py)."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError

from search_r1.prompts import format_passages
from search_r1.tools.base import SEARCH_TOOL
from search_r1.traces.text import read_end, whole_thoughts
from search_r1.traces.trace import Reason, Rejected, Said, TracedCall, TracedTurn
from search_r1.trajectory import NO_TOOLS, Record
from verl.agent import Source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

USUAL_TAGS = {"call": ["search"], "result": ["information"]}
KEYS = ("prompt_ids", "segments", "reward")
"""By these a record is told from a trace of another form."""


class SegmentForm(BaseModel):
    """What is read of a segment."""

    source: str
    text: str
    token_ids: list[int]
    info: dict[str, Any]


class RewardForm(BaseModel):
    """What is read of a reward."""

    score: float


class RecordForm(BaseModel):
    """What is read of a record."""

    prompt_ids: list[int]
    segments: list[SegmentForm]
    reward: RewardForm
    info: dict[str, Any]
    stop_reason: str


def is_record(row: Mapping[str, Any]) -> bool:
    """Whether a row has the keys of a record."""
    return all(row.get(key) is not None for key in KEYS)


def check_form(record: Record) -> None:
    """Raises Rejected where a record lacks what is read of it."""
    try:
        RecordForm.model_validate(record)
    except ValidationError as error:
        first, *_ = error.errors()
        where = ".".join(map(str, first["loc"]))
        raise Rejected(Reason.UNKNOWN_FORM, f"{where}: {first['msg']}") from error


def has_tokens_of(
    record: Record,
    prompt_ids: Sequence[int],
    tags: Mapping[str, Any] | None,
    tokenizer: "PreTrainedTokenizerBase",
) -> bool:
    """Whether the tokens of a record are those of an agent, which asks with `prompt_ids`.

    `tags` are those in which the agent calls tools, None for those of Search-R1.
    """
    if record["prompt_ids"] != list(prompt_ids) or record["info"].get("tags") != tags:
        return False
    return all(tokenizer.decode(s["token_ids"]) == s["text"] for s in record["segments"])


def check_answered(record: Record) -> None:
    """Raises Rejected where a record was written in several contexts, or ends without an answer."""
    if record.get("rewrites"):
        raise Rejected(Reason.REWRITTEN, "finetune.data=samples trains on each of the contexts")
    own = [s for s in record["segments"] if s["source"] == Source.MODEL]
    if not own or own[-1] is not record["segments"][-1]:
        raise Rejected(Reason.NO_ANSWER, f"it ended with stop_reason={record['stop_reason']}")
    read_end(own[-1]["text"])


def read_record(record: Record) -> Said:
    """What was said in a record, and what its calls brought. Raises Rejected."""
    check_answered(record)
    tags = record["info"].get("tags", USUAL_TAGS)
    *calling, final = turns_of(record["segments"])
    parts = [said_before_call(model["text"], tags["call"]) for model, _ in calling]
    calls = [calls_of(model["text"], results, tags) for model, results in calling]
    last, answer, _ = read_end(final[0]["text"])
    *before, last = whole_thoughts([*parts, last], in_one_text=False)
    turns = [TracedTurn(said, called) for said, called in zip(before, calls, strict=True)]
    return Said(tuple(turns), last, answer)


def turns_of(segments: Sequence[Record]) -> list[tuple[Record, list[Record]]]:
    """Each segment of the model with the observations that follow it."""
    turns: list[tuple[Record, list[Record]]] = []
    for segment in segments:
        if segment["source"] == Source.MODEL:
            turns.append((segment, []))
        elif turns:
            turns[-1][1].append(segment)
    return turns


def said_before_call(text: str, call_tags: Sequence[str]) -> str:
    """What a turn says before its first call. Raises Rejected where that has no tag."""
    places = [place for tag in call_tags if (place := text.find(f"<{tag}")) >= 0]
    if not places:
        raise Rejected(
            Reason.UNKNOWN_FORM,
            "the calls of a record of another model or format can only be read where they have "
            f"tags, got {text!r:.80}",
        )
    return text[: min(places)]


def calls_of(
    text: str, results: Sequence[Record], tags: Mapping[str, Sequence[str]]
) -> tuple[TracedCall, ...]:
    """The calls of a turn with their results. Raises Rejected."""
    kinds = [str(result["info"].get("kind")) for result in results]
    if not kinds or set(kinds) & NO_TOOLS:
        raise Rejected(Reason.NO_ACTION, "a turn neither called a tool nor answered")
    calls: list[TracedCall] = []
    for kind, result in zip(kinds, results, strict=True):
        written = text.partition(f"<{kind}>")[2].partition(f"</{kind}>")[0]
        argument = written if len(results) == 1 and written else result["info"].get("arguments", {})
        calls.append(TracedCall(kind, argument, result_of(result, tags["result"])))
    return tuple(calls)


def result_of(observation: Record, result_tags: Sequence[str]) -> str:
    """The result in an observation, without what stands around it. Raises Rejected."""
    for tag in result_tags:
        _, opened, rest = observation["text"].partition(f"<{tag}>")
        if opened:
            return rest.rpartition(f"</{tag}>")[0].strip()
    info = observation["info"]
    if info["kind"] != SEARCH_TOOL or "passages" not in info:
        found = observation["text"]
        raise Rejected(Reason.UNKNOWN_FORM, f"no tag of a result ({result_tags}) in {found!r:.80}")
    return format_passages([(p["title"], p["text"]) for p in info["passages"]])
