"""The station's page in a browser, where there is one: pictures in, verdict, threshold, list, downloads, phone, dark, token."""

from __future__ import annotations

import csv
import io
import json
import re
import threading
import time
from urllib.parse import parse_qs, urlsplit

import pytest

pytest.importorskip("fastapi", reason="serving needs fastapi (extra [station])")
pytest.importorskip("uvicorn")
api = pytest.importorskip(
    "playwright.sync_api", reason="the page in a browser needs playwright (extra [dev])"
)

from csad.commands import run_station as serve  # noqa: E402
from csad.evaluation.thresholds import choose_threshold  # noqa: E402
from csad.station.connections import make_server  # noqa: E402
from csad.station.server import create_app  # noqa: E402
from csad.station.station import Options  # noqa: E402

from tests.test_serve import BrightEngine, picture  # noqa: E402

# What a drop from the desktop does: a DataTransfer with files in it.
DROP = """(dropped) => {
  const files = new DataTransfer();
  for (const [name, bytes] of dropped) files.items.add(new File([new Uint8Array(bytes)], name));
  document.body.dispatchEvent(new DragEvent("drop", {dataTransfer: files, bubbles: true, cancelable: true}));
}"""


@pytest.fixture
def opened(browser):
    """Start a station and open its page; fails on any message in the console and on any request elsewhere."""
    wrong, ends = [], []

    def open_page(engines=None, width=1280, scheme="light", **options):
        options = Options(**{"allowed_hosts": frozenset()} | options)
        server = make_server(create_app(engines or {"bright": BrightEngine()}, options), options)
        listening = serve.listen("127.0.0.1", 0)
        thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
        thread.start()
        context = browser.new_context(
            viewport={"width": width, "height": 844}, color_scheme=scheme, accept_downloads=True
        )
        shown = context.new_page()
        shown.on("console", lambda message: wrong.append(message.text))
        shown.on("pageerror", lambda problem: wrong.append(str(problem)))
        shown.on(
            "request",
            lambda request: (
                wrong.append(request.url)
                if not request.url.startswith((serve.address(listening), "data:", "blob:"))
                else None
            ),
        )
        shown.goto(serve.address(listening))
        ends.append((context, server, thread))
        shown.wrong = wrong
        return shown

    yield open_page
    for context, server, thread in ends:
        context.close()
        server.should_exit = True
        thread.join(10)
    assert wrong == []


def drop(shown, value: int, name: str) -> None:
    shown.evaluate(DROP, [[name, list(picture(value))]])
    api.expect(shown.locator("#name")).to_have_text(name)


def verdict(shown) -> str:
    return shown.locator("#verdict").inner_text()


def slide(shown, value: float) -> None:
    shown.locator("#threshold").evaluate(
        """(slider, value) => {
        slider.value = value;
        slider.dispatchEvent(new Event("input")); slider.dispatchEvent(new Event("change")) }""",
        value,
    )


def test_a_dropped_picture_shows_verdict_reasons_and_overlay(opened):
    shown = opened()
    api.expect(shown.locator("#about")).to_contain_text("bright")
    drop(shown, 200, "bad.png")
    assert verdict(shown) == "Anomalous" and shown.locator("#icon").get_attribute("href") == "#icon-anomalous"
    assert "unusual surface" in shown.locator("#findings").inner_text()
    assert shown.locator("#score-words").inner_text() == "Score 200 is over the threshold 100"
    api.expect(shown.locator("#map")).to_be_visible()
    assert shown.locator("#legend").inner_text() == "component 1"
    assert (
        shown.locator("#legend i").evaluate("swatch => getComputedStyle(swatch).backgroundColor")
        == "rgb(230, 159, 0)"
    )
    # The three parts of the overlay lie where they belong: the picture is grey, its map is not.
    colours = [
        shown.locator(f"#{name}").evaluate("""canvas => [canvas.width, canvas.height,
        ...canvas.getContext("2d").getImageData(40, 15, 1, 1).data]""")
        for name in ("picture", "map")
    ]
    assert (
        colours[0][:5] == [80, 60, 200, 200, 200]
        and colours[1][:2] == [80, 60]
        and len(set(colours[1][2:5])) > 1
    )
    drop(shown, 50, "good.png")
    assert verdict(shown) == "Normal" and not shown.locator("#findings li").count()


