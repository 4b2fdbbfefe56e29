"""Commands that are several programs, or that say more briefly what a program takes."""

import sys
from collections.abc import Callable, Mapping

from search_r1.cli.commands import TRAINED_BY, function_at

HELP = ("--help", "-h")
TRAIN_HELP = """\
Usage: search-r1 train [grpo|ppo] [experiment=NAME] [method=NAME] [key=value ...]

Makes what the configuration names (data, index, base model), serves the index, trains, evaluates
before and after, and writes a report to the run folder. The same command continues a stopped run.

  search-r1 train                                     GRPO on the closed world, on this machine
  search-r1 train ppo trainer.total_training_steps=3  PPO, three steps
  search-r1 train experiment=own_model setup.corpus_path=C.jsonl setup.questions=Q.jsonl \\
      actor_rollout_ref.model.path=Qwen/Qwen2.5-0.5B-Instruct

  experiment=NAME       a recipe: search-r1 train experiment=<TAB>, or a file of configs/experiment
  method=NAME           how the policy searches, such as tools, react, rag
  key=value             any key; docs/configuration.md says what each means
  --cfg job             shows every key with its value instead of training
  --config-name NAME    the configuration to start from: grpo (default) or ppo
  --info defaults-tree  shows which files the configuration is composed of

Wrong keys and values are listed before anything is made. Paths are relative to where you stand.
search-r1 estimate says what a configuration takes. docs/cli.md, docs/algorithms.md, docs/data.md
"""


def train() -> int:
    """Trains, or shows the help of the command."""
    arguments = sys.argv[1:]
    if set(HELP) & set(arguments):
        sys.stdout.write(TRAIN_HELP)
        return 0
    if arguments and arguments[0] in TRAINED_BY:
        arguments[:1] = ["--config-name", arguments[0]]
    from search_r1 import launch

    return launch.main(arguments)


def data() -> int | None:
    """Makes training files of questions, of benchmarks, or of trajectories."""
    part = chosen_part(
        {
            "prepare": (
                "training files of your own questions and answers",
                "search_r1.data.prepare:main",
            ),
            "mask": (
                "training files of a corpus alone, whose questions are masked sentences",
                "search_r1.data.mask:main",
            ),
            "synthesize": (
                "training files of a corpus alone, whose questions a model writes",
                "search_r1.data.synthesize:main",
            ),
            "demonstrate": (
                "traces of the protocol for training questions, without a model",
                "search_r1.data.demonstrate:main",
            ),
            "filter": (
                "the training questions that a policy solves sometimes",
                "search_r1.data.pass_rate:main",
            ),
            "benchmarks": (
                "training and test files of published sets of questions",
                "search_r1.cli.forms:benchmarks",
            ),
            "sample": (
                "trajectories that a model, also at an endpoint, plays over questions",
                "search_r1.traces.sample:main",
            ),
            "traces": (
                "rows to fine-tune on, of trajectories of other programs and models",
                "search_r1.traces.main:main",
            ),
        }
    )
    return part()


def expand() -> int | None:
    """Finds words that documents lack, for an index of expanded documents."""
    part = chosen_part(
        {
            "neighbours": (
                "words of the documents most like each one",
                "search_r1.search.expand_neighbours:main",
            ),
            "model": ("words that a language model proposes", "search_r1.expand:main"),
        }
    )
    return part()


def benchmarks() -> int | None:
    """Makes the training or the test questions of the paper, or those of other sets."""
    part = chosen_part(
        {
            "train": (
                "training questions (NQ, HotpotQA)",
                "search_r1.data.benchmarks:paper_train_set",
            ),
            "test": ("test questions (the seven sets)", "search_r1.data.benchmarks:paper_test_set"),
        }
    )
    return part()


def estimate() -> int | None:
    """Estimates the GPU memory of a configuration, or the time of its steps."""
    if sys.argv[1:] and sys.argv[1] not in ("memory", "time", *HELP):
        sys.argv.insert(1, "memory")
    part = chosen_part(
        {
            "memory": ("the GPU memory of a training (default)", "verl.estimate.report:main"),
            "time": ("the seconds of a training step", "verl.estimate.step_time:main"),
        }
    )
    return part(prog=sys.argv[0])


def chosen_part(parts: Mapping[str, tuple[str, str]]) -> Callable[..., int | None]:
    """The function of the part that the first argument names, which is taken from `sys.argv`.

    `parts` has a summary and `module:function` for each. Where the argument names none of them,
    shows what there is and ends the program.
    """
    program, *arguments = sys.argv
    part = arguments[0] if arguments else ""
    if part not in parts:
        is_asked = part in HELP
        (sys.stdout if is_asked else sys.stderr).write(parts_page(program, parts))
        sys.exit(0 if is_asked else 2)
    sys.argv = [f"{program} {part}", *arguments[1:]]
    return function_at(parts[part][1])


def parts_page(program: str, parts: Mapping[str, tuple[str, str]]) -> str:
    """The help of a command that has parts."""
    width = max(map(len, parts))
    lines = [f"  {name:{width}}  {summary}" for name, (summary, _) in parts.items()]
    usage = f"Usage: {program} {'|'.join(parts)} ..."
    return "\n".join([usage, "", *lines, "", f"{program} PART --help says more."]) + "\n"
