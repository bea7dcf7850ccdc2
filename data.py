"""Stage 1 of Myna: sound -> mel spectrogram -> corpus -> pairs of segments.

A folder of music goes in. Every file is decoded to 16 kHz mono, cut into clips of 10 seconds and turned into mel power
spectrograms (paper, section 3.6), which are kept in one memory-mapped array on disk. Out come, for any clips asked for,
two random 3-second segments of each: the positive pairs of section 3.2 (Algorithm 1, lines 5-7).

    python data.py MUSIC_FOLDER --out corpora/mine       decode once; interrupted, the same command goes on

With no music at hand, `synthesize` composes some: short labelled pieces in all 24 keys and twelve styles.
Next stage: model.py, which knows nothing of this file but the shape of a segment, (128 mel bands, 96 frames).
"""

import argparse
import csv
import hashlib
import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import warnings
from array import array
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
import torch
from scipy.signal import resample_poly
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows: two builds of one corpus at the same time are then not noticed
    fcntl = None

SAMPLE_RATE = 16_000  # Hz (section 3.6)
N_FFT = 2048  # samples in a window: 128 ms
HOP = 512  # samples between frames: 32 ms, 31.25 frames a second
N_MELS = 128  # bands (section 3.6)
FRAMES = 96  # frames in a segment: "three seconds" (section 3.2)
SEGMENT_SECONDS = (FRAMES - 1) * HOP / SAMPLE_RATE  # 3.04 s, the shortest clip with 96 centred frames
FLOAT16_MAX = 65_504.0
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # that this process may use

# ----------------------------------------------------------------------------------------------------------------------
# Sound
# ----------------------------------------------------------------------------------------------------------------------

