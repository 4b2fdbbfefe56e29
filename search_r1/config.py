"""Configuration of what is made before a training, and of supervised fine-tuning."""

from typing import Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from search_r1.world.generate import WorldConfig
from verl.utils.config import Config


class SetupConfig(Config):
    """What the launcher makes before the training, unless it is there and up to date.

    Where a key is null, nothing is made.
    """

    world: str | None = None
    """Folder of the closed world; made if it is missing."""
    world_options: WorldConfig = WorldConfig()
    """Options of the closed world. A folder that was made with other options is refused."""
    questions: str | None = None
    """File of questions and answers (JSONL, CSV or parquet), from which data.train_files and
    data.val_files are made."""
    template: str = "search"
    """Prompt template for `questions`."""
    test_size: PositiveInt = 100
    """Number of questions of `questions` that are held out for validation."""
    corpus_path: str | None = None
    """JSONL corpus with `id` and `contents`."""
    index_dir: str | None = None
    """Folder of the BM25 index of the corpus. It is built, and is served unless the command line
    gives retriever.url."""
    server_flags: list[str] = []
    """Further flags of the retrieval server that the launcher starts."""


class FinetuneConfig(Config):
    """The supervised baselines. Without `data` the run is reinforcement learning."""

    data: Literal["answers", "samples", "traces"] | None = None
    """What the policy is trained on. answers: the gold answers of the training questions (SFT).
    samples: its own trajectories that scored `min_score` or more (rejection sampling). traces:
    trajectories of other programs and models, in the files `traces`."""
    traces: str | list[str] = []
    """File of traces, or a list of them, for data=traces (docs/finetune.md lists the forms)."""
    trace_tools: dict[str, str] = {}
    """For names of tools in traces those of the agent, where they differ: {web_search: search}."""
    rounds: PositiveInt = 1
    """Number of times that samples are drawn and trained on."""
    samples: PositiveInt = 5
    """Trajectories per training question."""
    temperature: PositiveFloat = 1.0
    """Temperature at which the samples are drawn."""
    min_score: float = 1.0
    """Lowest reward of a trajectory that is trained on. That of a trace is its own, or else the
    exact match of its answer; one without reward and gold answers is trained on."""
    steps: PositiveInt = 300
    """Optimizer steps per round."""
    train_batch_size: PositiveInt = 64
    """Rows per optimizer step, over all ranks."""
    max_token_len_per_gpu: PositiveInt = 16384
    """Maximum number of tokens in a forward-backward pass of one rank; its memory grows with it."""
    lr: float = Field(default=1e-5, gt=0)
    """Learning rate."""

    @model_validator(mode="after")
    def _traces_are_named_where_they_are_read(self) -> Self:
        reads = self.data == "traces"
        if reads and not self.traces:
            raise ValueError("data=traces with the files of traces: traces=FILE")
        if not reads and (self.traces or self.trace_tools):
            raise ValueError("traces and trace_tools with data=traces alone: method=traces")
        return self
