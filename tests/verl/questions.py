"""Rows of question files."""


def row(source="set", text="Who?", target=("A",)):
    return {
        "data_source": source,
        "prompt": [{"role": "user", "content": text}],
        "reward_model": {"ground_truth": {"target": list(target)}},
    }
