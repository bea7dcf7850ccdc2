"""Stage 4 of Myna: labelled clips -> embeddings -> a grid of linear and MLP probes -> the task's metric.

A probe measures what a frozen encoder has learned. Each clip of a labelled data set becomes one vector, the
mean over its segments. Small models, the probes, are trained on the vectors of the training split, in 216
configurations. The configuration with the best score on the validation split is scored once on the test
split (section 4.4 and Appendix C of the paper, after Castellon et al. 2021, "JukeMIR").

    python probe.py                                          newest checkpoint in runs/, embedded music's keys
    python probe.py --task gtzan                             a data set in datasets/gtzan; DATASETS lists them
    python probe.py --task my_labels.csv                     your own labelled clips
    python probe.py --task gtzan --features mfcc             a hand-made feature; also --checkpoint random
    python probe.py --embed MUSIC_FOLDER --out vectors.npz   only the embeddings, one row per file

The authors' evaluation code differs from the protocol that the paper names, and from this file: it chooses
the configuration by its test score, standardises each split by its own statistics, uses no dropout on the
input, checks the validation split once an epoch, and chooses taggers by average precision. Because of the
first point, the scores in Table 1 of the paper may be slightly too high.
"""

import argparse
import csv
import hashlib
import itertools
import json
import math
import os
import re
import sys
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
import torch
from torch.nn import functional as F
from tqdm import tqdm

import data
from data import AUDIO_SUFFIXES, CORES, KEYS, N_FFT, SAMPLE_RATE, STYLES, TAGS, load_audio, mel_spectrogram, segments
from model import PATCHES, SIZES, Config, Myna, load_model, read_checkpoint

# ------------------------------------------------------------------------------------------------------------
# Metrics
#
# All take (targets, predictions), tensors or arrays, and compute in float64. Predictions may have leading
# axes, one entry for each configuration of a grid.
# ------------------------------------------------------------------------------------------------------------


def accuracy(targets, predictions):
    """Share of correct class numbers: targets (n,), predictions (..., n)."""
    targets, predictions = torch.as_tensor(targets), torch.as_tensor(predictions)
    return (predictions == targets).double().mean(dim=-1)


def weighted_key_score(targets, predictions):
    """MIREX's key score, which gives part of the score to related keys: targets (n,), predictions (..., n).

    Keys are numbered 0..11 C to B major, 12..23 C to B minor. The same key scores 1, a perfect fifth above
    the target with the same mode 0.5, the relative major or minor 0.3, the parallel one 0.2 (as mir_eval).
    """
    targets, predictions = torch.as_tensor(targets), torch.as_tensor(predictions)
    same_mode = targets // 12 == predictions // 12
    interval = (predictions - targets) % 12  # semitones from the target's tonic up to the prediction's
    relative = torch.where(targets < 12, 9, 3)  # A minor is nine above C major, C major three above A minor
    same_mode_score = (interval == 0).double() + 0.5 * (interval == 7).double()
    other_mode_score = 0.2 * (interval == 0).double() + 0.3 * (interval == relative).double()
    return torch.where(same_mode, same_mode_score, other_mode_score).mean(dim=-1)


def _sort_by_score(targets, scores):
    """Targets (..., T, n) sorted by score, and for each place where its score begins and ends."""
    targets, scores = torch.as_tensor(targets).double(), torch.as_tensor(scores).double()
    scores, order = scores.transpose(-1, -2).contiguous().sort(dim=-1)  # (..., T, n)
    targets = targets.T.expand_as(scores).gather(-1, order)
    first = torch.searchsorted(scores, scores)
    end = torch.searchsorted(scores, scores, right=True)
    return targets, first, end


def roc_auc(targets, scores, average=True):
    """Area under the ROC curve: the chance that a positive scores above a negative; a tie counts half.

    targets (n, T) of 0 and 1, scores (..., n, T). Mean over the tags that have positives and negatives; with
    `average=False` one value for each of the T tags, nan for a tag without both.
    """
    positive, first, end = _sort_by_score(targets, scores)
    ranks = (first + end + 1) / 2.0  # from 1; equal scores share the mean of their ranks
    positives = positive.sum(dim=-1)
    negatives = positive.shape[-1] - positives
    pairs_won = (ranks * positive).sum(dim=-1) - positives * (positives + 1) / 2
    area = pairs_won / (positives * negatives)  # (..., T), 0 / 0 = nan for a tag without both
    return area.nanmean(dim=-1) if average else area


def average_precision(targets, scores, average=True):
    """Area under the precision-recall curve as a sum of steps; equal scores are one threshold (as sklearn).

    targets (n, T) of 0 and 1, scores (..., n, T). Mean over all T tags; a tag without positives counts 0.
    """
    positive, first, _ = _sort_by_score(targets, scores)
    positives = positive.sum(dim=-1, keepdim=True)
    below = positive.cumsum(dim=-1) - positive  # positives at lower places
    found = (positives - below).gather(-1, first)  # positives that score at least as much as each place
    precision = found / (positive.shape[-1] - first)
    area = (precision * positive).sum(dim=-1) / positives.squeeze(-1).clamp(min=1)
    return area.mean(dim=-1) if average else area


def r2(targets, predictions, average=True):
    """Coefficient of determination: targets (n, T), predictions (..., n, T). Mean over the T targets.

    For a target that is constant, 1 where the prediction equals it and 0 otherwise (as sklearn).
    """
    targets, predictions = torch.as_tensor(targets).double(), torch.as_tensor(predictions).double()
    if targets.ndim == 1:
        targets, predictions = targets[:, None], predictions[..., None]
    residual = (targets - predictions).square().sum(dim=-2)
    total = (targets - targets.mean(dim=0)).square().sum(dim=0)
    constant_score = (residual == 0).double()
    score = torch.where(total == 0, constant_score, 1 - residual / total.where(total != 0, 1.0))
    return score.mean(dim=-1) if average else score


METRICS = {  # kind of task -> its metrics, the primary one first
    "classes": {"accuracy": accuracy},
    "key": {"weighted_key_score": weighted_key_score, "accuracy": accuracy},
    "tags": {"roc_auc": roc_auc, "average_precision": average_precision},
    "regression": {"r2": r2},
}


def primary_metric(kind):
    """Name of the metric that early stopping and the choice of the configuration use."""
    return next(iter(METRICS[kind]))


def _predictions(kind, outputs):
    """What the metrics compare with the targets: class numbers (..., n), or the outputs (..., n, C)."""
    return outputs.argmax(dim=-1) if kind in ("classes", "key") else outputs


def evaluate(kind, targets, outputs):
    """{name: score} for a probe's outputs (..., n, C), probabilities or values; the primary metric first."""
    predictions = _predictions(kind, outputs)
    return {name: metric(targets, predictions) for name, metric in METRICS[kind].items()}


def primary_score(kind, targets, outputs):
    """The primary metric of `evaluate` alone."""
    return METRICS[kind][primary_metric(kind)](targets, _predictions(kind, outputs))


# ------------------------------------------------------------------------------------------------------------
# Tasks: labelled clips
#
# Each data set is read from the files that its publisher distributes; extra folders above them do not matter.
# A new data set is one function and one line in DATASETS. The docstring of the function says where to get the
# data and how the folder must look; it is shown to users when something is missing.
# ------------------------------------------------------------------------------------------------------------

SPLITS = ("train", "valid", "test")


class Clip(NamedTuple):
    """A labelled piece of a sound file."""

    path: Path | tuple  # for the embedded music the pair (seed, number); while reading, str: a missing file
    offset: float  # seconds
    duration: float | None  # seconds; None: to the end
    label: object  # class number, list of 0.0 and 1.0, or list of numbers; None: made with the sound
    split: str  # "train", "valid", "test"
    group: str  # song, artist, ...; all clips of a group are in one split


@dataclass
class Task:
    """Labelled clips, and the kind of their labels, which decides the metrics."""

    name: str
    kind: str  # "classes", "key", "tags", "regression"
    names: tuple  # of the classes, tags or targets
    clips: list[Clip]
    missing: list[str]  # files that the labels name and that do not exist
    per_group: bool = False  # average the predicted probabilities over a group before scoring
    published: dict | None = None  # clips per split, as published
    note: str = ""  # what a user should know before using the scores


