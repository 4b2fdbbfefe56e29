"""What turns are paid for making the right answer likelier."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.configs import composed
from tests.verl.batches import make_model
from verl.agent import AgentLoop, Segment, Source, Trajectory
from verl.protocol import DataProto
from verl.rollout.job import make_jobs
from verl.trainer.config import InformationGainConfig, validate
from verl.trainer.driver import check_trainable
from verl.trainer.ppo.information_gain import contexts_of_turns, pay_information
from verl.utils.errors import ConfigError, RewardError
from verl.utils.tokenizer import encode_text
from verl.workers.config import SamplingConfig
from verl.workers.forward import log_probs_of_rows

CONFIG = InformationGainConfig(weight=0.5)
ROW = {"data_source": "made", "reward_model": {"ground_truth": {"target": ["Rome", "Roma"]}}}


def jobs_for(*rows):
    return make_jobs(rows, [[1, 2]] * len(rows), SamplingConfig(n=1), None)


def played():
    """Three turns; passages 30 and 40 between them."""
    trajectory = Trajectory([1, 2], reward={"score": 1.0})
    for said, shown in (([11], [30]), ([12, 12], [40]), ([13], [])):
        trajectory.segments.append(Segment(Source.MODEL, said, [-1.0] * len(said)))
        if shown:
            trajectory.add_observation(shown)
    return trajectory


def believing(chances):
    """Computes log-probs as a policy that believes in the answer as much as `chances` says, by the
    last token of the context."""
    batches = []

    def compute(batch: DataProto) -> DataProto:
        batches.append(batch)
        tensors = batch.batch
        last = tensors["prompts"][:, -1].tolist()
        rows = [math.log(chances[token]) for token in last]
        mask = tensors["response_mask"]
        junk = torch.full(mask.shape, math.nan)
        return DataProto(
            {"old_log_probs": torch.where(mask.bool(), torch.tensor(rows)[:, None], junk)}
        )

    return compute, batches


def test_a_turn_is_paid_what_it_adds_to_the_chance_of_the_answer(tokenizer):
    first = played()
    second = played()
    second.segments[1].token_ids = [31]
    compute, batches = believing({2: 0.1, 30: 0.4, 31: 0.1, 40: 0.9})
    found = pay_information(jobs_for(ROW, ROW), [first, second], tokenizer, CONFIG, compute, 1)
    assert [turn.reward for turn in first.turns] == pytest.approx([0.15, 0.25, 0.0])
    assert [turn.reward for turn in second.turns] == pytest.approx([0.0, 0.4, 0.0])
    assert first.reward == pytest.approx({"score": 1.4, "information_gain": 0.8})
    (batch,) = batches
    assert len(batch) == 5 == found["information_gain/contexts"], "the question is asked once"
    assert found["information_gain/tokens"] == batch.batch["attention_mask"].sum()
    said = batch.batch["responses"][0][batch.batch["response_mask"][0].bool()].tolist()
    assert said == encode_text(tokenizer, " Rome </answer>")


def test_equal_shares_of_the_rows_have_nearly_equal_tokens(tokenizer):
    """Contexts grow from turn to turn: in their own order the second rank would have more."""
    trajectory = played()
    compute, batches = believing({2: 0.1, 30: 0.4, 40: 0.9, 50: 0.8})
    trajectory.add_observation([50])
    trajectory.segments.append(Segment(Source.MODEL, [14], [-1.0]))
    pay_information(jobs_for(ROW), [trajectory], tokenizer, CONFIG, compute, 2)
    assert [turn.reward for turn in trajectory.turns] == pytest.approx([0.15, 0.25, -0.05, 0.0])
    lengths = batches[0].batch["attention_mask"].sum(1)
    asked = lengths - lengths.min()
    assert asked.tolist() == [0, 7, 2, 5]


def test_a_rewritten_context_is_asked_as_it_was(tokenizer):
    trajectory = Trajectory([1, 2], reward={"score": 0.0})
    trajectory.segments.append(Segment(Source.MODEL, [11], [-1.0]))
    trajectory.rewrite([1, 9])
    trajectory.segments.append(Segment(Source.MODEL, [12], [-1.0]))
    assert [context for _, context in contexts_of_turns(trajectory)] == [[1, 2], [1, 9]]


def test_asides_and_turns_without_tokens_shift_no_gain(tokenizer):
    """An aside has a context of its own; a context in which nothing was said is none."""
    trajectory = Trajectory([1, 2], reward={"score": 0.0})
    trajectory.segments.append(Segment(Source.MODEL, [], []))
    trajectory.rewrite([3, 2])
    trajectory.segments.append(Segment(Source.MODEL, [11], [-1.0]))
    trajectory.rewrite([7])
    trajectory.segments.append(Segment(Source.MODEL, [12], [-1.0], is_aside=True))
    trajectory.rewrite([1, 30])
    trajectory.segments.append(Segment(Source.MODEL, [13], [-1.0]))
    compute, _ = believing({2: 0.1, 30: 0.5})
    pay_information(jobs_for(ROW), [trajectory], tokenizer, CONFIG, compute, 1)
    assert [turn.reward for turn in trajectory.turns] == pytest.approx([0.0, 0.2, 0.0, 0.0])


def test_a_question_without_an_answer_ends_the_run(tokenizer):
    row = {"data_source": "made", "reward_model": {"ground_truth": {"target": []}}}
    compute, _ = believing({})
    with pytest.raises(RewardError, match=r"information_gain needs an answer.*made row"):
        pay_information(jobs_for(row), [played()], tokenizer, CONFIG, compute, 1)


def test_a_number_of_the_reward_by_the_same_name_is_not_overwritten(tokenizer):
    named = played()
    named.reward["information_gain"] = 0.25
    compute, batches = believing({})
    with pytest.raises(RewardError, match=r"returned a number under .information_gain..*rename"):
        pay_information(jobs_for(ROW), [named], tokenizer, CONFIG, compute, 1)
    assert not batches and named.reward["information_gain"] == 0.25


class Namesake:
    """A reward that says what it returns."""

    entries = frozenset({"score", "information_gain"})


def test_a_reward_that_names_the_gain_is_refused_before_the_start():
    paid = ["experiment=closed_world/grpo", "algorithm.information_gain.weight=1"]
    config = validate(composed("grpo", *paid))
    with pytest.raises(ConfigError, match=r"information_gain\.weight: the reward has a number"):
        check_trainable(config, AgentLoop(None, None), Namesake())
    without = validate(composed("grpo", paid[0]))
    check_trainable(without, AgentLoop(None, None), Namesake())


def test_the_chance_is_that_of_the_model(tmp_path, tokenizer):
    """Against a forward pass of its own, over one row."""
    model = AutoModelForCausalLM.from_pretrained(make_model(tmp_path)).eval()
    size = model.config.vocab_size
    trajectory = played()
    config = InformationGainConfig(weight=1.0, before="a", answer="{answer}")

    def shrunk(batch: DataProto) -> DataProto:
        ids = {name: batch.batch[name] % size for name in ("prompts", "responses")}
        with torch.no_grad():
            return DataProto(
                {"old_log_probs": log_probs_of_rows(model, batch.with_tensors(**ids), 1.0)}
            )

    pay_information(jobs_for(ROW), [trajectory], tokenizer, config, shrunk, 1)
    answer = [t % size for t in encode_text(tokenizer, "Rome")]
    before = [t % size for t in encode_text(tokenizer, "a")]

    def chance(context):
        ids = torch.tensor([[t % size for t in context] + before + answer])
        with torch.no_grad():
            log_probs = model(input_ids=ids).logits[0].log_softmax(-1)
        places = range(ids.shape[1] - len(answer) - 1, ids.shape[1] - 1)
        found = [log_probs[place, token] for place, token in zip(places, answer, strict=True)]
        return math.exp(sum(found) / len(found))

    chances = [chance(context) for _, context in contexts_of_turns(trajectory)]
    expected = [chances[1] - chances[0], chances[2] - chances[1], 0.0]
    assert [turn.reward for turn in trajectory.turns] == pytest.approx(expected, abs=1e-6)
