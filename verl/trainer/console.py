"""What a run says on the console: first what it will do, then its own lines and what is wrong.

Engines, ranks and Ray say much more while they start. All of it goes to `logs/console.log` in the
run folder, and only what tells of an error is shown as well. What agent workers write is shown,
because the user's reward and tools run there.
"""

import logging
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from verl.utils.wording import counted

if TYPE_CHECKING:
    from verl.trainer.config import PPOConfig

logger = logging.getLogger(__name__)
LOG = "logs/console.log"
TAIL_LINES = 15
SHOWN_ACTORS = ("AgentLoopWorker",)
"""Actors whose lines are shown, whatever they say."""
OF_RAY = ("raylet", "gcs_server")
"""What Ray gives instead of a process number for news of the cluster, such as a lack of memory."""
AUTOSCALER = "autoscaler"
"""The same for a report every few seconds, of which Ray itself shows what is news."""
WRONG = re.compile(
    r"\w*(error|exception)\b|\b(critical|fatal|traceback|aborted|killed|segmentation fault|"
    r"terminate called|out of memory)\b|^\[[EF]\d{4}|\s[EF] \d+ \d+\]",
    re.IGNORECASE,
)
"""A line that tells of an error: of Python, of vLLM, of C++ (glog's E and F), or of the system."""
BEGIN_OF_TRACEBACK = "Traceback (most recent call last)"
ALGORITHMS = {"gae": "PPO", "grpo": "GRPO", "none": "distillation"}
"""What estimators of the advantage are called together with their loss."""

Lines = Mapping[str, Any]
"""Lines of one process as Ray gives them: `pid`, `ip`, `lines`, `is_err`, and `actor_name`."""


class Filter:
    """Finds among the lines of all processes those that are shown on the console.

    A traceback is shown whole: its lines are indented, and the first that is not ends it.
    """

    def __init__(self) -> None:
        self.in_traceback: set[tuple[Any, Any]] = set()

    def shown(self, batch: Lines) -> list[str]:
        """The lines of a batch that are shown."""
        if is_always_shown(batch):
            return list(batch["lines"])
        process = (batch.get("ip"), batch.get("pid"))
        return [line for line in batch["lines"] if self._tells_of_an_error(line, process)]

    def _tells_of_an_error(self, line: str, process: tuple[Any, Any]) -> bool:
        if BEGIN_OF_TRACEBACK in line:
            self.in_traceback.add(process)
            return True
        if process in self.in_traceback:
            if line.strip() and not line[0].isspace():
                self.in_traceback.discard(process)
            return True
        return bool(WRONG.search(line))


def is_always_shown(batch: Lines) -> bool:
    """Whether lines are shown because of who wrote them."""
    if batch.get("pid") in OF_RAY:
        return True
    return str(batch.get("actor_name")).startswith(SHOWN_ACTORS)


def keeping(file: IO[str], show: Callable[[dict[str, Any]], object]) -> Callable[[Lines], None]:
    """A handler of lines that writes all of them to `file`, and shows those of `Filter`."""
    chosen = Filter()

    def handle(batch: Lines) -> None:
        if batch.get("pid") == AUTOSCALER:
            show(dict(batch))
            return
        name = batch.get("actor_name") or batch.get("task_name") or ""
        with suppress(OSError, ValueError):  # a full disk, or the end of the run
            file.writelines(f"({name} pid={batch.get('pid')}) {line}\n" for line in batch["lines"])
            file.flush()
        if lines := chosen.shown(batch):
            show({**batch, "lines": lines})

    return handle


@contextmanager
def library_log(folder: str | Path, name: str) -> Iterator[IO[str]]:
    """Sends what the library `name` logs below errors to the run folder's log during the block.

    Yields the log, which is written line by line. Where it cannot be opened, what would stand in it
    is dropped.
    """
    path = Path(folder) / LOG
    library = logging.getLogger(name)
    console = [(handler, handler.level) for handler in library.handlers]
    with opened(path) as file:
        handler = logging.StreamHandler(file)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
        library.addHandler(handler)
        for shown, _ in console:
            shown.setLevel(logging.ERROR)
        try:
            yield file
        finally:
            library.removeHandler(handler)
            for shown, level in console:
                shown.setLevel(level)


def opened(path: Path) -> IO[str]:
    """Opens a log to append to it; /dev/null where that is not possible."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("a", buffering=1, encoding="utf-8", errors="replace")
    except OSError as error:
        logger.warning("%s: %s; what engines and ranks write is not kept", path, error)
        return Path("/dev/null").open("a", encoding="utf-8")


def show_tail(folder: str | Path) -> None:
    """Writes the last lines of the run folder's log to stderr, and names it."""
    path = Path(folder) / LOG
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return
    if lines:
        last = "\n".join(f"  {line}" for line in lines[-TAIL_LINES:])
        sys.stderr.write(f"the last lines of {path}, which has what engines and ranks wrote:\n")
        sys.stderr.write(f"{last}\n")


def plan(config: "PPOConfig", num_questions: int, steps: int, resumed_step: int | None) -> str:
    """The first line of a run: what is trained, on what, for how long, and its folder."""
    data = config.data
    trainer = config.trainer
    policy = config.actor_rollout_ref.model.path
    estimator = str(config.algorithm.adv_estimator)
    algorithm = ALGORITHMS.get(estimator, estimator)
    teacher = f", taught by {config.teacher.model.path}" if config.use_teacher else ""
    trajectories = counted(config.rollout_batch_size, "trajectory", "trajectories")
    after = "" if resumed_step is None else f", going on after step {resumed_step}"
    return (
        f"{algorithm} of {policy} ({size_of(config)}) on {num_questions:,} questions of "
        f"{names_of(data.train_files)}{teacher}: {counted(steps, 'step')} of "
        f"{trajectories}{after}, {machines_of(config)}; "
        f"run folder {trainer.default_local_dir}"
    )


def size_of(config: "PPOConfig") -> str:
    """The number of parameters of the policy, as text."""
    from verl.workers.hf_folder import skeleton_of  # imports torch

    whole = config.actor_rollout_ref.model.model_copy(update={"lora_rank": 0})
    count = sum(weights.numel() for weights in skeleton_of(whole).parameters())
    rank = config.actor_rollout_ref.model.lora_rank
    adapted = f", LoRA of rank {rank}" if rank else ""
    if count >= 1e9:
        return f"{count / 1e9:.1f} B parameters{adapted}"
    return f"{count / 1e6:.1f} M parameters{adapted}"


def names_of(files: Sequence[str]) -> str:
    """The first file, and how many there are beside it."""
    more = f" and {len(files) - 1} more" if len(files) > 1 else ""
    return f"{files[0]}{more}"


def machines_of(config: "PPOConfig") -> str:
    """The processes or GPUs that train, as text."""
    nodes = config.trainer.nnodes
    where = f" on {nodes} machines" if nodes > 1 else ""
    count = config.num_gpus
    if config.device == "cuda":
        return f"{counted(count, 'GPU')}{where}"
    return f"{counted(count, 'process', 'processes')} on CPU{where}"
