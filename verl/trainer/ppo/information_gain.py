"""The gain of information of a turn: how much likelier the right answer is after it.

IGPO (arXiv 2510.14967). With the answer a of L tokens and the context c_k in which turn k begins,

    p_k = exp(1/L sum_j log pi(a_j | c_k, a_<j)),    gain of turn k = p_(k+1) - p_k

where pi is the policy at the temperature at which it samples. The last turn of a trajectory has no
gain: it is paid the outcome.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import cast

import torch
from transformers import PreTrainedTokenizerBase

from verl.agent import Row, Segment, Source, Trajectory
from verl.protocol import DataProto, collate_trajectories
from verl.rollout.agent_worker import Job
from verl.trainer.config import InformationGainConfig
from verl.utils.answers import answers_of
from verl.utils.errors import RewardError
from verl.utils.seqlen_balancing import balance
from verl.utils.tokenizer import encode_text
from verl.utils.torch_functional import masked_mean

COMPONENT = "information_gain"
"""The name of the gain in the reward of a trajectory."""


def pay_information(
    jobs: Sequence[Job],
    trajectories: Sequence[Trajectory],
    tokenizer: PreTrainedTokenizerBase,
    config: InformationGainConfig,
    compute_log_prob: Callable[[DataProto], DataProto],
    world_size: int,
) -> dict[str, float]:
    """Pays each turn `config.weight` times its gain, as a part of the trajectory's score.

    `compute_log_prob` adds `old_log_probs` to a batch, on `world_size` ranks. Returns what was
    computed for it. Raises RewardError for a question without an answer, and for a reward with a
    number of this name.
    """
    if any(COMPONENT in trajectory.reward for trajectory in trajectories):
        raise RewardError(
            f"the reward returned a number under {COMPONENT!r}, the name under which "
            "algorithm.information_gain logs the gain of information: rename it, or set "
            "algorithm.information_gain.weight=0"
        )
    questions = Questions(tokenizer, config)
    asked = [
        [
            (turn, questions.number_of(context, job.row))
            for turn, context in contexts_of_turns(trajectory)
        ]
        for job, trajectory in zip(jobs, trajectories, strict=True)
    ]
    batch = questions.batch()
    order = balanced_order(batch, world_size)
    ordered = batch[order]
    found = answer_likelihoods(compute_log_prob(ordered), ordered)
    likelihoods = dict(zip(order, found, strict=True))
    for trajectory, turns in zip(trajectories, asked, strict=True):
        gains = gains_of_turns([likelihoods[number] for _, number in turns])
        for (turn, _), gain in zip(turns, gains, strict=True):
            turn.reward += config.weight * gain
        trajectory.reward[COMPONENT] = sum(gains)
        trajectory.reward["score"] += config.weight * sum(gains)
    return {
        "information_gain/contexts": float(len(batch)),
        "information_gain/tokens": float(batch.batch["attention_mask"].sum()),
    }


def balanced_order(batch: DataProto, world_size: int) -> list[int]:
    """The rows in the order in which equal shares of them have nearly equal tokens."""
    lengths = batch.batch["attention_mask"].sum(dim=1).tolist()
    return [row for part in balance(lengths, world_size) for row in part]


def contexts_of_turns(trajectory: Trajectory) -> Iterator[tuple[Segment, list[int]]]:
    """Yields each turn of the policy with the context in which it began.

    An aside is left out: it is said in a context of its own, where the question may not stand.
    """
    for row in trajectory.rows:
        context = list(row.prompt_ids)
        for segment in row.segments:
            if segment.source is Source.MODEL and not segment.is_aside:
                yield segment, list(context)
            context += segment.token_ids


def gains_of_turns(likelihoods: Sequence[float]) -> list[float]:
    """The gain of each turn, from the likelihood of the answer before each; of the last one 0.

    >>> gains_of_turns([0.25, 0.75, 0.5])
    [0.5, -0.25, 0.0]
    """
    if not likelihoods:
        return []
    return [after - before for before, after in pairwise(likelihoods)] + [0.0]


@dataclass
class Questions:
    """The contexts in which the answer is asked for, each of them once."""

    tokenizer: PreTrainedTokenizerBase
    config: InformationGainConfig
    rows: list[Trajectory] = field(default_factory=list)
    """A context, the text before the answer, and the answer as if the policy had written it."""
    numbers: dict[tuple[tuple[int, ...], str], int] = field(default_factory=dict)

    def number_of(self, context: list[int], row: Row) -> int:
        """The number of the row for the answer to a question in a context."""
        answer = first_answer(row)
        key = (tuple(context), answer)
        if key not in self.numbers:
            self.numbers[key] = len(self.rows)
            self.rows.append(self._row(context, answer))
        return self.numbers[key]

    def _row(self, context: list[int], answer: str) -> Trajectory:
        before = encode_text(self.tokenizer, self.config.before)
        said = encode_text(self.tokenizer, self.config.answer.replace("{answer}", answer))
        segments = [
            Segment(Source.OBSERVATION, before),
            Segment(Source.MODEL, said, [0.0] * len(said)),
        ]
        return Trajectory(context, segments, reward={"score": 0.0})

    def batch(self) -> DataProto:
        """The batch of all rows, in which only the answers are not masked."""
        return collate_trajectories(self.rows, cast(int, self.tokenizer.pad_token_id))


def first_answer(row: Row) -> str:
    """The first accepted answer of a row. Raises RewardError if it has none."""
    truth = row["reward_model"]["ground_truth"]
    target = truth["target"] if isinstance(truth, dict) and "target" in truth else truth
    answers = answers_of(target)
    if not answers:
        raise RewardError(
            "algorithm.information_gain needs an answer in reward_model.ground_truth.target, which "
            f"a {row['data_source']} row lacks"
        )
    return answers[0]


def answer_likelihoods(computed: DataProto, batch: DataProto) -> list[float]:
    """The geometric mean of the probabilities of the answer's tokens, for each row."""
    log_probs = computed.batch["old_log_probs"].to(torch.float64)
    means = [
        masked_mean(values, mask)
        for values, mask in zip(log_probs, batch.batch["response_mask"], strict=True)
    ]
    return torch.stack(means).exp().tolist()
