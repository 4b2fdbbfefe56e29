"""The engine follows its server, both played by plain processes, and the server its engine, both
real."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.models import make_tiny_qwen2
from tests.processes import PATIENCE_S

pytestmark = pytest.mark.cpu_engine

ROOT = Path(__file__).parents[3]

SERVER = """
import asyncio, os, sys
import psutil
from verl.workers.config import ModelConfig, RolloutConfig
from verl.rollout.vllm_server import VLLMServer

async def main():
    config = RolloutConfig(dtype="float32", cpu_kvcache_gb=0.1)
    server = VLLMServer(
        config,
        ModelConfig(path=sys.argv[1]),
        max_model_len=64,
        device="cpu",
        replica_rank=0,
        num_replicas=1,
    )
    await server.start()
    (engine,) = [p for p in psutil.Process().children() if "EngineCore" in "".join(p.cmdline())]
    engine.kill()
    await server.wait_for_death()

if __name__ == "__main__":
    asyncio.run(main())
"""
ENGINE = "import os, time; from verl.rollout.engine_process import FollowServer; "
FOLLOW = "FollowServer().follow({server}); print('ready', flush=True); time.sleep(3600)"
START = (
    "import os, subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}.replace('SERVER', "
    "str(os.getpid()))])"
)


def test_a_killed_engine_takes_its_server_along_when_nothing_is_generated(tmp_path):
    (tmp_path / "serve.py").write_text(SERVER)
    command = [sys.executable, str(tmp_path / "serve.py"), make_tiny_qwen2(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=PATIENCE_S
    )
    assert done.returncode == 1


@pytest.mark.parametrize("levels", [1, 2], ids=["engine is the worker", "worker under the engine"])
def test_a_killed_server_takes_its_engine_along(levels):
    code = ENGINE + FOLLOW.format(server="SERVER")
    if levels == 2:
        code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}])"
    with subprocess.Popen(
        [sys.executable, "-c", START.format(code=code)], stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None and server.stdout.readline() == "ready\n"
        family = psutil.Process(server.pid).children(recursive=True)
        assert len(family) == levels
        server.kill()
        _, alive = psutil.wait_procs(family, timeout=10)
    assert not alive
