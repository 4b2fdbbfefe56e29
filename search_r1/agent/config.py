"""The `agent` section of the search task."""

from typing import Any, Self

from pydantic import PositiveInt, field_validator, model_validator

from search_r1.agent.condense import CondenseConfig
from search_r1.agent.contexts import ContextConfig
from search_r1.prompts import TEMPLATES
from search_r1.search.client.config import RetrieverConfig
from search_r1.tools.sections import Section, check_sections
from verl.utils.config import Config
from verl.utils.schedule import check_points, value_at

TAGS = "tags"


class SearchAgentConfig(Config):
    max_turns: PositiveInt = 4
    """Turns that may search or call another tool; one more, that may not, is forced after them."""
    max_turns_schedule: list[tuple[int, PositiveInt]] | None = None
    """Other numbers of such turns in training, none above `max_turns`: `[[step, turns], ...]` as a
    schedule of a weight, rounded. Validation and evaluation always have `max_turns`."""
    show_remaining: bool = False
    """Tell the policy how many turns that may call are left: in the prompt and after every
    result."""
    do_search: bool = True
    """False: no search; without another tool that is a single turn, the R1 baseline."""
    format: str = TAGS
    """How tools are called. `tags`: Search-R1's own, `<search> .. </search>`. `auto`: as the
    tokenizer's chat template writes calls. Or the name of a tool parser of vLLM, such as `hermes`
    or `qwen3_xml` (docs/tools.md)."""
    tools: list[dict[str, Any]] = []
    """Further tools: for each the class, `_target_`, and the keys of its `Config`
    (search_r1/tools/base.py)."""
    max_parallel_calls: PositiveInt = 8
    """Calls of one turn that are executed, all at the same time; the next one is answered with an
    error, and those after it are dropped. In tags a turn has one call."""
    record_calls: str | None = None
    """Folder to which every executed call of a tool is written, one JSON line each."""
    replay_calls: str | None = None
    """Folder of recorded calls that answers in the tools' place; a call that is not there fails."""
    template: str | None = None
    """Prompt template to ask `extra_info.question` in; null: the prompt of the data."""
    apply_chat_template_kwargs: dict[str, Any] = {}
    """Further arguments of the tokenizer's chat template, for prompts made from `template`."""
    max_start_length: PositiveInt = 2048
    """Longest prompt, in tokens."""
    max_prompt_length: PositiveInt = 4096
    """Longest context of any turn, in tokens; a trajectory that reaches it ends."""
    max_response_length: PositiveInt = 500
    """Most tokens of one turn."""
    max_obs_length: PositiveInt = 500
    """Most tokens of one observation; passages are cut inside their block."""
    stop_at_answer: bool = True
    """End a turn at </answer>; false lets the policy emit EOS itself."""
    context: ContextConfig = ContextConfig()
    condense: CondenseConfig = CondenseConfig()
    retriever: RetrieverConfig = RetrieverConfig()

    def turns_at(self, step: int | None) -> int:
        """Turns that may call at a training step; None: outside of training."""
        if self.max_turns_schedule is None or step is None:
            return self.max_turns
        return int(value_at(self.max_turns_schedule, step) + 0.5)

    @field_validator("max_turns_schedule")
    @classmethod
    def _steps_rise(cls, value: list[tuple[int, int]] | None) -> list[tuple[int, int]] | None:
        if value is not None:
            check_points(value, "turns")
        return value

    @model_validator(mode="after")
    def _schedule_within_max_turns(self) -> Self:
        most = max((turns for _, turns in self.max_turns_schedule or ()), default=0)
        if most > self.max_turns:
            raise ValueError(
                f"max_turns_schedule goes up to {most} turns, more than max_turns={self.max_turns}:"
                " raise max_turns, which validation has and memory is estimated for"
            )
        return self

    @model_validator(mode="after")
    def _one_recording(self) -> "SearchAgentConfig":
        if self.record_calls and self.replay_calls:
            raise ValueError("record_calls or replay_calls, not both")
        return self

    @field_validator("template")
    @classmethod
    def _known(cls, value: str | None) -> str | None:
        if value is not None and value not in TEMPLATES:
            raise ValueError(f"expected null or one of {', '.join(TEMPLATES)}")
        return value

    @field_validator("tools")
    @classmethod
    def _known_tools(cls, value: list[Section]) -> list[Section]:
        return check_sections(value)
