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

import numpy as np
import pytest
import scipy.stats
import soundfile
import torch

import data

ROOT = Path(__file__).parent.parent


# --- mel -------------------------------------------------------------------------------------------------------------


def slow_mel(wave):
    """The front end from its definition, in float64: a matrix of complex exponentials, and triangles drawn bin by bin."""
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
    with pytest.raises(ValueError, match="1024 samples"):
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


# --- sound -----------------------------------------------------------------------------------------------------------


def tone(rate, seconds, frequency=440.0, amplitude=0.5):
    return (amplitude * np.sin(2 * np.pi * frequency * np.arange(int(rate * seconds)) / rate)).astype(np.float32)


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
    assert len(data.load_audio(path, offset=5.0, duration=10)) == pytest.approx(16_000, abs=2)  # what there is


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
    assert "no such file" in message("nothing.wav")
    assert "libsndfile" in message("text.mp3")
    assert "empty" in message("empty.wav")
    assert "convert it first: ffmpeg -i" in message("song.m4a")
    assert "not finite" in message("nan.wav")
    assert "no sound" in message("header.wav")
    assert "no sound from 2 s on" in message("good.wav", 2.0)
    assert "negative" in message("good.wav", -1.0)
    assert "10 Hz" in message("slow.wav")


# --- corpus ----------------------------------------------------------------------------------------------------------


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
    assert clips["six.wav", 0.0] == 313 and ("six.wav", 10.0) not in clips  # the tail is shorter than a segment
    assert clips["sub/ein Stück – 音楽.wav", 0.0] == 126
    assert clips["caf\udce9.wav", 0.0] == 126
    assert clips["cut.flac", 0.0] == 313 and ("cut.flac", 20.0) not in clips
    assert ("nan.wav", 0.0) in clips and ("nan.wav", 10.0) not in clips and ("nan.wav", 20.0) in clips
    assert not any(name.startswith("sub/up") for name, _ in clips)  # the link leads back to where we are


def test_what_was_left_out_is_listed_with_its_reason(corpus):
    with open(corpus.path / "left_out.csv", newline="", encoding="utf-8") as file:
        rows = {(row["file"], float(row["offset"])): row for row in csv.DictReader(file)}
    kinds = {name: row["kind"] for (name, _), row in rows.items()}
    assert kinds["text.mp3"] == kinds["empty.flac"] == kinds["song.m4a"] == kinds["self.ogg"] == kinds["pipe.wav"] == kinds["cut.flac"] == "unreadable"
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


def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(music, corpus, tmp_path):
    out = tmp_path / "killed"
    command = [sys.executable, "data.py", str(music), "--out", str(out), "--workers", "2"]
    kills, index = 0, out / "index.jsonl"
    for target in (1, 4, 9):  # lines of the index to wait for: it is killed as soon as they are there
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and (not index.exists() or index.read_bytes().count(b"\n") < target):
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
    assert kills >= 2
    with open(index, "ab") as file:  # and as if it had been killed in the middle of a line and of the frames before it
        if b"totals" not in index.read_bytes():
            file.write(b'{"file": "zz')
            with open(out / "mel.f16", "ab") as mel:
                mel.write(bytes(1234))
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"{len(corpus)} clips" in done.stdout and "unreadable" in done.stdout and "train.py --data" in done.stdout
    assert contents(out) == contents(corpus.path)


def test_another_folder_or_other_settings_are_refused(music, corpus, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    soundfile.write(other / "x.wav", tone(16_000, 5), 16_000)
    before = contents(corpus.path)
    with pytest.raises(ValueError, match="was built with source"):
        data.build_corpus(other, corpus.path)
    with pytest.raises(ValueError, match="clip_seconds 10.0 and not 5.0"):
        data.build_corpus(music, corpus.path, clip_seconds=5.0)
    with pytest.raises(ValueError, match="not a corpus"):
        data.build_corpus(music, other)
    assert contents(corpus.path) == before
    built = data.build_corpus(other, tmp_path / "built", workers=1)
    assert len(built) == 1
    soundfile.write(other / "y.wav", tone(16_000, 5), 16_000)
    with pytest.raises(ValueError, match="files 1 and not 2"):
        data.build_corpus(other, tmp_path / "built")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ValueError, match="no audio files"):
        data.build_corpus(tmp_path / "nothing", tmp_path / "x")
    with pytest.raises(ValueError, match="no such folder"):
        data.build_corpus(tmp_path / "missing", tmp_path / "x")
    with pytest.raises(ValueError, match="cannot hold a segment"):
        data.build_corpus(other, tmp_path / "x", clip_seconds=3.0)
    soundfile.write(tmp_path / "nothing/short.wav", tone(16_000, 1), 16_000)
    with pytest.raises(ValueError, match="none of 1 files gave a clip"):
        data.build_corpus(tmp_path / "nothing", tmp_path / "x", workers=1)


