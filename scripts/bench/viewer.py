"""Measures how fast a page of many trajectories opens and scrolls: `python scripts/bench/viewer.py`

The records are made here, as long as those of a real run: --turns searches of three passages each,
and of --detailed of them every token has its numbers, as in training. What is printed: the seconds
until the list and the first trajectory are shown, the milliseconds of a frame while the list
is scrolled through, and the seconds of a search of all texts. It needs Chromium.
"""

import argparse
import random
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, expect

from search_r1.pages.viewer import build
from tests.search_r1.pages.browser import started
from tests.search_r1.pages.made_records import found, record, said, write

WORDS = ["".join(random.Random(n).choices("abcdefghijklmnop", k=2 + n % 7)) for n in range(3000)]
SCROLL = """async () => {
  const list = document.querySelector('.list');
  const frames = [];
  let before = performance.now();
  for (let place = 0; place < 60; place++) {
    list.scrollTop = (list.scrollHeight * place) / 60;
    await new Promise(requestAnimationFrame);
    const now = performance.now();
    frames.push(now - before);
    before = now;
  }
  return frames;
}"""


def sentence(draw: random.Random, words: int) -> str:
    return " ".join(draw.choices(WORDS, k=words))


def turn(draw: random.Random, words: int, is_detailed: bool) -> dict[str, Any]:
    """A turn of the policy with `words` tokens, each with numbers of its own if it is detailed."""
    made = said(f"<think> {sentence(draw, words)} </think>", 0.5 if is_detailed else None)
    for name in ("rollout_log_probs", "log_probs", "entropy"):
        if name in made:
            made[name] = [float(f"{-draw.expovariate(2):.4g}") for _ in made[name]]
    return made


def made_record(number: int, turns: int, is_detailed: bool) -> dict[str, Any]:
    """A trajectory of that many searches."""
    draw = random.Random(number)
    segments = []
    for _ in range(turns):
        passages = [
            {"id": str(n), "title": sentence(draw, 3), "text": sentence(draw, 100), "score": 1.5}
            for n in range(3)
        ]
        segments.append(turn(draw, 100, is_detailed))
        segments.append(found(sentence(draw, 5), *passages) | {"token_ids": [5] * 450})
    segments.append(turn(draw, 80, is_detailed))
    question = f"{sentence(draw, 9)} {number // 5}?"
    return record(question, *segments, uid=f"{number // 5}", em=float(draw.random() < 0.4))


def timed_open(page: Page, url: str) -> float:
    """Seconds until the list and a trajectory are shown."""
    began = time.perf_counter()
    page.goto(url)
    page.wait_for_selector(".row")
    page.wait_for_selector(".trajectory .text")
    return time.perf_counter() - began


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trajectories", type=int, default=2000)
    parser.add_argument("--detailed", type=int, default=2000)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, started() as browser:
        path = Path(folder) / "train_000010.jsonl"
        numbers = range(args.trajectories)
        write(path, [made_record(n, args.turns, n < args.detailed) for n in numbers])
        began = time.perf_counter()
        pages = build(path, Path(folder) / "viewer.html")
        seconds = time.perf_counter() - began
        sizes = ", ".join(f"{p.stat().st_size / 1e6:.1f}" for p in pages)
        records_mb = path.stat().st_size / 1e6
        sys.stdout.write(
            f"records {records_mb:.1f} MB, pages {sizes} MB, made in {seconds:.1f} s\n"
        )
        times = []
        for _ in range(args.repeat):
            page = browser.new_page(viewport={"width": 1280, "height": 800})
            times.append(timed_open(page, pages[0].as_uri()))
            frames = page.evaluate(SCROLL)
            began = time.perf_counter()
            page.get_by_label("also in thoughts and passages").check()
            page.get_by_label("Search", exact=True).fill(WORDS[7])
            expect(page.locator(".count")).to_have_text(re.compile(" of "), timeout=60_000)
            search = time.perf_counter() - began
            page.close()
        sys.stdout.write(f"opens in {statistics.median(times):.2f} s (median of {args.repeat}; ")
        sys.stdout.write(f"{min(times):.2f} to {max(times):.2f})\n")
        sys.stdout.write(f"a frame of scrolling: median {statistics.median(frames):.0f} ms, ")
        sys.stdout.write(f"longest {max(frames):.0f} ms; a search of all texts {search:.1f} s\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
