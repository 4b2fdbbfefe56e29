"""Calls are checked, limited, cached, recorded and replayed, whatever the tool."""

import asyncio
import json

import pytest

from search_r1.agent.config import SearchAgentConfig
from search_r1.agent.loop import CHARS_PER_TOKEN, SearchAgentLoop
from search_r1.tools.base import Tool, ToolConfig, ToolFailed, ToolResponse
from search_r1.tools.toolbox import Toolbox
from tests.search_r1.agent.scripted import ADA, ANSWER, SEARCH, Engine, Library
from verl.agent import TrajectoryFailed


class Echo(Tool):
    """Says what it is told, once it may."""

    name = "echo"
    pure = True

    def __init__(self, config=None):
        super().__init__(config or ToolConfig())
        self.calls = 0
        self.running = 0
        self.most = 0
        self.gate = None

    @property
    def parameters(self):
        return {
            "type": "object",
            "properties": {"text": {"type": "string"}, "times": {"type": "integer", "minimum": 1}},
            "required": ["text"],
            "additionalProperties": False,
        }

    async def call(self, arguments):
        self.calls += 1
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            if self.gate is not None:
                await self.gate.wait()
        finally:
            self.running -= 1
        return ToolResponse(arguments["text"] * arguments.get("times", 1), facts={"n": self.calls})


def execute(toolbox, *calls):
    async def together():
        return await asyncio.gather(
            *(toolbox.execute(name, arguments) for name, arguments in calls)
        )

    return [done.response for done in asyncio.run(together())]


@pytest.mark.parametrize(
    ("name", "arguments", "error", "words"),
    [
        ("ecko", {"text": "x"}, "unknown_tool", "There is no tool 'ecko'. Tools: echo."),
        ("echo", {}, "arguments", "'text' is a required property"),
        ("echo", {"text": 3}, "arguments", "do not fit text: 3 is not of type 'string'"),
        ("echo", {"text": "x", "times": 0}, "arguments", "less than the minimum of 1"),
        ("echo", {"text": "x", "tmes": 1}, "arguments", "'tmes' was unexpected"),
    ],
)
def test_calls_that_do_not_fit_are_answered_and_not_run(name, arguments, error, words):
    tool = Echo()
    (response,) = execute(Toolbox([tool], 100), (name, arguments))
    assert response.error == error and words in response.text and tool.calls == 0


def test_no_more_calls_run_together_than_allowed():
    async def rush():
        tool = Echo(ToolConfig(max_concurrency=3))
        tool.gate = asyncio.Event()
        toolbox = Toolbox([tool], 100)
        tasks = [asyncio.ensure_future(toolbox.execute("echo", {"text": "x"})) for _ in range(9)]
        for _ in range(20):
            await asyncio.sleep(0)
        assert tool.running == 3
        tool.gate.set()
        await asyncio.gather(*tasks)
        return tool

    tool = asyncio.run(rush())
    assert tool.most == 3 and tool.calls == 9


def test_a_tool_that_hangs_fails_at_its_deadline_and_is_counted():
    async def hang():
        tool = Echo(ToolConfig(deadline_s=0.01, max_concurrency=1))
        tool.gate = asyncio.Event()
        toolbox = Toolbox([tool], 100)
        with pytest.raises(ToolFailed, match=r"echo took more than deadline_s=0\.01") as caught:
            await toolbox.execute("echo", {"text": "x"})
        assert caught.value.kind == "deadline" and tool.running == 0
        assert toolbox.take_failures() == {"echo": {"deadline": 1}}
        assert toolbox.take_failures() == {}
        tool.gate.set()
        done = await toolbox.execute("echo", {"text": "x"})
        assert done.response.text == "x", "its place is free again"

    asyncio.run(hang())


def test_a_time_out_of_the_tool_s_own_is_its_mistake():
    class Late(Echo):
        async def call(self, arguments):
            raise TimeoutError("mine")

    with pytest.raises(TimeoutError, match="mine"):
        execute(Toolbox([Late()], 100), ("echo", {"text": "x"}))


def test_ten_megabytes_are_cut_before_anything_else_and_half_characters_are_whole():
    (long, half) = execute(
        Toolbox([Echo()], 5000),
        ("echo", {"text": "x", "times": 10_000_000}),
        ("echo", {"text": "a\ud800b"}),
    )
    assert len(long.text) == 5000
    assert half.text == "a?b"


