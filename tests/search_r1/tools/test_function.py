"""A function is a tool by one line of configuration: its signature says all that is needed."""

import asyncio
import re
from pathlib import Path

import pytest

from search_r1.agent.config import SearchAgentConfig
from search_r1.agent.loop import SearchAgentLoop
from search_r1.tools.base import ToolFailed
from search_r1.tools.function import FunctionTool
from search_r1.tools.sections import build_tools, check_sections
from search_r1.tools.toolbox import Toolbox
from tests.configs import composed
from tests.processes import until
from tests.search_r1.agent.scripted import ANSWER, PROMPT, Engine, shown
from tests.search_r1.tools import functions
from verl.agent import TrajectoryFailed
from verl.trainer.config import validate
from verl.utils.errors import ConfigError
from verl.utils.tokenizer import encode_text

FUNCTIONS = "tests.search_r1.tools.functions"


def section(function, /, **keys):
    return {
        "_target_": "search_r1.tools.function.FunctionTool",
        "function": f"{FUNCTIONS}.{function}",
        **keys,
    }


def make(function, /, **keys):
    (tool,) = build_tools([section(function, **keys)])
    return tool


async def ask(tool, **arguments):
    toolbox = Toolbox([tool], 1000)
    return (await toolbox.execute(tool.name, arguments)).response


async def test_its_signature_and_docstring_are_what_the_policy_is_told():
    tool = make("population")
    assert (tool.name, tool.description) == (
        "population",
        "Tells how many people live in a city.",
    )
    assert tool.parameters == {
        "type": "object",
        "properties": {
            "city": {"type": "string", "description": "Name of the city, in English."},
            "year": {
                "type": "integer",
                "minimum": 0,
                "description": "Year of the census.",
                "default": 2020,
            },
        },
        "required": ["city"],
        "additionalProperties": False,
    }
    assert "a JSON object of the schema" in tool.tag_instruction
    one_text = make("says")
    assert one_text.tag_instruction == (
        "You can call the tool says by <says> text </says>, and its result will stand between "
        "<result> and </result>. Says it."
    )


async def test_the_configuration_may_say_it_otherwise():
    tool = make("population", name="census", description="Counts.", deadline_s=3)
    assert (tool.name, tool.description, tool.limits.deadline_s) == ("census", "Counts.", 3)
    assert make("nothing").description == ""


@pytest.mark.parametrize(
    ("name", "arguments", "text", "error"),
    [
        ("population", {"city": "Torvel"}, "1200", ""),
        ("population", {"city": "Ys"}, "There was no census of Ys in 2020.", "call"),
        (
            "population",
            {"city": "Ys", "year": -1},
            "The arguments do not fit year: -1",
            "arguments",
        ),
        ("population", {}, "The arguments do not fit: 'city' is a required", "arguments"),
        ("population", {"city": "Ys", "mayor": 1}, "The arguments do not fit: Add", "arguments"),
        ("says", {"text": "as it is \u2713"}, "as it is \u2713", ""),
        ("nothing", {}, "null", ""),
        ("hidden", {"number": 4}, "8", ""),
        ("shadows", {"schema": 3, "copy": 4}, "8", ""),
        ("book", {"day": "soon", "stays": []}, "The arguments do not fit: day: Input", "arguments"),
    ],
)
async def test_a_call_is_answered(name, arguments, text, error):
    response = await ask(make(name), **arguments)
    assert response.text.startswith(text) and response.error == error


async def test_arguments_become_what_the_hints_say_and_results_become_json():
    tool = make("book")
    stays = [{"city": "Torvel", "nights": 2}]
    response = await ask(tool, day="2026-03-01", stays=stays)
    assert functions.calls.pop() == (
        functions.date(2026, 3, 1),
        (functions.Stay("Torvel", 2),),
        None,
    )
    assert response.text == (
        '{"on": "2026-03-01", "first": {"city": "Torvel", "nights": 2}, "cities": ["Torvel"], '
        '"note": "é"}'
    )


@pytest.mark.parametrize(
    ("name", "arguments", "message", "kind"),
    [
        ("breaks", {"how": "key"}, r"functions\.breaks: KeyError: 'secret', line \d+", "exception"),
        ("breaks", {"how": "stop"}, r"functions\.breaks: (Runtime|StopIt)\w+: .*", "exception"),
        ("breaks", {"how": "exit"}, r"functions\.breaks: RuntimeError: SystemExit: 3", "exception"),
        ("breaks", {"how": "no json"}, r"functions\.breaks: Pydantic\w+: .*", "exception"),
        ("breaks", {"how": "environment"}, "the disk is full", "disk"),
        ("breaks_later", {}, r"functions\.breaks_later: ValueError: secret, line \d+", "exception"),
    ],
)
async def test_any_other_exception_is_a_mistake_of_the_function(name, arguments, message, kind):
    toolbox = Toolbox([make(name)], 1000)
    with pytest.raises(ToolFailed, match=message) as caught:
        await toolbox.execute(name, arguments)
    assert toolbox.take_failures() == {name: {kind: 1}}
    if numbered := re.search(r"line (\d+)", str(caught.value)):
        lines = Path(functions.__file__).read_text().splitlines()
        assert "secret" in lines[int(numbered[1]) - 1]


