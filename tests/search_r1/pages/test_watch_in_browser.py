"""The page of runs in a real browser: live, as a file, by keyboard, with hostile contents."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect

from search_r1.pages import retriever_state
from search_r1.pages.access import Access
from search_r1.pages.cost import Prices
from search_r1.pages.watch import Feed, Watch, main, make_app
from tests.retrieval import serving
from tests.search_r1.pages.browser import PATIENCE_MS, Opened, needs_browser, started
from tests.search_r1.pages.made_records import HOSTILE, sample, write
from tests.search_r1.pages.made_runs import (
    append,
    make_run,
    metrics_app,
    raise_alarms,
    step_line,
    validate,
    validation_line,
)
from verl.utils.run_folder import held

ACCESS = Access("a test", "secret")
EVERY_S = 0.05


@pytest.fixture(scope="module")
def browser():
    with started() as browser:
        yield browser


@pytest.fixture
def runs(tmp_path):
    """Two runs, the second of which is shorter."""
    return [
        make_run(tmp_path / "long", [0.1, 0.5, 0.2, 0.6]),
        make_run(tmp_path / "short", [0.3, 0.4]),
    ]


@contextmanager
def live(browser, folders, prices: Prices | None = None, **context) -> Iterator[Page]:
    """The served page of some runs. It may ask its own server alone, and complain never."""
    app = make_app(Feed(Watch(folders, prices or Prices()), EVERY_S), ACCESS)
    with serving(app) as address:
        page = browser.new_page(**context)
        page.set_default_timeout(PATIENCE_MS)
        foreign: list[str] = []
        errors: list[str] = []
        page.on("request", lambda r: None if r.url.startswith(address) else foreign.append(r.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text))
        try:
            page.goto(f"{address}/?token={ACCESS.token}")
            expect(page.get_by_role("status")).to_have_text("live", timeout=PATIENCE_MS)
            yield page
        finally:
            page.close()
    assert not foreign and not errors, (foreign, errors)


def readout(page: Page, title: str):
    """What a chart says at its cursor, or at its end."""
    return page.locator(f'[data-chart="{title}"] .readout')


@needs_browser
def test_what_a_run_writes_appears_while_it_is_open(browser, runs):
    with held(runs[0]), live(browser, runs[:1]) as page:
        row = page.locator(".runs tbody tr")
        expect(row).to_contain_text("running")
        expect(row).to_contain_text("4 of 10")
        expect(row).to_contain_text("4 min")  # six steps of 36 s
        expect(readout(page, "Mean score")).to_contain_text("0.6")
        append(runs[0], step_line(5, 0.75))
        expect(readout(page, "Mean score")).to_contain_text("0.75")
        expect(row).to_contain_text("5 of 10")
        append(runs[0], validation_line(5, 0.42))
        expect(readout(page, "Validation: rivers")).to_contain_text("0.42")


@needs_browser
def test_a_run_that_went_back_shows_its_new_steps_alone(browser, runs):
    with live(browser, runs[:1]) as page:
        expect(page.locator(".runs tbody tr")).to_contain_text("4 of 10")
        other = runs[0] / "other"
        other.write_text(step_line(1, 0.1) + step_line(2, 0.9))
        other.replace(runs[0] / "metrics.jsonl")
        expect(page.locator(".runs tbody tr")).to_contain_text("2 of 10")
        expect(readout(page, "Mean score")).to_contain_text("0.9")
        expect(page.get_by_role("group", name="Validation: rivers")).to_be_hidden()


@needs_browser
def test_trajectories_appear_and_what_is_open_stays_open(browser, runs):
    with live(browser, runs[:1]) as page:
        expect(page.get_by_text("None were recorded yet")).to_be_visible()
        folder = runs[0] / "trajectories"
        write(folder / "train_000001.jsonl", [sample("First?", "Paris", uid="a")])
        page.get_by_text("First?").first.click()
        expect(page.locator(".trajectory .passage").first).to_contain_text("Its capital is Paris.")
        for step in (2, 3):
            records = [sample(f"Later {step}?", "Rome", uid="b")]
            write(folder / f"train_{step:06d}.jsonl", records)
            expect(page.get_by_text(f"Later {step}?").first).to_be_visible()
        expect(page.locator(".trajectory .passage").first).to_contain_text("Its capital is Paris.")
        expect(page.locator(".newest-one")).to_have_count(3)


@needs_browser
def test_runs_are_told_apart_hidden_and_shown(browser, runs):
    with live(browser, runs) as page:
        values = readout(page, "Mean score").locator(".value")
        expect(values).to_have_text(["long 0.6", "short 0.4"])
        page.get_by_role("checkbox", name="long").uncheck()
        expect(values).to_have_text(["short 0.4"])
        expect(page.locator('[data-chart="Seconds of a step: long"]')).to_be_hidden()
        append(runs[1], step_line(3, 0.45))
        expect(values).to_have_text(["short 0.45"])  # what is hidden stays hidden
        page.get_by_role("checkbox", name="long").check()
        expect(values).to_have_text(["long 0.6", "short 0.45"])


@needs_browser
def test_axes_and_smoothing_change_what_charts_say(browser, runs):
    with live(browser, runs[:1]) as page:
        chart = page.get_by_role("group", name="Mean score")
        chart.focus()
        page.keyboard.press("ArrowLeft")
        expect(readout(page, "Mean score")).to_contain_text("step 4")
        page.get_by_label("Over").select_option("samples")
        chart.focus()
        page.keyboard.press("ArrowLeft")
        expect(readout(page, "Mean score")).to_contain_text("samples 40")
        page.get_by_label("Over").select_option("hours")
        chart.focus()
        page.keyboard.press("ArrowLeft")
        expect(readout(page, "Mean score")).to_contain_text("h 0.04")
        page.get_by_label("Smoothing").fill("0.5")
        # (.5 .6 + .25 .2 + .125 .5 + .0625 .1) / (1 - .0625)
        expect(readout(page, "Mean score")).to_contain_text("0.4467")


@needs_browser
def test_everything_can_be_reached_by_keys(browser, runs):
    with live(browser, runs) as page:
        page.get_by_role("checkbox", name="short").focus()
        page.keyboard.press("Space")
        values = readout(page, "Mean score").locator(".value")
        expect(values).to_have_text(["long 0.6"])
        expect(page.get_by_role("checkbox", name="short")).to_be_focused()
        page.keyboard.press("Space")
        expect(values).to_have_text(["long 0.6", "short 0.4"])
        page.get_by_role("group", name="Mean score").focus()
        for key, said in (
            ("ArrowRight", ["long 0.1", "short 0.3"]),
            ("ArrowRight", ["long 0.5", "short 0.4"]),
            ("ArrowRight", ["long 0.2", "short –"]),
            ("ArrowLeft", ["long 0.5", "short 0.4"]),
        ):
            page.keyboard.press(key)
            expect(values).to_have_text(said)
        page.keyboard.press("Escape")
        expect(readout(page, "Mean score")).to_contain_text("newest")
        page.get_by_label("Another metric").select_option("perf/total_num_tokens")
        page.get_by_role("button", name="Show").focus()
        page.keyboard.press("Enter")
        expect(readout(page, "perf/total_num_tokens")).to_contain_text("720")


@needs_browser
def test_the_timers_of_a_step_are_stacked_with_what_nothing_measures(browser, runs):
    with live(browser, runs[:1]) as page:
        values = readout(page, "Seconds of a step: long").locator(".value")
        expect(values).to_have_text(["gen 20 s", "update_actor 10 s", "other 6 s"])


@needs_browser
def test_alarms_and_lines_that_cannot_be_read_are_shown_as_such(browser, runs):
    raise_alarms(runs[0])
    append(runs[0], f"{HOSTILE}\n", step_line(5, 0.8), '{"training/glo')
    with live(browser, runs) as page:
        alarms = page.get_by_role("region", name="Alarms")
        expect(alarms.get_by_role("heading")).to_have_text("6 alarms")
        for text in (
            "collapse at step 3: actor/entropy moved first",
            "from the alarm of step 3 to step 1",
            "ended by SIGKILL, went on after step 2",
            "line 6: not JSON",
            "line 8: its end is missing",
        ):
            expect(alarms).to_contain_text(text)
        expect(readout(page, "Mean score")).to_contain_text("0.8")


@needs_browser
def test_what_retrieval_servers_have_to_do_is_shown_while_they_answer(
    browser, tmp_path, monkeypatch
):
    monkeypatch.setattr(retriever_state, "TIMEOUT_S", 60)
    with serving(metrics_app([(10, 1.0), (14, 2.0)])) as address:
        folder = make_run(tmp_path / "run", [0.1], url=f"{address}/retrieve")
        with held(folder), live(browser, [folder]) as page:
            servers = page.get_by_role("region", name="Retrieval servers")
            expect(servers).to_contain_text("run: 0 of 1 answer")
            expect(readout(page, "Queries that wait")).to_contain_text("run 7")
            expect(readout(page, "Seconds of a request")).to_contain_text("run 0.25")


@needs_browser
def test_cost_has_money_where_there_are_prices(browser, runs):
    with live(browser, runs, Prices(device_hour=10)) as page:
        long = page.locator(".runs tbody tr").first
        expect(long.locator("td").last).to_have_text("0.8")  # .08 device-hours
        expect(page.locator(".runs thead")).to_contain_text("Cost")
    with live(browser, runs) as page:
        expect(page.locator(".runs thead")).not_to_contain_text("Cost")


@needs_browser
def test_runs_are_compared_by_their_last_validations(browser, runs):
    validate(runs[0], 4, ["Paris", "Paris", *["Rome"] * 6])
    with live(browser, runs) as page:
        table = page.get_by_role("region", name="Comparison of validations")
        expect(table).to_contain_text("not both have been validated yet")
        validate(runs[1], 2, ["Paris", "Rome", *["Paris"] * 6])
        expect(table.locator("tbody tr")).to_contain_text(["short (step 2 against 4)"])
        cells = table.locator("tbody td")
        expect(cells.nth(1)).to_have_text("+0.625")
        expect(cells.nth(5)).to_have_text("0.125")


@pytest.fixture
def hostile(tmp_path):
    """A run whose every name and text is hostile, as far as a file system has such names."""
    name = HOSTILE.replace("/", "∕")[:120]
    folder = make_run(tmp_path / name, [])
    (folder / "config.yaml").write_text(
        f"actor_rollout_ref: {{model: {{path: '{'<img src=x>'}'}}}}"
    )
    metrics = {f"val/em/{HOSTILE}": 0.5, f"timing_s/{HOSTILE}": 3.0, HOSTILE: 1.0}
    append(folder, step_line(1, 0.5, **metrics), f"{HOSTILE}\n")
    raise_alarms(folder)
    (folder / "alarms" / "step_3" / "alarm.txt").write_text(HOSTILE)
    record = sample(HOSTILE, HOSTILE, uid=HOSTILE)
    write(folder / "trajectories" / "train_000001.jsonl", [record, f"{HOSTILE}\n"])
    return folder


@needs_browser
def test_hostile_texts_are_texts(browser, hostile, runs):
    with live(browser, [hostile, runs[0]]) as page:
        page.locator(".newest-one summary").first.click()
        expect(page.locator(".trajectory")).to_be_visible()
        page.get_by_label("Another metric").select_option(HOSTILE)
        page.get_by_role("button", name="Show").click()
        expect(page.locator(".chart-title", has_text="onerror")).not_to_have_count(0)
        assert page.title() == "Runs"
        assert page.locator("img, iframe, object").count() == 0
        assert page.evaluate("document.querySelectorAll('script[type=module]').length") == 1
        assert HOSTILE in page.locator(".alarms").inner_text()


@needs_browser
def test_the_same_page_is_one_file_that_asks_for_nothing(browser, runs, tmp_path, capsys):
    raise_alarms(runs[0])
    out = tmp_path / "page.html"
    assert main([*map(str, runs), "--out", str(out)]) == 0
    assert str(out) in capsys.readouterr().out
    opened = Opened(browser, out)
    page = opened.page
    expect(page.get_by_role("status")).to_contain_text("as of 2")
    expect(readout(page, "Mean score").locator(".value")).to_have_text(["long 0.6", "short 0.4"])
    expect(page.get_by_role("region", name="Alarms")).to_contain_text("collapse at step 3")
    opened.close()


def serious_findings(page: Page) -> list:
    return [
        (rule["id"], [node["html"][:200] for node in rule["nodes"]][:3])
        for rule in Axe().run(page).response["violations"]
        if rule["impact"] in ("serious", "critical")
    ]


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_serious_keeps_people_from_using_it(browser, runs, scheme):
    raise_alarms(runs[0])
    validate(runs[0], 4, ["Paris", "Rome"])
    validate(runs[1], 2, ["Rome", "Rome"])
    with held(runs[0]), live(browser, runs, Prices(device_hour=1), color_scheme=scheme) as page:
        page.locator(".newest-one summary").first.click()
        expect(page.locator(".trajectory")).to_be_visible()
        assert serious_findings(page) == []


@needs_browser
def test_a_narrow_screen_shows_it_without_scrolling_sideways(browser, runs):
    raise_alarms(runs[0])
    validate(runs[0], 4, ["Paris"])
    with live(browser, runs, viewport={"width": 390, "height": 800}) as page:
        expect(readout(page, "Mean score")).to_contain_text("0.6")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390


@needs_browser
def test_the_switch_of_colours_draws_the_charts_again(browser, runs):
    with live(browser, runs[:1], color_scheme="light") as page:
        expect(readout(page, "Mean score")).to_contain_text("0.6")
        picture = "document.querySelector('[data-chart=\"Mean score\"] canvas').toDataURL()"
        light = page.evaluate(picture)
        switch = page.get_by_role("button", name=re.compile("^Colours"))
        switch.click()
        switch.click()
        page.wait_for_function(f"light => {picture} !== light", arg=light)


@needs_browser
def test_a_page_whose_server_has_ended_says_so_and_stays(browser, runs):
    page = browser.new_page()
    page.set_default_timeout(PATIENCE_MS)
    with serving(make_app(Feed(Watch(runs, Prices()), EVERY_S), ACCESS)) as address:
        page.goto(f"{address}/?token={ACCESS.token}")
        expect(page.get_by_role("status")).to_have_text("live")
    expect(page.get_by_role("status")).to_contain_text("connection lost", timeout=PATIENCE_MS)
    expect(readout(page, "Mean score")).to_contain_text("0.6")
    page.close()


@needs_browser
def test_a_part_that_was_zoomed_into_stays_when_more_is_written(browser, runs):
    append(runs[0], *(step_line(step, 0.6) for step in range(5, 9)))
    with live(browser, runs[:1]) as page:
        expect(readout(page, "Mean score")).to_contain_text("0.6")
        plot = page.locator('[data-chart="Mean score"] .u-over')
        plot.scroll_into_view_if_needed()
        box = plot.bounding_box()
        middle = box["y"] + box["height"] / 2
        page.mouse.move(box["x"] + 0.1 * box["width"], middle)
        page.mouse.down()
        page.mouse.move(box["x"] + 0.5 * box["width"], middle, steps=5)
        page.mouse.up()
        append(runs[0], step_line(9, 0.9))
        expect(page.locator(".runs tbody tr")).to_contain_text("9 of 10")
        # the right edge is still about the middle of eight steps
        page.mouse.move(box["x"] + 0.99 * box["width"], middle)
        expect(readout(page, "Mean score")).to_contain_text("step 4")
