"""Images: from a file to tokens and pixels, through batch, forward pass and sharded update."""

import base64
import re

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, Idefics3ForConditionalGeneration

from search_r1 import finetune
from search_r1.agent.checks import image_problems, image_room_problems
from search_r1.agent.config import SearchAgentConfig
from tests.configs import composed
from tests.models import make_tiny_qwen2, make_tokenizer
from tests.vision import make_tiny_idefics3, picture
from verl.agent import Completion, Image, Segment, Source, Trajectory, context_digest
from verl.protocol import collate_trajectories
from verl.trainer.config import PPOConfig, build_agent, validate
from verl.trainer.environment import image_family_problems
from verl.utils.dataset import questions_digest
from verl.utils.errors import ConfigError, DataError
from verl.utils.images import MOST_KEPT, ImageReader, files_of, images_of
from verl.utils.tokenizer import encode_chat, encode_illustrated, encode_text
from verl.workers.forward import forward_log_probs
from verl.workers.image_tower import forbid_image_tokens, freeze_tower
from verl.workers.packing import forget_lengths


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_idefics3(tmp_path_factory.mktemp("idefics3"))


@pytest.fixture(scope="module")
def reader(folder):
    return ImageReader(str(folder))


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


def test_an_image_becomes_tokens_and_tiles(reader, tokenizer):
    image = reader.read(picture(0))
    assert tokenizer.convert_ids_to_tokens(image.token_ids) == [
        "<fake_token_around_image>",
        "<global-img>",
        *["<image>"] * 4,
        "<fake_token_around_image>",
    ]
    assert image.pixels.shape == (1, 3, 56, 56)
    assert image.pixels.dtype == np.float32
    assert reader.read_text(base64.b64encode(picture(0)).decode()).digest == image.digest
    assert reader.read(picture(1)).digest != image.digest


def test_a_large_image_is_cut_into_tiles(tmp_path):
    folder = make_tiny_idefics3(tmp_path)
    reader = ImageReader(str(folder))
    reader.processor.image_processor.size = {"longest_edge": 112}
    image = reader.read(picture(0, width=112, height=112))
    assert len(image.pixels) == 5  # four parts, and the whole of it
    assert image.token_ids.count(reader.processor.image_token_id) == 5 * 4


def broken(file: bytes) -> bytes:
    """A PNG file whose data chunk says that it is shorter than it is."""
    place = file.index(b"IDAT") - 4
    length = int.from_bytes(file[place : place + 4], "big")
    return file[:place] + (length // 2).to_bytes(4, "big") + file[place + 4 :]


def test_the_same_file_is_processed_once(reader):
    assert reader.read(picture(5)) is reader.read(picture(5))
    for seed in range(100, 100 + MOST_KEPT + 1):
        reader.read(picture(seed, 20, 20))
    assert len(reader.kept) == MOST_KEPT


@pytest.mark.parametrize("data", [b"", b"no image", picture(0)[:40], broken(picture(0))])
def test_a_file_that_is_no_image_is_refused(reader, data):
    with pytest.raises(DataError, match="no image that can be read"):
        reader.read(data)


def test_base64_may_be_wrapped(reader):
    assert len(reader.read_text(base64.encodebytes(picture(0)).decode()).pixels) == 1


def test_a_text_that_is_not_base64_is_refused(reader):
    with pytest.raises(DataError, match="base64"):
        reader.read_text("?")


def test_a_folder_without_a_processor_is_refused(tmp_path):
    make_tokenizer(tmp_path)
    with pytest.raises((OSError, ValueError)):
        ImageReader(str(tmp_path))


def test_rows_hold_files(reader):
    row = {"images": [{"bytes": picture(0), "path": None}, picture(1)]}
    assert files_of(row) == [picture(0), picture(1)]
    assert len(images_of(row, reader)) == 2
    assert images_of({"images": None}, None) == images_of({}, reader) == []
    with pytest.raises(DataError, match=r"images\[0\]: expected the bytes of a file.*'a.png'"):
        files_of({"images": ["a.png"]})
    with pytest.raises(DataError, match="reads_images=true"):
        images_of(row, None)


def test_images_take_their_places_in_a_conversation(tokenizer):
    message = {"role": "user", "content": "<image>\nWhich city? <image> <|im_end|> is text."}
    ids = encode_chat(tokenizer, [message], [[1001, 1002], [1003]])
    first, second = ids.index(1001), ids.index(1003)
    assert ids[first + 1] == 1002
    assert tokenizer.decode(ids[:first]) == "<|im_start|>user\n"
    assert tokenizer.decode(ids[first + 2 : second]) == "\nWhich city? "
    rest = " <|im_end|> is text."
    assert ids[second + 1 :][: len(encode_text(tokenizer, rest))] == encode_text(tokenizer, rest)


def test_marks_and_images_must_be_as_many(tokenizer):
    message = {"role": "user", "content": "<image> Which city?"}
    with pytest.raises(DataError, match="images"):
        encode_chat(tokenizer, [message], [[1], [2]])
    with pytest.raises(DataError, match="2 places"):
        encode_illustrated(tokenizer, "<image><image>", "<image>", [[1]])
    more = {"role": "user", "content": "<image> <image>"}
    with pytest.raises(DataError, match="places"):
        encode_chat(tokenizer, [more], [[1]])


def test_without_images_a_mark_is_text(tokenizer):
    image = tokenizer.convert_tokens_to_ids("<image>")
    assert image not in encode_chat(tokenizer, [{"role": "user", "content": "<image>?"}])


def test_a_template_that_takes_parts_gets_parts(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for part in m['content'] %}"
        "{{ part['text'] }}{% endfor %}<|im_end|>\n{% endfor %}<|im_start|>assistant:"
    )
    ids = encode_chat(tokenizer, [{"role": "user", "content": "Why?"}])
    assert tokenizer.decode(ids) == "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant:"


