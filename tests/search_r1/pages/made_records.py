"""Records as a run writes them, small enough to check by hand."""

import json
from pathlib import Path
from typing import Any

HOSTILE = "<script>document.title='script'</script><img src=x onerror=\"document.title='img'\">"
"""A text that would change the title of a page on which it became an element."""


def said(text: str, advantage: float | None = None, **more: Any) -> dict[str, Any]:
    """A turn of the policy whose tokens are its words; with numbers if it has an advantage."""
    words = text.split(" ")
    ends = [len(" ".join(words[: n + 1])) for n in range(len(words))]
    facts: dict[str, Any] = {"token_ends": ends}
    if advantage is not None:
        facts["mask"] = [1] * len(words)
        facts["rollout_log_probs"] = [-0.5] * len(words)
        facts["log_probs"] = [-0.75] * len(words)
        facts["entropy"] = [0.25] * len(words)
        facts["advantages"] = [advantage] * len(words)
    return {
        "source": "model",
        "text": text,
        "token_ids": list(range(100, 100 + len(words))),
        "policy_version": 3,
        "info": {"turn": 1, "finish_reason": "stop"},
        **facts,
        **more,
    }


def found(query: str, *passages: dict[str, Any]) -> dict[str, Any]:
    """An observation of a search."""
    text = "".join(f"{p['title']}: {p['text']}" for p in passages)
    info = {"query": query, "passages": list(passages), "kind": "search", "latency_s": 0.02}
    return {
        "source": "observation",
        "text": f"\n<information>{text}</information>\n",
        "token_ids": [7, 8, 9],
        "policy_version": -1,
        "info": info,
    }


def record(question: str, *segments: dict[str, Any], uid: str, em: float, **more: Any) -> dict:
    """A record of a question whose answer is Paris, and whose evidence is in passage 11."""
    return {
        "uid": uid,
        "data_source": "cities",
        "prompt": f"Question: {question}\n",
        "prompt_ids": [1, 2],
        "segments": list(segments),
        "stop_reason": "answer",
        "reward": {"score": em, "em": em, "format": 1.0},
        "info": {"searches": 1, "hops": 1},
        "ground_truth": {"target": ["Paris"]},
        "extra_info": {"question": question, "hops": 1, "gold_ids": ["11"]},
        **more,
    }


def sample(question: str, answer: str, *, uid: str, advantage: float | None = None) -> dict:
    """A trajectory that searches once and answers."""
    passages = [
        {"id": "11", "title": '"France"', "text": "Its capital is Paris.", "score": 2.5},
        {"id": "12", "title": '"Peru"', "text": "Its capital is Lima.", "score": 1.5},
    ]
    return record(
        question,
        said("<think> look it up </think> <search> capital </search>", advantage),
        found("capital", *passages),
        said(f"<think> now I know </think> <answer> {answer} </answer>", advantage),
        uid=uid,
        em=float(answer == "Paris"),
    )


def unusual() -> dict:
    """A trajectory whose context was written anew after a summary that is paid and not trained.

    Its answer has a character of two tokens, which JavaScript counts as two of its own.
    """
    summary = said("a summary", 0.5, mask=[0, 0], is_aside=True, reward=0.25)
    engine = {"source": "forced", "text": "</search>", "token_ids": [5], "info": {}}
    answer = said("", 0.5) | {
        "text": "ok 🙂 <answer> Paris </answer>",
        "token_ids": [1, 2, 3, 4],
        "token_ends": [3, 3, 4, 29],
        "mask": [1, 1, 1, 1],
        "entropy": [0.1, 0.2, 0.3, None],
    }
    rewrites = [{"at": 2, "prompt": "a new context", "prompt_ids": [9]}]
    return record("Why?", summary, engine, answer, uid="r", em=1.0, rewrites=rewrites)


def write(path: Path, records: list[dict | str]) -> Path:
    """Writes a file of records; a text is written as it is, without the end of a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [r if isinstance(r, str) else json.dumps(r) + "\n" for r in records]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def write_run(folder: Path) -> Path:
    """A run of two recorded steps and a validation, with a hostile record and two broken lines."""
    capital = "What is the capital of France?"
    group = [
        sample(capital, answer, uid="a", advantage=advantage)
        for answer, advantage in (("Paris", 1.5), ("Lyon", -0.5), ("Nice", -0.5))
    ]
    alike = [sample("Where is Lima?", "Peru", uid="b", advantage=0.0) for _ in range(2)]
    hostile = record(
        HOSTILE,
        said(f"<think> {HOSTILE} </think> <answer> {HOSTILE}</script> </answer>", 0.0),
        found(HOSTILE, {"id": HOSTILE, "title": HOSTILE, "text": HOSTILE + "</script><b>"}),
        uid=HOSTILE,
        em=0.0,
        stop_reason=HOSTILE,
        data_source=HOSTILE,
        ground_truth=[HOSTILE],
    )
    trajectories = folder / "trajectories"
    write(trajectories / "train_000001.jsonl", [*group, *alike])
    later = [sample(capital, "Paris", uid="c", advantage=0.25) for _ in range(2)]
    write(
        trajectories / "train_000002.jsonl",
        [*later, hostile, '{"uid": "d"}\n', '{"uid": "e", "pro'],
    )
    write(trajectories / "val_000002.jsonl", [sample(capital, "Paris", uid="f")])
    (folder / "metrics.jsonl").write_text('{"training/global_step": 1}\n')
    return folder
