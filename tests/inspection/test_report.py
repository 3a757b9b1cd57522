"""The page and its pictures, as a browser shows them."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("matplotlib")

import makers
from browser import CHROMIUM, Browser, browser
from conftest import Ended
from swa_avg.inspection import drawings
from swa_avg.inspection.geometry import Geometry, Measurement, geometry_of
from swa_avg.pages import html, pictures

Cli = Callable[..., Ended]
HOSTILE = "<img src=x onerror=alert(1)>'\"&$x^{"
HOSTILE_METRIC = "_$" + HOSTILE + "--\\frac{\x1b"
CHROME = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")

# Every picture, by what it takes up and which of its two versions is shown, and what is wider than the page.
LOOK = """(() => ({
  pictures: [...document.images].map(image => ({
    loaded: image.complete && image.naturalWidth > 0 && image.naturalHeight > 0,
    width: image.getBoundingClientRect().width,
    height: image.getBoundingClientRect().height,
    right: image.getBoundingClientRect().right,
    dark: image.currentSrc === image.parentElement.querySelector('source').srcset,
  })),
  overflow: document.documentElement.scrollWidth - window.innerWidth,
  wide: [...document.querySelectorAll('h1, h2, p, li, dl, .scroll, figure')]
    .filter(element => element.getBoundingClientRect().right > window.innerWidth + 0.5).length,
  tables: document.querySelectorAll('table').length,
  paper: getComputedStyle(document.body).backgroundColor,
  ink: getComputedStyle(document.body).color,
  scripts: document.scripts.length,
  text: document.body.innerText,
}))()"""


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


def _look(driver: Browser, page: Path, width: int, scheme: str) -> dict[str, Any]:
    """Open a page and say what it looks like, with what went to the console and what was asked for."""
    driver.events.clear()
    target = driver.call("Target.createTarget", url="about:blank")["targetId"]
    session = driver.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
    for domain in ("Page", "Runtime", "Log", "Network"):
        driver.call(f"{domain}.enable", session)
    driver.call(
        "Emulation.setDeviceMetricsOverride",
        session,
        width=width,
        height=900,
        deviceScaleFactor=2,
        mobile=width < 600,
    )
    feature = {"name": "prefers-color-scheme", "value": scheme}
    driver.call("Emulation.setEmulatedMedia", session, features=[feature])
    driver.call("Page.navigate", session, url=page.resolve().as_uri())
    driver.wait_for("Page.loadEventFired")
    seen = driver.call("Runtime.evaluate", session, expression=LOOK, returnByValue=True)["result"]["value"]
    seen["console"] = [
        event["params"]
        for event in driver.events
        if event.get("method") in ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")
    ]
    seen["requests"] = [
        event["params"]["request"]["url"]
        for event in driver.events
        if event.get("method") == "Network.requestWillBeSent"
    ]
    driver.call("Target.closeTarget", targetId=target)
    return seen


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of twelve checkpoints with an index; names of files, layers and metrics are hostile."""
    folder = tmp_path_factory.mktemp("run")
    start, entries = makers.weights(0), []
    settings = makers.config()
    settings["config"]["layers"][1]["config"]["name"] = HOSTILE
    for number in range(1, 13):
        noise = makers.weights(number)
        arrays = {name: (value + 0.05 * noise[name]).astype(value.dtype) for name, value in start.items()}
        name = f"{HOSTILE} {number:02}.keras"
        makers.write_archive(folder / name, makers.weights(99) if number == 5 else arrays, settings)
        metrics = {
            "loss": 1.0 / number,
            "val_loss": 0.5 + 1.0 / number,
            HOSTILE_METRIC: "nan" if number == 3 else 1.0,
            f"val_{HOSTILE_METRIC}": 2.0,
        }
        entries.append(
            {
                "file": name,
                "epoch": number,
                "learning_rate": 0.1 * 0.7**number,
                "metrics": metrics,
                "time": "",
            }
        )
    index = {"version": 1, "monitor": "val_loss", "mode": "min", "checkpoints": entries}
    (folder / "checkpoints.json").write_text(json.dumps(index))
    return folder


