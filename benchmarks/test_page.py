"""docs/index.html in a real browser, Debian's Chromium without a window:

apt-get install chromium
pip install -r benchmarks/requirements-page.txt
python -m pytest -o addopts= benchmarks/test_page.py
"""

import csv
import os
import re
import shutil
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/index.html").as_uri()
ALPHAS = ["0", "0.1", "0.3", "1", "3", "10"]
CONTROLS = {  # of each demonstration, in order: input type, and whether each panel's marks change
    1: [("radio", [True])],
    2: [("range", [True, True]), ("radio", [True, False]), ("radio", [True, False])],
    3: [
        ("range", [True, True, True, True]),
        ("radio", [True, True, True, True]),
        ("radio", [True, False, False, False]),
        ("checkbox", [True, False, False, False]),
    ],
    4: [("range", [True, True]), ("radio", [True, True])],
    5: [("range", [True, True]), ("range", [True, True])],
}


def rows(name):
    with (ROOT / f"benchmarks/data/{name}.csv").open() as file:
        return list(csv.DictReader(file))


@contextmanager
def chromium():
    path = shutil.which("chromium")
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=path, args=sandbox)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


def open_page(browser, **settings):
    """The drawn page, with a list of what went wrong and one of what it asked for."""
    page = browser.new_context(offline=True, **settings).new_page()
    page.problems, page.requests = [], []
    page.on("console", lambda message: page.problems.append(message.text))
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on("request", lambda request: page.requests.append(request.url))
    page.goto(PAGE)
    page.wait_for_selector("html[data-ready=yes]")
    return page


@pytest.fixture
def page(browser):
    page = open_page(browser)
    yield page
    assert page.problems == []
    page.context.close()


def controls(page, demo):
    """Groups of inputs: a slider, a checkbox, or the buttons of one choice."""
    groups = defaultdict(list)
    for control in page.locator(f"#demo{demo} input").all():
        groups[control.get_attribute("name")].append(control)
    return list(groups.values())


def panels(page, demo):
    """The marks of each panel, as text."""
    found = page.locator(f"#demo{demo} g[class*=concat_][class*=_group]:not([class*=pathgroup])")
    return found.evaluate_all("groups => groups.map(group => group.innerHTML)")


def settle(page):
    page.evaluate("Promise.all(views.map(view => view.runAsync())).then(() => null)")


def move(page, control, value):
    """A slider, by keyboard, to a value."""
    step = float(control.get_attribute("step"))
    times = round((value - float(control.input_value())) / step)
    for _ in range(abs(times)):
        control.press("ArrowRight" if times > 0 else "ArrowLeft")
    assert float(control.input_value()) == pytest.approx(value)
    settle(page)


def words(page, demo):
    return [
        text.replace("\N{MINUS SIGN}", "-")
        for text in page.locator(f"#demo{demo} svg g.mark-text.role-mark text").all_text_contents()
    ]


def points(page, demo):
    """The numbers of the drawn points, from what a screen reader is told of them."""
    found = page.locator(f"#demo{demo} [aria-roledescription=point]").all()
    return [point.get_attribute("aria-label").replace("\N{MINUS SIGN}", "-") for point in found]