AUDIO_SUFFIXES = {".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".aifc", ".au", ".snd", ".caf"}
FOREIGN_SUFFIXES = {".m4a", ".mp4", ".aac", ".wma", ".webm", ".mka", ".ape", ".wv", ".mpc", ".dsf", ".ac3"}


@contextmanager
def _open_sound(path):
    """An open `soundfile.SoundFile`, with everything that can go wrong as a ValueError naming the file and the cause."""
    if not os.path.isfile(path):
        raise ValueError(f"{path}: there is no such file")
    if os.path.getsize(path) == 0:
        raise ValueError(f"{path}: the file is empty")
    convert = f'convert it first: ffmpeg -i "{path}" "{Path(path).with_suffix(".wav")}"'
    try:
        with soundfile.SoundFile(os.fsencode(path) if os.name == "posix" else str(path)) as sound:
            if not 1_000 <= sound.samplerate <= 1_000_000:
                raise ValueError(f"{path}: a sample rate of {sound.samplerate} Hz makes no sense for music")
            if sound.frames > 2**40:  # what libsndfile says of a stream
                raise ValueError(f"{path}: does not say how long it is, {convert}")
            yield sound
    except (OSError, TypeError, soundfile.SoundFileError) as error:
        foreign = Path(path).suffix.lower() in FOREIGN_SUFFIXES
        damaged = "not sound in a format that libsndfile knows, or damaged"
        cause = f"libsndfile does not read this format, {convert}" if foreign else damaged
        raise ValueError(f"{path}: {cause}") from error


def _read(sound, start, count):
    """`count` samples (-1: all) of an open sound from `start` on: (samples, channels) float32, less where it ends.

    A quarter second before them is decoded too, and dropped: a frame of an MP3 borrows bits from the frames before it.
    """
    start = min(start, sound.frames)
    lead = min(start, sound.samplerate // 4)
    sound.seek(start - lead)
    return sound.read(count if count < 0 else lead + count, dtype="float32", always_2d=True)[lead:]


def _mono_16k(block, rate):
    """(samples, channels) float32 at `rate` Hz -> (samples,) float32 tensor at 16 kHz: mean over channels, polyphase filter."""
    wave = torch.from_numpy(block).mean(dim=1)
    if rate != SAMPLE_RATE:
        common = math.gcd(rate, SAMPLE_RATE)
        wave = torch.from_numpy(resample_poly(wave.numpy(), SAMPLE_RATE // common, rate // common))
    return wave


def load_audio(path, offset=0.0, duration=None):
    """Read a sound file, or `duration` seconds of it from `offset` seconds on (no more than that is decoded).

    Reads what libsndfile reads: WAV, FLAC, OGG, MP3, AIFF, AU, ... Returns (samples,) float32, mono, 16 kHz.
    Raises ValueError, naming the file and the cause, when it cannot be read, is empty there, or is not finite.
    """
    if not 0 <= offset < math.inf or (duration is not None and not 0 < duration < math.inf):
        raise ValueError(f"{path}: offset {offset} s and duration {duration} s must be finite, not negative, and not empty")
    with _open_sound(path) as sound:
        count = -1 if duration is None else round(duration * sound.samplerate)
        block = _read(sound, round(offset * sound.samplerate), count)
        if not len(block):
            raise ValueError(f"{path}: no sound from {offset:g} s on (the file holds {sound.frames / sound.samplerate:g} s)")
        wave = _mono_16k(block, sound.samplerate)
    if not wave.isfinite().all():
        raise ValueError(f"{path}: holds samples that are not finite numbers")
    return wave


# ----------------------------------------------------------------------------------------------------------------------
# Mel spectrogram
# ----------------------------------------------------------------------------------------------------------------------


def mel_filterbank():
    """(128, 1025) float32: row m weighs the STFT bins 0..1024 (0 Hz to 8 kHz) into mel band m.

    Slaney's scale, as in librosa's `filters.mel`: linear below 1 kHz (3 mel per 200 Hz), logarithmic above (27 mel per
    factor of 6.4). Triangles on 130 points evenly spaced in mel, each divided by half its width in Hz (equal areas).
    """
    bins = np.arange(N_FFT // 2 + 1) * SAMPLE_RATE / N_FFT  # Hz
    top = 15 + 27 * math.log(SAMPLE_RATE / 2 / 1000) / math.log(6.4)  # 8 kHz in mel; 15 mel is 1 kHz
    mel = np.linspace(0, top, N_MELS + 2)
    edges = np.where(mel < 15, mel * 200 / 3, 1000 * 6.4 ** ((mel - 15) / 27))  # Hz
    low, centre, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    triangles = np.minimum((bins - low) / (centre - low), (high - bins) / (high - centre)).clip(min=0)
    return torch.from_numpy(triangles * 2 / (high - low)).float()


@lru_cache
def _front_end(device):
    return torch.hann_window(N_FFT, device=device), mel_filterbank().to(device)


def mel_spectrogram(wave):
    """Mel power of sound at 16 kHz: (..., samples) -> (..., 128, 1 + samples // 512), on the device of `wave`.

    Windows of 2048 samples (periodic Hann) centred on every 512th, the ends mirrored, squared magnitude, no logarithm:
    the defaults of nnAudio's MelSpectrogram, which the authors use. Raises ValueError below 1025 samples (nothing to mirror).
    """
    wave = torch.as_tensor(wave, dtype=torch.float32)
    if wave.shape[-1] <= N_FFT // 2:
        raise ValueError(f"a sound of {wave.shape[-1]} samples is shorter than half a window ({N_FFT // 2 + 1} samples)")
    window, filterbank = _front_end(wave.device)
    spectrum = torch.stft(wave.reshape(-1, wave.shape[-1]), N_FFT, HOP, window=window, pad_mode="reflect", return_complex=True)
    power = spectrum.real.square() + spectrum.imag.square()  # (B, 1025, T)
    return (filterbank @ power).reshape(*wave.shape[:-1], N_MELS, -1)


def segments(mel):
    """Consecutive whole segments of one clip: (128, frames) -> (n, 128, 96).

    The remainder is dropped; a clip shorter than a segment is filled up with zeros to one (the authors' evaluation code).
    """
    mel = torch.nn.functional.pad(mel, (0, max(0, FRAMES - mel.shape[-1])))
    return mel.unfold(-1, FRAMES, FRAMES).movedim(1, 0)


# ----------------------------------------------------------------------------------------------------------------------
# Corpus: building it
#
#   mel.f16        every clip's frames, one after the other: (frames, 128) float16, no header
#   index.jsonl    line 1: the settings; then one line a source file: its clips [offset in s, frames] and what was left out
#                  [offset in s, reason]; last line: the totals (its presence says that the corpus is finished)
#   left_out.csv   the same "left out" for people
#
# The index is written as the build goes on, after the frames that it speaks of, so it is also the journal of the build:
# whatever mel.f16 holds beyond the index belongs to a file that was not finished, and is cut off when the build goes on.
# ----------------------------------------------------------------------------------------------------------------------


def _walk(folder):
    """Audio files below a folder, as sorted paths relative to it. Links are followed, each folder is entered once."""
    found, entered = [], set()
    for root, folders, names in os.walk(folder, followlinks=True):
        if os.path.realpath(root) in entered:  # a link that leads back up
            folders.clear()
            continue
        entered.add(os.path.realpath(root))
        folders.sort()
        found += [
            os.path.relpath(os.path.join(root, name), folder)
            for name in names
            if Path(name).suffix.lower() in AUDIO_SUFFIXES | FOREIGN_SUFFIXES and not name.startswith(".")
        ]
    return sorted(found)


def _file_clips(path, clip_seconds):
    """The clips of one file, (offset in seconds, wave), read one at a time so that a long file needs no more memory."""
    with _open_sound(path) as sound:
        length, start = round(clip_seconds * sound.samplerate), 0
        while len(block := _read(sound, start, length)):
            yield start / sound.samplerate, block, sound.samplerate
            start += len(block)
    if start == 0:
        raise ValueError(f"{path}: holds no sound")


def _embedded_clips(seed, number):
    """Clip `number` of the embedded music as if it were a file with one clip."""
    yield 0.0, synthesize(1, seed, number)[0].numpy().T, SAMPLE_RATE


def _transform(name, clips, arguments, folder):
    """In a worker: one source, clip by clip, into a file of frames. Returns its entry in the index, that file, the seconds."""
    entry, seconds = {"file": name, "clips": [], "left_out": []}, 0.0
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".part", delete=False) as out:
        try:
            for offset, block, rate in clips(*arguments):
                wave = _mono_16k(block, rate)
                seconds += len(block) / rate
                if not wave.isfinite().all():
                    flaw = "unreadable", "samples that are not finite numbers"
                elif len(wave) < (FRAMES - 1) * HOP:
                    flaw = "too short", f"{len(wave) / SAMPLE_RATE:.2f} s, and a segment is {SEGMENT_SECONDS:.2f} s"
                elif not (mel := mel_spectrogram(wave).clamp(max=FLOAT16_MAX).half()).any():
                    flaw = "silent", "digital silence"
                else:
                    out.write(mel.T.contiguous().numpy())  # (T, 128)
                    entry["clips"].append([offset, mel.shape[1]])
                    continue
                entry["left_out"].append([offset, *flaw])
        except ValueError as error:  # what is left of the file cannot be read; the clips before the break are good
            reason = str(error).removeprefix(f"{arguments[0]}: ")
            entry["left_out"].append([seconds, "unreadable", reason])
    return entry, Path(out.name), seconds


def _start_worker():
    """One thread each; silent, since libmpg123 chats on stderr; deaf to Ctrl-C, which the parent handles; gone when it is."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()


def start_workers(count):
    """A pool of so many processes, deaf to Ctrl-C from their birth on, before they could say so themselves."""
    os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker")  # of what is left when all ends at once; it tidies up
    pool = ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), initializer=_start_worker)
    if threading.current_thread() is threading.main_thread():  # no other can
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # which is inherited
        for _ in range(count):
            pool.submit(int)  # starts one
        signal.signal(signal.SIGINT, handler)
    return pool


def _read_index(path):
    """The entries of an index, each with the byte at which it ends. A last line that a kill cut short is not an entry."""
    end = 0
    with open(path, "rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                return
            end += len(line)
            yield json.loads(line), end


def _build(out, settings, sources, workers):
    """Transform `sources` (name, generator of clips, its arguments) into the corpus `out`, going on where it was."""
    out, index_path, mel_path = Path(out), Path(out) / "index.jsonl", Path(out) / "mel.f16"
    if out.exists() and not index_path.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not a corpus: choose another name")
    out.mkdir(parents=True, exist_ok=True)
    with open(index_path, "ab") as index, open(mel_path, "ab") as mel:
        if fcntl:
            try:
                fcntl.flock(index, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"{out} is being built by another process; waiting for it", file=sys.stderr)
                fcntl.flock(index, fcntl.LOCK_EX)
        entries = _read_index(index_path)
        found, keep = next(entries, (settings, 0))
        if found != settings:
            other = [name for name in settings if found.get(name) != settings[name] and name != "names_and_sizes"]
            differs = ", ".join(f"{name} {found.get(name)!r} and not {settings[name]!r}" for name in other)
            advice = "delete it, or build another with `python data.py FOLDER --out NAME`"
            raise ValueError(f"{out} was built with {differs or 'files of other names or sizes'}: {advice}")
        frames, done, room = 0, 0, mel_path.stat().st_size / (N_MELS * 2)
        for entry, end in entries:
            if "totals" in entry and frames == room:
                return Corpus(out)
            after = frames + sum(length for _, length in entry.get("clips", ()))
            if "totals" in entry or after > room:  # the frames have lost their tail: on from where they end
                break
            frames, done, keep = after, done + 1, end
        index.truncate(keep)
        mel.truncate(frames * N_MELS * 2)
        for part in out.glob("*.part"):
            part.unlink()
        if not keep:
            index.write(json.dumps(settings).encode() + b"\n")

        started, seconds = time.monotonic(), 0.0
        pool = start_workers(workers)
        with tqdm(total=settings["files"], initial=done, unit="file", desc=str(out), smoothing=0) as bar:
            jobs = ((source[0], pool.submit(_transform, *source, out)) for source in islice(sources, done, None))
            pending = deque(islice(jobs, 4 * workers))  # enough ahead to keep the workers busy, no more
            try:
                while pending:
                    entry, part, length = pending[0][1].result()
                    pending.popleft()
                    pending.extend(islice(jobs, 1))
                    with open(part, "rb") as file:
                        shutil.copyfileobj(file, mel)
                    mel.flush()  # the frames first, then the line that vouches for them
                    index.write(json.dumps(entry).encode() + b"\n")
                    index.flush()
                    part.unlink()
                    seconds += length
                    speed = seconds / (time.monotonic() - started)
                    bar.set_postfix_str(f"{seconds / 3600:.2f} h of sound, {speed:.0f}x real time", refresh=False)
                    bar.update()
            except BrokenProcessPool as error:
                suspects = ", ".join(name for name, _ in list(pending)[:workers])
                advice = f"move the file away that it died of, one of {suspects}, and start again"
                raise ValueError(f"a decoding process died: {advice}") from error
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

        totals, entries = Counter(), _read_index(index_path)
        next(entries, None)
        with open(out / "left_out.part", "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            table = csv.writer(file)
            table.writerow(["file", "offset", "kind", "reason"])
            for entry, _ in entries:
                totals += Counter(clips=len(entry["clips"]), frames=sum(length for _, length in entry["clips"]))
                for left_out in entry["left_out"]:
                    table.writerow([entry["file"], *left_out])
                    totals[left_out[1]] += 1
        os.replace(out / "left_out.part", out / "left_out.csv")
        os.fsync(mel.fileno())
        index.write(json.dumps({"totals": totals}).encode() + b"\n")
    return Corpus(out)


def build_corpus(audio_dir, out, clip_seconds=10.0, workers=None):
    """Decode every audio file below `audio_dir` once, into the corpus folder `out`. Returns the opened `Corpus`.

    Clips are at most `clip_seconds` long and each is transformed by itself (10 s are 313 frames). A build that was
    interrupted goes on, a finished one is opened; the bytes are the same either way, and for any number of `workers`
    (processes; default: one a core). Raises ValueError when there is no audio, when nothing of it can be read, and when
    `out` was built from something else.
    """
    folder = Path(audio_dir).resolve()
    if not folder.is_dir():
        raise ValueError(f"{audio_dir}: there is no such folder")
    if not SEGMENT_SECONDS <= clip_seconds < math.inf:
        raise ValueError(f"clips of {clip_seconds:g} s cannot hold a segment: take at least {SEGMENT_SECONDS:.2f} s")
    names = _walk(folder)
    if not names:
        raise ValueError(f"{audio_dir}: no audio files below this folder (looked for {' '.join(sorted(AUDIO_SUFFIXES))})")
    size = lambda path: path.stat().st_size if path.exists() else 0
    listing = "".join(f"{name}\0{size(folder / name)}\0" for name in names)
    settings = {
        "source": str(folder),
        "files": len(names),
        "names_and_sizes": hashlib.sha1(listing.encode(errors="surrogateescape")).hexdigest(),
        "clip_seconds": float(clip_seconds),
        "front_end": [SAMPLE_RATE, N_FFT, HOP, N_MELS],
    }
    sources = ((name, _file_clips, (str(folder / name), clip_seconds)) for name in names)
    return _build(out, settings, sources, workers or CORES)


def build_embedded_corpus(n_clips, seed, out, workers=None):
    """The first `n_clips` of the embedded music (see `synthesize`) as a corpus in the folder `out`."""
    settings = {"source": f"embedded music, seed {seed}", "files": n_clips, "front_end": [SAMPLE_RATE, N_FFT, HOP, N_MELS]}
    sources = ((f"clip {number}", _embedded_clips, (seed, number)) for number in range(n_clips))
    return _build(out, settings, sources, workers or CORES)


# ----------------------------------------------------------------------------------------------------------------------
# Corpus: using it
# ----------------------------------------------------------------------------------------------------------------------


class Corpus:
    """A finished corpus, opened from its folder: `mel` (frames, 128) float16 and, for clip i, where it lies and came from.

    `mel` is a memory map until `.to(device)` loads it. `first[i]` and `frames[i]` (long tensors) say which rows are clip i's;
    `files[file_of[i]]` and `offset[i]` (seconds) which sound. Raises ValueError when the folder is not a finished corpus.
    """

    def __init__(self, path):
        path = self.path = Path(path)
        if not (path / "index.jsonl").is_file():
            raise ValueError(f"{path} is not a corpus: make one with `python data.py MUSIC_FOLDER --out {path}`")
        entries = (entry for entry, _ in _read_index(path / "index.jsonl"))
        self.settings, self.files, self.totals = next(entries, {}), [], None
        clips = array("d")  # file number, offset, frames of one clip after the other
        for entry in entries:
            if "totals" in entry:
                self.totals = entry["totals"]
                break
            for offset, frames in entry["clips"]:
                clips.extend((len(self.files), offset, frames))
            self.files.append(entry["file"])
        if self.totals is None:
            raise ValueError(f"{path} is not finished: give the command that began it again, it goes on where it was")
        if not clips:
            raise ValueError(f"{path}: none of {len(self.files)} files gave a clip; {path / 'left_out.csv'} says why")
        table = torch.frombuffer(clips, dtype=torch.float64).view(-1, 3)
        self.file_of, self.offset, self.frames = table[:, 0].long(), table[:, 1].clone(), table[:, 2].long()
        self.first = self.frames.cumsum(0) - self.frames
        rows = int(self.frames.sum())
        size = (path / "mel.f16").stat().st_size if (path / "mel.f16").is_file() else 0
        if size != rows * N_MELS * 2:
            expected = rows * N_MELS * 2
            advice = "the command that built it mends it"
            raise ValueError(f"{path / 'mel.f16'} holds {size:,} bytes and its index speaks of {expected:,}: {advice}")
        with warnings.catch_warnings():  # torch says that it could not write to this; nobody wants to
            warnings.simplefilter("ignore", UserWarning)
            array_on_disk = np.memmap(path / "mel.f16", np.float16, "r", shape=(rows, N_MELS))
            self.mel, self.file = torch.from_numpy(array_on_disk), array_on_disk.base

    def __len__(self):
        return len(self.first)

    def to(self, device):
        """Load the whole corpus into the memory of `device`. Returns the corpus itself."""
        self.mel, self.file = self.mel.to(device, copy=True), None
        self.first, self.frames = self.first.to(device), self.frames.to(device)
        return self

    def sample_pairs(self, clip_ids, generator=None, part=slice(None)):
        """Two independent random segments of each clip in `clip_ids` (B,): two (B, 128, 96) float16 on the corpus's device.

        `part` draws for the whole batch but reads only that slice of it, for processes that share a batch.
        """
        return self.pairs(clip_ids, generator, part)

    def pairs(self, clip_ids, generator=None, part=slice(None)):
        """`sample_pairs` as one tensor, (2, B, 128, 96)."""
        if self.file and self.file.size() < self.mel.nbytes:  # to read beyond the end would be the end of the process
            raise ValueError(f"{self.path / 'mel.f16'} has lost its tail under way: the command that built it mends it")
        device = self.mel.device
        clip_ids = torch.as_tensor(clip_ids).to(device)
        where = generator.device if generator else "cpu"
        chance = torch.rand(2, len(clip_ids), generator=generator, dtype=torch.float64, device=where).to(device)
        room = self.frames[clip_ids] - FRAMES + 1  # possible starts
        starts = self.first[clip_ids] + (chance * room).long()  # (2, B)
        rows = starts[:, part, None] + torch.arange(FRAMES, device=device)  # (2, B, 96)
        frames = self.mel.index_select(0, rows.flatten())  # one gather of whole rows, 256 bytes each
        return frames.view(*rows.shape, N_MELS).transpose(2, 3)


# ----------------------------------------------------------------------------------------------------------------------
# The embedded music: ten-second pieces that are composed, played and labelled by chance
#
# A clip is a key, a style, a tempo, a tuning, a brightness and a loudness, all drawn independently of each other but for
# what makes a style a style. Key and style are told by nothing but the notes, the instruments and the rhythm.
# ----------------------------------------------------------------------------------------------------------------------

KEYS = tuple(f"{tonic} {mode}" for mode in ("major", "minor") for tonic in "C Db D Eb E F Gb G Ab A Bb B".split())
MAJOR, MINOR = (0, 2, 4, 5, 7, 9, 11), (0, 2, 3, 5, 7, 8, 10)  # semitones above the tonic
PROGRESSIONS = {  # scale degrees, 0 is the tonic
    MAJOR: ((0, 4, 5, 3), (0, 3, 4, 0), (0, 5, 3, 4), (1, 4, 0, 0), (0, 3, 0, 4), (5, 3, 0, 4), (0, 2, 3, 4), (3, 0, 4, 0)),
    MINOR: ((0, 5, 2, 6), (0, 3, 4, 0), (0, 6, 5, 4), (0, 3, 0, 4), (3, 4, 0, 0), (0, 5, 3, 4), (5, 6, 0, 0), (0, 0, 3, 4)),
}
HARMONIC = 1 / np.arange(1, 41)
INSTRUMENTS = {  # amplitudes of the harmonics; attack and decay in seconds (decay 0: sustained); depth of vibrato
    "piano": (HARMONIC**1.5, 0.005, 0.9, 0),
    "guitar": (HARMONIC**1.1, 0.003, 0.4, 0),
    "harp": (HARMONIC**2, 0.003, 0.7, 0),
    "marimba": (np.array([1, 0, 0, 0.6, 0, 0, 0, 0, 0, 0.2]), 0.002, 0.2, 0),
    "bell": (np.array([1, 0.3, 0.6, 0, 0.4, 0, 0.3, 0, 0, 0.25]), 0.002, 1.2, 0),
    "organ": (np.array([1, 0.9, 0.7, 0.6, 0, 0.4, 0, 0.4]), 0.02, 0, 0),
    "strings": (HARMONIC, 0.12, 0, 0.006),
    "flute": (np.array([1, 0.4, 0.15, 0.08, 0.03]), 0.06, 0, 0.008),
    "clarinet": (HARMONIC * (np.arange(40) % 2 == 0), 0.04, 0, 0.002),
    "brass": (HARMONIC * np.minimum(1, np.arange(1, 41) / 4), 0.05, 0, 0.004),
    "saw": (HARMONIC**0.8, 0.01, 0, 0),
    "square": (HARMONIC**0.9 * (np.arange(40) % 2 == 0), 0.01, 0.8, 0),
    "bass": (HARMONIC**1.7, 0.008, 0.6, 0),
}


class Style(NamedTuple):
    """What makes a style: how often it is in minor, how fast, who plays, and when ('x' an onset, one sign a sixteenth)."""

    tempo: tuple  # beats a minute, lowest and highest
    minor: float  # share of clips in a minor key
    swing: float  # how late the off-beats come, as a share of an eighth
    chords: tuple  # instruments to choose from
    melody: tuple
    chord_rhythm: str  # one bar; twelve signs make a waltz
    bass_rhythm: str
    arpeggio: float  # share of clips with one
    kick: str  # drums, '' for none
    snare: str
    hat: str


# fmt: off
STYLES = {
    "house":   Style((112, 134), 0.6, 0.0, ("organ", "saw", "piano"), ("saw", "square"),
                     "..x..x....x..x..", "..x...x...x...x.", 0.3, "x...x...x...x...", "....x.......x...", "..x...x...x...x."),
    "trance":  Style((122, 146), 0.7, 0.0, ("saw", "strings"), ("saw", "square"),
                     "x...............", "..xx..xx..xx..xx", 0.9, "x...x...x...x...", "....x.......x...", "..x...x...x...x."),
    "rock":    Style((96, 150), 0.4, 0.0, ("guitar", "organ"), ("guitar", "saw"),
                     "x.x.x.x.x.x.x.x.", "x.x.x.x.x.x.x.x.", 0.1, "x.......x.x.....", "....x.......x...", "x.x.x.x.x.x.x.x."),
    "reggae":  Style((66, 96), 0.5, 0.2, ("guitar", "organ", "piano"), ("organ", "brass"),
                     "....x.......x...", "x..x....x..x..x.", 0.1, "........x.......", "........x.......", "x.x.x.x.x.x.x.x."),
    "swing":   Style((104, 176), 0.4, 0.33, ("piano", "guitar"), ("clarinet", "brass", "piano"),
                     "x.....x.....x...", "x...x...x...x...", 0.1, "x...............", "....x.......x...", "x...x.x.x...x.x."),
    "latin":   Style((88, 128), 0.6, 0.0, ("piano", "guitar"), ("brass", "flute"),
                     "x..x..x...x.x...", "x.....x.x.....x.", 0.2, "x.......x.......", "x..x..x...x.x...", "xxxxxxxxxxxxxxxx"),
    "waltz":   Style((84, 156), 0.4, 0.0, ("strings", "piano", "harp"), ("strings", "clarinet", "flute"),
                     "....x...x...", "x...........", 0.2, "", "", ""),
    "folk":    Style((76, 124), 0.4, 0.1, ("guitar", "harp"), ("flute", "guitar", "strings"),
                     "x...x.xx..x.x.x.", "x.......x.......", 0.5, "", "", ""),
    "chamber": Style((60, 108), 0.5, 0.0, ("strings", "clarinet"), ("strings", "flute", "clarinet"),
                     "x.......x.......", "x...x...x...x...", 0.2, "", "", ""),
    "march":   Style((92, 126), 0.2, 0.0, ("brass", "clarinet"), ("brass", "flute"),
                     "..x...x...x...x.", "x...x...x...x...", 0.0, "x...x...x...x...", "x.x.xxx.x.x.xxxx", ""),
    "lullaby": Style((54, 90), 0.3, 0.0, ("bell", "harp", "marimba"), ("bell", "flute", "marimba"),
                     "x...............", "x.......x.......", 0.8, "", "", ""),
    "ambient": Style((54, 80), 0.6, 0.0, ("strings", "organ", "bell"), ("flute", "bell"),
                     "x...............", "x...............", 0.4, "", "", ""),
}
# fmt: on
TAGS = tuple(
    "drums bass melody arpeggio fast slow bright dark minor swing sustained plucked wind electronic high noisy".split()
)


def _tone(frequency, seconds, instrument, tilt):
    """One note: a period drawn by an inverse FFT of its harmonics below 7.8 kHz, read round and round, under an envelope."""
    amplitudes, attack, decay, vibrato = INSTRUMENTS[instrument]
    amplitudes = amplitudes[: int(7800 / frequency)]
    spectrum = np.zeros(1025, np.complex64)
    spectrum[1 : len(amplitudes) + 1] = amplitudes * np.arange(1, len(amplitudes) + 1) ** tilt
    period = np.fft.irfft(-1j * spectrum / np.linalg.norm(spectrum), 2048) * 1024
    t = np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    cycles = frequency * t
    if vibrato:
        cycles += frequency * vibrato * np.sin(2 * np.pi * 5.5 * t) / (2 * np.pi * 5.5)
    note = period[(cycles * 2048).astype(np.int64) & 2047]
    envelope = np.minimum(np.minimum(1, t / attack), (seconds - t) / 0.02)
    return note * (envelope * np.exp(-t / decay) if decay else envelope)


def _drum(kind, rng):
    """One stroke: a falling sine (kick), noise with a tone in it (snare), or the differences of noise (hat)."""
    t = np.arange(int(0.25 * SAMPLE_RATE)) / SAMPLE_RATE
    noise = rng.standard_normal(len(t))
    if kind == "kick":
        return 3 * np.sin(2 * np.pi * (rng.uniform(45, 60) * t - 6 * np.exp(-t * 30) / 2)) * np.exp(-t * 14)
    if kind == "snare":
        return (noise + np.sin(2 * np.pi * rng.uniform(160, 220) * t)) * np.exp(-t * rng.uniform(15, 30))
    return np.diff(noise, prepend=0) * np.exp(-t * rng.uniform(40, 90)) * 0.5


def _clip(rng):
    """Compose and play one clip. Returns the wave (160000,) float32 and its labels: key, style, tags, mood."""
    name = tuple(STYLES)[rng.integers(len(STYLES))]
    style = STYLES[name]
    tonic, minor = int(rng.integers(12)), bool(rng.random() < style.minor)
    tempo, tuning, tilt = rng.uniform(*style.tempo), rng.uniform(-30, 30), rng.uniform(-0.3, 0.2)
    loudness = rng.uniform(-36, -18)  # dB of full scale, as root mean square
    sixteenth, bar = 15 / tempo, len(style.chord_rhythm)
    start = -rng.uniform(0, bar) * sixteenth  # the clip is cut out of a piece anywhere
    n = 10 * SAMPLE_RATE
    wave, pitches, players = np.zeros(n), [], set()

    def play(level, step, sound):  # returns whether any of it falls into the clip
        late = style.swing * 2 * sixteenth if step % 4 == 2 else 0
        at = int((start + step * sixteenth + late + rng.normal(0, 0.006)) * SAMPLE_RATE)
        sound = sound[max(0, -at) : max(0, n - at)]
        if len(sound):
            wave[max(0, at) : max(0, at) + len(sound)] += level * rng.uniform(0.7, 1) * sound
        return len(sound) > 0

    def tone(level, step, steps, pitch, instrument):  # pitch is a MIDI number
        frequency = 440 * 2 ** ((pitch - 69 + tuning / 100) / 12)
        if play(level, step, _tone(frequency, max(0.08, steps * sixteenth), instrument, tilt)):
            pitches.append(pitch)
            players.add(str(instrument))

    has = {
        "bass": rng.random() < 0.8,
        "melody": rng.random() < 0.8,
        "arpeggio": rng.random() < style.arpeggio,
        "drums": bool(style.kick) and rng.random() < 0.85,
    }
    arpeggio_instrument = rng.choice(("piano", "harp", "square", "marimba"))
    balance = np.array([0.4, 1.6, 0.5, 0.3, 1.0]) * rng.uniform(0.7, 1.4, 5)
    level = dict(zip(("chords", "bass", "melody", "arpeggio", "drums"), balance))
    drums = {kind: _drum(kind, rng) for kind in ("kick", "snare", "hat")}

    scale, other = (MINOR, MAJOR) if minor else (MAJOR, MINOR)
    progression = PROGRESSIONS[scale][rng.integers(8)]
    turn, walk = int(rng.integers(4)), int(rng.integers(7))
    span = bar // 2 if tempo < 90 and bar == 16 else bar  # a slow piece changes its chord twice a bar
    for number in range(int(10 / sixteenth / span) + 2 * bar // span):
        degree, begin = progression[(number + turn) % 4], number * span
        if number == 0 or rng.random() < 0.5:  # the texture changes: other octaves, other players of the same style
            bass_from, chords_from, arpeggio_from = 24 + rng.integers(24), 40 + rng.integers(32), 48 + rng.integers(36)
            melody_tonic = tonic + 12 * int(rng.integers(4, 7))
            chord_instrument, melody_instrument = rng.choice(style.chords), rng.choice(style.melody)
        borrowed = other if rng.random() < 0.1 else scale  # now and then a chord of the parallel key
        chord = [tonic + borrowed[(degree + third) % 7] for third in (0, 2, 4)]
        if minor and degree == 4 and rng.random() < 0.7:
            chord[1] = tonic + 11  # the dominant of harmonic minor
        if rng.random() < 0.25:
            chord.append(tonic + borrowed[(degree + 6) % 7])
        onsets = lambda rhythm: [s for s in range(begin, begin + span) if rhythm[s % bar] == "x"]
        length = lambda steps, s: next((later - s for later in steps if later > s), begin + span - s)

        steps = onsets(style.chord_rhythm) or [begin]
        for s in steps:
            for pitch in chord:
                tone(level["chords"], s, length(steps, s), chords_from + (pitch - chords_from) % 12, chord_instrument)
        steps = onsets(style.bass_rhythm) if has["bass"] else []
        for s in steps:
            pitch = chord[0] if s == steps[0] or rng.random() < 0.6 else chord[2]
            tone(level["bass"], s, length(steps, s), bass_from + (pitch - bass_from) % 12, "bass")
        for s in range(begin, begin + span) if has["arpeggio"] else ():
            if s % 2 == 0 or name == "trance":
                pitch = chord[s % len(chord)]
                tone(level["arpeggio"], s, 2, arpeggio_from + (pitch - arpeggio_from) % 12, arpeggio_instrument)
        steps = [s for s in range(begin, begin + span, 2) if rng.random() < 0.55] if has["melody"] else []
        for s in steps:
            walk += int(rng.integers(-2, 3))
            walk = min(max(walk, 0), 13)
            pitch = scale[walk % 7] + 12 * (walk // 7)
            if rng.random() < 0.35:  # land on the chord
                pitch = min((c - tonic + 12 * o for c in chord for o in (-1, 0, 1)), key=lambda p: abs(p - pitch))
            tone(level["melody"], s, length(steps, s), melody_tonic + pitch, melody_instrument)
        for s in range(begin, begin + span) if has["drums"] else ():
            for kind in ("kick", "snare", "hat"):
                rhythm = getattr(style, kind)
                if rhythm and rhythm[s % bar] == "x":
                    play(level["drums"], s, drums[kind])

    hiss = rng.uniform(-60, -25)  # dB below the music
    wave += rng.standard_normal(n) * np.sqrt(np.mean(wave**2)) * 10 ** (hiss / 20)
    wave *= 10 ** (loudness / 20) / np.sqrt(np.mean(wave**2))

    fast, bright, loud = (tempo - 100) / 30, (tilt + 0.05) / 0.145, (loudness + 27) / 5.2  # about -2 to 2
    arousal = np.tanh(0.5 * fast + 0.25 * bright + 0.25 * loud + 0.4 * has["drums"] - 0.2 + rng.normal(0, 0.25))
    valence = np.tanh(0.6 * (1 - 2 * minor) + 0.3 * fast + 0.2 * bright + rng.normal(0, 0.25))
    tags = {
        **has,
        "fast": tempo > 120,
        "slow": tempo < 80,
        "bright": tilt > 0.1,
        "dark": tilt < -0.2,
        "minor": minor,
        "swing": style.swing > 0.15,
        "sustained": bool(players & {"strings", "organ", "saw", "brass", "flute", "clarinet"}),
        "plucked": bool(players & {"guitar", "harp"}),
        "wind": bool(players & {"flute", "clarinet", "brass"}),
        "electronic": bool(players & {"saw", "square"}),
        "high": np.mean(pitches) > 64,
        "noisy": hiss > -35,
    }
    labels = tonic + 12 * minor, tuple(STYLES).index(name), [float(tags[tag]) for tag in TAGS], (arousal, valence)
    return wave.astype(np.float32), labels


def synthesize(n_clips, seed, first=0):
    """Clips `first` to `first + n_clips - 1` of the embedded music of a seed. Clip i depends on (seed, i) alone.

    Returns waves (n, 160000) float32 at 16 kHz, and labels: `key` (n,) long, 0..11 C to B major, 12..23 C to B minor;
    `style` (n,) long, in the order of STYLES; `tags` (n, 16) float of 0 and 1, in the order of TAGS; `mood` (n, 2) float,
    arousal and valence between -1 and 1.
    """
    clips = [_clip(np.random.default_rng([seed, first + i])) for i in range(n_clips)]
    waves = torch.from_numpy(np.stack([wave for wave, _ in clips]))
    key, style, tags, mood = (torch.tensor(column) for column in zip(*(labels for _, labels in clips)))
    return waves, {"key": key, "style": style, "tags": tags, "mood": mood.float()}


# ----------------------------------------------------------------------------------------------------------------------


def report(corpus):
    """Say what is in a corpus, and what was left out of it."""
    hours = int((corpus.frames - 1).sum()) * HOP / SAMPLE_RATE / 3600
    print(f"{corpus.path}: {len(corpus):,} clips, {hours:.2f} h, from {len(corpus.files):,} files")
    left_out = {kind: corpus.totals[kind] for kind in ("unreadable", "too short", "silent") if kind in corpus.totals}
    if left_out:
        counts = ", ".join(f"{count:,} {kind}" for kind, count in left_out.items())
        print(f"left out: {counts}; listed in {corpus.path / 'left_out.csv'}")
        with open(corpus.path / "left_out.csv", newline="", encoding="utf-8", errors="surrogateescape") as file:
            unreadable = (row for row in csv.DictReader(file) if row["kind"] == "unreadable")
            for row in islice(unreadable, 10):
                print(f"  {row['file']!r} from {float(row['offset']):.1f} s on: {row['reason']}")


def main():
    """The command line: build a corpus from a folder, and say what became of it."""
    parser = argparse.ArgumentParser(description="Decode a folder of music, once, into a corpus of mel spectrograms.")
    parser.add_argument("folder", help="music in any format that libsndfile reads, in any sub-folders")
    parser.add_argument("--out", help="where the corpus goes (default: corpora/NAME_OF_THE_FOLDER)")
    parser.add_argument("--clip-seconds", type=float, default=10.0, help="longest clip (default: 10, as in the paper)")
    parser.add_argument("--workers", type=int, default=CORES, help="processes (default: %(default)s, one a core)")
    args = parser.parse_args()
    out = args.out or Path("corpora") / Path(args.folder).resolve().name
    try:
        corpus = build_corpus(args.folder, out, args.clip_seconds, max(1, args.workers))
    except (ValueError, OSError) as error:
        print(f"data.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nInterrupted: the same command goes on where it was.", file=sys.stderr, flush=True)
        os._exit(130)  # without waiting for the files that the workers are in the middle of
    report(corpus)
    print(f"next: python train.py --data {corpus.path} --batch {min(256, len(corpus))}")


if __name__ == "__main__":
    main()
