"""vLLM's second model runner, which a GPU gets and the CPU engine never: what of it is Python and
torch.

Its kernels are Triton's, so they are replaced by what they compute; that they do is the smoke's
first question (scripts/bench/gpu.sh). Left is what is asked of them: after which steps log-probs
are taken, and for whom.
"""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm import SamplingParams
from vllm.v1.worker.gpu.sample import logprob as logprob_module
from vllm.v1.worker.gpu.sample import sampler as sampler_module
from vllm.v1.worker.gpu.sample import states
from vllm.v1.worker.gpu.sample.prompt_logprob import PromptLogprobsWorker
from vllm.v1.worker.gpu.sample.sampler import Sampler

logprob: Any = logprob_module
sampler: Any = sampler_module
ROWS = 4
VOCAB = 32


class OnHost:
    """Memory that CPU and GPU both see."""

    def __init__(self, size: Any, dtype: torch.dtype, **_: Any) -> None:
        self.cpu = torch.zeros(size, dtype=dtype)
        self.np = self.cpu.numpy()
        self.gpu = self.cpu

    def copy_to_uva(self, n: int | None = None) -> torch.Tensor:
        return self.gpu


def divide(logits: torch.Tensor, rows: torch.Tensor, temperature: torch.Tensor) -> None:
    """Temperature, in place, as `_temperature_kernel` does: 0 and 1 leave the logits as they
    are."""
    chosen = temperature[rows]
    logits /= torch.where(chosen == 0, 1.0, chosen)[:, None]


class Kernel:
    """What `kernel[grid](...)` launches."""

    def __init__(self, body: Any) -> None:
        self.body = body

    def __getitem__(self, grid: Any) -> Any:
        return self.body


def take_log_probs(out: Any, logits: Any, _1: Any, ids: Any, *_: Any, **__: Any) -> None:
    """`_topk_log_softmax_kernel`: float32 over the logits that it is given."""
    out.copy_(logits.float().log_softmax(-1).gather(1, ids))


def choose(
    logits: torch.Tensor, rows: Any, temperature: Any, seeds: Any, *_: Any, **__: Any
) -> torch.Tensor:
    """In the place of `gumbel_sample`: the second best token."""
    return logits.topk(2).indices[:, 1]


@pytest.fixture
def make(monkeypatch):
    """Builds the runner's sampler as our engine configures it."""
    monkeypatch.setattr(states, "UvaBackedTensor", OnHost)
    monkeypatch.setattr(logprob, "UvaBackedTensor", OnHost)
    monkeypatch.setattr(logprob, "StagedWriteTensor", OnHost)
    monkeypatch.setattr(states, "apply_temperature", divide)
    monkeypatch.setattr(sampler, "gumbel_sample", choose)
    monkeypatch.setattr(logprob, "_topk_log_softmax_kernel", Kernel(take_log_probs))
    monkeypatch.setattr(logprob, "_ranks_kernel", Kernel(lambda *_, **__: None))
    monkeypatch.setattr(logprob.triton, "next_power_of_2", lambda n: n, raising=False)
    monkeypatch.setattr(sampler, "flashinfer_sample", lambda *_: pytest.fail("a fused sampler"))
    for name in ("PenaltiesState", "LogitBiasState", "BadWordsState", "ThinkingBudgetState"):
        monkeypatch.setattr(sampler, name, Unused)
    monkeypatch.setattr(sampler, "get_num_sampled_and_rejected", lambda *_: (None, None))
    monkeypatch.setattr(sampler.LogitsProcRequestState, "from_request_state", lambda _: None)

    def build() -> Sampler:
        requests: Any = SimpleNamespace(prefill_len=SimpleNamespace(gpu=None))
        config: Any = SimpleNamespace(reasoning_config=None)
        made = Sampler(config, ROWS, VOCAB, torch.device("cpu"), requests, "processed_logprobs")
        made.use_flashinfer = True  # where it is, it must not take what needs log-probs
        return made

    return build


