"""Sharded checkpoints: exact, of the moment of the call, on any number of ranks, and on a disk that
is full."""

import math
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from tests.distributed import run_ranks
from tests.models import make_tiny_qwen2
from tests.processes import PATIENCE_S
from tests.verl.batches import ragged_batch
from tests.verl.workers import Workers, build, save
from verl.single_controller.decorator import Dispatch, dispatch
from verl.utils.checkpoint import training_state
from verl.utils.checkpoint_storage import CheckpointError
from verl.utils.run_folder import complete, discard, find_latest, pending_folder
from verl.workers.config import OptimConfig

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(
        make_tiny_qwen2(tmp_path_factory.mktemp("model"), layers=1, width=32, vocab=300, tied=True)
    )


def train(workers: Workers, steps: int = 1) -> None:
    """Updates on batches that the random state of torch decides."""
    for _ in range(steps):
        batch = ragged_batch(torch.float32)
        noise = torch.randn(batch.batch["advantages"].shape)
        batch = batch.with_tensors(advantages=noise, returns=noise, values=torch.zeros_like(noise))
        for worker, method in zip(workers, ("update_actor", "update_critic"), strict=True):
            (mine,) = dispatch(Dispatch.DP_COMPUTE_PROTO, worker.world_size, (batch,))[worker.rank]
            getattr(worker, method)(mine)


def whole(values):
    """A copy of the nested state with whole tensors, gathered from all ranks."""
    if isinstance(values, dict):
        return {k: whole(v) for k, v in values.items()}
    if isinstance(values, torch.Tensor):
        return (values.full_tensor() if isinstance(values, DTensor) else values).detach().clone()
    return values


def everything(workers: Workers) -> dict:
    states = [w.state for w in workers]
    return {
        i: whole(training_state(s)) | {"ticks": s.ticks, "lr": s.lr} for i, s in enumerate(states)
    }


def finish(workers: Sequence[Any]) -> None:
    for worker in workers:
        worker.finish_checkpoint()


def load(workers: Workers, root: str) -> None:
    for worker, role in zip(workers, ("actor", "critic"), strict=True):
        worker.load_checkpoint(f"{root}/{role}")


def different(a, b, where: str = "") -> list[str]:
    """Places where two nested states are not the same to the last bit."""
    if isinstance(a, dict):
        keys = a.keys() | b.keys()
        return [
            p
            for k in keys
            for p in (different(a[k], b[k], f"{where}.{k}") if k in a and k in b else [where])
        ]
    same = torch.equal(a, b) and a.dtype == b.dtype if isinstance(a, torch.Tensor) else a == b
    return [] if same else [where]


def trained_on(model: str, root: str, options: dict) -> dict:
    """Two steps, an asynchronous save of both roles, two steps before a byte is written; then the
    last two again."""
    gate = threading.Event()
    write_data = FileSystemWriter.write_data

    def held_up(self: FileSystemWriter, *args):
        gate.wait()
        return write_data(self, *args)

    FileSystemWriter.write_data = held_up
    workers = build(model, **options)
    train(workers, 2)
    at_save = everything(workers)
    save(workers, root, asynchronous=True)
    train(workers, 2)
    written = list(Path(root).rglob(f"__{workers[0].rank}_*"))
    gate.set()
    assert not written
    finish(workers)
    at_end = everything(workers)
    resumed = build(model, **options)
    torch.manual_seed(123)
    load(resumed, root)
    loaded = everything(resumed)
    train(resumed, 2)
    return {"save": at_save, "end": at_end, "loaded": loaded, "again": everything(resumed)}


@pytest.mark.parametrize(
    "options", [{}, {"lora_rank": 2, "offload": True}], ids=["plain", "LoRA, optimizer offloaded"]
)
def test_resuming_is_exact_and_what_trains_on_does_not_leak_into_the_file(tmp_path, model, options):
    for found in run_ranks(2, trained_on, model, str(tmp_path), options):
        assert different(found["save"], found["loaded"]) == []
        assert different(found["end"], found["again"]) == []
        assert len(different(found["save"], found["end"])) > 10


def saved_by(model: str, root: str) -> tuple[dict, torch.Tensor]:
    workers = build(model)
    train(workers, 2)
    torch.manual_seed(torch.distributed.get_rank() + 10)
    save(workers, root)
    return everything(workers), torch.rand(2)


def loaded_by(model: str, root: str) -> tuple[dict, torch.Tensor]:
    workers = build(model)
    torch.manual_seed(99)
    load(workers, root)
    return everything(workers), torch.rand(2)


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_another_number_of_ranks_loads_the_same_state(tmp_path, model, before, after):
    saved = run_ranks(before, saved_by, model, str(tmp_path))
    loaded = run_ranks(after, loaded_by, model, str(tmp_path))
    for state, _ in loaded:
        assert different(saved[0][0], state) == []
        assert state[0]["ticks"] == 2
    assert torch.equal(saved[0][1], loaded[0][1])
    torch.manual_seed(99)
    # a new rank keeps its own random state
    assert all(torch.equal(drawn, torch.rand(2)) for _, drawn in loaded[1:])


