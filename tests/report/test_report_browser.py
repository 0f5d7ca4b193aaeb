"""The page in a real browser, where one is installed: order, filter, search, paging, and texts that stay texts."""

import html
import json
import re
import shutil
import subprocess

import pytest

from dht.report import render_page

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next((path for name in NAMES if (path := shutil.which(name))), None)
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--dump-dom"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")

DRIVER = """
<script>
const seen = {}, at = (id) => document.getElementById(id);
const list = (key) => { seen[key] = { count: at("count").textContent, pager: !at("pager").hidden,
  paths: [...document.querySelectorAll(".path .block")].map((node) => parseInt(node.textContent, 10)),
  wrong: document.querySelectorAll(".mark-wrong").length,
  texts: [...document.querySelectorAll(".text")].map((node) => node.textContent) }; };
const set = (id, value, event) => { at(id).value = value; at(id).dispatchEvent(new Event(event)); };
list("start");
at("next").click(); list("second");
set("sort", "hardest", "change"); list("hardest");
set("sort", "random", "change"); list("random");
set("show", "layer-2", "change"); list("layer");
set("show", "wrong", "change"); list("wrong");
set("show", "all", "change"); set("find", "QUIET triumph", "input"); list("find");
set("find", "no such words", "input"); list("none");
set("find", "onerror", "input"); list("hostile");
const row = document.querySelector(".sample");
seen.tip = row.querySelector(".strip rect title").textContent;
row.open = true;
row.dispatchEvent(new Event("toggle"));
seen.exits = [...row.querySelectorAll("li")].map((node) => node.textContent);
seen.images = document.images.length; seen.attacked = window.attacked === true;
seen.hash = location.hash; seen.wide = document.documentElement.scrollWidth > innerWidth;
const out = document.createElement("pre");
out.id = "seen"; out.textContent = JSON.stringify(seen); document.body.append(out);
</script></body>"""
HOSTILE = "</script><img src=x onerror=attacked=true><b>bold</b>"


def dumped(path, tmp_path, fragment=""):
    command = [BROWSER, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", path.as_uri() + fragment]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def run(make_run):
    report, samples = make_run(60)
    hostile = {
        "text": HOSTILE,
        "label": "a",
        "prediction": "a",
        "layers": 2,
        "heads": [[0, 3], [1]],
        "exits": [{"prediction": "<i>b</i>", "score": 0.61}, {"prediction": "a", "score": 0.93}],
    }
    return report, [*samples, hostile]


def test_order_filter_search_and_paging(run, tmp_path):
    report, samples = run
    page = re.sub(r"<meta http-equiv.*?>", "", render_page(report, samples, []), flags=re.DOTALL)
    path = tmp_path / "page.html"
    path.write_text(page.replace("</body>", DRIVER), encoding="utf-8")
    seen = json.loads(html.unescape(re.search(r'<pre id="seen">(.*?)</pre>', dumped(path, tmp_path), re.DOTALL)[1]))

    ran = sorted(sample["layers"] for sample in samples)
    assert seen["start"]["paths"] == ran[:25]
    assert seen["second"]["paths"] == ran[25:50]
    assert seen["start"]["count"] == "Showing 1–25 of 61 samples"
    assert seen["second"]["count"] == "Showing 26–50 of 61 samples"
    assert seen["hardest"]["paths"] == ran[::-1][:25]
    assert len(seen["random"]["paths"]) == 25
    assert set(seen["layer"]["paths"]) == {2}
    assert len(seen["layer"]["paths"]) == ran.count(2)
    mistakes = sum(sample["label"] != sample["prediction"] for sample in samples)
    assert seen["wrong"]["wrong"] == len(seen["wrong"]["texts"]) == mistakes
    assert not seen["wrong"]["pager"]
    assert len(seen["find"]["texts"]) == sum("quiet triumph" in sample["text"] for sample in samples)
    assert seen["none"]["count"] == "No sample matches."
    assert seen["hostile"]["texts"] == [HOSTILE]
    assert (seen["images"], seen["attacked"], seen["wide"]) == (0, False, False)
    assert seen["tip"] == "Layer 1: 2 of 12 head units (1, 4). Exit says <i>b</i> 0.61"
    assert seen["exits"] == [
        "Layer 1: 2 of 12 head units (1, 4); its exit says <i>b</i> 0.61.",
        "Layer 2: 1 of 12 head units (2); its exit says a 0.93.",
    ]
    assert "find=onerror" in seen["hash"]


def test_the_security_policy_lets_the_page_s_own_script_run(run, tmp_path):
    path = tmp_path / "page.html"
    path.write_text(render_page(*run, []), encoding="utf-8")
    dom = dumped(path, tmp_path, "#sort=hardest&show=layer-1&page=9&find=zzz")
    assert "No sample matches." in dom
    assert "Showing 1–25 of 61 samples" in dumped(path, tmp_path, "#sort=bogus&show=bogus&page=x")
