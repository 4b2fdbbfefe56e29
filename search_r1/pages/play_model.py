"""Serves one model of the playground: questions come in, events of a trajectory go out.

    python -m search_r1.pages.play_model MODEL --socket FILE [key=value ...]

The playground (`search_r1.pages.play`) starts it, one process for each model, and talks to it by a
socket in a folder that only its user can enter. Events are server-sent events with JSON:

    began      {"prompt"}                   the prompt of the trajectory
    sampled    {"text", "goes_on"}          what a call of the engine has written, see `Narrator`
    written    {"place", "segment"}         a segment is complete (`search_r1.pages.records`)
    rewritten  {"at", "prompt"}             the context was written anew
    ended      {"record", "name"}           the whole trajectory, and a name to follow it by
    failed     {"message"}                  the environment broke, or nobody can answer
"""

import argparse
import asyncio
import json
import logging
import os
import sys
from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Annotated, Any
from uuid import uuid4

import uvicorn
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, Field

from search_r1.evaluate import add_model_flags, given_overrides
from search_r1.infer import config_for_answering
from search_r1.launch import composed
from search_r1.pages.records import view_of, view_of_segment
from search_r1.prompts import format_passages
from search_r1.replay import GIVEN, Memory, Script
from search_r1.rewards.matching import exact_match
from search_r1.session import InferenceSession
from search_r1.tools.base import SEARCH_TOOL, ToolResponse
from search_r1.tools.toolbox import call_key
from search_r1.trajectory import gold_passages
from verl.agent import Segment, Source, Trajectory, TrajectoryFailed
from verl.rollout.agent_worker import Job
from verl.rollout.records import TokenFacts, segment_record, trajectory_record
from verl.utils.errors import ConfigError, DataError, ModelError

