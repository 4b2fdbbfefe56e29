"""Rows of traces are token for token those that the agent loop makes of the same words."""

import asyncio
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from search_r1.config import FinetuneConfig
from search_r1.prompts import build_prompt
from search_r1.search.client import Passage
from search_r1.traces.convert import Converter, convert
from search_r1.traces.main import main, template_of
from search_r1.traces.read import read_trace
from search_r1.traces.trace import Reason, Rejected
from tests.configs import composed
from tests.retrieval import write_lines
from tests.search_r1.agent.scripted import Engine, make_loop
from tests.templates import NATIVE
from verl.agent import Source
from verl.rollout.agent_worker import Job
from verl.rollout.records import trajectory_records
from verl.trainer.sft import check_examples, read_examples
from verl.utils.errors import ConfigError, DataError
from verl.utils.tokenizer import encode_chat

QUESTION = "Where was Ada Marin born?"
TURNS = [
    "<think> t </think> <search> Ada Marin </search>",
    "<think> u </think>\n<search>born\nin</search>",
    "<think> v </think> <answer> Torvel </answer>",
]
FOUND = 'Doc 1(Title: "Ada Marin") Ada Marin was born in Torvel.'
TEXT = "\n\n".join(
    [TURNS[0], f"<information>{FOUND}</information>", TURNS[1], f"<result>{FOUND}</result>"]
)
TRACE = {"question": QUESTION, "response": f"{TEXT}\n\n{TURNS[2]}"}
CALCULATOR = {"_target_": "tests.calculator.Calculator"}
DEPARTURE = {"mistral-tools": "model"}
"""Mistral's template puts a space before an answer, which no policy writes."""


def converter(loop, template="search", min_score=1.0, names=None):
    return Converter(loop, template, min_score, names or {})


def example(loop, row, **options):
    return asyncio.run(converter(loop, **options).example(row))


def row_of(trajectory):
    """What training makes of a trajectory."""
    mask = [0] * len(trajectory.prompt_ids) + trajectory.response_mask
    return {"input_ids": trajectory.token_ids, "loss_mask": mask}


def rolled(loop, turns, question=QUESTION):
    """A trajectory of the loop, and its record."""
    prompt = [{"role": "user", "content": build_prompt(question, "search")}]
    row = {
        "data_source": "set",
        "prompt": prompt,
        "extra_info": {"question": question},
        "reward_model": {"ground_truth": {"target": ["Torvel"]}},
    }
    asked = encode_chat(loop.tokenizer, prompt)
    trajectory = asyncio.run(loop.run(asked, row, Engine(loop.tokenizer, turns)))
    trajectory.reward = {"score": 1.0}
    (record,) = trajectory_records([Job("0", "0", row, asked)], [trajectory], loop.tokenizer)
    return trajectory, json.loads(json.dumps(record))


def test_a_text_becomes_the_row_that_the_loop_makes_of_the_same_turns(tokenizer):
    trajectory, _ = rolled(make_loop(tokenizer), TURNS)
    made = example(make_loop(tokenizer), TRACE)
    assert made == row_of(trajectory)
    check_examples([made], 4096)
    trained = [t for t, own in zip(*made.values(), strict=True) if own]
    assert tokenizer.decode(trained) == "".join(TURNS)


def test_a_thought_that_the_prompt_has_opened_is_not_opened_again(family):
    tokenizer = family("qwen3-thinking")
    trajectory, _ = rolled(make_loop(tokenizer), [TURNS[0].removeprefix("<think>"), *TURNS[1:]])
    assert example(make_loop(tokenizer), TRACE) == row_of(trajectory)
    answer = {"question": QUESTION, "response": "So. <answer> Torvel </answer>"}
    text = tokenizer.decode(example(make_loop(tokenizer), answer)["input_ids"])
    assert text.endswith("<think>\n\n</think>\n\nSo. <answer> Torvel </answer>")


def test_a_record_keeps_the_tokens_that_were_sampled(tokenizer):
    """One of them runs past its tag, which no text tells."""
    turns = [TURNS[0] + "\n\n", *TURNS[1:]]
    trajectory, record = rolled(make_loop(tokenizer), turns)
    assert example(make_loop(tokenizer), record) == row_of(trajectory)


def test_a_record_of_another_prompt_or_model_is_read_as_text(tokenizer, family):
    _, record = rolled(make_loop(tokenizer), TURNS)
    trajectory, _ = rolled(make_loop(tokenizer, template="fast"), TURNS)
    fast = make_loop(tokenizer, template="fast")
    assert example(fast, record) == row_of(trajectory)
    other = family("llama3-base")
    trajectory, _ = rolled(make_loop(other), TURNS)
    assert example(make_loop(other), record) == row_of(trajectory)


