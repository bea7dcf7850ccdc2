"""Stage 1 of Myna: sound -> mel spectrogram -> corpus -> pairs of segments.

Input: a folder of music. Every file is decoded and cut into clips of 10 seconds; each clip is resampled to
16 kHz mono and transformed to a mel power spectrogram (section 3.6 of the paper, arXiv 2502.12511). All of
them are stored in one memory-mapped array, the corpus.
Output: two random segments of 3 seconds of each clip in a batch, the positive pair (Algorithm 1, lines 5-7).

    python data.py MUSIC_FOLDER --out corpora/mine       decode once; the same command continues a build

Without any music, `synthesize` makes some: short labelled pieces in all 24 keys and several styles.
Next stage: model.py, whose input is a segment: (128 mel bands, 96 frames).
"""

import argparse
import csv
import hashlib
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
import warnings
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
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
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # usable ones

# --- Sound -------------------------------------------------------------------------------------------------

# libsndfile reads the formats in the first line; files in the other formats are listed as skipped.
AUDIO_SUFFIXES = set(".wav .flac .ogg .oga .opus .mp3 .aif .aiff .aifc .au .snd .caf".split())
AUDIO_SUFFIXES |= set(".m4a .mp4 .aac .wma .webm .mka .ape .wv .mpc .dsf .ac3".split())
BLOCK = 2**20  # samples per channel in one read


def audio_files(folder):
    """Paths of the audio files below a folder, sorted, relative to it. Links are followed."""
    found, visited = [], set()
    for root, folders, names in os.walk(folder, followlinks=True):
        if os.path.realpath(root) in visited:  # reached again by a link
            folders.clear()
            continue
        visited.add(os.path.realpath(root))
        folders.sort()
        names = [name for name in names if Path(name).suffix.lower() in AUDIO_SUFFIXES and name[0] != "."]
        found += [os.path.relpath(os.path.join(root, name), folder) for name in names]
    return sorted(found)


