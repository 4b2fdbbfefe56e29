import pickle

import numpy as np
import pytest
import torch

from verl.agent import Completion, Segment, Source, Trajectory, context_digest
from verl.protocol import DataProto, collate_trajectories
from verl.single_controller.decorator import Dispatch, Registered, collect, dispatch, register


def trajectory(score: float = 1.0) -> Trajectory:
    """prompt 7 8 | model 1 2 | observation 3 4 | model 5"""
    t = Trajectory([7, 8], reward={"score": score})
    t.segments = [
        Segment(Source.MODEL, [1, 2], [-0.1, -0.2], policy_version=3),
        Segment(Source.OBSERVATION, [3, 4]),
        Segment(Source.MODEL, [5], [-0.5], policy_version=4),
    ]
    return t


def test_collate_draws_the_masks():
    short = Trajectory(
        [9], [Segment(Source.MODEL, [6], [-0.6], policy_version=4)], reward={"score": 0.25}
    )
    batch = collate_trajectories([trajectory(), short], pad_token_id=0).batch
    assert trajectory().response_mask == batch["response_mask"][0].tolist()
    assert batch["prompts"].tolist() == [[7, 8], [0, 9]]
    assert batch["responses"].tolist() == [[1, 2, 3, 4, 5], [6, 0, 0, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 1, 1], [0, 1, 1, 0, 0, 0, 0]]
    assert batch["response_mask"].tolist() == [[1, 1, 0, 0, 1], [1, 0, 0, 0, 0]]
    assert batch["policy_versions"].tolist() == [[3, 3, -1, -1, 4], [4, -1, -1, -1, -1]]
    assert batch["token_level_scores"].tolist() == [[0, 0, 0, 0, 1.0], [0.25, 0, 0, 0, 0]]
    torch.testing.assert_close(
        batch["rollout_log_probs"][0], torch.tensor([-0.1, -0.2, 0, 0, -0.5])
    )


def test_score_sits_on_the_last_sampled_token_even_if_the_environment_spoke_last():
    t = trajectory()
    t.add_observation([4, 4])
    batch = collate_trajectories([t], pad_token_id=0).batch
    assert batch["token_level_scores"].tolist() == [[0, 0, 0, 0, 1.0, 0, 0]]


def test_turns_are_paid_on_their_last_token_and_the_rest_of_the_score_at_the_end():
    t = trajectory()
    t.segments[0].reward = 0.25
    batch = collate_trajectories([t], pad_token_id=0).batch
    assert batch["token_level_scores"].tolist() == [[0, 0.25, 0, 0, 0.75]]
    t.segments[2].reward = -0.5
    batch = collate_trajectories([t], pad_token_id=0).batch
    assert batch["token_level_scores"].tolist() == [[0, 0.25, 0, 0, 0.75]]
    t.segments.insert(2, Segment(Source.MODEL, [], [], reward=9.0))
    batch = collate_trajectories([t], pad_token_id=0).batch
    assert batch["token_level_scores"].sum().item() == t.reward["score"], "no token, no pay"


def test_a_state_is_what_was_read_right_before_the_turn():
    other = trajectory()
    other.segments[0].token_ids = [6, 6]
    new = trajectory()
    new.segments[1].token_ids = [3, 9]
    states = collate_trajectories([trajectory(), other, new], pad_token_id=0).batch["states"]
    first, second = states[:, 0], states[:, 4]
    assert first.unique().numel() == 1 and states[:, 2:4].tolist() == [[-1, -1]] * 3
    assert second[0] == second[1] != second[2]


def test_pad_id_in_the_text_stays_a_token():
    """Llama-3-Instruct and others pad with a token that also occurs in prompts."""
    t = Trajectory([0, 8, 0], [Segment(Source.MODEL, [0, 5, 0], [-1.0] * 3)], reward={"score": 0.0})
    batch = collate_trajectories([t], pad_token_id=0).batch
    assert batch["attention_mask"].tolist() == [[1] * 6]
    assert batch["response_mask"].tolist() == [[1] * 3]


def test_a_trajectory_without_policy_tokens_is_refused():
    with pytest.raises(ValueError, match="no token of the policy"):
        collate_trajectories(
            [Trajectory([1], [Segment(Source.OBSERVATION, [2])], reward={"score": 0.0})], 0
        )


def test_context_that_is_not_a_prefix_is_counted():
    t = Trajectory([7, 8])
    good = Completion([1], [-0.1], "stop", None, 0, context_digest([7, 8]))
    t.add_completion(good)
    assert t.context_violations == 0
    # misses token 1
    t.add_completion(Completion([2], [-0.1], "stop", None, 0, context_digest([7, 8])))
    assert t.context_violations == 1


