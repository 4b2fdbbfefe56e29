"""Writes metrics and trajectories: to files always, to the console and services if configured."""

import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from verl.utils.mailbox import Mailbox, close_all, opened
from verl.utils.run_folder import PENDING, write_atomically
from verl.utils.trackers import SERVICES, STEP, TrackedRun, Tracker
from verl.utils.webhook import Webhook

logger = logging.getLogger(__name__)


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
    """Writes metrics and trajectories of one run to its folder, and hands them to the services."""

    def __init__(
        self,
        run_dir: str,
        loggers: Sequence[str],
        project: str,
        experiment: str,
        config: dict[str, Any],
        panels: dict[str, str],
        resume_ids: Mapping[str, str] | None = None,
        step: int = 0,
        webhook: Webhook | None = None,
    ) -> None:
        """`resume_ids`: each service's name of the run that is resumed after `step`."""
        self.run_dir = Path(run_dir)
        self.panels = panels
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self.unwritten = ""
        self.console = "console" in loggers
        self.experiment = experiment
        self.webhook = webhook
        self.latest: dict[str, float | None] = {}
        """The newest value of every metric."""
        self.resume_ids = dict(resume_ids or {})
        self.mailboxes: dict[str, Mailbox] = {}
        for name in loggers:
            if name in SERVICES:
                resume_id = self.resume_ids.get(name)
                run = TrackedRun(self.run_dir, project, experiment, config, resume_id, step)
                if (mailbox := opened(name, run)) is not None:
                    self.mailboxes[name] = mailbox

    @property
    def ids(self) -> dict[str, str]:
        """Each service's name of the run."""
        present = {name: mailbox.tracker.id for name, mailbox in self.mailboxes.items()}
        return self.resume_ids | present

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Appends one line to metrics.jsonl and sends the metrics on.

        Numbers that are not finite become null in the file. If a line cannot be written (a full
        disk), that is logged, and the line is written together with the next one.
        """
        again = {panel: metrics[key] for panel, key in self.panels.items() if key in metrics}
        metrics = {**metrics, **again}
        finite = {name: x if math.isfinite(x) else None for name, x in metrics.items()}
        line = {STEP: step, **finite}
        self.latest |= finite
        self.unwritten += json.dumps(line) + "\n"
        self._write()
        self._tell_services(Tracker.log, metrics, step)

    def _tell_services(self, method: Callable[..., None], *args: Any) -> None:
        """Has `method` of every service's tracker called later."""
        for mailbox in self.mailboxes.values():
            mailbox.post(method, *args)

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
        """Writes trajectories/<name>_<step>.jsonl, and hands on the first `samples`."""
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
        """Hands trajectories to the services."""
        self._tell_services(Tracker.log_trajectories, name, records, step)

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

    def alert(self, title: str, text: str, by_webhook: bool = True) -> None:
        """Tells whoever follows the run, by the services and the webhook."""
        self._tell_services(Tracker.alert, title, text)
        if by_webhook and self.webhook is not None:
            self.webhook.tell(self.experiment, title, text)

    def finish(self, has_failed: bool = False) -> None:
        """Tries again to write lines that could not be written, and ends the services' runs."""
        if self.unwritten:
            self._write()
        close_all(list(self.mailboxes.values()), has_failed)


def json_line(record: dict[str, Any]) -> str:
    """A record as one line of JSON, without spaces: half of a record are lists of small numbers."""
    return json.dumps(record, ensure_ascii=False, separators=(",", ":")) + "\n"


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
