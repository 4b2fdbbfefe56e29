"""Rollouts of published checkpoints become rows; their published scores say which are right."""

import asyncio
import json
from pathlib import Path

import pytest

from search_r1.traces.convert import Converter, converted
from search_r1.traces.read import read_files
from search_r1.traces.trace import Reason
from tests.search_r1.agent.scripted import make_loop

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT.parent / "shared/data/searchr1_trajectories"
ENOUGH = {"max_obs_length": 9000, "max_prompt_length": 36000, "max_response_length": 4000}
"""Limits that hold the passages in the tokens of a tiny vocabulary."""


@pytest.mark.skipif(not FOLDER.is_dir(), reason="the published rollouts are not here")
@pytest.mark.parametrize("name", ["bamboogle_qwen2.5-3b-instruct-grpo", "nq_qwen2.5-3b-base-grpo"])
def test_real_rollouts_are_read_and_scored_as_published(tokenizer, name):
    path = FOLDER / name / "intermediate_data.json"
    published = json.loads(path.read_text())[:200]
    rows = read_files([path])[:200]
    conversion = asyncio.run(
        converted(Converter(make_loop(tokenizer, **ENOUGH), "search", 1.0, {}), rows)
    )
    faulty = {place for place, e in conversion.rejected if e.reason is not Reason.LOW_SCORE}
    assert len(faulty) <= 3
    right = [
        row["output"]["final_response"]
        for row, (place, _) in zip(published, rows, strict=True)
        if row["output"]["metric_score"]["em"] == 1 and place not in faulty
    ]
    assert len(conversion.examples) == len(right) > 40
    for example, response in zip(conversion.examples, right, strict=True):
        trained = zip(*example.values(), strict=True)
        own = tokenizer.decode([token for token, is_own in trained if is_own])
        assert "<information>" not in own and "Doc 1" not in own
        assert own.count("<search>") == response.count("<search>")
        whole = tokenizer.decode(example["input_ids"])
        assert whole.endswith(response.strip())
