"""The page in a real browser, from disk, with network features off."""

import html
import json
import re
import struct

import numpy as np
import pytest
from browser_utils import browse, needs_chromium
from synthetic import CharTokenizer, random_trace, write_run

from tracerl_jax.report.page import build_page, write_page
from tracerl_jax.report.run_dir import RunDir
from tracerl_jax.report.trace_page import trace_page

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
    hosts = re.search(r'<section id="hosts".*?</section>', dom, re.DOTALL)[0]
    assert "the slowest in rollout, reward or pack first." in hosts and "<td>2</td><td>2.94 s</td>" in hosts
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
choose("coloring", "confidence"); out.color = $("#viewer .tok:not(.given)").style.background;
$(".theme").click(); out.theme = document.documentElement.dataset.theme;
document.body.dataset.out = JSON.stringify(out);
</script>"""


def acted(tmp_path, page: str, actions: str, fragment: str = "") -> dict:
    """What the actions left on the page."""
    path = tmp_path / "acted.html"
    path.write_text(page + actions)
    return json.loads(html.unescape(re.search(r'data-out="([^"]*)"', dump(tmp_path, path, fragment))[1]))


def test_viewer_filter_and_curves_answer_to_mouse_and_keyboard(page_path, tmp_path):
    out = acted(tmp_path, page_path.read_text(), ACTIONS, "#sample=2")
    assert (out["first"], out["moved"], out["masked"]) == ("0", "1", "0")
    assert out["hash"].startswith("#sample=2&step=")
    assert "probability " in out["token"] and "log-prob -" in out["token"] and "revealed at step" in out["token"]
    assert "prompt token" in out["key"]
    assert out["chart"].startswith("step 1\n") and "rollouts: " in out["chart"]
    assert (out["all"], out["step20"], out["split"]) == (28, 4, 4)
    assert out["opened"] == "Trace of sample 0 (rl step 10)"
    assert "color-mix" in out["color"] and out["theme"] == "light"


@pytest.fixture(scope="module")
def traces_page():
    """Five completions of one prompt, then one of another, in a page of `tracerl generate --trace`."""
    rng = np.random.default_rng(0)
    prompts = [*["Q: 1+1?"] * 5, "Q: 2+2?"]
    traces = [random_trace(rng, prompt, f"It is <b>{n}</b>.") for n, prompt in enumerate(prompts)]
    columns = [{"prompt": prompt, "line": line} for line, prompt in enumerate(prompts, start=1)]
    return trace_page("SDAR-4B-Chat", columns, traces, CharTokenizer())


SIDE_BY_SIDE = """<script>
const out = {}, $ = (selector) => document.querySelector(selector);
const all = (selector) => [...document.querySelectorAll(selector)];
const press = (key) => document.body.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
const panes = () => all(".panes h3").map((head) => head.firstChild.textContent);
const boxes = () => all(".rows input").map((box) => box.checked);
out.first = panes(); out.heading = $("h1").textContent; out.title = document.title;
out.lefts = new Set(all(".panes article").map((pane) => pane.getBoundingClientRect().left)).size;
out.prompts = all(".prompt").length;
const range = $("[type=range]"); range.value = 2; range.dispatchEvent(new Event("input"));
out.slider = $("#viewer").dataset.step;
press("ArrowRight"); out.right = $("#viewer").dataset.step;
press("ArrowLeft"); press("ArrowLeft"); out.left = $("#viewer").dataset.step; out.hash = location.hash;
out.masked = all(".panes article").map((pane) => pane.querySelectorAll(".masked").length > 0);
press("k"); out.playing = $(".play").textContent; press("k"); out.paused = $(".play").textContent;
all(".rows input")[5].click(); out.more = panes(); out.ownPrompts = all(".prompt").length; out.boxes = boxes();
for (const i of [0, 1, 2, 3]) all(".rows input")[i].click();
out.alone = panes(); all(".rows input")[5].click(); out.stays = boxes();
all(".rows tbody tr")[1].click(); out.opened = $("#viewer h2").textContent;
document.body.dataset.out = JSON.stringify(out);
</script>"""


def test_samples_of_a_prompt_are_side_by_side_and_step_together(traces_page, tmp_path):
    out = acted(tmp_path, traces_page, SIDE_BY_SIDE)
    names = [f"line {line}, sample 1" for line in range(1, 7)]
    assert out["heading"] == "SDAR-4B-Chat" and out["title"].startswith("SDAR-4B-Chat")
    assert out["first"] == names[:4] and out["prompts"] == 1 and out["lefts"] >= 2
    assert (out["slider"], out["right"], out["left"]) == ("2", "3", "1")
    assert out["hash"] == "#sample=0,1,2,3&step=1" and out["masked"] == [True] * 4
    assert (out["playing"], out["paused"]) == ("Pause", "Play")
    assert out["more"] == [*names[:4], names[5]] and out["ownPrompts"] == 5
    assert out["boxes"] == [True] * 4 + [False, True]
    assert out["alone"] == [names[5]] and out["stays"] == [False] * 5 + [True]
    assert out["opened"] == "Trace of line 2, sample 1"


def test_one_trace_without_a_tokenizer(tmp_path):
    page = trace_page("DIR", [{}], [random_trace(np.random.default_rng(0), "ab", "hi")])
    (tmp_path / "one.html").write_text(page)
    dom = dump(tmp_path, tmp_path / "one.html").split('id="data"')[0]
    assert "Trace of sample 1" in dom and "97 98" in dom and "104 " in dom
    assert "<table" not in dom  # nothing to choose from


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


@pytest.mark.parametrize("kind", ["report", "traces"])
def test_screenshot_is_taken_at_the_asked_size_and_is_not_blank(kind, page_path, traces_page, tmp_path):
    picture, path = tmp_path / "page.png", page_path
    if kind == "traces":
        path = tmp_path / "traces.html"
        path.write_text(traces_page)
    browse(tmp_path, "--window-size=1280,900", f"--screenshot={picture}", path.as_uri())
    data = picture.read_bytes()
    assert struct.unpack(">II", data[16:24]) == (1280, 900)
    assert len(data) > 30_000  # a blank page of this size is under 10 kB
