"""`python -m search_r1.evaluate MODEL [key=value ...]`: numbers for a model, by the loop and prompts of training.

MODEL is a Hugging Face folder or hub name, a checkpoint's `hf` folder, or with --endpoint the name of a model behind an
OpenAI-compatible API (text in, text out: for evaluation only). Data, method and search are those of the configuration:
`experiment=nq_hotpotqa/grpo method=rag data.val_files=...`. Trajectories go to the run folder as they finish; an
interrupted evaluation goes on where it was. Then come summary.json, table.md and page.html beside them.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from search_r1.evaluation import report
from search_r1.launch import composed, surrounded
from verl.trainer.compose import as_plain
from verl.trainer.config import validate
from verl.trainer.overrides import quoted
from verl.utils.errors import ConfigError


def run_name(model: str) -> str:
    """The run's name: the last two parts of the model's, so that the `hf` of two runs differ.

    >>> run_name("/data/runs/grpo/hf"), run_name("Qwen/Qwen2.5-7B")
    ('evaluate-grpo--hf', 'evaluate-Qwen--Qwen2.5-7B')
    """
    return "evaluate-" + "--".join(part for part in Path(model).parts[-2:] if part != "/")


def given_overrides(model: str, endpoint: str | None) -> list[str]:
    """MODEL and --endpoint as overrides; a folder by its full path.

    All questions are asked, also where the validations of an experiment take a sample: further overrides may say
    otherwise.
    """
    path = Path(model)
    given = [f"actor_rollout_ref.model.path={quoted(str(path.resolve()) if path.exists() else model)}"]
    given.append("data.val_sample_per_source=null")
    if endpoint:
        rollout = "actor_rollout_ref.rollout"
        given += [f"{rollout}.name=openai", f"{rollout}.endpoint.url={quoted(endpoint)}"]
    return given


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status of the evaluation."""
    parser = argparse.ArgumentParser(
        prog="python -m search_r1.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL", help="folder, hub name, or name at the endpoint")
    parser.add_argument("--endpoint", metavar="URL", help="base address of an OpenAI-compatible API, such as .../v1")
    parser.add_argument("--config-name", default="grpo", help="configuration to start from (default: grpo)")
    parser.add_argument("--compare", type=Path, metavar="FILE", help="evaluation.jsonl of another model or method")
    parser.add_argument("--closed-book", type=Path, metavar="FILE", help="evaluation.jsonl without search")
    parser.add_argument("--published", metavar="NAME", help="published rows of this model only, such as Qwen2.5-7B")
    args, overrides = parser.parse_known_args(argv)
    given = given_overrides(args.model, args.endpoint)
    if not any(o.startswith("trainer.experiment_name=") for o in overrides):
        path = Path(args.model)
        name = run_name(str(path.resolve()) if path.exists() else args.model)
        given.append(f"trainer.experiment_name={quoted(name)}")
    files = {
        name: value.resolve() for name, value in vars(args).items() if name in ("compare", "closed_book") and value
    }
    try:
        config, complete = composed(args.config_name, [*given, *overrides])
        validate(as_plain(config))
        status = surrounded("verl.trainer.main_eval", args.config_name, complete, config)
    except ConfigError as error:
        sys.exit(f"error: {error}")
    if status:
        return status
    folder = Path(config.trainer.default_local_dir)
    flags = [f"--published={args.published}"] if args.published else []
    flags += [f"--{name.replace('_', '-')}={value}" for name, value in files.items()]
    return report.main([str(folder / "evaluation.jsonl"), "--out", str(folder), *flags])


if __name__ == "__main__":
    sys.exit(main())
