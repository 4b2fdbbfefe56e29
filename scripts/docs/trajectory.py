"""Writes docs/trajectory.md, a trajectory of a real run with every part explained.

    python scripts/docs/trajectory.py [--check]
    python scripts/docs/trajectory.py --take FILE:LINE --commit C --command "..."

The page is made from docs/assets/trajectory.json. `--take` puts another record there: a line of
`trajectories/train_*.jsonl` of a run that was written with the numbers of its tokens. All others
of its group must have one score. The paragraph "What happened" in `trajectory.template.md` tells
of the present record, and is to be written anew for another.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE = DOCS / "trajectory.md"
SHOWN = DOCS / "assets" / "trajectory.json"
NUMBERS = {
    "mask": "mask",
    "rollout_log_probs": "log-prob, engine",
    "log_probs": "log-prob, trainer",
    "ref_log_probs": "log-prob, reference",
    "entropy": "entropy",
    "advantages": "advantage",
}
"""Fields of a segment that have a number for each token, and the headings of their columns."""

TEMPLATE = Path(__file__).with_name("trajectory.template.md")
"""The page, with the names of `facts` in braces."""
ACTION = {
    "search": "It thinks, and asks for a search. The engine stops at `</search>`, the last token.",
    "answer": "It thinks, and answers. `</answer>` ends the trajectory: `stop_reason` is `{stop}`.",
}
OBSERVATION = """The retrieval server got `{query}` and returned {count}, spliced in as it stands
below, between `<information>` and `</information>`. These {tokens} tokens have **mask 0**: the
policy reads them and is never trained to write them. They have no log-probs, because nobody sampled
them.
"""


def token_texts(segment: dict[str, Any]) -> Iterator[str]:
    """The text of each token of a segment."""
    start = 0
    for end in segment["token_ends"]:
        yield segment["text"][start:end]
        start = end


def code(text: str) -> str:
    """Text as code in a cell of a table; white space at the ends stays visible."""
    return f"`{text.replace(chr(10), '⏎').replace(' ', '␣').replace('|', chr(92) + '|')}`"


def fenced(text: str) -> str:
    return f"```text\n{text}\n```"


def token_table(segment: dict[str, Any]) -> list[str]:
    """A row for each token of the policy."""
    names = [name for name in NUMBERS if name in segment]
    rows = [
        "| token | " + " | ".join(NUMBERS[name] for name in names) + " |",
        "|---|" + "---|" * len(names),
    ]
    for i, text in enumerate(token_texts(segment)):
        numbers = [f"{round(segment[name][i], 3) + 0:g}" for name in names]
        rows.append(f"| {code(text)} | {' | '.join(numbers)} |")
    return rows


def turns(record: dict[str, Any]) -> Iterator[str]:
    """The section of each segment."""
    for segment in record["segments"]:
        info = segment["info"]
        number = info["turn"]
        if segment["source"] == "model":
            kind = "answer" if "</answer>" in segment["text"] else "search"
            yield f"### Turn {number}, the policy\n"
            yield ACTION[kind].format(stop=record["stop_reason"]) + "\n"
            yield fenced(segment["text"]) + "\n"
            yield "\n".join(token_table(segment)) + "\n"
        else:
            passages = info["passages"]
            count = f"{len(passages)} passage{'s' * (len(passages) != 1)}"
            tokens = len(segment["token_ids"])
            yield f"### Turn {number}, the environment\n"
            yield OBSERVATION.format(query=info["query"], count=count, tokens=tokens)
            yield fenced(segment["text"].strip("\n")) + "\n"


def facts(shown: dict[str, Any]) -> dict[str, Any]:
    """What the texts of the page name."""
    record, scores = shown["record"], shown["group_scores"]
    score = record["reward"]["score"]
    others = list(scores)
    others.remove(score)
    if len(set(others)) != 1:
        raise ValueError(f"the page tells of one advantage, and the others scored {others}")
    mean, deviation = statistics.mean(scores), statistics.stdev(scores)
    written = [s for s in record["segments"] if s["source"] == "model"]
    read = [s for s in record["segments"] if s["source"] == "observation"]
    tokens = [
        (text, engine, trainer, reference)
        for s in written
        for text, engine, trainer, reference in zip(
            token_texts(s),
            s["rollout_log_probs"],
            s["log_probs"],
            s["ref_log_probs"],
            strict=True,
        )
    ]
    gap = max(abs(engine - trainer) for _, engine, trainer, _ in tokens)
    most = max(tokens, key=lambda token: token[2] - token[3])
    return {
        **{key: shown[key] for key in ("command", "commit", "machine", "file", "line")},
        "prompt": fenced(record["prompt"].rstrip("\n")),
        "num_prompt": len(record["prompt_ids"]),
        "others": len(others),
        "other_scores": ", ".join(f"{s:g}" for s in others),
        "gap": f"{gap:.1g}" if gap else "below the four digits that are recorded",
        "most": most[0].strip(),
        "most_trainer": f"{most[2]:.2f}",
        "most_reference": f"{most[3]:.2f}",
        "answer": written[-1]["text"].split("<answer>")[1].split("</answer>")[0].strip(),
        "gold": ", ".join(f"`{t}`" for t in record["ground_truth"]["target"]),
        "components": "\n".join(
            f"| `{name}` | {value:g} |" for name, value in record["reward"].items()
        ),
        "size": len(scores),
        "scores": ", ".join(f"{s:g}" for s in scores),
        "score": score,
        "mean": mean,
        "deviation": deviation,
        "advantage": (score - mean) / (deviation + 1e-6),
        "other_advantage": (others[0] - mean) / (deviation + 1e-6),
        "trained": sum(sum(s["mask"]) for s in written),
        "masked": sum(len(s["token_ids"]) for s in read),
    }


def page() -> str:
    """The whole text of docs/trajectory.md."""
    shown = json.loads(SHOWN.read_text(encoding="utf-8"))
    told = "\n".join(turns(shown["record"])).rstrip("\n")
    return TEMPLATE.read_text(encoding="utf-8").format(turns=told, **facts(shown))


def take(place: str, commit: str, command: str) -> None:
    """Takes a record, named by FILE:LINE, and the scores of its group."""
    path, _, line = place.rpartition(":")
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    records = [json.loads(text) for text in lines]
    record = records[int(line) - 1]
    shown = {
        "commit": commit,
        "command": command,
        "machine": "2 CPU cores",
        "file": f"trajectories/{Path(path).name}",
        "line": int(line),
        "group_scores": [r["reward"]["score"] for r in records if r["uid"] == record["uid"]],
        "record": record,
    }
    SHOWN.write_text(json.dumps(shown) + "\n", encoding="utf-8")


def main() -> int:
    """Writes or checks the page; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="exit 1 if the page is out of date")
    parser.add_argument("--take", metavar="FILE:LINE", help="the record to show")
    parser.add_argument("--commit", help="with --take: the commit of its run")
    parser.add_argument("--command", help="with --take: the command of its run")
    args = parser.parse_args()
    if args.take and not (args.commit and args.command):
        parser.error("--take: --commit and --command are needed too, because the page names them")
    if args.take:
        take(args.take, args.commit, args.command)
    if args.check:
        return int(PAGE.read_text(encoding="utf-8") != page())
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
