"""The bench of a training step's costs still runs, at a small size."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts" / "bench"))


def test_agent_workers_are_measured(tmp_path):
    import scale
    import scale_agents

    scale_agents.prepare(tmp_path, vocabulary=1_500, words=2_000)
    figures = scale_agents.in_process(tmp_path, 4, searches=2)
    assert figures["generated tokens"] > 0 and figures["all ms"] > 0
    assert "goal 3,750" in scale.verdicts("agents", figures)[0]
    assert "| tokens |" in scale.table("agents", [1.0], [figures])


def test_growth_is_an_exponent():
    import scale

    assert round(scale.growth([1, 2, 4], [3, 12, 48]), 6) == 2