def test_the_slider_moves_the_verdict_and_says_what_it_promises(opened):
    shown, scores = opened(), BrightEngine().metadata["validation_scores"]
    drop(shown, 80, "a.png")
    assert verdict(shown) == "Normal" and "About 1 good part in 101" in shown.locator("#promise").inner_text()
    slide(shown, 60)
    threshold = float(re.search(r"[\d.]+", shown.locator("#threshold-words").inner_text())[0])
    assert verdict(shown) == "Anomalous" and "unusual surface" in shown.locator("#findings").inner_text()
    assert (
        "anomalous" in shown.locator("#list tr").inner_text()
        and "1 anomalous" in shown.locator("#counts").inner_text()
    )
    promised = float(re.search(r"About (\d+) good parts in 100", shown.locator("#promise").inner_text())[1])
    rank = sum(score <= threshold for score in scores)
    assert promised == pytest.approx(100 * choose_threshold(scores, 1 - rank / 101).guaranteed_fpr, abs=0.5)
    shown.locator("#threshold").focus()
    for _ in range(3):
        shown.keyboard.press("PageUp")
    assert verdict(shown) == "Normal"
    shown.locator("#reset").click()
    assert shown.locator("#threshold-words").inner_text() == "Threshold 100"


def test_the_list_counts_and_can_be_downloaded(opened):
    shown = opened()
    for value, name in (
        (50, 'a "b", c.png'),
        (200, "bad.png"),
        (0, "black.png"),
        (50, "=1+1.png"),
        (50, "-2.png"),
    ):
        drop(shown, value, name)
        if name == "black.png":
            assert verdict(shown) == "Undecided" and "not finite" in shown.locator("#findings").inner_text()
    assert [line.inner_text() for line in shown.locator("#counts .pill").all()] == [
        "3 normal",
        "1 anomalous",
        "1 undecided",
        "0 unreadable",
    ]
    with shown.expect_download() as csv_file:
        shown.locator("#csv").click()
    with shown.expect_download() as lines_file:
        shown.locator("#jsonl").click()
    rows = list(csv.DictReader(io.StringIO(csv_file.value.path().read_text())))
    entries = [json.loads(line) for line in lines_file.value.path().read_text().splitlines()]
    names = ['a "b", c.png', "bad.png", "black.png", "=1+1.png", "-2.png"]
    assert [one["image"] for one in entries] == names
    # A spreadsheet takes what begins so for a formula.
    assert [row["image"] for row in rows] == [*names[:3], "'=1+1.png", "'-2.png"]
    assert (
        [row["verdict"] for row in rows]
        == [one["verdict"] for one in entries]
        == ["normal", "anomalous", "undecided", "normal", "normal"]
    )
    assert rows[1]["score"] == "200" and "overlay" not in entries[1]
    shown.locator("#list button", has_text="bad.png").click()
    assert verdict(shown) == "Anomalous"
    shown.locator("#clear").click()
    assert verdict(shown) == "No picture yet" and not shown.locator("#list tr").count()


