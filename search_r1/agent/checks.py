"""What would keep an agent loop from working, found before any process is started."""

from collections.abc import Sequence

from search_r1.agent.condense import CondenseConfig
from search_r1.agent.config import TAGS, SearchAgentConfig
from search_r1.agent.contexts import ContextConfig
from search_r1.tools.base import SEARCH_TOOL, Tool
from verl.utils.images import USUAL_SIZE, ImageReader


def budget_problems(config: SearchAgentConfig, tools: Sequence[Tool]) -> list[str]:
    """Lengths that contradict each other, or that cannot hold one call of a tool."""
    problems = []
    if config.max_start_length > config.max_prompt_length:
        problems.append(
            f"data.max_prompt_length={config.max_prompt_length} is less than "
            f"data.max_start_length={config.max_start_length}"
        )
    least = config.max_start_length + config.max_response_length + config.max_obs_length
    if tools and least > config.max_prompt_length:
        first = tools[0].name
        call = "search" if first == SEARCH_TOOL else f"call of {first}"
        problems.append(
            f"data.max_prompt_length={config.max_prompt_length} has no room for one {call}: "
            f"data.max_start_length + data.max_response_length + data.max_obs_length = {least}"
        )
    return problems


def fold_problems(config: SearchAgentConfig, request: int) -> list[str]:
    """A threshold at which a turn has no room, or that every turn passes.

    `request`: tokens of the request for a summary.
    """
    fold_at = config.context.fold_at
    if fold_at is None:
        return []
    problems = []
    turn = config.max_response_length + config.max_obs_length + request
    if fold_at + turn > config.max_prompt_length:
        problems.append(
            f"agent.context.fold_at={fold_at} leaves a turn no room: with "
            f"data.max_response_length, data.max_obs_length and the request for a summary, {turn} "
            f"together, it is more than data.max_prompt_length={config.max_prompt_length}"
        )
    folded = config.max_start_length + config.context.max_summary_length
    if fold_at <= folded:
        problems.append(
            f"agent.context.fold_at={fold_at} is not more than the longest prompt with a summary, "
            f"data.max_start_length + agent.context.max_summary_length = {folded}: contexts would "
            "be folded in every turn"
        )
    return problems


def method_problems(
    config: SearchAgentConfig, tools: Sequence[Tool], calls_tools: bool
) -> list[str]:
    """Options to which the method, or the tools that it has, give no effect."""
    problems = []
    if not calls_tools:
        options = {
            "agent.tools: this method searches by itself and calls no other tool": config.tools,
            "do_search=false: this method searches by itself": not config.do_search,
            f"agent.format={config.format}: this method calls no tool": config.format != TAGS,
            "agent.context: this method writes its contexts by itself": config.context.rewrites,
            "agent.condense: this method writes its contexts by itself": config.condense.by,
        }
        problems += [f"{text}; remove it" for text, is_on in options.items() if is_on]
    if not (tools and calls_tools):
        problems += [
            f"agent.{key}: the policy calls no tool here, so there are no turns to count; remove "
            "the key"
            for key in ("show_remaining", "max_turns_schedule")
            if getattr(config, key)
        ]
    problems += idle_problems(config)
    known = [tool.name for tool in tools]
    unknown = [name for name in config.condense.tools if name not in known]
    if config.condense.by is not None and unknown:
        problems.append(
            f"agent.condense.tools={config.condense.tools}: there is no tool {', '.join(unknown)} "
            f"here, only {', '.join(known) or 'none'}"
        )
    return problems


def image_room_problems(config: SearchAgentConfig, reader: ImageReader) -> list[str]:
    """An observation that has no room for an ordinary image of a passage."""
    tokens = reader.tokens_of_picture()
    if tokens < config.max_obs_length:
        return []
    width, height = USUAL_SIZE
    return [
        f"data.max_obs_length={config.max_obs_length} has no room for an image: one of {width} by "
        f"{height} pixels takes {tokens} tokens. Raise it, or let the processor make fewer tiles "
        "(size in its configuration)"
    ]


def format_problems(config: SearchAgentConfig) -> list[str]:
    """A format of calls beside that of a method which has one of its own."""
    if config.format == TAGS:
        return []
    return [f"agent.format={config.format}: this method has a format of its own; remove the key"]


def image_problems(
    config: SearchAgentConfig, calls_tools: bool, reader: ImageReader | None
) -> list[str]:
    """Options under which images would be lost from a context, or for which there is no room."""
    if reader is None:
        return []
    options = {
        "this method, which writes its contexts by itself": not calls_tools,
        f"agent.format={config.format}": config.format != TAGS,
        f"agent.template={config.template}": config.template is not None,
        "agent.show_remaining=true": config.show_remaining,
        "agent.context": config.context.rewrites,
        "agent.condense": config.condense.by is not None,
    }
    return image_room_problems(config, reader) + [
        f"actor_rollout_ref.model.reads_images=true: not with {text}, in which images have no place"
        for text, is_on in options.items()
        if is_on
    ]


def idle_problems(config: SearchAgentConfig) -> list[str]:
    """Keys that say how something is done which is not done at all."""
    problems = noise_problems(config)
    if config.condense.by is None and config.condense != CondenseConfig():
        problems.append("agent.condense: without agent.condense.by its other keys have no effect")
    context = config.context
    usual = ContextConfig()
    summary = (context.max_summary_length, context.train_summaries)
    if context.fold_at is None and summary != (usual.max_summary_length, usual.train_summaries):
        problems.append(
            "agent.context: without agent.context.fold_at the keys of summaries have no effect"
        )
    return problems


def noise_problems(config: SearchAgentConfig) -> list[str]:
    """Noise of searches that no server is asked."""
    if not config.retriever.noise.is_on:
        return []
    options = {
        "do_search=false: nothing is searched": not config.do_search,
        "agent.replay_calls: no server is asked": config.replay_calls is not None,
    }
    return [
        f"retriever.noise has no effect beside {text}; remove it"
        for text, is_on in options.items()
        if is_on
    ]
