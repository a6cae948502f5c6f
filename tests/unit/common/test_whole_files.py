"""Folders and JSON files that are whole or not there."""

import os
import socket
import subprocess
import sys

import pytest

from moltron.common.manifest import read_json, sha256_file, staged_folder, write_json


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_folder_appears_when_complete(tmp_path):
    with staged_folder(tmp_path / "a" / "out", "m") as stage:
        (stage / "m").write_text("1")
        assert not (tmp_path / "a" / "out").exists() and stage.parent == tmp_path / "a"
    assert names(tmp_path / "a") == ["out"] and names(tmp_path / "a" / "out") == ["m"]


def test_an_error_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), staged_folder(tmp_path / "out", "m"):
        raise RuntimeError
    assert names(tmp_path) == []


def test_overwriting(tmp_path):
    (tmp_path / "out").mkdir()
    with staged_folder(tmp_path / "out", "m") as stage:  # an empty folder is free
        (stage / "m").write_text("1")
    with pytest.raises(ValueError, match="overwrite=true"), staged_folder(tmp_path / "out", "m"):
        pass
    with pytest.raises(RuntimeError), staged_folder(tmp_path / "out", "m", overwrite=True):
        raise RuntimeError
    assert (tmp_path / "out" / "m").read_text() == "1"
    with staged_folder(tmp_path / "out", "m", overwrite=True) as stage:
        (stage / "m").write_text("2")
    assert (tmp_path / "out" / "m").read_text() == "2" and names(tmp_path) == ["out"]
    with pytest.raises(ValueError, match="not ours"), staged_folder(tmp_path / "out", "other", overwrite=True):
        pass
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="not ours"), staged_folder(tmp_path / "file", "m", overwrite=True):
        pass


def test_leftovers_of_dead_processes_go_and_those_of_living_ones_stay(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    host = socket.gethostname()
    kept = [f".out.partial-{host}-{os.getppid()}", ".out.partial-elsewhere-1", f".other.partial-{host}-{dead.pid}"]
    for name in (*kept, f".out.partial-{host}-{dead.pid}"):
        (tmp_path / name).mkdir()
    with staged_folder(tmp_path / "out", "m"):
        pass
    assert names(tmp_path) == sorted([*kept, "out"])


def test_json(tmp_path):
    write_json(tmp_path / "a.json", {"é": [1, None]})
    assert read_json(tmp_path / "a.json") == {"é": [1, None]} and names(tmp_path) == ["a.json"]
    with pytest.raises(ValueError):
        write_json(tmp_path / "b.json", {"x": float("nan")})
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ValueError, match=r"a\.json is not JSON"):
        read_json(tmp_path / "a.json")
    (tmp_path / "c").write_bytes(b"abc")
    assert sha256_file(tmp_path / "c").startswith("ba7816bf")
