"""Trajectories as JSON, for people to read and for fine-tuning on them.

docs/viewer.md lists the fields.
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from verl.agent import Segment, Source, Trajectory
from verl.rollout.agent_worker import Job

TokenFacts = dict[str, list[Any]]
"""By the name of a fact, its value for every token of a segment."""
WINDOW = 8
"""Tokens after which `token_ends` begins to decode further on."""


def trajectory_records(
    jobs: Sequence[Job],
    trajectories: Sequence[Trajectory],
    tokenizer: PreTrainedTokenizerBase,
    *,
    with_token_ends: bool = False,
) -> list[dict[str, Any]]:
    """One record for each trajectory: its prompt, its segments, its reward, its row.

    `with_token_ends`: segments of the policy say where the text of each token ends.
    """
    facts: list[TokenFacts | None] = [{} if with_token_ends else None]
    return [
        trajectory_record(job, trajectory, tokenizer, facts * len(trajectory.segments))
        for job, trajectory in zip(jobs, trajectories, strict=True)
    ]


def trajectory_record(
    job: Job,
    trajectory: Trajectory,
    tokenizer: PreTrainedTokenizerBase,
    facts: Sequence[TokenFacts | None],
) -> dict[str, Any]:
    """One trajectory as JSON; `rewrites` is there where the loop has written its context anew, and
    `shared_turns` where it branched off another trajectory.

    `facts`: those of the tokens of each segment, see `segment_record`.
    """
    rewrites = [
        {"at": r.at, "prompt_ids": r.prompt_ids, "prompt": tokenizer.decode(r.prompt_ids)}
        for r in trajectory.rewrites
    ]
    segments = [
        segment_record(segment, tokenizer, of_tokens)
        for segment, of_tokens in zip(trajectory.segments, facts, strict=True)
    ]
    return {
        **({"rewrites": rewrites} if rewrites else {}),
        **({"shared_turns": trajectory.shared_turns} if trajectory.shared_turns else {}),
        "uid": job.uid,
        "data_source": job.row["data_source"],
        "prompt": tokenizer.decode(trajectory.prompt_ids),
        "prompt_ids": trajectory.prompt_ids,
        "segments": segments,
        "stop_reason": trajectory.stop_reason,
        "reward": trajectory.reward,
        "info": trajectory.info,
        "ground_truth": job.row["reward_model"]["ground_truth"],
        "extra_info": job.row.get("extra_info"),
    }


def segment_record(
    segment: Segment, tokenizer: PreTrainedTokenizerBase, facts: TokenFacts | None
) -> dict[str, Any]:
    """One segment as JSON: its source, text, ids and facts.

    `is_aside` is there only if it is one, and `reward` if the turn is paid.

    `facts` is None where nothing is wanted of single tokens. Otherwise it is part of the record,
    with `token_ends` where the policy wrote the segment or there are facts of its tokens.
    """
    has_ends = facts is not None and (bool(facts) or segment.source is Source.MODEL)
    ends = {"token_ends": token_ends(segment.token_ids, tokenizer)} if has_ends else {}
    return {
        **({"is_aside": True} if segment.is_aside else {}),
        **({"reward": segment.reward} if segment.reward else {}),
        "source": str(segment.source),
        "text": tokenizer.decode(segment.token_ids),
        "token_ids": segment.token_ids,
        **ends,
        **(facts or {}),
        "policy_version": segment.policy_version,
        "info": segment.info,
    }


def token_ends(token_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Where each token ends in the text of all of them, as numbers of characters.

    A character that takes several tokens ends with the last of them, so the others have no text of
    their own. Only the last tokens are decoded for each further one, because all of them from the
    beginning would take time that grows with the square of the length. Some tokens that are decoded
    already stand before those in question: a tokenizer may write a token otherwise where it is
    the first.
    """
    ids = list(token_ids)
    text = cast(str, tokenizer.decode(ids))
    ends: list[int] = []
    first = 0  # the first token that is decoded
    begin = 0  # the first one whose end is not certain
    context = ""  # the text of the tokens before it
    done = 0  # the characters of the text before it
    for place in range(len(ids)):
        piece = cast(str, tokenizer.decode(ids[first : place + 1]))
        agreed = num_agreed(piece[len(context) :], text[done : done + len(piece)])
        ends.append(max(done + agreed, ends[-1] if ends else 0))
        is_whole = len(context) + agreed == len(piece)
        if is_whole and place - begin >= WINDOW:
            first = begin
            begin = place + 1
            done += agreed
            context = cast(str, tokenizer.decode(ids[first:begin]))
    if ends:
        ends[-1] = len(text)
    return ends


def num_agreed(text: str, other: str) -> int:
    """The number of characters with which both begin."""
    pairs = zip(text, other, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(text), len(other)))


def by_segment(
    trajectory: Trajectory, facts: Mapping[int, Sequence[TokenFacts]]
) -> list[TokenFacts]:
    """The facts of the tokens of each segment of `trajectory`, none for segments without a row.

    `facts`: by the number of a row of the trajectory, those of the segments of the row.
    """
    found: dict[int, TokenFacts] = {}
    for number, row in enumerate(trajectory.rows):
        for segment, of_tokens in zip(row.segments, facts[number], strict=True):
            found[id(segment)] = of_tokens
    return [found.get(id(segment), {}) for segment in trajectory.segments]