def _read(sound, start, count):
    """`count` samples of an open sound from `start` on, fewer where it ends: (samples, channels) float32."""
    lead = min(start, sound.samplerate // 4)  # decoded too, because an MP3 frame uses bits of earlier frames
    sound.seek(start - lead)
    blocks, missing = [], lead + count
    while missing > 0:  # in blocks, because the length that a damaged file claims may be terabytes
        blocks.append(sound.read(min(missing, BLOCK), dtype="float32", always_2d=True))
        missing -= len(blocks[-1])
        if len(blocks[-1]) == 0:  # the real end
            break
    return np.concatenate(blocks)[lead:]


def _clips(path, seconds, offset=0.0):
    """Cut a sound file into clips of `seconds`: yield each clip's (start in seconds, wave at 16 kHz mono).

    Raises ValueError, naming the file, when a clip cannot be decoded, or no sound follows `offset` seconds.
    """
    if not os.path.isfile(path):
        raise ValueError(f"{path}: there is no such file")
    try:
        with soundfile.SoundFile(os.fsencode(path)) as sound:
            rate = sound.samplerate
            if not 1_000 <= rate <= 1_000_000:  # damaged: resampling would take all memory
                raise ValueError  # reported below
            common = math.gcd(rate, SAMPLE_RATE)
            start = first = round(offset * rate)
            while start < sound.frames:
                block = _read(sound, start, max(1, round(min(seconds * rate, sound.frames))))
                if len(block) == 0:  # the real end of a damaged file
                    break
                wave = resample_poly(block.mean(axis=1), SAMPLE_RATE // common, rate // common)
                yield start / rate, torch.from_numpy(wave)
                start += len(block)
    except (OSError, TypeError, ValueError, MemoryError, soundfile.SoundFileError) as error:
        raise ValueError(f"{path}: damaged, or unknown to libsndfile (convert it with ffmpeg)") from error
    if start == first:
        raise ValueError(f"{path}: no sound from {offset:g} s on")


def load_audio(path, offset=0.0, duration=None):
    """Read a sound file, or only `duration` seconds of it from `offset` seconds on.

    Reads what libsndfile reads: WAV, FLAC, OGG, MP3, AIFF, AU, ... Returns (samples,) float32, mono, 16 kHz.
    Raises ValueError, naming file and cause, for a damaged file, a part without sound, or values not finite.
    """
    if not (0 <= offset < math.inf and (duration is None or duration > 0)):
        raise ValueError(f"{path}: the offset must be at least 0 s, not {offset}, and the duration above 0")
    _, wave = next(_clips(path, duration or math.inf, offset))
    if not wave.isfinite().all():
        raise ValueError(f"{path}: holds samples that are not finite numbers")
    return wave


# --- Mel spectrogram ---------------------------------------------------------------------------------------


@lru_cache
def mel_filterbank():
    """(128, 1025) float32: row m weights the STFT bins 0..1024 (0 Hz to 8 kHz) of mel band m.

    Triangles of equal area on 130 points evenly spaced in mel. Slaney's scale, as in librosa's `filters.mel`:
    linear below 1 kHz (3 mel per 200 Hz), logarithmic above (27 mel per factor of 6.4).
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
    window = torch.hann_window(N_FFT, device=wave.device)
    flat = wave.reshape(-1, samples)
    spectrum = torch.stft(flat, N_FFT, HOP, window=window, pad_mode="reflect", return_complex=True)
    power = spectrum.real.square() + spectrum.imag.square()  # (B, 1025, T)
    return (mel_filterbank().to(wave.device) @ power).reshape(*wave.shape[:-1], N_MELS, -1)


def _stored_mel(wave):
    """(samples,) -> (128, T) float16: the mel power as it is stored, clamped to the range of float16."""
    return mel_spectrogram(wave).clamp(max=torch.finfo(torch.float16).max).half()


def segments(mel):
    """Consecutive whole segments of one clip: (128, frames) -> (n, 128, 96).

    The remainder is dropped; a shorter clip is padded with zeros, as in the authors' evaluation code.
    """
    mel = F.pad(mel, (0, max(0, FRAMES - mel.shape[-1])))
    return mel.unfold(-1, FRAMES, FRAMES).movedim(1, 0)


def mel_segments(wave):
    """The encoder's input for a whole sound: (samples,) at 16 kHz -> (n, 128, 96) float16.

    The spectrogram is made of the whole sound, zero-padded to a window, and then cut; Algorithm 1 cuts first.
    """
    wave = F.pad(wave, (0, max(0, N_FFT - len(wave))))
    return segments(_stored_mel(wave))


# --- Worker processes --------------------------------------------------------------------------------------


def _exit_with_parent():
    """In a thread of a worker: end it when its parent process has ended."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _work(function, connection):
    """What a worker process does: answer each job with (result, exception), one of which is None."""
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # silence: libmpg123 writes to stderr
    while True:
        try:
            answer = (function(*connection.recv()), None)
        except Exception as error:
            answer = (None, error)
        connection.send(answer)


def _start_worker(function):
    """A new worker process, and the connection to it, which ends when the process dies."""
    context = multiprocessing.get_context("spawn")
    connection, other_end = context.Pipe()
    process = context.Process(target=_work, args=(function, other_end), daemon=True)
    process.start()
    other_end.close()
    return process, connection


def in_workers(function, jobs, workers=None, file_of=lambda first, *_: getattr(first, "path", first)):
    """Yield function(*job) for each job, in order, computed ahead in worker processes, by default CORES.

    Unlike ProcessPoolExecutor it knows which job a process died of: a thread per worker waits for its answer.
    Raises what `function` raises, and ValueError, which names `file_of(*job)`, when a process dies.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    if in_main_thread:  # workers inherit "ignore Ctrl-C"; only the main thread may set it
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    processes, idle = map(list, zip(*[_start_worker(function) for _ in range(workers or CORES)]))
    if in_main_thread:
        signal.signal(signal.SIGINT, handler)

    def run(job):  # in one of as many threads as there are workers
        connection = idle.pop()  # to a worker without a job
        try:
            connection.send(job)
            result, error = connection.recv()
        except (EOFError, OSError):
            causes = "out of memory, or the file crashes its decoder: then move it elsewhere and start again"
            raise ValueError(f"{file_of(*job)}: the process that worked on it died ({causes})") from None
        idle.append(connection)
        if error is not None:
            raise error
        return result

    threads, waiting = ThreadPoolExecutor(len(processes)), deque()
    try:
        for job in jobs:
            waiting.append(threads.submit(run, job))
            if len(waiting) == 4 * len(processes):  # so many are computed ahead
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for process in processes:
            process.kill()
        threads.shutdown(wait=False, cancel_futures=True)


# --- Corpus ------------------------------------------------------------------------------------------------
#   mel.f16        the frames of every clip, one after the other: (frames, 128) float16, no header
#   index.jsonl    line 1: the settings; then a line for each source file: its clips [offset in s, frames] and
#                  what was skipped [offset in s, kind, reason]; last line: the totals
#   skipped.csv    the skipped clips and files as a table
#
# A shard is a group of source files. A worker writes its frames and its lines of the index under temporary
# names, then renames them to shards-HASH/NUMBER.f16 and .jsonl; HASH depends on the settings. When all shards
# exist, they are concatenated and removed. A build that is killed at any moment loses only incomplete shards.

SHARD_FOLDERS = "shards-" + 40 * "[0-9a-f]"  # their names, as a pattern


def _embedded_clip(seed, number):
    """Clip `number` of the embedded music, in the form of `_clips`."""
    yield 0.0, synthesize(1, seed, number)[0][0]


def _write_file(name, read_clips, mel_file):
    """Write the frames of a file's clips, (T, 128) float16 each. Returns the file's entry in the index."""
    clips, skipped, end = [], [], 0.0  # end: of what could be read, in seconds
    try:
        for offset, wave in read_clips():
            end = offset + len(wave) / SAMPLE_RATE
            if not wave.isfinite().all():
                skipped.append([offset, "unreadable", "samples that are not finite numbers"])
            elif len(wave) < (FRAMES - 1) * HOP:
                reason = f"{len(wave) / SAMPLE_RATE:.2f} s, and a segment is {SEGMENT_SECONDS:.2f} s"
                skipped.append([offset, "too short", reason])
            elif not (mel := _stored_mel(wave)).any():
                skipped.append([offset, "silent", "digital silence"])
            else:
                clips.append([offset, mel.shape[1]])
                mel_file.write(mel.T.contiguous().numpy())
    except ValueError as error:  # the rest of the file cannot be read; the clips before it are good
        skipped.append([end, "unreadable", str(error).split(f"{name}: ", 1)[-1]])  # without the path
    return {"file": name, "clips": clips, "skipped": skipped}


def _write_shard(shard, readers):
    """In a worker: write a shard, unless it exists. Returns the number of source files in it."""
    if not os.path.exists(f"{shard}.jsonl"):
        part = f"{shard}.{os.getpid()}"  # another process may build the same corpus
        with open(f"{part}.f16", "wb") as mel_file, open(f"{part}.jsonl", "w") as index:
            for name, read_clips in readers.items():
                Path(f"{shard}.now").write_bytes(os.fsencode(name))  # see `_file_at_work`
                index.write(json.dumps(_write_file(name, read_clips, mel_file)) + "\n")
        os.replace(f"{part}.f16", f"{shard}.f16")
        os.replace(f"{part}.jsonl", f"{shard}.jsonl")  # renamed last: its presence marks a complete shard
    return len(readers)


def _file_at_work(shard, _):
    """Name of the file that a worker was reading when it died, for a job of `_write_shard`."""
    now = Path(f"{shard}.now")
    return os.fsdecode(now.read_bytes()) if now.exists() else "before the first file"


def _join_shards(out, folder, shards, settings):
    """Concatenate the shards into mel.f16 and index.jsonl, and list what was skipped in skipped.csv."""
    totals, skipped = Counter(), [("file", "offset", "kind", "reason")]
    part = f"{folder}/{os.getpid()}."
    with open(part + "mel.f16", "wb") as mel_file, open(part + "index.jsonl", "w") as index:
        index.write(json.dumps(settings) + "\n")
        for shard in shards:
            with open(f"{shard}.f16", "rb") as shard_file:
                shutil.copyfileobj(shard_file, mel_file)
            for line in Path(f"{shard}.jsonl").read_text().splitlines():
                index.write(line + "\n")
                entry = json.loads(line)
                totals.update(clips=len(entry["clips"]), frames=sum(frames for _, frames in entry["clips"]))
                totals.update(kind for _, kind, _ in entry["skipped"])
                skipped += [(entry["file"], *problem) for problem in entry["skipped"]]
        index.write(json.dumps({"totals": totals}) + "\n")
    with open(part + "skipped.csv", "w", newline="", encoding="utf-8", errors="surrogateescape") as table:
        csv.writer(table).writerows(skipped)
    for name in ("skipped.csv", "mel.f16", "index.jsonl"):  # the index last: it marks a finished corpus
        os.replace(part + name, out / name)


def _build(out, settings, readers, workers):
    """Build the corpus `out`, continue an interrupted build, or open a finished one. Returns the `Corpus`.

    `readers` {name of a source file: function without arguments that yields its clips as `_clips` does}.
    Raises ValueError when `out` holds other files or was built with other settings, or without any clip.
    """
    out, settings = Path(out), {**settings, "front_end": [SAMPLE_RATE, N_FFT, HOP, N_MELS]}
    finished, found = out / "index.jsonl", set(out.glob("[!.]*"))  # found: all but hidden files
    if not finished.exists():
        if shard_folders := {path for path in found if path.match(SHARD_FOLDERS)}:  # of an interrupted build
            found -= shard_folders | {out / "mel.f16", out / "skipped.csv"}
        if found or out.is_file():
            raise ValueError(f"{out} exists and is not a corpus: choose another name")
        folder = out / f"shards-{hashlib.sha1(json.dumps(settings).encode()).hexdigest()}"
        files = list(readers.items())
        size = max(1, min(32, len(files) // 64))  # of a shard: 32 songs are about 1,000 clips, or fewer
        jobs = [(folder / str(i), dict(files[i : i + size])) for i in range(0, len(files), size)]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tqdm(desc=str(out), total=len(files), unit="file") as progress:
                for count in in_workers(_write_shard, jobs, workers, _file_at_work):
                    progress.update(count)
            _join_shards(out, folder, [shard for shard, _ in jobs], settings)
        except FileNotFoundError:  # another process has finished this corpus and removed the shards
            if not finished.exists():
                raise
    for folder in out.glob(SHARD_FOLDERS):  # also those of interrupted builds with other settings
        shutil.rmtree(folder, ignore_errors=True)
    corpus = Corpus(out)
    if corpus.settings != settings:
        raise ValueError(f"{out} was built with other settings, {corpus.settings}: delete it or rename it")
    return corpus


def build_corpus(audio_dir, out, clip_seconds=10.0, workers=None):
    """Decode every audio file below `audio_dir` once into the corpus folder `out`. Returns the `Corpus`.

    Clips are at most `clip_seconds` long; 10 s are 313 frames. An interrupted build continues, a finished
    corpus is only opened; any number of `workers` (processes; default: one per core) makes the same bytes.
    At the end, when the shards are joined, the corpus takes twice its disk space for a moment.
    Raises ValueError when `clip_seconds` is below 3.04, there is no audio, none of it can be read, or `out`
    was built with other `clip_seconds` or from files with other paths or sizes.
    """
    if not SEGMENT_SECONDS <= clip_seconds < math.inf:
        raise ValueError(f"clips of {clip_seconds:g} s: the shortest are {SEGMENT_SECONDS:.2f} s")
    folder = Path(audio_dir).resolve()
    names = audio_files(folder)
    if not names:
        raise ValueError(f"{audio_dir}: there is no such folder, or there are no audio files in it")
    sizes = [(folder / name).stat().st_size if (folder / name).exists() else 0 for name in names]
    text = "".join(f"{name}\0{size}\0" for name, size in zip(names, sizes)).encode(errors="surrogateescape")
    settings = {"source": str(folder), "files": len(names), "names_and_sizes": hashlib.sha1(text).hexdigest()}
    settings["clip_seconds"] = float(clip_seconds)
    readers = {name: partial(_clips, folder / name, clip_seconds) for name in names}
    return _build(out, settings, readers, workers)


def build_embedded_corpus(n_clips, seed, out, workers=None):
    """The first `n_clips` of the embedded music (see `synthesize`) as a corpus in the folder `out`."""
    source = f"embedded music, second edition, seed {seed}"  # to be changed when `synthesize` changes
    settings = {"source": source, "files": n_clips}
    readers = {f"clip {number}": partial(_embedded_clip, seed, number) for number in range(n_clips)}
    return _build(out, settings, readers, workers)


class Corpus:
    """A finished corpus, opened from its folder: `mel` (frames, 128) float16, and where each clip is in it.

    `mel` is a memory map until `.to(device)` loads it. Clip i is rows first[i] to first[i] + frames[i] - 1 of
    it (long tensors); it was read from `files[file_of[i]]`, `offset[i]` seconds after its start. len() counts
    the clips. Raises ValueError when the folder is not a finished corpus.
    """

    def __init__(self, path):
        self.path = path = Path(path)
        try:
            with open(path / "index.jsonl", encoding="utf-8") as index:
                settings, *entries, last = map(json.loads, index)
            self.settings, self.totals = dict(settings), last["totals"]
            self.files = [entry["file"] for entry in entries]
            clips = [(number, *clip) for number, entry in enumerate(entries) for clip in entry["clips"]]
            if not clips:
                raise ValueError(f"none of {len(entries)} files gave a clip, see skipped.csv")
            file_of, offset, frames = torch.tensor(clips, dtype=torch.float64).T
            self.file_of, self.offset, self.frames = file_of.long(), offset.clone(), frames.long()
            self.first = self.frames.cumsum(0) - self.frames
            mel = np.memmap(path / "mel.f16", np.float16, "r")
            if mel.size != N_MELS * self.frames.sum():
                raise ValueError(f"mel.f16 has {mel.size / N_MELS} frames, the index {self.frames.sum()}")
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path} is no usable corpus ({error}): build it again elsewhere") from error
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        self._map = mel.base  # the mmap object; its size() is the current size of the file
        self.mel = torch.from_numpy(mel).view(-1, N_MELS)

    def __len__(self):
        return len(self.first)

    def to(self, device):
        """Load `mel`, `first` and `frames` into the memory of `device`. Returns the corpus itself."""
        self.mel, self._map = self.mel.to(device, copy=True), None
        self.first, self.frames = self.first.to(device), self.frames.to(device)
        return self

    def sample_pairs(self, clip_ids, generator=None, part=slice(None)):
        """Two independent random segments of each clip in `clip_ids` (B,): (2, B, 128, 96) float16.

        Processes that share a batch pass the same ids and generator and a `part` each: random numbers are
        drawn for the whole batch, only the pairs of that slice are read. ValueError for a truncated file.
        """
        if self._map is not None and self._map.size() < self.mel.nbytes:  # reading it would be a bus error
            raise ValueError(f"{self.path / 'mel.f16'} was truncated: build it again in another folder")
        device = self.mel.device
        clip_ids = torch.as_tensor(clip_ids).to(device)
        draw_on = generator.device if generator else "cpu"
        uniform = torch.rand(2, len(clip_ids), generator=generator, dtype=torch.float64, device=draw_on)
        choices = self.frames[clip_ids] - FRAMES + 1  # number of possible starts
        starts = self.first[clip_ids] + (uniform.to(device) * choices).long()  # (2, B)
        rows = starts[:, part, None] + torch.arange(FRAMES, device=device)  # (2, B, 96)
        mel = self.mel.index_select(0, rows.flatten())  # one gather of whole rows, 256 bytes each
        return mel.view(*rows.shape, N_MELS).transpose(2, 3)


# --- The embedded music: pieces of ten seconds, composed at random, played and labelled --------------------

TONICS = "C Db D Eb E F Gb G Ab A Bb B".split()
KEYS = tuple(f"{tonic} {mode}" for mode in ("major", "minor") for tonic in TONICS)
MAJOR, MINOR = (0, 2, 4, 5, 7, 9, 11), (0, 2, 3, 5, 7, 8, 10)  # semitones above the tonic
PROGRESSIONS = (0, 4, 5, 3), (0, 3, 4, 0), (0, 5, 3, 4), (3, 4, 0, 0), (0, 3, 0, 4)  # degrees of the scale
TAGS = ("drums", "bass", "melody", "minor", "fast", "slow", "bright", "dark", "wind", "noisy")
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


def _draw_piece(rng):
    """Draw the properties of a piece. Its key and its loudness do not depend on its style."""
    style = rng.integers(len(STYLES))
    slowest, fastest, instruments, chords, bass, drums = list(STYLES.values())[style]
    return SimpleNamespace(
        style=style,
        instruments=instruments.split(),
        chords=chords,
        bass=bass if rng.random() < 0.8 else "",
        drums=drums if rng.random() < 0.8 else "",
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
    return [(onset.start(), len(onset[0])) for onset in re.finditer("x[^x]*", rhythm)]


def _compose(piece, rng, change):
    """The notes of a piece: (start and length in sixteenths, MIDI pitch or None, instrument, level)."""
    scale, bar, notes = MINOR if piece.minor else MAJOR, len(piece.chords), []
    progression = np.roll(PROGRESSIONS[rng.integers(len(PROGRESSIONS))], rng.integers(4))
    walk = int(rng.integers(7))  # the melody's degree of the scale
    for begin in range(0, int(10 * piece.tempo / 15) + 2 * bar, bar):
        # Where nothing changes within a clip, its timbre alone identifies it, and the key is not learned.
        if begin == 0 or rng.random() < change:
            bass_low, chord_low, melody_low = rng.integers((24, 40, 48), (48, 72, 84))  # lowest MIDI pitches
            chord_player, melody_player = rng.choice(piece.instruments, 2)
        degree = progression[begin // bar % 4]
        chord = [piece.tonic + scale[(degree + third) % 7] for third in (0, 2, 4)]
        if piece.minor and degree == 4:
            chord[1] = piece.tonic + 11  # the dominant of harmonic minor

        for start, length in _onsets(piece.chords):
            pitches = [chord_low + (pitch - chord_low) % 12 for pitch in chord]
            notes += [(begin + start, length, pitch, chord_player, 0.4) for pitch in pitches]
        for start, length in _onsets(piece.bass):
            notes.append((begin + start, length, bass_low + (chord[0] - bass_low) % 12, "bass", 1.6))
        melody = "".join(rng.choice(["x.", ".."], bar // 2)) if piece.melody else ""
        for start, length in _onsets(melody):
            walk += int(rng.integers(-2, 3))
            pitch = melody_low + (piece.tonic + scale[walk % 7] - melody_low) % 12
            notes.append((begin + start, length, pitch, melody_player, 0.5))
        notes += [(begin + start, 1, None, drum, 1) for start, drum in enumerate(piece.drums) if drum != "."]
    return notes


@lru_cache(maxsize=64)
def _tone(frequency, samples, instrument, tilt):
    """One note: a period, which is the sum of the harmonics below 7.8 kHz, is repeated under an envelope."""
    amplitudes, attack, decay = INSTRUMENTS[instrument]
    amplitudes = (amplitudes * HARMONIC[: len(amplitudes)] ** tilt)[: int(7800 / frequency)]
    period = (amplitudes / np.linalg.norm(amplitudes) @ SINES[: len(amplitudes)]).astype(np.float32)
    # A period is 2**32, after which the integers start again; their top 11 bits are a place in `period`.
    phase = np.arange(samples, dtype=np.uint32) * np.uint32(frequency / SAMPLE_RATE * 2**32)
    t = np.arange(samples, dtype=np.float32) / SAMPLE_RATE
    envelope = np.minimum(1, t / np.float32(attack)) * np.exp(t / -decay)
    return period[phase >> 21] * np.minimum(envelope, t[::-1] / np.float32(0.02))


def _play(piece, notes, rng):
    """The notes as a wave (160000,) that starts within the first bar, and the set of instruments in it."""
    t = np.arange(4000, dtype=np.float32) / SAMPLE_RATE
    drums = {  # one stroke each: a falling sine (kick), noise (snare), differences of noise (hat)
        "k": 3 * np.sin(2 * np.pi * (50 * t - 3 * np.exp(-t * 30))) * np.exp(-t * 14),
        "s": rng.standard_normal(4000, dtype=np.float32) * np.exp(-t * 20),
        "h": np.diff(rng.standard_normal(4000, dtype=np.float32), prepend=0) * np.exp(-t * 60),
    }
    wave, heard = np.zeros(10 * SAMPLE_RATE, np.float32), set()
    sixteenth = 15 / piece.tempo * SAMPLE_RATE  # samples
    clip_start = rng.uniform(0, len(piece.chords)) * sixteenth
    for start, length, pitch, instrument, level in notes:
        if instrument in drums:
            sound = drums[instrument]
        else:
            frequency = 440 * 2 ** ((pitch - 69 + piece.tuning) / 12)
            sound = _tone(frequency, int(length * sixteenth), instrument, piece.tilt)
        at = int(start * sixteenth - clip_start)
        sound = sound[max(0, -at) : max(0, len(wave) - at)]  # the part inside the clip
        wave[max(0, at) :][: len(sound)] += level * rng.uniform(0.7, 1) * sound
        if len(sound) > 0:
            heard.add(instrument)
    hiss = rng.standard_normal(len(wave), dtype=np.float32)
    wave += hiss * np.sqrt(np.mean(wave**2) * 10 ** (piece.hiss / 10))
    return wave * np.sqrt(10 ** (piece.loudness / 10) / np.mean(wave**2)), heard


def _label(piece, heard, rng):
    """The key, the style, the tags and the mood (arousal, valence) of a piece."""
    drums, wind = piece.drums != "", bool({"flute", "brass"} & heard)
    tags = [drums, piece.bass != "", piece.melody, piece.minor, piece.tempo > 120, piece.tempo < 80]
    tags += [piece.tilt > 0.1, piece.tilt < -0.2, wind, piece.hiss > -35]  # in the order of TAGS
    fast, bright, loud = (piece.tempo - 100) / 30, (piece.tilt + 0.05) / 0.145, (piece.loudness + 27) / 5.2
    arousal = 0.4 * fast + 0.1 * bright + 0.25 * loud + drums - 0.5
    valence = 0.3 * fast + 0.1 * bright + 0.7 * wind - 0.7 * piece.minor
    mood = np.tanh(np.array([arousal, valence]) + rng.normal(0, 0.25, 2))
    return piece.tonic + 12 * piece.minor, piece.style, tags, mood


def synthesize(n, seed, first=0, change=0.5):
    """Synthesize clips `first` to `first + n - 1` of the embedded music. Clip i depends on (seed, i) only.

    Returns waves (n, 160000) float32 at 16 kHz, and labels: `key` (n,) long, index in KEYS; `style` (n,)
    long, index in STYLES; `tags` (n, 10) float of 0 and 1; `mood` (n, 2) float, arousal and valence, -1 to 1.
    `change` is the probability with which instruments and octaves change from one bar to the next.
    """
    waves, labels = [], []
    for number in range(first, first + n):
        rng = np.random.default_rng([seed, number])
        piece = _draw_piece(rng)
        wave, heard = _play(piece, _compose(piece, rng, change), rng)
        waves.append(wave)
        labels.append(_label(piece, heard, rng))
    key, style, tags, mood = (torch.tensor(np.array(column)) for column in zip(*labels))
    labels = {"key": key, "style": style, "tags": tags.float(), "mood": mood.float()}
    return torch.from_numpy(np.stack(waves)), labels


# --- Command line ------------------------------------------------------------------------------------------


def report(corpus):
    """Print what a corpus contains, what was skipped, and the first ten unreadable places."""
    hours = int((corpus.frames - 1).sum()) * HOP / SAMPLE_RATE / 3600
    print(f"{corpus.path}: {len(corpus):,} clips, {hours:.2f} h, from {len(corpus.files):,} files")
    skipped = [f"{n:,} {kind}" for kind, n in corpus.totals.items() if kind not in ("clips", "frames")]
    if skipped:
        print(f"skipped: {', '.join(skipped)}; listed in {corpus.path}/skipped.csv")
        with open(corpus.path / "skipped.csv", encoding="utf-8", errors="surrogateescape") as file:
            unreadable = [row for row in csv.DictReader(file) if row["kind"] == "unreadable"]
        for row in unreadable[:10]:
            print(f"  {row['file']!r} from {float(row['offset']):.1f} s on: {row['reason']}")


def main():
    """Build a corpus from a folder and print what it contains."""
    parser = argparse.ArgumentParser(description="Decode a folder of music once, into a corpus of mel power.")
    parser.add_argument("folder", help="music in any format that libsndfile reads, in any sub-folders")
    size = "29 MB for an hour of music, and twice that for a moment at the end of the build"
    parser.add_argument("--out", help=f"folder of the corpus (default: corpora/NAME_OF_FOLDER): {size}")
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
