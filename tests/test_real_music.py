"""real_music.py on made-up packages: no network, no apt."""

import csv
import hashlib
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import soundfile

import real_music
from probe import load_task

RATE = 2000  # Hz: small files


def make_package(folder, seconds_of):
    """An unpacked package with noise of so many seconds a file, and a copyright file."""
    for i, (name, seconds) in enumerate(seconds_of.items()):
        path = Path(folder, "usr/share/games", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng([len(str(folder)), i]).uniform(-0.1, 0.1, round(seconds * RATE))
        soundfile.write(path, noise, RATE)
    licence = Path(folder, "usr/share/doc", Path(folder).name, "copyright")
    licence.parent.mkdir(parents=True)
    licence.write_text(f"licence of {Path(folder).name}")
    return folder


@pytest.fixture
def run(monkeypatch, capsys):
    """A function that runs the script's `main` with a command line: (exit status, stdout, stderr)."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["real_music.py", *map(str, arguments)])
        status = 0
        try:
            real_music.main()
        except SystemExit as error:
            status = error.code
        return status, *capsys.readouterr()

    return call


def test_data_set_from_folders(tmp_path, run):
    first = {f"été {i}/track {i}.flac": 45 + 4 * i for i in range(7)}
    first |= {"short.flac": 44.9, "sounds/wind.flac": 60}
    make_package(tmp_path / "a-music", first)
    original = tmp_path / "a-music/usr/share/games/été 3/track 3.flac"
    (original.parent / "zz copy.flac").write_bytes(original.read_bytes())
    (original.parent / "broken.ogg").write_text("not sound")
    (original.parent / "lost link.ogg").symlink_to("/no/such/file.ogg")
    make_package(tmp_path / "hedgewars-data", {f"music/{i}.wav": 50 for i in range(3)})
    make_package(tmp_path / "too-few", {"1.wav": 50, "2.wav": 50})
    out = tmp_path / "out"

    folders = [tmp_path / name for name in ("a-music", "hedgewars-data", "too-few")]
    status, printed, errors = run(out, "--from", *folders)
    assert status == 0, errors
    assert "too-few: 2 tracks" in errors and errors.count("\n") == 1

    with open(out / "labels.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    clips, contents = defaultdict(list), set()
    for row in rows:
        assert Path(row["path"]).parts[:2] == (row["split"], row["label"])
        clips[row["path"]].append(float(row["offset"]))
    splits = defaultdict(list)
    for path, offsets in clips.items():
        seconds = soundfile.info(str(out / path)).duration
        assert seconds >= 45 and len(offsets) == min(6, int(seconds // 10))
        assert offsets[0] >= 0 and offsets[-1] + 10 <= seconds + 1e-3
        assert all(10 <= b - a + 1e-3 for a, b in zip(offsets, offsets[1:]))
        contents.add(hashlib.sha256((out / path).read_bytes()).hexdigest())
        splits[Path(path).parts[1]].append(Path(path).parts[0])
    assert len(contents) == len(clips) == 10  # 7 and 3: no copy, no short file, no effects
    assert sorted(splits["a-music"]) == ["test"] * 2 + ["train"] * 4 + ["valid"]
    assert sorted(splits["hedgewars"]) == ["test", "train", "valid"]

    task = load_task(out / "labels.csv")
    assert list(task.names) == ["a-music", "hedgewars"] and not task.missing and len(task.clips) == len(rows)
    heard = real_music.audio_files(out / "pretrain")
    assert sorted(heard) == sorted(path for path in clips if not path.startswith("test"))
    assert (out / "copyright/a-music").read_text() == "licence of a-music"

    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert run(out) == (0, printed, "")
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    other = tmp_path / "other"
    (tmp_path / "other.part/train/hedgewars").mkdir(parents=True)  # of an interrupted build
    (tmp_path / "other.part/train/hedgewars/old.wav").write_text("old")
    assert run(other, "--from", *reversed(folders))[0] == 0
    assert {p.relative_to(other) for p in other.rglob("*")} == {p.relative_to(out) for p in out.rglob("*")}


def test_choice_does_not_depend_on_order():
    names = [f"track {i}" for i in range(57)]
    split_of = real_music.split_tracks(names)
    assert split_of == real_music.split_tracks(names[::-1]) and split_of.keys() == set(names)
    for n in range(3, 58):
        splits = list(real_music.split_tracks(names[:n]).values())
        for name, share in (("train", 0.5), ("valid", 0.2), ("test", 0.3)):
            assert splits.count(name) >= 1 and abs(splits.count(name) - share * n) <= 1


def test_bad_input_is_one_sentence(tmp_path, run, monkeypatch):
    (tmp_path / "mine").mkdir()
    for arguments in ((tmp_path / "mine",), (tmp_path / "out", "--from", tmp_path / "mine")):
        status, _, errors = run(*arguments)
        assert status == 2 and errors.splitlines()[-1].startswith("real_music.py: ")
    monkeypatch.setenv("PATH", str(tmp_path))
    status, _, errors = run(tmp_path / "out")
    assert status == 2 and errors.count("\n") == 1
    assert errors.startswith("real_music.py: apt-get is not installed")
    assert not (tmp_path / "out").exists() and not any((tmp_path / "mine").iterdir())
