"""The report of results in a real browser.

The browser is Debian's Chromium (`make browser`), driven by Playwright. Where one of them is
missing, these tests are skipped with a warning; with the environment variable CI set they fail.
"""

from __future__ import annotations

import copy
import os
import re
import shutil
import warnings
from pathlib import Path

import pytest

from bench.pages import figures, report, speeds
from bench.results import Run
from tests.bench.synthetic_results import CPU, GPU, run, speeds_of

pytestmark = pytest.mark.slow

HOSTILE = "</script><script>window.hacked = 1</script> \"double\" 'single' & <b onclick=x()>"


def unavailable(reason: str):
    """Skips the test with a warning that names the reason; fails it in CI."""
    if os.environ.get("CI"):
        pytest.fail(reason)
    warnings.warn(f"browser tests are skipped: {reason}", stacklevel=2)
    pytest.skip(reason)


@pytest.fixture(scope="module")
def chromium():
    try:
        from playwright.sync_api import sync_playwright
    except ImportError as error:
        unavailable(str(error))
    path = shutil.which("chromium")
    if path is None:
        unavailable("no chromium on the path: `make browser` installs it where it can")
    with sync_playwright() as playwright:
        # Chromium does not start in its sandbox as root.
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


def hostile(found: list[dict]) -> None:
    """Puts HOSTILE where a record has text; one check of each kind fails."""
    found[0]["command"] = HOSTILE
    check = next(r for r in found if r["kind"] == "check")
    check.update(ok=False, error=0.5, note=HOSTILE)
    speed = speeds_of(found, "fp8_gemm_nt")[1]
    speed.update(ok=False, error=0.1, samples=[], least=None, median=None, note="diff 0.1 > 2e-05")
    for r in speeds_of(found, "cast_per_token"):
        if r["provider"] == "compile":
            r.update(provider=f"compile {HOSTILE}", about=HOSTILE)
    next(r for r in found if r["kind"] == "model").update(value=HOSTILE)
    found.append({**copy.deepcopy(speeds_of(found, "route_topk")[0]), "op": HOSTILE})


@pytest.fixture(scope="module")
def runs() -> list[Run]:
    return [run(CPU, 1), run(GPU, 1), run(CPU, 2), run(GPU, 2, change=hostile)]


