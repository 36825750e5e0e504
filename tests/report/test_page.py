import argparse
import fnmatch
import html.parser
import itertools
import math
import re
from pathlib import Path

import pytest
from page_utils import page_data
from synthetic import CONFIG, write_run

from tracerl_jax.errors import DataError
from tracerl_jax.launch import report
from tracerl_jax.report import samples as module
from tracerl_jax.report.charts import CHARTS, MAX_POINTS, build_charts, collect_series, downsample
from tracerl_jax.report.page import build_page, write_page
from tracerl_jax.report.run_dir import RunDir

METRICS_DOC = Path(__file__).parents[2] / "docs" / "metrics.md"


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "arith")


def test_page_is_one_file_without_outside_resources(run_dir):
    page = build_page(run_dir)
    links = []

    class Links(html.parser.HTMLParser):
        def handle_starttag(self, tag, attrs):
            links.extend(value for name, value in attrs if name in ("src", "href", "srcset", "action"))

    Links().feed(page)
    assert links == ["data:,"]
    assert "default-src 'none'" in page and "url(" not in page and "@import" not in page
    assert not re.search(r"/\*(STYLE|SCRIPT|DATA)\*/", page)


def test_data_of_a_finished_run(run_dir):
    data = page_data(build_page(run_dir))
    assert data["status"] == "finished" and data["progress"] == {"sft": 200, "rl": 60}
    assert data["eval"]["after"]["dynamic"]["accuracy"] == 0.665
    assert data["skipped"] == [[17, 1.0], [42, 1.0]]
    assert data["config"]["rl.optimizer.learning_rate"] == CONFIG["rl"]["optimizer"]["learning_rate"]
    titles = [(chart["section"], chart["title"]) for chart in data["charts"]]
    assert len(titles) == len(set(titles)) and "Other" not in {section for section, _ in titles}
    assert data["samples_total"] == len(data["samples"]) == 28
    assert [row[:2] for row in data["hosts"]["rows"]] == [[2, 2.94], [0, 2.1], [1, 2.1], [3, 1.0]]
    assert not any(chart["thinned"] for chart in data["charts"])


def test_text_of_a_sample_cannot_end_the_script_or_replace_a_part(tmp_path):
    with RunDir(tmp_path) as run:
        prompt, text = "</script><script>alert(1)</script>", "/*STYLE*/<!--"
        run.append_samples([{"step": 1, "phase": "rl", "prompt": prompt, "text": text}])
    page = build_page(tmp_path)
    assert page.count("<script") == 2 and page.count("</script>") == 2 and "<!--" not in page
    (sample,) = page_data(page)["samples"]
    assert (sample["prompt"], sample["text"]) == (prompt, text)


def test_a_run_that_has_just_begun(tmp_path):
    with RunDir(tmp_path) as run:
        run.write_config({})
        data = page_data(build_page(tmp_path))
    assert data["status"] == "running" and data["charts"] == data["samples"] == []
    assert data["eval"] == data["hosts"] == {}


def test_a_killed_run_does_not_count_as_running(tmp_path):
    (tmp_path / "summary.json").write_text('{"status": "running"}')
    assert page_data(build_page(tmp_path))["status"] == "stopped"


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(DataError, match="not a run folder"):
        build_page(tmp_path)


def test_many_samples_are_spread_over_the_run_and_counted(tmp_path, monkeypatch):
    with RunDir(tmp_path) as run:
        run.append_samples({"step": i, "phase": "rl", "ids": [1] * 100} for i in range(1000))
    with open(tmp_path / "samples.jsonl", "a") as file:
        file.write('{"step": 1000')
    data = page_data(build_page(tmp_path))
    picked = [sample["step"] for sample in data["samples"]]
    assert data["samples_total"] == 1000 and len(picked) == module.MAX_SAMPLES
    assert picked[0] == 0 and picked[-1] == 999 and max(b - a for a, b in itertools.pairwise(picked)) <= 4
    monkeypatch.setattr(module, "MAX_SAMPLE_BYTES", math.ceil((tmp_path / "samples.jsonl").stat().st_size / 20))
    assert len(page_data(build_page(tmp_path))["samples"]) == 50


