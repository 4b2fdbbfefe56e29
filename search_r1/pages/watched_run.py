"""A run as the watch page shows it, followed by its folder.

What changed since the last look becomes messages for the page:

    rows          {"from", "rows"}      these take the place of all rows from that step on
    status        {...}                 state, progress, cost, alarms, lines that cannot be read
    trajectories  {"records"}           the newest ones
    retriever     {"says", "samples"}   what the retrieval servers have to do; samples are added
"""

import json
from collections import deque
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from search_r1.pages.cost import Prices, cost_of, seconds_per_step
from search_r1.pages.metrics_file import MetricsFile, newest, trained
from search_r1.pages.records import excerpt_of, read_entries, shown
from search_r1.pages.retriever_state import RetrieverState
from verl.utils.errors import DataError
from verl.utils.run_folder import ENDED, LOCK, RESTARTS, ROLL_BACKS, in_use

Message = dict[str, Any]
CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
TRAJECTORY_FILES = 2
TRAJECTORIES_OF_A_FILE = 5
MOST_SAMPLES = 900
"""Looks at the retriever that are kept for whoever opens the page later."""
MOST_ALARMS = 20
"""Alarms of one kind that are listed, the newest."""
STOPPED = (130, 143)
"""Exit statuses after SIGINT and SIGTERM."""


