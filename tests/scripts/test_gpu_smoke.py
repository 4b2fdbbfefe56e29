"""The smoke's driver: limits, what goes on after a failure, what is left out, what it leaves."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts" / "bench"))
import gpu_smoke  # noqa: E402  # pyright: ignore[reportMissingImports]

Stage: Any = gpu_smoke.Stage


def stage(name: str, code: str, limit_s: float = 60, needs: tuple[str, ...] = ()) -> Any:
    return Stage(name, f"does {name} work?", [sys.executable, "-c", code], limit_s, needs)


def run(*stages: Any, budget_s: float = 600) -> dict[str, Any]:
    outcomes = gpu_smoke.run_all(stages, os.environ, budget_s)
    assert [outcome.name for outcome in outcomes] == [stage.name for stage in stages]
    return {outcome.name: outcome for outcome in outcomes}


FAILS = "print('before'); raise SystemExit('<no>')"


def test_a_failure_stops_only_what_needs_it(capsys):
    found = run(
        stage("first", "print('RESULT {\"tokens\": 1}'); print('RESULT {\"tokens\": 2}')"),
        stage("breaks", FAILS),
        stage("depends", "print('never')", needs=("first", "breaks")),
        stage("last", "pass", needs=("first", "not asked for")),
    )
    assert {name: outcome.status for name, outcome in found.items()} == {
        "first": "ok",
        "breaks": "failed",
        "depends": "skipped",
        "last": "ok",
    }
    assert found["first"].figures == {"tokens": 2} and not found["first"].tail
    assert found["breaks"].tail == "before\n<no>" and found["breaks"].why == "exit status 1"
    assert found["depends"].why == "breaks failed" and found["depends"].seconds == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and lines[0].startswith("ok") and lines[0].endswith("tokens 2")


def test_a_stage_that_hangs_is_ended_with_its_children(tmp_path):
    """The child holds the pipe of the output: were it left, its end would be waited for."""
    child = "import signal; signal.pause()"
    code = f"import subprocess, sys; print('on'); subprocess.run([sys.executable, '-c', {child!r}])"
    found = run(stage("hangs", code, limit_s=2), stage("after", "pass", needs=("hangs",)))
    assert found["hangs"].status == "timeout" and found["hangs"].why == "not done within 2 s"
    assert found["after"].why == "hangs timeout"


def test_a_stage_that_fails_can_say_how_the_others_may_go_on():
    says = 'print(\'RESULT {"fallback": {"SMOKE_MODE": "old"}}\'); raise SystemExit(1)'
    reads = "import os; raise SystemExit(os.environ['SMOKE_MODE'] != 'old')"
    found = run(stage("new", says), stage("uses", reads, needs=("new",)))
    assert found["new"].status == "failed" and found["uses"].status == "ok"


def test_what_does_not_fit_into_the_time_is_left_out():
    found = run(stage("a", "pass"), budget_s=0)
    assert (found["a"].status, found["a"].why) == ("skipped", "the time is up")


def test_it_leaves_one_json_and_one_page(tmp_path):
    outcomes = gpu_smoke.run_all([stage("breaks", FAILS)], os.environ, 600)
    gpu_smoke.write_report(outcomes, tmp_path, "cpu", "2026-01-01T00:00:00Z")
    report = json.loads((tmp_path / "gpu_smoke.json").read_text())
    (entry,) = report["stages"]
    assert entry["status"] == "failed" and entry["limit_s"] == 60 and entry["tail"]
    assert report["device"] == "cpu" and report["commit"]
    page = (tmp_path / "gpu_smoke.html").read_text()
    assert "&lt;no&gt;" in page and "<no>" not in page and 'class="failed"' in page
    assert "http" not in page, "it needs no other file"


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_every_stage_names_a_script_that_is_there_and_stages_before_it(device, tmp_path):
    stages = gpu_smoke.stages_of(sys.executable, device, 989, tmp_path)
    names = [stage.name for stage in stages]
    assert names[:3] == ["versions", "runner", "attention"] and len(set(names)) == len(names)
    for place, each in enumerate(stages):
        assert set(each.needs) <= {"none", *names[:place]}, each.name
        assert each.command[1] == "-m" or (ROOT / each.command[1]).is_file(), each.name


def test_the_wrapper_uses_the_interpreter_that_it_is_given(tmp_path):
    command = ["bash", str(ROOT / "scripts/bench/gpu.sh"), "--python", sys.executable]
    done = subprocess.run([*command, "--only", "nothing"], capture_output=True, text=True)
    assert done.returncode == 2 and "--only nothing: the stages are versions, runner" in done.stderr
