"""Supervised fine-tuning on rows of tokens with a loss mask.

It serves for the SFT baseline, and for the warm start of small models.

    python -m verl.trainer.sft model.path=DIR train_files=[rows.jsonl] output=DIR \
        total_training_steps=500
    torchrun --nproc-per-node 8 -m verl.trainer.sft ...

A row has `input_ids` and `loss_mask` (1 = trained). The sharded model and the optimizer step are
those of the actor.
"""

import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import PositiveFloat, PositiveInt, ValidationError, field_validator
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.device_mesh import init_device_mesh
from tqdm import tqdm
from yaml import YAMLError

from verl.protocol import DataProto
from verl.single_controller.worker import (
    init_process_group,
    seed_everything,
    share_of_cores,
)
from verl.trainer.packing import decided, in_words
from verl.utils import device
from verl.utils.answers import kind_of
from verl.utils.config import Config, problems_of
from verl.utils.dataset import ResumableSampler
from verl.utils.errors import ConfigError, DataError
from verl.workers.config import FSDPConfig, ModelConfig, OptimConfig
from verl.workers.forward import forward_log_probs
from verl.workers.fsdp_model import build_model, build_train_state
from verl.workers.hf_folder import save_trained
from verl.workers.packing import packing_of
from verl.workers.update import Budget, Counts, Metrics, reduce_sum, update_mini_batches

logger = logging.getLogger(__name__)

Example = dict[str, list[int]]
"""`input_ids` and `loss_mask`; optionally `watch_mask`: trained tokens whose accuracy is reported
(default: all)."""


class SFTConfig(Config):
    model: ModelConfig
    output: str
    """Folder of the trained model, in Hugging Face format."""
    train_files: tuple[str, ...] = ()
    """JSONL or parquet files of rows."""
    train_batch_size: PositiveInt = 64
    """Rows per optimizer step, over all ranks."""
    max_token_len_per_gpu: PositiveInt = 16384
    """Most tokens in a forward-backward pass of one rank, to which its memory is proportional."""
    max_length: PositiveInt = 4096
    """A longer row is an error."""
    total_training_steps: PositiveInt = 1000
    """Optimizer steps."""
    grad_clip: PositiveFloat = 1.0
    """Maximum norm of the gradient."""
    seed: int = 0
    """Order of the rows."""
    threads_per_rank: PositiveInt | None = None
    """CPU threads of a process on CPU; null: the ranks of a machine share its cores."""
    optim: OptimConfig = OptimConfig(lr=1e-5)
    fsdp: FSDPConfig = FSDPConfig()

    @field_validator("model")
    @classmethod
    def _of_tokens_alone(cls, value: ModelConfig) -> ModelConfig:
        if value.reads_images:
            raise ValueError(
                "reads_images=true: rows of tokens have no images, so that a policy that reads "
                "images cannot be fine-tuned"
            )
        return value


class SFTTrainer:
    """Trains a model on examples.

    The process group must exist. Every rank passes the same examples and trains on its share.
    """

    def __init__(self, config: SFTConfig) -> None:
        self.config = config
        kind = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(kind)
        mesh = init_device_mesh(kind, (dist.get_world_size(),), mesh_dim_names=("dp",))
        dtype = getattr(torch, config.fsdp.dtype)
        packing = packing_of(config.model, "lm", kind == "cuda", dtype, longest=config.max_length)
        if dist.get_rank() == 0:
            logger.info("model: %s", in_words(packing))
        model = build_model(decided(config.model, packing), "lm", config.fsdp, mesh)
        self.state = build_train_state(
            model, config.optim, config.total_training_steps, config.fsdp
        )

    def step(self, examples: Sequence[Example]) -> dict[str, float]:
        """Takes one optimizer step on the mean loss of the trained tokens of all `examples`.

        Returns `loss`, `grad_norm`, `lr`, `skipped_steps` and `watched`: the share of watched
        tokens that the model gave more than half of the probability to (a lower bound of greedy
        accuracy).
        """
        mine = examples[dist.get_rank() :: dist.get_world_size()]
        rows = collate(mine, self.config.max_length).to(self.device)
        watched = max(1.0, reduce_sum([float(rows.batch["watch_mask"].sum())], self.device)[0])

        def loss_fn(rows: DataProto, counts: Counts) -> tuple[torch.Tensor, Metrics]:
            log_probs, _ = forward_log_probs(
                self.state.model, rows, temperature=1.0, with_entropy=False
            )
            trained = torch.where(rows.batch["response_mask"].bool(), log_probs, 0.0)
            right = (log_probs > -0.6931) & rows.batch["watch_mask"].bool()
            return -trained.sum() / counts.num_tokens, {"watched": right.sum() / watched}

        budget = Budget.of(self.state.model, self.config.max_token_len_per_gpu)
        return update_mini_batches(
            self.state, rows, loss_fn, epochs=1, budget=budget, grad_clip=self.config.grad_clip
        )

    def save(self, path: str) -> None:
        """Writes model and tokenizer in Hugging Face format. A collective."""
        save_trained(self.state.model, self.config.model, path)


