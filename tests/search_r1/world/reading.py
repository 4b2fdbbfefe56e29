"""How well a base model reads the traces of a writer."""

import torch

from search_r1.world.traces import encode_trace


def share_read(model, tokenizer, writer) -> float:
    """Share of the copied words of 60 traces that the model says right, greedily."""
    right = total = 0
    for _ in range(60):
        row = encode_trace(writer(), tokenizer)
        ids = torch.tensor([row["input_ids"]])
        read = torch.tensor(row["read_mask"])[1:].bool()
        guessed = model(ids).logits[0, :-1].argmax(-1)
        right = right + int((guessed == ids[0, 1:])[read].sum())
        total = total + int(read.sum())
    return right / total
