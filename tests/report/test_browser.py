"""The page in a real browser, from disk, with network features off."""

import html
import json
import re
import struct

import pytest
from browser_utils import browse, needs_chromium
from synthetic import write_run

from tracerl_jax.report.page import build_page, write_page
from tracerl_jax.report.run_dir import RunDir

pytestmark = needs_chromium


def dump(tmp_path, path, fragment: str = "") -> str:
    dom = browse(tmp_path, "--dump-dom", f"{path.as_uri()}{fragment}")
    root = re.search(r"<html[^>]*>", dom)[0]
    assert 'data-ready="true"' in root and "data-errors" not in root, root
    return dom


@pytest.fixture(scope="module")
def page_path(tmp_path_factory):
    return write_page(write_run(tmp_path_factory.mktemp("runs") / "arith"))


def test_curves_are_drawn_and_the_hash_sets_the_viewer(page_path, tmp_path):
    dom = dump(tmp_path, page_path, "#sample=9&step=3")
    figures = re.findall(r"<figure.*?</figure>", dom, re.DOTALL)
    assert len(figures) >= 20
    for figure in figures:
        assert re.search(r'<path class="(curve|layer)" d="M[\d.]', figure), figure
        assert "NaN" not in figure and "undefined" not in figure and "Infinity" not in figure
    assert "+32.5 points" in dom and "updates skipped" in dom
    viewer = re.search(r'<section id="viewer".*?</section>', dom, re.DOTALL)[0]
    assert 'data-step="3"' in viewer
    tokens = re.findall(r'<span class="tok ([\w ]*)" data-i="\d+"', viewer)
    masked = sum("masked" in kind for kind in tokens)
    assert f'data-masked="{masked}"' in viewer and 0 < masked < len(tokens)
    assert any("now" in kind for kind in tokens) and any("given" in kind for kind in tokens)
    assert viewer.count('title="block ') == (len(tokens) - 1) // 4  # edges lie on the absolute grid
    assert "&lt;" in viewer and "<b>So" not in dom.split('id="data"')[0]  # text of a model is never markup


# Appended to the page: clicks, keys and pointer as a person would use them; what they change is left on the document.
ACTIONS = """<script>
const out = {}, $ = (selector) => document.querySelector(selector);
const step = () => $("#viewer").dataset.step;
const press = (node, key) => node.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
$(".player .first").click(); out.first = step();
$(".player .next").click(); $(".player .next").click(); $(".player .previous").click(); out.moved = step();
$(".player .last").click(); out.masked = $("#viewer").dataset.masked; out.hash = location.hash;
const token = $("#viewer .tok:not(.given)");
token.dispatchEvent(new PointerEvent("pointerover", { bubbles: true })); out.token = $("#tip").textContent;
const canvas = $(".canvas");
canvas.focus(); press(canvas, "ArrowRight"); press(canvas, "ArrowRight"); out.key = $("#tip").textContent;
const chart = document.querySelectorAll("svg.chart")[1];
press(chart, "ArrowRight"); press(chart, "ArrowRight"); out.chart = $("#tip").textContent;
const shown = () => [...document.querySelectorAll(".rows tbody tr")].filter((row) => !row.hidden).length;
const choose = (name, value) => {
  $(`[name=${name}]`).value = value;
  $(`[name=${name}]`).dispatchEvent(new Event("change"));
};
out.all = shown(); choose("step", "rl 20"); out.step20 = shown();
choose("verdict", "correct"); const right = shown(); choose("verdict", "incorrect"); out.split = right + shown();
$(".rows tbody tr").click(); out.opened = $("#viewer h2").textContent;
choose("coloring", "logprob"); out.color = $("#viewer .tok:not(.given)").style.background;
$(".theme").click(); out.theme = document.documentElement.dataset.theme;
document.body.dataset.out = JSON.stringify(out);
</script>"""


def test_viewer_filter_and_curves_answer_to_mouse_and_keyboard(page_path, tmp_path):
    path = tmp_path / "acted.html"
    path.write_text(page_path.read_text() + ACTIONS)
    dom = dump(tmp_path, path, "#sample=2")
    out = json.loads(html.unescape(re.search(r'data-out="([^"]*)"', dom)[1]))
    assert (out["first"], out["moved"], out["masked"]) == ("0", "1", "0")
    assert out["hash"].startswith("#sample=2&step=")
    assert "log-prob -" in out["token"] and "revealed at step" in out["token"]
    assert "prompt token" in out["key"]
    assert out["chart"].startswith("step 1\n") and "rollouts: " in out["chart"]
    assert (out["all"], out["step20"], out["split"]) == (28, 4, 4)
    assert out["opened"] == "Trace of sample 0 (rl step 10)"
    assert "color-mix" in out["color"] and out["theme"] == "light"


def test_an_empty_run_and_odd_rows_make_a_page_without_errors(tmp_path):
    with RunDir(tmp_path / "odd") as run:
        run.write_config({})
        (tmp_path / "empty.html").write_text(build_page(tmp_path / "odd"))
        run.append_metrics([{"step": 1, "phase": "rl", "policy/kl": None, "replay/logprob_gap_max": 0.0, "reward": 2}])
        run.append_samples([
            {"step": 1, "phase": "rl", "prompt_ids": [1], "ids": [], "step_map": []},
            {"step": 1, "phase": "rl", "prompt": None, "ids": [5], "step_map": [1], "reward": -1.5, "ground_truth": [1],
             "rewards": {"format": None}},
        ])  # fmt: skip
        run.update_summary({"eval": {"before": {"entropy_bounded": {"accuracy": None}}}})
        (tmp_path / "odd.html").write_text(build_page(tmp_path / "odd"))
    empty = dump(tmp_path, tmp_path / "empty.html")
    assert "No metrics yet" in empty and "No samples yet" in empty and "Not evaluated yet" in empty
    odd = dump(tmp_path, tmp_path / "odd.html")
    assert "Entropy bounded decoding" in odd and "Trace of sample 1" in odd


def test_screenshot_is_taken_at_the_asked_size_and_is_not_blank(page_path, tmp_path):
    picture = tmp_path / "page.png"
    browse(tmp_path, "--window-size=1280,900", f"--screenshot={picture}", page_path.as_uri())
    data = picture.read_bytes()
    assert struct.unpack(">II", data[16:24]) == (1280, 900)
    assert len(data) > 30_000  # a blank page of this size is under 10 kB
