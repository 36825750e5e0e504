"""The results folder: what survives a kill, and when it refuses to go on."""

import pytest

from tracerl_jax.data.prompts import Problem
from tracerl_jax.data.tasks import load_task
from tracerl_jax.errors import ConfigError, DataError, UserError
from tracerl_jax.evals.items import ResultsFolder, Seconds
from tracerl_jax.evals.manifest import digest_problems, make_manifest
from tracerl_jax.evals.runner import protocol
from tracerl_jax.folder_lock import FolderLock

MANIFEST = {"model": {"a": "1"}, "tasks": {"one": {"rows": "x", "samples": 2}}, "strategies": {"static": {"seed": 0}}}


def filled(path, manifest=MANIFEST):
    """A folder with two finished items and 3 seconds of work."""
    with ResultsFolder(path, manifest) as folder:
        items = folder.items("one", "static")
        items.begin()
        items.add([{"index": 0}, {"index": 1}])
        items.clock(decode=2.0, wall=3.0)
        items.end()
    return path


def test_items_and_times_are_there_again_but_a_torn_line(tmp_path):
    path = filled(tmp_path / "results") / "items" / "one.static.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"index": 2, "te')
    with ResultsFolder(tmp_path / "results", MANIFEST) as folder:
        items = folder.items("one", "static")
        assert items.rows == [{"index": 0}, {"index": 1}] and items.seconds == [Seconds(2.0, 3.0)]
        items.add([{"index": 2}])
        assert path.read_bytes() == whole + b'{"index": 2}\n'
        assert folder.items("one", "dynamic").rows == []


@pytest.mark.parametrize(
    "changes, difference",
    [
        ({"model": {"a": "2"}}, 'model.a: "1" -> "2"'),
        ({"tasks": {"one": {"rows": "x", "samples": 4}}}, "tasks.one.samples: 2 -> 4"),
        ({"strategies": {"static": {"seed": 1}}}, "strategies.static.seed: 0 -> 1"),
    ],
)
def test_other_settings_are_refused_by_name_or_overwrite(tmp_path, changes, difference):
    filled(tmp_path)
    with pytest.raises(ConfigError) as refusal:
        ResultsFolder(tmp_path, MANIFEST | changes)
    assert difference in str(refusal.value) and "--overwrite" in str(refusal.value)
    with ResultsFolder(tmp_path, MANIFEST) as folder:  # the refusal changed nothing
        assert len(folder.items("one", "static").rows) == 2
    with ResultsFolder(tmp_path, MANIFEST | changes, overwrite=True) as folder:
        items = folder.items("one", "static")
        assert items.rows == [] and items.seconds == []


def test_tasks_and_strategies_may_be_added(tmp_path):
    filled(tmp_path)
    more = MANIFEST | {"tasks": {"two": {"rows": "y"}}, "strategies": {"dynamic": {"seed": 0}}}
    with ResultsFolder(tmp_path, more) as folder:
        folder.items("two", "dynamic").add([{"index": 0}])
    with ResultsFolder(tmp_path, MANIFEST) as folder:
        assert len(folder.items("one", "static").rows) == 2 and len(folder.items("two", "dynamic").rows) == 1
    with pytest.raises(ConfigError, match=r'tasks\.two\.rows: "y" -> "z"'):
        ResultsFolder(tmp_path, MANIFEST | {"tasks": {"two": {"rows": "z"}}})


def test_without_items_nothing_is_held_to_the_old_settings(tmp_path):
    with ResultsFolder(tmp_path, MANIFEST) as folder:
        folder.items("one", "static")
    with ResultsFolder(tmp_path, MANIFEST | {"model": {"a": "2"}}):
        pass


def test_places_that_are_no_results_folder(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(DataError, match=r"is no folder of results \(it holds notes.txt\)"):
        ResultsFolder(tmp_path, MANIFEST, overwrite=True)
    with pytest.raises(UserError, match="choose a place you can write to"):
        ResultsFolder(tmp_path / "notes.txt", MANIFEST)


def test_one_process_at_a_time(tmp_path, monkeypatch):
    filled(tmp_path)

    def refuse(file):
        return False

    monkeypatch.setattr("tracerl_jax.folder_lock._try_lock", refuse)
    with pytest.raises(UserError, match=f"results folder {tmp_path} is in use by process"):
        ResultsFolder(tmp_path, MANIFEST)
    monkeypatch.undo()
    FolderLock(tmp_path, "results folder", "choose another").release()


def test_the_manifest_tells_models_and_rows_apart(model_folder, tmp_path):
    task = load_task("arithmetic", options={"test_count": 3})
    problems = [Problem(i, row["question"], [4, 5], row) for i, row in enumerate(task.test)]

    def manifest(folder, problems=problems):
        strategies = {"static": protocol("static", max_tokens=8)}
        return make_manifest(folder, "float32", {"arithmetic": (task, problems, 1)}, strategies)

    copy = tmp_path / "copy"
    copy.mkdir()
    for file in model_folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    (copy / "README.md").write_text("not read by anybody")
    assert manifest(copy) == manifest(model_folder)  # another place, another time stamp
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    assert manifest(copy)["model"]["files"] != manifest(model_folder)["model"]["files"]

    elsewhere = [Problem(p.index, p.prompt_text, p.prompt_ids, {**p.columns, "_source": "b.jsonl:1"}) for p in problems]
    assert digest_problems(elsewhere) == digest_problems(problems)
    assert digest_problems(problems[:2]) != digest_problems(problems)
    other = [Problem(0, "", [4, 6], problems[0].columns), *problems[1:]]
    assert digest_problems(other) != digest_problems(problems)