def test_downsampling_keeps_ends_spikes_and_order():
    points = [(step, math.sin(step / 50)) for step in range(10_000)]
    points[4321] = (4321, 9.0)
    points[777] = (777, -9.0)
    points[5000] = (5000, None)
    kept = downsample(points)
    assert len(kept) <= MAX_POINTS and {points[0], points[-1], (4321, 9.0), (777, -9.0)} <= set(kept)
    assert [step for step, _ in kept] == sorted({step for step, _ in kept})
    assert downsample(points[:MAX_POINTS]) == points[:MAX_POINTS]


def test_downsampling_a_curve_without_any_value():
    assert len(downsample([(step, None) for step in range(1000)])) <= MAX_POINTS


def test_series_keep_the_last_row_of_a_step_and_the_clocks_of_the_phases_apart():
    series = collect_series([
        {"step": 2, "phase": "rl", "reward": 0.2, "seconds/total": 1.0},
        {"step": 1, "phase": "rl", "reward": 0.1},
        {"step": 2, "phase": "rl", "reward": None},
        {"step": 1, "phase": "sft", "sft/loss": math.inf, "seconds/total": 9.0},
    ])  # fmt: skip
    assert series == {
        "reward": [(1, 0.1), (2, None)], "seconds/total": [(2, 1.0)], "sft/loss": [(1, None)],
        "sft/seconds/total": [(1, 9.0)],
    }  # fmt: skip


def test_time_outside_the_phases_is_stacked_as_other_and_unknown_metrics_are_not_lost():
    seconds = {"seconds/rollout": 2.0, "seconds/total": 2.5, "seconds/update_policy": 0.25}
    time_chart, other = build_charts(collect_series([{"step": 1, "phase": "rl", **seconds, "my/own": 1}]))
    assert [(s["label"], s["points"]) for s in time_chart["series"]] == [
        ("rollout", [(1, 2.0)]), ("update policy", [(1, 0.25)]), ("other", [(1, 0.25)]),
    ]  # fmt: skip
    assert (other["section"], other["title"]) == ("Other", "my/own")


def test_long_stacks_keep_the_same_steps_in_every_layer():
    rows = [{"step": i, "phase": "rl", "seconds/rollout": 1.0, "seconds/total": 1.5} for i in range(5000)]
    (chart,) = build_charts(collect_series(rows))
    first, second = ([step for step, _ in s["points"]] for s in chart["series"])
    assert first == second and len(first) <= MAX_POINTS + 1 and first[-1] == 4999 and chart["thinned"]


def test_command_writes_the_page_and_prints_its_path(run_dir, tmp_path, capsys):
    parser = argparse.ArgumentParser()
    report.add_arguments(parser)
    output = tmp_path / "page.html"
    assert report.run(parser.parse_args([str(run_dir), "--output", str(output)])) == 0
    assert capsys.readouterr().out == f"{output}\n"
    assert output.read_text().startswith("<!doctype html>")
    assert report.run(parser.parse_args([str(run_dir)])) == 0
    assert (run_dir / "report.html").exists()


def test_every_documented_metric_is_drawn_and_every_chart_is_documented():
    documented = re.findall(r"^- `([^`]+)`", METRICS_DOC.read_text(), re.MULTILINE)
    assert len(documented) > 40 and len(set(documented)) == len(documented)
    names = {name.replace("<strategy>", "dynamic") for name in documented}
    charts = build_charts({name: [(1, 1.0)] for name in names})
    assert [chart["title"] for chart in charts if chart["section"] == "Other"] == []
    assert sum(len(chart["series"]) for chart in charts) == len(names) - 1  # updates/skipped is drawn as marks
    again = ("sft/seconds", "sft/chips", "sft/hosts")  # documented once, for both kinds of training
    for pattern in (pattern for chart in CHARTS for pattern in chart.metrics if not pattern.startswith(again)):
        assert fnmatch.filter(names, pattern), pattern


def test_write_page_replaces_the_old_page(run_dir):
    path = write_page(run_dir)
    path.write_text("old")
    assert write_page(run_dir) == path and path.read_text() != "old"
