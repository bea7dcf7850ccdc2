"""Stage 1 of Myna: sound -> mel spectrogram -> corpus -> pairs of segments.

Input: a folder of music. Every file is decoded and cut into clips of 10 seconds; each clip is resampled to
16 kHz mono and transformed to a mel power spectrogram (section 3.6 of the paper, arXiv 2502.12511). All of
them are stored in one memory-mapped array, the corpus.
Output: for each clip of a batch two random segments of 3 seconds, the positive pair (section 3.2;
Algorithm 1, lines 5-7).

    python data.py MUSIC_FOLDER --out corpora/mine       decode once; the same command continues a build

Without any music, `synthesize` makes some: short labelled pieces in all 24 keys and several styles.
Next stage: model.py, whose input is a segment: (128 mel bands, 96 frames).
"""

import argparse
import csv
import fnmatch
import hashlib
import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import warnings
from array import array
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import soundfile
import torch
import torch.nn.functional as F
from scipy.signal import resample_poly
from tqdm import tqdm

SAMPLE_RATE = 16_000  # Hz (section 3.6)
N_FFT = 2048  # samples in a window: 128 ms
HOP = 512  # samples between frames: 32 ms, 31.25 frames a second
N_MELS = 128  # bands (section 3.6)
FRAMES = 96  # frames in a segment: "three seconds" (section 3.2)
SEGMENT_SECONDS = (FRAMES - 1) * HOP / SAMPLE_RATE  # 3.04 s, the shortest clip with 96 centred frames
FLOAT16_MAX = 65_504.0
# The cores that this process may use; os.sched_getaffinity exists on Linux only.
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()

# --- Sound -------------------------------------------------------------------------------------------------

AUDIO_SUFFIXES = set(".wav .flac .ogg .oga .opus .mp3 .aif .aiff .aifc .au .snd .caf".split())
FOREIGN_SUFFIXES = set(".m4a .mp4 .aac .wma .webm .mka .ape .wv .mpc .dsf .ac3".split())
BLOCK = 2**20  # samples a channel that are read at once


@contextmanager
def _open_sound(path):
    """An open `soundfile.SoundFile`; every error is a ValueError that names the file and the cause."""
    if not os.path.isfile(path):
        raise ValueError(f"{path}: there is no such file")
    if os.path.getsize(path) == 0:
        raise ValueError(f"{path}: the file is empty")
    convert = f'convert it first: ffmpeg -i "{path}" "{Path(path).with_suffix(".wav")}"'
    try:
        with soundfile.SoundFile(os.fsencode(path) if os.name == "posix" else str(path)) as sound:
            if not 1_000 <= sound.samplerate <= 1_000_000:
                raise ValueError(f"{path}: a sample rate of {sound.samplerate} Hz makes no sense for music")
            if sound.frames > 2**40:  # libsndfile's value for a stream of unknown length
                raise ValueError(f"{path}: the length is not stored in the file, {convert}")
            yield sound
    except (OSError, TypeError, soundfile.SoundFileError) as error:
        if Path(path).suffix.lower() in FOREIGN_SUFFIXES:
            raise ValueError(f"{path}: libsndfile does not read this format, {convert}") from error
        raise ValueError(f"{path}: not sound in a format that libsndfile knows, or damaged") from error


