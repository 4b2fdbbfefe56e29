"""`python -m search_r1.export CHECKPOINT [--out DIR]`: writes a checkpoint as a Hugging Face model.

CHECKPOINT is a run folder (its newest checkpoint), its `best` or `latest`, a `global_step_N`, or
a folder that an alarm left in `alarms`. The export takes one process and no GPU. The dtype, the
tokenizer and the generation settings are those of the model that the run began with; LoRA adapters
are merged. `search_r1.evaluate` and `search_r1.infer` export a checkpoint by themselves.
"""

import fcntl
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import chdir, contextmanager, nullcontext
from pathlib import Path

from search_r1.program import command_parser
from verl.utils.errors import ConfigError, ModelError
from verl.utils.model_names import HF, find_checkpoint, ready_model
from verl.utils.places import root


def loadable_model(name: str) -> str:
    """Returns what an engine can load: the full path of a Hugging Face folder, or a hub name as is.

    A checkpoint is exported first, into its own folder, where the next call finds the export.
    Raises ModelError or ConfigError.
    """
    if (model := ready_model(name)) is not None:
        return model
    checkpoint = find_checkpoint(name)
    try:
        with alone_in(checkpoint):
            if (model := ready_model(name)) is None:  # another process may have made it meanwhile
                model = str(export_to(checkpoint, checkpoint / HF))
    except OSError as error:
        raise ModelError(
            f"{checkpoint}: no {HF} folder could be written there ({error}); python -m "
            f"search_r1.export {checkpoint} --out DIR writes it elsewhere"
        ) from error
    return model


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Holds a lock on a folder, after waiting for any other process that holds it.

    Raises OSError where the file system cannot lock folders.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def export_to(
    checkpoint: Path, out: Path, base: str | None = None, tokenizer: str | None = None
) -> Path:
    """Writes the Hugging Face folder `out`, reports it on stderr, and returns it.

    Raises ModelError, ConfigError or OSError.
    """
    # imports torch, which takes seconds and is not needed where the model is there already
    from verl.trainer.export import (
        export,
    )
    from verl.utils.checkpoint_storage import CheckpointError

    sys.stderr.write(f"{checkpoint}: writing its policy as a Hugging Face model to {out}\n")
    try:
        with chdir(root()):  # relative paths in the configuration of a run start there
            export(checkpoint.resolve(), out.resolve(), base, tokenizer)
    except CheckpointError as error:
        raise ModelError(str(error)) from error
    return out


def main(argv: Sequence[str] | None = None) -> int:
    """Exports as the command line says; returns the exit status."""
    parser = command_parser("search_r1.export", __doc__)
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="run folder, its best or latest, or a checkpoint in it",
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder to write (default: hf in the checkpoint's)"
    )
    parser.add_argument(
        "--base", metavar="MODEL", help="the model that the run began with, if it has moved"
    )
    parser.add_argument("--tokenizer", metavar="DIR", help="its tokenizer, if that has moved")
    args = parser.parse_args(argv)
    base, tokenizer = (
        str(Path(p).resolve()) if p and Path(p).exists() else p for p in (args.base, args.tokenizer)
    )
    try:
        checkpoint = find_checkpoint(args.checkpoint)
        out = args.out.resolve() if args.out else checkpoint / HF
        with nullcontext() if args.out else alone_in(checkpoint):
            export_to(checkpoint, out, base, tokenizer)
    except (ConfigError, ModelError, OSError) as error:
        sys.exit(f"error: {error}")
    sys.stdout.write(f"{out}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
