"""The supervisor, which starts, stops and restarts the driver, and the driver's request to stop."""

import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from verl.utils.processes import (
    STOP_SIGNALS,
    Forward,
    ended,
    exit_status,
    follow,
    kill_session,
    session_over,
)
from verl.utils.run_folder import ENDED, LATEST, RESTARTS, in_use, write_atomically
from verl.utils.webhook import webhook_of

logger = logging.getLogger(__name__)
LOST = 75
"""Exit status (EX_TEMPFAIL) of a driver that a restart may help.

It lost a rank or an engine that it cannot replace, or it hung."""
SUPERVISED = "VERL_SUPERVISED"
MAX_PAUSE_S = 60.0
SETTLE_S = 5.0


def supervise_driver(
    arguments: Sequence[str],
    trainer: Mapping[str, Any],
    meanwhile: Callable[[], object] = lambda: None,
) -> int:
    """Runs main_ppo with these arguments as the driver; returns the exit status.

    `trainer` is that section of the configuration. `meanwhile` is called about once a second.
    """
    limit = trainer["max_restarts"]
    webhook = webhook_of(trainer.get("alert_webhook_env"))
    return supervise(
        [sys.executable, "-m", "verl.trainer.main_ppo", *arguments],
        str(trainer["default_local_dir"]),
        limit if isinstance(limit, int) else 0,  # the driver reports a value that is no number
        meanwhile=meanwhile,
        tell=partial(webhook.tell, str(trainer["experiment_name"])) if webhook else silent,
    )


def silent(title: str, text: str) -> None:
    """Tells nobody."""


def supervise(
    command: list[str],
    run_dir: str,
    max_restarts: int,
    pause_s: float = 1.0,
    grace_s: float = 20.0,
    meanwhile: Callable[[], object] = lambda: None,
    tell: Callable[[str, str], None] = silent,
) -> int:
    """Runs `command`, restarts it when it ends by a signal or with LOST; returns the exit status.

    There are at most `max_restarts` restarts in a row without a new checkpoint in `run_dir` in
    between. The pause before the first restart is `pause_s` seconds, and doubles each time up to a
    minute. SIGINT and SIGTERM are passed on, and there is no restart after them; `grace_s` seconds
    after the second signal the session of the command is killed. `meanwhile` is called about once a
    second while the command runs, `tell` with a title and a text when the run is given up. How it
    ended is written to `run_dir`, unless it was refused there.
    """
    status = supervise_until_its_end(
        command, run_dir, max_restarts, pause_s, grace_s, meanwhile, tell
    )
    record_end(run_dir, status)
    return status


def supervise_until_its_end(
    command: list[str],
    run_dir: str,
    max_restarts: int,
    pause_s: float,
    grace_s: float,
    meanwhile: Callable[[], object],
    tell: Callable[[str, str], None],
) -> int:
    """Does what `supervise` says, but for the record of the end; returns the exit status."""
    latest = Path(run_dir) / LATEST
    first = seen = checkpoint(latest)
    attempts = 0
    with Forward() as signals:
        while True:
            own = checkpoint(latest) != first
            returncode = run_once(command, own, signals, grace_s, meanwhile)
            if signals.received or not is_lost(returncode):
                return exit_status(returncode)
            reached = checkpoint(latest)
            attempts = 1 if reached != seen else attempts + 1
            seen = reached
            if attempts > max_restarts:
                message = given_up(run_dir, max_restarts, returncode, reached[0])
                logger.error("%s", message)
                tell("given up", message)
                return exit_status(returncode)
            record(run_dir, returncode, reached[0])
            pause = min(MAX_PAUSE_S, pause_s * 2 ** (attempts - 1))
            logger.warning(
                "the run ended by %s: restart %d of %d in %g s, from %s",
                cause(returncode),
                attempts,
                max_restarts,
                pause,
                where(reached[0]),
            )
            rest(pause, signals)
            if signals.received:
                return 128 + signals.received[0]


def checkpoint(latest: Path) -> tuple[int, int]:
    """Step of the newest checkpoint, and when it became that (ns); zeros if there is none."""
    try:
        return int(latest.read_text()), latest.stat().st_mtime_ns
    except (FileNotFoundError, ValueError):  # the driver reports a value that is no number
        return 0, 0


def run_once(
    command: list[str],
    own: bool,
    signals: Forward,
    grace_s: float,
    meanwhile: Callable[[], object],
) -> int:
    """Runs the command once, ends what is left of its session, and returns the return code.

    `own`: whether this run has written checkpoints.
    """
    child = signals.start(command, env={**os.environ, SUPERVISED: f"{os.getpid()} {int(own)}"})
    deadline = None
    while not ended(child, 1.0):
        meanwhile()
        if deadline is None and len(signals.received) > 1:
            deadline = time.monotonic() + grace_s
        if deadline is not None and time.monotonic() > deadline:
            break
    else:
        # processes that end with the driver need time to clean up shared memory and locks
        session_over(child, min(SETTLE_S, grace_s))
    if left := kill_session(child):
        logger.warning("processes of the run that could not be killed: %s", left)
    return signals.reap()


