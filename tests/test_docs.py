"""The configuration reference is what the models say."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_configuration_reference_is_up_to_date():
    command = [sys.executable, "scripts/config_reference.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, "run: python scripts/config_reference.py\n" + done.stderr


def test_launch_scripts_are_short_and_scripts_parse():
    for name in ("train_ppo.sh", "train_grpo.sh"):
        assert len((ROOT / name).read_text().splitlines()) < 25
    for script in [*ROOT.glob("*.sh"), *ROOT.glob("scripts/**/*.sh"), ROOT / ".ci" / "run"]:
        subprocess.run(["bash", "-n", str(script)], check=True)
