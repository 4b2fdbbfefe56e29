"""Records of training steps: what each token was trained with, whatever row it was in."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.configs import composed
from tests.models import make_tokenizer
from tests.verl.fake_roles import GROUP, PROMPTS, SMALL, make_processes, trainer_over
from verl.agent import Rewrite, Segment, Source, Trajectory
from verl.rollout.agent_worker import Job
from verl.rollout.records import token_ends
from verl.trainer.config import validate
from verl.trainer.ppo.batching import build_batch
from verl.trainer.ppo.step_records import Due, rounded, step_records

COLUMNS = ["trajectory", "row", "mask", "old_log_probs", "advantages"]


def model(*ids: int) -> Segment:
    return Segment(Source.MODEL, list(ids), [-0.5 * i for i in ids], policy_version=3)


def observation(*ids: int) -> Segment:
    return Segment(Source.OBSERVATION, list(ids))


def trained_batch(trajectories, uids, **options):
    """The batch of these trajectories: log-probs are the ids of tokens, advantages twice them."""
    row = {"data_source": "tiny", "reward_model": {"ground_truth": "yes"}}
    jobs = [Job(uid, f"{uid}-{number}", row, []) for number, uid in enumerate(uids)]
    options = {"num_mini_batches": {"mini_batch": 1}, "state_masking": True} | options
    batch = build_batch(jobs, trajectories, pad_token_id=0, world_size=2, **options)
    ids = batch.batch["responses"].float()
    mask = batch.batch["response_mask"]
    batch = batch.with_tensors(old_log_probs=ids, advantages=2 * ids, mask=mask)
    return jobs, batch.select(COLUMNS, ["uid"])


def records_of(trajectories, uids, of=None, **options):
    jobs, batch = trained_batch(trajectories, uids, **options)
    rollouts = SimpleNamespace(jobs=jobs, trajectories=trajectories)
    wanted = frozenset(uids if of is None else of)
    rows = batch[np.array([uid in wanted for uid in batch.non_tensor_batch["uid"]])]
    return step_records(Due(7, rollouts, wanted), rows, SimpleNamespace(decode=str))


def scored(*segments: Segment, rewrites=()) -> Trajectory:
    return Trajectory([1], list(segments), "answer", {"score": 1.0}, rewrites=list(rewrites))


def test_each_token_has_what_it_was_trained_with():
    trajectories = [
        scored(model(11, 12), observation(90, 91, 92), model(13)),
        scored(model(21, 22, 23, 24, 25, 26, 27, 28, 29)),  # the longest stands first in the batch
    ]
    first, second = records_of(trajectories, ["a", "b"])
    assert first["step"] == second["step"] == 7
    said, shown, answered = first["segments"]
    assert said["log_probs"] == [11, 12] and answered["log_probs"] == [13]
    assert said["advantages"] == [22, 24] and answered["advantages"] == [26]
    assert said["rollout_log_probs"] == [-5.5, -6] and said["mask"] == [1, 1]
    assert not {"mask", "log_probs", "token_ends"} & shown.keys()
    assert second["segments"][0]["log_probs"] == list(range(21, 30))


def test_a_trajectory_of_several_rows():
    """Each token of the policy is in one row; what was said before nothing more has no row."""
    segments = [model(11), observation(90), model(12, 13), observation(91), observation(92)]
    trajectory = scored(*segments, rewrites=[Rewrite(2, [1, 2]), Rewrite(4, [3])])
    (record, _) = records_of([trajectory, scored(model(5))], ["a", "b"])
    found = [segment.get("log_probs") for segment in record["segments"]]
    assert found == [[11], None, [12, 13], None, None]
    assert [rewrite["at"] for rewrite in record["rewrites"]] == [2, 4]


def test_observations_that_are_trained_on_have_facts():
    (record, _) = records_of(
        [scored(model(11), observation(90), model(12)), scored(model(5))],
        ["a", "b"],
        state_masking=False,
    )
    shown = record["segments"][1]
    assert shown["mask"] == [1] and shown["log_probs"] == [90] and "token_ends" in shown
    assert "rollout_log_probs" not in shown


def test_prompts_beyond_those_that_are_asked_for_have_none():
    first, second = records_of([scored(model(4)), scored(model(5))], ["a", "b"], of=["b"])
    assert "mask" not in first["segments"][0] and "token_ends" not in first["segments"][0]
    assert second["segments"][0]["log_probs"] == [5]


def test_numbers_have_four_digits_and_json_can_express_them():
    assert rounded([-0.123456, 1234.567, 0.0, math.nan, -math.inf]) == [
        -0.1235,
        1235.0,
        0.0,
        None,
        None,
    ]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize(
    "text",
    ["", "<think> find it </think>\n\n<search>x</search>", "Zürich 東京 🙂🙂 " * 20, "a b  c" * 60],
)
def test_tokens_end_where_the_text_of_all_up_to_them_ends(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    whole = tokenizer.decode(ids)
    ends = token_ends(ids, tokenizer)
    assert len(ends) == len(ids) and ends == sorted(ends)
    for place, end in enumerate(ends):
        prefix = tokenizer.decode(ids[: place + 1])
        assert whole[:end] == prefix.rstrip("�"), place
    assert not ids or ends[-1] == len(whole)


def run(folder, *overrides: str, algorithm: str = "grpo", scores=None) -> list[dict]:
    """The records of the first step of a run over roles that write down what they are asked."""
    settings = (*SMALL, "trainer.rollout_data_freq=1", f"trainer.default_local_dir={folder}")
    config = validate(composed(algorithm, *settings, "trainer.total_training_steps=1", *overrides))
    trainer = trainer_over(config, make_processes(config, scores))
    trainer.fit()
    path = folder / "trajectories/train_000001.jsonl"
    assert not list(path.parent.glob("*.tmp"))
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(autouse=True)
def validation(monkeypatch):
    """Finds the same whatever it is given."""
    monkeypatch.setattr("verl.trainer.ppo.validation.score", lambda *_: ({"val/x": 0.5}, []))


def test_a_run_writes_every_trajectory_and_the_tokens_of_some_prompts(tmp_path):
    records = run(tmp_path, "trainer.trajectory_records.prompts=1", algorithm="ppo")
    assert len(records) == PROMPTS * GROUP
    with_tokens = {r["uid"] for r in records if "mask" in r["segments"][0]}
    assert with_tokens == {records[0]["uid"]}
    segment = records[0]["segments"][0]
    assert segment["log_probs"] == [-1.0] * 4 and segment["ref_log_probs"] == [-1.5] * 4
    assert segment["rollout_log_probs"] == [-1.0] * 4 and segment["entropy"] == [0.5] * 4
    assert segment["values"] == [0.0] * 4 and len(segment["advantages"]) == 4


def test_the_mask_is_that_of_the_loss(tmp_path):
    """What a filter leaves out is written as not trained, although the policy wrote it."""
    scores = {0: [1.0] * GROUP, 1: [0.0, 1.0] * (GROUP // 2)}
    records = run(tmp_path, "algorithm.loss_filters=[zero_variance]", scores=scores)
    masks = [r["segments"][0]["mask"] for r in records]
    assert masks == [[0] * 4] * GROUP + [[1] * 4] * GROUP


def test_a_step_that_is_written_again_replaces_what_was_there(tmp_path):
    assert len(run(tmp_path)) == len(run(tmp_path / "again")) == PROMPTS * GROUP
    (tmp_path / "other").mkdir()
    folder = tmp_path / "twice"
    first = run(folder)
    second = run(folder, "trainer.resume_mode=disable")
    assert len(second) == len(first) and second[0]["uid"] != first[0]["uid"]


def test_no_entropy_is_computed_where_no_token_is_written(tmp_path):
    config = validate(composed("grpo", *SMALL, f"trainer.default_local_dir={tmp_path}"))
    processes = make_processes(config, None)
    trainer_over(config, processes).fit()
    assert "entropy" not in [event[0] for event in processes.said]
    assert torch.isfinite(processes.roles["actor"].batches[0].batch["old_log_probs"]).all()