def collate(examples: Sequence[Example], max_length: int) -> DataProto:
    """The first token of each row as its prompt, the others as its response, padded on the right.

    Raises DataError as `check_examples` does.
    """
    check_examples(examples, max_length)
    width = max(len(e["input_ids"]) for e in examples)

    def column(values: list[list[int]]) -> torch.Tensor:
        return torch.tensor([v + [0] * (width - len(v)) for v in values])

    ids = column([e["input_ids"] for e in examples])
    trained = column([e["loss_mask"] for e in examples])
    watched = column([e.get("watch_mask") or e["loss_mask"] for e in examples])
    return DataProto.from_dict(
        {
            "prompts": ids[:, :1],
            "responses": ids[:, 1:],
            "attention_mask": column([[1] * len(e["input_ids"]) for e in examples]),
            "response_mask": trained[:, 1:],
            "watch_mask": (watched & trained)[:, 1:],
            "mini_batch": torch.zeros(len(examples), dtype=torch.long),
        },
        meta_info={"num_mini_batches": {"mini_batch": 1}},
    )


def check_examples(examples: Sequence[Example], max_length: int) -> None:
    """Raises DataError for a row that cannot be trained on.

    Such a row is longer than `max_length`, has no trained token after its first one, or has a mask
    of another length.
    """
    for number, example in enumerate(examples):
        mask = example["loss_mask"]
        size = len(example["input_ids"])
        if len(mask) != size or size > max_length or not any(mask[1:]):
            raise DataError(
                f"row {number}: {size} input_ids and {len(mask)} loss_mask values "
                f"with {sum(mask)} ones; expected equal lengths of at most "
                f"{max_length} and a one"
            )


def read_examples(files: Sequence[str]) -> list[Example]:
    """Reads the rows of JSONL or parquet files.

    Raises DataError naming file and row for a row that lacks one of its two lists.
    """
    examples: list[Example] = []
    for path in files:
        if not Path(path).is_file():
            raise DataError(f"{path}: no such file")
        rows: list[Any] = (
            pq.read_table(path).to_pylist() if path.endswith(".parquet") else read_lines(path)
        )
        for number, row in enumerate(rows):
            keys = ("input_ids", "loss_mask")
            has_lists = isinstance(row, dict) and all(
                isinstance(row.get(key), list) for key in keys
            )
            if not has_lists:
                raise DataError(
                    f"{path}, row {number}: expected the lists input_ids and loss_mask, got "
                    f"{kind_of(row)}"
                )
        examples += rows
    if not examples:
        raise DataError(f"train_files={list(files)}: no rows")
    return examples


def read_lines(path: str) -> list[Any]:
    """Reads the values of a JSONL file, without blank lines.

    Raises DataError naming the line that is not JSON.
    """
    values: list[Any] = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").split("\n"), 1):
        try:
            values += [json.loads(line)] if line.strip() else []
        except ValueError as error:
            raise DataError(f"{path}, line {number}: not JSON ({error})") from error
    return values


def batches(examples: Sequence[Example], config: SFTConfig) -> Iterator[list[Example]]:
    """Batches of `train_batch_size`, epoch after epoch, in an order drawn from the seed."""
    order = ResumableSampler(len(examples), config.seed, shuffle=True)
    while True:
        yield [examples[i] for i in order.take(config.train_batch_size)]


def start_process_group(threads: int | None = None) -> None:
    """Joins the process group of torchrun's environment; without it, a group of this process.

    Without a number of `threads` the ranks of this machine share its cores.
    """
    threads = threads or share_of_cores(int(os.getenv("LOCAL_WORLD_SIZE", "1")))
    rank = int(os.getenv("RANK", "0"))
    size = int(os.getenv("WORLD_SIZE", "1"))
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    init_process_group(
        rank, size, None if "MASTER_ADDR" in os.environ else HashStore(), kind, threads=threads
    )


def read_config(overrides: Sequence[str]) -> SFTConfig:
    """The configuration of key=value arguments.

    Raises ConfigError listing everything that is wrong with them.
    """
    if bad := [f"{text}: expected key=value" for text in overrides if "=" not in text]:
        raise ConfigError(bad)
    given = OmegaConf.create()
    for text in overrides:
        try:
            given = OmegaConf.merge(given, OmegaConf.from_dotlist([text]))
        except (YAMLError, OmegaConfBaseException) as error:
            raise ConfigError([f"{text}: the value is no YAML"]) from error
    try:
        return SFTConfig.model_validate(OmegaConf.to_container(given))
    except ValidationError as error:
        raise ConfigError(problems_of(error, "", SFTConfig)) from error


def main(argv: Sequence[str] | None = None) -> int:
    """Trains on `train_files` and writes `output`."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    overrides = list(sys.argv[1:] if argv is None else argv)
    try:
        config = read_config(overrides)
        examples = read_examples(config.train_files)
    except (ConfigError, DataError) as error:
        sys.exit(f"error: {error}")
    if device.has_cuda_engine() and (problem := device.cuda_problem()):
        sys.exit(f"error: {problem}")  # an environment for GPUs must not train on the CPU
    start_process_group(config.threads_per_rank)
    seed_everything(config.seed)
    try:
        trainer = SFTTrainer(config)
    except ConfigError as error:  # a model that cannot be trained; every rank has this error
        sys.exit(f"error: {error}")
    rows = batches(examples, config)
    progress = tqdm(range(config.total_training_steps), desc="sft", disable=dist.get_rank() > 0)
    for _ in progress:
        metrics = trainer.step(next(rows))
        progress.set_postfix(loss=f"{metrics['loss']:.3f}", watched=f"{metrics['watched']:.3f}")
    trainer.save(config.output)
    logger.info("trained model: %s", config.output)
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
