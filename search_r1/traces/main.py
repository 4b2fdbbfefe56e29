"""Makes traces into rows for supervised fine-tuning, so that they can be looked at first.

    python -m search_r1.traces.main --in FILE --out ROWS.jsonl [--show N] [key=value ...]

FILE holds trajectories of any program or model (docs/finetune.md lists the forms), as JSONL, JSON
or parquet. ROWS.jsonl has the `input_ids` and the `loss_mask` on which method=traces trains with
the same overrides: experiment=, method=, template=, actor_rollout_ref.model.path=, agent.format=,
finetune.min_score= and so on. Beside it, ROWS.rejected.jsonl names every trace that was left out by
file and line, with the reason.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq

from search_r1.config import FinetuneConfig
from search_r1.launch import composed, files_of
from search_r1.program import command_parser
from search_r1.prompts import build_prompt
from search_r1.traces.convert import Conversion, Converter, Example, convert
from search_r1.trajectory import question_of
from verl.trainer.compose import as_plain
from verl.trainer.config import build_agent, build_tokenizer, validate
from verl.trainer.overrides import written
from verl.utils.dataset import read_row
from verl.utils.errors import ConfigError, DataError, listed
from verl.utils.run_folder import write_atomically

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NAMED = "trainer.experiment_name=traces"
"""A run needs a name, and nothing is run here."""


def template_of(raw: Mapping[str, Any]) -> str:
    """The template in which a training with this configuration asks its questions.

    Raises ConfigError where that is the prompt of the data, and this is made from no template that
    the configuration names.
    """
    if raw["template"] is not None:
        return raw["template"]
    template = raw["setup"]["template"]
    for path in filter(lambda path: Path(path).is_file(), files_of(raw["data"]["train_files"])):
        first = next(pq.ParquetFile(path).iter_batches(batch_size=1)).to_pylist()[0]
        row = read_row(first)
        asked = [{"role": "user", "content": build_prompt(question_of(row), template)}]
        if row["prompt"] != asked:
            raise ConfigError(
                [
                    f"template: {path} asks in another prompt than setup.template={template}, so "
                    "that traces would be asked otherwise than questions in training; "
                    "template=NAME asks both in the same one"
                ]
            )
    return template


def converter_of(raw: dict[str, Any]) -> tuple[Converter, "PreTrainedTokenizerBase"]:
    """The converter of a configuration, and the tokenizer. Raises ConfigError."""
    config = validate(raw)
    finetune = FinetuneConfig.model_validate(raw["finetune"])
    tokenizer = build_tokenizer(config)
    agent = build_agent(config, tokenizer)
    template = template_of(raw)
    return Converter(agent, template, finetune.min_score, finetune.trace_tools), tokenizer


def write_rows(conversion: Conversion, path: Path) -> None:
    """Writes the rows to `path`, and what was left out beside it."""
    lines = [json.dumps(example) for example in conversion.examples]
    write_atomically(path, "".join(f"{line}\n" for line in lines))
    rejected = [
        json.dumps({"place": place, "reason": error.reason, "found": str(error)})
        for place, error in conversion.rejected
    ]
    beside = path.with_name(f"{path.stem}.rejected.jsonl")
    write_atomically(beside, "".join(f"{line}\n" for line in rejected))


def in_words(example: Example, tokenizer: "PreTrainedTokenizerBase") -> str:
    """The text of a row, divided where tokens begin or cease to be trained."""
    pairs = zip(example["loss_mask"], example["input_ids"], strict=True)
    lines: list[str] = []
    for is_trained, run in groupby(pairs, key=lambda pair: pair[0]):
        ids = [token for _, token in run]
        heading = "trained" if is_trained else "not trained"
        lines.append(f"--- {heading} ({len(ids)} tokens)\n{tokenizer.decode(ids)}\n")
    return "".join(lines)


def build_parser() -> argparse.ArgumentParser:
    """The flags of the command."""
    parser = command_parser("search_r1.traces.main", __doc__)
    add = parser.add_argument
    add(
        "--in",
        dest="files",
        metavar="FILE",
        action="append",
        required=True,
        type=Path,
        help="file of traces; may be given several times",
    )
    add("--out", metavar="ROWS.jsonl", type=Path, required=True, help="file of rows to write")
    add("--show", metavar="N", type=int, default=0, help="show the first N rows as text")
    add("--config-name", default="grpo", help="configuration to start from (default: grpo)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Converts as the command line says; returns the exit status."""
    args, overrides = build_parser().parse_known_args(argv)
    files = [str(path.expanduser().resolve()) for path in args.files]
    out = args.out.expanduser().resolve()  # `composed` changes the working directory
    given = ["finetune.data=traces", f"finetune.traces={written(files)}"]
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        config, _ = composed(args.config_name, [NAMED, *overrides, *given])
        converter, tokenizer = converter_of(as_plain(config))
        conversion = convert(converter, [Path(path) for path in files])
    except (ConfigError, DataError) as error:
        sys.exit(f"error: {error}")
    write_rows(conversion, out)
    for number, example in enumerate(conversion.examples[: args.show], 1):
        sys.stdout.write(f"=== row {number}\n{in_words(example, tokenizer)}")
    if faults := conversion.faults():
        sys.stderr.write(listed(faults) + "\n")
    sys.stdout.write(f"{out}: {conversion.summary()}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
