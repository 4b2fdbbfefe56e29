"""Writes a closed world: corpus.jsonl, train.parquet and the held-out question files.

python -m search_r1.world --out DIR
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import TypeAdapter

from search_r1.data.made import making
from search_r1.world.generate import OPTIONS_FILE, World, WorldConfig, make_world


def write_world(world: World, options: WorldConfig, folder: Path) -> None:
    """Writes what made the world, the passages as JSONL and each list of questions as parquet."""
    with making(folder, options.model_dump()) as pending:
        (pending / OPTIONS_FILE).write_text(
            options.model_dump_json(indent=2) + "\n", encoding="utf-8"
        )
        lines = (json.dumps(p) + "\n" for p in world.passages)
        (pending / "corpus.jsonl").write_text("".join(lines), encoding="utf-8")
        for name, rows in world.rows.items():
            pq.write_table(pa.Table.from_pylist(rows), pending / f"{name}.parquet")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m search_r1.world", description="Generate a closed world."
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    for name, field in WorldConfig.model_fields.items():
        description = f"{field.description} (default: {field.default})"
        parser.add_argument(
            "--" + name.replace("_", "-"),
            type=TypeAdapter(field.annotation or int).validate_python,
            default=field.default,
            metavar=name.upper(),
            help=description,
        )
    args = vars(parser.parse_args(argv))
    out = args.pop("out")
    options = WorldConfig(**args)
    world = make_world(options)
    write_world(world, options, out)
    counts = ", ".join(f"{len(rows)} {name}" for name, rows in world.rows.items())
    sys.stdout.write(f"{out}: {len(world.passages)} passages; questions: {counts}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