def test_of_pictures_that_come_together_the_worst_is_shown_and_another_can_be_clicked(opened):
    shown = opened()
    values = {"good.png": 50, "bad.png": 180, "worst.png": 220, "last.png": 60}
    shown.evaluate(DROP, [[name, list(picture(value))] for name, value in values.items()])
    api.expect(shown.locator("#list tr")).to_have_count(4)
    api.expect(shown.locator("#name")).to_have_text("worst.png")
    assert verdict(shown) == "Anomalous" and "worst of the 4 pictures" in shown.locator("#batch").inner_text()
    shown.locator("#list button", has_text="last.png").click()
    assert shown.locator("#name").inner_text() == "last.png" and verdict(shown) == "Normal"
    assert "One of the 4" in shown.locator("#batch").inner_text()
    # What could not be judged may be anything: it comes before all others. A picture alone is shown whatever came before it.
    shown.evaluate(
        DROP, [[name, list(picture(value))] for name, value in [("black.png", 0), ("bad2.png", 250)]]
    )
    api.expect(shown.locator("#list tr")).to_have_count(6)
    api.expect(shown.locator("#name")).to_have_text("black.png")
    assert verdict(shown) == "Undecided"
    drop(shown, 40, "alone.png")
    assert shown.locator("#batch").is_hidden()


def test_the_scores_axis_has_numbers(opened):
    shown = opened()
    drop(shown, 200, "bad.png")
    low, threshold, high = (
        shown.locator(f"#axis-{end}").inner_text() for end in ("low", "threshold", "high")
    )
    assert float(threshold) == 100 and float(low) < 1 and float(high) > 200
    slide(shown, 204)
    assert float(shown.locator("#axis-threshold").inner_text()) == pytest.approx(204, abs=1)
    assert shown.locator("#axis-high").inner_text() == ""  # the threshold's number stands there


def test_a_score_far_away_leaves_the_others_apart(opened):
    scores = [float(value) for value in range(1, 11)]
    shown = opened({"bright": BrightEngine(validation_scores=scores)})
    drop(shown, 250, "bad.png")
    assert float(shown.locator("#axis-threshold").inner_text()) == 10
    assert float(shown.locator("#threshold").get_attribute("max")) < 40
    assert shown.locator("#axis-high").inner_text() == "250 →"


@pytest.mark.parametrize("content", [b"text", b""])
def test_what_is_no_picture_is_listed_as_unreadable(opened, content):
    shown = opened()
    shown.locator("#file").set_input_files([{"name": "x.png", "mimeType": "image/png", "buffer": content}])
    api.expect(shown.locator("#verdict")).to_have_text("Unreadable")
    assert "1 unreadable" in shown.locator("#counts").inner_text()
    assert [text for text in shown.wrong if "415" not in text] == []
    shown.wrong.clear()  # browsers write every 4xx to the console


def test_pasting_and_the_camera(opened):
    shown = opened()
    shown.evaluate(
        DROP.replace("drop", "paste")
        .replace("DragEvent", "ClipboardEvent")
        .replace("dataTransfer", "clipboardData"),
        [["pasted.png", list(picture(50))]],
    )
    api.expect(shown.locator("#name")).to_have_text("pasted.png")
    shown.evaluate(
        DROP.replace("drop", "paste")
        .replace("DragEvent", "ClipboardEvent")
        .replace("dataTransfer", "clipboardData"),
        [["image.png", list(picture(50))]],
    )
    api.expect(shown.locator("#name")).to_contain_text(re.compile(r"pasted-\d{4}-"))
    shown.locator("#camera").click()
    shown.locator("#shoot").click()
    api.expect(shown.locator("#name")).to_contain_text("camera-")
    shown.locator("#seconds").fill("0.2")
    shown.locator("#every").check()
    shown.locator("#list tr").nth(4).wait_for(timeout=20_000)
    shown.locator("#camera").click()
    assert not shown.locator("#video").is_visible()


def test_models_have_thresholds_of_their_own(opened):
    shown = opened({"a": BrightEngine(), "b": BrightEngine(threshold=10.0)})
    drop(shown, 50, "x.png")
    assert verdict(shown) == "Normal"
    shown.locator("#model").select_option("b")
    assert shown.locator("#threshold-words").inner_text() == "Threshold 10"
    drop(shown, 50, "y.png")
    assert verdict(shown) == "Anomalous"
    assert [cell.inner_text() for cell in shown.locator("#list tr td:nth-child(3)").all()] == ["b", "a"]
    assert shown.locator("th", has_text="Model").is_visible()


