"""How long a call of the tool `python` takes, and how many a process runs in a second.

python scripts/bench/python_tool.py [--calls 64] [--at-once 16] [--code "1 + 1"]

Writes a line of JSON: milliseconds of a call when they follow each other, of them those that a
processor worked in the program's process and in this one, calls per second when `--at-once` run
together, and milliseconds of an interpreter that does nothing, for comparison.
"""

import argparse
import asyncio
import json
import resource
import subprocess
import sys
import time

from search_r1.tools.python import PythonConfig, PythonTool


def worked_ms() -> tuple[float, float]:
    """Processor time of the ended children and of this process."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_CHILDREN, resource.RUSAGE_SELF)]
    children, own = (1e3 * (usage.ru_utime + usage.ru_stime) for usage in used)
    return children, own


async def measure(code: str, calls: int, at_once: int) -> dict[str, float]:
    """The figures. Raises ToolFailed where no program can be run."""
    tool = PythonTool(PythonConfig(max_concurrency=at_once))
    await tool.execute(code)

    before, began = worked_ms(), time.perf_counter()
    for _ in range(calls):
        await tool.execute(code)
    one_by_one, after = time.perf_counter() - began, worked_ms()

    turns = asyncio.Semaphore(at_once)

    async def call() -> None:
        async with turns:
            await tool.execute(code)

    began = time.perf_counter()
    await asyncio.gather(*(call() for _ in range(calls)))
    together = time.perf_counter() - began

    began = time.perf_counter()
    for _ in range(calls):
        subprocess.run([sys.executable, "-I", "-S", "-c", ""], check=True)
    bare = time.perf_counter() - began
    return {
        "ms_per_call": 1e3 * one_by_one / calls,
        "cpu_ms_of_program": (after[0] - before[0]) / calls,
        "cpu_ms_of_trainer": (after[1] - before[1]) / calls,
        "calls_per_s_at_once": calls / together,
        "ms_of_bare_interpreter": 1e3 * bare / calls,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=64)
    parser.add_argument("--at-once", type=int, default=16)
    parser.add_argument("--code", default="1 + 1")
    flags = parser.parse_args()
    figures = asyncio.run(measure(flags.code, flags.calls, flags.at_once))
    sys.stdout.write(json.dumps({k: round(v, 2) for k, v in figures.items()}) + "\n")


if __name__ == "__main__":
    main()
