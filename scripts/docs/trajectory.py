"""Writes docs/trajectory.md, a trajectory of a real run with every part explained.

    python scripts/docs/trajectory.py [--check]
    python scripts/docs/trajectory.py --take RUN/trajectories/train_000003.jsonl:15 --commit C --command "..."

The page is made from docs/assets/trajectory.json. `--take` puts another record there: a line of a
recorded training step that was written with the numbers of its tokens.
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

HEAD = """# A trajectory, explained

Written by `python scripts/docs/trajectory.py` from a record of a real run, [trajectory.json](assets/trajectory.json):
line {line} of `{file}` of

```console
$ {command}
```

at commit {commit}, on {machine}. It is the first command of the [tutorial](tutorial.md); your run will draw other trajectories.
[Reading trajectories](viewer.md) shows all of a run in a browser; here is one, slowly.

What happened: the question takes two searches. The policy, a model of 0.9 M parameters in its third training step, found the mayor,
then the mayor's employer, and answered right. The other {others} trajectories of the same question, its *group*, scored
{other_scores}.

## 1. The prompt

{prompt}

{num_prompt} tokens, given and not trained. The template of the closed world (`setup.template=short`) is one line; the paper's asks for
`<think>`, `<search>` and `<answer>` in words ([templates](templates.md)).

## 2. What followed

A trajectory is a list of *segments*, each by one author: `model` (sampled by the policy) or `observation` (written by the
environment). Everything else follows from that list: which tokens are trained, what the reward reads, what the page above shows.
"""

ACTION = {
    "search": "It thinks, and asks for a search. The engine stops at `</search>`, which is the last token of the turn.",
    "answer": "It thinks, and answers. `</answer>` ends the trajectory (`stop_reason` is `{stop}`).",
}

OBSERVATION = """The retrieval server got `{query}` and returned {count}, spliced in as it stands below, between
`<information>` and `</information>`. These {tokens} tokens have **mask 0**: the policy reads them and is never trained to write them.
They have no log-probs, because nobody sampled them.
"""

TAIL = """## 3. What the numbers say

| column | meaning |
|---|---|
| mask | 1: the loss counts this token. Only tokens that the policy sampled have it (`response_mask`) |
| log-prob, engine | by vLLM when the token was sampled |
| log-prob, trainer | by the FSDP actor before the update, over the same ids. The largest gap in this trajectory is {gap}, so both compute the same policy |
| log-prob, reference | by the model that training began with, for the KL term. Where it is lower the policy has come to prefer the token: most at `{most}` ({most_reference} there, {most_trainer} now) |
| entropy | of the distribution that the token was drawn from, in nats. It is high where the policy decides (search or answer? which name?) and nearly 0 where a tag goes on |
| advantage | what the update weighs the token by; positive: make it more likely |

Read more of a run's numbers in [metrics](metrics.md).

## 4. The reward

The reward reads what the policy wrote, nothing else: `{answer}` against the right answers {gold}.

| component | value |
|---|---|
{components}

`score` is the weighted sum ([rewards](rewards.md)); here only `em` has a weight, so the others are logged and pay nothing.

## 5. The advantage

GRPO compares a trajectory with its group, the {size} trajectories of the same prompt. Their scores were {scores}.

    advantage = (score - mean) / (standard deviation + 1e-6)
              = ({score:g} - {mean:g}) / {deviation:.4f} = {advantage:.3f}

One number for the whole trajectory, given to each of its {trained} trained tokens; the {masked} tokens of the observations get
none. The {others} others of the group each got {other_advantage:.3f}, so their tokens became less likely. A group in which all scores are equal
teaches nothing: every advantage is 0 ([algorithms](algorithms.md) has what can be done about it, and the other estimators).

## 6. The update

With these columns `policy_loss` of `verl/workers/actor.py` computes, for each token with mask 1, the ratio of new and old
probability, clips it, and multiplies it by the advantage; the KL to the reference is added. The same happens to all
trajectories of the step, and the new weights go to the engine before the next one ([architecture](architecture.md#one-training-step)).
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
    named = facts(shown)
    parts = [HEAD.format(**named), *turns(shown["record"]), TAIL.format(**named)]
    return "\n".join(parts)


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
    SHOWN.write_text(json.dumps(shown, indent=1) + "\n", encoding="utf-8")


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
    if args.take:
        take(args.take, args.commit, args.command)
    if args.check:
        return int(PAGE.read_text(encoding="utf-8") != page())
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