class WatchedRun:
    """A run folder that is looked at again and again."""

    def __init__(self, folder: Path, name: str, number: int, prices: Prices) -> None:
        """`name` and `number` are those on the page.

        Raises DataError where `folder` is no run folder.
        """
        if not any((folder / file).exists() for file in (CONFIG, METRICS, LOCK)):
            raise DataError(
                f"{folder}: no run folder; one has {METRICS} and {CONFIG} (runs/NAME, or "
                "trainer.default_local_dir of the run)"
            )
        self.folder = folder
        self.name = name
        self.number = number
        self.prices = prices
        self.metrics = MetricsFile(folder / METRICS)
        self.records: list[dict[str, Any]] = []
        self.samples: deque[list[float]] = deque(maxlen=MOST_SAMPLES)
        self.retriever: RetrieverState | None = None
        self._says = ""
        self._config: dict[str, Any] = {}
        self._config_time = 0
        self._files: list[tuple[str, int]] = []
        self._progress = self._progress_of_rows()
        self.status: dict[str, Any] = {
            **self._progress,
            "name": name,
            "folder": str(folder),
            "state": "lost",
            "total": None,
            "eta_s": None,
            "model": None,
            "algorithm": None,
            "alarms": [],
            "problems": [],
        }

    def poll(self) -> list[Message]:
        """Looks at the folder, and returns what has changed."""
        changed = self.metrics.poll()
        self._read_config()
        messages = []
        if changed is not None:
            self._progress = self._progress_of_rows()
            messages.append(self._rows(changed))
        status = self._status()
        if status != self.status:
            self.status = status
            messages.append(self._message("status", **status))
        if self._read_trajectories():
            messages.append(self._message("trajectories", records=self.records))
        return [*messages, *self._ask_retriever()]

    def unreadable(self, error: Exception) -> list[Message]:
        """Tells that the folder could not be read this time, and why."""
        reason = f"the folder cannot be read: {type(error).__name__}: {error}"
        status = {**self.status, "problems": [reason]}
        if status == self.status:
            return []
        self.status = status
        return [self._message("status", **status)]

    def snapshot(self) -> list[Message]:
        """All that is known, for a page that was just opened."""
        known = [
            self._rows(-1),
            self._message("status", **self.status),
            self._message("trajectories", records=self.records),
        ]
        if self._says:
            samples = list(self.samples)
            retriever = self._message("retriever", says=self._says, samples=samples, anew=True)
            known.append(retriever)
        return known

    def _message(self, kind: str, **content: Any) -> Message:
        return {"kind": kind, "run": self.number, **content}

    def _rows(self, start: int) -> Message:
        """The message with all rows from step `start` on."""
        rows = [{"step": step, **row} for step, row in self.metrics.rows.items() if step >= start]
        return self._message("rows", **{"from": start}, rows=rows)

    def _status(self) -> dict[str, Any]:
        """State, progress, cost and alarms of the run."""
        progress = self._progress
        step, seconds = progress["step"], progress["seconds_per_step"]
        total = progress["total"] or self._setting("trainer", "total_training_steps")
        if not isinstance(total, int | float):
            total = None
        state = state_of(self.folder, step, total)
        is_known = state == "running" and seconds and total
        return {
            **progress,
            "name": self.name,
            "folder": str(self.folder),
            "state": state,
            "total": total,
            "eta_s": seconds * max(0, total - step) if is_known else None,
            "model": self._setting("actor_rollout_ref", "model", "path"),
            "algorithm": self._setting("algorithm", "adv_estimator"),
            "alarms": alarms_of(self.folder),
            "problems": self._problems(),
        }

    def _progress_of_rows(self) -> dict[str, Any]:
        """How far the run is and what it has cost, as far as the rows tell."""
        rows = self.metrics.rows
        steps = trained(rows)
        return {
            "step": next(reversed(rows), 0),
            "total": newest(rows, "training/total_steps"),
            "seconds_per_step": seconds_per_step(steps),
            "cost": cost_of(steps, self.prices),
        }

    def _problems(self) -> list[str]:
        """What of the folder cannot be read, and why."""
        file = self.metrics
        lines = [*file.problems, *([file.unfinished] if file.unfinished else [])]
        texts = [f"{METRICS}, line {p.line}: {p.reason}: {p.excerpt}" for p in lines]
        more = file.num_problems - len(file.problems)
        if more:
            texts.append(f"{METRICS}: {more} lines more that cannot be read")
        if "problem" in self._config:
            texts.append(self._config["problem"])
        return texts

    def _read_config(self) -> None:
        """Reads the configuration if it has changed."""
        path = self.folder / CONFIG
        changed = changed_at(path)
        if changed == self._config_time:
            return
        try:
            config = yaml.safe_load(path.read_text(encoding="utf-8"))
            if not isinstance(config, dict):
                raise ValueError("it has no sections")
        except FileNotFoundError:
            return
        except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
            config = {"problem": f"{CONFIG}: cannot be read: {error}"}
        self._config = config
        self._config_time = changed
        if self.retriever is not None:
            self.retriever.close()
        urls = retriever_urls(self._setting("retriever", "url"))
        self.retriever = RetrieverState(urls) if urls else None

    def _setting(self, *path: str) -> Any:
        """A value of the configuration; None where it has none."""
        value: Any = self._config
        for name in path:
            value = value.get(name) if isinstance(value, dict) else None
        if isinstance(value, list):
            return [str(item) for item in value]
        return value if isinstance(value, str | int | float) else None

    def _read_trajectories(self) -> bool:
        """Reads the newest trajectories if there are newer ones, and returns whether there are."""
        found = newest_files(self.folder / "trajectories")
        files = [(path.name, changed) for path, changed in found]
        if files == self._files:
            return False
        self._files = files
        self.records = [record for path, _ in found for record in first_records(path)]
        return True

    def _ask_retriever(self) -> list[Message]:
        """Asks the retrieval servers of a run that goes on."""
        if self.retriever is None or self.status["state"] != "running":
            return []
        found = self.retriever.poll()
        samples = [] if found["sample"] is None else [found["sample"]]
        if not samples and found["says"] == self._says:
            return []
        self._says = found["says"]
        self.samples.extend(samples)
        return [self._message("retriever", says=self._says, samples=samples, anew=False)]


