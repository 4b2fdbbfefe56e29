"""`python -m search_r1.evaluate MODEL [key=value ...]`: scores a model.

The agent loop and the prompts are those of training. MODEL is one of
- a Hugging Face folder or hub name;
- a run folder, its `best` or `latest`, or a checkpoint in it, which is exported first
  (search_r1.export);
- with --endpoint, the name of a model behind an OpenAI-compatible API (text in, text out: for
  evaluation only).
The configuration says which data, method and search are used:
`experiment=nq_hotpotqa/grpo method=rag data.val_files=...`. Every trajectory is written to the run
folder when it finishes, so that an interrupted evaluation continues where it stopped. At the end
summary.json, table.md and page.html are written beside the trajectories.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from search_r1.evaluation import report
from search_r1.export import loadable_model
from search_r1.launch import MODELS, TOKENIZER, composed, run_with_setup
from search_r1.program import command_parser
from verl.trainer.compose import as_plain
from verl.trainer.config import validate
from verl.trainer.overrides import quoted
from verl.utils.errors import ConfigError, ModelError
from verl.utils.model_names import run_folder_of


def run_name(model: str, verb: str = "evaluate") -> str:
    """The name of the run: `verb` and the path of the model, starting at its run folder.

    The `hf` folders in a run folder are left out: the final model of runs/A makes runs/evaluate-A.
    A model outside of a run folder is named by the last two parts of its path.

    >>> run_name("/models/mine/hf"), run_name("Qwen/Qwen2.5-7B")
    ('evaluate-mine--hf', 'evaluate-Qwen--Qwen2.5-7B')
    """
    path = Path(model)
    run = run_folder_of(path)
    if run is not None and path.name == "hf":
        path = path.parent
    return f"{verb}-" + "--".join(path.relative_to((run or path.parent).parent).parts)


def model_of(name: str, endpoint: str | None) -> str:
    """Returns what the engine loads for MODEL: the path of a folder, or the name at an endpoint.

    A checkpoint is exported first. Raises ModelError or ConfigError when there is no such model, or
    the checkpoint cannot be exported.
    """
    return name if endpoint else loadable_model(name)


def given_overrides(model: str, endpoint: str | None) -> list[str]:
    """Translates MODEL and --endpoint to overrides.

    They also ask all questions where the validations of an experiment take only a sample; later
    overrides can change that. Exports a checkpoint, and raises, as `model_of` does.
    """
    given = [f"actor_rollout_ref.model.path={quoted(model_of(model, endpoint))}"]
    given.append("data.val_sample_per_source=null")
    if endpoint:
        rollout = "actor_rollout_ref.rollout"
        given += [f"{rollout}.name=openai", f"{rollout}.endpoint.url={quoted(endpoint)}"]
    return given


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that name a model and the configuration with which it is asked."""
    parser.add_argument(
        "model", metavar="MODEL", help="folder, checkpoint, hub name, or name at the endpoint"
    )
    parser.add_argument(
        "--endpoint", metavar="URL", help="base address of an OpenAI-compatible API, such as .../v1"
    )
    parser.add_argument(
        "--config-name", default="grpo", help="configuration to start from (default: grpo)"
    )


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = command_parser("search_r1.evaluate", __doc__)
    add_model_flags(parser)
    parser.add_argument(
        "--compare",
        type=Path,
        metavar="RESULT",
        help="evaluation.jsonl of another model or method, or its folder",
    )
    parser.add_argument(
        "--closed-book", type=Path, metavar="FILE", help="evaluation.jsonl without search"
    )
    parser.add_argument(
        "--published", metavar="NAME", help="published rows of this model only, such as Qwen2.5-7B"
    )
    return parser


def report_arguments(args: argparse.Namespace) -> list[str]:
    """What is passed on to the report, with full paths of files."""
    arguments = [str(args.compare.resolve())] if args.compare else []
    if args.published:
        arguments.append(f"--published={args.published}")
    if args.closed_book:
        arguments.append(f"--closed-book={args.closed_book.resolve()}")
    return arguments


def all_overrides(args: argparse.Namespace, overrides: Sequence[str]) -> list[str]:
    """The overrides that follow from the flags, then the given ones. Raises as `model_of` does."""
    given = given_overrides(args.model, args.endpoint)
    if not any(override.startswith("trainer.experiment_name=") for override in overrides):
        name = run_name(model_of(args.model, args.endpoint))
        given.append(f"trainer.experiment_name={quoted(name)}")
    return [*given, *overrides]


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluates as the command line says, and writes the report; returns the exit status."""
    args, overrides = make_parser().parse_known_args(argv)
    # The paths are relative to the working directory, which `composed` changes below.
    arguments = report_arguments(args)
    try:
        overrides = all_overrides(args, overrides)
        # The name of a model at an endpoint is not a path, even if a folder here has that name.
        models = (TOKENIZER,) if args.endpoint else MODELS
        config, complete = composed(args.config_name, overrides, models)
        validate(as_plain(config))
        status = run_with_setup("verl.trainer.main_eval", args.config_name, complete, config)
    except (ConfigError, ModelError) as error:
        sys.exit(f"error: {error}")
    if status:
        return status
    folder = Path(config.trainer.default_local_dir)
    return report.main([str(folder / "evaluation.jsonl"), *arguments, "--out", str(folder)])


if __name__ == "__main__":
    sys.exit(main())