@CHROME
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1600, 360])
def test_a_browser_shows_every_picture(
    width: int,
    scheme: str,
    run: Path,
    tmp_path: Path,
    chromium: Browser,
    swa_avg: Cli,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(run)
    page = tmp_path / "report.html"
    assert swa_avg("inspect", "--report", page).code == 0
    seen = _look(chromium, page, width, scheme)
    assert seen["console"] == []
    assert seen["overflow"] <= 0
    assert seen["wide"] == 0
    # trajectory, distances, loss, the hostile metric, learning rate
    assert len(seen["pictures"]) == 5
    for shown in seen["pictures"]:
        assert shown["loaded"], seen["pictures"]
        assert shown["dark"] == (scheme == "dark")
        assert min(300, width - 80) < shown["width"] <= width
        assert shown["height"] > 200
        assert shown["right"] <= width
    assert seen["tables"] == 2
    assert seen["scripts"] == 0
    paper, ink = (sum(map(int, re.findall(r"\d+", color)[:3])) / 3 for color in (seen["paper"], seen["ink"]))
    assert (paper < 60 and ink > 200) if scheme == "dark" else (paper > 230 and ink < 60)
    assert [url for url in seen["requests"] if not url.startswith("data:")] == [page.resolve().as_uri()]
    assert f"outlier: {HOSTILE} 05.keras lies in another basin" in seen["text"]


@CHROME
def test_the_test_notices_what_is_broken(tmp_path: Path, chromium: Browser) -> None:
    page = tmp_path / "broken.html"
    page.write_text(
        "<!DOCTYPE html><body><picture><source srcset='none.png'><img src='none.png'></picture>"
        "<p style='width: 3000px'>wide</p><script>console.error('no')</script>"
    )
    seen = _look(chromium, page, 390, "light")
    assert not seen["pictures"][0]["loaded"]
    assert seen["overflow"] > 0
    assert seen["wide"] == 1
    assert len(seen["console"]) >= 1
    assert len(seen["requests"]) == 2


def test_the_page_fetches_nothing_and_escapes_what_files_say(run: Path, tmp_path: Path, swa_avg: Cli) -> None:
    page = tmp_path / "report.html"
    swa_avg("inspect", run / "*.keras", "--report", page)
    text = page.read_text("utf-8")
    assert "<img src=x" not in text
    assert "http:" not in text
    assert "https:" not in text
    svgs = [base64.b64decode(data) for data in re.findall(r"data:image/svg\+xml;base64,([\w+/=]+)", text)]
    assert len(svgs) == 10
    for svg in svgs:
        links = re.findall(rb'href="([^"]{0,12})', svg)
        assert {link[:1] for link in links} <= {b"#", b"d"}, links
        assert b"<script" not in svg


def test_two_pages_of_the_same_checkpoints_are_the_same_bytes(
    run: Path, tmp_path: Path, swa_avg: Cli
) -> None:
    for name in ("a", "b"):
        swa_avg(
            "inspect",
            run / "*.keras",
            "--report",
            tmp_path / f"{name}.html",
            "--plot",
            tmp_path / f"{name}.svg",
        )
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


@CHROME
def _index(folder: Path, metrics: list[dict[str, float]], rates: list[float]) -> None:
    """Write three checkpoints and an index that says this of them."""
    checkpoints = [
        {"file": f"ckpt_{epoch}.keras", "epoch": epoch, "metrics": values, "learning_rate": rate}
        for epoch, (values, rate) in enumerate(zip(metrics, rates, strict=True), 1)
    ]
    for entry in checkpoints:
        makers.write_archive(folder / entry["file"], makers.weights(entry["epoch"]))
    (folder / "checkpoints.json").write_text(json.dumps({"version": 1, "checkpoints": checkpoints}))


@pytest.mark.parametrize(
    ("values", "undrawn"),
    [
        ([1e308, -1e308, 1e308], 3),
        ([1.7976931348623157e308, -1.7976931348623157e308, 0.0], 2),
        ([1e308] * 3, 3),
        ([1e300, -1e300, 1e300], 0),
        ([5e-324, 1e300, 1.0], 0),
        ([5e-324] * 3, 0),
    ],
    ids=str,
)
def test_numbers_of_any_size_have_a_page_and_pictures(
    values: list[float], undrawn: int, tmp_path: Path, swa_avg: Cli
) -> None:
    _index(tmp_path, [{"loss": value} for value in values], values)
    page, picture = tmp_path / "run.html", tmp_path / "run.png"
    ended = swa_avg("inspect", tmp_path, "--report", page, "--plot", picture, "-q")
    assert (ended.code, ended.err) == (0, "")
    count = "1 value" if undrawn == 1 else f"{undrawn} values"
    said = f". Not drawn, beyond 1e+300 in size: {count}."
    assert page.read_text().count(said) == (4 if undrawn else 0)  # of metric and rate, twice each
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_metrics_of_a_log_and_of_names_have_pictures_that_say_where_they_are_from(
    tmp_path: Path, swa_avg: Cli
) -> None:
    for epoch in (1, 2, 3):
        makers.write_archive(tmp_path / f"{epoch:02d}-val_auc={epoch / 4}.keras", makers.weights(epoch))
    (tmp_path / "log.csv").write_text("epoch,loss,lr\n0,3,0.1\n1,2,0.1\n2,1,0.01\n")
    page = tmp_path / "run.html"
    ended = swa_avg("inspect", tmp_path / "*.keras", "--report", page, "-q")
    assert (ended.code, ended.err) == (0, "")
    for caption in (
        "loss by epoch, from log.csv.",
        "val_auc by epoch, from the file name.",
        "The learning rate in",
    ):
        assert page.read_text().count(f"<figcaption>{caption}") == 1


def test_metrics_of_any_number_and_name_have_a_page(tmp_path: Path, swa_avg: Cli) -> None:
    names = [HOSTILE_METRIC, "$$", "_", "", "\u202egnp", "\u200b", "x" * 5000, "{", "val_", "\U0001f600"]
    metrics = [{name: float(epoch) for name in names} for epoch in (1, 2, 3)]
    for group in (names[:3], names[3:6], names[6:]):  # those of the first few names are drawn
        _index(tmp_path, [{name: values[name] for name in group} for values in metrics], [0.1] * 3)
        page = tmp_path / "run.html"
        ended = swa_avg("inspect", tmp_path, "--report", page, "--overwrite", "-q")
        assert (ended.code, ended.err) == (0, "")
        text = page.read_text()
        assert not set(text) & set("\u202e\u200b\x1b")
        assert "<img src=x" not in text
    _index(tmp_path, [{f"m{number}": 1.0 for number in range(5000)}] * 3, [0.1] * 3)
    assert swa_avg("inspect", tmp_path, "--report", page, "--overwrite", "-q").code == 0
    assert page.stat().st_size < 2_000_000


def test_what_does_not_fit_has_a_page_too(tmp_path: Path, chromium: Browser, swa_avg: Cli) -> None:
    makers.write_archive(tmp_path / "1.keras", makers.weights(1))
    makers.write_archive(tmp_path / "2.keras", makers.weights(2), makers.config(units=6))
    page = tmp_path / "report.html"
    assert swa_avg("inspect", tmp_path / "1.keras", tmp_path / "2.keras", "--report", page).code == 4
    seen = _look(chromium, page, 390, "light")
    assert "1.keras: config.config.layers[0].config.units: expected 6 as in 2.keras, found 5" in seen["text"]
    assert seen["pictures"] == []
    assert seen["overflow"] <= 0
    assert seen["console"] == []


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_one_checkpoint_without_an_index_still_has_a_picture(
    suffix: str, tmp_path: Path, swa_avg: Cli
) -> None:
    makers.write_archive(tmp_path / "one.keras", makers.weights(1))
    picture = tmp_path / f"out{suffix}"
    assert swa_avg("inspect", tmp_path / "one.keras", "--plot", picture).code == 0
    start = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}[suffix]
    assert picture.read_bytes().startswith(start)