@pytest.mark.parametrize(
    "content",
    [
        "{% for line in m.content.split('\\n') %}{{ line }}{% endfor %}",
        "{% if m.content is not string %}{% for c in m.content %}{{ c.content }}{% endfor %}"
        "{% else %}{{ m.content }}{% endif %}",
    ],
)
def test_a_template_that_takes_a_text_gets_a_text(folder, content):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% for m in messages %}" + content + "{% endfor %}"
    assert tokenizer.decode(encode_chat(tokenizer, [{"role": "user", "content": "Why?"}])) == "Why?"


def test_other_images_are_other_questions():
    def row(seed):
        return {"data_source": "a", "prompt": "p", "images": [picture(seed)]}

    assert questions_digest([row(0)]) == questions_digest([row(0)])
    assert questions_digest([row(0)]) != questions_digest([row(1)])


def sampled(ids: list[int]) -> Segment:
    return Segment(Source.MODEL, ids, [-1.0] * len(ids), policy_version=0)


def trajectories(reader: ImageReader, tokenizer) -> list[Trajectory]:
    """One with an image in its prompt and one in an observation, one without any."""
    first, second = reader.read(picture(0)), reader.read(picture(1))
    seen = Trajectory([*encode_text(tokenizer, "Which city"), *first.token_ids, 40], images=[first])
    seen.segments.append(sampled([50, 51, 52]))
    seen.add_observation([60, *second.token_ids, 61], [second], query="q")
    seen.segments.append(sampled([53, 54]))
    blind = Trajectory(encode_text(tokenizer, "Which city is it?"), [sampled([55, 56, 57, 58])])
    for trajectory in (seen, blind):
        trajectory.reward = {"score": 1.0}
    return [seen, blind]


def test_a_batch_has_the_tiles_of_its_rows(reader, tokenizer):
    seen, blind = trajectories(reader, tokenizer)
    batch = collate_trajectories([blind, seen], pad_token_id=0).batch
    assert batch["pixels"].shape == (2, 2, 3, 56, 56)
    assert not batch["pixels"][0].any()
    for tile, image in zip(batch["pixels"][1], seen.images, strict=True):
        assert torch.equal(tile, torch.from_numpy(image.pixels[0]))
    image_token = reader.processor.image_token_id
    assert not batch["response_mask"][batch["responses"] == image_token].any()
    assert "pixels" not in collate_trajectories([blind], pad_token_id=0).batch


def test_packed_rows_with_images_have_the_log_probs_of_rows_alone(folder, reader, tokenizer):
    model = Idefics3ForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, attn_implementation={"text_config": "packed"}
    ).eval()
    forget_lengths(model)
    forbid_image_tokens(model)
    rows = trajectories(reader, tokenizer)
    data = collate_trajectories(rows, pad_token_id=0)
    with torch.no_grad():
        packed, entropy = forward_log_probs(model, data, 1.0, with_entropy=True)
    plain = Idefics3ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    for number, row in enumerate(rows):
        ids = torch.tensor([row.token_ids])
        pixels = {}
        if row.images:
            tiles = np.concatenate([image.pixels for image in row.images])
            pixels = {"pixel_values": torch.from_numpy(tiles)[None]}
        with torch.no_grad():
            logits = plain(input_ids=ids, **pixels).logits[0]
        logits[:, reader.processor.image_token_id] = -torch.inf
        wanted = logits.log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])[:, 0]
        mask = torch.tensor(row.response_mask, dtype=torch.bool)
        got = packed[number, : len(mask)][mask]
        assert torch.allclose(got, wanted[-len(mask) :][mask], atol=2e-5)
    assert torch.isfinite(entropy).all()


