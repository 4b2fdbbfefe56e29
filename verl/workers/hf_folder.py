"""Writes trained weights as a Hugging Face folder.

The folder can be loaded wherever the model that the training started from can be. Everything but
the weights comes from that model, the source, and not from the model in memory, whose config has
settings of training.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from huggingface_hub import save_torch_state_dict
from safetensors import safe_open
from transformers import AutoConfig, AutoProcessor, AutoTokenizer, PreTrainedModel
from transformers.utils.hub import cached_file

from verl.utils.model_names import ORIGIN
from verl.utils.run_folder import replacing
from verl.workers.checkpoint_names import checkpoint_format
from verl.workers.config import ModelConfig
from verl.workers.fsdp_model import whole
from verl.workers.image_tower import policy_class
from verl.workers.lora import add_adapters, base_model, merged, scaling

GENERATION = "generation_config.json"
Read = Callable[[Any], torch.Tensor]


def save_trained(
    model: PreTrainedModel, config: ModelConfig, path: str, origin: Mapping[str, str] | None = None
) -> None:
    """Writes a trained, possibly sharded model to the folder `path`, whole or not at all.

    Other files in the folder are kept. A collective: all ranks gather, rank 0 writes. `origin` is
    written to a file in the folder.
    """
    skeleton = skeleton_of(config)
    weights = exported_weights(skeleton, saved_tensors(model), whole, source_dtype(config))
    if dist.get_rank() == 0:
        write_folder(skeleton, dict(on_host(weights)), config, path, origin or {})
    else:
        for _ in weights:
            pass
    dist.barrier()


def skeleton_of(config: ModelConfig) -> PreTrainedModel:
    """Builds the policy, with adapters, without storage for its weights.

    It has the names, the shapes and the unchanged config of the source. If that has towers for
    images or sound beside a language model, the skeleton is that of the language model, unless the
    policy reads images. Raises
    OSError or ValueError if there is no such model.
    """
    source = AutoConfig.from_pretrained(
        config.path, trust_remote_code=config.trust_remote_code, **config.architecture
    )
    with torch.device("meta"):
        model = policy_class(config).from_config(source, trust_remote_code=config.trust_remote_code)
        return add_adapters(model, config) if config.lora_rank else model


def saved_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers, layer by layer. Tied ones have their first name only."""
    first_names = {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}
    return {
        name: value
        for name, value in model.state_dict(keep_vars=True).items()
        if name in first_names
    }


def exported_weights(
    skeleton: PreTrainedModel, tensors: Mapping[str, Any], read: Read, dtype: torch.dtype | None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and whole tensors as in a published checkpoint of `skeleton`, adapters merged.

    `tensors` has the keys of `saved_tensors`; `read` turns one of its values into a tensor.
    Parameters are rounded to `dtype` if it is given; buffers stay as they are.
    """
    plain = base_model(skeleton)
    buffers = {name for name, _ in plain.named_buffers()}

    def rounded() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in merged(tensors, scaling(skeleton), read):
            keeps = dtype is None or name in buffers
            yield name, tensor if keeps else tensor.to(dtype)

    return checkpoint_format(plain, rounded())


def on_host(weights: Iterator[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Copies each tensor to host memory of its own, so that shared storage is not written twice."""
    for name, tensor in weights:
        yield name, tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def write_folder(
    skeleton: PreTrainedModel,
    weights: dict[str, torch.Tensor],
    config: ModelConfig,
    path: str | Path,
    origin: Mapping[str, str],
) -> None:
    """Writes model, tokenizer and `origin` to the folder `path`, whole or not at all.

    Other files in the folder are kept.
    """
    target = Path(path).absolute()
    dtype = next(tensor.dtype for tensor in weights.values() if tensor.is_floating_point())
    source = config.tokenizer_path or config.path
    auto = AutoProcessor if config.reads_images else AutoTokenizer
    tokenizer = auto.from_pretrained(source, trust_remote_code=config.trust_remote_code)
    record = {"base_model": config.path, **origin}
    with replacing(target, carry_over=True) as folder:
        save_torch_state_dict(weights, folder)
        write_config(base_model(skeleton), dtype, folder)
        copy_companions(config, folder)
        tokenizer.save_pretrained(folder)
        (folder / ORIGIN).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        # safetensors makes its files readable by the owner only
        for file in folder.glob("*.safetensors"):
            file.chmod((folder / "config.json").stat().st_mode)


def write_config(model: PreTrainedModel, dtype: torch.dtype, folder: Path) -> None:
    """Writes config.json: that of the source, with the dtype of the weights in this folder."""
    model.config.architectures = [type(model).__name__]
    model.config.dtype = dtype
    model.config.save_pretrained(folder)


def copy_companions(config: ModelConfig, folder: Path) -> None:
    """Copies the other files of the source to `folder`, which must have a config.json.

    They are generation_config.json (sampling, all ids that end a turn), and the Python files of a
    model with code of its own, to which the config is made to refer. The former is copied byte for
    byte, because transformers refuses to write some contents that it reads.
    """
    source = source_file(config, "config.json")
    assert source is not None, "the config was read from there"
    generation = source_file(config, GENERATION)
    if generation is not None:
        shutil.copyfile(generation, folder / GENERATION)
    auto_map = json.loads(source.read_text(encoding="utf-8")).get("auto_map")
    if auto_map is None:
        return
    for code in source.parent.glob("*.py"):
        shutil.copyfile(code, folder / code.name)
    path = folder / "config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["auto_map"] = auto_map
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def source_file(config: ModelConfig, name: str) -> Path | None:
    """The file `name` of the source, None if the source has none.

    For a model of the hub it is the cached file.
    """
    found = cached_file(config.path, name, _raise_exceptions_for_missing_entries=False)
    return None if found is None else Path(found)


def source_dtype(config: ModelConfig) -> torch.dtype | None:
    """The dtype that the config of the source states, or else that of its first weights.

    None if neither states one.
    """
    source: Any = AutoConfig.from_pretrained(
        config.path, trust_remote_code=config.trust_remote_code
    )
    stated = source.dtype or source.get_text_config().dtype
    if stated is not None:
        return stated
    index = source_file(config, "model.safetensors.index.json")
    name = "model.safetensors"
    if index is not None:
        name = min(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    weights = source_file(config, name)
    if weights is None:
        return None
    with safe_open(weights, framework="pt") as file:
        first = next(iter(file.keys()))
        return file.get_tensor(first).dtype
