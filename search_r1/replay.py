"""Goes through an earlier trajectory again, up to a place where it was changed.

A `Memory` keeps what is said and found in a trajectory. Its `Script` gives that again, so that
nothing is sampled and no tool is called before the change.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from search_r1.tools.base import ToolResponse
from verl.agent import Completion, Generate, Image, context_digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GIVEN = -2
"""The policy version of a completion that was given; engines have versions from -1 on."""
Said = str | list[int]
"""A completion: a text, or the ids of its tokens."""


class Script:
    """What is given instead of being sampled or looked up, for one trajectory."""

    def __init__(
        self,
        said: Sequence[Said] = (),
        found: Mapping[str, ToolResponse] | None = None,
        said_in: Sequence[tuple[int, Said]] = (),
        found_once: Sequence[tuple[str, ToolResponse]] = (),
    ) -> None:
        """`said`: the first completions, in the order of the calls.

        `found`: responses to calls of tools by their key (`search_r1.tools.toolbox.call_key`), each
        to any number of calls. `said_in`: completions with the digest of the context in which they
        are said, and `found_once`: responses with their key, each to one call, in this order.
        """
        self.said = list(said)
        self.found = dict(found or {})
        self.said_in: dict[int, list[Said]] = {}
        for context, completion in said_in:
            self.said_in.setdefault(context, []).append(completion)
        self.found_once: dict[str, list[ToolResponse]] = {}
        for key, response in found_once:
            self.found_once.setdefault(key, []).append(response)

    def completion(self, context: int) -> Said | None:
        """Takes what is to be said in a context; None for what is to be sampled."""
        if self.said_in.get(context):
            return self.said_in[context].pop(0)
        return self.said.pop(0) if self.said else None

    def response(self, key: str) -> ToolResponse | None:
        """Takes the response to a call; None for a call that is to be made."""
        if key in self.found:
            return self.found[key]
        return self.found_once[key].pop(0) if self.found_once.get(key) else None


@dataclass
class Call:
    """A call of the engine."""

    context: int
    """The digest of the context."""
    ids: list[int] = field(default_factory=list)
    """What was said; empty as long as it is not known."""


@dataclass
class Memory:
    """What was said and found in a trajectory, so that it can be gone through again."""

    calls: list[Call] = field(default_factory=list)
    """In the order in which they began, also those that are not trained."""
    found: list[tuple[int, str, ToolResponse]] = field(default_factory=list)
    """Responses of tools with their keys; each after how many calls of the engine it came."""
    turns: list[list[int]] = field(default_factory=list)
    """The segments of the policy."""

    def hear(self, key: str, response: ToolResponse) -> None:
        """Keeps the response of a tool."""
        self.found.append((len(self.calls), key, response))

    def script(self, turns: Sequence[Said], found: Mapping[str, ToolResponse]) -> Script:
        """The script by which the first turns are said again.

        If the last of them is a text, it takes the place of what was said there. What was said in
        other calls until then, and what tools responded, stays too, except for the responses
        `found`. Of a trajectory that is not remembered the turns alone are said.
        """
        is_edited = bool(turns) and isinstance(turns[-1], str)
        num_kept = len(turns) - is_edited
        places = self._places_of_turns()
        if num_kept > len(places):
            return Script(turns, found)
        end = places[num_kept] if num_kept < len(places) else len(self.calls)
        said_in: list[tuple[int, Said]] = [
            (call.context, call.ids) for call in self.calls[:end] if call.ids
        ]
        edited = turns[num_kept:]
        if edited and end < len(self.calls):
            said_in.append((self.calls[end].context, edited[0]))
            edited = ()
        found_once = [(key, response) for place, key, response in self.found if place <= end]
        return Script(edited, found, said_in, found_once)

    def _places_of_turns(self) -> list[int]:
        """For each segment of the policy the number of its call; stops where there is none."""
        places: list[int] = []
        for turn in self.turns:
            own = (
                place
                for place, call in enumerate(self.calls)
                if place not in places and call.ids[: len(turn)] == turn
            )
            place = next(own, None)
            if place is None:
                break
            places.append(place)
        return places


def scripted(
    generate: Generate, script: Script, memory: Memory, tokenizer: "PreTrainedTokenizerBase"
) -> Generate:
    """Wraps `generate`: what the script has is given, and `memory` keeps what is said."""

    async def next_completion(
        prompt_ids: list[int],
        *,
        max_tokens: int,
        stop: Sequence[str] = (),
        images: Sequence[Image] = (),
    ) -> Completion:
        call = Call(context_digest(prompt_ids))
        memory.calls.append(call)
        given = script.completion(call.context)
        if given is None:
            completion = await generate(prompt_ids, max_tokens=max_tokens, stop=stop, images=images)
        else:
            completion = completion_of(given, call.context, stop, tokenizer)
        call.ids = completion.token_ids
        return completion

    return next_completion


def completion_of(
    given: Said, context: int, stop: Sequence[str], tokenizer: "PreTrainedTokenizerBase"
) -> Completion:
    """What is given, as if it had been sampled."""
    ids = with_control_tokens(tokenizer, given) if isinstance(given, str) else list(given)
    text = str(tokenizer.decode(ids))
    return Completion(
        token_ids=ids,
        log_probs=[0.0] * len(ids),
        finish_reason="stop",
        stop_reason=next((end for end in stop if text.endswith(end)), None),
        policy_version=GIVEN,
        context_digest=context,
    )


def with_control_tokens(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """The ids of a text that the policy is to have said, its control tokens among them."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=False)["input_ids"]
