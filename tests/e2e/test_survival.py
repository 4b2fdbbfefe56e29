"""Runs that are killed, starved, stopped and frozen.

Each test says what was done to the run, and what was compared.
"""

import json
import os
import shutil
import signal
import subprocess
from contextlib import contextmanager

import psutil
import pytest

from search_r1.launch import free_port
from tests.e2e.runs import CORPUS, QUESTIONS, arguments, metrics, start
from tests.models import make_tiny_qwen2
from tests.processes import PATIENCE_S, family, wait_for
from tests.retrieval import retrieval_server, write_corpus
from verl.protocol import DataProto
from verl.utils.dataset import ResumableSampler

pytestmark = pytest.mark.cpu_engine

UNCOMPARED = ("timing_s/", "perf/", "latency")
"""Metrics that are times."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_qwen2(tmp_path_factory.mktemp("model"))


class Run:
    """The real command over the task of slow.py, with all its processes."""

    def __init__(self, folder, model, environment, prefix=(), **settings):
        fixed = {"max_turns": None, "trainer__save_hf": "false", "trainer__test_freq": 1000}
        settings = {**fixed, **settings}
        extra = [] if not settings.pop("deterministic", False) else ["+mode=deterministic"]
        self.folder = folder
        (env, self.alive) = environment
        self.log = folder / "output.txt"
        overrides = ["--config-dir", "tests/e2e", *arguments(folder, model, **settings), *extra]
        with self.log.open("a") as output:
            self.process = start("slow", overrides, env, prefix, output)

    @property
    def output(self):
        return self.log.read_text()

    def steps(self):
        return [
            line["training/global_step"]
            for line in metrics(self.folder)
            if "critic/score/mean" in line
        ]

    def reached(self, step):
        wait_for(lambda: step in self.steps() or self.process.poll() is not None, PATIENCE_S)
        assert step in self.steps(), self.output[-3000:]

    def pids(self, name):
        """Processes of the run by a part of their title, the eldest first."""
        found = []
        for pid in self.alive():
            try:
                process = psutil.Process(pid)
                found += (
                    [(process.create_time(), pid)] if name in " ".join(process.cmdline()) else []
                )
            except psutil.Error:
                continue
        return [pid for _, pid in sorted(found)]

    def kill(self, name, which=0):
        """SIGKILL for such a process, by age."""
        wait_for(lambda: len(self.pids(name)) > which)
        os.kill(self.pids(name)[which], signal.SIGKILL)

    def kill_everything(self):
        while pids := self.alive():
            for pid in pids:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            self.process.poll()

    def ends(self, status=0):
        assert self.process.wait(PATIENCE_S) == status, self.output[-4000:]
        wait_for(lambda: not self.alive())  # no orphan, no Ray


def prompts(folder):
    """The questions of every training step, in the order of training."""
    steps = {}
    for path in sorted((folder / "run/trajectories").glob("train_*.jsonl")):
        records = [json.loads(line) for line in path.open()]
        steps[int(path.stem.split("_")[1])] = list(
            dict.fromkeys(r["extra_info"]["index"] for r in records)
        )
    return steps


def sampled(folder, step):
    path = folder / f"run/trajectories/train_{step:06d}.jsonl"
    return [[s["token_ids"] for s in json.loads(line)["segments"]] for line in path.open()]


def compared(line):
    return {k: v for k, v in line.items() if not any(part in k for part in UNCOMPARED)}


def drawn(steps, batch_size):
    """What the sampler draws for these many steps."""
    order = ResumableSampler(len(QUESTIONS), seed=0, shuffle=True)
    return {step: order.take(batch_size) for step in range(1, steps + 1)}


BITS = {
    "trainer__total_training_steps": 6,
    "trainer__save_freq": 3,
    "trainer__save_hf": "true",
    "data__train_batch_size": 3,
    "actor_rollout_ref__rollout__n": 2,
    "actor_rollout_ref__actor__ppo_mini_batch_size": 3,
    "actor_rollout_ref__actor__optim__lr": 1e-3,
    "critic__ppo_mini_batch_size": 3,
    "deterministic": True,
}


def test_killed_and_resumed_to_the_last_bit(tmp_path, model):
    """A run that was killed and resumed equals an undisturbed one to the last bit.

    All its processes get SIGKILL in step 5 of 6, and it is resumed from the checkpoint of step 3.
    Prompts, tokens, losses and final weights are those of the undisturbed run.
    """
    straight, killed = (tmp_path / name for name in ("straight", "killed"))
    straight.mkdir()
    killed.mkdir()
    with family() as environment:
        Run(straight, model, environment, **BITS).ends()
        run = Run(killed, model, environment, **BITS)
        run.reached(4)
        run.kill_everything()
        assert max(run.steps()) < 6 and (killed / "run/global_step_3").is_dir()
        Run(killed, model, environment, **BITS).ends()
        assert "resuming after step 3" in run.output

    expected = metrics(straight)
    resumed = metrics(killed)
    assert [compared(line) for line in resumed] == [compared(line) for line in expected]
    assert prompts(killed) == prompts(straight) == drawn(6, 3)
    for step in range(1, 7):
        assert sampled(killed, step) == sampled(straight, step)
    weights = [f / "run/hf/model.safetensors" for f in (straight, killed)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.mark.slow
def test_resumed_on_two_ranks_instead_of_one(tmp_path, model):
    """A checkpoint of one rank is resumed on two, beside the run that goes on with one.

    The prompts come in the same order. The first step has the same tokens, and a loss within
    rounding: each log-prob is off by at most d (what trainer and engine, two implementations of the
    same sums, differ by in these runs, at most 1e-5), so that the loss, a mean of A * ratio, is off
    by at most 2 d max|A|. Later steps drift apart, because Adam divides rounding by rounding where
    gradients are near zero. (tests/verl/test_checkpoint.py compares the states that are loaded.)
    """
    straight, wider = (tmp_path / name for name in ("straight", "wider"))
    straight.mkdir()
    (wider / "run").mkdir(parents=True)
    with family() as environment:
        Run(straight, model, environment, **BITS).ends()
        shutil.copytree(straight / "run/global_step_3", wider / "run/global_step_3")
        (wider / "run/latest_checkpointed_iteration.txt").write_text("3")
        Run(wider, model, environment, **{**BITS, "trainer__n_gpus_per_node": 2}).ends()

    fourth, wide = (
        next(x for x in metrics(f) if x["training/global_step"] == 4) for f in (straight, wider)
    )
    assert prompts(wider) == {step: prompts(straight)[step] for step in (4, 5, 6)}
    assert sampled(wider, 4) == sampled(straight, 4)
    rounding = 1e-5
    assert max(fourth["rollout/logprob_diff_max"], wide["rollout/logprob_diff_max"]) <= rounding
    largest = max(abs(fourth["critic/advantages/max"]), abs(fourth["critic/advantages/min"]))
    assert wide["actor/pg_loss"] == pytest.approx(
        fourth["actor/pg_loss"], abs=2 * rounding * largest
    )


@contextmanager
def flaky_retriever(folder):
    """(URL, restart): a retrieval server that `restart` kills and brings back on the same port."""
    folder.mkdir()
    write_corpus(folder, CORPUS)
    port = free_port()
    with retrieval_server(folder, port=port) as (url, server):

        def restart():
            server.kill()
            server.wait()
            return retrieval_server(folder, port=port)

        yield url, restart


@pytest.mark.slow
def test_every_part_is_killed_in_turn(tmp_path, model):
    """A run whose parts are killed one after the other goes to its end by itself.

    SIGKILL, each in the middle of a rollout, for the engine's server, vLLM's engine process, the
    retrieval server (back after it was missed) and the driver. Then a training rank is killed and
    one is frozen (SIGSTOP), so that the watchdog has to end the run. The run trains on every batch
    once and in order, fails no trajectory, samples from the trainer's weights after every repair,
    and leaves no process.
    """
    settings = {
        "trainer__total_training_steps": 8,
        "trainer__save_freq": 1,
        "trainer__n_gpus_per_node": 2,
        "trainer__hang_timeout_s": 150,
        "trainer__max_ckpt_to_keep": 2,
        "actor_rollout_ref__actor__optim__lr": 1e-3,
        "agent__pause_s": 2,
        "agent__began": tmp_path / "began",
    }
    with flaky_retriever(tmp_path / "corpus") as (url, restart_retriever), family() as environment:
        run = Run(tmp_path, model, environment, agent__url=url, **settings)

        def in_the_middle_of(step):
            run.reached(step - 1)
            began = tmp_path / "began"
            log = tmp_path / "run/metrics.jsonl"
            wait_for(lambda: began.stat().st_mtime_ns > log.stat().st_mtime_ns)

        in_the_middle_of(2)
        run.kill("VLLMServer")
        in_the_middle_of(3)
        run.kill("EngineCore")
        in_the_middle_of(4)
        with restart_retriever():
            in_the_middle_of(5)
            run.kill("verl.trainer.main_ppo", 1)  # the elder one is its supervisor
            run.reached(5)
            run.kill("WorkerHost")
            run.reached(6)
            os.kill(run.pids("WorkerHost")[1], signal.SIGSTOP)
            run.ends()
    output = run.output
    assert output.count("rollout engine 0 is lost; starting it again") == 2
    ends = [json.loads(line) for line in (tmp_path / "run/restarts.jsonl").open()]
    assert [end.get("signal") or end["status"] for end in ends] == ["SIGKILL", 75, 75]
    assert "is gone" in output and "stacks of all processes" in output
    (stacks,) = (tmp_path / "run/stacks").iterdir()
    assert "rank 0" in stacks.read_text() and "no answer" in stacks.read_text()
    assert run.steps() == list(range(1, 9)) and prompts(tmp_path) == drawn(8, 4)
    for line in metrics(tmp_path)[1:]:
        assert line["rollout/failed"] == 0 and line["rollout/logprob_diff_max"] <= 1e-4
    assert len([p for p in (tmp_path / "run").iterdir() if p.name.startswith("global_step")]) <= 3


def test_asked_to_stop(tmp_path, model):
    """Two runs of the same command are stopped, and train on every batch once.

    SIGTERM: the step is finished and saved, status 143. Ctrl-C twice: it ends at once, 130, and
    what was saved before is there. (tests/verl/test_supervise.py has Ctrl-C once.)
    """
    settings = {
        "trainer__total_training_steps": 40,
        "agent__pause_s": 1,
        "agent__began": tmp_path / "began",
    }
    with family() as environment:

        def stopped_in_step(step, *signals):
            run = Run(tmp_path, model, environment, **settings)
            run.reached(step)
            for number in signals:
                run.process.send_signal(number)
                wait_for(
                    lambda: (
                        "finishing the step under way" in run.output.rpartition("resuming after")[2]
                    )
                )
            run.ends(128 + signals[0])
            return run.steps()[-1]

        first = stopped_in_step(2, signal.SIGTERM)
        assert (tmp_path / f"run/global_step_{first}").is_dir()
        second = stopped_in_step(first + 1, signal.SIGINT, signal.SIGINT)
        assert second > first and not (tmp_path / f"run/global_step_{second}").is_dir()
    assert {k: v for k, v in prompts(tmp_path).items() if k <= second} == drawn(second, 4)
    assert not (tmp_path / "run/restarts.jsonl").exists()


def test_asynchronous_and_killed(tmp_path, model):
    """An asynchronous run is killed after step 5 and resumed.

    An engine works beside the training, batches are rolled out two steps ahead, weights change
    between turns, and an engine of its own validates. Every batch is trained on once and in order
    although others were under way; no token is older than two versions; trajectories change weights
    between turns.
    """
    settings = {
        "async_training__max_staleness": 2,
        "algorithm__rollout_correction__rollout_is": "token",
        "actor_rollout_ref__hybrid_engine": "false",
        "actor_rollout_ref__rollout__num_val_replicas": 1,
        "actor_rollout_ref__actor__optim__lr": 1e-3,
        "trainer__total_training_steps": 8,
        "trainer__save_freq": 2,
        "trainer__test_freq": 2,
        "agent__pause_s": 2,
    }
    with family() as environment:
        run = Run(tmp_path, model, environment, **settings)
        run.reached(5)
        run.kill_everything()
        Run(tmp_path, model, environment, **settings).ends()
    assert run.steps() == list(range(1, 9)) and prompts(tmp_path) == drawn(8, 4)
    lines = [line for line in metrics(tmp_path) if "critic/score/mean" in line]
    ages = [line["training/staleness/max"] for line in lines]
    assert max(ages) == 2 and all(age <= 2 for age in ages)
    shares = [
        v
        for line in lines
        for name, v in line.items()
        if name.startswith("training/staleness/share_")
    ]
    assert any(0 < share < 1 for share in shares)
    assert all(line["rollout_corr/is_weight/max"] <= 2 for line in lines)
    validated = [
        line["training/global_step"] for line in metrics(tmp_path) if "val/test_score/all" in line
    ]
    assert sorted(validated) == [0, 2, 4, 6, 8]


@pytest.mark.slow
def test_a_collapse_is_rolled_back_until_it_ends_the_run(tmp_path, model):
    """A signal leaves its bound in step 4 for good.

    The run is rolled back to step 2, whose weights rolled out the last healthy step, with half the
    learning rate. When the signal comes again, the run ends. The state of each alarm is kept.
    """
    reward = tmp_path / "reward.py"
    reward.write_text(
        "calls = 0\n"
        "def compute_score(data_source, solution_str, ground_truth, extra_info):\n"
        "    global calls\n"
        "    calls += 1\n"
        "    return {'score': len(solution_str) / 100, 'calls': calls}\n"
    )
    settings = {
        "trainer__total_training_steps": 9,
        "trainer__save_freq": 1,
        "trainer__max_ckpt_to_keep": 1,
        "trainer__val_before_train": "false",
        "trainer__collapse_watch__response": "roll_back",
        "trainer__collapse_watch__min_signals": 1,
        "trainer__collapse_watch__patience": 2,
        "trainer__collapse_watch__max_roll_backs": 1,
        # 12 a step: the fourth has 42.5 on average
        "+trainer__collapse_watch__signals": "{reward/calls: {above: 40}}",
        "actor_rollout_ref__actor__optim__lr": 1e-3,
        "custom_reward_function__path": reward,
    }
    with family() as environment:
        run = Run(tmp_path, model, environment, **settings)
        run.ends(1)
    assert (
        "reward/calls moved first, at step 4" in run.output
        and "rolled back to step 2" in run.output
    )
    assert run.steps() == [1, 2, 3, 4] and {
        k: v for k, v in prompts(tmp_path).items() if k < 5
    } == drawn(4, 4)
    rates = [line["actor/lr"] for line in metrics(tmp_path)]
    assert rates == pytest.approx([1e-3] * 2 + [5e-4] * 2)
    first = tmp_path / "run/alarms/step_5"
    second = tmp_path / "run/alarms/step_4-1"
    assert [
        json.loads(line)["training/global_step"] for line in (first / "metrics.jsonl").open()
    ] == [3, 4, 5]
    assert all(
        (folder / "actor").is_dir() and (folder / "alarm.txt").exists()
        for folder in (first, second)
    )


@pytest.mark.slow
def test_a_loss_that_is_not_finite(tmp_path, model):
    """Steps with an infinite loss are skipped and their batch is kept.

    After the allowed number of such steps the run ends.
    """
    settings = {
        "trainer__max_skipped_steps": 2,
        "actor_rollout_ref__actor__entropy_coeff": 1e39,
    }  # inf in float32
    with family() as environment:
        run = Run(
            tmp_path,
            model,
            environment,
            trainer__total_training_steps=5,
            trainer__save_freq=1,
            **settings,
        )
        run.ends(1)
    assert "not finite in 2 training steps in a row" in run.output and run.steps() == [1]
    batch = DataProto.load(tmp_path / "run/nonfinite/actor_000001.pt")
    assert batch.batch["advantages"].isfinite().all() and batch.batch["response_mask"].any()


@pytest.mark.slow
def test_a_full_disk(tmp_path, model):
    """Training goes on to its last step on a disk on which one checkpoint fits and not two.

    The second checkpoint fails, and the console says so. The first one stays, with no half of
    another beside it, and the run does not call itself finished.
    """
    if subprocess.run(
        ["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"], check=False
    ).returncode:
        pytest.skip("a file system of its own cannot be mounted here (unshare -rm)")
    settings = {
        "trainer__save_freq": 2,
        "trainer__max_restarts": 0,
        "trainer__default_local_dir": "/mnt/run",
        "trainer__rollout_data_freq": -1,
    }
    mount = (
        'mount -t tmpfs -o size=2500k none /mnt && "$@"; status=$?; '
        'cp -r /mnt/run "$0"; exit $status'
    )
    prefix = ["unshare", "-rm", "sh", "-c", mount, str(tmp_path)]
    with family() as environment:
        run = Run(tmp_path, model, environment, prefix, trainer__total_training_steps=6, **settings)
        run.ends(1)
        assert run.steps() == list(range(1, 7))
        assert "checkpoint of step 4 FAILED, training goes on" in run.output
    kept = [p.name for p in (tmp_path / "run").glob("global_step*")]
    assert (
        kept == ["global_step_2"]
        and (tmp_path / "run/latest_checkpointed_iteration.txt").read_text() == "2"
    )
    assert len(metrics(tmp_path)) == 7  # what could not be written at once was written later
