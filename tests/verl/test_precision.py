"""The precision of recipes that run on any machine."""

import pytest

from tests.configs import composed
from verl.trainer import precision
from verl.trainer.config import validate

TRAINER = "actor_rollout_ref.actor.fsdp_config.dtype"
ENGINE = "actor_rollout_ref.rollout.dtype"


@pytest.mark.parametrize(
    ("gpu", "lines", "expected"),
    [
        (True, "flags\t\t: fpu avx2\n", "bfloat16"),
        (False, "model name\t: x\nflags\t\t: fpu avx2\n", "float32"),
        (False, "processor : 0\nflags : fpu avx512_bf16\n\nflags : fpu\n", "bfloat16"),
        (False, "Features\t: fp asimd bf16 i8mm\n", "bfloat16"),
        (False, "nothing of the kind\n", "float32"),
        (False, None, "float32"),
    ],
)
def test_bfloat16_is_for_machines_that_multiply_it(tmp_path, monkeypatch, gpu, lines, expected):
    info = tmp_path / "cpuinfo"
    if lines is not None:
        info.write_text(lines)
    monkeypatch.setattr(precision, "CPU_INFO", info)
    monkeypatch.setattr(precision, "gpu_is_meant", lambda: gpu)
    assert precision.fast_precision() == expected
    config = composed("grpo", "experiment=smollm2_nq")["actor_rollout_ref"]
    assert config["rollout"]["dtype"] == expected
    assert all(config[role]["fsdp_config"]["dtype"] == expected for role in ("actor", "ref"))


@pytest.mark.parametrize(
    ("flags", "overrides", "cures"),
    [
        ("avx2", [f"{TRAINER}=bfloat16", f"{ENGINE}=bfloat16"], [TRAINER, ENGINE]),
        ("avx2", [f"{ENGINE}=bfloat16"], [ENGINE]),
        ("avx2", [], []),
        ("avx512_bf16", [f"{TRAINER}=bfloat16"], []),
        ("avx2", [f"{TRAINER}=bfloat16", "trainer.device=cuda"], []),
    ],
)
def test_a_precision_that_the_processor_lacks_is_told(monkeypatch, flags, overrides, cures):
    monkeypatch.setattr(precision, "cpu_flags", lambda: {flags})
    config = validate(composed("grpo", "trainer.device=cpu", *overrides))
    told = precision.slow_precision(config) or ""
    assert [word for word in told.split() if "=" in word] == [f"{key}=float32" for key in cures]
