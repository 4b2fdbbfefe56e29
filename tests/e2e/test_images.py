"""A training whose questions and passages have images: server, engine, two ranks, export."""

import base64
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from tests.e2e.runs import CORPUS, arguments, metrics, train
from tests.retrieval import retrieval_server, write_corpus
from tests.vision import make_tiny_idefics3, picture

pytestmark = pytest.mark.cpu_engine


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_idefics3(tmp_path_factory.mktemp("idefics3"))


@pytest.fixture(scope="module")
def retriever(tmp_path_factory):
    """A server two of whose passages have an image, that of Ada Marin among them."""
    folder = tmp_path_factory.mktemp("corpus")
    images = {number: base64.b64encode(picture(10 + number)).decode() for number in (0, 1)}
    rows = [
        {**row, "image": images[number]} if number in images else row
        for number, row in enumerate(CORPUS)
    ]
    write_corpus(folder, rows)
    with retrieval_server(folder) as (url, _):
        yield url


def illustrated_questions(path):
    """Four questions, of which two have one image and one has two."""
    rows = []
    for number, count in enumerate((1, 0, 2, 1)):
        marks = "<image> " * count
        rows.append(
            {
                "data_source": "tiny",
                "prompt": [{"role": "user", "content": f"{marks}Who is it?\n"}],
                "ability": "fact-reasoning",
                "reward_model": {"style": "rule", "ground_truth": {"target": ["Torvel"]}},
                "extra_info": {"index": number},
                "images": [{"bytes": picture(3 * number + i)} for i in range(count)],
            }
        )
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.fixture(scope="module")
def reward(tmp_path_factory):
    """A reward that varies even with random weights."""
    path = tmp_path_factory.mktemp("reward") / "reward.py"
    path.write_text(
        "def compute_score(data_source, solution_str, ground_truth, extra_info):\n"
        "    return len(solution_str) / 100\n"
    )
    return path


def run_arguments(tmp_path, model, retriever, reward):
    questions = illustrated_questions(tmp_path / "illustrated.parquet")
    settings = {
        "data__train_files": questions,
        "data__val_files": questions,
        "retriever__url": retriever,
        "custom_reward_function__path": reward,
        "agent___target_": "tests.e2e.searching.SearchingLoop",
        "actor_rollout_ref__model__reads_images": "true",
        "actor_rollout_ref__actor__optim__lr": 1e-3,
        "actor_rollout_ref__actor__use_kl_loss": "true",
        "trainer__n_gpus_per_node": 2,
        "trainer__total_training_steps": 2,
        "data__max_obs_length": 160,
        "data__max_response_length": 8,
        "data__max_prompt_length": 448,
    }
    return arguments(tmp_path, model, **settings)


def test_images_of_questions_and_passages_are_read_and_trained_on(
    tmp_path, model, retriever, reward
):
    status, output = train("grpo", run_arguments(tmp_path, model, retriever, reward))
    assert status == 0, output[-3000:]
    lines = metrics(tmp_path)[1:]
    assert len(lines) == 2
    for line in lines:
        assert line["rollout/context_violations"] == 0
        assert line["rollout/logprob_diff_max"] <= 1e-3
        assert line["actor/optimizer_steps"] == 2
        assert abs(line["actor/kl_loss"]) < 1

    processor = AutoProcessor.from_pretrained(tmp_path / "run/hf")
    image_token = processor.image_token_id
    records = [
        json.loads(record) for record in (tmp_path / "run/trajectories/train_000001.jsonl").open()
    ]
    in_prompts = {record["prompt_ids"].count(image_token) for record in records}
    assert in_prompts == {0, 4, 8}  # four tokens an image
    for record in records:
        by_author = {"model": 0, "observation": 0}
        for segment in record["segments"]:
            by_author[segment["source"]] += segment["token_ids"].count(image_token)
        assert by_author["model"] == 0
        assert by_author["observation"] >= 4

    before = AutoModelForImageTextToText.from_pretrained(model)
    after = AutoModelForImageTextToText.from_pretrained(tmp_path / "run/hf")
    for (name, old), new in zip(before.named_parameters(), after.parameters(), strict=True):
        is_tower = "vision_model" in name or "connector" in name
        assert torch.equal(old, new) == is_tower, name
