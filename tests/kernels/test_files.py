"""Files that are whole or not there, and keys."""

import json
import multiprocessing
import os
from pathlib import Path

import pytest

from saeutils.kernels import files


def _write(path: Path, text: str) -> None:
    for _ in range(200):
        with files.whole(path) as tmp:
            tmp.write_text(text)


def test_two_processes_write_one_file_whole(tmp_path):
    path, texts = tmp_path / "table.json", [json.dumps(["a"] * 3000), json.dumps(["b"] * 5000)]
    writers = [multiprocessing.get_context("spawn").Process(target=_write, args=(path, text)) for text in texts]
    for writer in writers:
        writer.start()
    while any(w.is_alive() for w in writers):
        if path.exists():
            assert path.read_text() in texts
    assert [w.exitcode for w in writers] == [0, 0]
    assert [p.name for p in tmp_path.iterdir()] == ["table.json"]


def test_what_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "card.json"
    path.write_text("old")
    with pytest.raises(OSError), files.whole(path) as tmp:
        tmp.write_text("half")
        raise OSError(28, "No space left on device")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["card.json"]
    with files.whole(path) as tmp:
        assert tmp.suffix == ".json" and tmp.parent == tmp_path
        tmp.write_text("new")
    assert path.read_text() == "new" and path.stat().st_mode & 0o044


def test_a_key_depends_on_all_parts_and_on_no_order():
    assert files.key({"a": 1, "b": [2]}, "x") == files.key({"b": [2], "a": 1}, "x") != files.key({"a": 1, "b": [3]}, "x")
    assert files.key(1) == "080a9ed428559ef6"  # of every long run's folders: a change makes them all start again
