"""What of the lines of Ray's processes is shown, what is kept, and the first line of a run."""

import io
import logging

import pytest

from tests.configs import composed
from verl.trainer.config import validate
from verl.trainer.console import LOG, Filter, keeping, library_log, plan, show_tail

AT_THE_START = [
    "Loading weights: 100%|##########| 51/51 [00:00<00:00, 24105.20it/s]",
    "Triton is installed, but doesn't include CPU backend. Disabling Triton.",
    "vllm/triton_utils/dispatcher.py:138: FutureWarning: `torch.distributed.reduce_op` is "
    "deprecated, please use `torch.distributed.ReduceOp` instead",
    '  if hasattr(value, "__dict__"):',
    "[W1130 08:29:36.687915644 utils.cpp:68] Warning: NUMA binding: Using MEMBIND policy",
    "INFO 11-30 08:29:36 [core.py:71] Initializing a V1 LLM engine",
]
TRACEBACK = [
    "Traceback (most recent call last):",
    '  File "core.py", line 1, in run',
    "    start()",
    "ValueError: no room",
]
WRONG = [
    *TRACEBACK,
    "ERROR 11-30 08:29:36 [core.py:708] EngineCore failed to start.",
    "torch.OutOfMemoryError: CUDA out of memory.",
    "Fatal Python error: Segmentation fault",
    "terminate called after throwing an instance of 'c10::Error'",
    "[E1130 08:29:36.6 ProcessGroupNCCL.cpp:683] watchdog timeout",
    "[2026-11-30 08:29:36,1 E 17 17] (raylet) node_manager.cc:3041: workers killed",
]


def batch(lines, name="VLLMServer", pid=7, **more):
    return {"ip": "10.0.0.1", "pid": pid, "actor_name": name, "is_err": True, "lines": lines} | more


def test_what_engines_say_at_the_start_is_kept_and_what_is_wrong_is_shown_too():
    kept = io.StringIO()
    shown = []
    handle = keeping(kept, lambda lines: shown.extend(lines["lines"]))
    handle(batch(AT_THE_START))
    assert shown == []
    handle(batch(WRONG))
    assert shown == WRONG
    handle(batch(AT_THE_START))
    assert shown == WRONG
    expected = [*AT_THE_START, *WRONG, *AT_THE_START]
    assert kept.getvalue().splitlines() == [f"(VLLMServer pid=7) {line}" for line in expected]


def test_a_traceback_is_shown_whole_though_it_comes_in_parts_and_among_others():
    chosen = Filter()
    assert chosen.shown(batch(TRACEBACK[:2])) == TRACEBACK[:2]
    assert chosen.shown(batch(AT_THE_START, pid=8)) == []
    assert chosen.shown(batch([*TRACEBACK[2:], *AT_THE_START])) == TRACEBACK[2:]


def test_agent_workers_and_ray_are_shown_whatever_they_say():
    for batch_of in ({"name": "AgentLoopWorker"}, {"name": None, "pid": "raylet"}):
        assert Filter().shown(batch(["my reward: 1"], **batch_of)) == ["my reward: 1"]
    kept = io.StringIO()
    shown = []
    keeping(kept, shown.append)(batch(["Autoscaler status"], name=None, pid="autoscaler"))
    assert len(shown) == 1 and kept.getvalue() == ""


def test_warnings_of_a_library_go_to_the_log_and_its_errors_to_the_console(tmp_path):
    library = logging.getLogger("a_library")
    console = io.StringIO()
    library.addHandler(logging.StreamHandler(console))
    library.propagate = False
    with library_log(tmp_path, "a_library"):
        logging.getLogger("a_library.part").warning("token authentication is on")
        library.error("cannot start")
    library.warning("after the run")
    assert console.getvalue() == "cannot start\nafter the run\n"
    kept = (tmp_path / LOG).read_text()
    assert "token authentication is on" in kept and "cannot start" in kept and "after" not in kept


def test_the_tail_of_the_log_is_shown_with_its_name(tmp_path, capsys):
    show_tail(tmp_path)
    assert capsys.readouterr().err == ""
    with library_log(tmp_path, "a_library") as file:
        file.writelines(f"line {number}\n" for number in range(100))
    show_tail(tmp_path)
    shown = capsys.readouterr().err
    assert str(tmp_path / LOG) in shown and shown.endswith("  line 98\n  line 99\n")
    assert "line 50" not in shown


def test_a_log_that_cannot_be_written_does_not_stop_the_run(tmp_path, caplog):
    (tmp_path / "logs").touch()
    with library_log(tmp_path, "a_library") as file:
        file.write("lost\n")
    assert "is not kept" in caplog.text


@pytest.mark.parametrize(
    ("name", "overrides", "resumed", "expected"),
    [
        (
            "grpo",
            ["trainer.device=cpu"],
            None,
            "GRPO of data/closed_world/base (0.9 M parameters) on 3,840 questions of "
            "data/closed_world/train.parquet: 45 steps of 240 trajectories, 1 process on CPU; "
            "run folder runs/closed_world-grpo-seed0",
        ),
        (
            "ppo",
            ["trainer.device=cuda", "trainer.n_gpus_per_node=4", "trainer.nnodes=2"],
            20,
            "PPO of data/closed_world/base (0.9 M parameters) on 3,840 questions of "
            "data/closed_world/train.parquet: 45 steps of 240 trajectories, going on after step "
            "20, 8 GPUs on 2 machines; run folder runs/closed_world-ppo-seed0",
        ),
    ],
)
def test_the_first_line_says_what_is_trained_on_what_and_for_how_long(
    name, overrides, resumed, expected, monkeypatch
):
    from verl.utils.places import root

    monkeypatch.chdir(root())
    config = validate(composed(name, *overrides))
    steps = config.total_training_steps(3840)
    assert plan(config, 3840, steps, resumed) == expected
