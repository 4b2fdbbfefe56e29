"""The native records of the benchmarks, told by their keys, as `question`, `golden_answers` and what is known of gold.

Pure functions: a record that no shape fits is returned as it is.
"""

import json
import re
from collections.abc import Callable
from typing import Any

Record = dict[str, Any]
HOPS = re.compile(r"(\d)hop")
DESCRIPTION = re.compile(r'\(description (?:"((?:[^"\\]|\\.)*)"|([^()\s]+))\)')


def supporting_facts(r: Record) -> Record:
    """HotpotQA and 2WikiMultiHopQA: the titles of their supporting facts."""
    titles = titles_of(r["supporting_facts"])
    return {**common(r, r.get("_id")), "golden_answers": [r["answer"]], "gold_titles": titles, "hops": len(titles)}


def paragraphs(r: Record) -> Record:
    """MuSiQue, and HotpotQA with paragraphs: the titles of the supporting ones, hops from the id where it says so."""
    gold = [p["title"] for p in r["paragraphs"] if p.get("is_supporting") or p.get("is_gold")]
    hops = HOPS.search(str(r.get("id")))
    titles = list(dict.fromkeys(gold))
    answers = [r["answer"], *(r.get("answer_aliases") or [])]
    return {
        **common(r, r.get("id")),
        "golden_answers": answers,
        "gold_titles": titles,
        "hops": int(hops[1]) if hops else len(titles),
    }


def popqa(r: Record) -> Record:
    """PopQA: a relation of a subject; possible answers are printed as JSON."""
    answers = r.get("possible_answers")
    answers = json.loads(answers) if isinstance(answers, str) else answers
    if not answers:
        answers = [r["obj"], *json.loads(r.get("o_aliases") or "[]")]
    return {**common(r, r.get("id")), "golden_answers": answers, "gold_titles": [r["s_wiki_title"]], "hops": 1}


def triviaqa(r: Record) -> Record:
    """TriviaQA: `Answer` (or `answer`) holds a value and its aliases."""
    answer = {key.lower(): value for key, value in (r.get("Answer") or r["answer"]).items()}
    answers = list(dict.fromkeys([answer["value"], *(answer.get("aliases") or [])]))
    return {"id": r.get("QuestionId") or r.get("question_id"), "question": question_of(r), "golden_answers": answers}


def strategyqa(r: Record) -> Record:
    """StrategyQA: yes or no."""
    return {**common(r, r.get("qid") or r.get("id")), "golden_answers": ["yes" if r["answer"] else "no"]}


def webquestions(r: Record) -> Record:
    """WebQuestions: `targetValue` is `(list (description "…") …)`."""
    answers = [quoted or bare for quoted, bare in DESCRIPTION.findall(r["targetValue"])]
    return {"question": r["utterance"], "golden_answers": answers}


def verl_style(r: Record) -> Record:
    """A training row of another project, whose prompt is the bare question or keeps it in `extra_info`."""
    extra, truth = r.get("extra_info") or {}, r["reward_model"]["ground_truth"]
    answers = truth.get("target") if isinstance(truth, dict) else truth
    question = r.get("question") or extra.get("question") or r["prompt"][-1]["content"]
    return {"id": r.get("id"), "question": question, "golden_answers": answers}


def flashrag(r: Record) -> Record:
    """FlashRAG: gold titles out of `metadata`, where the data set has them."""
    metadata = r.get("metadata") or {}
    titles = titles_of(metadata.get("supporting_facts") or [])
    if "s_wiki_title" in metadata:
        titles = [metadata["s_wiki_title"]]
    gold = {"gold_titles": titles, "hops": len(titles)} if titles else {}
    return {**common(r, r.get("id")), "golden_answers": r["golden_answers"], **gold}


def plain(r: Record) -> Record:
    """`question` and `answer` under whatever case: NQ-open, Bamboogle, R1-Searcher. Gold is what `ctxs` marks so."""
    answer = next(r[key] for key in ("golden_answers", "answers", "answer", "Answer") if r.get(key) is not None)
    gold = [passage["title"] for passage in r.get("ctxs") or () if isinstance(passage, dict) and passage.get("isgold")]
    kept = {key: r[key] for key in ("gold_ids", "gold_titles", "hops", "data_source") if r.get(key) is not None}
    kept = {"gold_titles": list(dict.fromkeys(gold)), **kept} if gold else kept
    return {"id": r.get("id") or r.get("_id"), "question": question_of(r), "golden_answers": answer, **kept}


def titles_of(facts: Any) -> list[str]:
    """The different titles of supporting facts: pairs of title and sentence, or a list of titles under `title`."""
    titles = facts["title"] if isinstance(facts, dict) else [fact[0] for fact in facts]
    return list(dict.fromkeys(titles))


def common(r: Record, id: Any) -> Record:
    return {"id": id, "question": r["question"]}


def question_of(r: Record) -> Any:
    return r.get("question") or r.get("Question")


def has(*keys: str) -> Callable[[Record], bool]:
    return lambda record: record.keys() >= set(keys)


SHAPES: list[tuple[Callable[[Record], bool], Callable[[Record], Record]]] = [
    (has("prompt", "reward_model"), verl_style),
    (has("golden_answers"), flashrag),
    (has("question", "answer", "supporting_facts"), supporting_facts),
    (has("question", "answer", "paragraphs"), paragraphs),
    (has("question", "subj", "obj", "s_wiki_title"), popqa),
    (has("utterance", "targetValue"), webquestions),
    (lambda r: isinstance(r.get("answer") or r.get("Answer"), dict), triviaqa),
    (lambda r: isinstance(r.get("answer"), bool), strategyqa),
    (lambda r: bool(question_of(r)) and any(r.get(k) is not None for k in ("answers", "answer", "Answer")), plain),
]
"""The first that fits is taken."""


def normalise(record: Record) -> Record | str:
    """The record as `question`, `golden_answers` and, where known, `id`, `gold_titles`, `hops`; or what is wrong."""
    reader = next((read for fits, read in SHAPES if fits(record)), None)
    if reader is None:
        return record
    try:
        return {k: v for k, v in reader(record).items() if v is not None}
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, StopIteration) as error:
        return f"looks like {(reader.__doc__ or '').split(':')[0]}, but is not ({error!r})"
