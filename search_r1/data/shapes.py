"""Converts the native records of the benchmarks to one form: `question`, `golden_answers`, gold.

The keys of a record tell which benchmark it is from. A record that no shape fits is returned as it
is. All functions are pure. The docstring of a shape begins with the name that messages give it, up
to the first comma or colon.
"""

import ast
import json
import re
from collections.abc import Callable
from typing import Any

Record = dict[str, Any]
HOPS = re.compile(r"(\d)hop")
ANSWERS = ("golden_answers", "answers", "answer", "Answer")
YES_NO = {1: "yes", 0: "no", "YES": "yes", "NO": "no"}
DESCRIPTION = re.compile(r'\(description (?:"((?:[^"\\]|\\.)*)"|([^()\s]+))\)')


def supporting_facts(r: Record) -> Record:
    """HotpotQA and 2WikiMultiHopQA: the titles of their supporting facts."""
    titles = titles_of(r["supporting_facts"])
    return {
        **common(r, r.get("_id") or r.get("id")),
        "golden_answers": [r["answer"]],
        "gold_titles": titles,
        "hops": len(titles),
    }


def paragraphs(r: Record) -> Record:
    """MuSiQue, and HotpotQA with paragraphs: the titles of the supporting paragraphs.

    The number of hops is read from the id where it is given there.
    """
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
    """PopQA: a subject and a relation; the possible answers are a list in JSON."""
    answers = r.get("possible_answers")
    answers = json.loads(answers) if isinstance(answers, str) else answers
    if not answers:
        answers = [r["obj"], *json.loads(r.get("o_aliases") or "[]")]
    return {
        **common(r, r.get("id")),
        "golden_answers": answers,
        "gold_titles": [r["s_wiki_title"]],
        "hops": 1,
    }


def triviaqa(r: Record) -> Record:
    """TriviaQA: `Answer` (or `answer`) holds a value and its aliases."""
    answers = answers_in(r.get("Answer") or r["answer"])
    return {
        "id": r.get("QuestionId") or r.get("question_id"),
        "question": question_of(r),
        "golden_answers": answers,
    }


def natural_questions(r: Record) -> Record:
    """Natural Questions, from the hub or as published: the answers of all annotators.

    An annotator gave short answers, or yes or no.
    """
    annotations = r["annotations"]
    if isinstance(annotations, dict):  # the hub has columns
        columns = annotations.values()
        annotations = [
            dict(zip(annotations, values, strict=True)) for values in zip(*columns, strict=True)
        ]
    answers: list[str] = []
    for annotation in annotations:
        answers += short_answers(annotation["short_answers"], r)
        verdict = YES_NO.get(annotation.get("yes_no_answer"))
        answers += [verdict] if verdict else []
    question = r["question_text"] if "question_text" in r else r["question"]["text"]
    return {
        "id": r.get("id") or r.get("example_id"),
        "question": question,
        "golden_answers": list(dict.fromkeys(answers)),
    }


def short_answers(spans: Any, r: Record) -> list[str]:
    """The texts of the spans in a record of Natural Questions.

    A span has either its text or the positions of its tokens.
    """
    if isinstance(spans, dict):
        return list(spans["text"])
    return [span["text"] if "text" in span else tokens_between(r, span) for span in spans]


def tokens_between(r: Record, span: Record) -> str:
    """The words of a span without HTML tags."""
    tokens = (
        r["document_text"].split(" ")
        if "document_text" in r
        else [token["token"] for token in r["document_tokens"]]
    )
    return " ".join(
        token
        for token in tokens[span["start_token"] : span["end_token"]]
        if not token.startswith("<")
    )


def strategyqa(r: Record) -> Record:
    """StrategyQA: yes or no."""
    return {
        **common(r, r.get("qid") or r.get("id")),
        "golden_answers": ["yes" if r["answer"] else "no"],
    }


def webquestions(r: Record) -> Record:
    """WebQuestions: `targetValue` is `(list (description "…") …)`."""
    answers = [quoted or bare for quoted, bare in DESCRIPTION.findall(r["targetValue"])]
    return {"question": r["utterance"], "golden_answers": answers}


def verl_style(r: Record) -> Record:
    """A training row of another project, with its question as prompt or in `extra_info`."""
    extra = r.get("extra_info") or {}
    truth = r["reward_model"]["ground_truth"]
    prompt = r["prompt"]
    answers = truth["target"] if isinstance(truth, dict) and "target" in truth else truth
    question = r.get("question") or extra.get("question")
    question = question or (prompt if isinstance(prompt, str) else prompt[-1]["content"])
    return {"id": r.get("id"), "question": question, "golden_answers": answers_in(answers)}


def flashrag(r: Record) -> Record:
    """FlashRAG: gold titles are taken from `metadata` where the data set has them."""
    metadata = r.get("metadata") or {}
    titles = titles_of(metadata.get("supporting_facts") or [])
    if "s_wiki_title" in metadata:
        titles = [metadata["s_wiki_title"]]
    gold = {"gold_titles": titles, "hops": len(titles)} if titles else {}
    return {**common(r, r.get("id")), "golden_answers": answers_in(r["golden_answers"]), **gold}


