"""Clicks through the viewer in a real browser: filter, open, step, compare, hostile texts."""

import re

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect

from search_r1.pages.viewer import build
from tests.search_r1.pages.browser import Opened, needs_browser, started
from tests.search_r1.pages.made_records import HOSTILE, sample, unusual, write, write_run

pytestmark = needs_browser

LONG = 300
"""Trajectories of a list that must not be in the page as a whole."""


@pytest.fixture(scope="module")
def browser():
    with started() as browser:
        yield browser


@pytest.fixture(scope="module")
def run_page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("viewer")
    return build(write_run(folder / "run"), folder / "page.html")[0]


@pytest.fixture
def opened(browser, run_page):
    """Opens the page of the run at an address; afterwards nothing may have been asked for."""
    made: list[Opened] = []

    def open_at(address: str = "", **context):
        made.append(Opened(browser, run_page, address, **context))
        return made[-1].page

    yield open_at
    for each in made:
        each.close()


def chosen(page) -> str:
    """The name of the trajectory that the address holds."""
    return page.evaluate("decodeURIComponent(location.hash.slice(1))")


def test_filters_leave_what_they_name(opened):
    page = opened()
    count = page.locator(".count")
    expect(count).to_have_text(re.compile("^11 of 11"))
    page.get_by_label("Step").select_option("1")
    expect(count).to_have_text(re.compile("^5 of 11"))
    page.locator("[data-filter=outcome]").select_option("mixed")
    expect(count).to_have_text(re.compile("^3 of 11, 33 % right"))
    page.locator("[data-filter=reward]").select_option("wrong")
    expect(page.locator(".row")).to_have_count(2)
    page.get_by_label("Search", exact=True).fill("nice")
    expect(page.locator(".row")).to_have_count(1)
    page.get_by_role("button", name="Clear filters").click()
    expect(count).to_have_text(re.compile("^11 of 11"))


def test_a_search_may_go_through_whole_records(opened):
    page = opened()
    page.get_by_label("Search", exact=True).fill("its capital is lima")
    expect(page.locator(".row")).to_have_count(0)
    page.get_by_label("also in thoughts and passages").check()
    expect(page.locator(".count")).to_have_text(re.compile("^8 of 11"))