def _task(name, kind, names, clips, **more):
    """The Task of the clips whose files exist; the others are listed as missing."""
    missing = dict.fromkeys(clip.path for clip in clips if isinstance(clip.path, str))
    present = [clip for clip in clips if not isinstance(clip.path, str)]
    return Task(name, kind, tuple(names), present, list(missing), **more)


def _files(root):
    """{last one, two or three parts of a path: path} for all files and folders, up to six levels deep."""
    found = {}
    for folder, folders, names in os.walk(root, followlinks=True):
        folders.sort()
        above = Path(folder).relative_to(root).parts
        for name in sorted(folders + names):
            parts = (*above, name)
            for count in (1, 2, 3):
                found.setdefault("/".join(parts[-count:]), Path(folder, name))
        if len(above) == 5:  # this also ends links that lead back up
            folders.clear()
    return found


def _sound(files, stem, name):
    """The path of the sound file `stem` in any format, since copies are often converted; else `name`."""
    for suffix in sorted(AUDIO_SUFFIXES):
        if stem + suffix in files:
            return files[stem + suffix]
    return name


def _table(path, columns, delimiter=",", strict=False):
    """The rows of a table that must have `columns`, as pairs (line number, {column: field}); no blank rows.

    With `strict`, for a user's table, a malformed table is a ValueError; a published one is read as it is.
    """
    lines = []
    with open(path, newline="", encoding="utf-8-sig", errors="strict" if strict else "replace") as file:
        reader = csv.reader(file, delimiter=delimiter, skipinitialspace=True, strict=strict)
        try:
            for fields in reader:
                lines.append((reader.line_num, [field.strip() for field in fields]))
        except (UnicodeDecodeError, csv.Error) as error:
            line = reader.line_num
            raise ValueError(f"{path}, after line {line}: not a table in UTF-8 ({error})") from error
    header = lines.pop(0)[1] if lines else []
    for column in columns:
        if column not in header:
            raise ValueError(f"{path}: no column {column!r} in the first line, {header} (at {delimiter!r})")
    if strict and len(set(header)) < len(header):
        raise ValueError(f"{path}: a column is there twice in the first line, {header}")
    for line, fields in lines:
        if strict and len(fields) > len(header):
            raise ValueError(f"{path}, line {line}: {len(fields)} fields for {len(header)} columns")
        if any(fields):
            yield line, dict(itertools.zip_longest(header, fields, fillvalue=""))