ANSWERS = {
    "busy.png": [{"status": 503, "headers": {"Retry-After": "0.2"}, "json": {"error": "too much to do"}}] * 2,
    "always.png": [{"status": 503, "headers": {"Retry-After": "0"}, "json": {"error": "too much to do"}}]
    * 99,
    "cut.png": [None] * 99,  # the connection fails
    "proxy.png": [{"status": 502, "body": "<html>Bad gateway</html>"}],
    "half.png": [{"status": 200, "body": '{"image": "half'}],
    "login.png": [{"status": 200, "json": {"login": "required"}}],
    "slow.png": [{"status": 408, "json": {"error": "the picture did not arrive"}}],
    "failed.png": [{"status": 500, "json": {"error": "something is wrong"}}],
}


def test_every_picture_gets_a_row_whatever_the_station_answers(opened):
    shown = opened()
    api.expect(shown.locator("#about")).to_contain_text("bright")
    answers, asked = {name: list(some) for name, some in ANSWERS.items()}, []

    def answer(route):
        name = parse_qs(urlsplit(route.request.url).query)["name"][0]
        asked.append((name, time.monotonic()))
        if not answers.get(name):
            return route.continue_()
        reply = answers[name].pop(0)
        return route.abort() if reply is None else route.fulfill(**reply)

    shown.route("**/score?*", answer)
    names = [*ANSWERS, "empty.png", "good.png"]
    shown.evaluate(DROP, [[name, [] if name == "empty.png" else list(picture(50))] for name in names])
    api.expect(shown.locator("#list tr")).to_have_count(len(names), timeout=20_000)
    api.expect(shown.locator("#progress")).to_contain_text("good.png: answered")
    rows = {
        cells[1]: (cells[0], cells[5])
        for cells in (
            [cell.inner_text() for cell in row.locator("td").all()] for row in shown.locator("#list tr").all()
        )
    }
    assert {name for name, (word, _) in rows.items() if word == "normal"} == {"busy.png", "good.png"}
    reasons = {name: reason for name, (word, reason) in rows.items() if word == "not inspected"}
    words = {
        "always.png": "too much to do",
        "cut.png": "connection",
        "proxy.png": "status 502",
        "half.png": "understood",
        "login.png": "understood",
        "slow.png": "did not arrive",
        "failed.png": "something is wrong",
    }
    assert rows["empty.png"][0] == "unreadable" and "0 bytes" in rows["empty.png"][1]
    assert reasons.keys() == words.keys() and all(word in reasons[name] for name, word in words.items())
    tries = [moment for name, moment in asked if name == "busy.png"]
    assert len(tries) == 3 and min(b - a for a, b in zip(tries, tries[1:])) >= 0.2
    assert sum(name == "always.png" for name, _ in asked) == 4
    counts = [line.inner_text() for line in shown.locator("#counts .pill").all()]
    assert "2 normal" in counts and "7 not inspected" in counts
    # The message is still there after later pictures, and goes with the list.
    drop(shown, 50, "later.png")
    api.expect(shown.locator("#missed")).to_contain_text(
        "7 of 11 pictures not inspected, the last one failed.png"
    )
    with shown.expect_download() as csv_file:
        shown.locator("#csv").click()
    rows = csv.DictReader(io.StringIO(csv_file.value.path().read_text()))
    assert [row["verdict"] for row in rows].count("not inspected") == 7
    shown.locator("#list button", has_text="cut.png").click()
    assert verdict(shown) == "Not inspected" and "connection" in shown.locator("#findings").inner_text()
    shown.locator("#clear").click()
    api.expect(shown.locator("#missed")).to_be_empty()
    shown.wrong.clear()  # browsers write every failure to the console


def test_pictures_wait_for_a_station_that_does_not_answer_yet(opened):
    shown = opened()
    shown.route("**/models", lambda route: route.abort())
    shown.reload()
    api.expect(shown.locator("#progress")).to_contain_text("does not answer")
    shown.evaluate(DROP, [["a.png", list(picture(50))]])
    shown.unroute("**/models")
    api.expect(shown.locator("#name")).to_have_text("a.png", timeout=10_000)
    shown.wrong.clear()


