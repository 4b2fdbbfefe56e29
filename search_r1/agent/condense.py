"""Long results become short findings before the policy goes on: by the policy itself, in a side
call of the engine, or by another model behind an endpoint."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from string import Formatter
from typing import Any, Literal

from pydantic import NonNegativeInt, PositiveInt, field_validator, model_validator

from search_r1.agent.observation import neutralise
from search_r1.prompts import REASON_IN_DOCUMENTS_PROMPT
from search_r1.tools.base import SEARCH_TOOL, ToolFailed, ToolResponse
from verl.agent import Completion, Generate
from verl.utils.config import Config
from verl.utils.endpoint import Endpoint, EndpointConfig, EndpointFailed, check_endpoint
from verl.utils.tokenizer import Message, encode_chat, encode_text

NEEDED_FIELDS = frozenset({"query", "context"})
ALL_FIELDS = NEEDED_FIELDS | {"reasoning"}
"""The fields of a request for a finding."""


class CondenserEndpointConfig(EndpointConfig):
    model: str = ""
    """Name of the model at the endpoint."""


class CondenseConfig(Config):
    by: Literal["policy", "endpoint"] | None = None
    """Who shortens results. policy: the policy itself, in a call of its own, which is trained
    unless `train` says otherwise. endpoint: another model, which is not trained. null: nobody;
    results are cut to data.max_obs_length."""
    tools: list[str] = [SEARCH_TOOL]
    """Names of the tools whose results are shortened."""
    min_tokens: NonNegativeInt = 0
    """Results of at most this many tokens stay as they are."""
    max_result_tokens: PositiveInt = 2048
    """Most tokens of a result that whoever shortens it reads."""
    max_tokens: PositiveInt = 128
    """Most tokens of a finding."""
    prompt: str | None = None
    """What is asked of whoever shortens a result: a text with {query} and {context}, which the call
    and its result replace, and perhaps {reasoning}, what the policy has written so far. null: what
    Search-o1 asks (arXiv 2501.05366)."""
    train: bool = True
    """Whether findings of the policy are trained, each as a row of its trajectory."""
    endpoint: CondenserEndpointConfig = CondenserEndpointConfig()

    @field_validator("prompt")
    @classmethod
    def _has_fields(cls, value: str | None) -> str | None:
        if value is not None:
            check_fields(value)
        return value

    @model_validator(mode="after")
    def _has_endpoint(self) -> "CondenseConfig":
        if self.by == "endpoint" and not (self.endpoint.url and self.endpoint.model):
            raise ValueError("by=endpoint with endpoint.url and endpoint.model")
        return self


def check_fields(prompt: str) -> None:
    """Raises ValueError for a template that lacks a field of a request, or has another one."""
    try:
        fields = {name for _, name, _, _ in Formatter().parse(prompt) if name is not None}
    except ValueError as error:
        raise ValueError(f"no template: {error}; a brace of the text is written twice") from error
    if not NEEDED_FIELDS <= fields <= ALL_FIELDS:
        found = ", ".join(f"{{{name}}}" for name in sorted(fields)) or "none"
        raise ValueError(
            "expected the fields {query}, {context} and perhaps {reasoning}, found "
            f"{found}; a brace of the text is written twice"
        )


@dataclass(frozen=True)
class SideCall:
    """A call of the engine beside the conversation."""

    prompt_ids: list[int]
    completion: Completion


class Condenser:
    """Shortens results, as configured. Belongs to one event loop."""

    def __init__(
        self,
        config: CondenseConfig,
        tokenizer: Any,
        template_kwargs: Mapping[str, Any],
        max_prompt_length: int,
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.template_kwargs = template_kwargs
        self.max_prompt_length = max_prompt_length
        self.endpoint = Endpoint(config.endpoint) if config.by == "endpoint" else None

    def preflight(self) -> list[str]:
        """What is wrong with the endpoint."""
        if self.endpoint is None:
            return []
        problem = check_endpoint(self.config.endpoint)
        return [f"agent.condense.endpoint.url: {problem}"] if problem else []

    def wants(self, tool: str, response: ToolResponse) -> bool:
        """Whether a result is to be shortened."""
        if self.config.by is None or response.error or tool not in self.config.tools:
            return False
        return len(encode_text(self.tokenizer, response.text)) > self.config.min_tokens

    async def __call__(
        self, generate: Generate, written: Sequence[int], query: str, response: ToolResponse
    ) -> tuple[ToolResponse, SideCall | None]:
        """The response with a finding as its text, and the policy's call that made it.

        `written`: what followed the prompt so far. Raises ToolFailed when the endpoint fails.
        """
        text = neutralise(response.text)
        room = max(1, self.max_prompt_length - len(self._prompt("", query, "")))
        context = fit(self.tokenizer, text, min(self.config.max_result_tokens, room))
        room = max(1, self.max_prompt_length - len(self._prompt("", query, context)))
        reasoning = self.tokenizer.decode(written[-room:], skip_special_tokens=True)
        prompt_ids = self._prompt(reasoning, query, context)
        size = len(encode_text(self.tokenizer, context))
        facts = response.facts | {"condensed_from_tokens": size}
        if self.endpoint is not None:
            finding = await self._ask_endpoint(self.endpoint, reasoning, query, context)
            return replace(response, text=finding, facts=facts), None
        completion = await generate(prompt_ids, max_tokens=self.config.max_tokens)
        finding = self.tokenizer.decode(completion.token_ids, skip_special_tokens=True).strip()
        side = SideCall(prompt_ids, completion)
        return replace(response, text=finding, facts=facts), side

    async def _ask_endpoint(
        self, endpoint: Endpoint, reasoning: str, query: str, context: str
    ) -> str:
        body = {
            "model": self.config.endpoint.model,
            "messages": self._messages(reasoning, query, context),
            "max_tokens": self.config.max_tokens,
            "temperature": 0.0,
        }
        try:
            return await endpoint.post("/chat/completions", body, read_finding)
        except EndpointFailed as error:
            raise ToolFailed(str(error), kind="condenser") from error

    def _prompt(self, reasoning: str, query: str, context: str) -> list[int]:
        """Ids of the request, as the only message of a user."""
        messages = self._messages(reasoning, query, context)
        return encode_chat(self.tokenizer, messages, **self.template_kwargs)

    def _messages(self, reasoning: str, query: str, context: str) -> list[Message]:
        """What is asked of whoever shortens a result."""
        template = self.config.prompt or REASON_IN_DOCUMENTS_PROMPT
        text = template.format(reasoning=reasoning, query=query, context=context)
        return [{"role": "user", "content": text}]

    async def close(self) -> None:
        if self.endpoint is not None:
            await self.endpoint.close()


def read_finding(reply: Any) -> str:
    """The text of a reply. Raises ValueError for an empty one."""
    text = str(reply["choices"][0]["message"]["content"]).strip()
    if not text:
        raise ValueError("an empty reply")
    return text


def fit(tokenizer: Any, text: str, max_tokens: int) -> str:
    """`text` cut to its first `max_tokens` tokens."""
    ids = encode_text(tokenizer, text)
    return text if len(ids) <= max_tokens else tokenizer.decode(ids[:max_tokens])