@pytest.mark.parametrize("size", [0, 100_000, -256, 10**7])
def test_the_command_that_built_a_corpus_mends_it(music, corpus, tmp_path, size):
    for name, content in contents(corpus.path).items():
        (tmp_path / name).write_bytes(content)
    os.truncate(tmp_path / "mel.f16", size if size >= 0 else corpus.mel.nbytes + size)  # the last: longer than it was
    with pytest.raises(ValueError, match="the command that built it mends it"):
        data.Corpus(tmp_path)
    data.build_corpus(music, tmp_path, workers=1)
    assert contents(tmp_path) == contents(corpus.path)


def test_a_corpus_that_lost_its_tail_or_is_not_finished_is_a_sentence(corpus, tmp_path):
    for name, content in contents(corpus.path).items():
        (tmp_path / name).write_bytes(content)
    opened = data.Corpus(tmp_path)
    assert len(opened) == len(corpus)
    loaded = data.Corpus(tmp_path).to("cpu")
    os.truncate(tmp_path / "mel.f16", 100_000)
    with pytest.raises(ValueError, match="has lost its tail"):  # and not the end of the process
        opened.pairs(range(len(opened)))
    assert torch.equal(loaded.pairs([0, 1], torch.Generator().manual_seed(0)), corpus.pairs([0, 1], torch.Generator().manual_seed(0)))
    with pytest.raises(ValueError, match="100,000 bytes"):
        data.Corpus(tmp_path)
    lines = (tmp_path / "index.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "index.jsonl").write_bytes(b"".join(lines[:-1]))
    with pytest.raises(ValueError, match="not finished"):
        data.Corpus(tmp_path)
    with pytest.raises(ValueError, match="is not a corpus"):
        data.Corpus(tmp_path / "missing")


@pytest.mark.parametrize("arguments", [["missing"], [".", "--clip-seconds", "1"]])
def test_mistakes_on_the_command_line_are_one_sentence(tmp_path, arguments):
    done = subprocess.run([sys.executable, ROOT / "data.py", *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("data.py: ") and done.stderr.count("\n") == 1


# --- pairs -----------------------------------------------------------------------------------------------------------


def fake_corpus(frames, tmp_path):
    """A corpus in which row r holds the number r in every band, so that a segment tells where it was read."""
    rows = sum(frames)
    (tmp_path / "mel.f16").write_bytes(np.repeat(np.arange(rows, dtype=np.float16)[:, None], 128, axis=1).tobytes())
    entries = [{"made": "by hand"}, {"file": "x", "clips": [[0.0, n] for n in frames], "left_out": []}, {"totals": {}}]
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
        assert torch.equal(view.long(), (start[:, None] + torch.arange(96))[:, None, :].expand(-1, 128, -1))
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
    draw = lambda c, **k: torch.stack(c.sample_pairs(ids, torch.Generator().manual_seed(3), **k))
    mapped = draw(corpus)
    assert torch.equal(mapped, draw(data.Corpus(corpus.path).to("cpu")))
    assert torch.equal(mapped[:, 2:5], draw(corpus, part=slice(2, 5)))
    assert not torch.equal(mapped[0], mapped[1])
    for view in corpus.sample_pairs(torch.tensor([0])):  # without a generator
        assert view.shape == (1, 128, 96)


# --- the embedded music ----------------------------------------------------------------------------------------------


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


def test_labels_and_levels(embedded):
    waves, labels = embedded
    assert waves.shape == (120, 160_000) and waves.dtype == torch.float32 and waves.isfinite().all()
    assert labels["key"].unique().numel() >= 20 and 0 <= labels["key"].min() and labels["key"].max() < 24
    assert labels["style"].unique().numel() == len(data.STYLES) >= 10
    assert labels["tags"].shape == (120, len(data.TAGS)) and len(data.TAGS) >= 12
    assert ((labels["tags"] == 0) | (labels["tags"] == 1)).all()
    share = labels["tags"].mean(dim=0)
    assert (share > 0.03).all() and (share < 0.97).all()
    assert torch.equal(labels["tags"][:, data.TAGS.index("minor")], (labels["key"] >= 12).float())
    assert labels["mood"].shape == (120, 2) and labels["mood"].abs().max() <= 1 and (labels["mood"].std(dim=0) > 0.3).all()
    level = 10 * waves.square().mean(dim=1).log10()  # dB
    assert level.min() >= -36.1 and level.max() <= -17.9 and level.std() > 3


def test_loudness_tells_neither_key_nor_style(embedded):
    waves, labels = embedded
    level = waves.square().mean(dim=1).log().numpy()
    for name in ("key", "style"):
        groups = [level[labels[name].numpy() == value] for value in labels[name].unique().numpy()]
        assert scipy.stats.f_oneway(*[group for group in groups if len(group) > 1]).pvalue > 0.01, name
    assert scipy.stats.pearsonr(level, labels["mood"][:, 0].numpy()).pvalue < 0.05  # but arousal, as it should


def test_the_notes_are_in_the_key_that_the_label_says(embedded):
    """Sound at the pitches of the scale, tonic at the bottom, must outweigh sound at the other five pitch classes."""
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
