"""Rolling out held-out questions with the engines alone: no training worker is started.

The same agent loop, reward and engines as in training. Finished questions are written as they come, so that an
interrupted evaluation goes on where it was.
"""

import json
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from verl.agent import Trajectory
from verl.trainer.config import PPOConfig
from verl.trainer.ppo.batching import check_failures
from verl.trainer.ppo.records import trajectory_records
from verl.trainer.ppo.rollout import RolloutManager
from verl.utils.dataset import RLHFDataset
from verl.utils.errors import DataError

logger = logging.getLogger(__name__)
CHUNK = 256
"""Trajectories submitted at a time; two chunks are under way, so that the engine is not idle at the end of one."""


def evaluate(config: PPOConfig, val_set: RLHFDataset, rollout: RolloutManager, tokenizer: Any, path: Path) -> None:
    """Appends the records of the questions that `path` lacks, `val_kwargs.n` per question, under their `row`.

    A trajectory that the environment broke twice is not written: the next call asks its question again. Raises
    RolloutFailed when more than `trainer.max_failed_share` of a chunk failed.
    """
    sampling = config.actor_rollout_ref.rollout.val_kwargs
    done, scores = finished(path, sampling.n, len(val_set))
    todo = [row for row in range(len(val_set)) if row not in done]
    with path.open("a", encoding="utf-8") as file, tqdm(total=len(val_set), initial=len(done), unit="questions") as bar:
        for rows, (jobs, results) in run_chunks(todo, max(1, CHUNK // sampling.n), val_set, rollout, config):
            check_failures(results, config.trainer.max_failed_share)
            failed = {job.uid for job, r in zip(jobs, results, strict=True) if not isinstance(r, Trajectory)}
            kept = [(job, r) for job, r in zip(jobs, results, strict=True) if job.uid not in failed]
            numbers = {job.uid: rows[i // sampling.n] for i, job in enumerate(jobs)}
            for _, trajectory in kept:
                trajectory.reward = trajectory.reward or {"score": 0.0}
            records = trajectory_records([job for job, _ in kept], [t for _, t in kept], tokenizer)
            for record in records:
                file.write(json.dumps({"row": numbers[record["uid"]], **record}) + "\n")
                scores.append(record["reward"]["score"])
            file.flush()
            bar.set_postfix(score=f"{sum(scores) / max(1, len(scores)):.3f}", refresh=False)
            bar.update(len(rows) - len(failed))
            if failed:
                logger.warning("%d questions failed and were left out; run again to ask them once more", len(failed))


def run_chunks(
    todo: Sequence[int], size: int, val_set: RLHFDataset, rollout: RolloutManager, config: PPOConfig
) -> Iterator[tuple[list[int], Any]]:
    """(rows, jobs and results) of each chunk, the next one already submitted."""
    chunks = [list(todo[i : i + size]) for i in range(0, len(todo), size)]
    sampling, seed = config.actor_rollout_ref.rollout.val_kwargs, config.trainer.seed
    running: list[tuple[list[int], Any]] = []
    for number, rows in enumerate(chunks):
        prompts = [val_set.prompt_ids[row] for row in rows]
        running.append((rows, rollout.submit([val_set.rows[row] for row in rows], prompts, sampling, seed + number)))
        if len(running) == 2:
            first, submitted = running.pop(0)
            yield first, rollout.collect(submitted)
    for rows, submitted in running:
        yield rows, rollout.collect(submitted)


def finished(path: Path, samples: int, count: int) -> tuple[set[int], list[float]]:
    """Rows that `path` has all samples of, and their scores; what a kill cut off is removed from the file.

    Raises DataError when the file belongs to another evaluation.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        return set(), []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # the last one is empty, or was cut off
    records = [json.loads(line) for line in lines]
    counts = Counter(record["row"] for record in records)
    if any(n > samples or row >= count for row, n in counts.items()):
        raise DataError(f"{path}: of another evaluation (other questions or samples); name another folder")
    whole = [i for i, record in enumerate(records) if counts[record["row"]] == samples]
    path.write_text("".join(lines[i] + "\n" for i in whole), encoding="utf-8")
    return {records[i]["row"] for i in whole}, [records[i]["reward"]["score"] for i in whole]
