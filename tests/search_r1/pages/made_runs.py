"""Run folders as trainings write them, small enough to check by hand."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.responses import PlainTextResponse

from tests.search_r1.pages.made_records import HOSTILE, sample, write

CONFIG = """
actor_rollout_ref:
  model:
    path: data/base
algorithm:
  adv_estimator: grpo
trainer:
  total_training_steps: null
retriever:
  url: {url}
"""

METRICS = """# TYPE retrieval_queue_depth gauge
retrieval_queue_depth 7.0
# TYPE retrieval_request_seconds histogram
retrieval_request_seconds_bucket{{le="+Inf"}} {count}
retrieval_request_seconds_count {count}
retrieval_request_seconds_sum {seconds}
"""


def metrics_app(answers: Iterable[tuple[int, float]]) -> FastAPI:
    """A retrieval server as far as its `/metrics`: number and seconds of all requests so far.

    Seven queries wait. It says one answer after the other, and then none.
    """
    app = FastAPI()
    said = iter(answers)

    @app.get("/metrics")
    def metrics() -> PlainTextResponse:
        answer = next(said, None)
        if answer is None:
            return PlainTextResponse("", status_code=503)
        count, seconds = answer
        return PlainTextResponse(METRICS.format(count=count, seconds=seconds))

    return app


def step_line(step: int, score: float, **more: Any) -> str:
    """The line of a training step of 36 s on two devices: 10 trajectories of 20 tokens."""
    values = {
        "training/global_step": step,
        "critic/score/mean": score,
        "reward/em": score,
        "actor/entropy": 1 / (1 + step),
        "env/number_of_valid_search": 2.0,
        "rollout/model_tokens": 20.0,
        "state_tokens/total": 150,
        "training/num_trajectories": 10.0,
        "training/total_steps": 10.0,
        "perf/total_num_tokens": 720,
        "perf/throughput": 10.0,
        "timing_s/gen": 20.0,
        "timing_s/update_actor": 10.0,
        "timing_s/step": 36.0,
        **more,
    }
    return json.dumps(values) + "\n"


def validation_line(step: int, em: float) -> str:
    """The line of a validation alone."""
    values = {
        "training/global_step": step,
        "val/em/cities": em,
        "val/em/rivers": em,
        "val/test_score/all": em,
    }
    return json.dumps(values) + "\n"


def append(run: Path, *lines: str) -> None:
    """Appends lines to the metrics of a run."""
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(lines)


def make_run(folder: Path, scores: list[float], url: str = "null") -> Path:
    """A run with a validation at its beginning, and a step for each score."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(CONFIG.format(url=url))
    append(folder, validation_line(0, 0.1))
    append(folder, *(step_line(step, score) for step, score in enumerate(scores, 1)))
    return folder


def validate(run: Path, step: int, answers: list[str]) -> None:
    """Writes the trajectories of a validation, a question for each answer, of which Paris is
    right."""
    records = [sample(f"Question {n}?", a, uid=f"{n}") for n, a in enumerate(answers)]
    write(run / "trajectories" / f"val_{step:06d}.jsonl", records)


def raise_alarms(run: Path) -> None:
    """Lets the folder tell of a collapse, a roll-back and two restarts, one of them hostile."""
    alarm = run / "alarms" / "step_3"
    alarm.mkdir(parents=True)
    (alarm / "alarm.txt").write_text("collapse at step 3: actor/entropy moved first, at step 2\n")
    (run / "roll_backs.json").write_text('[{"alarm": 3, "to": 1, "lr_factor": 0.5}]')
    restart = {"time": "2026-01-01T00:00:00+00:00", "signal": "SIGKILL", "step": 2}
    (run / "restarts.jsonl").write_text(json.dumps(restart) + "\n" + HOSTILE + "\n")
