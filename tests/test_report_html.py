"""The HTML report: self-contained, safe with foreign texts, the same bytes every time, and looked at in a browser."""

from __future__ import annotations

import base64
import copy
import html as entities
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from lconvert.errors import MissingPackageError, OptionError
from lconvert.validators import card, documents, page, plots, show, trackers
from lconvert.validators.html import html
from lconvert.validators.junit import junit
from tests.test_report_formats import FIXTURES, HOSTILE, SCHEMAS, variants

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_plots = pytest.mark.skipif(not plots.available(), reason="matplotlib is not installed")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
VOID = {"meta", "br", "hr", "img", "input", "link", "wbr", "path", "use"}

PASSED, FAILED = (json.loads((FIXTURES / f"report-{n}.json").read_text()) for n in ("pass", "fail"))
BENCH = json.loads((FIXTURES / "bench.json").read_text())


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    """One of each kind, made once."""
    return {
        "pass": html([PASSED], []),
        "fail": html([FAILED], [BENCH]),
        "several": html([PASSED, FAILED], [BENCH]),
        "bench": html([], [BENCH]),
    }


class Page(HTMLParser):
    """Elements, attributes and visible text; closing tags must match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("style", "title"):
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.elements if name == tag]


@needs_plots
@pytest.mark.parametrize("kind", ["pass", "fail", "several", "bench"])
def test_a_page_is_self_contained(pages: dict[str, str], kind: str) -> None:
    text, seen = pages[kind], Page(pages[kind])
    assert not {"script", "link", "iframe", "object", "img", "image", "base", "form"} & {
        e for e, _ in seen.elements
    }
    for tag, attrs in seen.elements:
        assert not {"src", "srcset", "data", "background", "action"} & attrs.keys(), tag
        assert not [a for a in attrs if a.startswith("on")], tag
        for name in ("href", "xlink:href"):
            assert (attrs.get(name) or "#").startswith("#"), attrs
    assert not re.search(r"@import|url\((?!#)|https?://|javascript:", text)
    assert "default-src 'none'" in text and len(text) < 1_000_000
    assert "<svg" in text and "data:" not in text, "nothing is rasterised"


@needs_plots
@pytest.mark.parametrize("kind", ["fail", "several"])
def test_ids_are_unique_and_resolve(pages: dict[str, str], kind: str) -> None:
    seen = Page(pages[kind])
    ids = Counter(attrs["id"] for _, attrs in seen.elements if "id" in attrs)
    assert ids and max(ids.values()) == 1
    used = set(re.findall(r'(?:url\(|href=")#([^)"]+)', pages[kind]))
    named = {i for _, a in seen.elements for i in (a.get("aria-labelledby") or "").split()}
    assert used and used | named <= set(ids)
    for attrs in seen.all("svg"):
        assert attrs["role"] == "img" and len((attrs["aria-labelledby"] or "").split()) == 2
    assert not seen.all("th") or all(a.get("scope") for a in seen.all("th"))


@needs_plots
def test_colours_come_from_the_page(pages: dict[str, str]) -> None:
    drawings = "".join(re.findall(r"<svg.*?</svg>", pages["several"], re.DOTALL))
    assert not re.findall(r"#[0-9a-f]{6}\b", drawings), "a colour that no theme can change"
    used = set(re.findall(r"var\(--([\w-]+)\)", drawings))
    assert {"ink", "muted", "s1", "s2"} <= used <= set(plots.COLOURS)
    for theme in themes():
        assert set(plots.COLOURS) <= set(theme)
    assert {k: v for k, v in themes()[0].items() if k in plots.COLOURS} == dict(plots.COLOURS)


@needs_plots
def test_the_same_figures_give_the_same_bytes(pages: dict[str, str]) -> None:
    assert html([FAILED], [BENCH]) == pages["fail"]


def test_the_verdict_comes_first_with_what_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "available", lambda: False)
    text = Page(html([FAILED], [])).text
    head = text[: text.index("What was compared")]
    assert "FAIL" in head and "4 of 24 gates failed" in head
    for name in ("blocks of the stock encoder", "Q4_K: worst block", "own error of every layer"):
        assert name in head
    good = Page(html([PASSED], [])).text
    assert "PASS" in good[:200] and "FAIL" not in good
    part = Page(html([{**PASSED, "exit_code": 3, "not_proven": ["vllm is not installed"]}], [])).text
    assert "INCOMPLETE" in part[:200] and "vllm is not installed" in part[: part.index("What was compared")]
    both = Page(html([PASSED, FAILED], [])).text
    assert "2 artifacts, 1 failed" in both[:300]
    nothing = Page(html([{**PASSED, "checks": [], "exit_code": 1, "passed": False}], [])).text
    assert "nothing was judged, so nothing is proven" in nothing


def test_the_figures_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "available", lambda: False)
    text = Page(html([FAILED], [BENCH])).text
    stats = next(x["stats"] for x in FAILED["details"]["logits"] if x["measure"] == "cost")
    assert (
        FAILED["details"]["artifact"]["sha256"] in text
        and FAILED["details"]["settings"]["text"]["sha256"] in text
    )
    assert f"{stats['kld']['mean']:.4f}" in text and f"{100 * stats['same_top1']:.2f} %" in text
    assert "The first layer out of line: 2. layers.2.attn.k" in text and "Tensors out of line" in text
    for heading in (
        "Next-token distributions",
        "Layer by layer",
        "Weights",
        "Tokens",
        "Worst tokens",
        "Speed",
        "Notes",
    ):
        assert heading in text


def test_without_matplotlib_there_are_tables_and_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [m for m in sys.modules if m.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    text = html([FAILED], [BENCH])
    assert "<svg" not in text and "<table" in text
    assert (
        "Plots are missing because matplotlib is not installed: pip install 'lconvert[report]'"
        in Page(text).text
    )
    with pytest.raises(
        MissingPackageError, match=r"matplotlib is not installed: pip install 'lconvert\[report\]'"
    ):
        plots.pareto([], [], Path("x.png"))


@needs_plots
def test_foreign_texts_do_not_act() -> None:
    report = copy.deepcopy(FAILED)
    hostile = HOSTILE + "</svg></style></title><script>alert(1)</script>\"'><b onclick=x>"

    def poison(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {k: poison(v, k) for k, v in value.items()}
        if isinstance(value, list):
            return [poison(v, key) for v in value]
        kept = {"measure", "schema", "created", "type"}
        return hostile if isinstance(value, str) and key not in kept else value

    poisoned = poison(report)
    poisoned["details"]["curve"] = [{"type": hostile, "bits_per_weight": 4.5, "kld_mean": 0.1}]
    documents.check(poisoned, "poisoned")
    bench = copy.deepcopy(BENCH)
    bench["results"] = poison(bench["results"])
    clean, dirty = Page(html([FAILED], [BENCH])), Page(html([poisoned], [bench]))
    allowed = {e for e, _ in clean.elements} | {"ul", "li"}
    assert {e for e, _ in dirty.elements} <= allowed and "alert(1)" in dirty.text
    assert not [a for _, a in dirty.elements if any(k.startswith("on") for k in a)]
    assert "\u202e" not in dirty.text and "\x1b" not in dirty.text


def test_whatever_the_schema_allows_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "available", lambda: False)
    done = 0
    for seed, data in enumerate((PASSED, FAILED)):
        for variant in variants(data, seed, 250, 1):
            if not any(documents.problems(variant, SCHEMAS["lconvert.report"])):
                Page(html([variant], [])), Page(html([variant, PASSED], [])), junit([variant])
                card.section(variant), trackers.metrics(variant), trackers.parameters(variant)
                done += 1
    for variant in variants(BENCH, 7, 200, 1):
        if not any(documents.problems(variant, SCHEMAS["lconvert.bench"])):
            Page(html([], [variant])), trackers.bench_metrics(variant)
            done += 1
    assert done > 100


@needs_plots
@pytest.mark.filterwarnings("error")
def test_plots_of_odd_figures() -> None:
    flat = {"log10_edges": [-2.0, -1.0, 0.0], "counts": [0, 0]}
    empty: dict[str, Any] = {"log10_edges": [], "counts": []}
    gap = plots.Series("a", [0, 1, 2], [None, 0.0, None])
    figures = [
        plots.distribution([("a", flat), ("b", empty)]),
        plots.survival([("a", flat), ("b", empty)]),
        plots.survival([]),
        plots.positions([gap]),
        plots.layers(["embed", "0"], [plots.Series("own", [0, 1], [0.0, 1e300])], [0, 1]),
        plots.quality([{"label": "x", "bits_per_weight": 4.0, "kld_mean": 0.0}], []),
        plots.quality([{"label": "x", "bits_per_weight": None, "kld_mean": None}], []),
        plots.bars([("a", {"median": None}), ("b", {"median": 1.0, "min": None, "max": 2.0})], "s"),
        plots.bars([], "s"),
        plots.reliability([("a", [{"low": 0, "high": 1, "confidence": None, "accuracy": None, "count": 0}])]),
        plots.lines([plots.Series("a", [1], [2.0])], "x", "y"),
    ]
    for n, figure in enumerate(figures):
        assert plots.svg(figure, f"k{n}", "t", "d").count("<svg") == 1


@needs_plots
def test_points_without_a_type_have_no_label() -> None:
    rows = [{"bits_per_weight": b, "kld_mean": 2.0**-b} for b in (3.0, 4.0, 5.0)]
    named = [{**r, "type": f"Q{r['bits_per_weight']:.0f}_K"} for r in rows]

    def labels(of: list[dict[str, Any]]) -> list[str]:
        return [t.get_text() for t in plots.frontiers([("measured", of)]).axes[0].texts]

    assert labels(named) == ["Q3_K", "Q4_K", "Q5_K"] and labels(rows) == []


@needs_plots
def test_plots_as_files(tmp_path: Path) -> None:
    rows = [{"label": "ours", "bits_per_weight": 4.5, "kld_mean": 0.01}]
    for name, begin in (("a.png", b"\x89PNG"), ("a.svg", b"<?xml")):
        plots.pareto(rows, PASSED["details"]["curve"], tmp_path / name)
        first = (tmp_path / name).read_bytes()
        plots.pareto(rows, PASSED["details"]["curve"], tmp_path / name)
        assert first.startswith(begin) and (tmp_path / name).read_bytes() == first
    svg = (tmp_path / "a.svg").read_text()
    assert all(row["type"] in svg for row in PASSED["details"]["curve"]) and "ours" in svg
    with pytest.raises(OptionError, match=r"a.pdf: plots are written as .png or .svg"):
        plots.pareto(rows, [], tmp_path / "a.pdf")


def test_labels_are_told_apart() -> None:
    assert show.distinct(["a", "b", "a"]) == ["a", "b", "a (2)"]
    assert show.shortened(["m-Q4_K_M.gguf", "m-Q4_K_S.gguf"]) == ["Q4_K_M", "Q4_K_S"]
    assert show.shortened(["x", "x"]) == ["x", "x"] and show.shortened(["only.gguf"]) == ["only.gguf"]


# --- colours --------------------------------------------------------------------------------------------------


def themes() -> list[dict[str, str]]:
    """The colours of the light and of the dark theme, out of the style sheet."""
    blocks = re.findall(r":root \{(.*?)\}", page.style(), re.DOTALL)
    light, dark = (dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", b)) for b in blocks)
    return [light, {**light, **dark}]


def contrast(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """WCAG 2 contrast ratio of two sRGB colours of 0..1."""

    def luminance(colour: tuple[float, ...]) -> float:
        r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def rgb(text: str) -> tuple[float, ...]:
    return tuple(int(text[i : i + 2], 16) / 255 for i in (1, 3, 5))


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_contrast(theme: int) -> None:
    c = {k: rgb(v) for k, v in themes()[theme].items()}
    for ground in ("paper", "panel", "pass-soft", "fail-soft", "part-soft"):
        for ink in ("ink", "muted"):
            assert contrast(c[ink], c[ground]) >= 4.5, (ink, ground)
    for word in ("pass", "fail", "part"):
        assert min(contrast(c[word], c[g]) for g in (f"{word}-soft", "paper", "panel")) >= 4.5, word
    assert contrast(c["mark-ink"], c["mark"]) >= 4.5
    for n in range(1, 7):
        assert contrast(c[f"s{n}"], c["paper"]) >= 4.5, f"s{n}"
    for share in (0.06, 0.25, 0.44):  # cells of heat maps
        mixed = tuple(share * a + (1 - share) * b for a, b in zip(c["s1"], c["panel"], strict=True))
        assert contrast(c["ink"], mixed) >= 4.5, share


# --- in a browser ---------------------------------------------------------------------------------------------


def browser(tmp_path: Path, page_path: Path, *options: str) -> str:
    """What headless Chromium prints; nothing leaves the machine."""
    assert CHROMIUM is not None
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
        "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={tmp_path / 'profile'}", *options, page_path.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


#: opens every fold of the page in the frame, then writes what it measured into the title
MEASURE = """
const frame = document.querySelector('iframe');
frame.addEventListener('load', () => {
  const d = frame.contentDocument, w = frame.contentWindow;
  d.querySelectorAll('details').forEach(x => x.open = true);
  const tooWide = [...d.querySelectorAll('svg, figure, p, h1, h2, h3, .verdict, .tiles, .scroll')]
    .filter(x => x.getBoundingClientRect().right > w.innerWidth + 1).map(x => x.outerHTML.slice(0, 80));
  const loaded = w.performance.getEntriesByType('resource').map(x => x.name);
  const small = [...d.querySelectorAll('svg')].filter(x => x.getBoundingClientRect().height < 40).length;
  document.title = JSON.stringify({
    scroll: d.documentElement.scrollWidth, inner: w.innerWidth, tooWide, loaded, small,
    svgs: d.querySelectorAll('svg').length, text: d.body.innerText.length, errors: window.failures,
  });
});
"""


@needs_plots
@needs_browser
@pytest.mark.parametrize("kind", ["fail", "several"])
def test_a_phone_shows_the_page_without_scrolling_sideways(
    kind: str, pages: dict[str, str], tmp_path: Path
) -> None:
    wrapper = tmp_path / "wrapper.html"
    frame = (
        f'<iframe style="width:360px;height:800px;border:0" srcdoc="{entities.escape(pages[kind])}"></iframe>'
    )
    script = f"window.failures = []; window.onerror = m => window.failures.push(m); {MEASURE}"
    wrapper.write_text(f"<!DOCTYPE html><title></title>{frame}<script>{script}</script>")
    dumped = browser(tmp_path, wrapper, "--window-size=800,900", "--virtual-time-budget=5000", "--dump-dom")
    found = json.loads(entities.unescape(re.findall(r"<title>(.*?)</title>", dumped, re.DOTALL)[0]))
    assert found["inner"] == 360 and found["scroll"] <= 360, found
    assert found["tooWide"] == [] and found["loaded"] == [] and found["errors"] == [] and found["small"] == 0
    assert found["svgs"] >= 7 and found["text"] > 5000


@needs_plots
@needs_browser
@pytest.mark.parametrize(("theme", "setting"), [(0, "1"), (1, "0")], ids=["light", "dark"])
def test_light_and_dark(theme: int, setting: str, pages: dict[str, str], tmp_path: Path) -> None:
    """The page's own background, taken from a picture of it; the corner of a page is empty."""
    image = pytest.importorskip("PIL.Image", reason="pillow is not installed")
    path, shot = tmp_path / "page.html", tmp_path / "shot.png"
    path.write_text(pages["fail"])
    options = (
        f"--blink-settings=preferredColorScheme={setting}",
        "--window-size=1200,900",
        f"--screenshot={shot}",
    )
    browser(tmp_path, path, *options)
    picture = image.open(shot).convert("RGB")
    colours = themes()[theme]
    assert picture.getpixel((2, 2)) == tuple(round(255 * c) for c in rgb(colours["paper"]))
    counts = picture.getcolors(1 << 24)
    found = {colour for _, colour in counts}
    assert tuple(round(255 * c) for c in rgb(colours["fail-soft"])) in found, "the banner of the verdict"
    assert len(found) > 50, base64.b64encode(shot.read_bytes()[:64])