def is_lost(returncode: int) -> bool:
    """Whether a restart may help. After SIGINT and SIGTERM it is not wanted."""
    return returncode == LOST or (returncode < 0 and -returncode not in STOP_SIGNALS)


def cause(returncode: int) -> str:
    """How a process ended.

    >>> cause(-9), cause(75)
    ('SIGKILL', 'status 75')
    """
    return signal.Signals(-returncode).name if returncode < 0 else f"status {returncode}"


def where(step: int) -> str:
    return f"the checkpoint of step {step}" if step else "the beginning"


def rest(seconds: float, signals: Forward) -> None:
    """Sleeps until a signal is received, `seconds` at most."""
    deadline = time.monotonic() + seconds
    while not signals.received and time.monotonic() < deadline:
        time.sleep(0.05)


def record(run_dir: str, returncode: int, step: int) -> None:
    """Appends a restart to restarts.jsonl.

    It records the time (UTC), what ended the run, and the step after which it continues.
    """
    how = {"signal": signal.Signals(-returncode).name} if returncode < 0 else {"status": returncode}
    line = json.dumps({"time": now(), **how, "step": step})
    try:
        Path(run_dir).mkdir(parents=True, exist_ok=True)
        with (Path(run_dir) / RESTARTS).open("a") as file:
            file.write(line + "\n")
    except OSError as error:  # a full disk is no reason to end the run
        logger.warning("restart not recorded: %s", error)


def record_end(run_dir: str, status: int) -> None:
    """Writes the exit status to ended.json.

    A run that ended before it held the folder (`run_folder.held`) leaves what is said of the run
    before, or of the one that is using the folder.
    """
    folder = Path(run_dir)
    if not folder.is_dir() or (folder / ENDED).exists() or in_use(folder):
        return
    try:
        write_atomically(folder / ENDED, json.dumps({"time": now(), "status": status}) + "\n")
    except OSError as error:  # a full disk does not change how the run ended
        logger.warning("the end is not recorded: %s", error)


def now() -> str:
    """The present time in UTC, in ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def given_up(run_dir: str, max_restarts: int, returncode: int, step: int) -> str:
    """The message when a run is not restarted."""
    times = (
        f"{max_restarts} restarts without a new checkpoint in between"
        if max_restarts
        else "no restart"
    )
    return (
        f"the run ended by {cause(returncode)}; given up after {times} (trainer.max_restarts). The "
        f"cause is above, in {run_dir}/logs/console.log (what engines and ranks wrote), in Ray's "
        "logs (/tmp/ray/session_latest/logs), after a hang in "
        f"{run_dir}/stacks; restarts are listed in {run_dir}/{RESTARTS}. SIGKILL that nobody sent "
        "is the kernel's answer to a lack of memory (dmesg). Repair it and run the same command: "
        f"it continues from {where(step)} unless trainer.resume_mode=disable."
    )


def follow_supervisor() -> bool | None:
    """Makes the driver and its session end when the supervisor ends.

    Returns whether this run has written checkpoints before this start, or None if there is no
    supervisor. The mark of the supervisor is removed from the environment, so that no other program
    takes itself for the driver.
    """
    mark = os.environ.pop(SUPERVISED, None)
    if mark is None:
        return None
    supervisor, own = map(int, mark.split())
    try:
        follow(supervisor, end_session)
    except ProcessLookupError:
        end_session()
    if os.getppid() != supervisor:  # it has ended, and its number may be another process's by now
        end_session()
    return bool(own)


def end_session() -> None:
    """Kills this process, and first all processes of its session if it leads one."""
    if os.getsid(0) == os.getpid():
        kill_session(os.getpid())
    os.kill(os.getpid(), signal.SIGKILL)


class Stop:
    """A request to end the run: `requested` is the signal's number, 0 before there is one.

    The first SIGTERM or SIGINT is noted. A SIGINT after that raises KeyboardInterrupt in the main
    thread. A second SIGTERM does not, because a SIGTERM to all processes of a job reaches the
    driver twice: directly, and through the supervisor.
    """

    def __init__(self) -> None:
        self.requested = 0

    def listen(self) -> None:
        """Installs the handlers. Call it again after `ray.init`, which replaces that of SIGTERM."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._receive)

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        if self.requested:
            if signum == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.requested = signum
        name = signal.Signals(signum).name
        text = (
            f"{name}: finishing the step under way, then a checkpoint; Ctrl-C again to exit now\n"
        )
        # logging is not safe in signal handlers
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, text.encode())

    def __enter__(self) -> "Stop":
        self._previous = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        self.listen()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
