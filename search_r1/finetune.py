"""Supervised fine-tuning: on answers, on the policy's own trajectories, on those of others.

    python -m search_r1.finetune --config-name grpo method=sft|rejection|traces [key=value ...]

`sft`: the policy is trained on the answers of the training questions. `rejection`: in every round
it samples trajectories and is trained on those that scored high enough. `traces`: it is trained on
trajectories of other programs and models. All train with `verl.trainer.sft`. Every round keeps its
model, so that an interrupted run continues after the last finished round. The final model is
`trainer.default_local_dir`/hf, as in a training run.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from omegaconf import DictConfig
from pydantic import ValidationError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from search_r1.config import FinetuneConfig
from search_r1.data import rejection
from search_r1.data.made import sha256
from search_r1.launch import composed, files_of
from search_r1.prompts import build_prompt
from search_r1.rewards.matching import gold_answers
from search_r1.traces.convert import convert
from search_r1.traces.main import converter_of, template_of, write_rows
from search_r1.traces.sample import RECORDS, sampling_overrides
from search_r1.trajectory import required_question
from verl.agent import Row
from verl.trainer.compose import as_plain
from verl.trainer.config import validate
from verl.trainer.overrides import quoted
from verl.utils.config import problems_of
from verl.utils.dataset import read_questions
from verl.utils.errors import ConfigError, DataError
from verl.utils.loading import load_class
from verl.utils.model_names import full_path
from verl.utils.places import root
from verl.utils.processes import dying_with_this, sharing_cores
from verl.utils.run_folder import claim, replacing
from verl.utils.tokenizer import encode_chat, encode_text, end_of_turn

NOT_OF_ROUNDS = frozenset({"rounds", "max_token_len_per_gpu"})
"""Keys of `finetune` that the result of a round does not depend on."""
OF_TRACES = frozenset({"traces", "trace_tools"})
"""Keys that only traces read."""


def read_finetune(raw: Mapping[str, Any]) -> FinetuneConfig:
    """The typed `finetune` section. Raises ConfigError naming every wrong key."""
    try:
        return FinetuneConfig.model_validate(raw["finetune"])
    except ValidationError as error:
        raise ConfigError(problems_of(error, "finetune.", FinetuneConfig)) from error


def check_method(target: str) -> None:
    """Raises ConfigError for an agent loop that is evaluated alone."""
    if load_class(target, "agent._target_").is_evaluated_alone:
        raise ConfigError(
            [
                f"agent._target_={target}: this method is evaluated alone, nothing of it is "
                "trained; remove method="
            ]
        )


def answer_rows(
    locations: Sequence[str],
    rows: Sequence[Row],
    template: str | None,
    tokenizer: PreTrainedTokenizerBase,
    chat_template_kwargs: Mapping[str, Any] = MappingProxyType({}),
) -> Iterator[dict[str, list[int]]]:
    """Yields the `input_ids` and the `loss_mask` of every row's question and first gold answer.

    The loss is on the answer and the token that ends the turn. The prompt is the one that
    evaluation uses. Raises DataError naming the location of a row whose prompt cannot be made.
    """
    end = end_of_turn(tokenizer, **chat_template_kwargs)
    for location, row in zip(locations, rows, strict=True):
        messages = row["prompt"]
        if template:
            messages = [{"role": "user", "content": build_prompt(required_question(row), template)}]
        try:
            prompt = encode_chat(tokenizer, messages, **chat_template_kwargs)
        except DataError as error:
            raise DataError(f"{location}: {error}") from error
        answer = gold_answers(row["reward_model"]["ground_truth"])[0]
        own = [*encode_text(tokenizer, f"<answer> {answer} </answer>"), end]
        yield {"input_ids": prompt + own, "loss_mask": [0] * len(prompt) + [1] * len(own)}


class Finetune:
    """The rounds of one run."""

    def __init__(self, config: DictConfig, argv: Sequence[str]) -> None:
        self.raw = as_plain(config)
        self.config = read_finetune(self.raw)
        self.argv = list(argv)
        self.run_dir = Path(config.trainer.default_local_dir)
        self.model = str(config.actor_rollout_ref.model.path)

    def __call__(self) -> Path:
        """Trains all rounds that are not finished; returns the folder of the final model.

        Raises DataError when the run folder holds rounds that were made with other settings.
        """
        final = self.run_dir / "hf"
        claim(self.run_dir / "finetune.json", self.made_of(), "finetuning")
        for number in range(self.config.rounds):
            folder = self.run_dir / f"round_{number + 1}"
            if not (folder / "hf").exists():
                folder.mkdir(parents=True, exist_ok=True)
                self.train(self.rows(folder), folder)
            self.model = str(folder / "hf")
        with replacing(final, carry_over=True) as pending:
            shutil.copytree(self.model, pending, dirs_exist_ok=True)
        return final

    def made_of(self) -> dict[str, Any]:
        """The settings that the result of a round depends on; the number of rounds is not one."""
        model = self.raw["actor_rollout_ref"]["model"]
        agent = self.raw["agent"]
        is_of_traces = self.config.data == "traces"
        unread = NOT_OF_ROUNDS if is_of_traces else NOT_OF_ROUNDS | OF_TRACES
        return {
            "model": {**model, "path": full_path(model["path"])},
            "apply_chat_template_kwargs": self.raw["data"]["apply_chat_template_kwargs"],
            "template": self.raw["template"],
            "finetune": {k: v for k, v in self.raw["finetune"].items() if k not in unread},
            "agent": {k: v for k, v in agent.items() if k != "retriever"},
            **(self.made_of_traces() if is_of_traces else self.made_of_questions()),
        }

    def made_of_questions(self) -> dict[str, Any]:
        """What else a result depends on where questions are answered, searched for and scored."""
        data = self.raw["data"]
        return {
            "train_files": [full_path(path) for path in files_of(data["train_files"])],
            "train_data_num": data["train_data_num"],
            "train_sample_seed": data["train_sample_seed"],
            "topk": self.raw["agent"].get("retriever", {}).get("topk"),
            "reward": {k: v for k, v in self.raw["reward"].items() if k != "judge_endpoint"},
            "custom_reward_function": self.raw["custom_reward_function"],
        }

    def made_of_traces(self) -> dict[str, Any]:
        """What else a result depends on where it is made of traces.

        Raises DataError for a file of traces that is missing.
        """
        if missing := [path for path in files_of(self.config.traces) if not Path(path).is_file()]:
            raise DataError(f"finetune.traces: {', '.join(missing)}: no such file")
        return {
            "content of traces": [sha256(Path(path)) for path in files_of(self.config.traces)],
            "template of traces": template_of(self.raw),
        }

    def rows(self, folder: Path) -> Path:
        """Writes the training rows of a round; returns their file."""
        path = folder / "rows.jsonl"
        if self.config.data == "traces":
            converter, _ = converter_of(self.raw)
            conversion = convert(converter, [Path(name) for name in files_of(self.config.traces)])
            write_rows(conversion, path)
            sys.stdout.write(f"{path}: {conversion.summary()}\n")
            return path
        files = files_of(self.raw["data"]["train_files"])
        if self.config.data == "samples":
            samples = self.sample(folder / "samples")
            rows = list(rejection.keep(rejection.read_records(samples), self.config.min_score))
        else:
            rows = list(self.answers(files))
        if not rows:
            raise DataError(f"{folder}: none of the samples scored {self.config.min_score} or more")
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        sys.stdout.write(f"{path}: {len(rows)} rows\n")
        return path

    def answers(self, files: Sequence[str]) -> Iterator[dict[str, list[int]]]:
        """Yields the rows of the training questions with their gold answers."""
        data = self.raw["data"]
        model = self.raw["actor_rollout_ref"]["model"]
        tokenizer = AutoTokenizer.from_pretrained(
            model.get("tokenizer_path") or self.model,
            trust_remote_code=model.get("trust_remote_code", False),
        )
        locations, questions = read_questions(
            files, data["train_data_num"], data["train_sample_seed"]
        )
        kwargs = data["apply_chat_template_kwargs"]
        return answer_rows(locations, questions, self.raw["template"], tokenizer, kwargs)

    def sample(self, folder: Path) -> Path:
        """Samples trajectories of the model on the training questions; returns their file."""
        run(
            "-m",
            "verl.trainer.main_eval",
            *self.argv,
            f"actor_rollout_ref.model.path={quoted(self.model)}",
            *sampling_overrides(self.raw, folder),
        )
        return folder / RECORDS

    def train(self, rows: Path, folder: Path) -> None:
        """Trains the current model on a file of rows; writes the result to `folder`/hf."""
        lengths = ("max_prompt_length", "max_response_length", "max_obs_length")
        # the last part of a trajectory may be a result for which the context has no room
        longest = sum(self.raw["data"][key] for key in lengths)
        model = self.raw["actor_rollout_ref"]["model"]
        fsdp = self.raw["actor_rollout_ref"]["actor"]["fsdp_config"]
        ranks = self.raw["trainer"]["n_gpus_per_node"]
        threads = self.raw["trainer"]["threads_per_rank"]
        launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}"] if ranks > 1 else []
        run(
            *launcher,
            "-m",
            "verl.trainer.sft",
            f"model={json.dumps({**model, 'path': str(self.model)})}",
            f"fsdp={json.dumps(fsdp)}",
            f"train_files={json.dumps([str(rows)])}",
            f"output={json.dumps(str(folder / 'unfinished'))}",
            f"optim.lr={self.config.lr}",
            f"total_training_steps={self.config.steps}",
            f"train_batch_size={self.config.train_batch_size}",
            f"max_token_len_per_gpu={self.config.max_token_len_per_gpu}",
            f"max_length={longest}",
            f"seed={self.raw['trainer']['seed']}",
            *([f"threads_per_rank={threads}"] if threads else []),
        )
        (folder / "unfinished").rename(folder / "hf")


def run(*command: str) -> None:
    """Runs Python with the arguments `command`; exits with its status if it fails."""
    status = subprocess.call(
        [sys.executable, *command],
        cwd=root(),
        env={**os.environ, **sharing_cores()},
        preexec_fn=dying_with_this(),
    )
    if status:
        sys.exit(status)


def main(argv: Sequence[str] | None = None) -> int:
    """Fine-tunes as the command line says; returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-name", default="grpo")
    args, overrides = parser.parse_known_args(argv)
    try:
        config, complete = composed(args.config_name, overrides)
        valid = validate(as_plain(config))
        check_method(valid.agent["_target_"])
        if valid.actor_rollout_ref.model.reads_images:
            raise ConfigError(
                [
                    "actor_rollout_ref.model.reads_images=true: rows of tokens have no images, so "
                    "that a policy that reads images cannot be fine-tuned"
                ]
            )
        if config.finetune.data is None:
            raise ConfigError(
                [
                    "finetune.data: expected answers, samples or traces; method=sft, "
                    "method=rejection and method=traces set it"
                ]
            )
        sys.stdout.write(
            f"trained model: {Finetune(config, ['--config-name', args.config_name, *complete])()}\n"
        )
    except (ConfigError, DataError) as error:
        sys.exit(f"error: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
