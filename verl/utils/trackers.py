"""Services that show the curves of a run, each through its own client.

A client is imported when its service is asked for. Where a service keeps its data, and by which
account, is said as its own documentation says it, by its environment variables; without an account
everything stays on this machine, under the run folder where the client lets us choose.
"""

import importlib.util
import json
import netrc
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

Record = dict[str, Any]
STEP = "training/global_step"


@dataclass(frozen=True)
class TrackedRun:
    """What a service is told of a run when it starts."""

    folder: Path
    project: str
    name: str
    config: dict[str, Any]
    resume_id: str | None = None
    """The service's name of the run to go on with; None: another run."""
    step: int = 0
    """The step after which the run goes on."""


class Tracker(Protocol):
    """A service that shows the curves of one run."""

    id: str
    """The service's name of the run, by which a later start goes on with it."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Adds a point to every curve."""

    def log_trajectories(self, name: str, records: Sequence[Record], step: int) -> None:
        """Shows trajectories; `name` is `train` or `val`."""

    def alert(self, title: str, text: str) -> None:
        """Tells whoever follows the run."""

    def finish(self, has_failed: bool) -> None:
        """Sends what is left, and ends the run, as failed where the service can show that."""


class Wandb:
    """Weights & Biases. Without a key it stays offline, in the run folder."""

    def __init__(self, run: TrackedRun) -> None:
        import wandb

        self.client = wandb
        mode = os.environ.get("WANDB_MODE") or ("online" if _has_wandb_key() else "offline")
        self.run: Any = wandb.init(
            project=run.project,
            name=run.name,
            config=run.config,
            dir=str(run.folder),
            id=run.resume_id,
            resume="allow",
            mode=mode,  # pyright: ignore[reportArgumentType]
            settings=wandb.Settings(silent=True, console="off"),
        )
        self.run.define_metric(STEP)
        self.run.define_metric("*", step_metric=STEP)
        self.id = str(self.run.id)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self.run.log({STEP: step, **metrics})

    def log_trajectories(self, name: str, records: Sequence[Record], step: int) -> None:
        rows = [table_row(record, step) for record in records]
        columns: list[Any] = list(rows[0]) if rows else []
        table = self.client.Table(columns=columns, data=[list(row.values()) for row in rows])
        self.run.log({STEP: step, f"{name}/trajectories": table})

    def alert(self, title: str, text: str) -> None:
        self.run.alert(title=title, text=text, level="WARN")

    def finish(self, has_failed: bool) -> None:
        self.run.finish(exit_code=int(has_failed))