def test_opens_without_errors_or_network(page):
    assert page.requests == [PAGE]
    assert page.locator("section").count() == 5
    assert page.locator("section svg").count() == 5


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1920])
def test_fits_and_follows_the_theme(browser, width, theme):
    page = open_page(browser, viewport={"width": width, "height": 800}, color_scheme=theme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    ink, paper = ("#222222", "rgb(255, 255, 255)") if theme == "light" else ("#dddddd", "rgb(21")
    assert page.locator("#demo2 .role-title-text text").first.get_attribute("fill") == ink
    assert page.evaluate("getComputedStyle(document.body).backgroundColor").startswith(paper)
    for demo in CONTROLS:
        edge = page.locator(f"#demo{demo} svg").bounding_box()
        assert edge["x"] >= 0 and edge["x"] + edge["width"] <= width
    assert page.problems == []
    page.context.close()


@pytest.mark.parametrize(
    ("demo", "number"), [(demo, i) for demo, many in CONTROLS.items() for i in range(len(many))]
)
def test_a_control_changes_the_marks_that_it_should(page, demo, number):
    kind, changes = CONTROLS[demo][number]
    groups = controls(page, demo)
    assert len(groups) == len(CONTROLS[demo])
    group = groups[number]
    assert group[0].get_attribute("type") == kind
    before = panels(page, demo)
    assert len(before) == len(changes)
    if kind == "radio":
        chosen = next(i for i, button in enumerate(group) if button.is_checked())
        group[chosen].press("ArrowDown")
        assert group[(chosen + 1) % len(group)].is_checked()
    elif kind == "checkbox":
        group[0].press("Space")
    else:
        at_end = group[0].input_value() == group[0].get_attribute("max")
        group[0].press("ArrowLeft" if at_end else "ArrowRight")
    settle(page)
    after = panels(page, demo)
    assert [a != b for a, b in zip(before, after, strict=True)] == changes
    for other in CONTROLS:  # one choice does not undo another
        for buttons in controls(page, other):
            if buttons[0].get_attribute("type") == "radio":
                assert sum(button.is_checked() for button in buttons) == 1


@pytest.mark.parametrize("dataset", ["random", "medium", "expert"])
def test_online_shows_the_csv(page, dataset):
    page.locator(f"#demo1 input[value={dataset}]").check()
    settle(page)
    expected = defaultdict(list)
    for row in rows("online"):
        if row["step"] == "8000" and row["dataset"] in (dataset, "none"):
            expected[row["learner"]].append(float(row["return_mean"]))
    expected = sorted(sum(x) / len(x) for x in expected.values())
    shown = [point for point in points(page, 1) if "gradient updates: 8000;" in point]
    shown = sorted(float(re.search(r"return.*?: ([\d.]+)", point)[1]) for point in shown)
    assert shown == pytest.approx(expected, abs=0.01) and len(shown) == 3


@pytest.mark.parametrize("update", [500, 1500, 2500])
def test_shift_shows_the_csv(page, update):
    move(page, controls(page, 2)[0][0], update)
    expected = {row["q_policy"] for row in rows("shift") if int(row["update"]) == update}
    assert sorted(map(float, words(page, 2))) == sorted(round(float(x)) for x in expected)


@pytest.mark.parametrize("alpha", ["0", "1", "10"])
@pytest.mark.parametrize("data", ["pendulum/0.05-v0", "pendulum/mixed-v0"])
def test_conservatism_shows_the_csv(page, data, alpha):
    move(page, controls(page, 3)[0][0], ALPHAS.index(alpha))
    page.locator(f"#demo3 input[value='{data}']").check()
    settle(page)
    row = next(x for x in rows("conservatism") if (x["data"], x["alpha"]) == (data, alpha))
    expected = [float(row[x]) for x in ("q_policy", "true_value", "gap", "return_mean")]
    shown = [float(word.replace(",", "")) for word in words(page, 3)]
    assert shown == pytest.approx(expected, rel=0.005)  # three digits
    title = page.locator("#demo3 .role-title-text text").first.text_content()
    assert title.startswith(f"alpha = {alpha};")


@pytest.mark.parametrize("noise", [0.0, 0.7, 1.0])
def test_quality_shows_the_csv(page, noise):
    move(page, controls(page, 4)[0][0], noise)
    expected = defaultdict(list)
    last = max(int(row["update"]) for row in rows("quality"))
    for row in rows("quality"):
        if (float(row["noise"]), int(row["update"])) == (noise, last):
            expected[row["method"]].append(float(row["return_mean"]))
    shown = {}
    for point in points(page, 4):
        if found := re.search(r"noise.*?: ([\d.]+); return_mean: ([\d.]+); method: (.+)", point):
            assert float(found[1]) == noise
            shown[found[3]] = float(found[2])
    assert shown == pytest.approx({m: sum(x) / len(x) for m, x in expected.items()}, abs=0.01)


@pytest.mark.parametrize(("n", "policy"), [("10", 0), ("100", 2), ("1000", 4)])
def test_ope_shows_the_csv(page, n, policy):
    few, far = (group[0] for group in controls(page, 5))
    move(page, few, ["10", "30", "100", "300", "1000"].index(n))
    move(page, far, policy)
    distance = sorted({float(row["distance"]) for row in rows("ope")})[policy]
    here = [row for row in rows("ope") if row["n"] == n and float(row["distance"]) == distance]
    text = " ".join(words(page, 5))
    first = f"effective sample size {float(here[0]['ess']):.1f}"
    assert text.startswith(f"{first}, truth {float(here[0]['truth']):.2f}")
    assert here[0]["verdict"].replace(" ", "") in text.replace(" ", "")
    shown = [re.search(r": ([-\d.]+); estimator: (\w+)", point) for point in points(page, 5)]
    expected = {row["estimator"]: float(row["estimate"]) for row in here}
    assert {found[2]: float(found[1]) for found in shown} == pytest.approx(expected)


if __name__ == "__main__":
    with chromium() as browser:
        page = open_page(browser, viewport={"width": 1000, "height": 800}, color_scheme="light")
        page.locator("#demo2").screenshot(path=ROOT / "docs/page.png")
