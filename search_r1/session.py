"""A model that is asked questions by the agent loop of training, while somebody looks on.

What is said and found may be given from outside: an earlier trajectory is so gone through again up
to a place where it was changed, and from there the model goes on (`Script`).
"""

import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import IO, TYPE_CHECKING, Any

from search_r1.rewards.matching import last_answer
from search_r1.tools.base import ToolResponse
from search_r1.tools.toolbox import answering
from verl.agent import (
    AgentLoop,
    Completion,
    Generate,
    Onlooker,
    Source,
    Trajectory,
    context_digest,
    watching,
)
from verl.rollout.openai_engine import OpenAIEngine
from verl.rollout.vllm_server import VLLMServer
from verl.trainer.checks import environment_problems
from verl.trainer.config import PPOConfig, build_agent, build_tokenizer
from verl.utils.errors import ConfigError
from verl.utils.processes import writing_to

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GIVEN = -2
"""The policy version of a completion that was given; engines have versions from -1 on."""
OnTokens = Callable[[int, list[int]], None]
"""`on_tokens(call, ids)` is told of all ids that a call of the engine has sampled so far."""


def nobody(trajectory: Trajectory) -> None:
    """Looks at nothing."""


@dataclass(frozen=True)
class Script:
    """What is given instead of being sampled or looked up."""

    said: Sequence[str | list[int]] = ()
    """The first completions, in the order of the calls: token ids, or a text."""
    found: Mapping[str, ToolResponse] = field(default_factory=dict)
    """The responses to some calls of tools, by their key (`search_r1.tools.toolbox.call_key`)."""


@dataclass
class Memory:
    """What was said and found in a trajectory, so that it can be gone through again."""

    said: list[list[int]] = field(default_factory=list)
    """The completions of all calls, in their order, also of calls that are not trained."""
    found: list[tuple[int, str, ToolResponse]] = field(default_factory=list)
    """Responses of tools with their keys; each after how many completions it came."""
    turns: list[list[int]] = field(default_factory=list)
    """What of it stands in the trajectory, as segments of the policy."""

    def hear(self, key: str, response: ToolResponse) -> None:
        """Keeps the response of a tool."""
        self.found.append((len(self.said), key, response))

    def script(self, turns: Sequence[str | list[int]], found: Mapping[str, ToolResponse]) -> Script:
        """The script by which the first turns are said again, of which the last may be another.

        Calls between them that are not trained say what they said, and tools respond as they did,
        except for the responses `found`.
        """
        said: list[str | list[int]] = []
        num_turns = 0
        for completion in self.said:
            if num_turns == len(turns):
                break
            own = self.turns[num_turns] if num_turns < len(self.turns) else None
            is_turn = own is not None and completion[: len(own)] == own
            said.append(turns[num_turns] if is_turn else completion)
            num_turns += is_turn
        earlier = {key: response for place, key, response in self.found if place <= len(said)}
        return Script([*said, *turns[num_turns:]], {**earlier, **found})


class LocalEngine:
    """An engine of this process, which serves one session after the other or several at once."""

    def __init__(self, server: VLLMServer) -> None:
        self.server = server
        self.calls = 0

    async def generate(
        self,
        session: str,
        prompt_ids: list[int],
        sampling: dict[str, Any],
        on_tokens: Callable[[list[int]], None] | None = None,
    ) -> Completion:
        """Returns one completion; `on_tokens` is told of its tokens while they are sampled."""
        self.calls += 1
        name = f"{session}-{self.calls}"
        return await self.server.generate(name, prompt_ids, sampling, on_tokens)

    def forget(self, session: str) -> None:
        """Ends a session, of which nothing is kept here."""

    async def close(self) -> None:
        await self.server.shutdown()


