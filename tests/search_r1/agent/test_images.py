"""Images of passages in observations."""

import base64

import pytest
from transformers import AutoTokenizer

from search_r1.agent.observation import encode_illustrated, encode_passages
from search_r1.search.client.answers import Passage, to_passage
from search_r1.search.schema import ScoredDocument
from search_r1.tools.base import ToolResponse
from search_r1.tools.search import text_of
from tests.vision import make_tiny_idefics3, picture
from verl.utils.images import PLACE, ImageReader


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_idefics3(tmp_path_factory.mktemp("idefics3"))


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def images(folder):
    reader = ImageReader(str(folder))
    return [reader.read(picture(0)), reader.read(picture(1))]


TEXT = f'Doc 1(Title: "A") one {PLACE}\nDoc 2(Title: "B") two {PLACE}'


def test_an_image_stands_behind_the_text_of_its_passage(tokenizer, images):
    ids, cut, shown = encode_illustrated(TEXT, images, tokenizer, 500, "")
    assert not cut and shown == images
    pieces = [tokenizer.encode("<image>", add_special_tokens=False)]
    assert sum(ids.count(token) for token in pieces[0]) == 8
    block = images[0].token_ids
    first = next(i for i in range(len(ids)) if ids[i : i + len(block)] == block)
    assert tokenizer.decode(ids[:first]) == '\n\n<information>Doc 1(Title: "A") one '
    assert tokenizer.decode(ids[first + len(block) :]).startswith('\nDoc 2(Title: "B") two ')
    assert tokenizer.decode(ids).endswith("</information>\n\n")


def test_without_images_the_tokens_are_those_of_the_text(tokenizer):
    passages = [('"A"', "one"), ('"B"', "two")]
    wanted, _ = encode_passages(passages, tokenizer, 500, "")
    ids, cut, shown = encode_illustrated(
        'Doc 1(Title: "A") one\nDoc 2(Title: "B") two', [], tokenizer, 500, ""
    )
    assert (tokenizer.decode(ids), cut, shown) == (tokenizer.decode(wanted), False, [])


@pytest.mark.parametrize("room", range(40, 110, 7))
def test_an_image_is_whole_or_not_there(tokenizer, images, room):
    ids, cut, shown = encode_illustrated(TEXT, images, tokenizer, room, "")
    assert len(ids) <= room
    token = tokenizer.convert_tokens_to_ids("<image>")
    assert ids.count(token) == 4 * len(shown)
    assert cut == (len(shown) < 2 or tokenizer.decode(ids).count("Doc") < 2)
    assert tokenizer.decode(ids).endswith("</information>\n\n")


def test_a_served_passage_has_its_image():
    encoded = base64.b64encode(picture(0)).decode()
    document = {"id": "1", "contents": '"A"\none', "image": encoded}
    passage = to_passage(ScoredDocument.model_validate({"document": document, "score": 1.0}))
    assert passage.image == encoded
    assert text_of(passage) == f"one {PLACE}"
    assert text_of(Passage("1", "A", f"a{PLACE}b", 1.0)) == "ab"


def test_a_response_says_that_it_has_none():
    assert ToolResponse("text").images == ()
