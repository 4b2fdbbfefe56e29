"""What a task implements to be trained: an agent loop and a reward.

This module imports only numpy and pydantic. tests/e2e/toy.py is a complete task.

A trajectory is a prompt followed by segments. A segment says who wrote its tokens, and everything
that later needs to know (loss mask, importance ratios, reward text, logs) is derived from it, never
recovered from ids or text:

    prompt | <search> q </search> | <information> .. </information> | <answer> a </answer>
    source   MODEL                  OBSERVATION                       MODEL
    mask     1 1 1 1 1 1 1          0 0 0 0 0 0 0 0 0 0 0 0           1 1 1 1 1 1
"""

import zlib
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
from pydantic import BaseModel, ConfigDict

Row = dict[str, Any]
"""One line of the training parquet: data_source, prompt, ability, reward_model, extra_info."""
TRAINING_STEP = "training_step"
"""In a row that is rolled out for training: the step that the present weights are to be trained in,
one more than their version. Rows of validation and evaluation lack it."""


class Source(StrEnum):
    """Who wrote a segment."""

    MODEL = "model"  # sampled by the policy: the only tokens that are trained
    FORCED = "forced"  # appended by the engine, not sampled (for instance a stop token)
    OBSERVATION = "observation"  # written by the environment


@dataclass(frozen=True)
class Completion:
    """One call of the engine."""

    token_ids: list[int]
    log_probs: list[float]
    """Log-probability of each token under the distribution it was sampled from (after
    temperature)."""
    finish_reason: str
    """`stop` (stop string or EOS), `length` (token limit) or `abort`."""
    stop_reason: str | int | None
    """The stop string or token id that ended the call, None for EOS and `length`."""
    policy_version: int
    context_digest: int
    """`context_digest` of the prompt ids that the engine says it was given."""


def context_digest(token_ids: Sequence[int]) -> int:
    """CRC-32 of the ids as little-endian int32: compares contexts without shipping them."""
    return zlib.crc32(np.asarray(token_ids, dtype="<i4").tobytes())


@dataclass(frozen=True, eq=False)
class Image:
    """An image in a context."""

    token_ids: list[int]
    """What stands for it in the context."""
    pixels: np.ndarray
    """[tiles, 3, height, width], float32: what the policy's processor makes of it."""
    digest: str
    """The same for the same file."""


class Generate(Protocol):
    """The engine as an agent loop sees it: sampling parameters and replica are already bound.

    `images`: those whose tokens stand in the prompt, in their order.
    """

    async def __call__(
        self,
        prompt_ids: list[int],
        *,
        max_tokens: int,
        stop: Sequence[str] = (),
        images: Sequence[Image] = (),
    ) -> Completion: ...


@dataclass
class Segment:
    """A run of tokens by one author."""

    source: Source
    token_ids: list[int]
    log_probs: list[float] = field(default_factory=list)
    policy_version: int = -1
    is_aside: bool = False
    """Whether the policy says it beside the conversation: it is trained, but no part of an
    answer."""
    info: dict[str, Any] = field(default_factory=dict)
    """Free-form facts for logs and rewards (query, passages, latency); never read by the
    trainer."""
    reward: float = 0.0
    """What this turn of the policy is paid: a part of the trajectory's score."""


@dataclass(frozen=True)
class Rewrite:
    """A place in a trajectory where the loop has written the context anew."""

    at: int
    """Number of the first segment after it."""
    prompt_ids: list[int]
    """The context from which the trajectory goes on."""


@dataclass(frozen=True)
class TrajectoryRow:
    """What a trajectory says in one context: one row of a batch."""

    prompt_ids: list[int]
    segments: list[Segment]
    first_turn: int = 0
    """Turns of the policy before this row."""
    images: Sequence[Image] = ()
    """Those whose tokens stand in the row, in their order."""

    @property
    def length(self) -> int:
        """Tokens of the row, prompt included."""
        return len(self.prompt_ids) + self.response_length

    @property
    def response_length(self) -> int:
        """Tokens after the prompt, whoever wrote them."""
        return sum(len(segment.token_ids) for segment in self.segments)

    @property
    def is_sampled(self) -> bool:
        """Whether the policy wrote any token of it."""
        return any(s.token_ids for s in self.segments if s.source is Source.MODEL)


Onlooker = Callable[["Trajectory"], None]
"""Is shown a trajectory each time it has grown."""
_onlooker: ContextVar[Onlooker | None] = ContextVar("onlooker", default=None)


@contextmanager
def watching(onlooker: Onlooker) -> Iterator[None]:
    """Shows `onlooker` the trajectories that grow in this block, each time they have grown.

    The block holds for the present task and for those that it starts.
    """
    token = _onlooker.set(onlooker)
    try:
        yield
    finally:
        _onlooker.reset(token)


