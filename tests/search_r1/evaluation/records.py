"""Trajectory records made by hand."""


def passage(id, text="x"):
    return {"id": id, "title": f'"T{id}"', "text": text, "score": 1.0}


def record(
    question, searches, em=0.0, gold=("1", "2"), stop="answer", by_title=False, source="set"
):
    """`searches`: (query, passages) pairs."""
    segments = []
    for query, passages in searches:
        segments.append({"source": "model", "text": "s", "token_ids": [1, 2], "info": {}})
        segments.append(
            {
                "source": "observation",
                "text": "o",
                "token_ids": [3] * 5,
                "info": {"query": query, "passages": passages, "latency_s": 0.5},
            }
        )
    segments.append({"source": "model", "text": "a", "token_ids": [1], "info": {}})
    known = {"gold_titles": [f"T{g}" for g in gold]} if by_title else {"gold_ids": list(gold)}
    return {
        "data_source": source,
        "prompt": f"Question: {question}",
        "segments": segments,
        "stop_reason": stop,
        "reward": {"em": em, "f1": em, "sub_em": em},
        "ground_truth": {"target": ["Rome"]},
        "info": {"turns": len(searches) + 1, "valid_actions": len(searches) + (stop == "answer")},
        "extra_info": {"question": question, **known},
    }
