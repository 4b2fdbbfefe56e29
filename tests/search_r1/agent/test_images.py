"""Images of passages in observations."""

import base64
from dataclasses import replace

import pytest
from transformers import AutoTokenizer

from search_r1.agent.observation import encode_illustrated, encode_passages
from search_r1.search.client.answers import Passage, to_passage
from search_r1.search.client.config import RetrieverConfig
from search_r1.search.schema import ScoredDocument
from search_r1.tools.base import ToolResponse
from search_r1.tools.search import SearchTool, illustrated
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


def test_an_image_without_room_is_left_out_and_the_text_goes_on(tokenizer, images):
    room = len(tokenizer.encode(TEXT, add_special_tokens=False)) + 20
    large = replace(images[0], token_ids=images[0].token_ids * 20)
    ids, cut, shown = encode_illustrated(TEXT, [large, images[1]], tokenizer, room + 7, "")
    assert cut and shown == [images[1]]
    assert "two" in tokenizer.decode(ids)


def test_a_served_passage_has_its_image():
    encoded = base64.b64encode(picture(0)).decode()
    document = {"id": "1", "contents": '"A"\none', "image": encoded}
    passage = to_passage(ScoredDocument.model_validate({"document": document, "score": 1.0}))
    assert passage.image == encoded
    assert illustrated(passage).text == f"one {PLACE}"
    strange = illustrated(Passage("1", f"A{PLACE}", f"a{PLACE}b", 1.0, f"d{PLACE}"))
    assert (strange.title, strange.text, strange.document) == ("A", "ab", "d")


@pytest.mark.parametrize("image", [{"path": "a.png"}, 3, None, ["a.png"]])
def test_what_other_corpora_call_image_is_no_image(image):
    document = {"id": "1", "contents": '"A"\none', "image": image}
    passage = to_passage(ScoredDocument.model_validate({"document": document, "score": 1.0}))
    assert passage.image == ""


@pytest.mark.parametrize("reads", [False, True])
async def test_search_shows_images_to_a_policy_that_reads_them(reads):
    encoded = base64.b64encode(picture(0)).decode()

    class Library:
        async def search(self, query, noise):
            return [Passage("1", '"A"', "one", 1.0, image=encoded)]

    tool = SearchTool(RetrieverConfig(url="http://127.0.0.1:1/retrieve"))
    tool.client = Library()
    tool.shows_images = reads
    response = await tool.execute("q")
    assert (PLACE in response.text) == reads
    assert response.images == ((encoded,) if reads else ())


def test_a_response_says_that_it_has_none():
    assert ToolResponse("text").images == ()
