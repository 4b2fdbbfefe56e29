"""Writes metrics and trajectories: to files always, to the console and wandb if configured."""

import json
import logging
import math
import netrc
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from verl.utils.run_folder import PENDING, write_atomically

logger = logging.getLogger(__name__)
STEP = "training/global_step"


class Savable(Protocol):
    """A batch that can be saved, such as a DataProto."""

    def save(self, path: Path) -> None: ...


class Timers:
    """Measures the seconds spent under each name since the last `pop`."""

    def __init__(self, on_start: Callable[[str], None] = lambda name: None) -> None:
        self.seconds: dict[str, float] = {}
        self.on_start = on_start

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self.on_start(name)
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def pop(self) -> dict[str, float]:
        """Returns `timing_s/<name>` for all names, and starts from 0 again."""
        seconds = self.seconds
        self.seconds = {}
        return {f"timing_s/{name}": value for name, value in seconds.items()}


class Tracking:
    """Writes metrics and trajectories of one run to its folder and to the chosen loggers."""

    def __init__(
        self,
        run_dir: str,
        loggers: Sequence[str],
        project: str,
        experiment: str,
        config: dict[str, Any],
        panels: dict[str, str],
        resume_id: str | None = None,
    ) -> None:
        self.run_dir = Path(run_dir)
        self.panels = panels
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self.unwritten = ""
        self.console = "console" in loggers
        self.wandb: Any = (
            _start_wandb(run_dir, project, experiment, config, resume_id)
            if "wandb" in loggers
            else None
        )

    @property
    def wandb_id(self) -> str | None:
        return self.wandb.id if self.wandb else None

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Appends one line to metrics.jsonl and sends the metrics on.

        Numbers that are not finite become null in the file. If a line cannot be written (a full
        disk), that is logged, and the line is written together with the next one.
        """
        again = {panel: metrics[key] for panel, key in self.panels.items() if key in metrics}
        metrics = {**metrics, **again}
        finite = {name: x if math.isfinite(x) else None for name, x in metrics.items()}
        line = {STEP: step, **finite}
        self.unwritten += json.dumps(line) + "\n"
        self._write()
        if self.wandb:
            self.wandb.log({STEP: step, **metrics})

    def _write(self) -> None:
        path = self.run_dir / "metrics.jsonl"
        size = path.stat().st_size if path.exists() else 0
        try:
            with path.open("a") as file:
                file.write(self.unwritten)
            self.unwritten = ""
        except OSError as error:
            if path.exists():
                os.truncate(path, size)
            logger.warning("%s: %s; kept in memory until it can be written", path, error)

    def message(self, text: str) -> None:
        """Writes a line to the console, if that is one of the loggers."""
        if self.console:
            logger.info(text)

    def log_trajectories(
        self, name: str, records: Sequence[dict[str, Any]], step: int, samples: int = 8
    ) -> Path:
        """Writes trajectories/<name>_<step>.jsonl, and the first `samples` as a wandb table."""
        path = self.write_trajectories(name, records, step)
        self.show_trajectories(name, records[:samples], step)
        return path

    def write_trajectories(self, name: str, records: Sequence[dict[str, Any]], step: int) -> Path:
        """Writes trajectories/<name>_<step>.jsonl whole, in place of one that is there."""
        path = self.run_dir / "trajectories" / f"{name}_{step:06d}.jsonl"
        pending = path.with_name(path.name + PENDING)
        try:
            path.parent.mkdir(exist_ok=True)
            with pending.open("w", encoding="utf-8") as file:
                file.writelines(json_line(record) for record in records)
            os.replace(pending, path)
        except OSError as error:
            pending.unlink(missing_ok=True)
            logger.warning("%s: %s; these trajectories are not written", path, error)
        return path

    def show_trajectories(self, name: str, records: Sequence[dict[str, Any]], step: int) -> None:
        """Sends trajectories to wandb as a table, if that is one of the loggers."""
        if self.wandb:
            import wandb

            rows: list[Any] = [_table_row(record) for record in records]
            table = wandb.Table(columns=["data_source", "prompt", "response", "score"], data=rows)
            self.wandb.log({STEP: step, f"{name}/trajectories": table})

    def keep(self, batch: Savable, name: str) -> str:
        """Writes a batch to the file `name` of the run folder.

        Returns a text for a message: the path, or why the batch could not be written.
        """
        path = self.run_dir / name
        try:
            path.parent.mkdir(exist_ok=True)
            batch.save(path)
        except (OSError, RuntimeError) as error:  # torch raises RuntimeError on a full disk
            return f"could not be written: {error}"
        return f"is in {path}"

    def finish(self) -> None:
        """Tries again to write lines that could not be written, and ends the wandb run."""
        if self.unwritten:
            self._write()
        if self.wandb:
            self.wandb.finish()


def json_line(record: dict[str, Any]) -> str:
    """A record as one line of JSON, without spaces: half of a record are lists of small numbers."""
    return json.dumps(record, ensure_ascii=False, separators=(",", ":")) + "\n"


def _table_row(record: dict[str, Any]) -> list[Any]:
    """A trajectory as a row of the wandb table: data source, prompt, response, score."""
    response = "".join(segment["text"] for segment in record["segments"])
    return [record["data_source"], record["prompt"], response, record["reward"]["score"]]


def _start_wandb(
    run_dir: str, project: str, name: str, config: dict[str, Any], resume_id: str | None
) -> Any:
    import wandb

    mode = os.environ.get("WANDB_MODE") or ("online" if _has_wandb_key() else "offline")
    run = wandb.init(
        project=project,
        name=name,
        config=config,
        dir=run_dir,
        id=resume_id,
        resume="allow",
        mode=mode,  # pyright: ignore[reportArgumentType]
        settings=wandb.Settings(silent=True, console="off"),
    )
    run.define_metric(STEP)
    run.define_metric("*", step_metric=STEP)
    return run


def _has_wandb_key() -> bool:
    """Whether `wandb login` was run here, or a key is in the environment."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return any("wandb" in host for host in netrc.netrc().hosts)
    except FileNotFoundError:
        return False


def truncate_metrics(run_dir: str, step: int, moved_to: Path | None = None) -> None:
    """Drops the lines of metrics.jsonl after `step`, which a resumed run will write again.

    With `moved_to` they are moved to that file. An incomplete last line is dropped as well.
    """
    path = Path(run_dir) / "metrics.jsonl"
    if not path.exists():
        return
    lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    later = [line for line in lines if json.loads(line)[STEP] > step]
    if moved_to is not None:
        try:
            moved_to.write_text("".join(later))
        except OSError as error:
            logger.warning("%s: %s; these metrics are dropped", moved_to, error)
    write_atomically(path, "".join(line for line in lines if line not in later))