def test_a_cache_keeps_the_newest_results_by_their_arguments():
    tool = Echo(ToolConfig(cache_size=2))
    toolbox = Toolbox([tool], 100)
    for text in ("a", "a", "b", "a", "c", "a", "b"):
        (response,) = execute(toolbox, ("echo", {"text": text}))
        assert response.text == text
    assert tool.calls == 4, "b was the oldest when c came"


def test_recorded_calls_answer_in_the_tools_place(tmp_path):
    tool = Echo()
    recording = Toolbox([tool], 100, record_to=str(tmp_path / "calls"))
    calls = [{"text": "a"}, {"text": "b\u2028", "times": 2}]
    execute(recording, *(("echo", arguments) for arguments in calls), ("ecko", {}))
    (file,) = (tmp_path / "calls").glob("*.jsonl")
    lines = [json.loads(line) for line in file.read_text().split("\n") if line]
    assert [line["arguments"] for line in lines] == calls

    class Broken(Echo):
        async def call(self, arguments):
            raise AssertionError("no tool is asked")

        def preflight(self):
            return ["it is broken"]

    replaying = Toolbox([Broken()], 100, replay_from=str(tmp_path / "calls"))
    assert replaying.preflight() == []
    again = {"times": 2, "text": "b\u2028"}
    responses = execute(replaying, ("echo", again), ("echo", {"text": "a"}))
    assert [r.text for r in responses] == ["b\u2028b\u2028", "a"]
    assert responses[0].facts == {"n": 2}
    with pytest.raises(ToolFailed, match="holds no call") as caught:
        execute(replaying, ("echo", {"text": "c"}))
    assert caught.value.kind == "not_recorded"


def test_a_recording_that_is_missing_or_broken_is_named(tmp_path):
    toolbox = Toolbox([Echo()], 100, replay_from=str(tmp_path))
    assert toolbox.preflight() == [
        f"agent.replay_calls={tmp_path}: there are no recorded calls (*.jsonl)"
    ]
    (tmp_path / "file").write_text("")
    (problem,) = Toolbox([Echo()], 100, record_to=str(tmp_path / "file" / "x")).preflight()
    assert problem.startswith(f"agent.record_calls={tmp_path}/file/x: no folder can be made there")
    (tmp_path / "x.jsonl").write_text('{"tool": "echo"}\n')
    with pytest.raises(ToolFailed, match=r"x\.jsonl, line 1: KeyError"):
        execute(toolbox, ("echo", {"text": "c"}))


def test_a_whole_trajectory_is_replayed_without_a_server(tokenizer, tmp_path):
    def roll(passages, **config):
        loop = SearchAgentLoop(SearchAgentConfig(**config), tokenizer)
        loop.search.client = Library(passages)
        prompt = tokenizer("Question: x\n")["input_ids"]
        return asyncio.run(loop.run(prompt, {}, Engine(tokenizer, [SEARCH, ANSWER])))

    recorded = roll([ADA], record_calls=str(tmp_path))
    replayed = roll([], replay_calls=str(tmp_path))
    assert replayed.token_ids == recorded.token_ids
    assert replayed.segments[1].info["passages"] == recorded.segments[1].info["passages"]


def test_a_failure_of_a_tool_fails_the_trajectory_and_is_counted_with_the_next(tokenizer):
    loop = SearchAgentLoop(SearchAgentConfig(), tokenizer)
    loop.search.client = Library([ADA], fail_at=1)
    with pytest.raises(TrajectoryFailed, match="on fire"):
        asyncio.run(loop.run([1], {}, Engine(tokenizer, [SEARCH])))
    trajectory = asyncio.run(loop.run([1], {}, Engine(tokenizer, [SEARCH, ANSWER])))
    metrics = loop.reduce_metrics([trajectory])
    assert metrics["tool/search/failures/other"] == 1
    again = asyncio.run(loop.run([1], {}, Engine(tokenizer, [ANSWER])))
    assert "tool_failures" not in again.info
    assert loop.toolbox.max_chars == CHARS_PER_TOKEN * 500