async def test_a_thread_that_outlives_its_call_is_counted_and_limits_further_ones():
    tool = make("waits", deadline_s=0.01, max_concurrency=2)
    assert isinstance(tool, FunctionTool)
    toolbox = Toolbox([tool], 1000)
    for kind in ("deadline", "deadline", "threads"):
        with pytest.raises(ToolFailed) as caught:
            await toolbox.execute("waits", {})
        assert caught.value.kind == kind
    assert tool.abandoned == 2
    assert tool.trajectory_facts() == {"given_up/waits": 2} and tool.trajectory_facts() == {}
    functions.release.set()
    await until(lambda: tool.abandoned == 0)
    free = make("waits")
    assert (await ask(free)).text == "done"
    functions.release.clear()


async def test_a_function_in_the_loop_is_stopped_at_the_deadline():
    toolbox = Toolbox([make("waits_in_the_loop", deadline_s=0.01)], 1000)
    with pytest.raises(ToolFailed, match="more than deadline_s"):
        await toolbox.execute("waits_in_the_loop", {})


async def test_only_a_pure_function_may_be_cached():
    tool = make("population", pure=True, cache_size=1)
    toolbox = Toolbox([tool], 1000)
    first = await toolbox.execute("population", {"city": "Torvel"})
    again = await toolbox.execute("population", {"city": "Torvel"})
    assert again.response is first.response
    with pytest.raises(ValueError, match="cache_size=0"):
        check_sections([section("population", cache_size=1)])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("many", "each have a name, no *args or **kwargs: words of"),
        ("keyed", "each have a name, no *args or **kwargs: words of"),
        ("by_place", "can be given by name: word of"),
        ("untyped", "have types: word of"),
        ("opaque", "have types that JSON can carry (Unable to generate pydantic-core schema for"),
        ("called_back", "have types that JSON can carry ("),
        ("forward", "name 'Nowhere' is not defined"),
        ("fielded", "have a Field within Annotated[...], not as a default: word of"),
        ("unnamed", "have types: word of"),
        ("absent", "expected a function; function="),
        ("POPULATIONS", f"expected a function, which {FUNCTIONS}.POPULATIONS is not"),
        ("Stay", f"expected a function, which {FUNCTIONS}.Stay is not"),
    ],
)
def test_a_function_that_cannot_be_a_tool_is_refused_before_the_start(name, message):
    line = f"agent.tools=[{{_target_: search_r1.tools.function.FunctionTool, function: {FUNCTIONS}"
    with pytest.raises(ConfigError) as caught:
        validate(composed("grpo", "experiment=closed_world/grpo", f"{line}.{name}}}]"))
    (problem,) = caught.value.problems
    assert problem.startswith(f"agent.tools.0.function={FUNCTIONS}.{name}: expected a function")
    assert message in problem


def test_a_name_that_cannot_stand_in_tags_is_refused():
    with pytest.raises(ValueError, match=r"a name of letters, digits, .*not 'two words'"):
        check_sections([section("says", name="two words")])


def test_it_is_called_in_the_loop_and_its_exceptions_are_never_read(tokenizer):
    config = SearchAgentConfig(tools=[section("population"), section("breaks")], do_search=False)
    loop = SearchAgentLoop(config, tokenizer)
    assert loop.preflight() == []
    call = "<population>{}</population>"
    turns = [call.format("Torvel"), call.format('{"city": "</result>", "year": 1}'), ANSWER]
    trajectory = asyncio.run(loop.run(encode_text(tokenizer, PROMPT), {}, Engine(tokenizer, turns)))
    assert [text for source, text in shown(trajectory, tokenizer) if source == "observation"] == [
        "\n\n<result>1200</result>\n\n",
        "\n\n<result>There was no census of (/result) in 1.</result>\n\n",
    ]
    assert trajectory.info["tools"]["population"]["errors"] == {"call": 1}
    with pytest.raises(TrajectoryFailed, match="KeyError: 'secret'"):
        engine = Engine(tokenizer, ["<breaks>key</breaks>", ANSWER])
        asyncio.run(loop.run(encode_text(tokenizer, PROMPT), {}, engine))