def test_a_token_is_asked_for_once(opened):
    shown = opened(token="secret")
    api.expect(shown.locator("#token-form")).to_be_visible()
    assert "Enter the station's token." in shown.locator("#status").inner_text()
    assert not shown.locator("footer a").first.is_visible()
    for wrong in ("secrets", "gehe\u00efm"):
        shown.locator("#token").fill(wrong)
        shown.keyboard.press("Enter")
        api.expect(shown.locator("#status")).to_contain_text("That token is wrong.")
    shown.locator("#token").fill("secret")
    shown.keyboard.press("Enter")
    api.expect(shown.locator("#token-form")).to_be_hidden()
    api.expect(shown.locator("#progress")).to_be_empty()
    drop(shown, 200, "bad.png")
    assert verdict(shown) == "Anomalous"
    for name, text in (("API", '"/score"'), ("metrics", "csad_verdicts_total")):
        shown.locator("footer a", has_text=name).click()
        api.expect(shown.locator("#text-content")).to_contain_text(text)
        shown.keyboard.press("Escape")
        api.expect(shown.locator("#text")).to_be_hidden()
    shown.evaluate("sessionStorage.setItem('token', 'old')")
    shown.evaluate(DROP, [["kept.png", list(picture(50))]])
    api.expect(shown.locator("#status")).to_contain_text("That token is wrong.")
    shown.locator("#token").fill("secret")
    shown.keyboard.press("Enter")
    api.expect(shown.locator("#name")).to_have_text("kept.png")
    assert [text for text in shown.wrong if "401" not in text] == []
    shown.wrong.clear()


@pytest.mark.parametrize("width", [390, 961, 1000, 1100, 1280])
def test_nothing_of_the_verdict_reaches_out_of_its_card(opened, width):
    shown = opened(width=width)
    drop(shown, 200, "a.png")
    outside = shown.evaluate("""() => {
        const card = document.querySelector(".verdict-card"), right = card.getBoundingClientRect().right;
        return [...card.querySelectorAll("p, span, input, svg, li")].filter(one => {
            const content = document.createRange();
            content.selectNodeContents(one);
            return Math.max(one.getBoundingClientRect().right, content.getBoundingClientRect().right) > right;
        }).map(one => one.outerHTML);
    }""")
    assert verdict(shown) == "Anomalous" and outside == []


@pytest.mark.parametrize("width, scheme", [(390, "light"), (390, "dark"), (1280, "dark")])
def test_it_fits_a_phone_follows_the_dark_and_works_by_keyboard(opened, width, scheme):
    shown = opened(width=width, scheme=scheme)
    drop(shown, 200, "a_name_that_is_much_longer_than_a_phone_is_wide_and_has_no_space_anywhere_in_it.png")
    assert shown.evaluate("document.documentElement.scrollWidth") == width
    paper = shown.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", paper)[:3])) < 150) == (scheme == "dark")
    reached = set()
    shown.locator("h1").click()
    for _ in range(20):
        shown.keyboard.press("Tab")
        reached.add(
            shown.evaluate(
                "document.activeElement.id || document.activeElement.getAttribute('aria-label') || ''"
            )
        )
    assert {"file", "camera", "threshold", "csv", "jsonl", "clear", "Enlarge the anomaly map"} <= reached
    shown.locator(".zoom").first.press("Enter")
    assert shown.locator("#large").is_visible()
    shown.keyboard.press("Escape")
    time.sleep(0.1)
    assert not shown.locator("#large").is_visible()
    unnamed = shown.evaluate("""[...document.querySelectorAll("button, select, input:not([hidden])")].filter(one =>
        !(one.labels?.length || one.getAttribute("aria-label") || one.textContent.trim())).map(one => one.outerHTML)""")
    assert unnamed == []
