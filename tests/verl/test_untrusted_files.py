"""Files of somebody else: reading them raises, and what they would run is not run."""

import io
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.distributed import run_ranks
from tests.models import make_tiny_qwen2
from tests.verl.workers import build, save
from verl.protocol import DataProto
from verl.trainer.ppo.checkpoints import read_state
from verl.utils.checkpoint_storage import CheckpointError, Index, StoredTensor, read_index
from verl.utils.run_folder import INDEX


class Payload:
    """Whoever unpickles it makes the file `marker`."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


@pytest.fixture
def marker(tmp_path):
    """A file that no reading may make. That the payload would make it is shown first."""
    path = tmp_path / "payload ran"
    pickle.loads(pickle.dumps(Payload(path)))
    path.unlink()
    yield path
    assert not path.exists()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """(model, folder with the checkpoints of an actor and a critic)"""
    model = make_tiny_qwen2(
        tmp_path_factory.mktemp("model"), layers=1, width=32, vocab=300, tied=True
    )
    folder = tmp_path_factory.mktemp("saved")
    run_ranks(1, saved, str(model), str(folder))
    return str(model), folder


def saved(model: str, root: str) -> None:
    save(build(model), root)


def refusals(model: str, folders: list[str]) -> list[str]:
    """What an actor says to each checkpoint."""
    actor = build(model)[0]
    said = []
    for folder in folders:
        try:
            actor.load_checkpoint(folder)
        except CheckpointError as error:
            said.append(str(error))
    return said


def test_a_checkpoint_has_no_pickle_to_read(checkpoint):
    names = {path.name for path in checkpoint[1].rglob("*") if path.is_file()}
    assert names == {INDEX, "__0_0.distcp"}
    for folder in (checkpoint[1] / "actor", checkpoint[1] / "critic"):
        for chunk in (
            chunk for tensor in read_index(folder).tensors.values() for chunk in tensor.chunks
        ):
            stored = (folder / chunk.file).read_bytes()[chunk.start : chunk.start + chunk.length]
            assert list(torch.load(io.BytesIO(stored), weights_only=True).shape) == chunk.sizes


def rewritten(folder: Path, tensors: dict[str, StoredTensor], **changes: Any) -> None:
    """Changes the place of the first chunk of the first tensor in the index."""
    name, tensor = next(iter(tensors.items()))
    chunks = [tensor.chunks[0].model_copy(update=changes), *tensor.chunks[1:]]
    index = Index(tensors={**tensors, name: tensor.model_copy(update={"chunks": chunks})})
    (folder / INDEX).write_text(index.model_dump_json())


def test_checkpoints_of_ranks(tmp_path, checkpoint, marker):
    """A payload in place of the index, beside none, of a tensor, of a rank's own entry; in a file
    elsewhere."""
    model, good = checkpoint
    cases = ("index", "old", "tensor", "rank", "elsewhere", "entry")
    for case in cases:
        shutil.copytree(good / "actor", tmp_path / case)
    tensors = Index.model_validate_json((good / "actor" / INDEX).read_bytes()).tensors
    bomb = pickle.dumps(Payload(marker))
    (tmp_path / "index" / INDEX).write_bytes(bomb)
    (tmp_path / "old" / INDEX).unlink()
    (tmp_path / "old" / ".metadata").write_bytes(bomb)

    torch.save(Payload(marker), tmp_path / "bomb.pt")
    for case, name in (("tensor", next(iter(tensors))), ("rank", "rank_0")):
        ordered = {name: tensors[name], **tensors}
        content = (tmp_path / "bomb.pt").read_bytes()
        (tmp_path / case / "__7_0.distcp").write_bytes(content)
        rewritten(tmp_path / case, ordered, file="__7_0.distcp", start=0, length=len(content))
    rewritten(tmp_path / "elsewhere", tensors, file="../bomb.pt", start=0)
    text = (tmp_path / "entry" / INDEX).read_text().replace("uint8", "bytes")
    (tmp_path / "entry" / INDEX).write_text(text)

    (said,) = run_ranks(1, refusals, model, [str(tmp_path / case) for case in cases])
    told = dict(zip(cases, said, strict=True))
    assert "not the index of a checkpoint" in told["index"]
    assert (
        "a pickle, from a version" in told["old"]
        and "Finish the run with the version" in told["old"]
    )
    assert "could not be read" in told["tensor"] and "Weights only load failed" in told["tensor"]
    assert "could not be read" in told["rank"] and "Weights only load failed" in told["rank"]
    assert "not the index of a checkpoint" in told["elsewhere"] and "pattern" in told["elsewhere"]
    assert "not the index of a checkpoint" in told["entry"] and "dtype" in told["entry"]


def test_the_drivers_part_of_a_checkpoint(tmp_path, marker):
    torch.save({"step": 1, "more": Payload(marker)}, tmp_path / "trainer.pt")
    with pytest.raises(
        CheckpointError,
        match=r"trainer\.pt: a pickle, from a version that saved its checkpoints so",
    ):
        read_state(tmp_path)
    (tmp_path / "trainer.json").write_bytes(pickle.dumps(Payload(marker)))
    with pytest.raises(
        CheckpointError, match=r"trainer\.json: the driver's part of the checkpoint cannot be read"
    ):
        read_state(tmp_path)


def test_a_batch_that_was_kept(tmp_path, marker):
    torch.save({"batch": {}, "rest": Payload(marker)}, tmp_path / "actor_000001.pt")
    with pytest.raises(pickle.UnpicklingError):
        DataProto.load(tmp_path / "actor_000001.pt")


def test_arrays_of_an_index(tmp_path, marker):
    """Retrieval indexes are read by np.load as it is."""
    np.save(tmp_path / "idf.npy", np.array([Payload(marker)], dtype=object), allow_pickle=True)
    for mode in (None, "r"):
        with pytest.raises(ValueError, match=r"allow_pickle=False|Python objects"):
            np.load(tmp_path / "idf.npy", mmap_mode=mode)
