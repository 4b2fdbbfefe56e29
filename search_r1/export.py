"""`python -m search_r1.export CHECKPOINT [--out DIR]`: a Hugging Face folder of any checkpoint.

CHECKPOINT is a run folder (its newest checkpoint), its `best` or `latest`, a `global_step_N`, or
what an alarm left in `alarms`. It takes one process and no GPU; the dtype, tokenizer and generation
settings are those of the model that the run began with, and adapters are merged.
`search_r1.evaluate` and `search_r1.infer` do this by themselves.
"""

import argparse
import fcntl
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import chdir, contextmanager, nullcontext
from pathlib import Path

from search_r1.launch import ROOT
from verl.utils.errors import ConfigError, ModelError
from verl.utils.model_names import HF, find_checkpoint, ready_model


def loadable_model(name: str) -> str:
    """What an engine can load for MODEL: a Hugging Face folder by its full path, or `name` itself
    for a hub name.

    A checkpoint is exported first, to its own folder, where the next call finds it. Raises
    ModelError or ConfigError.
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
    """Waits until no other process is in here with the same folder. Raises OSError where folders
    cannot be locked."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def export_to(
    checkpoint: Path, out: Path, base: str | None = None, tokenizer: str | None = None
) -> Path:
    """Writes the Hugging Face folder `out`, saying so; returns it. Raises ModelError, ConfigError
    or OSError."""
    # brings torch, which who names a finished model need not wait for
    from verl.trainer.export import (
        export,
    )
    from verl.utils.checkpoint_storage import CheckpointError

    sys.stderr.write(f"{checkpoint}: writing its policy as a Hugging Face model to {out}\n")
    try:
        with chdir(ROOT):  # relative paths in the configuration of a run begin there
            export(checkpoint.resolve(), out.resolve(), base, tokenizer)
    except CheckpointError as error:
        raise ModelError(str(error)) from error
    return out


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status of the export."""
    parser = argparse.ArgumentParser(
        prog="python -m search_r1.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
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
