"""The engine follows its server, played by plain processes."""

import subprocess
import sys

import psutil
import pytest

ENGINE = "import os, time; from verl.workers.rollout.engine_process import FollowServer; "
FOLLOW = "FollowServer().follow({server}); print('ready', flush=True); time.sleep(60)"
START = (
    "import os, subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}.replace('SERVER', str(os.getpid()))])"
)


@pytest.mark.parametrize("levels", [1, 2], ids=["engine is the worker", "worker under the engine"])
def test_a_killed_server_takes_its_engine_along(levels):
    code = ENGINE + FOLLOW.format(server="SERVER")
    if levels == 2:
        code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}])"
    with subprocess.Popen([sys.executable, "-c", START.format(code=code)], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None and server.stdout.readline() == "ready\n"
        family = psutil.Process(server.pid).children(recursive=True)
        assert len(family) == levels
        server.kill()
        _, alive = psutil.wait_procs(family, timeout=10)
    assert not alive