class Unused:
    """A processor of the logits that no request of ours asks for."""

    def __init__(self, *_: Any) -> None:
        pass

    def add_request(self, index: int, params: SamplingParams) -> bool:
        return False

    def apply(self, logits: torch.Tensor, context: Any) -> torch.Tensor:
        return logits


def batch() -> Any:
    """Every row decodes one token."""
    rows = torch.arange(ROWS)
    return SimpleNamespace(
        expanded_idx_mapping=rows,
        idx_mapping=rows,
        idx_mapping_np=rows.numpy(),
        cu_num_logits_np=np.arange(ROWS + 1),
        cu_num_logits=None,
        expanded_local_pos=torch.zeros(ROWS),
        positions=rows,
        logits_indices=rows,
        input_ids=rows,
        seq_lens_cpu_upper_bound=rows,
        seq_lens=torch.ones(ROWS),
        num_reqs=ROWS,
    )


def params(**more: Any) -> SamplingParams:
    """As `VLLMServer.generate` makes them."""
    return SamplingParams(**({"temperature": 1.0, "logprobs": 0, "max_tokens": 4} | more))


LOGITS = torch.randn(ROWS, VOCAB, generator=torch.Generator().manual_seed(0)).bfloat16()


def run(sampler_: Sampler, *rows: SamplingParams) -> Any:
    for index, each in enumerate(rows):
        sampler_.add_request(index, each)
    return sampler_(LOGITS.clone(), batch())


def test_log_probs_are_those_after_temperature_of_the_sampled_token_alone(make):
    temperatures = [1.0, 0.7, 0.0, 2.0]
    out = run(make(), *(params(temperature=t) for t in temperatures))
    found = out.logprobs_tensors.logprobs
    ids = out.logprobs_tensors.logprob_token_ids
    assert found.shape == (ROWS, 1) and found.dtype == torch.float32, "logprobs=0: one a token"
    scale = torch.tensor([t or 1.0 for t in temperatures])[:, None]
    expected = (LOGITS.float() / scale).log_softmax(-1).gather(1, ids)
    torch.testing.assert_close(found, expected)
    assert torch.equal(ids[:, 0], out.sampled_token_ids[:, 0])


def test_log_probs_are_those_after_truncation_and_no_fused_sampler_takes_them(make):
    out = run(make(), params(top_k=3), params(top_p=0.5), params(), params())
    ids = out.logprobs_tensors.logprob_token_ids
    kept = LOGITS[0].float().topk(3)
    place = kept.indices.tolist().index(int(ids[0]))
    expected = kept.values.log_softmax(-1)[place]
    assert float(out.logprobs_tensors.logprobs[0]) == pytest.approx(float(expected), abs=1e-6)


def test_without_log_probs_none_are_computed(make):
    assert run(make(), *(params(logprobs=None) for _ in range(ROWS))).logprobs_tensors is None


def test_seeds_are_kept_and_others_are_drawn(make):
    made = make()
    run(made, params(seed=7), params(), params(), params(seed=7))
    seeds = made.sampling_states.seeds.np
    assert seeds[0] == seeds[3] == 7 and len({int(seed) for seed in seeds}) == 3
    assert made.sampling_states.seeds_set.tolist() == [True, False, False, True]


def test_a_slot_that_is_used_again_keeps_nothing_of_the_request_before(make):
    """What sleep level 2 drops of the sampler is written anew by every request."""
    made = make()
    run(made, *(params(temperature=0.5, top_k=2, seed=1) for _ in range(ROWS)))
    out = run(made, *(params(logprobs=0) for _ in range(ROWS)))
    ids = out.logprobs_tensors.logprob_token_ids
    expected = LOGITS.float().log_softmax(-1).gather(1, ids)
    torch.testing.assert_close(out.logprobs_tensors.logprobs, expected)


def test_prompts_have_no_log_probs():
    worker = PromptLogprobsWorker(ROWS, torch.device("cpu"))
    worker.add_request("r0", 0, params())
    assert not worker.uses_prompt_logprobs.any() and not worker.token_id_scores