@dataclass
class Trajectory:
    """A prompt and what followed.

    Where a loop writes the context anew (`rewrite`), the trajectory goes on in another row: each
    row trains the tokens that the policy wrote in it, and all share reward and group. `segments`
    are those of all rows, in the order of time.

    `reward` holds finite numbers: `score`, and components to log. Everything else that the reward
    function returned is in `info["reward"]`. The score includes what single turns are paid
    (`Segment.reward`); the rest of it is paid at the end.
    """

    prompt_ids: list[int]
    segments: list[Segment] = field(default_factory=list)
    stop_reason: str = ""
    reward: dict[str, float] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)
    context_violations: int = 0
    """Engine calls that were not given exactly the present context."""
    truncated: bool = False
    """A turn was cut at its token limit, or the context was full: the policy did not end it."""
    void_turns: int = 0
    """Turns that neither acted nor answered, as the agent loop counts them."""
    rewrites: list[Rewrite] = field(default_factory=list)
    shared_turns: int = 0
    """Its first turns that were taken over from another trajectory of the same prompt, where it
    branched off (`rollout.branches`)."""
    images: list[Image] = field(default_factory=list)
    """Those whose tokens stand in the prompt and the segments, in their order. A trajectory with
    images keeps its context: it has one row."""
    greedy_score: float | None = None
    """Score of the greedy trajectory of the same prompt; None where none was rolled out."""

    @property
    def token_ids(self) -> list[int]:
        """The present context: prompt and segments of the last row."""
        if not self.rewrites:
            return self.prompt_ids + self.response_ids
        last = self.rewrites[-1]
        return last.prompt_ids + [t for s in self.segments[last.at :] for t in s.token_ids]

    def rewrite(self, prompt_ids: Sequence[int]) -> None:
        """Goes on from another context, in a new row.

        What only adds to the present context is an observation, and the row goes on: tokens that
        two contexts begin with alike are then not computed twice.
        """
        present = self.token_ids
        if list(prompt_ids[: len(present)]) != present:
            self.rewrites.append(Rewrite(len(self.segments), list(prompt_ids)))
            show(self)
        elif len(prompt_ids) > len(present):
            self.add_observation(list(prompt_ids[len(present) :]), kind="context")

    @property
    def turns(self) -> list[Segment]:
        """What the policy wrote, one segment for each of its turns, asides included."""
        return [segment for segment in self.segments if segment.source is Source.MODEL]

    @property
    def rows(self) -> list[TrajectoryRow]:
        """The rows, one for each context, those without a token of the policy left out.

        A trajectory without any such token has one row.
        """
        if not self.rewrites:
            return [TrajectoryRow(self.prompt_ids, self.segments, images=self.images)]
        begins = [Rewrite(0, self.prompt_ids), *self.rewrites]
        ends = [rewrite.at for rewrite in self.rewrites] + [len(self.segments)]
        rows: list[TrajectoryRow] = []
        turns = 0
        for begin, end in zip(begins, ends, strict=True):
            segments = self.segments[begin.at : end]
            while segments and segments[-1].source is not Source.MODEL:
                segments = segments[:-1]  # nothing that is trained was said after it
            row = TrajectoryRow(begin.prompt_ids, segments, turns)
            turns += sum(s.source is Source.MODEL for s in row.segments)
            rows.append(row)
        return [row for row in rows if row.is_sampled] or rows[:1]

    @property
    def response_ids(self) -> list[int]:
        return [t for s in self.segments for t in s.token_ids]

    @property
    def response_length(self) -> int:
        """Tokens after the prompt, whoever wrote them."""
        return sum(len(segment.token_ids) for segment in self.segments)

    @property
    def response_mask(self) -> list[int]:
        return [int(s.source is Source.MODEL) for s in self.segments for _ in s.token_ids]

    @property
    def rollout_log_probs(self) -> list[float]:
        """Log-probs of the response tokens, 0 where the policy did not write."""
        return [
            x
            for s in self.segments
            for x in (s.log_probs if s.source is Source.MODEL else [0.0] * len(s.token_ids))
        ]

    def num_tokens(self, source: Source) -> int:
        return sum(len(s.token_ids) for s in self.segments if s.source is source)

    def add_completion(self, completion: Completion, is_aside: bool = False, **info: Any) -> None:
        """Appends what the engine sampled; an aside that was cut does not truncate the trajectory.

        Counts a violation unless the engine was given exactly the present context.
        """
        self.context_violations += completion.context_digest != context_digest(self.token_ids)
        self.truncated |= completion.finish_reason == "length" and not is_aside
        self.segments.append(
            Segment(
                Source.MODEL,
                completion.token_ids,
                completion.log_probs,
                completion.policy_version,
                is_aside,
                info=info,
            )
        )
        show(self)

    def add_observation(
        self, token_ids: list[int], images: Sequence[Image] = (), /, **info: Any
    ) -> None:
        """Appends tokens written by the environment: they are never trained.

        `images`: those whose tokens are among them.
        """
        self.segments.append(Segment(Source.OBSERVATION, token_ids, info=info))
        self.images += images
        show(self)


def show(trajectory: Trajectory) -> None:
    """Shows a trajectory that has grown to the onlooker, if there is one."""
    onlooker = _onlooker.get()
    if onlooker is not None:
        onlooker(trajectory)


