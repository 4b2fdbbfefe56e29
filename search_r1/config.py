"""Configuration of what the search task makes before a training, and of its fine-tuning."""

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt

from search_r1.world.generate import WorldConfig
from verl.utils.config import Config


class SetupConfig(Config):
    """What is made before training where it is absent, or was made from something else.

    Null: nothing is made.
    """

    world: str | None = None
    """Folder of the closed world."""
    world_options: WorldConfig = WorldConfig()
    """What it is made with. A folder that was made with other options is refused."""
    questions: str | None = None
    """JSONL, CSV or parquet of questions and answers, made into data.train_files and
    data.val_files."""
    template: str = "search"
    """Prompt template for `questions`."""
    test_size: PositiveInt = 100
    """Questions of `questions` held out."""
    corpus_path: str | None = None
    """JSONL corpus with `id` and `contents`."""
    index_dir: str | None = None
    """Folder of its BM25 index, built and served unless retriever.url is given as an override."""
    server_flags: list[str] = []
    """Further flags of that server."""


class FinetuneConfig(Config):
    """The supervised baselines; without `data` the run is reinforcement learning."""

    data: Literal["answers", "samples"] | None = None
    """answers: of the training questions (SFT). samples: the policy's own trajectories that scored
    (rejection)."""
    rounds: PositiveInt = 1
    """Times that samples are drawn and learned."""
    samples: PositiveInt = 5
    """Trajectories per training question."""
    temperature: PositiveFloat = 1.0
    """Of the sampling."""
    min_score: float = 1.0
    """Reward to keep a trajectory."""
    steps: PositiveInt = 300
    """Optimizer steps per round."""
    train_batch_size: PositiveInt = 64
    """Rows per optimizer step, over all ranks."""
    max_token_len_per_gpu: PositiveInt = 16384
    """Most tokens in a forward-backward pass of one rank: what its memory is proportional to."""
    lr: float = Field(default=1e-5, gt=0)
    """Learning rate."""