def test_other_pixels_change_what_follows_the_image_alone(folder, reader, tokenizer):
    model = Idefics3ForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, attn_implementation={"text_config": "packed"}
    ).eval()
    rows = trajectories(reader, tokenizer)
    data = collate_trajectories(rows, pad_token_id=0)
    with torch.no_grad():
        before = forward_log_probs(model, data, 1.0, with_entropy=False)[0]
        data.batch["pixels"][0, 1] *= 0.5  # the image of the observation
        after = forward_log_probs(model, data, 1.0, with_entropy=False)[0]
    changed = (before - after).abs() > 1e-6
    turns = data.batch["turns"]
    assert not changed[turns == 0].any()  # before it, and the row without images
    assert changed[0][turns[0] == 1].all()


def test_the_tower_is_not_trained(folder, reader, tokenizer):
    model = Idefics3ForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, attn_implementation={"text_config": "packed"}
    ).eval()
    freeze_tower(model)
    data = collate_trajectories(trajectories(reader, tokenizer), pad_token_id=0)
    forward_log_probs(model, data, 1.0, with_entropy=False)[0].sum().backward()
    for name, parameter in model.named_parameters():
        trains = "vision_model" not in name and "connector" not in name
        assert parameter.requires_grad == trains, name
        assert (parameter.grad is not None) == trains, name


def test_a_completion_is_of_the_context_with_the_tokens_of_images(reader):
    image = reader.read(picture(0))
    trajectory = Trajectory([1, *image.token_ids, 2], images=[image])
    said = Completion([3], [-1.0], "stop", None, 0, context_digest(trajectory.token_ids))
    trajectory.add_completion(said)
    assert trajectory.context_violations == 0
    assert isinstance(trajectory.rows[0].images[0], Image)


READS = "actor_rollout_ref.model.reads_images=true"


def configured(*overrides: str) -> PPOConfig:
    """A GRPO run whose policy reads images."""
    return validate(composed("grpo", READS, *overrides))


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("algo=ppo", "not with a critic"),
        ("actor_rollout_ref.model.lora_rank=8", "not with actor_rollout_ref.model.lora_rank"),
        ("actor_rollout_ref.actor.state_masking=false", "state_masking=false"),
        ("+actor_rollout_ref.model.override_config.rope_theta=1", "override_config"),
        ("actor_rollout_ref.rollout.branches.rounds=4", "rollout.branches"),
        ("algorithm.information_gain.weight=1", "not with algorithm.information_gain.weight"),
        ("teacher.weight=0.5", "not with teacher.weight"),
        ("critic.model.reads_images=true", "critic.model.reads_images=true: the policy alone"),
        ("actor_rollout_ref.rollout.name=openai", "rollout.name=openai, which is given text"),
    ],
)
def test_what_images_do_not_go_with_is_refused(override, told):
    with pytest.raises(ConfigError, match=re.escape(told)):
        configured(override)


def test_images_go_with_the_stock_configuration():
    assert configured().actor_rollout_ref.model.reads_images


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("agent.show_remaining=true", "agent.show_remaining=true"),
        ("template=short", "agent.template=short"),
        ("agent.context.fold_at=1000", "agent.context"),
        ("agent.condense.by=policy", "agent.condense"),
    ],
)
def test_an_agent_that_would_lose_images_is_refused(folder, tokenizer, override, told):
    config = validate(composed("grpo", READS, f"actor_rollout_ref.model.path={folder}", override))
    problems = build_agent(config, tokenizer).preflight()
    assert any(f"not with {told}" in problem for problem in problems), problems


def test_a_native_format_is_refused(reader):
    (problem,) = image_problems(SearchAgentConfig(format="hermes"), True, reader)
    assert "not with agent.format=hermes" in problem


def test_a_loop_that_puts_no_images_into_contexts_is_refused(folder, tokenizer):
    toy = "agent._target_=tests.e2e.toy.SingleTurn"
    config = validate(composed("grpo", READS, f"actor_rollout_ref.model.path={folder}", toy))
    with pytest.raises(ConfigError, match="puts no images into contexts"):
        build_agent(config, tokenizer)


def test_a_family_without_known_images_is_refused(tmp_path, folder):
    qwen = make_tiny_qwen2(tmp_path)
    (problem,) = image_family_problems(configured(f"actor_rollout_ref.model.path={qwen}"))
    assert "is of the family qwen2" in problem and "idefics3" in problem
    assert image_family_problems(configured(f"actor_rollout_ref.model.path={folder}")) == []


def test_observations_without_room_for_an_image_are_refused(folder, tokenizer):
    overrides = (READS, f"actor_rollout_ref.model.path={folder}")
    agent = build_agent(validate(composed("grpo", *overrides)), tokenizer)
    agent.image_reader.processor.image_processor.size = {"longest_edge": 56 * 20}
    (problem,) = image_room_problems(agent.config, agent.image_reader)
    assert "1024 by 768 pixels takes" in problem


def test_no_fine_tuning_with_images(folder):
    with pytest.raises(SystemExit, match="cannot be fine-tuned"):
        finetune.main(["method=sft", READS, f"actor_rollout_ref.model.path={folder}"])