class TensorBoard:
    """TensorBoard, in `tensorboard` under the run folder."""

    def __init__(self, run: TrackedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = run.folder / "tensorboard"
        # points behind the step that a run goes on from are written again
        purge_step = run.step + 1 if run.resume_id else 0
        self.writer = SummaryWriter(str(folder), purge_step=purge_step)
        self.id = str(folder)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def log_trajectories(self, name: str, records: Sequence[Record], step: int) -> None:
        self.writer.add_text(f"{name}/trajectories", markdown_of(records, step), step)

    def alert(self, title: str, text: str) -> None:
        self.writer.add_text("alerts", f"**{title}**\n\n{text}")
        self.writer.flush()

    def finish(self, has_failed: bool) -> None:
        self.writer.close()


class MLflow:
    """MLflow, at `MLFLOW_TRACKING_URI`, or else in `mlflow.db` under the run folder."""

    def __init__(self, run: TrackedRun) -> None:
        from mlflow.entities import Metric
        from mlflow.tracking import MlflowClient

        self.metric = Metric
        where = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{run.folder}/mlflow.db"
        self.client = MlflowClient(tracking_uri=where)
        self.num_alerts = 0
        self.id = run.resume_id or self._create(run)
        self.client.update_run(self.id, status="RUNNING")

    def _create(self, run: TrackedRun) -> str:
        """Creates a run, and the experiment of the project where there is none."""
        experiment = self.client.get_experiment_by_name(run.project)
        if experiment is None:
            is_ours = "MLFLOW_TRACKING_URI" not in os.environ
            place = (run.folder / "mlartifacts").resolve().as_uri() if is_ours else None
            number = self.client.create_experiment(run.project, artifact_location=place)
        else:
            number = experiment.experiment_id
        created = self.client.create_run(number, run_name=run.name)
        self.client.log_dict(created.info.run_id, run.config, "config.json")
        return str(created.info.run_id)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        now_ms = int(time.time() * 1000)
        points = [self.metric(name, value, now_ms, step) for name, value in metrics.items()]
        self.client.log_batch(self.id, metrics=points)

    def log_trajectories(self, name: str, records: Sequence[Record], step: int) -> None:
        file = f"trajectories/{name}_{step:06d}.md"
        self.client.log_text(self.id, markdown_of(records, step), file)

    def alert(self, title: str, text: str) -> None:
        self.num_alerts += 1
        self.client.set_tag(self.id, f"alert.{self.num_alerts}", f"{title}: {text}")

    def finish(self, has_failed: bool) -> None:
        self.client.set_terminated(self.id, status="FAILED" if has_failed else "FINISHED")


class Trackio:
    """Trackio, whose dashboard `trackio show` opens; at `TRACKIO_DIR`, or its usual folder."""

    def __init__(self, run: TrackedRun) -> None:
        import trackio

        self.client = trackio
        self.run: Any = trackio.init(
            project=run.project,
            name=run.resume_id or run.name,
            config=run.config,
            resume="must" if run.resume_id else "never",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        self.id = str(self.run.name)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self.run.log(dict(metrics), step=step)

    def log_trajectories(self, name: str, records: Sequence[Record], step: int) -> None:
        text = self.client.Markdown(markdown_of(records, step))
        self.run.log({f"{name}/trajectories": text}, step=step)

    def alert(self, title: str, text: str) -> None:
        self.run.alert(title=title, text=text)

    def finish(self, has_failed: bool) -> None:
        self.run.finish()


class SwanLab:
    """SwanLab. Without a key it stays offline, in `swanlab` under the run folder."""

    def __init__(self, run: TrackedRun) -> None:
        import swanlab

        self.client = swanlab
        has_key = bool(os.environ.get("SWANLAB_API_KEY"))
        mode: Any = os.environ.get("SWANLAB_MODE") or ("online" if has_key else "offline")
        self.run: Any = swanlab.init(
            project=run.project,
            name=run.name,
            config=run.config,
            log_dir=str(run.folder / "swanlab"),
            mode=mode,
            id=run.resume_id,
            resume="allow" if run.resume_id else None,
        )
        self.id = str(self.run.id)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self.run.log(dict(metrics), step=step)

    def log_trajectories(self, name: str, records: Sequence[Record], step: int) -> None:
        text = self.client.Text(markdown_of(records, step))
        self.run.log({f"{name}/trajectories": text}, step=step)

    def alert(self, title: str, text: str) -> None:
        self.run.log({"alerts": self.client.Text(f"{title}\n\n{text}")})

    def finish(self, has_failed: bool) -> None:
        if has_failed:
            self.client.finish(state="crashed", error="the training failed, see its run folder")
        else:
            self.client.finish()


SERVICES: dict[str, Callable[[TrackedRun], Tracker]] = {
    "wandb": Wandb,
    "tensorboard": TensorBoard,
    "mlflow": MLflow,
    "trackio": Trackio,
    "swanlab": SwanLab,
}
"""What starts a service, by the name of its package, which is that of the extra and of the entry in
`trainer.logger`, too."""


def missing_clients(names: Sequence[str]) -> list[str]:
    """The names of the services whose client is not installed."""
    asked = [name for name in names if name in SERVICES]
    return [name for name in asked if importlib.util.find_spec(name) is None]


def table_row(record: Record, step: int) -> dict[str, Any]:
    """A trajectory as a row of a table, by column."""
    extra = record.get("extra_info") or {}
    gold = (record.get("ground_truth") or {}).get("target")
    return {
        "step": step,
        "source": record["data_source"],
        "question": extra.get("question") or record["prompt"],
        "trajectory": "".join(segment["text"] for segment in record["segments"]),
        "gold": ", ".join(map(str, gold)) if isinstance(gold, list) else str(gold),
        "score": record["reward"]["score"],
        "turns": (record.get("info") or {}).get("turns"),
        "stop": record.get("stop_reason"),
    }


def markdown_of(records: Sequence[Record], step: int) -> str:
    """Trajectories as Markdown, for services without tables.

    Each transcript is indented as code, so that nothing in it is taken for markup.
    """
    blocks = []
    for record in records:
        row = table_row(record, step)
        head = f"**{row['score']}** {row['source']}, step {step}, gold: {json.dumps(row['gold'])}"
        transcript = f"{row['question']}\n{row['trajectory']}"
        lines = "\n".join(f"    {line}" for line in transcript.splitlines())
        blocks.append(f"{head}\n\n{lines}")
    return "\n\n".join(blocks)


def _has_wandb_key() -> bool:
    """Whether `wandb login` was run here, or a key is in the environment."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return any("wandb" in host for host in netrc.netrc().hosts)
    except FileNotFoundError:
        return False