def _float(text, where):
    """The finite number in a field; `where` begins the message of the ValueError."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{where}: {text!r} is not a number")
    return number


def _key(text, where):
    """Number (0..23) of a key that is written as "Db major", "C# minor", "Bb:min", "F#m", "E" or the like."""
    pattern = r"([A-G])([#b♯♭]?)\s*:?\s*(?:(m|(?i:min|minor))|M|(?i:maj|major)|)"
    match = re.fullmatch(pattern, text.strip())
    if not match:
        raise ValueError(f"{where}: {text!r} is not a key such as 'Db major' or 'C# minor'")
    letter, sign, minor = match.groups()
    tonic = {"C": 0, "D": 2, "E": 4, "F": 5, "G": 7, "A": 9, "B": 11}[letter]
    tonic += {"": 0, "#": 1, "♯": 1, "b": -1, "♭": -1}[sign]
    return tonic % 12 + (12 if minor else 0)


def _sha1(text):
    """The SHA-1 of a text as an integer: a random-looking number that is the same on every machine."""
    return int(hashlib.sha1(text.encode()).hexdigest(), 16)


def _ranked_splits(groups):
    """{group: split} by rank of the SHA-1: a tenth test, a tenth valid, at least one each, the rest train.

    A new group changes the split of few others.
    """
    ranked = sorted(set(groups), key=_sha1)
    tenth = max(1, round(len(ranked) / 10))
    test, valid = ranked[:tenth], ranked[tenth : 2 * tenth]
    return dict.fromkeys(ranked, "train") | dict.fromkeys(valid, "valid") | dict.fromkeys(test, "test")


def _standardise(clips, where):
    """Subtract from each target its mean and divide by its standard deviation, both over train and valid."""
    targets = np.array([clip.label for clip in clips])  # (n, T)
    development = targets[[clip.split != "test" for clip in clips]]
    if not len(development) or not np.ptp(development, axis=0).all():
        raise ValueError(f"{where}: a target has fewer than two values in train and valid")
    targets = (targets - development.mean(axis=0)) / development.std(axis=0)
    return [clip._replace(label=label) for clip, label in zip(clips, targets.tolist())]


GENRES = ("blues", "classical", "country", "disco", "hiphop", "jazz", "metal", "pop", "reggae", "rock")


def _gtzan(files):
    """GTZAN Genre Collection (Tzanetakis and Cook, 2002), fault-filtered split (Kereliuk et al., 2015).

    Where to get it: the sound from marsyas.info, the lists in github.com/coreyker/dnn-mgr, folder gtzan.
    The folder holds: genres/blues/blues.00000.wav (or .au) and so on; train_, valid_ and test_filtered.txt.
    """
    clips = []
    for split in SPLITS:
        table = files[f"{split}_filtered.txt"]
        for line in table.read_text("utf-8-sig", "replace").split():
            match = re.search(rf"({'|'.join(GENRES)})\.\d{{5}}", line)
            if not match:
                raise ValueError(f"{table}: {line!r} is not a name like 'blues/blues.00029.wav'")
            stem, genre = match[0], match[1]
            clips.append(Clip(_sound(files, stem, line), 0.0, None, GENRES.index(genre), split, stem))
    return _task("gtzan", "classes", GENRES, clips, published={"train": 443, "valid": 197, "test": 290})


def _mtt(files):
    """MagnaTagATune (Law et al., 2009): 50 most frequent tags, split by folder (van den Oord et al., 2014).

    Where to get it: mirg.city.ac.uk, The MagnaTagATune Dataset; the sound is a zip in three parts.
    The folder holds: annotations_final.csv, and the zip's sixteen folders 0, 1, ... f of .mp3 files.
    """
    rows, tags, count = [], [], Counter()
    for _, row in _table(files["annotations_final.csv"], ("clip_id", "mp3_path"), "\t"):
        number, name, tags = row.pop("clip_id"), row.pop("mp3_path"), list(row)
        present = {tag for tag in tags if row[tag] == "1"}
        rows.append((number, name, present))
        count.update(present)
    tags = sorted(tags, key=lambda tag: -count[tag])[:50]  # of equally frequent tags the first columns
    split_of = dict.fromkeys("0123456789ab", "train") | {"c": "valid"} | dict.fromkeys("def", "test")
    clips = []
    for number, name, present in rows:
        if number in ("35644", "55753", "57881"):  # corrupt as published
            continue
        path = _sound(files, name.removesuffix(".mp3"), name)
        label = [float(tag in present) for tag in tags]
        song = re.sub(r"-\d+-\d+\.mp3$", "", name)  # a name ends in the clip's first and last second
        clips.append(Clip(path, 0.0, None, label, split_of.get(name[:1], "test"), song))
    return _task("mtt", "tags", tags, clips, published={"train": 18_706, "valid": 1_825, "test": 5_329})


def _validation_artists(tracks):
    """Artists chosen by hash, and those who share a track with them, in two passes over the tracks."""
    valid = {artist for artists in tracks for artist in artists if _sha1(artist) % 116 >= 100}
    for _ in range(2):
        for artists in tracks:
            if artists & valid:
                valid |= artists
    return valid


def _count_pieces(path, seconds):
    """How many whole pieces of `seconds` a file holds; 1 if it is short, missing, unreadable, or no song."""
    try:
        duration = soundfile.info(str(path)).duration if isinstance(path, Path) else 0
    except (OSError, soundfile.SoundFileError):  # decoding will say what is wrong with it
        duration = 0
    return int(duration // seconds) if seconds <= duration < 3600 else 1


def _giantsteps(files):
    """GiantSteps keys: train and valid from the MTG-Key set (Faraldo), test the Key set (Knees et al., 2015).

    Where to get it: github.com/GiantSteps, giantsteps-mtg-key-dataset and giantsteps-key-dataset, which have
    scripts for the sound.
    The folder holds: giantsteps-mtg-key-dataset/annotations/annotations.txt and beatport_metadata.txt;
    giantsteps-key-dataset/annotations/key/<ID>.LOFI.key; and, anywhere, the <ID>.LOFI.mp3 of both.
    """
    tracks = []
    for _, row in _table(files["beatport_metadata.txt"], ("ID", "ARTIST"), "\t"):
        tracks.append((row["ID"], {artist.strip().lower() for artist in row["ARTIST"].split(",")}))
    artists_of = dict(tracks)
    valid = _validation_artists([artists for _, artists in tracks])
    songs, table = [], files["annotations/annotations.txt"]  # songs: (ID, key, split)
    for line, row in _table(table, ("ID", "MANUAL KEY", "C"), "\t"):
        if row["C"] == "2" and "/" not in row["MANUAL KEY"]:  # the annotator is sure, and names one key
            split = "valid" if artists_of.get(row["ID"], set()) & valid else "train"
            songs.append((row["ID"], _key(row["MANUAL KEY"], f"{table}, line {line}"), split))
    for tail, path in files.items():
        match = re.fullmatch(r"annotations/key/([^.]+)\.LOFI\.key", tail)
        if match and path.parent.parent != table.parent:
            songs.append((match[1], _key(path.read_text("utf-8-sig", "replace"), path), "test"))
    clips = []
    for song, key, split in songs:
        path = _sound(files, f"{song}.LOFI", f"{song}.LOFI.mp3")
        clips += [Clip(path, 30.0 * i, 30.0, key, split, song) for i in range(_count_pieces(path, 30))]
    published = {"train": 3_687, "valid": 942, "test": 2_406}
    return _task("giantsteps", "key", KEYS, clips, per_group=True, published=published)


def _emomusic(files):
    """emoMusic (Soleymani et al., 2013): arousal and valence of 45 seconds, standardised; split by artist.

    Where to get it: the University of Geneva's page emoMusic, 1000 songs for emotional analysis of music.
    The folder holds: songs_info.csv and static_annotations.csv in annotations, clips_45seconds/<song_id>.mp3.
    """
    clips, means, table = [], {}, files["static_annotations.csv"]
    for line, row in _table(table, ("song_id", "mean_arousal", "mean_valence")):
        where = f"{table}, line {line}"
        means[row["song_id"]] = [_float(row["mean_arousal"], where), _float(row["mean_valence"], where)]
    for _, row in _table(files["songs_info.csv"], ("song_id", "Artist", "Mediaeval 2013 set")):
        song = row["song_id"]
        if song not in means:
            continue
        artist = " ".join(re.sub(r"[^a-z\s]", "", row["Artist"].lower()).split())
        split = "valid" if _sha1(artist) % 10 >= 8 else "train"
        if row["Mediaeval 2013 set"] == "evaluation":
            split = "test"
        path = _sound(files, f"clips_45seconds/{song}", f"clips_45seconds/{song}.mp3")
        clips.append(Clip(path, 0.0, None, means[song], split, song))
    clips = _standardise(clips, table)  # a missing file changes no other clip's label
    published = {"train": 504, "valid": 115, "test": 125}
    return _task("emomusic", "regression", ("arousal", "valence"), clips, published=published)


INSTRUMENTS = ("BTb", "Hn", "Tbn", "TpC", "Acc", "Vc", "Cb", "Va", "Vn", "ASax", "Bn", "ClBb", "Fl", "Ob")


def _tinysol(files):
    """TinySOL (Cella et al., 2020): single notes of 14 instruments; fold 0 is valid, 1 test, 2 to 4 train.

    Where to get it: zenodo.org/records/3685367, TinySOL.tar.gz and TinySOL_metadata.csv.
    The folder holds: TinySOL_metadata.csv; audio/Brass/Bass_Tuba/ordinario/BTb-ord-F#1-pp-N-N.wav and so on.
    """
    split_of = {"0": "valid", "1": "test", "2": "train", "3": "train", "4": "train"}
    clips, table = [], files["TinySOL_metadata.csv"]
    for line, row in _table(table, ("Path", "Fold", "Instrument (abbr.)")):
        fold, instrument = row["Fold"], row["Instrument (abbr.)"]
        if fold not in split_of or instrument not in INSTRUMENTS:
            raise ValueError(f"{table}, line {line}: {fold!r} is no fold or {instrument!r} no instrument")
        name = row["Path"].split("/")[-1].removesuffix(".wav")  # no other note has it
        path = _sound(files, name, row["Path"])
        clips.append(Clip(path, 0.0, None, INSTRUMENTS.index(instrument), split_of[fold], name))
    return _task("tinysol", "classes", INSTRUMENTS, clips)


def _beatport(files):
    """Beatport EDM Key (Faraldo): previews of two minutes with exactly one key; 80/10/10 within each key.

    Where to get it: zenodo.org/records/1101082, audio.zip and keys.zip.
    The folder holds: audio/100066 Lindstrom - Monsteer (Original Mix).mp3 and so on, keys/ the same in .txt.
    All its IDs are in GiantSteps-MTG-Key too: never train on one of the two data sets and test on the other.
    """
    clips, unused = [], []
    for tail, path in files.items():
        match = re.fullmatch(r"keys/((\d+) [^/]*)\.txt", tail)
        if not match:
            continue
        stem, number = match.groups()
        text = path.read_text("utf-8-sig", "replace").strip()
        if re.fullmatch(r"[A-G][#b]?\s+(major|minor)", text):
            sound = _sound(files, f"audio/{stem}", f"audio/{stem}.mp3")
            clips.append(Clip(sound, 0.0, None, _key(text, path), "", number))
        else:
            unused.append(f"{number} ({text!r})")
    split_of = {}
    for key in range(24):
        split_of |= _ranked_splits(clip.group for clip in clips if clip.label == key)
    clips = [clip._replace(split=split_of[clip.group]) for clip in clips]
    note = "All IDs are in GiantSteps-MTG-Key too: never train on one of these two and test on the other. "
    note += f"{len(unused)} tracks are not used, they have no single key: {', '.join(unused)}"
    return _task("beatport", "key", KEYS, clips, note=note)


DATASETS = {  # the reader, and the files and folders that it needs
    "gtzan": (_gtzan, [f"{split}_filtered.txt" for split in SPLITS]),
    "mtt": (_mtt, ["annotations_final.csv"]),
    "giantsteps": (_giantsteps, ["annotations/annotations.txt", "beatport_metadata.txt", "annotations/key"]),
    "emomusic": (_emomusic, ["songs_info.csv", "static_annotations.csv", "clips_45seconds"]),
    "tinysol": (_tinysol, ["TinySOL_metadata.csv"]),
    "beatport": (_beatport, ["audio", "keys"]),
}
SYNTH = {
    "synth-key": ("key", KEYS),
    "synth-style": ("classes", tuple(STYLES)),
    "synth-tags": ("tags", TAGS),
    "synth-mood": ("regression", ("arousal", "valence")),
}
SYNTH_SPLITS = {"train": (101, 600), "valid": (102, 200), "test": (103, 400)}  # seed (training uses 0), clips


def _label_columns(path, header, kind):
    """The kind of a user's table, from its columns unless given, and the columns that hold the labels."""
    columns = [name for name in header if name not in ("path", "split", "group", "offset", "duration")]
    if not columns:
        raise ValueError(f"{path}: no column 'label', 'tags', or numbers to predict")
    if kind is None and "label" in columns:
        kind = "classes"
    elif kind is None:
        kind = "tags" if "tags" in columns else "regression"
    if kind == "regression":
        return kind, columns
    column = "tags" if kind == "tags" and "tags" in columns else "label"
    if column not in columns:
        raise ValueError(f"{path}: no column {column!r}")
    return kind, [column]


def _own_clip(where, row, folder):
    """One row of a user's table as a Clip without label; split and group are as written, or None."""
    path, split = folder / row["path"], row.get("split")
    offset = _float(row.get("offset") or 0, f"{where}, offset")
    duration = _float(row["duration"], f"{where}, duration") if row.get("duration") else None
    if not row["path"]:
        raise ValueError(f"{where}: no path")
    if split not in (None, *SPLITS):
        raise ValueError(f"{where}: the split {split!r} is none of {', '.join(SPLITS)}")
    if offset < 0 or (duration is not None and duration <= 0):
        raise ValueError(f"{where}: the offset must not be negative, and the duration must be more than 0")
    return Clip(path if path.is_file() else row["path"], offset, duration, None, split, row.get("group"))


