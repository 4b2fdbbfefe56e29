"""Names that a user may give for a model: Hugging Face folders, hub names, runs, checkpoints.

runs/grpo                   a run folder: its finished model, or else its newest checkpoint
runs/grpo/global_step_20    a checkpoint
runs/grpo/alarms/step_12    the state that an alarm left, a checkpoint too
runs/grpo/best, .../latest  the checkpoints that the run marks so; these are no real folders
runs/grpo/hf                a Hugging Face folder, which has a config.json
"""

import json
from pathlib import Path

from verl.utils.errors import ModelError
from verl.utils.run_folder import (
    BEST,
    INDEX,
    PENDING,
    PICKLED_INDEX,
    best,
    find_latest,
    folder_of,
    steps,
)

RUN_CONFIG = "config.yaml"
HF = "hf"
"""Name of the Hugging Face folder in a run folder or an exported checkpoint."""
ORIGIN = "training.json"
"""File in a Hugging Face folder that says what it was made from: `base_model`, `checkpoint`."""
EXPECTED = (
    "expected a Hugging Face folder (with config.json), a run folder, its best, latest or "
    "global_step_N, or a folder in its alarms"
)


def ready_model(name: str) -> str | None:
    """The Hugging Face folder (its full path) or the hub name that `name` means.

    None if `name` means a checkpoint, which must be exported first. A name that does not exist here
    is taken for one of the hub, unless it can only be a path (`is_place`). Raises ModelError as
    `find_checkpoint` does.
    """
    path = Path(name)
    if is_model(path) and not path.name.endswith(PENDING):
        return str(path.resolve())
    if not path.exists() and not is_run(path.parent) and not is_place(name):
        return name
    if is_run(path) and (finished := finished_model(path)) is not None:
        return str(finished.resolve())
    exported = find_checkpoint(name) / HF
    return str(exported) if is_model(exported) else None


def is_place(name: str) -> bool:
    """Whether a name can only be a path, even if nothing is there, and not a name of the hub.

    It begins like a path, has more than one slash, or would be beside runs, as `runs/typo` is.
    """
    beginning, slash, rest = name.partition("/")
    if not slash:
        return False
    if beginning in ("", ".", "..", "~") or "/" in rest:
        return True
    folder = Path(beginning)
    return folder.is_dir() and any(
        is_run(entry) and not is_model(entry) for entry in folder.iterdir()
    )


def full_path(name: str) -> str:
    """The full path of a file or folder that exists; any other name unchanged."""
    path = Path(name)
    return str(path.resolve()) if path.exists() else name


def weights_of(model: str) -> list[list[str | int]]:
    """Name, size and time of each file of weights in a model's folder.

    They serve to recognise that the folder holds other weights than before.
    """
    files = sorted(Path(model).glob("*.safetensors"))
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def find_checkpoint(name: str) -> Path:
    """The full path of the complete checkpoint that `name` means.

    For a run folder it is the newest one. Raises ModelError saying what was found and what was
    expected.
    """
    path = Path(name).resolve()
    if path.name.endswith(PENDING) and path.exists():
        raise ModelError(
            f"{path}: unfinished, it is being written or a crash left it. {_present(path.parent)}"
        )
    if path.is_dir():
        return _checkpoint_in(path)
    run = path.parent
    if path.exists() or not is_run(run):
        found = "a file" if path.exists() else "no such folder"
        raise ModelError(f"{path}: {found}; {EXPECTED}")
    if path.name == "latest":
        return _checkpoint_in(run)
    if path.name == "best":
        return _best(run)
    if path.with_name(path.name + PENDING).exists():
        raise ModelError(
            f"{path}: unfinished, it is being written or a crash left it. {_present(run)}"
        )
    raise ModelError(f"{path}: no such checkpoint. {_present(run)}")


def finished_model(run: Path) -> Path | None:
    """The Hugging Face folder of a run that has ended, None if there is none.

    It must have been made from the newest checkpoint, or there must be no checkpoint. One that was
    written before the run was continued does not count.
    """
    model = run / HF
    if not is_model(model):
        return None
    newest = find_latest(run) if steps(run) else None
    if newest is None:
        return model
    record = model / ORIGIN
    origin = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    return model if origin.get("checkpoint") == newest.name else None


def run_folder_of(path: Path) -> Path | None:
    """The nearest folder above `path` that holds the configuration of a run."""
    return next((folder for folder in path.parents if (folder / RUN_CONFIG).is_file()), None)


def is_model(folder: Path) -> bool:
    """Whether `folder` is a Hugging Face folder."""
    return (folder / "config.json").is_file()


def is_checkpoint(folder: Path) -> bool:
    """Whether `folder` holds a complete policy, even in a format that cannot be read any more."""
    return any((folder / "actor" / name).is_file() for name in (INDEX, PICKLED_INDEX))


def is_run(folder: Path) -> bool:
    """Whether `folder` is a run folder: whether it has any of the files that runs write."""
    return (folder / RUN_CONFIG).is_file() or is_model(folder / HF) or bool(steps(folder))


def _checkpoint_in(folder: Path) -> Path:
    if is_checkpoint(folder):
        return folder
    if (folder / "actor").is_dir():
        raise ModelError(f"{folder / 'actor'}: has no {INDEX}, so this checkpoint is not complete")
    newest = find_latest(folder) if steps(folder) else None
    if newest is not None:
        return _checkpoint_in(newest)
    if is_run(folder):
        raise ModelError(f"{folder}: a run folder without a checkpoint. {_present(folder)}")
    names = sorted(entry.name for entry in folder.iterdir())
    found = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    raise ModelError(f"{folder}: holds {found or 'nothing'}; {EXPECTED}")


def _best(run: Path) -> Path:
    record = best(run)
    if record is None:
        raise ModelError(
            f"{run}: has no best checkpoint ({BEST}): none was saved at a step whose validation "
            f"gave trainer.best_metric. {_present(run)}"
        )
    return _checkpoint_in(folder_of(run, record["step"]))


def _present(run: Path) -> str:
    """The models and checkpoints that a run folder has, as a sentence."""
    names = [folder_of(run, step).name for step in steps(run)]
    if best(run) is not None:
        names.append("best")
    if is_model(run / HF):
        names.append(HF)
    return (
        f"{run} has {', '.join(names)}" if names else f"{run} has no checkpoint and no {HF} folder"
    )