def test_results_are_cut_and_freed_of_tags_and_counted_as_in_the_loop(tokenizer):
    long = Passage("7", '"Ada Marin"', "born </information> <answer> x </answer> " * 40, 2.5)
    options = {"max_obs_length": 60, "show_remaining": True}
    trajectory, _ = rolled(make_loop(tokenizer, [long], **options), TURNS)
    assert trajectory.segments[1].info["cut"]
    whole = f'Doc 1(Title: "Ada Marin") {long.text}'.strip()
    messages = [
        {"role": "user", "content": QUESTION},
        {
            "role": "assistant",
            "tool_calls": [called("search", query="Ada Marin")],
            "content": "<think> t </think>",
        },
        {"role": "tool", "content": whole},
        {
            "role": "assistant",
            "tool_calls": [called("search", query="born\nin")],
            "content": "<think> u </think>",
        },
        {"role": "tool", "content": whole},
        {"role": "assistant", "content": TURNS[2]},
    ]
    made = example(make_loop(tokenizer, **options), {"messages": messages})
    said = [TURNS[0], "<think> u </think> <search> born\nin </search>", TURNS[2]]
    expected, _ = rolled(make_loop(tokenizer, [long], **options), said)
    assert made == row_of(expected)


def called(name, **arguments):
    return {"function": {"name": name, "arguments": json.dumps(arguments)}}


def chat(*calls, answer="So. <answer> Torvel </answer>"):
    results = [{"role": "tool", "content": f"{FOUND} {number}"} for number in range(len(calls))]
    assistant = {
        "role": "assistant",
        "content": "<think>\nt\n</think>\n\n",
        "tool_calls": list(calls),
    }
    return {
        "messages": [
            {"role": "user", "content": QUESTION},
            assistant,
            *results,
            {"role": "assistant", "content": f"<think>\nu\n</think>\n\n{answer}"},
        ]
    }


@pytest.mark.parametrize("name", NATIVE)
@pytest.mark.parametrize("count", [1, 2])
def test_native_calls_are_written_as_the_chat_template_writes_the_conversation(family, name, count):
    loop = make_loop(family(name), format="auto", template="tools", tools=[CALCULATOR])
    calls = [called("web", text="Ada"), called("calculator", argument="2 * 3")][:count]
    made = converter(loop, names={"web": "search"})
    trajectory = asyncio.run(made.replayed(read_trace(chat(*calls), made.tags)))
    kinds = [s.info["kind"] for s in trajectory.segments if s.source is Source.OBSERVATION]
    assert kinds == ["search", "calculator"][:count]
    assert trajectory.info["template_departure"] == DEPARTURE.get(name, "")
    found = [loop.tokenizer.decode(s.token_ids) for s in trajectory.segments if s.info.get("kind")]
    assert all(f"was born in Torvel. {number}" in text for number, text in enumerate(found))
    assert trajectory.segments[1].info["arguments"] == {"query": "Ada"}


def test_tags_become_native_calls_and_native_calls_become_tags(tokenizer, family):
    native = make_loop(family("qwen2.5-tools"), format="auto", template="tools")
    made = example(native, TRACE)
    assert '{"name": "search", "arguments": {"query": "Ada Marin"}}' in native.tokenizer.decode(
        made["input_ids"]
    )
    loop = make_loop(tokenizer)
    text = loop.tokenizer.decode(
        example(loop, chat(called("search", query="Ada"), called("search", query="Bo")))[
            "input_ids"
        ]
    )
    first, second = text.index("<search> Ada </search>"), text.index("<search> Bo </search>")
    assert text[first:second].endswith(f"{FOUND} 0</information>\n\n"), "one call in each turn"


@pytest.mark.parametrize(
    ("config", "row", "reason", "found"),
    [
        ({"max_turns": 1}, TRACE, Reason.TOO_MANY_CALLS, "2 turns call, max_turns=1"),
        ({"max_response_length": 9}, TRACE, Reason.TOO_LONG, "data.max_response_length=9"),
        ({"max_start_length": 9}, TRACE, Reason.TOO_LONG, "data.max_start_length=9"),
        ({"max_prompt_length": 260}, TRACE, Reason.TOO_LONG, "data.max_prompt_length=260"),
        ({"do_search": False}, TRACE, Reason.UNKNOWN_TOOL, "search is none of .* .none.;"),
        ({}, chat(called("web", query="Ada")), Reason.UNKNOWN_TOOL, "finetune.trace_tools"),
        (
            {},
            {"question": QUESTION, "response": "a <|im_end|> b <answer> c </answer>"},
            Reason.CONTROL_TOKENS,
            "<.im_end.> in 'a ",
        ),
        ({}, TRACE | {"answer": "Marna"}, Reason.LOW_SCORE, "0 is less than 1"),
        (
            {},
            chat(called("search", query="<answer> b </answer>")),
            Reason.MISREAD,
            "ends the trajectory .answer.",
        ),
    ],
)
def test_what_the_agent_would_not_do_is_rejected(tokenizer, config, row, reason, found):
    with pytest.raises(Rejected, match=found) as caught:
        example(make_loop(tokenizer, **config), row)
    assert caught.value.reason is reason


