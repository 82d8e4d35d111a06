"""The index of a folder: what it reads, when, and what is kept of it."""

import builtins
import io
import os

import numpy as np
import pytest
from PIL import Image

from train.data import heads
from train.data.heads import File, are_pictures, is_picture


def picture(format, **options):
    file = io.BytesIO()
    Image.fromarray(np.zeros((5, 7, 3), np.uint8)).save(file, format, **options)
    return file.getvalue()


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "MPO"])
def test_pictures_are_known_by_their_first_bytes(tmp_path, format):
    (tmp_path / "x").write_bytes(picture(format))
    assert is_picture(tmp_path / "x")


def test_big_tiffs_are_known(tmp_path):
    (tmp_path / "x").write_bytes(picture("TIFF", big_tiff=True))
    assert is_picture(tmp_path / "x")


@pytest.mark.parametrize("content", [b"", b"\xff\xd8", b"%PDF-1.7", b"RIFF\0\0\0\0WAVEfmt ", b"II"])
def test_other_files_are_not(tmp_path, content):
    (tmp_path / "x").write_bytes(content)
    assert not is_picture(tmp_path / "x")


@pytest.fixture
def folder(tmp_path):
    """Six hundred files, every seventh of them no picture."""
    root = tmp_path / "folder"
    root.mkdir()
    for i in range(600):
        (root / f"{i}").write_bytes(b"none" if i % 7 == 0 else picture("BMP"))
    return root


def files_of(root):
    with os.scandir(root) as entries:
        return sorted(heads.describe(entry.name, entry) for entry in entries)


@pytest.fixture
def opened(monkeypatch):
    """The names of the files that were opened."""
    names = []

    def open_and_note(path, *args, **kwargs):
        names.append(os.path.basename(path))
        return builtins.open(path, *args, **kwargs)

    monkeypatch.setattr(heads, "open", open_and_note, raising=False)
    return names


def check(root, files, index):
    are, notes = are_pictures(root, files, index)
    assert are == [not (root / file.path).read_bytes().startswith(b"none") for file in files]
    assert notes == ()


def test_a_second_start_reads_nothing(folder, tmp_path, opened):
    index = tmp_path / "cache" / "index.npz"
    check(folder, files_of(folder), index)
    assert len(opened) == 600
    opened.clear()
    check(folder, files_of(folder), index)
    assert opened == []


def test_what_changed_or_came_is_read(folder, tmp_path, opened):
    index = tmp_path / "index.npz"
    check(folder, files_of(folder), index)
    opened.clear()
    (folder / "1").write_bytes(b"none of it")
    (folder / "0").write_bytes(picture("PNG"))
    (folder / "new").write_bytes(picture("GIF"))
    (folder / "2").unlink()
    os.utime(folder / "3", ns=(1, 1))
    check(folder, files_of(folder), index)
    assert sorted(opened) == ["0", "1", "3", "new"]
    opened.clear()
    check(folder, files_of(folder), index)
    assert opened == []


@pytest.mark.parametrize("damage", [lambda b: b[:-50], lambda b: b"", lambda b: b[:900] + b[910:]])
def test_a_damaged_index_is_made_anew(folder, tmp_path, opened, damage):
    index = tmp_path / "index.npz"
    check(folder, files_of(folder), index)
    whole = index.read_bytes()
    index.write_bytes(damage(whole))
    check(folder, files_of(folder), index)
    assert len(opened) == 1200
    assert len(index.read_bytes()) == len(whole)


def test_an_index_of_something_else_is_made_anew(folder, tmp_path, opened):
    index = tmp_path / "index.npz"
    np.savez(index, paths=np.arange(3))
    check(folder, files_of(folder), index)
    assert len(opened) == 600


def test_names_may_be_any_bytes(tmp_path, opened):
    name = os.fsdecode(b"caf\xe9")
    (tmp_path / name).write_bytes(picture("PNG"))
    size = (tmp_path / name).stat()
    files = [File(name, size.st_size, size.st_mtime_ns)]
    for _ in range(2):
        assert are_pictures(tmp_path, files, tmp_path / "index.npz") == ([True], ())
    assert len(opened) == 1


def test_no_room_for_the_index_is_a_note(folder, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder would be")
    files = files_of(folder)
    are, (note,) = are_pictures(folder, files, tmp_path / "cache" / "index.npz")
    assert sum(are) == 600 - 86
    assert "The index of 600 files can't be kept in" in note
    assert "XDG_CACHE_HOME" in note
