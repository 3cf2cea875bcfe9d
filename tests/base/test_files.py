"""A file is the old one or the complete new one; safetensors with metadata."""

import multiprocessing
import os
import time

import pytest
import torch
from safetensors.torch import save_file

from base.files import (
    alone,
    load_tensors,
    read_lines,
    save_tensors,
    write_atomically,
    write_lines,
    write_text,
)


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file.txt"
    write_text(path, "old")

    def broken(part):
        part.write_text("half of the n")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, broken)
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["file.txt"]


def test_failed_first_write_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError):
        write_atomically(tmp_path / "file.txt", lambda part: 1 / 0)
    assert list(tmp_path.iterdir()) == []


def test_write_replaces_and_makes_folders(tmp_path):
    path = tmp_path / "a" / "b" / "file.txt"
    write_text(path, "old")
    write_text(path, "new")
    assert path.read_text() == "new" and [p.name for p in path.parent.iterdir()] == ["file.txt"]


def test_old_file_is_whole_while_the_new_one_is_written(tmp_path):
    path, seen = tmp_path / "file.txt", []
    write_text(path, "old")
    write_atomically(path, lambda part: seen.append((part.write_text("new"), path.read_text())))
    assert seen == [(3, "old")] and path.read_text() == "new"


def test_files_get_the_mode_of_the_umask_whoever_writes_them(tmp_path):
    """safetensors writes with mode 0600; a killed write may have left such a part, too."""
    (tmp_path / ".x.part").touch(0o600)
    before = os.umask(0o027)
    try:
        save_tensors(tmp_path / "x", TENSORS, META)
        write_text(tmp_path / "y", "text")
    finally:
        os.umask(before)
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in "xy"] == [0o640, 0o640]


FORK = multiprocessing.get_context("fork")  # as these do nothing but wait for files


def count(folder):
    """Adds 1 to the number in a file, slowly, five times, one process at a time."""
    for _ in range(5):
        with alone(folder):
            number = int((folder / "number").read_text())
            time.sleep(0.01)
            (folder / "number").write_text(str(number + 1))


def test_processes_that_work_alone_lose_nothing_and_leave_no_lock(tmp_path):
    (tmp_path / "number").write_text("0")
    processes = [FORK.Process(target=count, args=(tmp_path,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert (tmp_path / "number").read_text() == "15"
    assert [path.name for path in tmp_path.iterdir()] == ["number"]


def hold(folder, held):
    with alone(folder):
        held.set()
        time.sleep(60)


def test_a_lock_ends_with_an_error_and_with_its_process(tmp_path):
    folder = tmp_path / "made" / "if need be"
    with pytest.raises(ZeroDivisionError), alone(folder):
        raise ZeroDivisionError
    held = FORK.Event()
    process = FORK.Process(target=hold, args=(folder, held))
    process.start()
    assert held.wait(60)
    process.kill()
    process.join()
    with alone(folder):
        pass
    assert list(folder.iterdir()) == []


TENSORS = {
    "b": torch.arange(6).reshape(2, 3).T,
    "a": torch.ones(2, requires_grad=True),
    "c": torch.zeros(0, 3),
}
META = {"z": [1, 2.5, None], "a": {"word": "ü"}}


def test_tensors_and_metadata_come_back(tmp_path):
    save_tensors(tmp_path / "x.safetensors", TENSORS, META)
    tensors, meta = load_tensors(tmp_path / "x.safetensors")
    assert meta == META and tensors.keys() == TENSORS.keys()
    for name, value in TENSORS.items():
        assert torch.equal(tensors[name], value) and tensors[name].dtype == value.dtype
    assert load_tensors(tmp_path / "x.safetensors", only_metadata=True) == ({}, META)


def test_equal_contents_are_equal_bytes(tmp_path):
    save_tensors(tmp_path / "x", TENSORS, META)
    save_tensors(tmp_path / "y", dict(reversed(TENSORS.items())), dict(reversed(META.items())))
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()


def test_foreign_file_has_no_metadata_of_ours(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "x", {"format": "pt"})
    assert load_tensors(tmp_path / "x")[1] == {}


@pytest.mark.parametrize("size", [0, 4, 30, -1])
def test_cut_file_is_named_in_one_sentence(tmp_path, size):
    path = tmp_path / "x.safetensors"
    save_tensors(path, TENSORS, META)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(
        ValueError, match="x.safetensors is cut off or no safetensors file"
    ) as caught:
        load_tensors(path)
    assert "\n" not in str(caught.value)


def test_json_lines_come_back_and_an_absent_file_has_none(tmp_path):
    path, rows = tmp_path / "rows.jsonl", [{"a": 1}, ["b\n"]]
    assert read_lines(path) == []
    write_lines(path, rows)
    assert read_lines(path) == rows and path.read_text().count("\n") == 2