def lowered(model: str, root: str) -> list[tuple[float, ...]]:
    """Learning rates of both roles, one step of training apart; lowered after the first, saved
    after the second."""
    workers = build(model)
    restored = build(model)
    seen = []

    def look(at: Workers) -> None:
        seen.append(tuple(w.state.optimizer.param_groups[0]["lr"] for w in at))

    train(workers)
    for worker in workers:
        worker.scale_lr(0.5)
    look(workers)
    train(workers)
    look(workers)
    save(workers, root)
    load(restored, root)
    look(restored)
    for at in (workers, restored):
        train(at)
        look(at)
    return seen


def test_a_lowered_learning_rate_stays_lowered(tmp_path, model):
    """1e-2 after a warm-up over 5 of 10 steps: 2e-3 more in each step, half of it once lowered."""
    (seen,) = run_ranks(1, lowered, model, str(tmp_path))
    assert [actor for actor, _ in seen] == pytest.approx([2e-3, 3e-3, 3e-3, 4e-3, 4e-3])
    assert [critic for _, critic in seen] == pytest.approx([2e-3, 3e-3, 3e-3, 4e-3, 4e-3])


OTHER_OPTIM = OptimConfig(
    lr=1e-3, betas=(0.5, 0.6), weight_decay=0.25, lr_scheduler_type="cosine", min_lr_ratio=0.1
)
"""Without warm-up, over 10 steps."""


def loaded_with_other_settings(model: str, root: str) -> tuple[list[str], list[dict], list[float]]:
    """Differences of the state; settings of the optimizers after the load; the rates of two
    steps."""
    workers = build(model)
    changed = build(model, optim=OTHER_OPTIM)
    train(workers, 2)
    for worker in workers:
        worker.scale_lr(0.5)
    save(workers, root)
    load(changed, root)
    saved, loaded = ([whole(training_state(w.state)) for w in some] for some in (workers, changed))
    found = [
        different(a[part], b[part])
        for a, b in zip(saved, loaded, strict=True)
        for part in ("model",)
    ]
    found += [
        different(a["optimizer"]["state"], b["optimizer"]["state"])
        for a, b in zip(saved, loaded, strict=True)
    ]
    settings = [
        {k: v for k, v in w.state.optimizer.param_groups[0].items() if k != "params"}
        for w in changed
    ]
    rates = [changed[0].state.lr]
    train(changed)
    return [place for places in found for place in places], settings, [*rates, changed[1].state.lr]


def test_settings_of_the_optimizer_are_those_of_the_configuration(tmp_path, model):
    """Moments and steps are the checkpoint's, all settings the configuration's; what a roll back
    lowered stays lowered, by its factor of the configured rate."""
    ((places, settings, rates),) = run_ranks(1, loaded_with_other_settings, model, str(tmp_path))
    assert places == []
    expected = [
        0.5 * 1e-3 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / 10))) for step in (2, 3)
    ]
    for group in settings:
        assert group["betas"] == (0.5, 0.6) and group["weight_decay"] == 0.25 and group["fused"]
        assert group["lr"] == pytest.approx(expected[0], rel=1e-12)
    assert rates == pytest.approx(expected, rel=1e-12)


def saved_before_and_after_a_step(model: str, root: str) -> tuple[dict, dict, list[set[float]]]:
    plain = build(model)
    saving = build(model)
    random = torch.get_rng_state()
    train(plain, 2)
    torch.set_rng_state(random)
    steps = []
    for number in range(2):
        save(saving, f"{root}/{number}")
        steps.append({float(v["step"]) for w in saving for v in w.state.optimizer.state.values()})
        train(saving)
    return everything(plain), everything(saving), steps


def test_saving_before_the_first_step_and_after_it_changes_nothing(tmp_path, model):
    ((plain, saving, steps),) = run_ranks(1, saved_before_and_after_a_step, model, str(tmp_path))
    assert steps == [{0.0}, {1.0, 2.0}], "one step of the actor, two of the critic"
    assert different(plain, saving) == []


def one_rank_fails(model: str, root: str) -> list[str]:
    """Messages of a failed save at once, a failed save in the background, and a success."""
    workers = build(model)
    messages = []
    obstacle = Path(root) / "actor" / "__1_0.distcp"
    on_driver(lambda: obstacle.mkdir(parents=True))
    for asynchronous in (False, True):
        try:
            save(workers[:1], root, asynchronous)
            finish(workers)
        except CheckpointError as error:
            messages.append(str(error))
    on_driver(obstacle.rmdir)
    save(workers, root, asynchronous=True)
    save(workers, root, asynchronous=True)  # waits for the first
    finish(workers)
    load(workers, root)
    try:
        workers[0].load_checkpoint(f"{root}/none")
    except FileNotFoundError as error:
        messages.append(str(error))
    on_driver((Path(root) / "hf").mkdir)
    on_driver(lambda: (Path(root) / "hf" / "notes.md").write_text("kept"))
    workers[0].save_pretrained(f"{root}/hf")
    return messages


