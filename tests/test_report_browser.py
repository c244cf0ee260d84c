"""A run's page and the page of several in a browser: what hovers, filters, opens and is read aloud.
Needs playwright and axe-core (the extra `dev`) and an installed Chromium; nothing is downloaded."""

import importlib.util
import json
import random
from pathlib import Path

import pytest
from PIL import Image

from editr2.benchmarks.runs import compare_runs
from editr2.report import build_report

EVIL = '<img src=x onerror="document.title=1"><script>document.title=2</script>'
AXE = "axe_playwright_python"

pytestmark = pytest.mark.exhaustive


def axe_core():
    found = importlib.util.find_spec(AXE)
    if found is None:
        pytest.skip("needs axe-playwright-python: editr2[dev]")
    return next(Path(found.origin).parent.rglob("axe.min.js")).read_text("utf-8")


def write_evaluation(folder, iteration, gain, sessions=5):
    """As `rl.kept` writes it; of session 0 every text is of someone who means harm."""
    (folder / "evaluations").mkdir(exist_ok=True)
    sheet = Image.new("RGB", (24 * 7, 24 * sessions), (200, 40, 40))
    sheet.save(folder / "evaluations" / f"{iteration:06d}.png")
    lines = []
    for n in range(sessions):
        text = EVIL if n == 0 else f"paint it {n}"
        turn = {
            "instruction": text,
            "task": "paint" if n % 2 else "add",
            "reward": 0.5 + gain * (n - 2),
            "scores": {"IF": 0.5 + gain * (n - 2), "CC": 0.75},
            "why": {"IF": f"it is {text}"},
        }
        failed = {"instruction": "again", "scores": {"IF": None, "CC": None}, "reason": text}
        place = {"top": 24 * n, "cell": [24, 24], "outputs": 3, "expected": 3}
        turns = [turn, failed if n == 3 else turn, turn]
        about = {"id": f"session-{n}", "mode": "cm" if n % 2 else "cu", "success": float(n > 2)}
        lines.append(json.dumps(about | {"turns": turns, "sheet": place}) + "\n")
    (folder / "evaluations" / f"{iteration:06d}.jsonl").write_text("".join(lines))


def write_run(folder, report, gain):
    rng = random.Random(0)
    weights = {"IF": 0.5, "CC": 0.5}
    depends = {"heldout": f"5 sessions {'abc' if gain else 'abd'}"}
    per_session = {"reward": [0.5] * 5, "success": [1] * 5, "if": [[0.5] * 3] * 5}
    rows = [{"event": "start", "rewards": weights, "identity": {"depends": depends}}]
    for iteration, name in ((0, "before"), (10, "during"), (20, "after")):
        row = report.eval_row(name, iteration, 0.5 + gain * iteration)
        rows.append(row | {"per_session": per_session})
        rows += [report.train_row(rng, iteration + i) for i in range(10) if iteration < 20]
    report.write_metrics(folder, rows)
    for k, iteration in enumerate((0, 10, 20)):
        write_evaluation(folder, iteration, gain * 10 * k)
    (folder / "config.yaml").write_text(f"seed: {gain}\n")
    for name in ("before", "after"):
        report.write_strips(folder, name, [0.0, 0.3, -0.2])


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    spec = importlib.util.spec_from_file_location(
        "of_report", Path(__file__).parent / "test_report.py"
    )
    report = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(report)
    root = tmp_path_factory.mktemp("pages")
    for name, gain in (("one", 0.004), ("two", 0.0)):
        write_run(root / name, report, gain)
    said = compare_runs([root / "one", root / "two"], root / "compared")
    assert said[0] == (
        "Evaluated sessions differ: 5 of one and 5 of two; the 5 that both have are compared."
    )
    return {"report": build_report(root / "one"), "compare": root / "compared" / "compare.html"}


def opened(browser, path, width, scheme):
    context = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme=scheme, bypass_csp=False
    )
    page = context.new_page()
    said = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: said.append(request.url))
    page.goto(path.as_uri())
    page.wait_for_selector("figure.drawn canvas")
    return page, [line for line in said if not line.startswith(("file:", "data:"))]