def _read(sound, start, count=math.inf):
    """`count` samples of an open sound from `start` on, fewer where it ends: (samples, channels) float32.

    Decoding starts a quarter of a second earlier, because an MP3 frame uses bits of the frames before it. The
    sound is read in blocks, because the length that a damaged file claims may be terabytes.
    """
    start = min(start, sound.frames)
    lead = min(start, sound.samplerate // 4)
    sound.seek(start - lead)
    missing = lead + count
    blocks = [np.zeros((0, sound.channels), np.float32)]
    while missing > 0:
        block = sound.read(min(missing, BLOCK), dtype="float32", always_2d=True)
        blocks.append(block)
        missing -= len(block)
        if len(block) < BLOCK:
            break
    return np.concatenate(blocks)[lead:]


def _mono_16k(block, rate):
    """(samples, channels) float32 at `rate` Hz -> (samples,) float32 tensor at 16 kHz.

    The mean over the channels, resampled by a polyphase filter.
    """
    wave = block.mean(axis=1)
    if rate != SAMPLE_RATE:
        common = math.gcd(rate, SAMPLE_RATE)
        wave = resample_poly(wave, SAMPLE_RATE // common, rate // common)
    return torch.from_numpy(wave)


def load_audio(path, offset=0.0, duration=None):
    """Read a sound file, or only `duration` seconds of it from `offset` seconds on.

    Reads what libsndfile reads: WAV, FLAC, OGG, MP3, AIFF, AU, ... Returns (samples,) float32, mono, 16 kHz.
    Raises ValueError, naming file and cause, when it cannot be read, is empty there, or is not finite.
    """
    if not 0 <= offset < math.inf:
        raise ValueError(f"{path}: offset {offset} s must be finite and not negative")
    if duration is not None and not 0 < duration < math.inf:
        raise ValueError(f"{path}: duration {duration} s must be finite and positive")
    with _open_sound(path) as sound:
        rate = sound.samplerate
        count = math.inf if duration is None else round(duration * rate)
        block = _read(sound, round(offset * rate), count)
        if len(block) == 0:
            raise ValueError(f"{path}: no sound from {offset:g} s on (it holds {sound.frames / rate:g} s)")
    wave = _mono_16k(block, rate)
    if not wave.isfinite().all():
        raise ValueError(f"{path}: holds samples that are not finite numbers")
    return wave


def audio_files(folder):
    """Paths of the audio files below a folder, sorted, relative to it. Links are followed."""
    found, visited = [], set()
    for root, folders, names in os.walk(folder, followlinks=True):
        if os.path.realpath(root) in visited:  # a link to a folder above
            folders.clear()
            continue
        visited.add(os.path.realpath(root))
        folders.sort()
        for name in names:
            suffix = Path(name).suffix.lower()
            if suffix in AUDIO_SUFFIXES | FOREIGN_SUFFIXES and not name.startswith("."):
                found.append(os.path.relpath(os.path.join(root, name), folder))
    return sorted(found)


# --- Mel spectrogram ---------------------------------------------------------------------------------------


def mel_filterbank():
    """(128, 1025) float32: row m weights the STFT bins 0..1024 (0 Hz to 8 kHz) of mel band m.

    Slaney's scale, as in librosa's `filters.mel`: linear below 1 kHz (3 mel per 200 Hz), logarithmic above
    (27 mel per factor of 6.4). Triangles on 130 points evenly spaced in mel, each divided by half its width
    in Hz (equal areas).
    """
    bins = np.arange(N_FFT // 2 + 1) * SAMPLE_RATE / N_FFT  # Hz
    top = 15 + 27 * math.log(SAMPLE_RATE / 2 / 1000) / math.log(6.4)  # 8 kHz in mel; 15 mel is 1 kHz
    mel = np.linspace(0, top, N_MELS + 2)
    edges = np.where(mel < 15, mel * 200 / 3, 1000 * 6.4 ** ((mel - 15) / 27))  # Hz
    low, centre, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    rising = (bins - low) / (centre - low)
    falling = (high - bins) / (high - centre)
    triangles = np.minimum(rising, falling).clip(min=0)
    return torch.from_numpy(triangles * 2 / (high - low)).float()


@lru_cache
def _window_and_filterbank(device):
    return torch.hann_window(N_FFT, device=device), mel_filterbank().to(device)


def mel_spectrogram(wave):
    """Mel power of sound at 16 kHz: (..., samples) -> (..., 128, 1 + samples // 512), on the wave's device.

    Windows of 2048 samples (periodic Hann) centred on every 512th sample, the ends reflected, squared
    magnitude, no logarithm: the defaults of nnAudio's MelSpectrogram, which the authors use.
    Raises ValueError below 1025 samples, which are too few to reflect.
    """
    wave = torch.as_tensor(wave, dtype=torch.float32)
    samples = wave.shape[-1]
    if samples <= N_FFT // 2:
        raise ValueError(f"{samples} samples are too few for a spectrogram: {N_FFT // 2 + 1} are needed")
    window, filterbank = _window_and_filterbank(wave.device)
    flat = wave.reshape(-1, samples)
    spectrum = torch.stft(flat, N_FFT, HOP, window=window, pad_mode="reflect", return_complex=True)
    power = spectrum.real.square() + spectrum.imag.square()  # (B, 1025, T)
    return (filterbank @ power).reshape(*wave.shape[:-1], N_MELS, -1)


def _stored_mel(wave):
    """(samples,) -> (128, T) float16: the mel power as it is stored, clamped to the range of float16."""
    return mel_spectrogram(wave).clamp(max=FLOAT16_MAX).half()


def segments(mel):
    """Consecutive whole segments of one clip: (128, frames) -> (n, 128, 96).

    The remainder is dropped; a clip shorter than a segment is padded with zeros to one, as in the authors'
    evaluation code.
    """
    mel = F.pad(mel, (0, max(0, FRAMES - mel.shape[-1])))
    return mel.unfold(-1, FRAMES, FRAMES).movedim(1, 0)


def mel_segments(wave):
    """The encoder's input for a whole sound: (samples,) at 16 kHz -> (n, 128, 96) float16.

    The spectrogram is made of the whole sound and then cut, so the windows of a segment's first and last
    frames reach into its neighbours; Algorithm 1 cuts first. A sound shorter than a window is padded with
    zeros.
    """
    wave = F.pad(wave, (0, max(0, N_FFT - len(wave))))
    return segments(_stored_mel(wave))


# --- Worker processes --------------------------------------------------------------------------------------


def _exit_with_parent():
    """End this worker when its parent was killed. Otherwise it would wait for a job forever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _start_worker():
    """The first call in a worker: one thread, SIGINT ignored, stderr closed; it exits with its parent."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libmpg123 writes to stderr
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _start_workers(count):
    """A pool of `count` worker processes. They ignore SIGINT even before they reach `_start_worker`."""
    os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker")  # it prints a warning after Ctrl-C
    pool = ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), initializer=_start_worker)
    if threading.current_thread() is threading.main_thread():  # no other thread may set signal handlers
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # a process inherits this when it starts
        for _ in range(count):
            pool.submit(int)  # any job: each submit starts one process
        signal.signal(signal.SIGINT, handler)
    return pool


def in_workers(function, jobs, workers=None, name=lambda *job: job[0]):
    """Yield function(*job) for each job, in order, computed ahead in worker processes (default: one a core).

    An exception in `function` is raised here. If a worker process dies, the unfinished jobs run again in a
    pool of one worker, one at a time. If that worker dies too, its job is the cause: ValueError, in which
    `name(*job)` names the job.
    """
    workers, jobs = workers or CORES, iter(jobs)
    ahead = 4 * workers if workers > 1 else 1  # one at a time, so that the cause of a death is known
    waiting, results = deque(), deque()  # the jobs that have no result yet, and their futures
    pool = _start_workers(workers)
    try:
        while True:
            for job in islice(jobs, ahead - len(waiting)):
                waiting.append(job)
                results.append(pool.submit(function, *job))
            if not waiting:
                return
            result = results.popleft().result()
            waiting.popleft()
            yield result
    except BrokenProcessPool as error:
        if workers == 1:
            causes = "out of memory, or the file crashes its decoder: then move it elsewhere and start again"
            raise ValueError(f"{name(*waiting[0])}: the process that worked on it died ({causes})") from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    yield from in_workers(function, waiting, 1, name)
    yield from in_workers(function, jobs, workers, name)


# --- Corpus: building it -----------------------------------------------------------------------------------
#   mel.f16        the frames of every clip, one after the other: (frames, 128) float16, no header
#   index.jsonl    line 1: the settings; then a line for each source file: its clips [offset in s, frames] and
#                  what was skipped [offset in s, kind, reason]; last line: the totals
#   skipped.csv    the skipped clips and files as a table
#
# A shard is a group of source files. A worker writes the shard's frames (shards-HASH/7.f16) and its lines of
# the index (shards-HASH/7.jsonl) under other names and renames them when they are complete; HASH depends on
# the settings. When all shards exist they are concatenated. A build that is killed at any moment loses only
# the shards that were not complete.

SHARD_FILES = 32  # at most in a shard: about 1,000 clips if they are songs
SHARD_FOLDERS = "shards-" + 40 * "[0-9a-f]"  # their names, as a pattern
FRONT_END = [SAMPLE_RATE, N_FFT, HOP, N_MELS]  # a corpus with other values is refused


def _file_clips(folder, clip_seconds, name):
    """The clips of one file as (offset in seconds, wave), read one at a time to bound the memory."""
    path = folder / name
    with _open_sound(path) as sound:
        start = 0
        while len(block := _read(sound, start, round(clip_seconds * sound.samplerate))) > 0:
            yield start / sound.samplerate, _mono_16k(block, sound.samplerate)
            start += len(block)
    if start == 0:
        raise ValueError(f"{path}: holds no sound")


def _embedded_clips(seed, name):
    """`_file_clips` for the embedded music: the file called "clip N" has one clip, number N."""
    yield 0.0, synthesize(1, seed, int(name.removeprefix("clip ")))[0][0]


def _checked_mel(wave):
    """The mel (128, T) of a clip and None; or, for a clip that cannot be used, None and [kind, reason]."""
    if not wave.isfinite().all():
        return None, ["unreadable", "samples that are not finite numbers"]
    if len(wave) < (FRAMES - 1) * HOP:
        reason = f"{len(wave) / SAMPLE_RATE:.2f} s, and a segment is {SEGMENT_SECONDS:.2f} s"
        return None, ["too short", reason]
    mel = _stored_mel(wave)  # of the whole clip, which is cut into segments later: see mel_segments
    if not mel.any():
        return None, ["silent", "digital silence"]
    return mel, None


def _write_file(name, read_clips, mel_file):
    """Write the mel of a file's clips. Returns the file's entry in the index."""
    entry = {"file": name, "clips": [], "skipped": []}
    end = 0.0  # seconds that could be read
    try:
        for offset, wave in read_clips(name):
            mel, problem = _checked_mel(wave)
            if problem:
                entry["skipped"].append([offset, *problem])
            else:
                mel_file.write(mel.T.contiguous().numpy())  # (T, 128)
                entry["clips"].append([offset, mel.shape[1]])
            end = offset + len(wave) / SAMPLE_RATE
    except ValueError as error:  # the rest of the file cannot be read; the clips before it are good
        reason = str(error).split(f"{name}: ", 1)[-1]  # without the path, which the entry contains
        entry["skipped"].append([end, "unreadable", reason])
    return entry


def _write_shard(shard, names, read_clips):
    """In a worker: write SHARD.f16 and SHARD.jsonl, the frames and the index of the files `names`.

    SHARD.now contains the name of the file that is being read. A shard that exists is not written again.
    """
    if os.path.exists(shard + ".jsonl"):
        return
    part = f"{shard}.{os.getpid()}"  # another process may build the same corpus
    with open(part + ".f16", "wb") as mel_file, open(part + ".jsonl", "w") as index:
        for name in names:
            Path(shard + ".now").write_text(json.dumps(name))
            index.write(json.dumps(_write_file(name, read_clips, mel_file)) + "\n")
    os.replace(part + ".f16", shard + ".f16")
    os.replace(part + ".jsonl", shard + ".jsonl")  # renamed last: its presence marks a complete shard


def _file_at_work(shard, *_):
    """Name of the file that the worker of this shard was reading."""
    now = Path(shard + ".now")
    return json.loads(now.read_text()) if now.exists() else "before the first file"


def _join_shards(out, folder, count, settings):
    """Concatenate the shards into mel.f16 and index.jsonl, and list what was skipped in skipped.csv."""
    totals, skipped = Counter(), [("file", "offset", "kind", "reason")]
    part = f"{folder}/{os.getpid()}."
    with open(part + "mel.f16", "wb") as mel, open(part + "index.jsonl", "w") as index:
        index.write(json.dumps(settings) + "\n")
        for number in range(count):
            with open(folder / f"{number}.f16", "rb") as mel_file:
                shutil.copyfileobj(mel_file, mel)
            for line in (folder / f"{number}.jsonl").read_text().splitlines():
                index.write(line + "\n")
                entry = json.loads(line)
                totals.update(clips=len(entry["clips"]), frames=sum(length for _, length in entry["clips"]))
                totals.update(kind for _, kind, _ in entry["skipped"])
                skipped += [(entry["file"], *problem) for problem in entry["skipped"]]
        index.write(json.dumps({"totals": totals}) + "\n")
    with open(part + "skipped.csv", "w", newline="", encoding="utf-8", errors="surrogateescape") as table:
        csv.writer(table).writerows(skipped)
    for name in ("skipped.csv", "mel.f16", "index.jsonl"):  # the index last: it marks a finished corpus
        os.replace(part + name, out / name)


def _build(out, settings, names, read_clips, workers):
    """Build the corpus `out` from the files `names`, or open it when it is finished. Returns the `Corpus`.

    `read_clips(name)` yields the clips of a file. Raises ValueError when `out` is a corpus with other
    settings, or holds anything else.
    """
    out = Path(out)
    found = os.listdir(out) if out.is_dir() else []
    if "index.jsonl" not in found:
        if out.is_file() or (found and not fnmatch.filter(found, SHARD_FOLDERS)):
            raise ValueError(f"{out} exists and is not a corpus: choose another name")
        folder = out / f"shards-{hashlib.sha1(json.dumps(settings).encode()).hexdigest()}"
        size = max(1, min(SHARD_FILES, len(names) // 64))  # at least 64 shards, if there are as many files
        shards = [names[start : start + size] for start in range(0, len(names), size)]
        jobs = [(f"{folder}/{number}", shard, read_clips) for number, shard in enumerate(shards)]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tqdm(desc=str(out), total=len(names), unit="file") as bar:
                for _, shard in zip(in_workers(_write_shard, jobs, workers, _file_at_work), shards):
                    bar.update(len(shard))
            _join_shards(out, folder, len(shards), settings)
        except FileNotFoundError:  # another process has finished this corpus and removed the shards
            if not (out / "index.jsonl").exists():
                raise
    for folder in out.glob(SHARD_FOLDERS):  # also those of interrupted builds with other settings
        shutil.rmtree(folder, ignore_errors=True)
    corpus = Corpus(out)
    if corpus.settings != settings:
        other = [f"{name} {value}" for name, value in corpus.settings.items() if settings.get(name) != value]
        advice = "delete it, or build another with `python data.py FOLDER --out NAME`"
        raise ValueError(f"{out} was built with other settings ({', '.join(other)}): {advice}")
    return corpus


def build_corpus(audio_dir, out, clip_seconds=10.0, workers=None):
    """Decode every audio file below `audio_dir` once into the corpus folder `out`. Returns the `Corpus`.

    Clips are at most `clip_seconds` long; the spectrogram is made of the whole clip (10 s are 313 frames) and
    cut into segments later. An interrupted build continues, a finished corpus is only opened; the bytes are
    the same for any number of `workers` (processes; default: one a core). When the shards are joined, the
    corpus takes twice its disk space for a moment.
    Raises ValueError when there is no audio, none of it can be read, or `out` was built from other files.
    """
    folder = Path(audio_dir).resolve()
    if not folder.is_dir():
        raise ValueError(f"{audio_dir}: there is no such folder")
    if not SEGMENT_SECONDS <= clip_seconds < math.inf:
        raise ValueError(f"clips of {clip_seconds:g} s cannot hold a segment of {SEGMENT_SECONDS:.2f} s")
    names = audio_files(folder)
    if not names:
        suffixes = " ".join(sorted(AUDIO_SUFFIXES))
        raise ValueError(f"{audio_dir}: no audio files below this folder (looked for {suffixes})")
    sizes = [(folder / name).stat().st_size if (folder / name).exists() else 0 for name in names]
    listing = "".join(f"{name}\0{size}\0" for name, size in zip(names, sizes))
    settings = {
        "source": str(folder),
        "files": len(names),
        "names_and_sizes": hashlib.sha1(listing.encode(errors="surrogateescape")).hexdigest(),
        "clip_seconds": float(clip_seconds),
        "front_end": FRONT_END,
    }
    return _build(out, settings, names, partial(_file_clips, folder, clip_seconds), workers)


def build_embedded_corpus(n_clips, seed, out, workers=None):
    """The first `n_clips` of the embedded music (see `synthesize`) as a corpus in the folder `out`."""
    source = f"embedded music, second edition, seed {seed}"  # to be changed when `synthesize` changes
    settings = {"source": source, "files": n_clips, "front_end": FRONT_END}
    names = [f"clip {number}" for number in range(n_clips)]
    return _build(out, settings, names, partial(_embedded_clips, seed), workers)


# --- Corpus: using it --------------------------------------------------------------------------------------


def _read_index(path):
    """The index of the corpus in the folder `path`: settings, names of the files, clips, totals.

    Clips are (n, 3) float64: number of the file, offset in seconds, frames.
    """
    index = Path(path) / "index.jsonl"
    if not index.is_file():
        raise ValueError(f"{path} is not a corpus: make one with `python data.py MUSIC_FOLDER --out {path}`")
    files, clips = [], array("d")
    try:
        with open(index, encoding="utf-8") as file:
            settings = dict(json.loads(next(file, "")))
            for line in file:
                entry = json.loads(line)
                if "totals" in entry:
                    return settings, files, torch.from_numpy(np.array(clips)).view(-1, 3), entry["totals"]
                for offset, frames in entry["clips"]:
                    clips.extend((len(files), offset, frames))
                files.append(entry["file"])
        raise ValueError("the last line, the totals, is missing")
    except (ValueError, TypeError, KeyError) as error:
        problem = f"{index} is damaged, or not the index of a corpus"
        raise ValueError(f"{problem}: delete {path} and build it again") from error


class Corpus:
    """A finished corpus, opened from its folder: `mel` (frames, 128) float16, and where each clip is in it.

    `mel` is a memory map until `.to(device)` loads it. Clip i is rows first[i] to first[i] + frames[i] - 1 of
    it (long tensors); it was read from `files[file_of[i]]`, `offset[i]` seconds after its start.
    Raises ValueError when the folder is not a finished corpus.
    """

    def __init__(self, path):
        self.path = path = Path(path)
        self.settings, self.files, clips, self.totals = _read_index(path)
        if len(clips) == 0:
            reasons = f"none of {len(self.files)} files gave a clip, see {path}/skipped.csv"
            raise ValueError(f"{path}: {reasons}; delete it before you build it again")
        self.file_of, self.offset, self.frames = clips[:, 0].long(), clips[:, 1].clone(), clips[:, 2].long()
        self.first = self.frames.cumsum(0) - self.frames
        shape = int(self.frames.sum()), N_MELS
        size = (path / "mel.f16").stat().st_size if (path / "mel.f16").is_file() else 0
        if size != 2 * math.prod(shape):
            sizes = f"{path}/mel.f16 holds {size:,} bytes, and its index lists {2 * math.prod(shape):,}"
            raise ValueError(f"{sizes}: delete {path} and build it again with the same command")
        frames = np.memmap(path / "mel.f16", np.float16, "r", shape=shape)
        self._map = frames.base  # the mmap object; its size() is the current size of the file
        with warnings.catch_warnings():  # torch warns that the map cannot be written to
            warnings.simplefilter("ignore", UserWarning)
            self.mel = torch.from_numpy(frames)

    def __len__(self):
        return len(self.first)

    def to(self, device):
        """Load the whole corpus into the memory of `device`. Returns the corpus itself."""
        self.mel, self._map = self.mel.to(device, copy=True), None
        self.first, self.frames = self.first.to(device), self.frames.to(device)
        return self

    def sample_pairs(self, clip_ids, generator=None, part=slice(None)):
        """Two independent random segments of each clip in `clip_ids` (B,): (2, B, 128, 96) float16.

        Processes that share a batch pass the same ids and generator and a `part` each: random numbers are
        drawn for the whole batch, and only the pairs of that slice are read.
        """
        if self._map is not None and self._map.size() < self.mel.nbytes:  # reading it would be a bus error
            raise ValueError(f"{self.path / 'mel.f16'} was truncated: delete {self.path} and build it again")
        device = self.mel.device
        clip_ids = torch.as_tensor(clip_ids).to(device)
        source = generator.device if generator else "cpu"
        uniform = torch.rand(2, len(clip_ids), generator=generator, dtype=torch.float64, device=source)
        choices = self.frames[clip_ids] - FRAMES + 1  # number of possible starts
        starts = self.first[clip_ids] + (uniform.to(device) * choices).long()  # (2, B)
        rows = starts[:, part, None] + torch.arange(FRAMES, device=device)  # (2, B, 96)
        frames = self.mel.index_select(0, rows.flatten())  # one gather of whole rows, 256 bytes each
        return frames.view(*rows.shape, N_MELS).transpose(2, 3)


# --- The embedded music: pieces of ten seconds, composed at random, played and labelled --------------------

TONICS = "C Db D Eb E F Gb G Ab A Bb B".split()
KEYS = tuple(f"{tonic} {mode}" for mode in ("major", "minor") for tonic in TONICS)
MAJOR, MINOR = (0, 2, 4, 5, 7, 9, 11), (0, 2, 3, 5, 7, 8, 10)  # semitones above the tonic
PROGRESSIONS = (0, 4, 5, 3), (0, 3, 4, 0), (0, 5, 3, 4), (3, 4, 0, 0), (0, 3, 0, 4)  # degrees of the scale
HARMONIC = np.arange(1.0, 41.0)
SINES = np.sin(2 * np.pi * HARMONIC[:, None] * np.arange(2048) / 2048)  # (40, 2048), one period
INSTRUMENTS = {  # amplitudes of the harmonics; attack in seconds; decay time in seconds (infinite: sustained)
    "piano": (HARMONIC**-1.5, 0.005, 0.9),
    "guitar": (HARMONIC**-1.1, 0.003, 0.4),
    "bell": (np.array([1, 0.3, 0.6, 0, 0.4, 0, 0.3, 0, 0, 0.25]), 0.002, 1.2),
    "organ": (np.array([1, 0.9, 0.7, 0.6, 0, 0.4, 0, 0.4]), 0.02, math.inf),
    "strings": (HARMONIC**-1.0, 0.12, math.inf),
    "flute": (np.array([1, 0.4, 0.15, 0.08, 0.03]), 0.06, math.inf),
    "brass": (np.minimum(1, HARMONIC / 4) / HARMONIC, 0.05, math.inf),
    "square": (HARMONIC**-0.9 * (HARMONIC % 2), 0.01, 0.8),
    "bass": (HARMONIC**-1.7, 0.008, 0.6),
}

# Lowest and highest tempo in beats a minute; instruments of chords and melody; rhythms of chords, bass
# ('x' starts a note) and drums ('k' kick, 's' snare, 'h' hat): one bar, a sign for each sixteenth.
STYLES = {
    "house": (112, 134, "organ square", "..x..x....x..x..", "..x...x...x...x.", "k.h.s.h.k.h.s.h."),
    "rock": (96, 150, "guitar square", "x.x.x.x.x.x.x.x.", "x.x.x.x.x.x.x.x.", "k.h.s.h.k.k.s.h."),
    "reggae": (70, 96, "guitar organ", "....x.......x...", "x..x....x..x..x.", "h.h.h.h.k.h.h.h."),
    "latin": (88, 128, "piano brass", "x..x..x...x.x...", "x.....x.x.....x.", "khhshhshkhshshhh"),
    "waltz": (84, 156, "strings piano flute", "....x...x...", "x...........", ""),
    "march": (92, 126, "brass flute", "..x...x...x...x.", "x...x...x...x...", "k.s.k.sss.s.k.ss"),
    "lullaby": (60, 90, "bell guitar", "x.......", "x.......", ""),
    "ambient": (60, 80, "strings organ bell", "x.......", "x.......", ""),
}
TAGS = ("drums", "bass", "melody", "minor", "fast", "slow", "bright", "dark", "wind", "noisy")


def _draw_piece(rng):
    """What is drawn for a clip before its notes. The key and the loudness do not depend on the style."""
    style = list(STYLES)[rng.integers(len(STYLES))]
    slowest, fastest, instruments, chord_rhythm, bass_rhythm, drum_rhythm = STYLES[style]
    return SimpleNamespace(
        style=style,
        instruments=instruments.split(),
        chord_rhythm=chord_rhythm,
        bass_rhythm=bass_rhythm if rng.random() < 0.8 else "",
        drum_rhythm=drum_rhythm if rng.random() < 0.8 else "",
        melody=rng.random() < 0.8,
        tonic=int(rng.integers(12)),
        minor=bool(rng.integers(2)),
        tempo=rng.uniform(slowest, fastest),
        tuning=rng.uniform(-0.3, 0.3),  # semitones
        tilt=rng.uniform(-0.3, 0.2),  # brightness: the amplitude of harmonic n is multiplied by n**tilt
        loudness=rng.uniform(-36, -18),  # root mean square in dB of full scale
        hiss=rng.uniform(-60, -25),  # white noise, in dB of the music
    )


def _onsets(rhythm):
    """[(start, length up to the next onset or the end of the bar)] in sixteenths."""
    starts = [step for step, sign in enumerate(rhythm) if sign == "x"]
    return [(start, end - start) for start, end in zip(starts, [*starts[1:], len(rhythm)])]


def _compose(piece, rng):
    """The notes of a piece, bar by bar: (start, length, pitch, lowest, instrument, level).

    Start and length are in sixteenths. The pitch is a MIDI number, to be moved to the octave above `lowest`.
    """
    scale, bar = MINOR if piece.minor else MAJOR, len(piece.chord_rhythm)
    progression = np.roll(PROGRESSIONS[rng.integers(len(PROGRESSIONS))], rng.integers(4))
    walk, notes = int(rng.integers(7)), []
    for begin in range(0, int(10 * piece.tempo / 15) + 2 * bar, bar):
        # Octaves and instruments change within a clip. Otherwise timbre alone is enough to recognise a clip,
        # and the model does not learn the key.
        if begin == 0 or rng.random() < 0.5:
            bass_octave, chord_octave, melody_octave = rng.integers((24, 40, 48), (48, 72, 84))
            chord_player, melody_player = rng.choice(piece.instruments, 2)
        degree = progression[begin // bar % 4]
        chord = [piece.tonic + scale[(degree + third) % 7] for third in (0, 2, 4)]
        if piece.minor and degree == 4:
            chord[1] = piece.tonic + 11  # the dominant of harmonic minor

        for start, length in _onsets(piece.chord_rhythm):
            for pitch in chord:
                notes.append((begin + start, length, pitch, chord_octave, chord_player, 0.4))
        for start, length in _onsets(piece.bass_rhythm):
            notes.append((begin + start, length, chord[0], bass_octave, "bass", 1.6))
        melody_rhythm = "".join(rng.choice(["x.", ".."], bar // 2)) if piece.melody else ""
        for start, length in _onsets(melody_rhythm):
            walk += int(rng.integers(-2, 3))
            pitch = piece.tonic + scale[walk % 7]
            notes.append((begin + start, length, pitch, melody_octave, melody_player, 0.5))
        for start, drum in enumerate(piece.drum_rhythm):
            if drum != ".":
                notes.append((begin + start, 1, 0, 0, drum, 1.0))
    return notes


@lru_cache(maxsize=64)
def _tone(frequency, samples, instrument, tilt):
    """One note: a period, which is the sum of the harmonics below 7.8 kHz, is repeated under an envelope."""
    amplitudes, attack, decay = INSTRUMENTS[instrument]
    amplitudes = (amplitudes * HARMONIC[: len(amplitudes)] ** tilt)[: int(7800 / frequency)]
    period = (amplitudes / np.linalg.norm(amplitudes) @ SINES[: len(amplitudes)]).astype(np.float32)
    phase = np.arange(samples, dtype=np.uint32) * np.uint32(frequency / SAMPLE_RATE * 2**32)  # modulo 2**32
    t = np.arange(samples, dtype=np.float32) / SAMPLE_RATE
    envelope = np.minimum(1, t / np.float32(attack)) * np.exp(t / -decay)
    return period[phase >> 21] * np.minimum(envelope, t[::-1] / np.float32(0.02))


def _drum(kind, rng):
    """One stroke: a falling sine (kick), noise (snare), or its differences (hat)."""
    t = np.arange(4000, dtype=np.float32) / SAMPLE_RATE
    if kind == "k":
        return 3 * np.sin(2 * np.pi * (50 * t - 3 * np.exp(-t * 30))) * np.exp(-t * 14)
    noise = rng.standard_normal(4000, dtype=np.float32)
    return noise * np.exp(-t * 20) if kind == "s" else np.diff(noise, prepend=0) * np.exp(-t * 60)


def _play(piece, notes, rng):
    """The sound of the notes, (160000,) float32, and the instruments in it. A clip begins in the first bar."""
    drums = {kind: _drum(kind, rng) for kind in "ksh"}
    wave, heard = np.zeros(10 * SAMPLE_RATE, np.float32), set()
    sixteenth = 15 / piece.tempo * SAMPLE_RATE  # samples
    clip_start = rng.uniform(0, len(piece.chord_rhythm)) * sixteenth
    for start, length, pitch, lowest, instrument, level in notes:
        if instrument in drums:
            sound = drums[instrument]
        else:
            pitch = lowest + (pitch - lowest) % 12
            frequency = 440 * 2 ** ((pitch - 69 + piece.tuning) / 12)
            sound = _tone(frequency, int(length * sixteenth), instrument, piece.tilt)
        at = int(start * sixteenth - clip_start)
        sound = sound[max(0, -at) : max(0, len(wave) - at)]  # the part inside the clip
        wave[max(0, at) :][: len(sound)] += level * rng.uniform(0.7, 1) * sound
        if len(sound) > 0:
            heard.add(instrument)
    power = np.mean(wave**2)
    wave += rng.standard_normal(len(wave), dtype=np.float32) * np.sqrt(power * 10 ** (piece.hiss / 10))
    return wave * np.sqrt(10 ** (piece.loudness / 10) / np.mean(wave**2)), heard


def _label(piece, heard, rng):
    """The key, the style, the tags and the mood (arousal, valence) of a piece."""
    drums = piece.drum_rhythm != ""
    wind = "flute" in heard or "brass" in heard
    tags = [drums, piece.bass_rhythm != "", piece.melody, piece.minor, piece.tempo > 120, piece.tempo < 80]
    tags += [piece.tilt > 0.1, piece.tilt < -0.2, wind, piece.hiss > -35]  # in the order of TAGS
    fast, bright, loud = (piece.tempo - 100) / 30, (piece.tilt + 0.05) / 0.145, (piece.loudness + 27) / 5.2
    arousal = 0.4 * fast + 0.1 * bright + 0.25 * loud + drums - 0.5
    valence = 0.3 * fast + 0.1 * bright + 0.7 * wind - 0.7 * piece.minor
    mood = np.tanh([arousal, valence] + rng.normal(0, 0.25, 2))
    return piece.tonic + 12 * piece.minor, list(STYLES).index(piece.style), tags, mood


def synthesize(n, seed, first=0):
    """Synthesize clips `first` to `first + n - 1` of the embedded music. Clip i depends on (seed, i) only.

    Returns waves (n, 160000) float32 at 16 kHz, and labels: `key` (n,) long, index in KEYS; `style` (n,)
    long, index in STYLES; `tags` (n, 10) float of 0 and 1; `mood` (n, 2) float, arousal and valence, -1 to 1.
    """
    waves, labels = [], []
    for number in range(first, first + n):
        rng = np.random.default_rng([seed, number])
        piece = _draw_piece(rng)
        wave, heard = _play(piece, _compose(piece, rng), rng)
        waves.append(wave)
        labels.append(_label(piece, heard, rng))
    key, style, tags, mood = (torch.tensor(np.array(column)) for column in zip(*labels))
    labels = {"key": key, "style": style, "tags": tags.float(), "mood": mood.float()}
    return torch.from_numpy(np.stack(waves)), labels


# --- Command line ------------------------------------------------------------------------------------------


def report(corpus):
    """Print what a corpus contains and what was skipped."""
    hours = int((corpus.frames - 1).sum()) * HOP / SAMPLE_RATE / 3600
    print(f"{corpus.path}: {len(corpus):,} clips, {hours:.2f} h, from {len(corpus.files):,} files")
    kinds = [kind for kind in corpus.totals if kind not in ("clips", "frames")]
    if kinds:
        skipped = ", ".join(f"{corpus.totals[kind]:,} {kind}" for kind in kinds)
        table = corpus.path / "skipped.csv"
        print(f"skipped: {skipped}; listed in {table}")
        with open(table, newline="", encoding="utf-8", errors="surrogateescape") as file:
            unreadable = (row for row in csv.DictReader(file) if row["kind"] == "unreadable")
            for row in islice(unreadable, 10):
                print(f"  {row['file']!r} from {float(row['offset']):.1f} s on: {row['reason']}")


def main():
    """Build a corpus from a folder and print what it contains."""
    parser = argparse.ArgumentParser(
        description="Decode a folder of music, once, into a corpus of mel spectrograms. "
        "An hour of music takes 29 MB on the disk, and twice that at the end of the build."
    )
    parser.add_argument("folder", help="music in any format that libsndfile reads, in any sub-folders")
    parser.add_argument("--out", help="folder of the corpus (default: corpora/NAME_OF_THE_FOLDER)")
    parser.add_argument("--clip-seconds", type=float, default=10.0, help="longest clip (default: 10)")
    parser.add_argument("--workers", type=int, default=CORES, help="processes (default: %(default)s)")
    args = parser.parse_args()
    out = args.out or Path("corpora") / Path(args.folder).resolve().name
    try:
        corpus = build_corpus(args.folder, out, args.clip_seconds, max(1, args.workers))
    except (ValueError, OSError) as error:
        print(f"data.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nInterrupted: the same command continues.", file=sys.stderr, flush=True)
        os._exit(130)  # without waiting for the workers
    report(corpus)
    print(f"next: python train.py --data {corpus.path} --batch {min(256, len(corpus))}")


if __name__ == "__main__":
    main()