@pytest.fixture(scope="module")
def file(runs, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("page") / "report.html"
    out.write_text(report.page(runs, ["old.jsonl"]), encoding="utf-8")
    return out


@pytest.fixture
def open_page(chromium, file):
    """Opens the page; fails if it logs an error or requests anything else."""
    pages, errors, requests = [], [], []

    def open_page(width: int = 1400, **options):
        page = chromium.new_page(viewport={"width": width, "height": 900}, **options)
        page.on("console", lambda message: errors.append(message.text))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(file.as_uri())
        pages.append(page)
        return page

    yield open_page
    for page in pages:
        page.close()
    assert errors == []
    assert set(requests) == {file.as_uri()}


def visible_rows(table) -> list[str]:
    return table.locator("tbody tr:not([hidden])").all_inner_texts()


def column(table, name: str) -> list[str]:
    """The texts of a column in the order of the page."""
    names = [text.strip() for text in table.locator("th").all_inner_texts()]
    cells = table.locator(f"tbody td:nth-child({names.index(name) + 1})")
    return [text.strip() for text in cells.all_inner_texts()]


def value(text: str) -> float:
    return float(re.sub(r"[,x%]", "", text))


@pytest.mark.parametrize("name", ["least µs", "of the roof", "x eager"])
def test_numbers_sort_as_numbers(open_page, name):
    table = open_page().locator("#speed-d0")
    head = table.locator("th", has_text=name)
    before = column(table, name)
    known = [value(text) for text in before if text]
    head.locator("button").click()
    after = column(table, name)
    assert head.get_attribute("aria-sort") == "descending"
    assert [value(text) for text in after if text] == sorted(known, reverse=True)
    assert after[len(known) :] == [""] * before.count(""), "no value: last"
    head.locator("button").press("Enter")
    after = column(table, name)
    assert head.get_attribute("aria-sort") == "ascending"
    assert [value(text) for text in after if text] == sorted(known)
    assert after[len(known) :] == [""] * before.count("")


def test_words_sort_as_words_and_their_numbers_as_numbers(open_page):
    table = open_page().locator("#inspection .table")
    for name in ("op", "target"):
        table.locator("th", has_text=re.compile(f"^{name}$")).locator("button").click()
    targets = column(table, "target")
    assert list(dict.fromkeys(targets)) == [
        "gfx942", "gfx950", "sm_80", "sm_89", "sm_90", "sm_100", "sm_120",
    ]  # fmt: skip
    ops = column(table, "op")
    first = [op for op, target in zip(ops, targets, strict=True) if target == "gfx942"]
    assert first == sorted(first), "equal values keep their order"


def test_filters_hide_rows(open_page, runs):
    table = open_page().locator("#speed-d0")
    count = len(runs[-1].of("speed"))
    assert len(visible_rows(table)) == count
    table.locator("input").fill("fp8_gemm 24576")
    rows = visible_rows(table)
    assert 0 < len(rows) < count
    assert all("fp8_gemm_nt" in row and "24576" in row for row in rows)
    assert table.locator("output").inner_text() == f"{len(rows)} of {count} rows"
    assert not table.locator("tbody tr[hidden]").first.is_visible()
    table.locator("select[data-filter=provider]").select_option("deepkern triton")
    rows = visible_rows(table)
    assert len(rows) == 5 and all("deepkern triton" in row for row in rows)
    table.locator("input").fill("")
    table.locator("select[data-filter=family]").select_option("experts")
    assert {row.split()[0] for row in visible_rows(table)} == {"route_topk", "route_topk_backward"}


def test_an_op_of_a_figure_filters_the_speeds(open_page):
    page = open_page()
    page.locator("#summary a.op", has_text=re.compile("^mla_decode$")).first.click()
    rows = visible_rows(page.locator("#speed-d0"))
    assert rows and all("mla_decode" in row for row in rows)


def test_every_point_has_its_tooltip(open_page, runs):
    page = open_page()
    tips = page.evaluate("""() => [...document.querySelectorAll(".mark")].map((mark) => {
        mark.focus();
        const tip = document.getElementById("tip");
        return [mark.dataset.provider, mark.dataset.tip, tip.hidden ? "" : tip.textContent];
    })""")
    assert all(shown == tip and provider in tip for provider, tip, shown in tips)
    shown = {tip for _, tip, _ in tips}
    for part in report.parts(runs):
        for row in part.rows:
            for r in row.records:
                head = "\n".join([row.op, speeds.short(row.size), r["provider"]]) + "\n"
                drawn = [tip for tip in shown if tip.startswith(head)]
                assert bool(drawn) == bool(row.time(r)), head
                if drawn:
                    time = figures.number(row.time(r))
                    assert any(f"{time} µs" in tip for tip in drawn)


def test_the_tooltip_follows_pointer_and_keys(open_page):
    page = open_page()
    marks = page.locator("#roofline .plane").first.locator(".mark")
    marks.first.scroll_into_view_if_needed()
    tip = page.locator("#tip")
    box = marks.first.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    assert tip.is_visible() and "TFLOPS" in tip.inner_text()
    page.mouse.move(2, 2)
    assert not tip.is_visible()
    first, second = (marks.nth(i).get_attribute("data-tip") for i in (0, 1))
    marks.first.focus()
    assert tip.text_content() == first
    page.keyboard.press("ArrowRight")
    assert tip.text_content() == second
    page.keyboard.press("Escape")
    assert not tip.is_visible()


def test_legends_and_devices_hide_their_marks(open_page):
    page = open_page()
    marks = page.locator("#summary [data-device=d0] .mark[data-provider='deepkern triton']")
    assert marks.first.is_visible()
    page.locator("#roofline [data-device=d0] .legend button", has_text="deepkern triton").click()
    assert {style for style in marks.evaluate_all("all => all.map((e) => e.style.display)")} == {
        "none"
    }
    assert not marks.first.is_visible()
    page.locator("#summary [data-device=d0] .legend button", has_text="deepkern triton").click()
    assert marks.first.is_visible()
    page.locator("nav button", has_text="H200").click()
    assert not page.locator("#speed-d0").is_visible() and page.locator("#speed-d1").is_visible()


def test_failures_are_red_and_hostile_text_is_text(open_page, runs):
    page = open_page()
    assert page.evaluate("window.hacked") is None
    assert page.locator("script").count() == 1 and page.locator("b[onclick]").count() == 0
    red = page.evaluate(
        "() => getComputedStyle(document.documentElement).getPropertyValue('--wrong')"
    )
    assert red == "#b91c1c"
    color = "e => getComputedStyle(e).color"
    failure = page.locator("#correctness .failures li", has_text=HOSTILE)
    assert failure.is_visible() and failure.evaluate(color) == "rgb(185, 28, 28)"
    cell = page.locator("#correctness td.note.wrong", has_text=HOSTILE)
    assert cell.is_visible() and cell.evaluate(color) == "rgb(185, 28, 28)"
    assert page.locator("#speed-d0 td.wrong", has_text="diff 0.1 > 2e-05").is_visible()
    assert page.locator("#verdict").evaluate(color) == "rgb(185, 28, 28)"
    assert page.locator("#verdict").inner_text().split(".")[0].endswith(" 2 disagree")
    assert page.locator("#model pre", has_text=HOSTILE).inner_text() == HOSTILE
    assert page.locator("#speed-d0 td.op", has_text=HOSTILE).is_visible()
    assert page.locator("#summary .legend button", has_text=HOSTILE).count() == 0
    legend = page.locator("#roofline .legend button", has_text=HOSTILE)
    mark = page.locator("#roofline .strip .mark").and_(
        page.locator(f"[data-provider={css_string(f'compile {HOSTILE}')}]")
    )
    assert mark.first.is_visible()
    legend.click()
    assert not mark.first.is_visible()


def css_string(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def luminance(color: str) -> float:
    """Relative luminance of 'rgb(r, g, b)' (WCAG 2)."""
    shares = [int(part) / 255 for part in re.findall(r"\d+", color)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in shares]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_dark_and_light_differ_and_are_readable(open_page):
    colors = {}
    for scheme in ("light", "dark"):
        page = open_page(color_scheme=scheme)
        background = page.locator("body").evaluate("e => getComputedStyle(e).backgroundColor")
        for selector in ("body", "nav a", "td.note", "td.slow", "#verdict"):
            color = page.locator(selector).first.evaluate("e => getComputedStyle(e).color")
            dark, light = sorted((luminance(background), luminance(color)))
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (scheme, selector)
        mark = page.locator(".mark").first.evaluate("e => getComputedStyle(e).color")
        colors[scheme] = (background, mark)
    assert luminance(colors["light"][0]) > 0.9 > 0.1 > luminance(colors["dark"][0])
    assert colors["light"][1] != colors["dark"][1]


OVERLAPS = """() => {
  const text = (e) => (e.textContent || e.tagName).trim().slice(0, 60);
  const groups = [
    [...document.querySelectorAll("nav a, nav button")],
    ...[...document.querySelectorAll("main, section")].map((e) => [...e.children]),
    ...[...document.querySelectorAll(".legend, .tools, .bar, figure")].map((e) => [...e.children]),
    ...[...document.querySelectorAll("thead tr")].map((e) => [...e.querySelectorAll("button")]),
    ...[...document.querySelectorAll("svg")].map((e) => [...e.querySelectorAll("text")]),
  ];
  const found = [];
  for (const group of groups) {
    const boxes = group.map((e) => [e, e.getBoundingClientRect()])
      .filter(([, box]) => box.width && box.height);
    for (let i = 0; i < boxes.length; i++) for (let j = 0; j < i; j++) {
      const [a, b] = [boxes[i][1], boxes[j][1]];
      const width = Math.min(a.right, b.right) - Math.max(a.left, b.left);
      const height = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
      if (width > 1 && height > 1) found.push([text(boxes[i][0]), text(boxes[j][0])]);
    }
  }
  return found;
}"""


@pytest.mark.parametrize("width", [320, 380, 768, 1024, 1400, 2200])
def test_nothing_overlaps_or_scrolls_sideways(open_page, width):
    page = open_page(width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    outside = page.evaluate("""() => [...document.querySelectorAll("svg text, .mark, figcaption")]
        .filter((e) => !e.closest(".scroll"))
        .filter((e) => { const box = e.getBoundingClientRect();
                         return box.width && (box.right > innerWidth || box.left < 0); })
        .map((e) => e.textContent)""")
    assert outside == []
    assert page.evaluate(OVERLAPS) == []


CUT = """() => {
  const found = [];
  for (const box of document.querySelectorAll(".scroll")) {
    const { overflowX } = getComputedStyle(box);
    if (box.scrollWidth > box.clientWidth && overflowX !== "auto") found.push(overflowX);
    const right = box.parentElement.getBoundingClientRect().right;
    if (box.getBoundingClientRect().right > right + 1) found.push("a box wider than its place");
    for (const cell of box.querySelectorAll("th, td")) {
      if (cell.scrollWidth > cell.clientWidth + 1) found.push(cell.textContent.trim());
    }
    box.scrollLeft = 1e6;
    const last = box.querySelector("tr").lastElementChild.getBoundingClientRect();
    if (last.right > box.getBoundingClientRect().right + 1) found.push("the last column");
  }
  return found;
}"""


@pytest.mark.parametrize("width", [380, 1024, 1280])
def test_wide_tables_scroll_in_their_box(open_page, width):
    """No cell is cut, and the last column of each table can be scrolled to."""
    page = open_page(width)
    wide = page.evaluate("""() => [...document.querySelectorAll(".scroll")]
        .filter((e) => e.scrollWidth > e.clientWidth).length""")
    assert wide, "the page has a table that is too wide"
    assert page.evaluate(CUT) == []


def test_a_result_of_one_op_starts_with_its_rows(chromium, tmp_path):
    """Predictions and inspection are of that op, and come later."""
    found = run(CPU, ops=["cast_per_token"])
    out = tmp_path / "report.html"
    out.write_text(report.page([found], ops=report.ops_of([found])), encoding="utf-8")
    page = chromium.new_page(viewport={"width": 1280, "height": 900})
    page.goto(out.as_uri())
    tables = page.locator("main .table")
    assert tables.first.get_attribute("id") == "speed-d0"
    assert tables.first.bounding_box()["y"] < 900, "on the first screen"
    for i in range(tables.count()):
        names = [text.strip() for text in tables.nth(i).locator("th").all_inner_texts()]
        if "op" in names:
            assert set(column(tables.nth(i), "op")) <= {"cast_per_token"}
    assert column(page.locator("#predictions"), "op") and column(page.locator("#bounds"), "op")
    page.close()


def test_print(open_page):
    page = open_page()
    page.emulate_media(media="print")
    assert not page.locator("nav").is_visible()
    assert not page.locator(".tools").first.is_visible()
    cut = page.evaluate("""() => [...document.querySelectorAll(".scroll")]
        .filter((e) => e.scrollHeight > e.clientHeight + 1).length""")
    assert cut == 0, "tables are printed whole"
    pdf = page.pdf(format="A4")
    assert pdf.startswith(b"%PDF") and len(pdf) < 5e6, "bars are no gradients"


def test_without_scripts(open_page):
    page = open_page(java_script_enabled=False)
    mark = page.locator("#summary .mark").first
    assert "µs" in mark.locator("title").text_content()
    assert page.locator("#speed-d0 tbody tr").last.is_visible()