logger = logging.getLogger(__name__)
MOST_CHARACTERS = 100_000
"""Most characters of a turn or of a passage that is given."""
MOST_TURNS = 1000
MOST_MEMORIES = 32
"""Trajectories that can be followed; an older one is gone through by what its page knows."""
UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""How a character is decoded whose last tokens have not come."""
Said = (
    Annotated[str, Field(max_length=MOST_CHARACTERS)]
    | Annotated[list[int], Field(max_length=MOST_CHARACTERS)]
)
NOT_SHOWN = ("uid", "data_source")
"""What a record says of data and groups, of which there are none here."""


class EditedPassage(BaseModel):
    """A passage that a search is to find."""

    id: str = ""
    title: str = ""
    text: str = Field(default="", max_length=MOST_CHARACTERS)


class Ask(BaseModel):
    """A question, and what of its trajectory is given already."""

    question: str = Field(min_length=1, max_length=10_000)
    gold: list[str] = []
    """Accepted answers, to be marked."""
    said: list[Said] = Field(default=[], max_length=MOST_TURNS)
    """What the policy says first, a turn each: a text, or the ids of its tokens."""
    passages: dict[str, list[EditedPassage]] = {}
    """What searches find, by their query, instead of what the server has."""
    follows: str | None = None
    """The name of the trajectory that was edited."""


class Memories:
    """What was said and found in the last trajectories, by their names."""

    def __init__(self) -> None:
        self.kept: OrderedDict[str, Memory] = OrderedDict()

    def new(self) -> tuple[str, Memory]:
        """A name and a memory for a trajectory that begins. The oldest one makes room."""
        name = uuid4().hex
        self.kept[name] = Memory()
        if len(self.kept) > MOST_MEMORIES:
            self.kept.popitem(last=False)
        return name, self.kept[name]

    def of(self, name: str | None) -> Memory:
        """The memory of a trajectory; an empty one when it is forgotten."""
        return self.kept.get(name or "", Memory())


def script_of(ask: Ask, memory: Memory) -> Script:
    """The script of a question; `memory` is that of the trajectory that it follows."""
    found = {
        call_key(SEARCH_TOOL, {"query": query}): response_of(query, passages)
        for query, passages in ask.passages.items()
    }
    return memory.script(ask.said, found)


def response_of(query: str, passages: Sequence[EditedPassage]) -> ToolResponse:
    """What a search is answered that finds these passages."""
    text = format_passages([(passage.title, passage.text) for passage in passages])
    facts = {
        "query": query,
        "passages": [
            passage.model_dump() | {"id": passage.id or f"added-{number}"}
            for number, passage in enumerate(passages)
        ],
    }
    return ToolResponse(text, facts=facts)


class Narrator:
    """Turns what happens to a trajectory into events, in a queue."""

    def __init__(self, session: InferenceSession, ask: Ask) -> None:
        self.tokenizer = session.tokenizer
        self.log_probs = session.log_probs
        self.row = {
            "data_source": "play",
            "reward_model": {"ground_truth": {"target": ask.gold}},
            "extra_info": {"question": ask.question},
        }
        self.gold = gold_passages(self.row["extra_info"])
        self.events: asyncio.Queue[tuple[str, dict[str, Any]] | None] = asyncio.Queue()
        self.num_segments = 0
        self.num_rewrites = 0
        self.has_begun = False
        self.typed: tuple[int, str] = (0, "")
        """The call of the engine that writes, and what was told of its text."""

    def tell(self, event: str, **content: Any) -> None:
        """Puts an event into the queue."""
        self.events.put_nowait((event, content))

    def on_tokens(self, call: int, ids: list[int]) -> None:
        """Tells what a call of the engine has written since the last time.

        It goes on where the last event ended, or else it is the whole text so far.
        """
        text = self.tokenizer.decode(ids).rstrip(UNFINISHED)
        last_call, told = self.typed
        goes_on = call == last_call and text.startswith(told)
        self.typed = (call, text)
        self.tell("sampled", text=text.removeprefix(told) if goes_on else text, goes_on=goes_on)

    def on_growth(self, trajectory: Trajectory) -> None:
        """Tells what is new in a trajectory."""
        if not self.has_begun:
            self.has_begun = True
            self.tell("began", prompt=self.tokenizer.decode(trajectory.prompt_ids))
        for place in range(self.num_segments, len(trajectory.segments)):
            segment = trajectory.segments[place]
            record = segment_record(segment, self.tokenizer, self.facts_of(segment))
            self.tell("written", place=place, segment=view_of_segment(record, self.gold))
        for rewrite in trajectory.rewrites[self.num_rewrites :]:
            text = self.tokenizer.decode(rewrite.prompt_ids)
            self.tell("rewritten", at=rewrite.at, prompt=text)
        self.num_segments = len(trajectory.segments)
        self.num_rewrites = len(trajectory.rewrites)

    def facts_of(self, segment: Segment) -> TokenFacts:
        """What is known of the tokens of a segment."""
        is_sampled = segment.source is Source.MODEL and segment.policy_version != GIVEN
        return {"rollout_log_probs": segment.log_probs} if self.log_probs and is_sampled else {}

    def end(self, trajectory: Trajectory, name: str) -> None:
        """Tells the whole trajectory and its name."""
        job = Job("play", "play", self.row, trajectory.prompt_ids)
        facts = [self.facts_of(segment) for segment in trajectory.segments]
        record = view_of(trajectory_record(job, trajectory, self.tokenizer, facts))
        record = {key: value for key, value in record.items() if key not in NOT_SHOWN}
        if record["gold"]:
            em = exact_match(record["answer"] or "", record["gold"])
            record["reward"] = {"score": em, "em": em}
        self.tell("ended", record=record, name=name)


async def events_of(session: InferenceSession, ask: Ask, memories: Memories) -> AsyncIterator[str]:
    """Yields the events of a question as server-sent events.

    The question is given up when nobody reads on.
    """
    narrator = Narrator(session, ask)
    script = script_of(ask, memories.of(ask.follows))
    name, memory = memories.new()

    async def answer() -> None:
        try:
            trajectory = await session.ask(
                ask.question, narrator.on_growth, narrator.on_tokens, script, memory
            )
            narrator.end(trajectory, name)
        except (TrajectoryFailed, DataError) as error:
            narrator.tell("failed", message=str(error.args[0]))
        except Exception as error:  # whatever the engine makes of a given turn, the model lives on
            session.show_log()
            logger.exception("a question failed")
            narrator.tell("failed", message=f"{type(error).__name__}: {error}")
        finally:
            narrator.events.put_nowait(None)

    task = asyncio.create_task(answer())
    try:
        while (event := await narrator.events.get()) is not None:
            kind, content = event
            yield f"event: {kind}\ndata: {json.dumps(content)}\n\n"
        await task
    finally:
        task.cancel()


def make_app(session: InferenceSession) -> FastAPI:
    """The application that serves a session."""
    memories = Memories()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        try:
            await session.start()
        except ConfigError as error:
            sys.stderr.write(f"error: {error}\n")
            os._exit(1)  # raised here it would be shown as an error of the server
        except Exception:
            session.show_log()
            raise
        yield
        await session.close()

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/ready")
    def ready() -> dict[str, Any]:
        return {"ready": True}

    @app.post("/ask")
    async def ask(body: Ask) -> StreamingResponse:
        events = events_of(session, body, memories)
        return StreamingResponse(events, media_type="text/event-stream")

    return app


def main(argv: Sequence[str] | None = None) -> int:
    """Serves a model until it is told to end; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m search_r1.pages.play_model")
    add_model_flags(parser)
    parser.add_argument("--socket", required=True, help="file of the socket to listen on")
    args, overrides = parser.parse_known_args(argv)
    try:
        given = given_overrides(args.model, args.endpoint)
        config, _ = composed(args.config_name, [*given, *overrides])
        session = InferenceSession(
            config_for_answering(config, None), log_probs=args.endpoint is None
        )
    except (ConfigError, DataError, ModelError) as error:
        sys.exit(f"error: {error}")
    uvicorn.run(make_app(session), uds=args.socket, log_level="warning")
    return 0


if __name__ == "__main__":
    sys.exit(main())
