"""A model that is asked questions by the agent loop of training, while somebody looks on."""

import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from search_r1.replay import Memory, Script, scripted
from search_r1.rewards.matching import last_answer
from search_r1.tools.toolbox import answering
from verl.agent import (
    AgentLoop,
    Completion,
    Generate,
    Image,
    Onlooker,
    Source,
    Trajectory,
    watching,
)
from verl.rollout.openai_engine import OpenAIEngine
from verl.rollout.vllm_server import VLLMServer
from verl.trainer.config import PPOConfig, build_agent, build_tokenizer
from verl.trainer.environment import environment_problems
from verl.utils.errors import ConfigError
from verl.utils.processes import writing_to

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OnTokens = Callable[[int, list[int]], None]
"""`on_tokens(call, ids)` is told of all ids that a call of the engine has sampled so far."""


def nobody(trajectory: Trajectory) -> None:
    """Looks at nothing."""


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
        self.log: Path | None = None
        """The file of what a local engine writes, which is of interest when something fails."""
        self.num_shown = 0
        """Characters of it that were shown."""

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
        self.log = Path(tempfile.mkdtemp(prefix="search-r1-"), "engine.log")
        model = self.config.actor_rollout_ref.model.path
        sys.stderr.write(f"loading {model} (what the engine says: {self.log})\n")
        server = self._build_server()
        server.on_death = self.show_log
        self.engine = LocalEngine(server)
        with self.log.open("a", encoding="utf-8") as log, writing_to(log):
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
        script: Script | None = None,
        memory: Memory | None = None,
    ) -> Trajectory:
        """Rolls out one question.

        What `script` has is given instead of being sampled or looked up (`search_r1.replay`).
        `onlooker` is shown the trajectory each time it has grown, and `memory` keeps what is said
        and found. Raises TrajectoryFailed when a tool or the endpoint fails.
        """
        assert self.engine is not None, "the session is not started"
        script = Script() if script is None else script
        memory = Memory() if memory is None else memory
        session = f"{time.monotonic_ns()}"
        sampling = self._generate(session, on_tokens)
        generate = scripted(sampling, script, memory, self.tokenizer)
        row = {"extra_info": {"question": question}, "data_source": "infer"}
        try:
            with watching(onlooker), answering(script.response, memory.hear):
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
            prompt_ids: list[int],
            *,
            max_tokens: int,
            stop: Sequence[str] = (),
            images: Sequence[Image] = (),
        ) -> Completion:
            nonlocal calls
            calls += 1
            limits = {"max_tokens": max_tokens, "stop": list(stop), "seed": None}
            wanted = sampling.params() | limits | {"log_probs": self.log_probs}
            if images:
                wanted["images"] = list(images)
            if isinstance(engine, LocalEngine):
                told = None if on_tokens is None else partial(on_tokens, calls)
                return await engine.generate(session, prompt_ids, wanted, told)
            assert engine is not None
            return await engine.generate(session, prompt_ids, wanted)

        return generate

    def show_log(self) -> None:
        """Writes to stderr what a local engine has written since the last time."""
        if self.log is None:
            return
        text = self.log.read_text(encoding="utf-8", errors="replace")
        sys.stderr.write(text[self.num_shown :])
        sys.stderr.flush()
        self.num_shown = len(text)

    async def close(self) -> None:
        """Stops the agent loop and the engine."""
        await self.agent.close()
        if self.engine is not None:
            await self.engine.close()
        if self.log is not None:
            shutil.rmtree(self.log.parent, ignore_errors=True)


def answer_of(trajectory: Trajectory, tokenizer: "PreTrainedTokenizerBase") -> str | None:
    """The last answer in what the model wrote itself, None without one."""
    said = [s for s in trajectory.segments if s.source is Source.MODEL and not s.is_aside]
    own = [segment.token_ids for segment in said]
    return last_answer([str(tokenizer.decode(token_ids)) for token_ids in own])