class InferenceSession:
    """A model that can be asked questions. It belongs to one event loop."""

    def __init__(self, config: PPOConfig, log_probs: bool = False) -> None:
        """`log_probs`: whether trajectories have the log-probs of the tokens."""
        self.config = config
        self.log_probs = log_probs
        self.tokenizer = build_tokenizer(config)
        self.agent: AgentLoop = build_agent(config, self.tokenizer)
        self.engine: LocalEngine | OpenAIEngine | None = None
        """None before `start`."""
        self.log = nameless_file()
        """What a local engine writes. It is of interest when something fails."""

    async def start(self) -> None:
        """Starts the engine. Raises ConfigError when something that it needs is missing."""
        rollout = self.config.actor_rollout_ref.rollout
        gpus = rollout.tensor_model_parallel_size
        if problems := environment_problems(self.config, self.agent, gpus):
            raise ConfigError(problems)
        if rollout.name == "openai":
            model = self.config.actor_rollout_ref.model.path
            self.engine = OpenAIEngine(rollout.endpoint, model, self.tokenizer)
            return
        sys.stderr.write(f"loading {self.config.actor_rollout_ref.model.path}\n")
        with writing_to(self.log):
            server = self._build_server()
            self.engine = LocalEngine(server)
            await server.start()

    def _build_server(self) -> VLLMServer:
        """Makes an engine server that runs in this process."""
        section = self.config.actor_rollout_ref
        device = self.config.device
        gpus = range(section.rollout.tensor_model_parallel_size) if device == "cuda" else ()
        return VLLMServer(
            section.rollout,
            section.model,
            max_model_len=self.config.max_model_len,
            device=device,
            replica_rank=0,
            num_replicas=1,
            visible_devices=[str(gpu) for gpu in gpus],
            seed=self.config.trainer.seed,
        )

    async def ask(
        self,
        question: str,
        onlooker: Onlooker = nobody,
        on_tokens: OnTokens | None = None,
        script: Script = Script(),
        memory: Memory | None = None,
    ) -> Trajectory:
        """Rolls out one question.

        `onlooker` is shown the trajectory each time it has grown, and `memory` keeps what is said
        and found. Raises TrajectoryFailed when a tool or the endpoint fails.
        """
        assert self.engine is not None, "the session is not started"
        memory = Memory() if memory is None else memory
        session = f"{time.monotonic_ns()}"
        sampling = self._generate(session, on_tokens)
        generate = remembering(scripted(sampling, script.said, self.tokenizer), memory)
        row = {"extra_info": {"question": question}, "data_source": "infer"}
        try:
            with watching(onlooker), answering(script.found, memory.hear):
                trajectory = await self.agent.run([], row, generate)
            memory.turns = [s.token_ids for s in trajectory.segments if s.source is Source.MODEL]
            return trajectory
        finally:
            self.engine.forget(session)

    def _generate(self, session: str, on_tokens: OnTokens | None) -> Generate:
        """The function by which the agent loop calls the engine."""
        sampling = self.config.actor_rollout_ref.rollout.val_kwargs
        engine = self.engine
        calls = 0

        async def generate(
            prompt_ids: list[int], *, max_tokens: int, stop: Sequence[str] = ()
        ) -> Completion:
            nonlocal calls
            calls += 1
            limits = {"max_tokens": max_tokens, "stop": list(stop), "seed": None}
            wanted = sampling.params() | limits | {"log_probs": self.log_probs}
            if isinstance(engine, LocalEngine):
                told = None if on_tokens is None else partial(on_tokens, calls)
                return await engine.generate(session, prompt_ids, wanted, told)
            assert engine is not None
            return await engine.generate(session, prompt_ids, wanted)

        return generate

    def show_log(self) -> None:
        """Writes what a local engine wrote to stderr."""
        self.log.seek(0)
        shutil.copyfileobj(self.log, sys.stderr)

    async def close(self) -> None:
        """Stops the agent loop and the engine."""
        await self.agent.close()
        if self.engine is not None:
            await self.engine.close()
        self.log.close()


def nameless_file() -> IO[str]:
    """A file that is gone when it is closed."""
    return tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")


def scripted(
    generate: Generate, said: Sequence[str | list[int]], tokenizer: "PreTrainedTokenizerBase"
) -> Generate:
    """Wraps `generate`: its first completions are those of `said`."""
    coming = iter(said)

    async def next_completion(
        prompt_ids: list[int], *, max_tokens: int, stop: Sequence[str] = ()
    ) -> Completion:
        given = next(coming, None)
        if given is None:
            return await generate(prompt_ids, max_tokens=max_tokens, stop=stop)
        ids = with_control_tokens(tokenizer, given) if isinstance(given, str) else list(given)
        text = str(tokenizer.decode(ids))
        return Completion(
            token_ids=ids,
            log_probs=[0.0] * len(ids),
            finish_reason="stop",
            stop_reason=next((end for end in stop if text.endswith(end)), None),
            policy_version=GIVEN,
            context_digest=context_digest(prompt_ids),
        )

    return next_completion


def remembering(generate: Generate, memory: Memory) -> Generate:
    """Wraps `generate`: `memory` keeps its completions."""

    async def next_completion(
        prompt_ids: list[int], *, max_tokens: int, stop: Sequence[str] = ()
    ) -> Completion:
        completion = await generate(prompt_ids, max_tokens=max_tokens, stop=stop)
        memory.said.append(completion.token_ids)
        return completion

    return next_completion


def with_control_tokens(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """The ids of a text that the policy is to have said, its control tokens among them."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=False)["input_ids"]


def answer_of(trajectory: Trajectory, tokenizer: "PreTrainedTokenizerBase") -> str | None:
    """The last answer in what the model wrote itself, None without one."""
    said = [s for s in trajectory.segments if s.source is Source.MODEL and not s.is_aside]
    own = [segment.token_ids for segment in said]
    return last_answer([str(tokenizer.decode(token_ids)) for token_ids in own])
