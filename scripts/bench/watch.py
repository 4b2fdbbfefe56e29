"""Measures what the page of a run costs the run: `python scripts/bench/watch.py RUN`

The page is served and open in one browser (Chromium, without a screen) for --minutes, or until the
run ends. A run that goes on is followed as it is. Of a run that has ended a copy is made, whose
metrics come again, each step after the time that it took. What is printed: the CPU time of the
server over the wall time, which is the share of a step's time on one core, and the same for the
browser, which may run elsewhere. With --steps N nothing is served: printed is how much a page is
sent of a run with N steps, whose metrics are those of RUN again and again.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path

import psutil

from search_r1.pages.cost import Prices
from search_r1.pages.html import json_text
from search_r1.pages.metrics_file import STEP_SECONDS, MetricsFile, row_of, trained
from search_r1.pages.watch import Watch
from tests.search_r1.pages.browser import started
from verl.utils.run_folder import in_use
from verl.utils.tracking import STEP

SETTLE_S = 10.0
"""Seconds after the page was opened before the measurement begins."""


def cpu_seconds(process: psutil.Process) -> float:
    """CPU seconds of a process and of all that descend from it."""
    total = 0.0
    for each in [process, *process.children(recursive=True)]:
        try:
            times = each.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


def replay(source: Path, target: Path, ended: threading.Event) -> None:
    """Appends the metrics of `source` to those of `target`, in the time that they took."""
    lines = (source / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    for line in lines:
        if ended.wait(row_of(line).get(STEP_SECONDS) or 0.0):
            return
        with (target / "metrics.jsonl").open("ab") as file:
            file.write(line)


@contextmanager
def going_on(run: Path) -> Iterator[Path]:
    """The folder of a run that goes on: the run itself, or a copy that is replayed."""
    if in_use(run):
        yield run
        return
    ended = threading.Event()
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, run.name)
        copy.mkdir()
        shutil.copy(run / "config.yaml", copy)
        if (run / "trajectories").exists():
            shutil.copytree(run / "trajectories", copy / "trajectories")
        (copy / "metrics.jsonl").touch()
        thread = threading.Thread(target=replay, args=(run, copy, ended))
        thread.start()
        try:
            yield copy
        finally:
            ended.set()
            thread.join()


@contextmanager
def served(run: Path) -> Iterator[tuple[str, psutil.Process]]:
    """Serves the page of a run; yields its address and the process."""
    command = [sys.executable, "-m", "search_r1.pages.watch", str(run)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        address = re.search(r"http\S+", server.stdout.readline())
        assert address, "the server did not start"
        yield address[0], psutil.Process(server.pid)
    finally:
        server.terminate()
        server.wait()


def measure(run: Path, seconds: float) -> str:
    """Follows a run for some seconds, or until it ends, and says what that cost."""
    is_live = in_use(run)
    with served(run) as (address, server), started() as browser:
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        page.goto(address)
        page.wait_for_selector("html[data-ready]")
        time.sleep(SETTLE_S)
        driver = psutil.Process()
        chromium = [child for child in driver.children(recursive=True) if child != server]
        before = cpu_seconds(server), sum(map(alone, chromium))
        began = time.monotonic()
        while time.monotonic() - began < seconds and (not is_live or in_use(run)):
            time.sleep(1)
        wall = time.monotonic() - began
        spent = cpu_seconds(server) - before[0], sum(map(alone, chromium)) - before[1]
    metrics = MetricsFile(run / "metrics.jsonl")
    metrics.poll()
    steps = len(trained(metrics.rows))
    return (
        f"{wall:.0f} s, {steps} steps in the file at the end\n"
        f"server: {spent[0]:.2f} s of CPU, {spent[0] / wall:.3%} of a step's time\n"
        f"browser: {spent[1]:.2f} s of CPU, {spent[1] / wall:.2%}\n"
    )


def sent(run: Path, steps: int) -> str:
    """How much a page is sent when it is opened, and with a further step."""
    metrics = MetricsFile(run / "metrics.jsonl")
    metrics.poll()
    rows = trained(metrics.rows)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        shutil.copy(run / "config.yaml", copy)
        with (copy / "metrics.jsonl").open("w", encoding="utf-8") as file:
            for step, row in zip(range(1, steps + 1), cycle(rows), strict=False):
                file.write(json.dumps({**row, STEP: step}) + "\n")
        watch = Watch([copy], Prices(None, None, None))
        watch.poll()
        opened = len(json_text(watch.snapshot()))
        with (copy / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({**rows[0], STEP: steps + 1}) + "\n")
        further = len(json_text(watch.poll()))
    return f"{opened / 1e6:.1f} MB when it is opened, {further / 1e3:.1f} kB with a further step\n"


def alone(process: psutil.Process) -> float:
    """CPU seconds of one process; 0 when it has ended."""
    try:
        times = process.cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return times.user + times.system


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of a run that goes on, or has ended")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--steps", type=int, metavar="N", help="print what a page is sent")
    args = parser.parse_args()
    if args.steps:
        sys.stdout.write(sent(args.run, args.steps))
        return 0
    with going_on(args.run) as run:
        sys.stdout.write(measure(run, args.minutes * 60))
    return 0


if __name__ == "__main__":
    sys.exit(main())
