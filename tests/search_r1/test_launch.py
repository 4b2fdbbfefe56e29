"""What is made around a run: the closed world by its options."""

import json

import pytest
from omegaconf import OmegaConf

from search_r1.launch import prepare_world, read_setup
from search_r1.world.generate import WorldConfig

SMALL = WorldConfig(train_people=20, test_people=20, spare_people=0, train_questions=20, test_questions=10, filler=10)


def test_a_world_is_made_with_its_options_and_refused_with_others(tmp_path):
    prepare_world(tmp_path, SMALL)
    passages = [json.loads(line)["contents"] for line in (tmp_path / "corpus.jsonl").open()]
    assert min(text.count(".") for text in passages) >= 11
    prepare_world(tmp_path, SMALL)
    with pytest.raises(SystemExit, match=r"was made with filler=10; setup\.world_options asks for filler=2"):
        prepare_world(tmp_path, SMALL.model_copy(update={"filler": 2}))
    (tmp_path / "options.json").unlink()
    with pytest.raises(SystemExit, match=r"was made with train_people=400, .*, filler=0; "):
        prepare_world(tmp_path, SMALL)


def test_an_unknown_option_is_named():
    with pytest.raises(SystemExit, match=r"setup\.world_options\.fillers: Extra inputs are not permitted \(got 10\)"):
        read_setup(OmegaConf.create({"setup": {"world_options": {"fillers": 10}}}))
