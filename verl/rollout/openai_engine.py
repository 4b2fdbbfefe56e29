"""An OpenAI-compatible endpoint in the place of an engine, for evaluation only.

The endpoint takes and returns text, while agent loops work with ids of a tokenizer that the user
names for counting tokens; this module converts between them. With `api=chat` the first context is
the first user message, what the loop adds later becomes further user messages, and what the model
wrote becomes the assistant's.
"""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from verl.agent import Completion, TrajectoryFailed, context_digest
from verl.utils.endpoint import Endpoint, EndpointFailed
from verl.utils.tokenizer import encode_text, leading_ids
from verl.workers.config import OpenAIConfig

Messages = list[dict[str, str]]


class OpenAIEngine:
    """Has the interface of a Router, and serves one agent worker."""

    def __init__(
        self, config: OpenAIConfig, model: str, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        self.config = config
        self.model = model
        self.tokenizer = tokenizer
        self.endpoint = Endpoint(config)
        self.leading_ids = leading_ids(tokenizer)
        self.sessions: dict[str, list[tuple[list[int], Messages]]] = {}
        """For each trajectory its contexts so far, each with the conversation it stands for."""

    async def generate(
        self, session: str, prompt_ids: list[int], sampling: dict[str, Any]
    ) -> Completion:
        """Requests one completion for the session. Raises TrajectoryFailed."""
        messages = self._messages(session, prompt_ids)
        text, reason = await self.complete(messages, self._text(prompt_ids), sampling)
        ids = encode_text(self.tokenizer, text)
        said = [*messages, {"role": "assistant", "content": text}]
        self.sessions.setdefault(session, []).append((prompt_ids + ids, said))
        return Completion(ids, [0.0] * len(ids), reason, None, -1, context_digest(prompt_ids))

    def _messages(self, session: str, prompt_ids: list[int]) -> Messages:
        """The longest known conversation that begins the context, and the rest as user message."""
        fitting = [
            known
            for known in self.sessions.get(session, ())
            if prompt_ids[: len(known[0])] == known[0]
        ]
        ids, said = max(fitting, key=lambda known: len(known[0]), default=([], []))
        new = self.tokenizer.decode(prompt_ids[len(ids) :]) if ids else self._text(prompt_ids)
        return [*said, {"role": "user", "content": str(new)}]

    def _text(self, prompt_ids: list[int]) -> str:
        """A context as text, without BOS: the endpoint's own tokenizer puts that before a text."""
        leading = len(self.leading_ids)
        starts_so = prompt_ids[:leading] == self.leading_ids
        return str(self.tokenizer.decode(prompt_ids[leading:] if starts_so else prompt_ids))

    def forget(self, session: str) -> None:
        """Ends a session. One that never generated is no error."""
        self.sessions.pop(session, None)

    async def complete(
        self, messages: Messages, prompt: str, sampling: dict[str, Any]
    ) -> tuple[str, str]:
        """Requests one reply; returns its text and finish reason. Raises TrajectoryFailed."""
        body = {
            "model": self.model,
            "temperature": sampling["temperature"],
            "top_p": sampling["top_p"],
            self.config.max_tokens_key: sampling["max_tokens"],
            **({"stop": sampling["stop"]} if sampling["stop"] else {}),
            **self.config.extra_body,
        }
        chat = self.config.api == "chat"
        path = "/chat/completions" if chat else "/completions"
        body |= {"messages": messages} if chat else {"prompt": prompt}
        try:
            return await self.endpoint.post(
                path, body, lambda reply: read_choice(reply, chat, sampling["stop"])
            )
        except EndpointFailed as error:
            raise TrajectoryFailed(str(error), num_calls=0) from error

    async def close(self) -> None:
        await self.endpoint.close()


def read_choice(reply: dict[str, Any], chat: bool, stop: Sequence[str]) -> tuple[str, str]:
    """The text and the finish reason of a reply.

    The stop string, which the protocol removes, is appended again.
    """
    choice = reply["choices"][0]
    text = (choice["message"]["content"] or "") if chat else choice["text"]
    reason = choice.get("finish_reason") or "stop"
    if not isinstance(text, str):
        raise ValueError(f"expected text, got {text!r:.80}")
    if reason == "stop":
        found = choice.get("stop_reason")  # vLLM reports which one it was
        known = isinstance(found, str) and found in stop and not text.endswith(found)
        text += found if known else closing(text, stop)
    return text, reason


def closing(text: str, stop: Sequence[str]) -> str:
    """The stop string that ends the tag which `text` opened last and left open, if any.

    >>> closing("<think> t </think> <search> q", ["</search>", "</answer>"])
    '</search>'
    >>> closing("<answer> a </answer>", ["</search>", "</answer>"]), closing("q", ["Observation:"])
    ('', '')
    """
    opened: list[tuple[int, str]] = []
    for end in stop:
        start = end.replace("</", "<", 1).replace("|end_", "|begin_", 1)
        if start != end and text.rfind(start) > text.rfind(end):
            opened.append((text.rfind(start), end))
    return max(opened, default=(0, ""))[1]