def _own_groups(rows, clips, folder):
    """Clips without a group get the name of their file, the same one however a row writes its path."""
    files = [os.path.realpath(folder / row["path"]) for _, row in rows]
    names = {}
    for file, (_, row) in zip(files, rows):
        name = Path(os.path.normpath(row["path"])).as_posix()
        names[file] = min(name, names.get(file, name))
    return [clip._replace(group=clip.group or names[file]) for file, clip in zip(files, clips)]


def _own_splits(path, rows, clips):
    """Clips with the splits of a user's table, or else by rank of the groups. No group is in two splits."""
    split_of = {}
    for (where, row), clip in zip(rows, clips):
        other = split_of.setdefault(clip.group, clip.split)
        if clip.split != other:
            same = f"the same {'group' if row.get('group') else 'file'} {clip.group!r}"
            raise ValueError(f"{where}: {clip.split}, but {same} is in {other} above")
    if clips[0].split is None:
        split_of = _ranked_splits(split_of)
    for split in SPLITS:
        if split not in split_of.values():
            raise ValueError(f"{path}: no clips for {split}; a table without splits needs three groups")
    return [clip._replace(split=split_of[clip.group]) for clip in clips]


def _own_targets(path, rows, kind, columns):
    """The labels of a user's table as numbers, and the names of its classes, tags or targets."""
    if kind == "regression":
        return [[_float(row[name], f"{where}, {name}") for name in columns] for where, row in rows], columns
    column = columns[0]
    for where, row in rows:
        if kind != "tags" and not row[column]:
            raise ValueError(f"{where}: no {column}")
    if kind == "key":
        return [_key(row[column], where) for where, row in rows], KEYS
    if kind == "tags":
        tags = [{tag.strip() for tag in row[column].split("|")} - {""} for _, row in rows]
        names = sorted(set().union(*tags))
        labels = [[float(name in present) for name in names] for present in tags]
    else:
        names = sorted({row[column] for _, row in rows})
        labels = [names.index(row[column]) for _, row in rows]
    if not names or (kind == "classes" and len(names) == 1):
        raise ValueError(f"{path}: nothing to tell apart, column {column!r} has {names or 'no tag'} only")
    return labels, names


def _own_labels(path, folder, kind):
    """The task in a user's own table, as `load_task` describes it; its paths are relative to `folder`."""
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file")
    rows = [(f"{path}, line {line}", row) for line, row in _table(path, ("path",), strict=True)]
    if not rows:
        raise ValueError(f"{path}: no clips in it")
    kind, columns = _label_columns(path, list(rows[0][1]), kind)
    clips = [_own_clip(where, row, folder) for where, row in rows]
    labels, names = _own_targets(path, rows, kind, columns)
    clips = _own_splits(path, rows, _own_groups(rows, clips, folder))
    clips = [clip._replace(label=label) for clip, label in zip(clips, labels)]
    if kind == "regression":
        clips = _standardise(clips, path)
    task = _task(path.stem, kind, names, clips)
    if not task.clips:
        advice = f"such as {folder / task.missing[0]}; paths are relative to {folder}"
        raise ValueError(f"{path}: none of its files is there, {advice}")
    return task


def _dataset(name, root):
    """A task of DATASETS from the folder `root`; an error says where to get what is missing."""
    reader, needed = DATASETS[name]
    files = _files(root)
    absent = [file for file in needed if file not in files]
    if not absent:
        task = reader(files)
        if task.clips:
            return task
        absent = [f"sound that the labels name, such as {task.missing[:1]},"]
    problem = f"no {' and no '.join(absent)} below this folder"
    if not root.is_dir():
        problem = "there is no such folder"
    raise ValueError(f"{root}: {problem}. {' '.join(reader.__doc__.split())}")


def load_task(name, root=None, kind=None):
    """The labelled clips of a task: one of DATASETS in `root` (default: datasets/NAME), of SYNTH, or a table.

    A table is a .csv file with a column `path`, relative to the table (or to `root`), and what to predict:
    `label`, or `tags` ("loud|fast"; may be empty), or columns of numbers. Optional columns are `split`,
    `group`, `offset` and `duration` (seconds). `kind` ("classes", "key", "tags", "regression") is for a table
    whose columns do not tell it. Without `split`, 80/10/10 of the groups; without `group`, each file is one;
    no group is in two splits. Clips of SYNTH get their labels with their sound, from `data.synthesize`.
    Raises ValueError with a sentence that says what to do when something is missing or wrong.
    """
    name = str(name)
    is_table = name.lower().endswith(".csv")
    if kind not in (None, *METRICS):
        raise ValueError(f"no kind of task {kind!r}: there are {', '.join(METRICS)}")
    if kind and not is_table:
        raise ValueError(f"a kind of task is for a table of your own; that of {name!r} is fixed")
    if not is_table and name not in (*DATASETS, *SYNTH):
        known = ", ".join((*DATASETS, *SYNTH))
        raise ValueError(f"no task {name!r}: there are {known}, or a table of your own, NAME.csv")

    if is_table:
        return _own_labels(Path(name), Path(root or Path(name).parent), kind)
    if name in DATASETS:
        return _dataset(name, Path(root or f"datasets/{name}"))
    clips = []
    for split, (seed, count) in SYNTH_SPLITS.items():
        clips += [Clip((seed, i), 0.0, None, None, split, f"{seed}/{i}") for i in range(count)]
    return _task(name, *SYNTH[name], clips)


# ----------------------------------------------------------------------------------------------------------------------
# Representations: what becomes of a clip
# ----------------------------------------------------------------------------------------------------------------------


def load_clip(clip):
    """The wave of a clip (samples,) float32 at 16 kHz, and its labels if they come with the sound, as in the embedded music."""
    if isinstance(clip.path, tuple):
        waves, labels = data.synthesize(1, *clip.path)
        return waves[0], {name: values[0].tolist() for name, values in labels.items()}
    return load_audio(clip.path, clip.offset, clip.duration), None


def mel_segments(wave):
    """(samples,) -> (n, 128, 96) float16 mel power, the encoder's input; less than a window is filled up with zeros."""
    wave = F.pad(wave, (0, max(0, N_FFT - len(wave))))
    return segments(mel_spectrogram(wave).clamp(max=data.FLOAT16_MAX).half())


def _statistics(frames):
    """(features, T) over time -> mean and standard deviation of them and of their first and second differences."""
    first = frames.diff(dim=1)
    return torch.cat([part for x in (frames, first, first.diff(dim=1)) for part in (x.mean(dim=1), x.std(dim=1, correction=0))])


def mfcc(wave):
    """Castellon's timbre feature: statistics of 20 mel cepstral coefficients of the peak-normalised sound: (120,).

    The orthonormal DCT-II of mel power in decibels, floored 80 dB below the loudest value (librosa's `feature.mfcc`).
    """
    wave = F.pad(wave, (0, max(0, 4 * N_FFT - len(wave))))
    mel = mel_spectrogram(wave / wave.abs().max().clamp(min=1e-9))
    level = 10 * mel.clamp(min=1e-10).log10()
    level = level.clamp(min=level.max() - 80)
    k, n = torch.arange(20.0)[:, None], torch.arange(128.0)
    dct = torch.cos(torch.pi / 128 * (n + 0.5) * k) * (2 / 128) ** 0.5
    dct[0] /= 2**0.5
    return _statistics(dct @ level)


def chroma(wave):
    """Castellon's harmony feature: statistics of 12 pitch classes of the peak-normalised sound: (72,).

    Theirs folds a constant-Q transform at 22,050 Hz; this folds an STFT at 16 kHz, each bin shared among the pitch classes by
    a Gaussian of a semitone, within some octaves of 440 Hz; every frame is scaled to a maximum of 1.
    """
    wave = F.pad(wave, (0, max(0, 4 * N_FFT - len(wave))))
    wave = wave / wave.abs().max().clamp(min=1e-9)
    spectrum = torch.stft(wave, 2 * N_FFT, 512, window=torch.hann_window(2 * N_FFT), return_complex=True)
    power = spectrum.real.square() + spectrum.imag.square()  # (bins, T)
    hertz = torch.arange(1, N_FFT + 1) * SAMPLE_RATE / (2 * N_FFT)  # without the constant
    pitch = 12 * (hertz / 440).log2() + 9  # semitones above C
    distance = (pitch - torch.arange(12)[:, None] + 6) % 12 - 6  # (12, bins)
    weights = torch.exp(-0.5 * (2 * distance) ** 2) * torch.exp(-0.5 * ((pitch - 9) / 24) ** 2)
    frames = weights @ power[1:]
    return _statistics(frames / frames.amax(dim=0).clamp(min=1e-9))