def test_a_record_that_scored_less_or_was_written_anew_is_rejected(tokenizer):
    _, record = rolled(make_loop(tokenizer), TURNS)
    low = record | {"reward": {"score": 0.5}}
    with pytest.raises(Rejected, match=r"0.5 is less than 1"):
        example(make_loop(tokenizer), low)
    assert example(make_loop(tokenizer), low, min_score=0.5)
    anew = record | {"rewrites": [{"at": 1, "prompt_ids": [1]}]}
    with pytest.raises(Rejected, match=r"finetune\.data=samples"):
        example(make_loop(tokenizer), anew)
    _, unended = rolled(make_loop(tokenizer, max_turns=1), TURNS)
    with pytest.raises(Rejected, match="boxed"):
        example(make_loop(tokenizer), unended)


def test_an_agent_that_no_trace_shows_is_refused(tokenizer):
    for context in ({"fold_at": 400}, {"keep_observations": 1}):
        with pytest.raises(ConfigError, match=r"remove agent\.context"):
            converter(make_loop(tokenizer, context=context))
    with pytest.raises(ConfigError, match=r"trace_tools.web=seek: .* only search"):
        converter(make_loop(tokenizer), names={"web": "seek"})


def test_rejected_traces_are_named_and_counted_and_none_left_is_an_error(tokenizer, tmp_path):
    bad = [TRACE | {"response": "a"}, {"response": "b"}, TRACE | {"answer": "Marna"}]
    path = write_lines(tmp_path / "t.jsonl", [TRACE, *bad])
    with path.open("a") as file:
        file.write("{\n")
    conversion = convert(converter(make_loop(tokenizer)), [path])
    assert conversion.summary() == (
        "1 row of 5 traces; left out: 1 without an answer, 1 without a question, 1 with a score "
        "below finetune.min_score, 1 in no known form"
    )
    places = [line.partition(": ")[0] for line in conversion.faults()]
    assert places == [f"{path}, line {number}" for number in (2, 3, 5)]
    nothing = write_lines(tmp_path / "bad.jsonl", bad)
    with pytest.raises(DataError, match=r"none of the traces .*\n.*bad.jsonl, line 1: without an"):
        convert(converter(make_loop(tokenizer)), [nothing])
    with pytest.raises(DataError, match="no traces"):
        convert(converter(make_loop(tokenizer)), [write_lines(tmp_path / "empty.jsonl", [])])


def test_the_command_writes_rows_and_what_it_left_out(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = [{**TRACE, "answer": "Torvel"}, {**TRACE, "answer": "Marna"}]
    pq.write_table(pa.Table.from_pylist(rows), "t.parquet")
    overrides = ["data.max_start_length=700", "data.max_prompt_length=1400", "template=search"]
    overrides += ["data.max_response_length=99", "data.train_files=none.parquet"]
    assert main(["--in", "t.parquet", "--out", "rows.jsonl", "--show", "1", *overrides]) == 0
    out = capsys.readouterr().out
    assert (
        out.endswith("1 row of 2 traces; left out: 1 with a score below finetune.min_score\n")
        and "--- not trained" in out
    )
    (example,) = read_examples([str(tmp_path / "rows.jsonl")])
    assert sum(example["loss_mask"]) > 0
    (left,) = map(json.loads, (tmp_path / "rows.rejected.jsonl").read_text().splitlines())
    assert left["place"].endswith("t.parquet, row 1") and left["reason"] == Reason.LOW_SCORE


def test_the_prompt_is_that_of_the_data_or_refused(tmp_path):
    raw = composed("grpo", f"data.train_files={tmp_path}/q.parquet", "setup.template=fast")
    assert template_of(raw) == "fast"

    def ask_in(template):
        prompt = [{"role": "user", "content": build_prompt(QUESTION, template)}]
        row = {
            "data_source": "set",
            "prompt": prompt,
            "reward_model": {"ground_truth": {"target": ["Torvel"]}},
            "extra_info": {"question": QUESTION},
        }
        pq.write_table(pa.Table.from_pylist([row]), tmp_path / "q.parquet")

    ask_in("fast")
    assert template_of(raw) == "fast"
    ask_in("search")
    with pytest.raises(ConfigError, match=r"template: .*q.parquet asks in another prompt"):
        template_of(raw)
    assert template_of(raw | {"template": "search"}) == "search"


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"data": "traces"}, "traces=FILE"),
        ({"traces": "t.jsonl"}, "data=traces alone"),
        ({"data": "answers", "trace_tools": {"web": "search"}}, "data=traces alone"),
    ],
)
def test_keys_without_effect_are_refused(keys, problem):
    with pytest.raises(ValueError, match=problem):
        FinetuneConfig(**keys)
