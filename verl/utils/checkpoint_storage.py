"""Storage of a checkpoint's tensors: torch's sharded files, and an index in JSON.

torch.distributed.checkpoint pickles its own index (`.metadata`) and every entry that is no tensor,
and reading a pickle can run code that its writer put there. Here there is no pickle: the index is
JSON, which is checked entry by entry, every entry is a tensor, and torch reads tensors with
`weights_only=True`.
"""

import os
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, NonNegativeInt, ValidationError
from torch.distributed.checkpoint.filesystem import (
    FileSystemReader,
    FileSystemWriter,
    _StorageInfo,  # pyright: ignore[reportPrivateUsage]
)
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

from verl.utils.config import Config, problems_of
from verl.utils.run_folder import INDEX, PICKLED_INDEX, write_atomically

FileName = Annotated[str, Field(pattern=r"^__\d+_\d+\.distcp$")]
"""The name of a file beside the index, as torch names them; no path out of the folder."""
Shape = list[NonNegativeInt]


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read.

    The message names the folder, the ranks and what stopped them.
    """


class Chunk(Config):
    """A part of a tensor, and the bytes in a file that hold it."""

    offsets: Shape
    sizes: Shape
    file: FileName
    start: NonNegativeInt
    length: NonNegativeInt


class StoredTensor(Config):
    dtype: Literal[
        "float64",
        "float32",
        "bfloat16",
        "float16",
        "int64",
        "int32",
        "int16",
        "int8",
        "uint8",
        "bool",
    ]
    size: Shape
    chunks: list[Chunk]


class Index(Config):
    """All tensors of a checkpoint by name."""

    tensors: dict[str, StoredTensor]


class TensorWriter(FileSystemWriter):
    """Writes the files as torch does, and the index as JSON."""

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Writes the index, on one rank, once the files of all ranks are written.

        Raises TypeError for an entry that is no tensor.
        """
        places = {result.index: result.storage_data for written in results for result in written}
        tensors = {
            name: _stored(name, entry, places)
            for name, entry in metadata.state_dict_metadata.items()
        }
        write_atomically(Path(self.path) / INDEX, Index(tensors=tensors).model_dump_json())


class TensorReader(FileSystemReader):
    """Reads what TensorWriter wrote."""

    def read_metadata(self, *_: object, **__: object) -> Metadata:
        """Reads the index and returns it in torch's form. Raises as `read_index` does."""
        metadata = Metadata({}, storage_data={}, storage_meta=StorageMeta(load_id=self.load_id))
        for name, tensor in read_index(self.path).tensors.items():
            chunks = [
                ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.sizes))
                for c in tensor.chunks
            ]
            properties = TensorProperties(dtype=getattr(torch, tensor.dtype))
            metadata.state_dict_metadata[name] = TensorStorageMetadata(
                properties, torch.Size(tensor.size), chunks
            )
            for chunk in tensor.chunks:
                place = _StorageInfo(chunk.file, chunk.start, chunk.length)
                metadata.storage_data[MetadataIndex(name, chunk.offsets)] = place
        return metadata


def read_index(folder: str | os.PathLike[str]) -> Index:
    """Reads the index of the checkpoint in `folder`.

    Raises FileNotFoundError when there is none, CheckpointError when it cannot be used.
    """
    path = Path(folder) / INDEX
    if not path.exists() and (path.parent / PICKLED_INDEX).exists():
        raise CheckpointError(old_format(path.parent / PICKLED_INDEX))
    try:
        return Index.model_validate_json(path.read_bytes())
    except ValidationError as error:
        problems = problems_of(error, "")
        raise CheckpointError(
            f"{path}: not the index of a checkpoint: {'; '.join(problems[:3])}"
        ) from error


def old_format(file: Path) -> str:
    """The message about a checkpoint with a pickled index instead of JSON, and what to do."""
    return (
        f"{file}: a pickle, from a version that saved its checkpoints so. Reading it would run "
        "whatever it holds, so it is not read. Finish the run with the version that began it, or "
        "begin a new one, in another folder, from an export of its policy "
        "(actor_rollout_ref.model.path=.../hf)"
    )


def _stored(name: str, entry: Any, places: dict[MetadataIndex, _StorageInfo]) -> StoredTensor:
    if not isinstance(entry, TensorStorageMetadata):
        raise TypeError(f"{name}: a checkpoint holds tensors only")
    chunks: list[Chunk] = []
    for chunk in entry.chunks:
        place = places[MetadataIndex(name, chunk.offsets)]
        chunks.append(
            Chunk(
                offsets=list(chunk.offsets),
                sizes=list(chunk.sizes),
                file=place.relative_path,
                start=place.offset,
                length=place.length,
            )
        )
    dtype: Any = str(entry.properties.dtype).removeprefix("torch.")
    return StoredTensor(dtype=dtype, size=list(entry.size), chunks=chunks)