def test_keys_step_through_the_list_and_the_views(opened):
    page = opened()
    page.wait_for_selector(".trajectory")
    assert chosen(page) == "" or chosen(page) == "train_000001:1"
    page.keyboard.press("j")
    page.keyboard.press("j")
    expect(page.locator(".answers dd").first).to_contain_text("Nice")
    assert chosen(page) == "train_000001:3"
    page.keyboard.press("k")
    expect(page.locator(".answers dd").first).to_contain_text("Lyon")
    page.keyboard.press("g")
    expect(page.locator(".member")).to_have_count(3)
    assert chosen(page) == "train_000001:2/group"
    page.keyboard.press("Escape")
    expect(page.locator(".trajectory")).to_be_visible()
    page.keyboard.press("/")
    page.keyboard.type("jgs")  # letters in a field are letters
    expect(page.get_by_label("Search", exact=True)).to_have_value("jgs")
    page.keyboard.press("Escape")
    page.keyboard.press("?")
    expect(page.get_by_role("dialog")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_be_hidden()


def test_an_address_opens_its_trajectory(opened):
    page = opened("#train_000002%3A1/steps")
    expect(page.locator(".member")).to_have_count(6)
    page.get_by_role("button", name="val step 2").click()
    expect(page.locator(".chips")).to_contain_text("val step 2")
    assert chosen(page) == "val_000002:1"
    page.evaluate("location.hash = '#nowhere:1'")
    expect(page.get_by_role("alert")).to_contain_text("No record is called nowhere:1")


def test_a_group_stands_side_by_side_with_its_advantages(opened):
    page = opened("#train_000001:1/group")
    members = page.locator(".member")
    expect(members).to_have_count(3)
    numbers = [members.nth(n).locator(".member-numbers").inner_text() for n in range(3)]
    assert ["+1.500" in numbers[0], "−0.500" in numbers[1], "−0.500" in numbers[2]] == [True] * 3
    expect(page.get_by_text("3 samples of one prompt, mean reward 0.333")).to_be_visible()
    members.nth(2).get_by_role("button").click()
    expect(page.locator(".answers dd").first).to_contain_text("Nice")


def test_tokens_are_coloured_and_say_their_numbers(opened):
    page = opened("#train_000001:2")
    first = page.locator(".said .tok").first
    expect(first).to_have_attribute("data-author", "policy")
    page.locator(".colour-by").select_option(label="advantage")
    expect(first).to_have_attribute("data-heat", "cold")
    expect(page.locator(".legend")).to_contain_text("−0.500")
    first.hover()
    inspector = page.locator(".inspector")
    for text in ("−0.5000", "−0.7500", "−0.2500", "0.2500", "in the loss", "policy, trained"):
        expect(inspector).to_contain_text(text)
    page.locator(".said").first.focus()
    page.keyboard.press("ArrowRight")
    expect(inspector).to_contain_text('" look"')
    page.keyboard.press("j")  # the choice of colours stays
    expect(page.locator(".colour-by")).to_have_value("advantages")


def test_gold_passages_and_answers_are_marked(opened):
    page = opened("#train_000001:1")
    passages = page.locator(".passage")
    expect(passages.nth(0)).to_contain_text("gold passage")
    expect(passages.nth(0).locator("mark")).to_have_text("Paris")
    expect(passages.nth(1)).not_to_contain_text("gold passage")
    expect(passages.nth(1).locator("mark")).to_have_count(0)


def test_contexts_written_anew_untrained_text_and_characters_of_several_tokens(browser, tmp_path):
    path = build(write(tmp_path / "x.jsonl", [unusual()]), tmp_path / "page.html")[0]
    opened = Opened(browser, path)
    page = opened.page
    heads = [head.split("\n")[0] for head in page.locator(".author").all_inner_texts()]
    assert heads == ["Prompt", "Policy, not trained", "Engine", "Context written anew", "Policy"]
    facts = page.locator(".segment-facts").all_inner_texts()
    (paid,) = [text for text in facts if "paid" in text]
    assert "beside the conversation" in paid and "paid 0.25" in paid
    tokens = page.locator(".by-policy .tok")
    assert tokens.all_inner_texts() == ["ok ", "▫", "🙂", " <answer> Paris </answer>"]
    assert page.locator(".by-untrained .tok").first.get_attribute("data-author") == "untrained"
    page.locator(".colour-by").select_option(label="entropy")
    tokens.nth(1).hover()
    expect(page.locator(".inspector")).to_contain_text("0.2000")
    expect(tokens.nth(3)).not_to_have_attribute("data-heat", "hot")  # its entropy is unknown
    opened.close()


@pytest.mark.parametrize("tab", ["", "/group", "/steps"])
def test_hostile_texts_are_texts(opened, tab):
    page = opened("#train_000002:3" + tab)
    page.wait_for_selector(".member" if tab else ".trajectory")
    assert page.title() == "run"
    assert page.locator("img, iframe, object, b").count() == 0
    assert HOSTILE in page.locator(".body").inner_text()
    assert page.evaluate("document.querySelectorAll('script[type=module]').length") == 1


def test_no_text_can_become_an_element_even_by_a_mistake_in_the_page(browser, run_page):
    """The policy of the page refuses HTML and requests, if ever its code asked for them."""
    opened = Opened(browser, run_page)
    refused = opened.page.evaluate(
        "() => { try { document.body.innerHTML = '<p>'; return '' } catch (e) { return e.name } }"
    )
    assert refused == "TypeError"
    sent = "fetch('https://example.org').then(() => 'sent', () => 'refused')"
    assert opened.page.evaluate(sent) == "refused"
    blocked = [error for error in opened.errors if "Content Security Policy" in error]
    assert blocked and "example.org" in blocked[0]
    opened.context.close()


def test_records_that_cannot_be_read_are_shown_as_such(opened):
    page = opened("#train_000002:5")
    expect(page.get_by_role("alert")).to_contain_text("cut off")
    expect(page.locator(".raw")).to_have_text('{"uid": "e", "pro')
    page.keyboard.press("k")
    expect(page.get_by_role("alert")).to_contain_text("prompt is missing")
    for tab in ("group", "steps"):
        page.get_by_role("tab", name=re.compile(tab, re.I)).click()
        expect(page.get_by_role("alert")).to_be_visible()


def test_a_page_that_was_cut_off_says_so(browser, run_page, tmp_path):
    cut = tmp_path / "cut.html"
    html = run_page.read_text()
    at = html.index('id="index"')
    script = html[html.index('<script type="module">') :]
    cut.write_text(html[: at + 200] + "</script>" + script)
    page = browser.new_page()
    page.goto(cut.as_uri())
    expect(page.get_by_role("alert")).to_contain_text("This page cannot be read")
    page.close()


def test_only_the_rows_in_sight_are_in_the_page(browser, tmp_path):
    records = [sample(f"Question {n}?", "Paris", uid=f"{n}") for n in range(LONG)]
    path = build(write(tmp_path / "x.jsonl", records), tmp_path / "page.html")[0]
    opened = Opened(browser, path)
    page = opened.page
    rows = page.locator(".row")
    assert 0 < rows.count() < 60
    page.locator(".list").evaluate("node => { node.scrollTop = node.scrollHeight }")
    expect(rows.last).to_contain_text(f"Question {LONG - 1}?")
    assert rows.count() < 60
    opened.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("address", ["#train_000001:1", "#train_000001:1/group", "#train_000002:5"])
def test_nothing_serious_keeps_people_from_using_it(opened, scheme, address):
    page = opened(address, color_scheme=scheme)
    page.wait_for_selector(".body > *")
    if address.endswith("1:1"):
        page.locator(".said .tok").first.hover()
    found = Axe().run(page).response["violations"]
    serious = [
        (rule["id"], [node["html"][:200] for node in rule["nodes"]][:3])
        for rule in found
        if rule["impact"] in ("serious", "critical")
    ]
    assert not serious


def test_a_narrow_screen_shows_it_without_scrolling_sideways(opened):
    page = opened("#train_000001:1", viewport={"width": 390, "height": 800})
    page.wait_for_selector(".trajectory")
    wide = page.evaluate("document.documentElement.scrollWidth")
    assert wide <= 390


def test_the_switch_chooses_the_colours(opened):
    page = opened(color_scheme="light")
    paper = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(paper)
    switch = page.get_by_role("button", name=re.compile("^Colours"))
    switch.click()
    assert page.evaluate(paper) == light
    switch.click()
    assert page.evaluate(paper) != light
