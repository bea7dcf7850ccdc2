"""data.py against the definitions: slow loops in float64, brute force, and files as ugly as they come."""

import csv
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import soundfile
import torch

import data

ROOT = Path(__file__).parent.parent


# --- mel ----------------------------------------------------------------------------------------------------


def slow_mel(wave):
    """The mel power from its definition, in float64: complex exponentials, and triangles bin by bin."""
    wave = np.asarray(wave, dtype=np.float64)
    padded = np.concatenate([wave[1:1025][::-1], wave, wave[-1025:-1][::-1]])
    window = np.array([0.5 - 0.5 * math.cos(2 * math.pi * n / 2048) for n in range(2048)])
    frames = np.stack([padded[512 * t : 512 * t + 2048] * window for t in range(1 + len(wave) // 512)])
    fourier = np.exp(-2j * np.pi * np.outer(np.arange(2048), np.arange(1025)) / 2048)
    power = np.abs(frames @ fourier) ** 2

    def hz(mel):
        return mel * 200 / 3 if mel < 15 else 1000 * math.exp((mel - 15) * math.log(6.4) / 27)

    def mel(f):
        return f * 3 / 200 if f < 1000 else 15 + 27 * math.log(f / 1000) / math.log(6.4)

    edges = [hz(mel(8000) * i / 129) for i in range(130)]
    bank = np.zeros((128, 1025))
    for m in range(128):
        low, centre, high = edges[m : m + 3]
        for k in range(1025):
            f = k * 16_000 / 2048
            if low < f <= centre:
                bank[m, k] = (f - low) / (centre - low)
            elif centre < f < high:
                bank[m, k] = (high - f) / (high - centre)
        bank[m] *= 2 / (high - low)
    return bank, (power @ bank.T).T


def distance(a, b):
    return np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b)


@pytest.mark.parametrize("kind", ["noise", "low tone", "high tone", "music", "quiet", "click"])
def test_mel_is_the_definition(kind):
    generator = torch.Generator().manual_seed(1)
    t = torch.arange(20_000) / 16_000
    wave = {
        "noise": lambda: torch.randn(20_000, generator=generator),
        "low tone": lambda: 0.5 * torch.sin(2 * torch.pi * 82.4 * t),
        "high tone": lambda: 0.5 * torch.sin(2 * torch.pi * 6543.2 * t),
        "music": lambda: data.synthesize(1, 5)[0][0, :20_000],
        "quiet": lambda: 1e-4 * torch.randn(20_000, generator=generator),
        "click": lambda: (torch.arange(20_000) == 7000).float(),
    }[kind]()
    bank, expected = slow_mel(wave)
    assert distance(data.mel_filterbank(), bank) < 1e-6
    assert data.mel_spectrogram(wave).shape == (128, 40)
    assert distance(data.mel_spectrogram(wave), expected) < 1e-5


def test_mel_is_batched_and_says_when_too_short():
    waves = torch.randn(2, 3, 5000)
    batched = data.mel_spectrogram(waves)
    assert batched.shape == (2, 3, 128, 10)
    assert torch.allclose(batched[1, 2], data.mel_spectrogram(waves[1, 2]), rtol=1e-5)
    assert data.mel_spectrogram(torch.randn(1025)).shape == (128, 3)
    with pytest.raises(ValueError, match="1024 samples are too few"):
        data.mel_spectrogram(torch.randn(1024))


def test_segments_drop_the_rest_and_fill_up_a_short_clip():
    mel = torch.randn(128, 313)
    cut = data.segments(mel)
    assert cut.shape == (3, 128, 96)
    for i in range(3):
        assert torch.equal(cut[i], mel[:, 96 * i : 96 * (i + 1)])
    short = data.segments(mel[:, :40])
    assert short.shape == (1, 128, 96)
    assert torch.equal(short[0, :, :40], mel[:, :40]) and not short[0, :, 40:].any()


def test_mel_segments_are_what_a_corpus_stores():
    wave = data.synthesize(1, 5)[0][0]
    wave *= 40 / wave.abs().max()  # loud: some values are beyond float16
    mel = torch.from_numpy(slow_mel(wave)[1])
    cut = data.mel_segments(wave)
    assert cut.shape == (3, 128, 96) and cut.dtype == torch.float16
    assert mel.max() > 65504 and cut.max() == 65504
    expected = data.segments(mel.clamp(max=65504))
    assert (cut - expected).abs().max() <= 1e-3 * expected.max()
    short = data.mel_segments(wave[:500])
    padded = torch.cat([wave[:500], torch.zeros(1548)])
    assert short.shape == (1, 128, 96)
    assert torch.equal(short, data.mel_segments(padded))


# --- sound --------------------------------------------------------------------------------------------------


def tone(rate, seconds, frequency=440.0, amplitude=0.5):
    t = np.arange(int(rate * seconds)) / rate
    return (amplitude * np.sin(2 * np.pi * frequency * t)).astype(np.float32)


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3", "aiff", "au"])
@pytest.mark.parametrize("rate", [8000, 16_000, 44_100])
def test_formats_and_rates_keep_pitch_and_level(tmp_path, suffix, rate):
    path = tmp_path / f"a tone, ähm.{suffix}"
    soundfile.write(path, np.stack([tone(rate, 2), tone(rate, 2, amplitude=0.3)], axis=1), rate)
    wave = data.load_audio(path)
    assert wave.dtype == torch.float32 and wave.ndim == 1
    assert abs(len(wave) - 32_000) <= 2
    middle = wave[8000:24_000].double().numpy()  # a whole second: bins of one hertz
    spectrum = np.abs(np.fft.rfft(middle)) * 2 / len(middle)
    assert spectrum.argmax() == 440
    assert spectrum[440] == pytest.approx(0.4, rel=0.03)  # the mean of both channels


def test_resampling_removes_what_would_fold_back(tmp_path):
    soundfile.write(tmp_path / "high.wav", tone(44_100, 2, 11_000), 44_100)  # would fold to 5 kHz
    assert data.load_audio(tmp_path / "high.wav")[1000:-1000].abs().max() < 0.005


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
def test_a_part_of_a_file_is_that_part(tmp_path, suffix):
    path = tmp_path / f"sweep.{suffix}"
    t = np.arange(44_100 * 6) / 44_100
    soundfile.write(path, (0.5 * np.sin(2 * np.pi * (100 + 300 * t) * t)).astype(np.float32), 44_100)
    whole, part = data.load_audio(path), data.load_audio(path, offset=2.0, duration=1.5)
    assert len(part) == 24_000
    assert (whole[32_000:56_000] - part)[100:-100].abs().max() < 2e-3
    rest = data.load_audio(path, offset=5.0, duration=10)
    assert len(rest) == pytest.approx(16_000, abs=2)


def test_errors_name_the_file_and_the_cause(tmp_path):
    def message(name, *args):
        with pytest.raises(ValueError) as caught:
            data.load_audio(tmp_path / name, *args)
        assert name in str(caught.value)
        return str(caught.value)

    (tmp_path / "text.mp3").write_text("no music here\n" * 50)
    (tmp_path / "empty.wav").touch()
    (tmp_path / "song.m4a").write_bytes(b"\0\0\0 ftypM4A " + bytes(1000))
    soundfile.write(tmp_path / "nan.wav", np.array([0.1, np.nan] * 9000, np.float32), 16_000, subtype="FLOAT")
    soundfile.write(tmp_path / "header.wav", np.zeros(0, np.float32), 16_000)
    soundfile.write(tmp_path / "good.wav", tone(16_000, 1), 16_000)
    soundfile.write(tmp_path / "slow.wav", tone(16_000, 1), 10)
    os.mkfifo(tmp_path / "pipe.wav")
    for name in ("nothing.wav", "pipe.wav"):
        assert "no such file" in message(name)
    for name in ("text.mp3", "empty.wav", "song.m4a", "slow.wav"):
        assert "damaged, or unknown to libsndfile (convert it" in message(name)
    assert "not finite" in message("nan.wav")
    assert "no sound" in message("header.wav")
    assert "no sound from 2 s on" in message("good.wav", 2.0)
    for part in ((-1.0,), (math.nan,), (0.0, 0.0), (0.0, -1.0), (0.0, math.nan)):
        assert "the offset must be at least 0 s" in message("good.wav", *part)


def test_a_damaged_length_does_not_decide_how_much_is_read(tmp_path, monkeypatch):
    """Some damaged files claim terabytes. The sound is read in blocks up to its real end."""
    path = tmp_path / "song.wav"
    soundfile.write(path, np.stack([tone(16_000, 3), tone(16_000, 3, 330.0)], axis=1), 16_000)
    expected, asked = data.load_audio(path), []
    clips = [wave for _, wave in data._clips(path, 0.7)]
    assert len(clips) == 5 and torch.equal(torch.cat(clips), expected)
    monkeypatch.setattr(data, "BLOCK", 7_000)
    assert torch.equal(data.load_audio(path), expected)
    assert torch.equal(data.load_audio(path, 0.5, 2.0), expected[8_000:40_000])
    read = soundfile.SoundFile.read

    def claimed(sound, frames, **options):
        asked.append(frames)
        return read(sound, frames, **options)

    monkeypatch.setattr(soundfile.SoundFile, "read", claimed)
    for frames in (2**39, 2**63 - 1):
        monkeypatch.setattr(soundfile.SoundFile, "frames", property(lambda sound: frames))
        assert torch.equal(data.load_audio(path), expected)
        assert all(map(torch.equal, clips, [wave for _, wave in data._clips(path, 0.7)]))
        with pytest.raises(ValueError, match="song.wav: "):
            data.load_audio(path, 1000.0)  # beyond the real end
    assert max(asked) == 7_000


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
def test_a_mutilated_file_is_read_or_is_a_value_error_that_names_it(tmp_path, suffix):
    path, random = tmp_path / f"broken.{suffix}", np.random.default_rng(3)
    soundfile.write(path, tone(16_000, 2), 16_000)
    whole = np.frombuffer(path.read_bytes(), np.uint8)
    for _ in range(25):
        broken = whole.copy()
        place = random.integers(0, len(whole) if random.random() < 0.5 else 300, 20)
        broken[place] = random.integers(0, 256, 20)
        path.write_bytes(broken[: random.integers(100, len(whole))].tobytes())
        try:
            assert data.load_audio(path).isfinite().all()
        except ValueError as error:
            assert str(path) in str(error)


def test_audio_files_are_sorted_and_links_are_followed_once(tmp_path):
    for name in ("b.wav", "a/z.MP3", "a/note.txt", ".hidden.wav", "c.m4a"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "a/up").symlink_to("..")
    assert data.audio_files(tmp_path) == ["a/z.MP3", "b.wav", "c.m4a"]


# --- worker processes ---------------------------------------------------------------------------------------


CLIP = SimpleNamespace(path="a song")  # a job of probe.py begins with a clip, whose file is its path


def work(number, folder):
    """A job: some are an error, or end the process."""
    if number == "error":
        raise ValueError("job error")
    if number in ("crash", CLIP):
        os._exit(1)
    Path(f"{folder}/{number}").touch()
    return number, torch.get_num_threads()


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_keep_the_order_and_do_not_run_far_ahead(tmp_path, workers):
    results = data.in_workers(work, ((i, tmp_path) for i in range(40)), workers)
    assert [next(results), next(results)] == [(0, 1), (1, 1)]
    assert len(list(tmp_path.iterdir())) <= 2 + 4 * workers
    assert list(results) == [(i, 1) for i in range(2, 40)]


def test_workers_pass_errors_on_and_stop_when_closed(tmp_path):
    assert list(data.in_workers(work, [], 1)) == []
    with pytest.raises(ValueError, match="job error"):
        list(data.in_workers(work, [(0, tmp_path), ("error", tmp_path)], 1))
    results = data.in_workers(work, ((i, tmp_path) for i in range(10_000)), 2)
    next(results)
    results.close()
    assert len(list(tmp_path.iterdir())) < 50


@pytest.mark.parametrize("workers, bad, file_of", [(1, "crash", [lambda *job: job[0]]), (2, CLIP, [])])
def test_a_dead_worker_names_its_job(tmp_path, workers, bad, file_of):
    jobs = [(i if i != 7 else bad, tmp_path) for i in range(30)]
    results = data.in_workers(work, jobs, workers, *file_of)
    assert [next(results)[0] for _ in range(7)] == list(range(7))
    with pytest.raises(ValueError, match="^(crash|a song): the process that worked on it died"):
        next(results)


# --- corpus -------------------------------------------------------------------------------------------------


@pytest.fixture
def in_process(monkeypatch):
    """Jobs are done in this process, which is quicker than to start workers."""
    monkeypatch.setattr(data, "in_workers", lambda function, jobs, *_: (function(*job) for job in jobs))
    return monkeypatch


def finished_shards(out):
    paths = [path for path in out.glob("shards-*/*.jsonl") if path.name.count(".") == 1]
    return {path: path.stat().st_mtime_ns for path in paths}


def crash():
    os._exit(1)


def ones():
    yield 0.0, torch.ones(50_000)


def test_a_build_whose_worker_dies_names_the_file_and_keeps_finished_shards(tmp_path, request):
    readers = {f"{i} é\udce9": ones for i in range(150)}
    with pytest.raises(ValueError, match="^51 é\udce9: the process that worked on it died"):
        data._build(tmp_path / "out", {}, {**readers, "51 é\udce9": crash}, 2)
    finished = finished_shards(tmp_path / "out")
    assert len(finished) >= 25 and not (tmp_path / "out/index.jsonl").exists()
    assert {len(path.read_text().splitlines()) for path in finished} == {2}
    request.getfixturevalue("in_process")
    written, write_file = [], data._write_file

    def note(name, *arguments):
        written.append(name)
        return write_file(name, *arguments)

    request.getfixturevalue("monkeypatch").setattr(data, "_write_file", note)
    corpus = data._build(tmp_path / "out", {}, readers, 1)
    assert corpus.files == list(readers) and len(corpus) == 150 and corpus.mel.shape == (150 * 98, 128)
    assert len(written) == 150 - 2 * len(finished)  # a finished shard is not written again


@pytest.fixture(scope="module")
def music(tmp_path_factory):
    """A folder with good music, and with everything that goes wrong in folders of music."""
    folder = tmp_path_factory.mktemp("music")
    waves = data.synthesize(4, 77)[0].numpy()
    for i, name in enumerate(["b.flac", "a.ogg", "sub/c.mp3"]):
        (folder / name).parent.mkdir(exist_ok=True)
        soundfile.write(folder / name, np.concatenate([waves[i], waves[i + 1]])[: 16_000 * 15], 16_000)
    soundfile.write(folder / "sub/ein Stück – 音楽.wav", tone(8000, 4), 8000)
    name = os.fsencode(folder) + b"/caf\xe9.wav"  # from an old disk, not UTF-8
    shutil.copy(os.fsencode(folder / "sub/ein Stück – 音楽.wav"), name)
    os.mkfifo(folder / "pipe.wav")
    soundfile.write(folder / "six.wav", np.tile(tone(96_000, 12)[:, None], (1, 6)), 96_000)
    soundfile.write(folder / "short.wav", tone(44_100, 0.5), 44_100)
    soundfile.write(folder / "zero.wav", np.zeros(16_000 * 5, np.float32), 16_000)
    (folder / "text.mp3").write_text("no music here\n" * 50)
    (folder / "empty.flac").touch()
    (folder / "song.m4a").write_bytes(bytes(100))
    (folder / "cover.jpg").write_bytes(bytes(100))
    (folder / "._a.ogg").write_bytes(bytes(100))
    soundfile.write(folder / "cut.flac", np.concatenate([waves[0], waves[1], waves[2]]) * 0.5, 16_000)
    whole = (folder / "cut.flac").read_bytes()
    (folder / "cut.flac").write_bytes(whole[: int(len(whole) * 0.6)])
    broken = np.concatenate([waves[3], waves[3], waves[3]])
    broken[16_000 * 12] = np.nan
    soundfile.write(folder / "nan.wav", broken, 16_000, subtype="FLOAT")
    (folder / "sub/up").symlink_to("..")
    (folder / "self.ogg").symlink_to("self.ogg")
    return folder


@pytest.fixture(scope="module")
def corpus(music, tmp_path_factory):
    return data.build_corpus(music, tmp_path_factory.mktemp("corpora") / "music", workers=1)


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_every_clip_is_the_mel_of_its_part_of_its_file(music, corpus):
    clips = {}
    for i in range(len(corpus)):
        name, offset = corpus.files[corpus.file_of[i]], float(corpus.offset[i])
        clips[name, offset] = int(corpus.frames[i])
        rows = corpus.mel[corpus.first[i] : corpus.first[i] + corpus.frames[i]]
        expected = data.mel_spectrogram(data.load_audio(music / name, offset, 10.0)).clamp(max=65504).half()
        assert rows.shape == expected.T.shape
        assert torch.allclose(rows.float(), expected.T.float(), rtol=2e-3, atol=1e-6)
    for name in ("a.ogg", "b.flac"):
        assert clips[name, 0.0] == 313 and clips[name, 10.0] == 1 + 80_000 // 512
    assert clips["six.wav", 0.0] == 313 and ("six.wav", 10.0) not in clips  # the rest is too short
    assert clips["sub/ein Stück – 音楽.wav", 0.0] == 126
    assert clips["caf\udce9.wav", 0.0] == 126
    assert clips["cut.flac", 0.0] == 313 and ("cut.flac", 20.0) not in clips
    assert ("nan.wav", 0.0) in clips and ("nan.wav", 10.0) not in clips and ("nan.wav", 20.0) in clips
    assert not any(name.startswith("sub/up") for name, _ in clips)  # the link leads back to where we are


def test_what_was_skipped_is_listed_with_its_reason(corpus):
    with open(corpus.path / "skipped.csv", newline="", encoding="utf-8") as file:
        rows = {(row["file"], float(row["offset"])): row for row in csv.DictReader(file)}
    kinds = {name: row["kind"] for (name, _), row in rows.items()}
    for name in ("text.mp3", "empty.flac", "song.m4a", "self.ogg", "pipe.wav", "cut.flac"):
        assert kinds[name] == "unreadable"
    assert kinds["short.wav"] == kinds["six.wav"] == "too short"
    assert kinds["zero.wav"] == "silent"
    assert rows["nan.wav", 10.0]["kind"] == "unreadable"
    assert "ffmpeg" in rows["song.m4a", 0.0]["reason"]
    assert not {"cover.jpg", "._a.ogg", "a.ogg", "b.flac"} & set(kinds)
    for kind in ("unreadable", "too short", "silent"):
        assert corpus.totals[kind] == sum(row["kind"] == kind for row in rows.values())


def test_any_number_of_workers_makes_the_same_bytes(music, corpus, tmp_path):
    data.build_corpus(music, tmp_path / "again", workers=3)
    assert contents(tmp_path / "again") == contents(corpus.path)


def start_build(music, out, workers, **options):
    command = [sys.executable, "data.py", str(music), "--out", str(out), "--workers", str(workers)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, **pipes, **options)


def test_killed_at_any_moment_it_continues_to_the_same_bytes(music, corpus, tmp_path):
    out, kept = tmp_path / "killed", {}
    for target in (1, 3, 5):  # shards to wait for: it is killed as soon as they are there
        process = start_build(music, out, 1)
        while process.poll() is None and len(finished_shards(out)) < target:
            time.sleep(0.002)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        process.communicate(timeout=30)  # returns when the workers, who have its stdout, have ended too
        finished = finished_shards(out)
        assert kept.items() <= finished.items()  # a finished shard is not made again
        kept = finished
    folder = next(iter(kept)).parent
    (folder / "2.99999.f16").write_bytes(bytes(1234))  # half a shard of a killed worker
    process = start_build(music, out, 1)
    printed, errors = process.communicate()
    assert process.returncode == 0, errors
    assert f"{len(corpus)} clips" in printed and "unreadable" in printed and "train.py --data" in printed
    assert contents(out) == contents(corpus.path)


@pytest.mark.parametrize("moved", [0, 1, 2])
def test_killed_while_the_corpus_is_put_in_its_place(music, corpus, tmp_path, in_process, moved):
    replace, done = os.replace, []

    def killed(source, target):
        if Path(target).parent == tmp_path / "out":
            if len(done) == moved:
                raise KeyboardInterrupt
            done.append(target)
        replace(source, target)

    with in_process.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            data.build_corpus(music, tmp_path / "out")
    with pytest.raises(ValueError, match="is no usable corpus"):
        data.Corpus(tmp_path / "out")
    data.build_corpus(music, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(corpus.path)


@pytest.mark.parametrize("shards", [0, 1])
def test_ctrl_c_is_one_line(music, tmp_path, shards):
    process = start_build(music, tmp_path / "out", 2, start_new_session=True)
    while not (tmp_path / "out").exists() or len(finished_shards(tmp_path / "out")) < shards:
        time.sleep(0.002)
    if shards == 0:
        time.sleep(0.5)  # the worker processes have started; Python in them has not
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    started = time.time()
    errors = process.communicate()[1]
    assert process.returncode == 130 and time.time() - started < 3
    assert errors.splitlines()[-1] == "Interrupted: the same command continues." and "Traceback" not in errors


def test_two_builds_at_once_do_no_harm(music, corpus, tmp_path):
    processes = [start_build(music, tmp_path / "shared", 1) for _ in range(2)]
    for process in processes:
        printed, errors = process.communicate()
        assert process.returncode == 0, errors
        assert f"{len(corpus)} clips" in printed
    assert contents(tmp_path / "shared") == contents(corpus.path)


def test_a_build_that_another_one_overtakes_opens_its_corpus(music, corpus, tmp_path, monkeypatch):
    def here(function, jobs, workers, file_of):
        for number, job in enumerate(jobs):
            if number == overtaken and workers == 7:  # another build continues this one, and finishes first
                data.build_corpus(music, tmp_path / "slow", workers=1)
            yield function(*job)
        if overtaken == "end" and workers == 7:
            data.build_corpus(music, tmp_path / "slow", workers=1)

    monkeypatch.setattr(data, "in_workers", here)
    for overtaken in (5, "end"):
        assert len(data.build_corpus(music, tmp_path / "slow", workers=7)) == len(corpus)
        assert contents(tmp_path / "slow") == contents(corpus.path)
        shutil.rmtree(tmp_path / "slow")


def test_an_interrupted_build_is_not_continued_with_other_settings(music, corpus, tmp_path, in_process):
    def interrupt(*_):
        raise KeyboardInterrupt

    out = tmp_path / "out"
    with in_process.context() as patch:
        patch.setattr(data, "_join_shards", interrupt)
        for clip_seconds in (5.0, 7.0):
            with pytest.raises(KeyboardInterrupt):
                data.build_corpus(music, out, clip_seconds)
    assert len(os.listdir(out)) == 2
    (out / ".DS_Store").touch()  # hidden files are ignored
    data.build_corpus(music, out)
    (out / ".DS_Store").unlink()
    assert contents(out) == contents(corpus.path)  # the shards of the other settings are removed


def test_a_build_killed_while_it_removed_its_shards_is_finished_by_the_next(music, corpus, copy):
    folder = copy / f"shards-{'0123456789abcdef' * 2}01234567"
    folder.mkdir()
    (folder / "3.f16").write_bytes(bytes(100))
    data.build_corpus(music, copy)
    assert contents(copy) == contents(corpus.path)


@pytest.mark.parametrize("name", ["shards", "shards-of-mine", "shards-0123", "mel.f16"])
def test_a_folder_that_is_not_ours_is_left_alone(music, corpus, copy, tmp_path, name):
    mine = tmp_path / "mine" / name / "song.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("a song")
    for out in (tmp_path / "mine", mine):
        with pytest.raises(ValueError, match=f"{out} exists and is not a corpus"):
            data.build_corpus(music, out)
    assert mine.read_text() == "a song" and os.listdir(tmp_path / "mine") == [name]
    if name != "mel.f16":
        (tmp_path / "mine" / f"shards-{'0' * 40}").mkdir()  # beside the shards of an interrupted build
        with pytest.raises(ValueError, match="mine exists and is not a corpus"):
            data.build_corpus(music, tmp_path / "mine")
        shutil.copytree(tmp_path / "mine", copy, dirs_exist_ok=True)  # beside a finished corpus
        data.build_corpus(music, copy)
        assert (copy / name / "song.txt").read_text() == "a song"


def test_shards_are_consecutive_files_of_one_number(tmp_path, monkeypatch):
    sizes = []

    def collect(function, jobs, *_):
        assert sum([list(readers) for _, readers in jobs], []) == [str(i) for i in range(count)]
        sizes.append((len(jobs), max(len(readers) for _, readers in jobs)))
        raise KeyboardInterrupt

    monkeypatch.setattr(data, "in_workers", collect)
    for count in (1, 63, 200, 10_000):
        with pytest.raises(KeyboardInterrupt):
            data._build(tmp_path / "out", {"files": count}, {str(i): ones for i in range(count)}, 1)
    assert sizes == [(1, 1), (63, 1), (67, 3), (313, 32)]


def test_another_folder_or_other_settings_are_refused(music, corpus, tmp_path, in_process):
    other = tmp_path / "other"
    other.mkdir()
    soundfile.write(other / "x.wav", tone(16_000, 5), 16_000)
    before = contents(corpus.path)
    with pytest.raises(ValueError, match=r"with other settings, .*music0', 'files': 15, .*: delete it"):
        data.build_corpus(other, corpus.path)
    with pytest.raises(ValueError, match=r"with other settings, .*'clip_seconds': 10.0.*: delete it"):
        data.build_corpus(music, corpus.path, clip_seconds=5.0)
    with pytest.raises(ValueError, match="not a corpus"):
        data.build_corpus(music, other)
    assert contents(corpus.path) == before
    assert len(data.build_corpus(other, tmp_path / "built")) == 1
    soundfile.write(other / "x.wav", tone(16_000, 6), 16_000)
    with pytest.raises(ValueError, match="with other settings, .*: delete it"):
        data.build_corpus(other, tmp_path / "built")
    soundfile.write(other / "y.wav", tone(16_000, 5), 16_000)
    with pytest.raises(ValueError, match="with other settings, .*: delete it"):
        data.build_corpus(other, tmp_path / "built")


def test_folders_without_music_are_an_error(music, tmp_path, in_process):
    (tmp_path / "nothing").mkdir()
    for folder in ("nothing", "missing"):
        with pytest.raises(ValueError, match=f"{folder}: there is no such folder, or there are no"):
            data.build_corpus(tmp_path / folder, tmp_path / "x")
    with pytest.raises(ValueError, match="clips of .* s: the shortest are 3.04 s"):
        data.build_corpus(music, tmp_path / "x", clip_seconds=3.0)
    assert not (tmp_path / "x").exists()
    soundfile.write(tmp_path / "nothing/short.wav", tone(16_000, 1), 16_000)
    with pytest.raises(ValueError, match="none of 1 files gave a clip, see skipped.csv.*: build it again"):
        data.build_corpus(tmp_path / "nothing", tmp_path / "x")


@pytest.fixture
def copy(corpus, tmp_path):
    """A copy of the corpus that may be damaged."""
    shutil.copytree(corpus.path, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.mark.parametrize("change", [-(10**9), -256, 256, 1])
def test_a_corpus_whose_sizes_disagree_is_to_be_built_again(music, corpus, copy, change):
    os.truncate(copy / "mel.f16", max(0, corpus.mel.nbytes + change))
    for open_corpus in (data.Corpus, lambda path: data.build_corpus(music, path)):
        with pytest.raises(ValueError, match="copy is no usable corpus .*: build it again"):
            open_corpus(copy)


def test_an_unfinished_or_junk_index_is_an_error(music, copy, tmp_path):
    lines = (copy / "index.jsonl").read_bytes().splitlines(keepends=True)
    junks = [b"".join(lines[:-1]), b"", b"junk", b"\xff\xfe\0", b"[1, 2]\n", b"7"]
    junks += [lines[0] + line for line in (b"{}\n", b"[[1]]", lines[1][:20])]
    for junk in junks:
        (copy / "index.jsonl").write_bytes(junk)
        for open_corpus in (data.Corpus, lambda path: data.build_corpus(music, path)):
            with pytest.raises(ValueError, match="copy is no usable corpus .*: build it again"):
                open_corpus(copy)
    with pytest.raises(ValueError, match="missing is no usable corpus .*No such file"):
        data.Corpus(tmp_path / "missing")


def test_a_corpus_that_is_truncated_while_it_is_open_is_an_error(corpus, copy):
    opened, loaded = data.Corpus(copy), data.Corpus(copy).to("cpu")
    os.truncate(copy / "mel.f16", 100_000)
    with pytest.raises(ValueError, match="was truncated"):  # and not the end of the process
        opened.sample_pairs(range(len(opened)))
    pairs = [c.sample_pairs([0, 1], torch.Generator().manual_seed(0)) for c in (loaded, corpus)]
    assert torch.equal(*pairs)


@pytest.mark.parametrize("arguments", [["missing"], [".", "--clip-seconds", "1"]])
def test_mistakes_on_the_command_line_are_one_sentence(tmp_path, monkeypatch, capsys, arguments):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["data.py", *arguments])
    with pytest.raises(SystemExit) as exit:
        data.main()
    errors = capsys.readouterr().err
    assert exit.value.code == 2
    assert errors.startswith("data.py: ") and errors.count("\n") == 1


# --- pairs --------------------------------------------------------------------------------------------------


def fake_corpus(frames, tmp_path):
    """A corpus in which row r holds the number r in every band, so that a segment tells where it was read."""
    rows = sum(frames)
    mel = np.repeat(np.arange(rows, dtype=np.float16)[:, None], 128, axis=1)
    (tmp_path / "mel.f16").write_bytes(mel.tobytes())
    entry = {"file": "x", "clips": [[0.0, n] for n in frames], "skipped": []}
    entries = [{"made": "by hand"}, entry, {"totals": {}}]
    (tmp_path / "index.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return data.Corpus(tmp_path)


def test_pairs_are_uniform_inside_their_clips_and_independent(tmp_path):
    frames = [96, 100, 313, 97]  # 1, 5, 218 and 2 possible starts
    corpus = fake_corpus(frames, tmp_path)
    assert not corpus.mel.is_cuda and len(corpus) == 4
    ids = torch.tensor([3, 1, 0, 1]).repeat(3000)
    views = corpus.sample_pairs(ids, torch.Generator().manual_seed(0))
    starts = []
    for view in views:
        assert view.shape == (12_000, 128, 96) and view.dtype == torch.float16
        start = view[:, 0, 0].long()
        assert (view == (start[:, None] + torch.arange(96))[:, None, :].half()).all()  # exact below 2048
        starts.append(start - corpus.first[ids])
    for clip in range(4):
        if (ids == clip).any():
            room = frames[clip] - 95
            table = torch.zeros(room, room)
            for a, b in zip(starts[0][ids == clip].tolist(), starts[1][ids == clip].tolist()):
                table[a, b] += 1  # would be an IndexError outside the clip
            expected = table.sum() / room**2
            assert ((table - expected).abs() < 5 * expected.sqrt() + 1e-6).all()  # independent and uniform


def test_pairs_are_the_same_from_map_and_memory_and_in_parts(corpus):
    ids = torch.arange(len(corpus))

    def draw(corpus, part=slice(None)):
        return corpus.sample_pairs(ids, torch.Generator().manual_seed(3), part)

    mapped = draw(corpus)
    assert mapped.shape == (2, len(corpus), 128, 96)
    assert torch.equal(mapped, draw(data.Corpus(corpus.path).to("cpu")))
    assert torch.equal(mapped[:, 2:5], draw(corpus, slice(2, 5)))
    assert not torch.equal(mapped[0], mapped[1])
    for view in corpus.sample_pairs(torch.tensor([0])):  # without a generator
        assert view.shape == (1, 128, 96)


# --- the embedded music -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def embedded():
    return data.synthesize(120, seed=5)


def test_clip_i_depends_on_seed_and_i_alone(embedded):
    waves, labels = embedded
    again, again_labels = data.synthesize(3, seed=5, first=70)
    assert torch.equal(again, waves[70:73])
    for name in labels:
        assert torch.equal(again_labels[name], labels[name][70:73])
    assert not torch.equal(data.synthesize(1, seed=6)[0], waves[:1])


def test_instruments_and_octaves_change_only_where_they_should():
    """Of 40 pieces: the octave of the bass and the instruments of all notes, from one bar to the next."""
    changing = 0
    for number in range(40):
        for change in (0, 0.5):
            rng = np.random.default_rng([5, number])
            piece = data._draw_piece(rng)
            notes = data._compose(piece, rng, change)
            bass = {pitch for _, _, pitch, instrument, _ in notes if instrument == "bass"}
            players = {(level, instrument) for _, _, pitch, instrument, level in notes if pitch is not None}
            stays = not bass or max(bass) - min(bass) < 12
            stays &= len(players) == len({level for level, _ in players})  # the level tells the part
            if change == 0:
                assert stays, number
            else:
                changing += not stays
    assert changing > 30


def test_labels_and_levels(embedded):
    waves, labels = embedded
    assert waves.shape == (120, 160_000) and waves.dtype == torch.float32 and waves.isfinite().all()
    assert labels["key"].unique().numel() >= 20 and 0 <= labels["key"].min() and labels["key"].max() < 24
    assert labels["style"].unique().numel() == len(data.STYLES) >= 8
    assert labels["tags"].shape == (120, len(data.TAGS)) and len(data.TAGS) >= 10
    assert ((labels["tags"] == 0) | (labels["tags"] == 1)).all()
    share = labels["tags"].mean(dim=0)
    assert (share > 0.03).all() and (share < 0.97).all()
    assert torch.equal(labels["tags"][:, data.TAGS.index("minor")], (labels["key"] >= 12).float())
    assert labels["mood"].shape == (120, 2) and labels["mood"].dtype == torch.float32
    assert labels["mood"].abs().max() <= 1 and (labels["mood"].std(dim=0) > 0.3).all()
    level = 10 * waves.square().mean(dim=1).log10()  # dB
    assert level.min() >= -36.1 and level.max() <= -17.9 and level.std() > 3


def test_loudness_tells_neither_key_nor_style(embedded):
    waves, labels = embedded
    level = waves.square().mean(dim=1).log().numpy()
    for name in ("key", "style"):
        groups = [level[labels[name].numpy() == value] for value in labels[name].unique().numpy()]
        assert scipy.stats.f_oneway(*[group for group in groups if len(group) > 1]).pvalue > 0.01, name
    assert scipy.stats.pearsonr(level, labels["mood"][:, 0].numpy()).pvalue < 0.05  # it is part of arousal


def test_the_notes_are_in_the_key_that_the_label_says(embedded):
    """The seven pitch classes of the scale have more power than the other five."""
    waves, labels = embedded
    spectrum = torch.fft.rfft(waves[:, : 2**17]).abs().numpy()
    frequency = np.fft.rfftfreq(2**17, 1 / 16_000)
    audible = (frequency > 100) & (frequency < 2000)
    pitch = np.round(12 * np.log2(frequency[audible] / 440) + 69).astype(int) % 12
    inside = 0
    for i, key in enumerate(labels["key"].tolist()):
        chroma = np.bincount(pitch, spectrum[i, audible] ** 2, 12)
        scale = [(key + step) % 12 for step in (data.MINOR if key >= 12 else data.MAJOR)]
        inside += chroma[scale].mean() > 2 * np.delete(chroma, scale).mean()
    assert inside > 0.9 * 120
