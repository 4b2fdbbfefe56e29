"""Evaluation: held-out questions are rolled out by the engines, without training workers.

Agent loop, reward and engines are the same as in training. Each question is written as soon as it
is finished, so an interrupted evaluation can be continued.
"""

import json
import logging
from collections import Counter
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from verl.agent import Trajectory
from verl.rollout.agent_worker import Failure, Job
from verl.rollout.job import Rollout, Submitted
from verl.rollout.records import trajectory_records
from verl.trainer.config import PPOConfig
from verl.trainer.ppo.failures import check_failures
from verl.utils.dataset import RLHFDataset
from verl.utils.images import digests_of
from verl.utils.model_names import weights_of
from verl.utils.run_folder import claim

logger = logging.getLogger(__name__)
MIN_RESULTS = 20
"""The fewest trajectories from which a share of failures is computed."""


def evaluate(
    config: PPOConfig,
    val_set: RLHFDataset,
    rollout: Rollout,
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
) -> None:
    """Rolls out the questions that the file `path` lacks, and appends their records.

    There are `val_kwargs.n` records per question, each with its `row`. A question with a failed
    trajectory is not written, so the next call asks it again. Raises RolloutFailed when more than
    `trainer.max_failed_share` of the trajectories failed; what has finished is kept.
    """
    done, scores = finished(path, config.actor_rollout_ref.rollout.val_kwargs.n)
    todo = [row for row in range(len(val_set)) if row not in done]
    recent: list[Trajectory | Failure] = []
    failed = 0
    with (
        path.open("a", encoding="utf-8") as file,
        tqdm(total=len(val_set), initial=len(done), unit="questions") as bar,
    ):
        for row, jobs, results in stream(todo, val_set, rollout, config):
            recent = (recent + results)[-max(MIN_RESULTS, rollout.capacity) :]
            trajectories = [r for r in results if isinstance(r, Trajectory)]
            if len(trajectories) == len(results):
                records = trajectory_records(
                    jobs,
                    scored(trajectories),
                    tokenizer,
                    with_token_ends=config.trainer.trajectory_records.tokens,
                )
                scores += write(file, row, records)
                bar.set_postfix(score=f"{sum(scores) / max(1, len(scores)):.3f}", refresh=False)
                bar.update()
            else:
                failed += 1
            if len(recent) >= MIN_RESULTS:
                check_failures(recent, config.trainer.max_failed_share)
        if recent:
            check_failures(recent, config.trainer.max_failed_share)
    if failed:
        logger.warning(
            "%d questions failed and were left out; run again to ask them once more", failed
        )


def scored(trajectories: list[Trajectory]) -> list[Trajectory]:
    """Gives trajectories without a token of the policy the score 0, and returns all of them."""
    for trajectory in trajectories:
        trajectory.reward = trajectory.reward or {"score": 0.0}
    return trajectories


def write(file: TextIO, row: int, records: list[dict[str, Any]]) -> list[float]:
    """Appends the records of a question, and returns their scores."""
    for record in records:
        file.write(json.dumps({"row": row, **record}) + "\n")
    file.flush()
    return [record["reward"]["score"] for record in records]


def stream(
    todo: list[int], val_set: RLHFDataset, rollout: Rollout, config: PPOConfig
) -> Iterator[tuple[int, list[Job], list[Trajectory | Failure]]]:
    """Yields row, jobs and results of each question as it finishes.

    `rollout.capacity` trajectories are always under way.
    """
    sampling = config.actor_rollout_ref.rollout.val_kwargs
    seed = config.trainer.seed
    rows: list[int] = []
    pending: list[Submitted] = []
    waiting = iter(todo)
    while True:
        while (
            len(pending) * sampling.n < rollout.capacity
            and (row := next(waiting, None)) is not None
        ):
            rows.append(row)
            pending.append(
                rollout.submit([val_set.rows[row]], [val_set.prompt_ids[row]], sampling, seed + row)
            )
        if not pending:
            return
        place = rollout.first_done(pending)
        yield rows.pop(place), *rollout.collect(pending.pop(place))


def identify(config: PPOConfig, val_set: RLHFDataset, path: Path) -> None:
    """Writes to `path` which model is evaluated, and on which questions.

    Raises DataError when the file is that of another evaluation.
    """
    questions = [
        [row["data_source"], row["prompt"], row["reward_model"], *digests_of(row)]
        for row in val_set.rows
    ]
    rollout = config.actor_rollout_ref.rollout
    model = config.actor_rollout_ref.model
    reward = config.reward
    made_of = {
        "model": model.path,
        "weights": weights_of(model.path),
        "tokenizer": model.tokenizer_path,
        "architecture": model.architecture,
        "sampling": rollout.val_kwargs.model_dump(),
        "agent": {k: v for k, v in config.agent.items() if k != "retriever"},
        "topk": config.agent.get("retriever", {}).get("topk"),
        "reward": {k: v for k, v in reward.items() if k != "judge_endpoint"},
        "judge": reward.get("judge_endpoint", {}).get("model"),
        "custom_reward_function": config.custom_reward_function.model_dump(),
        "questions": sha256(json.dumps(questions, default=str).encode()).hexdigest(),
    }
    claim(path, made_of, "evaluation")


def finished(path: Path, samples: int) -> tuple[set[int], list[float]]:
    """Returns the rows of which `path` has all samples, and their scores.

    Incomplete questions, which an interrupted evaluation leaves, are removed from the file.
    """
    if not path.exists():
        return set(), []
    # the last line is empty, or was cut off
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    records = [json.loads(line) for line in lines]
    counts = Counter(record["row"] for record in records)
    whole = [i for i, record in enumerate(records) if counts[record["row"]] == samples]
    path.write_text("".join(lines[i] + "\n" for i in whole), encoding="utf-8")
    return {records[i]["row"] for i in whole}, [records[i]["reward"]["score"] for i in whole]