INPUTS = {  # wave (samples,) -> (rows, ...): what a representation is computed from
    "mel": mel_segments,
    "mfcc": lambda wave: mfcc(wave)[None],
    "chroma": lambda wave: chroma(wave)[None],
    "power": lambda wave: wave.double().square().mean()[None, None],  # tells silence
}


class Representation(NamedTuple):
    """What turns sound into features, and under which name they and the results are kept."""

    encoder: Myna | str  # or one of INPUTS, which is then the representation
    name: str = ""
    key: str = ""  # tells this encoder from all others of its name
    folder: Path | None = None  # for results, and for the features, which are kept there; None: they are not kept


def _clip_inputs(clip, kinds, versions):
    """In a worker: one clip decoded, and each version of it transformed. Returns ({kind: (rows, V, ...)}, labels), or the
    reason why it could not be read."""
    try:
        wave, labels = load_clip(clip)
    except ValueError as error:
        return str(error)
    waves = versions(wave, clip) if versions else [wave]
    return {kind: np.stack([INPUTS[kind](wave).numpy() for wave in waves], axis=1) for kind in kinds}, labels


def in_workers(function, jobs, workers=None):
    """function(*job) for each of the jobs, in order, computed in processes some way ahead of the caller."""
    pool = data.start_workers(workers or CORES)
    try:
        futures = (pool.submit(function, *job) for job in jobs)
        pending = deque(itertools.islice(futures, 64))
        while pending:
            try:
                result = pending.popleft().result()
            except BrokenProcessPool as error:
                raise ValueError("a decoding process died: out of memory, or of a file it could not stand") from error
            pending.extend(itertools.islice(futures, 1))
            yield result
    finally:  # when interrupted, without waiting for what is pending
        pool.shutdown(wait=False, cancel_futures=True)