@pytest.mark.parametrize("name", ["report", "compare"])
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (400, "dark")])
def test_nothing_is_fetched_nothing_runs_off_and_all_can_be_read_aloud(
    browser, pages, name, width, scheme
):
    page, said = opened(browser, pages[name], width, scheme)
    assert said == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.title() not in ("1", "2")
    for details in page.query_selector_all("details.data > summary")[:2]:
        details.click()
    for button in page.query_selector_all("button.open")[:2]:
        button.click()
    page.evaluate(axe_core())
    found = page.evaluate("axe.run(document, {runOnly: ['wcag2a', 'wcag2aa', 'best-practice']})")
    told = [
        f"{one['id']}: {one['help']}: {one['nodes'][0]['html'][:200]}"
        for one in found["violations"]
    ]
    assert told == [] and len(found["passes"]) > 20


def test_a_chart_tells_its_values_where_the_pointer_is(browser, pages):
    page, _ = opened(browser, pages["report"], 1280, "light")
    figure = page.locator("figure.drawn", has_text="Reward by turn, evaluated")
    assert figure.locator("output").all_inner_texts() == ["0.58", "0.48", "0.38"]
    over = figure.locator(".u-over")
    over.scroll_into_view_if_needed()
    over.hover(position={"x": 2, "y": 20})
    assert figure.locator(".at").inner_text() == "iteration 0"
    assert figure.locator("output").first.inner_text() == "0.5 [0.48, 0.52]"
    # The others of that axis follow.
    trained = page.locator("figure.drawn", has_text="Session success").nth(1)
    over.hover()
    assert figure.locator(".at").inner_text() == "iteration 10"
    assert trained.locator(".at").inner_text() in ("iteration 10", "iteration 11")
    figure.locator("summary").click()
    cells = figure.locator("details tr").nth(2).locator("th, td").all_inner_texts()
    assert cells == ["10", "0.54 [0.52, 0.56]", "0.44 [0.42, 0.46]", "0.34 [0.32, 0.36]"]


def test_sessions_are_filtered_sorted_and_opened(browser, pages):
    page, _ = opened(browser, pages["report"], 1280, "light")
    rows = page.locator("table.sessions tbody tr:visible")

    def ids():
        return [text[-1] for text in rows.locator("button.open").all_inner_texts()]

    page.click("th:has-text('change') button")
    assert ids() == list("01234")
    page.click("th:has-text('change') button")
    assert ids() == list("43210")
    page.select_option("select[name=task]", "paint")
    assert ids() == list("31") and page.inner_text("#sessions-count") == "2 of 5 sessions"
    page.check("input[name=problem]")
    assert ids() == ["3"]
    page.click("form button[type=reset]")
    page.fill("input[name=text]", "onerror")
    assert ids() == ["0"]
    rows.locator("button.open").press("Enter")
    film = page.locator(".film")
    assert film.locator("img").count() == 1 + 3 + 3 + 3
    assert f"IF: it is {EVIL}" in film.inner_text()
    assert page.title() not in ("1", "2")


def test_images_are_shown_in_large_by_the_keyboard(browser, pages):
    page, _ = opened(browser, pages["report"], 1280, "light")
    first = page.locator("article.session .strip").first.locator("button.picture").first
    first.focus()
    page.keyboard.press("Enter")
    large = page.locator("dialog.zoom img")
    source = large.get_attribute("alt")
    assert large.bounding_box()["width"] >= 480
    page.keyboard.press("ArrowRight")
    assert large.get_attribute("alt") != source
    page.keyboard.press("ArrowLeft")
    assert large.get_attribute("alt") == source
    page.keyboard.press("Escape")
    assert not page.locator("dialog.zoom").is_visible()
    assert first.evaluate("button => button === document.activeElement")


def test_paper_is_light(browser, pages):
    page, _ = opened(browser, pages["report"], 1280, "dark")
    colour = "getComputedStyle(document.documentElement).getPropertyValue('--ink')"
    assert page.evaluate(colour) == "#e9e9e6"
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate(colour) == "#1b1d20"
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.evaluate(colour) == "#e9e9e6"
