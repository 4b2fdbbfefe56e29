"""Lets a model play over the training questions, and keeps the trajectories that scored.

    python -m search_r1.traces.sample MODEL [--endpoint URL] [--out FILE] [key=value ...]

MODEL is what it is for `search_r1.evaluate`: a folder, a run, a name of the hub or, with
--endpoint, the name of a model behind an OpenAI-compatible API. The agent loop of training asks it
each question of data.train_files (made of setup.questions, if that is given) finetune.samples
times at finetune.temperature. Trajectories with a reward of finetune.min_score or more are written
to FILE, on which method=traces trains any other model. The same command goes on where it stopped.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from search_r1.data.rejection import read_records
from search_r1.evaluate import add_model_flags, given_overrides, model_of, run_name
from search_r1.launch import MODELS, TOKENIZER, composed, files_of, run_with_setup
from search_r1.program import command_parser
from verl.trainer.compose import as_plain
from verl.trainer.config import validate
from verl.trainer.overrides import quoted, written
from verl.utils.errors import ConfigError, DataError, ModelError
from verl.utils.run_folder import write_atomically
from verl.utils.wording import counted

TRACES = "traces.jsonl"
RECORDS = "evaluation.jsonl"
"""The file of all trajectories in the folder of an evaluation."""


def sampling_overrides(raw: Mapping[str, Any], folder: Path) -> list[str]:
    """The overrides by which an evaluation samples on the training questions, into `folder`."""
    data = raw["data"]
    finetune = raw["finetune"]
    val = "actor_rollout_ref.rollout.val_kwargs"
    return [
        f"data.val_files={written(files_of(data['train_files']))}",
        f"data.val_data_num={written(data['train_data_num'])}",
        f"data.val_sample_seed={data['train_sample_seed']}",
        "data.val_sample_per_source=null",
        f"{val}.n={finetune['samples']}",
        f"{val}.temperature={finetune['temperature']}",
        f"trainer.default_local_dir={quoted(str(folder))}",
    ]


def write_scored(records: Path, out: Path, min_score: float) -> str:
    """Writes the records that scored enough to `out`; returns how many there are, in words.

    Raises DataError where none did.
    """
    all_of_them = list(read_records(records))
    kept = [record for record in all_of_them if record["reward"]["score"] >= min_score]
    total = counted(len(all_of_them), "trajectory", "trajectories")
    if not kept:
        raise DataError(f"{records}: none of {total} scored finetune.min_score={min_score:g}")
    lines = [json.dumps(record) for record in kept]
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, "".join(f"{line}\n" for line in lines))
    questions = counted(len({record["row"] for record in kept}), "question")
    return f"{len(kept):,} of {total} scored {min_score:g} or more, to {questions}"


def build_parser() -> argparse.ArgumentParser:
    """The flags of the command."""
    parser = command_parser("search_r1.traces.sample", __doc__)
    add_model_flags(parser)
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help=f"file to write (default: {TRACES} in the run)"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Samples as the command line says; returns the exit status."""
    args, overrides = build_parser().parse_known_args(argv)
    out = args.out.expanduser().resolve() if args.out else None
    try:
        name = run_name(model_of(args.model, args.endpoint), "samples")
        given = [
            *given_overrides(args.model, args.endpoint),
            f"trainer.experiment_name={quoted(name)}",
        ]
        # The name of a model at an endpoint is not a path, even if a folder here has that name.
        models = (TOKENIZER,) if args.endpoint else MODELS
        config, complete = composed(args.config_name, [*given, *overrides], models)
        raw = as_plain(config)
        validate(raw)
        folder = Path(config.trainer.default_local_dir)
        asked = [*complete, *sampling_overrides(raw, folder)]
        status = run_with_setup("verl.trainer.main_eval", args.config_name, asked, config)
        if status:
            return status
        out = out or folder / TRACES
        said = write_scored(folder / RECORDS, out, raw["finetune"]["min_score"])
    except (ConfigError, DataError, ModelError) as error:
        sys.exit(f"error: {error}")
    sys.stdout.write(f"{out}: {said}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
