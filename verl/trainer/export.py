"""Export of a checkpoint's policy to a Hugging Face folder.

It runs in one process without a GPU, whatever number of ranks wrote the checkpoint. Weights are
read one by one, so it needs about as much memory as the exported model, not the whole checkpoint.
Names, shapes, config, tokenizer and generation settings are those of the model that the run began
with.
"""

from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError
from tqdm import tqdm
from transformers import PreTrainedModel
from yaml import YAMLError

from verl.utils.checkpoint import read_weight, saved_weights
from verl.utils.config import problems_of
from verl.utils.errors import ConfigError, ModelError
from verl.utils.model_names import RUN_CONFIG, run_folder_of
from verl.workers.config import ModelConfig
from verl.workers.hf_folder import (
    exported_weights,
    on_host,
    saved_tensors,
    skeleton_of,
    source_dtype,
    write_folder,
)

SECTION = "actor_rollout_ref.model"


def export(
    checkpoint: Path, out: Path, base: str | None = None, tokenizer: str | None = None
) -> None:
    """Writes the policy of a checkpoint to the Hugging Face folder `out`.

    The folder is written whole or not at all, with adapters merged. `checkpoint`: the folder that
    contains `actor`, somewhere below the run's config.yaml. `base`, `tokenizer`: paths of the model
    that the run began with and of its tokenizer, where they differ from config.yaml. Raises
    ModelError, ConfigError for a config.yaml that cannot be read, CheckpointError for damaged
    parts, OSError.
    """
    config = model_config_of(checkpoint, base, tokenizer)
    skeleton = skeleton_or_error(checkpoint, config)
    path = str(checkpoint / "actor")
    saved = saved_weights(path)
    names = list(saved_tensors(skeleton))
    check_fit(skeleton, saved, checkpoint, config)
    with tqdm(total=len(names), desc="export", unit="tensors") as progress:

        def read(name: str) -> torch.Tensor:
            progress.update()
            return read_weight(path, name, saved[name])

        tensors = {name: name for name in names}
        weights = dict(on_host(exported_weights(skeleton, tensors, read, source_dtype(config))))
    write_folder(skeleton, weights, config, out, {"checkpoint": checkpoint.name})


def model_config_of(
    checkpoint: Path, base: str | None = None, tokenizer: str | None = None
) -> ModelConfig:
    """The model section of the run of a checkpoint; `base` and `tokenizer` replace its paths."""
    run = run_folder_of(checkpoint)
    if run is None:
        raise ModelError(
            f"{checkpoint}: no {RUN_CONFIG} in the folders above it. It says what the run began "
            "with and is in the run folder: copy it along with the checkpoint"
        )
    path = run / RUN_CONFIG
    try:
        section = OmegaConf.select(OmegaConf.load(path), SECTION)
    except (OmegaConfBaseException, YAMLError) as error:
        raise ConfigError([f"{path}: {error}"]) from error
    if section is None:
        raise ConfigError(
            [f"{path}: no section {SECTION}; expected the configuration of a training run"]
        )
    entries: Any = OmegaConf.to_container(section)
    try:
        config = ModelConfig.model_validate(entries)
    except ValidationError as error:
        raise ConfigError(
            [f"{path}: {problem}" for problem in problems_of(error, f"{SECTION}.")]
        ) from error
    changes = {
        key: value
        for key, value in (("path", base), ("tokenizer_path", tokenizer))
        if value is not None
    }
    return config.model_copy(update=changes)


def skeleton_or_error(checkpoint: Path, config: ModelConfig) -> PreTrainedModel:
    """Returns `skeleton_of(config)`. Raises ModelError where the initial model cannot be read."""
    try:
        return skeleton_of(config)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{config.path}: the model that {checkpoint} was trained from ({SECTION}.path) cannot "
            "be read here: "
            f"{error}\nName where it is by --base; of its files the weights are not needed"
        ) from error


def check_fit(
    skeleton: PreTrainedModel, saved: dict[str, torch.Tensor], checkpoint: Path, config: ModelConfig
) -> None:
    """Raises ModelError, naming weights, when a checkpoint does not have those of `skeleton`."""
    differing: list[str] = []
    for name, tensor in saved_tensors(skeleton).items():
        there = tuple(saved[name].shape) if name in saved else None
        if there != tuple(tensor.shape):
            differing.append(f"{name}: {there or 'absent'}, expected {tuple(tensor.shape)}")
    if any(".lora_" in name for name in saved) and not config.lora_rank:
        differing.append(f"adapters, and {SECTION}.lora_rank is 0")
    if differing:
        more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise ModelError(
            f"{checkpoint}: was not trained from {config.path} ({'; '.join(differing[:3])}{more})"
        )