def _walk(count: int) -> Geometry:
    measurement = Measurement(count)
    rng = np.random.default_rng(0)
    measurement.add(rng.standard_normal(200) + 0.1 * rng.standard_normal((count, 200)).cumsum(axis=0), 200)
    geometry = geometry_of(measurement, np.full(count, 1.0 / count))
    assert geometry is not None
    return geometry


@pytest.mark.parametrize("count", [2, 3, 100, 1000])
def test_any_number_of_checkpoints_has_pictures(count: int) -> None:
    labels = [str(number) for number in range(count)]
    geometry = _walk(count)
    shown = [
        pictures.picture("way", drawings.trajectory(geometry, labels, "mean")),
        pictures.picture("distances", drawings.distance_matrix(geometry, labels, "epoch")),
    ]
    for picture in shown:
        assert picture.light != picture.dark
        assert b"<svg" in picture.light
        assert len(zlib.compress(picture.light)) < 300_000


def test_sections_tables_and_facts_are_plain_text_made_html() -> None:
    table = html.table(["a", "b<"], [["1", "x&y"], ["2", "\x1b[0m"]], text_columns=[1], marked=[1])
    assert '<th class="text">b&lt;</th>' in table
    assert '<td>1</td><td class="text">x&amp;y</td>' in table
    assert '<tr class="marked"><td>2</td><td class="text">\\x1b[0m</td></tr>' in table
    page = html.page(
        "<t>",
        "lead",
        [
            html.Section(
                "<s>", html.facts([("k", "<v>", "<m>")]) + html.command("a <b>") + html.items(["<i>"])
            )
        ],
    )
    for escaped in (
        "<title>&lt;t&gt;</title>",
        "<h2>&lt;s&gt;</h2>",
        "<dd>&lt;v&gt;</dd>",
        '<dd class="meaning">&lt;m&gt;</dd>',
        "<pre><code>a &lt;b&gt;</code></pre>",
        "<li>&lt;i&gt;</li>",
    ):
        assert escaped in page


@pytest.mark.parametrize("backend", ["nonsense", "module://no.such", "TkAgg", ""])
def test_pictures_need_no_backend(
    backend: str, tmp_path: Path, run_python: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    for number in (1, 2):
        makers.write_archive(tmp_path / f"ckpt_{number}.keras", makers.weights(number))
    page, picture = tmp_path / "run.html", tmp_path / "run.png"
    code = (
        "import os, sys\nfrom swa_avg import inspect_checkpoints\n"
        "folder, page, picture, os.environ['MPLBACKEND'] = sys.argv[1:]\n"
        "inspect_checkpoints(folder + '/ckpt_*.keras', report=page, plot=picture)\n"
        "import matplotlib\nprint(os.environ['MPLBACKEND'], dict.__getitem__(matplotlib.rcParams, 'backend'))"
    )
    ended = run_python(code, tmp_path, page, picture, backend)
    assert ended.returncode == 0, ended.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert page.read_text().startswith("<!DOCTYPE html>")
    kept, known = ended.stdout.rstrip("\n").split(" ", 1)
    assert kept == backend
    assert (known.lower() == "tkagg") == (backend == "TkAgg")
