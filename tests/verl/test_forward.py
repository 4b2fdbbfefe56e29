"""Packed rows give what the plain Hugging Face model gives row by row, whatever the attention;
gradients too."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from tests.distributed import run_ranks
from tests.models import perturb
from tests.verl.batches import VOCAB, ragged_batch
from verl.protocol import DataProto
from verl.single_controller.worker import Worker
from verl.workers.config import FSDPConfig, ModelConfig, OptimConfig
from verl.workers.forward import forward_log_probs, forward_values, pack
from verl.workers.fsdp_model import build_model, build_train_state
from verl.workers.update import Budget, empty_rows, micro_batches

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}
FLOAT32 = FSDPConfig(model_dtype="float32", dtype="float32")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders: a Qwen2, and a Mistral whose window is shorter than most rows."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    for name, model in {
        "qwen2": Qwen2ForCausalLM(Qwen2Config(**SIZES)),
        "window": MistralForCausalLM(MistralConfig(**SIZES, sliding_window=4)),
    }.items():
        perturb(model, seed=0, scale=0.2)
        model.save_pretrained(folder / name)
    return folder


def by_hand(path: Path, data: DataProto, temperature: float) -> torch.Tensor:
    """Log-probs of the trained tokens, each row alone through the unmodified model."""
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()
    batch = data.batch
    result = torch.zeros(batch["responses"].shape)
    for row in range(len(data)):
        real = batch["attention_mask"][row].bool()
        ids = torch.cat([batch["prompts"][row], batch["responses"][row]])[real]
        size = int(real[batch["prompts"].shape[1] :].sum())
        log_p = (model(ids[None]).logits[0, -size - 1 : -1] / temperature).log_softmax(-1)
        result[row, :size] = log_p.gather(-1, ids[-size:, None])[:, 0]
    return torch.where(batch["response_mask"].bool(), result, 0.0).detach()


def packed_log_probs(path: str, attention: str | None) -> torch.Tensor:
    overrides = {"attn_implementation": attention} if attention else {}
    model = build_model(
        ModelConfig(path=path, override_config=overrides), "lm", FLOAT32, Worker().mesh
    )
    return forward_log_probs(model, ragged_batch(torch.float32), 0.7, with_entropy=True)[0].detach()


@pytest.mark.parametrize(
    ("name", "attention"),
    [("qwen2", None), ("qwen2", "sdpa"), ("qwen2", "eager"), ("window", None)],
)
def test_packed_rows_equal_rows_alone(models, name, attention):
    path = models / name
    (found,) = run_ranks(1, packed_log_probs, str(path), attention)
    torch.testing.assert_close(
        found, by_hand(path, ragged_batch(torch.float32), 0.7), atol=2e-5, rtol=1e-5
    )


def test_attention_that_cannot_be_packed_says_so(models):
    from verl.workers.attention import packed_attention

    x = torch.zeros(1, 2, 3, 4)
    with pytest.raises(ValueError, match="attn_implementation"):
        packed_attention(torch.nn.Module(), x, x, x, None, softcap=50.0)


def variants(path: str, kinds: list[str]) -> list[tuple[list[torch.Tensor], int]]:
    """Whole gradients of a batch, and numbers kept for the backward pass, with each option of the
    model."""
    return [gradient(path, kind) for kind in kinds]


def gradient(path: str, kind: str) -> tuple[list[torch.Tensor], int]:
    config = ModelConfig(
        path=path,
        enable_gradient_checkpointing=kind == "checkpointing",
        use_torch_compile=kind == "compile",
    )
    model = build_model(config, "lm", FLOAT32, Worker().mesh)
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        log_probs, entropy = forward_log_probs(
            model, ragged_batch(torch.float32), 0.7, with_entropy=True
        )
    assert entropy is not None
    (log_probs.sum() + entropy.sum()).backward()
    return [p.grad.full_tensor() for p in model.parameters()], sum(kept.values())


@pytest.mark.parametrize("ranks", [1, 2])
def test_checkpointing_and_compiling_leave_the_gradient(models, ranks):
    kinds = ["plain", "checkpointing", "compile"][: 4 - ranks]
    (plain, kept), *others = run_ranks(ranks, variants, str(models / "qwen2"), kinds)[0]
    for gradients, _ in others:
        for a, b in zip(plain, gradients, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    assert others[0][1] < 0.5 * kept  # activations of the layers are recomputed, not kept


def values_and_nothing(path: str) -> tuple[torch.Tensor, torch.Tensor, float]:
    data = ragged_batch(torch.float32)
    critic = build_model(ModelConfig(path=path), "value", FLOAT32, Worker().mesh)
    values = forward_values(critic, data).detach()
    alone = torch.cat([forward_values(critic, data[[row]]) for row in range(len(data))]).detach()
    forward_values(critic, empty_rows(data)).sum().backward()
    return values, alone, max(float(p.grad.full_tensor().abs().max()) for p in critic.parameters())


def test_values_and_rows_without_a_trained_token(models):
    ((values, alone, grad),) = run_ranks(1, values_and_nothing, str(models / "qwen2"))
    torch.testing.assert_close(values, alone, atol=1e-5, rtol=1e-5)
    assert not values[~ragged_batch(torch.float32).batch["response_mask"].bool()].any()
    assert grad == 0.0


def half_precision(path: str) -> tuple[list[str], list[str]]:
    fsdp = FSDPConfig(model_dtype="float32", dtype="bfloat16", optimizer_offload=True)
    state = build_train_state(
        build_model(ModelConfig(path=path), "lm", fsdp, Worker().mesh), OptimConfig(), 1, fsdp
    )
    log_probs, _ = forward_log_probs(
        state.model, ragged_batch(torch.float32), 1.0, with_entropy=False
    )
    log_probs.sum().backward()
    state.optimizer.step()
    state.offload_optimizer()
    moments = [v for s in state.optimizer.state.values() for v in s.values()]
    return [str(log_probs.dtype), *(str(p.dtype) for p in state.model.parameters())], [
        str(m.dtype) for m in moments
    ]


def test_half_precision_keeps_masters_and_moments_in_float32(models):
    for dtypes, moments in run_ranks(2, half_precision, str(models / "qwen2")):
        assert set(dtypes) == {"torch.float32"} and set(moments) == {"torch.float32"}


@given(
    st.lists(st.integers(1, 60), min_size=0, max_size=40),
    st.integers(1, 100),
    st.none() | st.integers(1, 9),
    st.integers(1, 50),
)
def test_micro_batches_hold_every_row_once_within_the_budget(lengths, tokens, rows, at_least):
    parts = micro_batches(lengths, Budget(tokens, rows), at_least)
    assert sorted(i for part in parts for i in part) == list(range(len(lengths)))
    assert len(parts) >= at_least and all(parts[: min(len(parts), len(lengths))])
    for part in parts:
        assert len(part) <= (rows or 40)
        assert len(part) == 1 or sum(lengths[i] for i in part) <= tokens


def test_micro_batches_are_no_more_than_needed():
    assert micro_batches([100, *[10] * 10], Budget(100)) == [list(range(1, 11)), [0]]
    assert micro_batches([10] * 4, Budget(20)) == [[0, 3], [1, 2]]
    assert micro_batches([10] * 4, Budget(1000, 2)) == [[0, 3], [1, 2]]
    assert micro_batches([10] * 4, Budget(1000)) == [[0, 1, 2, 3]]
    assert micro_batches([10], Budget(1000), at_least=2) == [[0], []]


def test_positions_begin_at_zero_in_every_row():
    """Families with learned positions would see it; a shift of all of them is nothing to rotary
    ones."""
    batch = ragged_batch(torch.float32)
    lengths = batch.batch["attention_mask"].sum(1).tolist()
    expected = [position for length in lengths for position in range(length)]
    assert pack(batch).inputs["position_ids"].tolist() == [expected]