class TrajectoryFailed(Exception):
    """The environment broke, not the policy: the trajectory is run once more, then dropped.

    `num_calls` is the number of environment calls the trajectory had made, the failed one included.
    Trajectories that make many calls are dropped more often, so the failure rate is also reported
    for each number of calls.
    """

    def __init__(self, message: str, num_calls: int) -> None:
        super().__init__(message, num_calls)
        self.num_calls = num_calls


class AnySection(BaseModel):
    """Takes every key that a section has; they become attributes."""

    model_config = ConfigDict(extra="allow", frozen=True)


class AgentLoop:
    """Turns a prompt into a trajectory. Subclass it and write `run`: the rest has defaults.

    One instance serves many concurrent `run` coroutines of one process.
    """

    Config: ClassVar[type[BaseModel]] = AnySection
    """Validates the `agent` section (without `_target_`). By default every key is taken."""
    top_level_keys: ClassVar[frozenset[str] | None] = None
    """Top-level keys that this task lets users set, beside the library's own sections, and that
    its section refers to; None: any key."""
    sections: ClassVar[Mapping[str, type[BaseModel]]] = {}
    """Models of further top-level sections, which are not passed to the loop."""
    rewrites_contexts: bool = False
    """Whether it writes contexts anew (`Trajectory.rewrite`), so that a trajectory may have several
    rows."""
    is_evaluated_alone: bool = False
    """Whether nothing of its trajectories can be trained: a training with it is refused."""
    needs_tokens: bool = False
    """Whether it works on the tokens of a chat template, which an endpoint of text cannot take."""
    reads_images: bool = False
    """Whether it puts the images of rows and observations into contexts, by `image_reader`."""
    image_reader: Any = None
    """The `verl.utils.images.ImageReader` of a policy that reads images, None for another one."""
    can_branch: bool = False
    """Whether a trajectory may begin with the first turns of another one (`rollout.branches`). It
    may if each call of the engine is a turn, contexts only grow, and `answering` is written."""

    def __init__(self, config: Any, tokenizer: Any) -> None:
        """Takes the validated section and the tokenizer of the policy."""
        self.config = config
        self.tokenizer = tokenizer

    def preflight(self) -> list[str]:
        """Problems that would make training fail, found before any process is started.

        For instance: a server is down.
        """
        return []

    def read_images_by(self, reader: Any) -> None:
        """Sets the `image_reader`, of a policy that reads images."""
        self.image_reader = reader

    async def run(self, prompt_ids: list[int], row: Row, generate: Generate) -> Trajectory:
        """Rolls out one question.

        Raises TrajectoryFailed when the environment, not the policy, is at fault.
        """
        raise NotImplementedError

    @staticmethod
    def answering(
        give: Callable[[str], Any], tell: Callable[[str, Any], object]
    ) -> AbstractContextManager[None]:
        """Lets others answer what trajectories of this block ask of the environment.

        Every question has a key. `give(key)` returns a response that `tell(key, response)` was told
        earlier, for the same question in another trajectory, or None where the environment is to be
        asked; `tell` is told of every response. A loop that can branch writes this.
        """
        raise NotImplementedError

    async def close(self) -> None:
        """Frees what the loop holds."""

    @staticmethod
    def reduce_metrics(trajectories: Sequence[Trajectory]) -> dict[str, float]:
        """The task's own metrics of a batch, under their final names."""
        return {}


class RewardFn(Protocol):
    """Scores a finished trajectory: returns `score` and any components to log.

    See `verl.utils.reward.take`. It may have `entries`, the names in its result, so that a
    configuration that reads another one is refused at once.
    """

    Config: ClassVar[type[BaseModel]]
    """Validates the `reward` section (without `_target_`). AnySection takes every key, as a class
    must that stands beside the stock configuration."""

    def __init__(self, config: Any, tokenizer: Any) -> None: ...

    def __call__(
        self, trajectory: Trajectory, row: Row
    ) -> dict[str, float] | Awaitable[dict[str, float]]:
        """Returns `score`, any components to log, and `turn_rewards` if single turns are paid.

        `turn_rewards` has a number for each of `trajectory.turns`, and is a part of the score: what
        it leaves of the score is paid at the end.

        Raises TrajectoryFailed when no score can be computed, which is not a score of 0. Any other
        exception counts as a bug of the reward and ends the run.
        """
        ...


@runtime_checkable
class GroupReward(Protocol):
    """What a `RewardFn` may also implement: a comparison of the trajectories of each prompt.

    It is called in training only, once all trajectories of a batch are scored. A reward that
    compares nothing, as it is configured, says so by an attribute `compares` that is False.
    """

    def score_groups(self, groups: Sequence[Sequence[Trajectory]]) -> None:
        """Changes the `reward` of the trajectories in place, those of a prompt together."""
        ...


@runtime_checkable
class RewardPreflight(Protocol):
    """What a `RewardFn` may also implement: a look at the agent loop before the training starts."""

    def preflight(self, agent: AgentLoop) -> list[str]:
        """What of its configuration contradicts the agent loop, such as an unknown tool."""
        ...


ComputeScore = Callable[..., Any]
"""`compute_score(data_source, solution_str, ground_truth, extra_info)`, as verl users write it: a
number, or a dict with one under `score`."""