def test_dispatch_round_trip_with_unequal_ranks():
    data = DataProto.from_dict(
        {"x": torch.arange(7)}, {"uid": np.array(list("abcdefg"), dtype=object)}
    )
    for sizes in ([4, 3], [7, 0], [1, 6]):
        data.meta_info["rank_sizes"] = sizes
        parts = dispatch(Dispatch.DP_COMPUTE_PROTO, 2, (data, "other"))
        assert [len(p[0]) for p in parts] == sizes and parts[1][1] == "other"
        whole = collect(Dispatch.DP_COMPUTE_PROTO, [p[0] for p in parts])
        assert whole.batch["x"].tolist() == list(range(7)) and whole.non_tensor_batch[
            "uid"
        ].tolist() == list("abcdefg")


def test_operations_return_new_objects():
    data = DataProto.from_dict({"x": torch.arange(4)})
    more = data.with_tensors(y=torch.zeros(4))
    assert set(data.batch) == {"x"} and set(more.batch) == {"x", "y"}
    assert data.repeat(2).batch["x"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert data.repeat(2, interleave=False).batch["x"].tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    assert data[torch.tensor([True, False, True, False])].batch["x"].tolist() == [0, 2]
    with pytest.raises(ValueError, match="one length"):
        data.with_tensors(z=torch.zeros(3))


def test_a_part_is_pickled_alone():
    """A slice of a tensor shares the storage of the whole, which torch pickles all of."""
    data = DataProto.from_dict(
        {"x": torch.arange(80_000).view(8, -1), "y": torch.zeros(8, 5, dtype=torch.bool)}
    )
    parts = data.split([2, 6])
    sizes = [len(pickle.dumps(part)) for part in parts]
    assert sizes[0] < 1.02 * data.batch["x"].nbytes / 4
    copies = [pickle.loads(pickle.dumps(part)) for part in parts]
    whole = DataProto.concat(copies)
    assert all(torch.equal(whole.batch[key], column) for key, column in data.batch.items())


def test_what_shared_memory_brings_can_be_written():
    data = DataProto.from_dict({"x": torch.arange(4)})
    buffers: list[pickle.PickleBuffer] = []
    stream = pickle.dumps(data, protocol=5, buffer_callback=buffers.append)
    # read-only, as Ray's are
    copy = pickle.loads(stream, buffers=[bytes(buffer) for buffer in buffers])
    copy.batch["x"] += 1
    assert copy.batch["x"].tolist() == [1, 2, 3, 4] and data.batch["x"].tolist() == [0, 1, 2, 3]


def test_a_method_is_sent_the_columns_that_it_reads():
    call = Registered(Dispatch.DP_COMPUTE_PROTO, columns=("x",), optional=("y",))
    data = DataProto.from_dict(
        {"x": torch.zeros(2), "z": torch.zeros(2)},
        {"uid": np.array(["a", "b"], dtype=object)},
        {"rank_sizes": [2, 0]},
    )
    (sent, other) = call.select("actor.update_actor", (data, 7))
    assert (
        set(sent.batch) == {"x"}
        and not sent.non_tensor_batch
        and sent.meta_info == data.meta_info
        and other == 7
    )
    (sent,) = call.select("actor.update_actor", (data.with_tensors(y=torch.zeros(2)),))
    assert set(sent.batch) == {"x", "y"}
    with pytest.raises(KeyError, match=r"actor\.update_actor reads the column\(s\) x,"):
        call.select("actor.update_actor", (data.select(["z"]),))


def test_a_method_that_gets_rows_must_name_columns():
    with pytest.raises(TypeError, match="must name the columns"):
        register(Dispatch.DP_COMPUTE_METRIC)


def test_sampled_tokens_without_log_probs_are_refused():
    t = trajectory()
    t.segments[0].log_probs.pop()
    with pytest.raises(ValueError, match="2 sampled tokens have 1 log-probs"):
        collate_trajectories([t], 0)


def test_a_batch_in_a_file_is_the_same_when_it_is_read(tmp_path):
    data = DataProto.from_dict(
        {"x": torch.tensor([[0.1, torch.nan], [1.0, 2.0]]), "mask": torch.tensor([True, False])},
        {"uid": np.array(["a", "b"], dtype=object), "lists": np.array([[1, 2], [3]], dtype=object)},
        {"rank_sizes": [1, 1], "num_mini_batches": {"mini_batch": 2}},
    )
    data.save(tmp_path / "batch.pt")
    read = DataProto.load(tmp_path / "batch.pt")
    assert read.batch["x"].dtype == torch.float32 and torch.equal(
        read.batch["mask"], data.batch["mask"]
    )
    assert torch.equal(read.batch["x"].view(torch.int32), data.batch["x"].view(torch.int32))
    assert {k: v.tolist() for k, v in read.non_tensor_batch.items()} == {
        "uid": ["a", "b"],
        "lists": [[1, 2], [3]],
    }
    assert read.non_tensor_batch["uid"].dtype == object and read.meta_info == data.meta_info
