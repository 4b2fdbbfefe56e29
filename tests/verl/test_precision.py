"""The precision of recipes that run on any machine."""

import pytest

from tests.configs import composed
from verl.trainer import precision


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