def on_each_core(function, *jobs, device="cpu"):
    """[function(*job) for job in zip(*jobs)], on a CPU side by side in threads that share the cores.

    Small products gain more from a core to themselves than from all cores on each of them.
    """
    cores = torch.get_num_threads()
    threads = min(cores, len(jobs[0])) if torch.device(device).type == "cpu" else 1
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(cores // threads,))
    try:
        return list(pool.map(function, *jobs))
    finally:  # when interrupted, without waiting for what is pending
        pool.shutdown(wait=False, cancel_futures=True)


@dataclass
class Features:
    """What a representation makes of a task's clips: rows of numbers, and which clip each row came from."""

    rows: dict  # name -> (n, F), or (n, V, F) of V versions; a hybrid model gives "square" and "vertical"
    owner: torch.Tensor  # (n,) long: number of the clip in the task
    labels: list  # of every clip, None for one that could not be read
    left_out: list  # [path, reason] of those


def embed_task(task, encoder, device="cpu", workers=None):
    """Features of a task's clips: `encoder` is a Myna (a row a segment), "mfcc" or "chroma" (a row a clip). Returns Features."""
    return embed_all(task, [Representation(encoder)], device, workers)[0]


def embed_all(task, representations, device="cpu", workers=None, versions=None, bar=None):
    """Features of a task for several representations, each clip decoded once. Returns a list of Features.

    Decoding runs in worker processes ahead of the encoders. A representation with a folder has its features kept there, under
    a fingerprint of the task and of the encoder, and read back when both are the same. `versions(wave, clip)`, which worker
    processes must be able to import, makes several waves of one, for instance with noise; their features are not kept.
    """
    changed = {c.path: os.path.getmtime(c.path) for c in task.clips if isinstance(c.path, Path) and c.path.exists()}
    clips = [[str(c.path), c.offset, c.duration, str(c.label), changed.get(c.path)] for c in task.clips]
    code = hashlib.sha1(b"".join(Path(module.__file__).read_bytes() for module in (data, sys.modules[Myna.__module__])))
    code.update(Path(__file__).read_bytes())  # who changes a formula gets new features
    found, fresh = [], []
    for encoder, name, key, folder in representations:
        cache = folder / f"features_{task.name}_{name}.pt" if folder and not versions else None
        fingerprint = hashlib.sha1(json.dumps([task.name, key, code.hexdigest(), clips]).encode()).hexdigest()
        try:
            kept = read_checkpoint(cache) if cache and cache.exists() else {}
        except ValueError:  # cut short: made anew
            kept = {}
        if kept.pop("fingerprint", None) == fingerprint:
            found.append(Features(**kept))
            tqdm.write(f"features from {cache}")
            continue
        is_model = isinstance(encoder, Myna)
        if is_model:
            encoder.to(device)
        found.append(Features({name: [] for name in (encoder.patches if is_model else [encoder])}, [], [], []))
        fresh.append((encoder, "mel" if is_model else encoder, found[-1], cache, fingerprint))
    if not fresh:
        return found

    kinds = {kind for _, kind, *_ in fresh}
    waiting = []  # inputs of clips, until they make a batch

    def encode():
        for encoder, kind, features, *_ in fresh:
            batch = torch.from_numpy(np.concatenate([inputs[kind] for inputs in waiting]))  # (rows, V, ...)
            for name, rows in features.rows.items():
                if kind == "mel":
                    embed = lambda part: encoder.embed(part.to(device), name).cpu()
                    parts = batch.flatten(0, 1).split(64 if torch.device(device).type == "cpu" else 1024)
                    vectors = torch.cat(on_each_core(embed, parts, device=device))
                    rows.append(vectors.unflatten(0, batch.shape[:2]))
                else:
                    rows.append(batch)
        waiting.clear()

    jobs = ((clip, kinds, versions) for clip in task.clips)
    with nullcontext(bar) if bar else tqdm(total=len(task.clips), desc=f"{task.name}: embedding", unit="clip") as bar:
        for number, (clip, result) in enumerate(zip(task.clips, in_workers(_clip_inputs, jobs, workers))):
            bar.update()
            readable = not isinstance(result, str)
            for _, kind, features, *_ in fresh:
                if readable:
                    label = result[1][task.name.removeprefix("synth-")] if result[1] else clip.label
                    features.owner.extend([number] * len(result[0][kind]))
                else:
                    features.left_out.append([str(clip.path), result])
                features.labels.append(label if readable else None)
            if readable:
                waiting.append(result[0])
            if sum(max(array.shape[0] * array.shape[1] for array in inputs.values()) for inputs in waiting) >= 1024:
                encode()
        if waiting:
            encode()
    for *_, features, cache, fingerprint in fresh:
        if not features.owner:
            raise ValueError(f"{task.name}: not one clip could be read; the first: {features.left_out[0][1]}")
        features.owner = torch.tensor(features.owner)
        for name, rows in features.rows.items():
            rows = torch.cat(rows)  # (n, V, F)
            features.rows[name] = rows if versions else rows[:, 0]
        if cache:
            cache.parent.mkdir(parents=True, exist_ok=True)
            torch.save({"fingerprint": fingerprint, **vars(features)}, cache.with_suffix(".part"))
            os.replace(cache.with_suffix(".part"), cache)
    return found


# ----------------------------------------------------------------------------------------------------------------------
# The grid: many probes side by side
# ----------------------------------------------------------------------------------------------------------------------


class Configuration(NamedTuple):
    """One way of training a probe (Appendix C)."""

    standardise: bool  # each feature to mean 0 and deviation 1 over the training split
    hidden: tuple  # widths of hidden layers: () is the linear probe
    batch: int
    lr: float
    dropout: float  # of the input and of every hidden layer
    l2: float  # in Adam's gradient


GRID = [
    Configuration(*values)
    for values in itertools.product(
        (False, True), ((), (512,)), (64, 256), (1e-5, 1e-4, 1e-3), (0.25, 0.5, 0.75), (0.0, 1e-4, 1e-3)
    )
]  # 216
QUICK_GRID = [c for c in GRID if c.batch == 64 and c.lr == 1e-3 and c.l2 != 1e-4]  # 24, those that are quick to train
CACHE = 24 * 2**20  # bytes of a processor's cache that a stack of probes may fill
LOOK, PATIENCE = 8, 256  # steps between looks at the validation split, and looks without a better one before a probe stops


@dataclass
class Probe:
    """A trained probe: its configuration, what it reached on the validation split and when, and its weights."""

    configuration: Configuration
    valid: float
    step: int
    shift: torch.Tensor  # (F,) standardisation, 0 and 1 without
    scale: torch.Tensor
    layers: list  # of (weight (in, out), bias (out,))

    def __call__(self, x):
        """Outputs for features: (n, F) -> (n, C), logits or values."""
        x = (x - self.shift) * self.scale
        for weight, bias in self.layers[:-1]:
            x = F.relu(x @ weight + bias)
        return x @ self.layers[-1][0] + self.layers[-1][1]


def probabilities(kind, outputs, owner=None, count=None):
    """A probe's outputs (..., n, C) as what is scored; with `owner` (n,) averaged over the rows of each of `count` owners."""
    if kind in ("classes", "key"):
        outputs = outputs.softmax(dim=-1)
    elif kind == "tags":
        outputs = outputs.sigmoid()
    if owner is None:
        return outputs
    total = outputs.new_zeros(*outputs.shape[:-2], count, outputs.shape[-1]).index_add_(-2, owner, outputs)
    return total / total.new_zeros(count, 1).index_add_(0, owner, total.new_ones(len(owner), 1))  # bincount: a GPU would wait


def _input_of(configuration):
    """What decides which input a probe is trained on."""
    return configuration.standardise, configuration.dropout


def fit_grid(configurations, train, valid, kind, outputs, seed=0, steps=None, progress=None):
    """Train every configuration as it would train alone, those of one batch size and shape side by side. A Probe for each.

    `train` is (features (n, F), targets); `valid` too, or (features, targets, owner, count): then rows are scored by the mean
    over each of `count` owners. `outputs` is the number of classes, tags or targets. Early stopping as in Castellon et al.: the
    primary metric on the validation split, every 8 steps from step 0 on, 256 looks of patience, best weights kept.
    `steps` ends all after so many steps instead (to measure speed). `progress(n)` is told when n probes have stopped.
    """
    probes = [None] * len(configurations)
    for batch, hidden in sorted({(c.batch, c.hidden) for c in configurations}):
        chosen = [i for i, c in enumerate(configurations) if (c.batch, c.hidden) == (batch, hidden)]
        chosen.sort(key=lambda i: _input_of(configurations[i]))  # those that share an input are neighbours
        values = sum(a * b for a, b in itertools.pairwise((train[0].shape[1], *hidden, outputs)))
        # On a CPU a stack's weights, gradients and Adam's means should stay in the cache; a GPU takes them all at once.
        width = len(chosen) if train[0].is_cuda else max(1, CACHE // (16 * values))
        for at in range(0, len(chosen), width):
            some = chosen[at : at + width]
            stack = [configurations[i] for i in some]
            for i, fitted in zip(some, _fit_stack(stack, train, valid, kind, outputs, seed, steps, progress)):
                probes[i] = fitted
    return probes


def _fit_stack(configurations, train, valid, kind, outputs, seed, steps, progress):
    """Probes of one batch size and shape, as one batched model of S members, sorted by `_input_of`."""
    (x, y), (valid_x, valid_y, *owner) = train[:2], valid
    device, n = x.device, len(x)
    batch, hidden = min(configurations[0].batch, n), configurations[0].hidden
    generator = torch.Generator(device).manual_seed(seed)
    column = lambda name: torch.tensor([getattr(c, name) for c in configurations], device=device).float()[:, None, None]
    lr, l2, dropout, alive = column("lr"), column("l2"), column("dropout"), list(range(len(configurations)))

    # The inputs that differ: standardised or not, and for training with each dropout
    deviation = x.std(dim=0, correction=0)
    shift = torch.stack([torch.zeros_like(deviation), x.mean(dim=0)])
    scale = torch.stack([torch.ones_like(deviation), 1 / deviation.where(deviation > 0, 1.0)])
    train_x = (x - shift[:, None]) * scale[:, None]  # (2, n, F)
    kinds = sorted({_input_of(c) for c in configurations})
    flags = torch.tensor([flag for flag, _ in kinds], device=device).long()
    rates = torch.tensor([rate for _, rate in kinds], device=device)[:, None, None]
    members = [sum(_input_of(c) == kind for c in configurations) for kind in kinds]  # how many share each input
    which = torch.arange(len(kinds)).repeat_interleave(torch.tensor(members)).to(device)
    look_x = (valid_x - shift[flags, None]) * scale[flags, None]  # (kinds, n, F)

    # Every member begins with the same weights, torch's own for a linear layer, and draws the same batches and dropout
    layers = []
    for a, b in itertools.pairwise((x.shape[1], *hidden, outputs)):
        draw = (torch.rand(a + 1, b, generator=generator, device=device) * 2 - 1) / math.sqrt(a)
        layers += [draw[:-1].expand(len(configurations), -1, -1).clone(), draw[-1:].expand(len(configurations), -1, -1).clone()]
    first, second = [torch.zeros_like(w) for w in layers], [torch.zeros_like(w) for w in layers]
    best = [w.clone() for w in layers]
    best_score = torch.full((len(configurations),), -torch.inf, device=device, dtype=torch.float64)
    best_step = torch.zeros(len(configurations), dtype=torch.long, device=device)
    done = [None] * len(configurations)

    def forward(inputs, drop):  # (kinds, B, F) -> (S, B, C)
        if not hidden:  # linear probes are narrow: all that share an input are one product with their weights side by side
            wide = [x @ w.transpose(0, 1).flatten(1) for x, w in zip(inputs, layers[0].split(members))]  # (B, members * C)
            return torch.cat([z.unflatten(1, (-1, outputs)).transpose(0, 1) for z in wide if z.shape[1]]) + layers[1]
        inputs = inputs[which]  # (S, B, F)
        for weight, bias in zip(layers[:-2:2], layers[1:-2:2]):
            inputs = torch.baddbmm(bias, inputs, weight).relu()
            if drop:
                uniform = torch.rand(inputs.shape[1:], generator=generator, device=device)
                inputs = inputs * ((uniform >= dropout) / (1 - dropout))
        return torch.baddbmm(layers[-1], inputs, layers[-2])

    for step in itertools.count():
        if step % LOOK == 0 and steps is None:
            with torch.no_grad():
                score = primary_score(kind, valid_y, probabilities(kind, forward(look_x, False), *owner))
                better = (score > best_score) & (step - best_step <= PATIENCE * LOOK)
                best_score, best_step = torch.where(better, score, best_score), best_step.where(~better, step)
                for kept, weight in zip(best, layers):
                    torch.where(better[:, None, None], weight, kept, out=kept)
        # Who has lost patience is asked at every eighth look only, for a GPU would wait for the answer.
        stopped = torch.zeros(0)
        if step == steps:
            stopped, best = torch.ones(len(alive), dtype=torch.bool, device=device), [w.detach() for w in layers]
        elif steps is None and step % (8 * LOOK) == 0:
            stopped = step - best_step >= PATIENCE * LOOK
        if stopped.any():
            for member in stopped.nonzero()[:, 0].tolist():
                c = configurations[alive[member]]
                parts = [w[member].clone() for w in best]
                pairs = [(weight, bias[0]) for weight, bias in zip(parts[::2], parts[1::2])]
                valid_score, at = float(best_score[member]), int(best_step[member])
                done[alive[member]] = Probe(c, valid_score, at, shift[int(c.standardise)], scale[int(c.standardise)], pairs)
            if progress:
                progress(int(stopped.sum()))
            stay = (~stopped).nonzero()[:, 0]
            if not len(stay):
                return done
            alive = [alive[i] for i in stay.tolist()]
            members = [sum(_input_of(configurations[i]) == kind for i in alive) for kind in kinds]
            which, lr, l2, dropout = (t[stay] for t in (which, lr, l2, dropout))
            best_score, best_step = best_score[stay], best_step[stay]
            layers, first, second, best = ([w[stay].detach() for w in ws] for ws in (layers, first, second, best))

        rows = torch.randperm(n, generator=generator, device=device)[:batch]
        uniform = torch.rand(batch, x.shape[1], generator=generator, device=device)  # one draw for all dropout rates
        inputs = train_x[:, rows][flags] * ((uniform >= rates) / (1 - rates))  # (kinds, B, F)
        for w in layers:
            w.requires_grad_()
        loss = probe_loss(kind, forward(inputs, True), y[rows])
        gradients = torch.autograd.grad(loss, layers)
        first_bias, second_bias = 1 - 0.9 ** (step + 1), (1 - 0.999 ** (step + 1)) ** 0.5
        with torch.no_grad():  # Adam, with L2 in the gradient as torch's weight_decay has it; no new memory, which would cost more
            for w, g, m, v in zip(layers, gradients, first, second):
                g.addcmul_(w, l2)
                m.lerp_(g, 0.1)
                v.mul_(0.999).addcmul_(g, g, value=0.001)
                torch.sqrt(v, out=g).add_(1e-8 * second_bias).mul_(first_bias / second_bias / -lr)  # in the gradient's place
                w.addcdiv_(m, g)


def probe_loss(kind, outputs, targets):
    """The sum over the stack of each member's mean loss: outputs (S, B, C), targets (B,) or (B, C). Members do not mix."""
    targets = targets.expand(len(outputs), *targets.shape)
    if kind in ("classes", "key"):
        return F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction="sum") / outputs.shape[1]
    if kind == "tags":
        return F.binary_cross_entropy_with_logits(outputs, targets, reduction="sum") / outputs[0].numel()
    return (outputs - targets).square().sum() / outputs[0].numel()


def bootstrap(kind, targets, outputs, metric, resamples=1000, seed=0):
    """95% interval of a metric over resampled test clips: (low, high). Leading axes of `outputs` are averaged over."""
    generator = torch.Generator().manual_seed(seed)
    n = len(targets)
    score = primary_score if metric == METRICS[kind][0] else lambda *arguments: evaluate(*arguments)[metric]
    scores = []
    for _ in range(resamples):
        rows = torch.randint(n, (n,), generator=generator)
        scores.append(float(score(kind, targets[rows], outputs[..., rows, :]).mean()))
    low, high = np.nanquantile(scores, [0.025, 0.975])
    return float(low), float(high)


def split_rows(task, features, split, rows, per_segment=False):
    """One split as `fit_grid` takes it: (x, y), x being clips' means, or with `per_segment` their segments.

    Valid and test: (x, y, owner, count), y having an entry for each of `count` owners, clips, or songs where the task scores
    songs (giantsteps). Raises ValueError for a split in which nothing can be read or scored.
    """
    ids = [i for i, clip in enumerate(task.clips) if clip.split == split and features.labels[i] is not None]
    if not ids:
        raise ValueError(f"{task.name}: no clip of the {split} split could be read")
    place = torch.full((len(task.clips),), -1)
    place[ids] = torch.arange(len(ids))
    here = place[features.owner] >= 0
    x, clip = rows[here], place[features.owner[here]]  # the segments of this split, and the clip of each
    if not per_segment:
        x = torch.zeros(len(ids), x.shape[1]).index_add_(0, clip, x) / torch.bincount(clip)[:, None]
        clip = torch.arange(len(ids))
    y = torch.stack([torch.as_tensor(features.labels[i]) for i in ids])
    y = y.float() if task.kind in ("tags", "regression") else y.long()
    if split == "train":
        return x, y[clip]
    if task.kind == "tags" and not (y.mean(dim=0) * (1 - y.mean(dim=0))).any():
        raise ValueError(f"{task.name}: no tag is on some {split} clips and not on others, so that nothing can be scored on them")
    groups = [task.clips[i].group if task.per_group else i for i in ids]
    first = {}
    for n, group in enumerate(groups):
        first.setdefault(group, n)  # the clip that a song has its label from
    number = {group: n for n, group in enumerate(first)}
    return x, y[list(first.values())], torch.tensor([number[group] for group in groups])[clip], len(number)


def fit_probes(task, features, rows, grid, per_segment=False, seed=0, device="cpu", progress=None):
    """Probes of one representation, its `rows` (n, F): one for each configuration of `grid`, and the best on validation."""
    train, valid = (split_rows(task, features, split, rows, per_segment) for split in ("train", "valid"))
    train, valid = ([(t.to(device) if torch.is_tensor(t) else t) for t in part] for part in (train, valid))
    probes = fit_grid(grid, train, valid, task.kind, len(task.names), seed, progress=progress)
    return probes, max(probes, key=lambda probe: probe.valid)


def predict(task, features, rows, probe, per_segment=False, device="cpu"):
    """Targets of the test split, and what a probe says of it: probabilities or values, float64."""
    x, y, *owner = split_rows(task, features, "test", rows, per_segment)
    return y, probabilities(task.kind, probe(x.to(device)).cpu().double(), *owner)


def probe_task(task, features, grid, per_segment=False, seed=0, device="cpu"):
    """The whole protocol for one task and the representations in `features`. Returns the results as a plain dict.

    A hybrid model is probed three ways, square, vertical and both side by side, and goes on with the one that does best on the
    validation split (section 4.3). The winner of all configurations alone sees the test split.
    """
    rows = dict(features.rows)
    if len(rows) == 2:
        rows["concatenated"] = torch.cat(list(rows.values()), dim=1)
    with tqdm(total=len(grid) * len(rows), desc=f"{task.name}: probes", unit="probe") as bar:
        fit = lambda x: fit_probes(task, features, x, grid, per_segment, seed, device, bar.update)
        longest = sorted(rows, key=lambda name: -rows[name].shape[1])  # first, so that no core waits for it at the end
        found = dict(zip(longest, on_each_core(fit, [rows[name] for name in longest], device=device)))
    fitted = {name: found[name] for name in rows}
    name = max(fitted, key=lambda name: fitted[name][1].valid)
    winner = fitted[name][1]
    y, predicted = predict(task, features, rows[name], winner, per_segment, device)
    test = {metric: float(score) for metric, score in evaluate(task.kind, y, predicted).items()}
    counts = Counter(clip.split for i, clip in enumerate(task.clips) if features.labels[i] is not None)
    results = {
        "task": task.name,
        "representation": name,
        "clips": {split: counts[split] for split in SPLITS},
        "incomplete": bool(task.missing or features.left_out),
        "missing": task.missing,
        "left_out": features.left_out,
        "valid": {name: best.valid for name, (_, best) in fitted.items()},
        "test": test,
        "interval": bootstrap(task.kind, y, predicted, METRICS[task.kind][0]),
        "winner": winner.configuration._asdict(),
        "grid": {name: [[*p.configuration, p.valid, p.step] for p in probes] for name, (probes, _) in fitted.items()},
        "names": list(task.names),
    }
    if task.kind in ("classes", "key"):
        count = len(task.names)
        pairs = y * count + predicted.argmax(dim=1)
        results["confusion"] = torch.bincount(pairs, minlength=count**2).view(count, count).tolist()  # rows: the truth
    elif task.kind == "tags":
        each = {metric.__name__: metric(y, predicted, False).tolist() for metric in (roc_auc, average_precision)}
        results["per_tag"] = {name: [None if math.isnan(v) else v for v in values] for name, values in each.items()}
    elif len(task.names) > 1:
        results["test"] |= {f"r2 {n}": float(score) for n, score in zip(task.names, r2(y, predicted, False))}
    return results


# ----------------------------------------------------------------------------------------------------------------------


def newest_checkpoint():
    """The checkpoint under runs/ that was written last."""
    found = sorted(Path("runs").glob("*/checkpoint.pt"), key=os.path.getmtime)
    if not found:
        raise ValueError("there is no checkpoint under runs/: `python train.py --demo` makes one, --checkpoint names one elsewhere")
    return found[-1]


BASELINES = Path("runs/baselines")  # for representations that no checkpoint stands behind


def hand_made(name):
    """MFCC or chroma."""
    return Representation(name, name, "1", BASELINES)


def untrained(config, seed):
    """The encoder of that shape with random weights."""
    torch.manual_seed(seed)
    name = f"random-{config.size}-{config.patch}{'-log' if config.log_mel else ''}"
    return Representation(Myna(config).eval(), name, f"{name} {seed}", BASELINES)


def trained(path, patch=None):
    """The encoder in a checkpoint; None: in the newest one."""
    path = Path(path) if path else newest_checkpoint()
    model = load_model(path, patch)
    print(f"checkpoint {path}: {model.config.size}, {model.config.patch}")
    folder = path.parent if path.name == "checkpoint.pt" else Path("runs") / path.stem  # a run's own folder, wherever it lies
    return Representation(model, model.config.patch, hashlib.sha1(path.read_bytes()).hexdigest(), folder)


def choose_representation(args):
    """What --checkpoint and --features name."""
    if args.features and args.checkpoint:
        raise ValueError("--features or --checkpoint: a representation is one or the other")
    if args.features:
        return hand_made(args.features)
    if args.checkpoint == "random":
        return untrained(Config(args.size, args.patch or "hybrid"), args.seed)
    return trained(args.checkpoint, args.patch)


def embed_files(sources, out, model, per_segment, device, workers):
    """--embed: vectors of files, or of all below folders, as an .npz of `vectors`, `paths` and, by segment, `seconds`."""
    paths, out = [], Path(out)
    if out.is_dir():
        raise ValueError(f"--out {out}: there is a folder of that name")
    out.parent.mkdir(parents=True, exist_ok=True)
    for source in map(Path, sources):
        if not source.exists():
            raise ValueError(f"{source}: there is no such file or folder")
        paths += [source / name for name in data._walk(source)] if source.is_dir() else [source]
    if not paths:
        raise ValueError("no audio files there")
    clips = [Clip(path, 0.0, None, 0, "", "") for path in paths]
    features = embed_task(Task("files", "classes", (), clips, (), []), model, device, workers)
    vectors = torch.cat(list(features.rows.values()), dim=1)
    owner = features.owner
    if per_segment:
        numbers = torch.cat([torch.arange(int(count)) for count in torch.bincount(owner)])  # of a segment in its file
        extra = {"seconds": (numbers * data.FRAMES * data.HOP / SAMPLE_RATE).numpy()}
    else:
        used, owner = owner.unique(return_inverse=True)
        vectors = torch.zeros(len(used), vectors.shape[1]).index_add_(0, owner, vectors) / torch.bincount(owner)[:, None]
        owner, extra = used, {}
    with open(f"{out}.part", "wb") as file:
        np.savez(file, vectors=vectors.numpy(), paths=np.array([str(paths[i]) for i in owner]), **extra)
    os.replace(f"{out}.part", out)
    print(f"{out}: {len(vectors)} vectors of {vectors.shape[1]} numbers from {len(paths) - len(features.left_out)} files")
    for path, reason in features.left_out:
        print(f"  left out: {reason}")


def command_line():
    """The parser of the command line."""
    parser = argparse.ArgumentParser(description="Probe what a frozen encoder knows, or just write its embeddings.")
    tasks = "gtzan, mtt, giantsteps, emomusic, synth-{key,style,tags,mood}, or a labels.csv (default: %(default)s)"
    parser.add_argument("--task", default="synth-key", help=tasks)
    parser.add_argument("--data", help="folder of the data set (default: datasets/TASK)")
    parser.add_argument("--kind", choices=list(METRICS), help="of the task in a labels.csv (default: told by its columns)")
    parser.add_argument("--check", action="store_true", help="read labels and files, count them, and stop")
    parser.add_argument("--checkpoint", help="of train.py or the authors', or 'random' (default: the newest under runs/)")
    parser.add_argument("--patch", choices=[*PATCHES, "hybrid"], help="of --checkpoint random, or of a released file")
    parser.add_argument("--size", choices=list(SIZES), default="tiny", help="of --checkpoint random (default: %(default)s)")
    parser.add_argument("--features", choices=["mfcc", "chroma"], help="a hand-made representation instead of an encoder")
    parser.add_argument("--per-segment", action="store_true", help="train on segments, average predictions, as the authors do")
    parser.add_argument("--grid", choices=["full", "quick"], help="216 or 24 configurations (default: full, quick for synth-*)")
    parser.add_argument("--seed", type=int, default=0, help="of the probes and of random weights (default: %(default)s)")
    parser.add_argument("--embed", nargs="+", metavar="PATH", help="just write the embeddings of files or folders")
    parser.add_argument("--out", default="vectors.npz", help="for --embed (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: %(default)s)")
    parser.add_argument("--workers", type=int, default=CORES, help="decoding processes (default: %(default)s)")
    return parser


def check(task):
    """--check: what the splits hold, against the published numbers."""
    print(f"{task.name}: {task.kind}, {len(task.names)} outputs: {', '.join(task.names[:5])}{', ...' if len(task.names) > 5 else ''}")
    counts = Counter(clip.split for clip in task.clips)
    for split in SPLITS:
        published = f"   published {task.published[split]:6,}" if task.published else ""
        print(f"  {split:<6}{counts[split]:7,} clips{published}")
    print(f"  {len(task.missing):,} files that the labels name are missing{': ' * bool(task.missing)}{', '.join(task.missing[:5])}")


def check_machine(args):
    """Raise ValueError for a --device or a number of --workers that is not to be had, before any work is done."""
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {args.device} cannot be used here: {str(error).splitlines()[0]}") from error
    if args.workers < 1:
        raise ValueError(f"--workers {args.workers}: at least one process must decode")


def probe(args):
    """What the command line asks for."""
    check_machine(args)
    if args.per_segment and args.features:
        raise ValueError(f"--per-segment is for encoders; {args.features} describes a clip as a whole")
    if args.embed:
        encoder = choose_representation(args).encoder
        if not isinstance(encoder, Myna):
            raise ValueError("--embed takes a --checkpoint, not --features")
        return embed_files(args.embed, args.out, encoder, args.per_segment, args.device, args.workers)
    task = load_task(args.task, args.data, args.kind)
    if args.check:
        return check(task)
    representation = choose_representation(args)
    name, folder = representation.name, representation.folder
    features = embed_all(task, [representation], args.device, args.workers)[0]
    quick = (args.grid or ("quick" if task.name.startswith("synth-") else "full")) == "quick"
    results = probe_task(task, features, QUICK_GRID if quick else GRID, args.per_segment, args.seed, args.device)
    grid = "quick" if quick else "full"
    results |= {"model": name, "key": representation.key, "seed": args.seed, "grid_name": grid, "per_segment": args.per_segment}
    path = folder / f"probe_{task.name}_{name}{'-segments' if args.per_segment else ''}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".part").write_text(json.dumps(results))
    os.replace(path.with_suffix(".part"), path)

    primary, (low, high) = METRICS[task.kind][0], results["interval"]
    clips = ", ".join(f"{count} {split}" for split, count in results["clips"].items())
    tried = "24 of the 216 configurations (--grid full for all)" if quick else "all 216 configurations"
    print(f"\n{task.name} with {name}: {clips} clips, {tried}")
    for representation, score in results["valid"].items():
        chosen = len(results["valid"]) > 1 and representation == results["representation"]
        mark = "  <- goes on to the test split" if chosen else ""
        print(f"  valid  {primary:<20} {score:7.1%}   {representation}{mark}")
    for metric, score in results["test"].items():
        interval = f"   95% of resamples: {low:.1%} to {high:.1%}" if metric == primary else ""
        print(f"  test   {metric:<20} {score:7.1%}{interval}")
    winner = Configuration(**results["winner"])
    shape = f"MLP {'-'.join(map(str, winner.hidden))}" if winner.hidden else "linear"
    print(f"  winner {shape}, " + ", ".join(f"{name} {value}" for name, value in winner._asdict().items() if name != "hidden"))
    if results["incomplete"]:
        print(f"  INCOMPLETE: {len(task.missing)} files missing, {len(features.left_out)} clips unreadable")
        for _, reason in features.left_out[:10]:
            print(f"    {reason}")
    print(f"  {path}")


def main():
    """The command line."""
    try:
        probe(command_line().parse_args())
    except (ValueError, OSError) as error:
        print(f"probe.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nprobe.py: interrupted", file=sys.stderr, flush=True)
        os._exit(130)  # without waiting for what workers are in the middle of


if __name__ == "__main__":
    main()
