"""Reading and writing JSON Lines."""

import json
import logging

import numpy as np
import pytest

from tracerl_jax.data.jsonl import read_jsonl, write_jsonl
from tracerl_jax.errors import DataError, UserError

BAD_LINES = {
    "blank": (b"\n", "blank line"),
    "spaces": (b"   \n", "blank line"),
    "not_json": (b"question: 1\n", "not JSON"),
    "cut_off": (b'{"question": "1+\n', "not JSON"),
    "not_utf8": (b'{"question": "\xff"}\n', "not JSON"),
    "too_deep": (b"[" * 100_000 + b"\n", "not JSON"),
    "number_too_long": (b'{"question": ' + b"9" * 10_000 + b"}\n", "not JSON"),
    "not_an_object": (b"[1, 2]\n", "not a JSON object but a list"),
    "missing": (b'{"prompt": "1+1"}\n', "missing field 'question' (it has prompt)"),
    "null": (b'{"question": null}\n', "missing field 'question'"),
}


def test_yields_line_numbers_and_rows(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"question": "a"}\r\n{"question": "\xc3\xa9"}')
    assert list(read_jsonl(path, required=["question"])) == [(1, {"question": "a"}), (2, {"question": "é"})]


@pytest.mark.parametrize("name", BAD_LINES)
def test_bad_row_names_file_line_and_remedy(tmp_path, name):
    line, what = BAD_LINES[name]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"question": "a"}\n' + line + b'{"question": "b"}\n')
    with pytest.raises(DataError) as error:
        list(read_jsonl(path, required=["question"]))
    assert f"{path}:2: {what}" in str(error.value)
    assert "on_bad_row=skip" in str(error.value)


def test_skip_counts_and_says_why(tmp_path, caplog):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"question": "a"}\n' + b"".join(line for line, _ in BAD_LINES.values()) + b'{"question": "b"}\n')
    with caplog.at_level(logging.WARNING):
        rows = list(read_jsonl(path, on_bad_row="skip", required=["question"]))
    assert rows == [(1, {"question": "a"}), (12, {"question": "b"})]
    assert "skipped 10 bad rows, kept 2" in caplog.text
    assert f"{path}:2: blank line" in caplog.text


def test_array_file(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('[{"question": "a"},\n {"question": "b"}, {"answer": "c"}]')
    reader = read_jsonl(path, required=["question"])
    assert [next(reader), next(reader)] == [(1, {"question": "a"}), (2, {"question": "b"})]
    with pytest.raises(DataError, match=r"rows.json:3: missing field 'question'"):
        next(reader)
    path.write_text('[{"question": "a"}')
    with pytest.raises(DataError, match="not a JSON array"):
        list(read_jsonl(path))


def test_unreadable_file_and_unknown_policy(tmp_path):
    with pytest.raises(DataError, match=r"none.jsonl: cannot be read"):
        list(read_jsonl(tmp_path / "none.jsonl"))
    with pytest.raises(DataError, match="on_bad_row must be one of fail, skip"):
        list(read_jsonl(tmp_path / "none.jsonl", on_bad_row="ignore"))


def test_write_is_strict_json_and_atomic(tmp_path):
    path = tmp_path / "new" / "rows.jsonl"
    row = {"ids": np.arange(3, dtype=np.int32), "reward": float("nan"), "x": np.float32(0.5), "t": (1, np.bool_(True))}
    write_jsonl(path, [row])
    assert json.loads(path.read_text()) == {"ids": [0, 1, 2], "reward": None, "x": 0.5, "t": [1, True]}

    def rows():
        yield {"a": 1}
        raise KeyboardInterrupt

    before = path.read_bytes()
    with pytest.raises(KeyboardInterrupt):
        write_jsonl(path, rows())
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["rows.jsonl"]


def test_any_text_that_json_can_hold_comes_back(tmp_path):
    row = {"text": "\ud83d lone, 深\u2028\n"}
    write_jsonl(tmp_path / "rows.jsonl", [row])
    assert list(read_jsonl(tmp_path / "rows.jsonl")) == [(1, row)]


def test_a_place_that_cannot_be_written_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="choose a place you can write to"):
        write_jsonl(tmp_path / "file" / "rows.jsonl", [{}])


def test_a_data_set_is_read_by_name_and_split(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "sums"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", [{"question": "1+1=", "n": 2}, {"question": "", "n": 3}])
    write_jsonl(folder / "test.jsonl", [{"question": "2+2=", "n": 4}])

    def check(row):
        return "" if row["question"] else "no question"

    assert list(read_jsonl(f"hub:{folder}:test")) == [(1, {"question": "2+2=", "n": 4})]
    rows = list(read_jsonl(f"hub:{folder}", check=check, on_bad_row="skip"))
    assert rows == [(1, {"question": "1+1=", "n": 2})]
    with pytest.raises(DataError, match="sums:2: no question"):
        list(read_jsonl(f"hub:{folder}", check=check))
    with pytest.raises(DataError, match=r"sums:dev: cannot be loaded"):
        list(read_jsonl(f"hub:{folder}:dev"))