def plain(r: Record) -> Record:
    """`question` and `answer` in any case: NQ-open, SQuAD, Bamboogle and others.

    The gold passages are those that `ctxs` marks as such.
    """
    answers = next((r[key] for key in ANSWERS if r.get(key) not in (None, "", [])), [])
    gold = [
        passage["title"]
        for passage in r.get("ctxs") or ()
        if isinstance(passage, dict) and passage.get("isgold")
    ]
    kept = {
        key: r[key]
        for key in ("gold_ids", "gold_titles", "hops", "data_source")
        if r.get(key) is not None
    }
    kept = {"gold_titles": list(dict.fromkeys(gold)), **kept} if gold else kept
    id = r.get("id") or r.get("_id")
    return {"id": id, "question": question_of(r), "golden_answers": answers_in(answers), **kept}


def answers_in(answers: object) -> Any:
    """The answers in the form of SQuAD (`text`) or TriviaQA (`value`, `aliases`), each once.

    Anything else is returned as it is, except that a printed list or dict is parsed.
    """
    answers = unprinted(answers)
    if isinstance(answers, dict):
        by_key = {key.lower(): value for key, value in answers.items()}
        if "text" in by_key:
            return different(by_key["text"])
        if "value" in by_key:
            return different([by_key["value"], *(by_key.get("aliases") or [])])
    if (
        isinstance(answers, list)
        and answers
        and all(isinstance(a, dict) and "text" in a for a in answers)
    ):
        return different([answer["text"] for answer in answers])
    return answers


def different(answers: object) -> object:
    """A list of texts without duplicates; anything else is returned as it is."""
    if isinstance(answers, list) and all(isinstance(answer, str) for answer in answers):
        return list(dict.fromkeys(answers))
    return answers


def unprinted(value: object) -> object:
    """A list or dict that is printed as Python or JSON, parsed; anything else as it is."""
    if not isinstance(value, str) or value[:1] + value[-1:] not in ("[]", "{}"):
        return value
    for parse in (json.loads, ast.literal_eval):
        try:
            parsed = parse(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
        return parsed if isinstance(parsed, list | dict) else value
    return value


def unfold(document: object) -> list[Record] | None:
    """The records in a file that is one object (SQuAD, TriviaQA, any with `data`), else None."""
    entries = document.get("Data") or document.get("data") if isinstance(document, dict) else None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        return None
    records: list[Record] = []
    for entry in entries:
        if isinstance(entry.get("paragraphs"), list):
            for paragraph in entry["paragraphs"]:
                records += paragraph.get("qas", ())
        else:
            records.append(entry)
    return records


def titles_of(facts: Any) -> list[str]:
    """The distinct titles of supporting facts.

    The facts are pairs of title and sentence, or a dict with a list of titles under `title`.
    """
    titles = facts["title"] if isinstance(facts, dict) else [fact[0] for fact in facts]
    return list(dict.fromkeys(titles))


def common(r: Record, id: object) -> Record:
    return {"id": id, "question": r["question"]}


def question_of(r: Record) -> Any:
    return r.get("question") or r.get("Question")


def has_value(answer: object) -> bool:
    return isinstance(answer, dict) and bool({"value", "Value"} & answer.keys())


def has(*keys: str) -> Callable[[Record], bool]:
    return lambda record: record.keys() >= set(keys)


SHAPES: list[tuple[Callable[[Record], bool], Callable[[Record], Record]]] = [
    (has("prompt", "reward_model"), verl_style),
    (has("annotations", "document_text"), natural_questions),
    (has("annotations", "document_tokens"), natural_questions),
    (lambda r: "annotations" in r and isinstance(r.get("question"), dict), natural_questions),
    (lambda r: bool(r.get("golden_answers")), flashrag),
    (has("question", "answer", "supporting_facts"), supporting_facts),
    (has("question", "answer", "paragraphs"), paragraphs),
    (has("question", "subj", "obj", "s_wiki_title"), popqa),
    (has("utterance", "targetValue"), webquestions),
    (lambda r: has_value(r.get("answer") or r.get("Answer")), triviaqa),
    (lambda r: isinstance(r.get("answer"), bool), strategyqa),
    (lambda r: bool(question_of(r)) and any(r.get(key) is not None for key in ANSWERS), plain),
]
"""Tests of a record with the shape to read it by; the first that fits is taken."""


def normalise(record: Record) -> Record | str:
    """The record in the common form, or what is wrong with it.

    The keys of the common form are `question`, `golden_answers` and, where known, `id`,
    `gold_titles` and `hops`.
    """
    reader = next((read for fits, read in SHAPES if fits(record)), None)
    if reader is None:
        return record
    try:
        return {k: v for k, v in reader(record).items() if v is not None}
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, StopIteration) as error:
        return (
            f"looks like {(reader.__doc__ or '').split(':')[0].split(',')[0]}, but is not "
            f"({error!r})"
        )