def test_a_failure_on_one_rank_is_raised_on_all_and_the_next_save_succeeds(tmp_path, model):
    for at_once, later, missing in run_ranks(2, one_rank_fails, model, str(tmp_path)):
        for message in (at_once, later):
            assert f"{tmp_path}/actor: the checkpoint could not be written" in message
            assert "rank 1: IsADirectoryError" in message and "rank 0" not in message
        assert f"{tmp_path}/none" in missing
    assert (tmp_path / "hf/notes.md").read_text() == "kept" and not (tmp_path / "hf.tmp").exists()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "hf").config.vocab_size


def full_disk(model: str, root: str) -> tuple[str, list[str], list[str]]:
    """What a save with 100 kB left says; how what loads then, and after the next save, differs from
    what was saved."""
    workers = build(model)
    restored = build(model)
    filler = Path(root) / "filler"
    train(workers)
    first = everything(workers)
    message = ""
    save(workers, str(pending_folder(root, 1)))
    on_driver(
        lambda: (
            complete(root, 1),
            filler.write_bytes(bytes(shutil.disk_usage(root).free - 100_000)),
        )
    )
    train(workers)
    second = everything(workers)
    save(workers[:1], str(pending_folder(root, 2)), asynchronous=True)
    try:
        finish(workers)
    except CheckpointError as error:
        message = str(error)
    on_driver(lambda: discard(root, 2))
    load(restored, str(find_latest(root)))
    survived = everything(restored)
    on_driver(filler.unlink)
    save(workers, str(pending_folder(root, 2)), asynchronous=True)
    finish(workers)
    on_driver(lambda: complete(root, 2))
    load(restored, str(find_latest(root)))
    return message, different(first, survived), different(second, everything(restored))


def on_driver(do: Callable[[], Any]) -> None:
    """Runs it once, between what the ranks did before and what they do next."""
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        do()
    torch.distributed.barrier()


def on_a_small_disk(model: str, root: str) -> None:
    """The body of the test below, where `root` is a disk of 4 MB."""
    for message, before, after in run_ranks(2, full_disk, model, root):
        sys.stdout.write(f"{message}\n")
        assert f"{root}/global_step_2.tmp/actor" in message and "No space left on device" in message
        # 20,032 parameters of 4 bytes, twice more for Adam, and the tied head of 300 x 32 under its
        # second name
        assert "it takes 0.3 MB and has room for 0.1" in message
        assert before == after == []
    assert find_latest(root) == Path(root) / "global_step_2"


def test_a_full_disk_costs_one_checkpoint(tmp_path, model):
    if (
        not shutil.which("unshare")
        or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode
    ):
        pytest.skip("unshare -rm is not permitted here, so no disk of a few MB can be mounted")
    call = f"on_a_small_disk({model!r}, {str(tmp_path)!r})"
    code = f"from tests.verl.test_checkpoint import on_a_small_disk; {call}"
    script = 'mount -t tmpfs -o size=4m tmpfs "$1" && cd "$2" && exec "$3" -c "$4"'
    done = subprocess.run(
        [
            "unshare",
            "-rm",
            "sh",
            "-c",
            script,
            "sh",
            str(tmp_path),
            str(ROOT),
            sys.executable,
            code,
        ],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def with_momentum(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """SGD with momentum over the parameters of another optimizer."""
    return torch.optim.SGD(optimizer.param_groups[0]["params"], lr=1.0, momentum=0.9)


def other_optimizer(model: str, root: str) -> tuple[dict, dict, dict]:
    """The states after four updates: without a stop, resumed after two, and resumed before any."""
    states = []
    for start in (None, f"{root}/second", f"{root}/first"):
        workers = build(model)
        for worker in workers:
            worker.state.optimizer = with_momentum(worker.state.optimizer)
            worker.state.go_to(0, 1.0)
        if start is None:
            save(workers, f"{root}/first")
            torch.manual_seed(1)
            train(workers, 2)
            save(workers, f"{root}/second")
        else:
            load(workers, start)
        if start == f"{root}/first":
            torch.manual_seed(1)
            train(workers, 2)
        train(workers, 2)
        states.append(everything(workers))
    return states[0], states[1], states[2]


def test_another_optimizer_is_saved_and_loaded_as_well(tmp_path, model):
    """Its state has other names: a momentum buffer and no count of steps."""
    ((whole_run, resumed, from_the_start),) = run_ranks(1, other_optimizer, model, str(tmp_path))
    kept = whole_run[0]["optimizer"]["state"].values()
    assert kept and all(set(of_parameter) == {"momentum_buffer"} for of_parameter in kept)
    assert different(whole_run, resumed) == []
    assert different(whole_run, from_the_start) == []