def state_of(folder: Path, step: int, total: float | None) -> str:
    """`running`, `finished`, `stopped`, `failed`, or `lost` where nothing says how it ended.

    A run that goes on holds the lock of its folder; its supervisor writes how it ended.
    """
    if in_use(folder):
        return "running"
    try:
        status = json.loads((folder / ENDED).read_text(encoding="utf-8"))["status"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return "finished" if total is not None and step >= total else "lost"
    if status == 0:
        return "finished"
    return "stopped" if status in STOPPED else "failed"


def alarms_of(folder: Path) -> list[dict[str, str]]:
    """What went wrong in the run, as far as its folder tells: `kind` and `text` of each."""
    roll_backs = enumerate(roll_backs_of(folder / ROLL_BACKS), 1)
    texts = {
        "collapse": [
            text_of(path) for path in sorted(folder.glob("alarms/*/alarm.txt"), key=changed_at)
        ],
        "roll-back": [f"{number}: {roll_back_text(entry)}" for number, entry in roll_backs],
        "restart": [restart_text(line) for line in lines_of(folder / RESTARTS)],
        "not finite": [
            f"a batch was kept: {path.name}" for path in sorted(folder.glob("nonfinite/*.pt"))
        ],
        "hang": [f"stacks were kept: {path.name}" for path in sorted(folder.glob("stacks/*"))],
    }
    return [{"kind": kind, "text": text} for kind in texts for text in newest_of(texts[kind])]


def newest_of(texts: Sequence[str]) -> list[str]:
    """The last MOST_ALARMS texts, behind a line that says how many there are more."""
    more = len(texts) - MOST_ALARMS
    return [*([f"{more} more, before these"] if more > 0 else []), *texts[-MOST_ALARMS:]]


def roll_backs_of(path: Path) -> Sequence[object]:
    """The entries of `roll_backs.json`; its text where it is none."""
    text = text_of(path)
    if not text:
        return []
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError):
        return [text]
    return entries if isinstance(entries, list) else [entries]


def roll_back_text(entry: object) -> str:
    """A roll-back in words; what is none is shown as it is."""
    if not isinstance(entry, dict) or not {"alarm", "to"} <= entry.keys():
        return f"not a roll-back: {excerpt_of(entry)}"
    return f"from the alarm of step {entry['alarm']} to step {entry['to']}"


def restart_text(line: str) -> str:
    """A line of `restarts.jsonl` in words; what is none is shown as it is."""
    try:
        entry = json.loads(line)
        how = entry["signal"] if "signal" in entry else f"status {entry['status']}"
        return f"{entry['time']}: ended by {how}, went on after step {entry['step']}"
    except (ValueError, KeyError, TypeError, RecursionError):
        return f"not a restart: {excerpt_of(line)}"


def text_of(path: Path) -> str:
    """The text of a small file; empty where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def lines_of(path: Path) -> list[str]:
    """The lines of a small file."""
    return text_of(path).splitlines()


def changed_at(path: Path) -> int:
    """When a file changed last, in ns; 0 if it is gone."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def newest_files(folder: Path) -> list[tuple[Path, int]]:
    """The files of trajectories that were written last, and when, the newest first."""
    files = [(path, changed_at(path)) for path in folder.glob("*.jsonl")]
    return sorted(files, key=lambda file: file[1], reverse=True)[:TRAJECTORY_FILES]


def first_records(path: Path) -> list[dict[str, Any]]:
    """The first trajectories of a file, as a page shows them."""
    try:
        entries = list(islice(read_entries(path), TRAJECTORIES_OF_A_FILE))
    except (DataError, OSError):  # it was replaced in between, and will be read again
        return []
    return [{"name": entry.name, "content": shown(entry)[1]} for entry in entries]


def retriever_urls(setting: object) -> list[str]:
    """The addresses that `retriever.url` names."""
    urls = setting if isinstance(setting, list) else [setting]
    return [url for url in urls if isinstance(url, str) and url.startswith(("http://", "https://"))]


def unique_names(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of these paths that tell them apart.

    >>> unique_names([Path("/a/runs/x"), Path("/b/runs/x"), Path("/b/runs/y")])
    ['a/runs/x', 'b/runs/x', 'y']
    """
    parts = [folder.resolve().parts for folder in folders]

    def name_of(own: tuple[str, ...]) -> str:
        for length in range(1, len(own) + 1):
            end = own[-length:]
            if sum(other[-length:] == end for other in parts) == 1:
                return "/".join(end)
        return "/".join(own)

    return [name_of(own) for own in parts]
