"""Stage 4 of Myna: labelled clips -> embeddings -> a grid of linear and MLP probes -> the task's metric.

A probe measures what a frozen encoder has learned. Each clip of a labelled data set becomes one vector, the
mean over its segments. Small models, the probes, are trained on the vectors of the training split, in 216
configurations. The configuration with the best score on the validation split is scored once on the test
split (section 4.4 and Appendix C of the paper, after Castellon et al. 2021, "JukeMIR").

    python probe.py                                          newest checkpoint in runs/, embedded music's keys
    python probe.py --task gtzan                             a data set in datasets/gtzan; DATASETS lists them
    python probe.py --task my_labels.csv                     your own labelled clips
    python probe.py --task gtzan --features mfcc             a hand-made feature; also --checkpoint random
    python probe.py --task gtzan --adapt lora                train a few parameters of the encoder as well
    python probe.py --task gtzan --labels 0.01 0.1 1         how the score depends on the number of labels
    python probe.py --embed MUSIC_FOLDER --out vectors.npz   only the embeddings, one row per file

The authors' evaluation code differs from the protocol that the paper names, and from this file: it chooses
the configuration by its test score, standardises each split by its own statistics, uses no dropout on the
input, checks the validation split once an epoch, and chooses taggers by average precision. Because of the
first point, the scores in Table 1 of the paper may be slightly too high.
"""

import argparse
import copy
import csv
import hashlib
import itertools
import json
import math
import os
import re
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

import data
from data import AUDIO_SUFFIXES, CORES, KEYS, N_FFT, SAMPLE_RATE, STYLES, TAGS
from data import audio_files, in_workers, load_audio, mel_segments, mel_spectrogram
from model import ADAPTATIONS, PATCHES, SIZES, Config, Myna
from model import adapt, load_model, merge, read_checkpoint, save_model

# --- Metrics -----------------------------------------------------------------------------------------------
# All take (targets, predictions), tensors or arrays, and compute in float64. Predictions may have leading
# axes, one entry for each configuration of a grid.


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


# --- Tasks: labelled clips ---------------------------------------------------------------------------------
# Each data set is read from the files that its publisher distributes; extra folders above them do not matter.
# A new data set is one function and one line in DATASETS. The docstring of the function says where to get the
# data and how the folder must look; it is shown to users when something is missing.

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
    """Yield ("PATH, line N", {column: field}) for each row of a table that is not blank.

    Raises ValueError if one of `columns` is missing and, with `strict` (a user's table), if it is malformed;
    a published table is read as it is.
    """
    with open(path, newline="", encoding="utf-8-sig", errors="strict" if strict else "replace") as file:
        reader = csv.reader(file, delimiter=delimiter, skipinitialspace=True, strict=strict)
        try:
            header = [name.strip() for name in next(reader, [])]
            for column in columns:
                if column not in header:
                    found = f"{header} (at {delimiter!r})"
                    raise ValueError(f"{path}: no column {column!r} in the first line, {found}")
            if strict and len(set(header)) < len(header):
                raise ValueError(f"{path}: a column is there twice in the first line, {header}")
            for fields in reader:
                where = f"{path}, line {reader.line_num}"
                if strict and len(fields) > len(header):
                    raise ValueError(f"{where}: {len(fields)} fields for {len(header)} columns")
                fields = [field.strip() for field in fields]
                if any(fields):
                    yield where, dict(itertools.zip_longest(header, fields, fillvalue=""))
        except (UnicodeDecodeError, csv.Error) as error:
            where = f"{path}, after line {reader.line_num}"
            raise ValueError(f"{where}: not a table in UTF-8 ({error})") from error


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
    for where, row in _table(table, ("ID", "MANUAL KEY", "C"), "\t"):
        if row["C"] == "2" and "/" not in row["MANUAL KEY"]:  # the annotator is sure, and names one key
            split = "valid" if artists_of.get(row["ID"], set()) & valid else "train"
            songs.append((row["ID"], _key(row["MANUAL KEY"], where), split))
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
    for where, row in _table(table, ("song_id", "mean_arousal", "mean_valence")):
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
    clips = []
    for where, row in _table(files["TinySOL_metadata.csv"], ("Path", "Fold", "Instrument (abbr.)")):
        fold, instrument = row["Fold"], row["Instrument (abbr.)"]
        if fold not in split_of or instrument not in INSTRUMENTS:
            raise ValueError(f"{where}: {fold!r} is no fold or {instrument!r} no instrument")
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


def _own_clip(where, row, folder):
    """One row of a user's table as a Clip without label; the split is None if the table has no splits."""
    path, split = folder / row["path"], row.get("split")
    offset = _float(row.get("offset") or 0, f"{where}, offset")
    duration = _float(row["duration"], f"{where}, duration") if row.get("duration") else None
    if not row["path"]:
        raise ValueError(f"{where}: no path")
    if split not in (None, *SPLITS):
        raise ValueError(f"{where}: the split {split!r} is none of {', '.join(SPLITS)}")
    if offset < 0 or (duration is not None and duration <= 0):
        raise ValueError(f"{where}: the offset must not be negative, and the duration must be more than 0")
    file = os.path.relpath(os.path.realpath(path), os.path.realpath(folder))  # the same however it is written
    group = row.get("group") or Path(file).as_posix()
    return Clip(path if path.is_file() else row["path"], offset, duration, None, split, group)


def _own_splits(path, rows, clips):
    """{group: split} of a user's table: its own splits, or else by rank. No group is in two splits."""
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
    return split_of


def _own_targets(path, rows, kind):
    """What a user's table predicts: (kind, names of the classes, tags or targets, a label for each row)."""
    columns = [c for c in rows[0][1] if c not in ("path", "split", "group", "offset", "duration")]
    if not columns:
        raise ValueError(f"{path}: no column 'label', 'tags', or numbers to predict")
    if kind is None and "label" in columns:
        kind = "classes"
    elif kind is None:
        kind = "tags" if "tags" in columns else "regression"
    if kind == "regression":
        numbers = [[_float(row[name], f"{where}, {name}") for name in columns] for where, row in rows]
        return kind, columns, numbers

    column = "tags" if kind == "tags" and "tags" in columns else "label"
    if column not in columns:
        raise ValueError(f"{path}: no column {column!r}")
    if kind == "tags":
        tags = [{tag.strip() for tag in row[column].split("|")} - {""} for _, row in rows]
        names = sorted(set().union(*tags))
        labels = [[float(name in present) for name in names] for present in tags]
    else:
        for where, row in rows:
            if not row[column]:
                raise ValueError(f"{where}: no {column}")
        if kind == "key":
            return kind, KEYS, [_key(row[column], where) for where, row in rows]
        names = sorted({row[column] for _, row in rows})
        labels = [names.index(row[column]) for _, row in rows]
    if not names or (kind == "classes" and len(names) == 1):
        raise ValueError(f"{path}: nothing to tell apart, column {column!r} has {names or 'no tag'} only")
    return kind, names, labels


def _own_labels(path, folder, kind):
    """The task in a user's own table, as `load_task` describes it; its paths are relative to `folder`."""
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file")
    rows = list(_table(path, ("path",), strict=True))
    if not rows:
        raise ValueError(f"{path}: no clips in it")
    clips = [_own_clip(where, row, folder) for where, row in rows]
    kind, names, labels = _own_targets(path, rows, kind)
    split_of = _own_splits(path, rows, clips)
    clips = [clip._replace(label=label, split=split_of[clip.group]) for clip, label in zip(clips, labels)]
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


# --- Representations: from a clip to rows of numbers -------------------------------------------------------


def load_clip(clip):
    """The wave (samples,) of a clip, and the labels that come with it (embedded music) or None."""
    if isinstance(clip.path, tuple):
        waves, labels = data.synthesize(1, *clip.path)
        return waves[0], {name: values[0].tolist() for name, values in labels.items()}
    return load_audio(clip.path, clip.offset, clip.duration), None


def _statistics(frames):
    """(features, T) -> mean and standard deviation over time of x and its first and second differences."""
    statistics = []
    for x in (frames, frames.diff(dim=1), frames.diff(n=2, dim=1)):
        statistics += [x.mean(dim=1), x.std(dim=1, correction=0)]
    return torch.cat(statistics)


def mfcc(wave):
    """Castellon's timbre feature: statistics of 20 mel cepstral coefficients, (120,).

    The orthonormal DCT-II of the mel power of peak-normalised sound in decibels, cut off 80 dB below the
    maximum (librosa's `feature.mfcc`).
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
    """Castellon's harmony feature: statistics of 12 pitch classes of the peak-normalised sound, (72,).

    His feature folds a constant-Q transform at 22,050 Hz. This one folds an STFT at 16 kHz: a Gaussian of a
    semitone shares each bin among the pitch classes, and a wider one prefers the octaves near 440 Hz. Each
    frame's maximum is 1.
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


HAND_MADE = {"mfcc": mfcc, "chroma": chroma}


@dataclass
class Features:
    """A task's clips as one encoder describes them."""

    rows: dict  # name -> (n, F) or, corrupted, (n, V, F); a hybrid model has "square" and "vertical"
    clip_index: torch.Tensor  # (n,) long: number of the clip in the task that a row belongs to
    labels: list  # one a clip; None for a clip that cannot be read
    skipped: list  # [path, reason] of the clips that cannot be read


def embed_task(task, encoders, corrupt=None, device="cpu", workers=None, cache=None, label="embedding"):
    """Features of a task's clips.

    `encoders` is a Myna, which gives a row for each segment, or "mfcc", "chroma" or a function(wave) -> (F,),
    which give a row for each clip. With several, {name: encoder}, each clip is decoded once and the result is
    {name: Features}. `corrupt(wave, clip)` returns V versions of a wave; a clip then has one row (V, F), the
    mean over its segments. Decoding, `corrupt` and functions run in worker processes, which must be able to
    import them. `cache` {name: (path, key)} keeps Features in files; the key must be different for different
    encoders of one path. Raises ValueError if no clip can be read.
    """
    if not isinstance(encoders, dict):
        return embed_task(task, {"": encoders}, corrupt, device, workers, label=label)[""]
    cache = {} if corrupt or cache is None else cache
    fingerprints = {name: fingerprint(task, key) for name, (_, key) in cache.items()}
    found = {name: read_features(path, fingerprints[name]) for name, (path, _) in cache.items()}
    new = {name: HAND_MADE.get(e, e) for name, e in encoders.items() if found.get(name) is None}
    if new:
        found |= _embed(task, new, corrupt, device, workers, label)
    for name in new.keys() & cache.keys():
        path, _ = cache[name]
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"fingerprint": fingerprints[name], **vars(found[name])}, path.with_suffix(".part"))
        os.replace(path.with_suffix(".part"), path)
    return {name: found[name] for name in encoders}


def _embed(task, encoders, corrupt, device, workers, label):
    """`embed_task` for {name: a Myna or a function}, without the cache."""
    function_of = {name: mel_segments if isinstance(e, Myna) else e for name, e in encoders.items()}
    functions = list(dict.fromkeys(function_of.values()))  # each once: all models share the mel segments
    labels, skipped = [], []
    features = {name: Features({}, [], labels, skipped) for name in encoders}
    batch, size = {}, 0  # {clip number: {function: (V, n, ...)}}, and how many rows they have

    def encode_batch():
        for name, encoder in encoders.items():
            inputs = {number: arrays[function_of[name]] for number, arrays in batch.items()}
            _add_rows(features[name], encoder, inputs, bool(corrupt), device)
        batch.clear()

    for number, arrays in _describe_task(task, functions, corrupt, workers, label, labels, skipped):
        batch[number] = {function: torch.from_numpy(array) for function, array in zip(functions, arrays)}
        size += max(array.shape[0] * array.shape[1] for array in arrays)
        if size >= 1024:
            encode_batch()
            size = 0
    if batch:
        encode_batch()
    for found in features.values():
        found.rows = {name: torch.cat(rows) for name, rows in found.rows.items()}
        found.clip_index = torch.tensor(found.clip_index)
    return features


def _describe_task(task, functions, corrupt, workers, label, labels, skipped):
    """Yield (number, arrays of `_describe`) of each clip that can be read; fill `labels` and `skipped`."""
    jobs = ((clip, functions, corrupt) for clip in task.clips)
    results = tqdm(in_workers(_describe, jobs, workers or CORES), label, len(task.clips), unit="clip")
    for number, (clip, (arrays, own_labels, reason)) in enumerate(zip(task.clips, results)):
        if reason:
            labels.append(None)
            skipped.append([str(clip.path), reason])
        else:
            labels.append(own_labels[task.name.removeprefix("synth-")] if own_labels else clip.label)
            yield number, arrays
    if len(skipped) == len(labels):
        raise ValueError(f"{task.name}: no clip could be read; the first: {skipped[0][1]}")


def _describe(clip, functions, corrupt):
    """In a worker process: one clip as each function describes each version of it.

    Returns (a list of arrays (V, n, ...), labels, None), or (None, None, the reason why it cannot be read).
    """
    try:
        wave, labels = load_clip(clip)
    except ValueError as error:
        return None, None, str(error)
    waves = corrupt(wave, clip) if corrupt else [wave]
    arrays = []
    for function in functions:
        arrays.append(torch.stack([torch.atleast_2d(function(wave)) for wave in waves]).numpy())
    return arrays, labels, None


def _add_rows(features, encoder, inputs, corrupted, device):
    """Encode inputs {clip number: (V, n, ...)}; append n rows a clip to `features`, or one if corrupted."""
    if isinstance(encoder, Myna):
        encoded = encode(encoder, list(inputs.values()), device)
    else:
        encoded = {encoder.__name__: list(inputs.values())}
    for name, clips in encoded.items():
        rows = [x.mean(dim=1)[None] if corrupted else x[0] for x in clips]  # (1, V, F) or (n, F)
        features.rows.setdefault(name, []).extend(rows)
    for number, x in inputs.items():
        features.clip_index += [number] * (1 if corrupted else x.shape[1])


def encode(model, clips, device="cpu"):
    """Segments of several clips, each (V, n, 128, 96) -> {patch: [(V, n, D) of each clip]} on the CPU."""
    model.to(device)
    mel = torch.cat([clip.flatten(0, 1) for clip in clips])
    parts = mel.split(64 if torch.device(device).type == "cpu" else 1024)

    def embed(part):
        return [model.embed(part.to(device), patch).cpu() for patch in model.patches]

    encoded = {}
    for patch, vectors in zip(model.patches, zip(*on_each_core(embed, parts, device=device))):
        rows = torch.cat(vectors).split([clip.shape[:2].numel() for clip in clips])
        encoded[patch] = [x.unflatten(0, clip.shape[:2]) for x, clip in zip(rows, clips)]
    return encoded


def on_each_core(function, *jobs, device="cpu"):
    """[function(*job) for job in zip(*jobs)], on a CPU in threads that share the cores.

    Small matrix products gain more from one core for each of them than from all cores for one.
    """
    cores = torch.get_num_threads()
    threads = min(cores, len(jobs[0])) if torch.device(device).type == "cpu" else 1
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(cores // threads,))
    try:
        return list(pool.map(function, *jobs))
    finally:  # when interrupted, without waiting for what is pending
        pool.shutdown(wait=False, cancel_futures=True)


def fingerprint(task, key):
    """SHA-1 of what decides a task's features: the encoder's key, the front end, the clips and files."""
    clips = []
    for clip in task.clips:
        clips.append([str(clip.path), clip.offset, clip.duration, str(clip.label)])
        if isinstance(clip.path, Path) and clip.path.exists():
            clips[-1] += [clip.path.stat().st_mtime_ns, clip.path.stat().st_size]
    if isinstance(task.clips[0].path, tuple):  # embedded music: the first clip stands for how it is made
        clips.append(hashlib.sha1(load_clip(task.clips[0])[0].numpy().tobytes()).hexdigest())
    settings = [task.name, key, SAMPLE_RATE, N_FFT, data.HOP, data.N_MELS, data.FRAMES, clips]
    return hashlib.sha1(json.dumps(settings).encode()).hexdigest()


def read_features(path, expected):
    """The Features in a file, or None if it is not there, is damaged or has another fingerprint."""
    try:
        kept = read_checkpoint(path)
    except ValueError:
        return None
    if kept.pop("fingerprint", None) != expected:
        return None
    tqdm.write(f"features from {path}")
    return Features(**kept)


# --- The grid: many probes trained as one batch ------------------------------------------------------------
# The weights of S probes of one shape are stacked, (S, in, out), and one batched product does the work of S
# small ones. All probes get the same examples and the same random numbers for dropout. None depends on
# another, so each ends as if it were trained alone.


class Configuration(NamedTuple):
    """One way of training a probe (Appendix C)."""

    standardise: bool  # each feature to mean 0 and standard deviation 1 over the training split
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
QUICK_GRID = [c for c in GRID if c.batch == 64 and c.lr == 1e-3 and c.l2 != 1e-4]  # 24, quick to train
CACHE = 24 * 2**20  # bytes of a processor's cache that a batch of probes may fill
CHECK = 8  # steps between validation checks
PATIENCE = 256  # validation checks without a better score before a probe stops


@dataclass
class Probe:
    """A trained probe: its configuration, best validation score, and the step and weights of that score."""

    configuration: Configuration
    valid: float
    step: int
    shift: torch.Tensor  # (F,) standardisation: 0 and 1 without
    scale: torch.Tensor
    layers: list  # of (weight (in, out), bias (out,))

    def __call__(self, x):
        """Outputs for features: (..., F) -> (..., C), logits or values."""
        x = (x - self.shift) * self.scale
        for weight, bias in self.layers[:-1]:
            x = F.relu(x @ weight + bias)
        return x @ self.layers[-1][0] + self.layers[-1][1]


@dataclass
class ProbeBatch:
    """S probes of one shape while they train. The first axis of every tensor belongs to the probes."""

    number: torch.Tensor  # (S,) long: which of the configurations
    input_group: torch.Tensor  # (S,) long, ascending: which of the G inputs of `Inputs`
    lr: torch.Tensor  # (S, 1, 1), and so are the next two
    dropout: torch.Tensor
    l2: torch.Tensor
    weights: list  # for each layer a weight (S, in, out) and a bias (S, 1, out)
    exp_avg: list  # Adam's running mean of the gradient of each of the weights
    exp_avg_sq: list  # and of its square
    best_weights: list
    best_score: torch.Tensor  # (S,) float64, on the validation split
    best_step: torch.Tensor  # (S,) long


@dataclass
class Inputs:
    """What the probes are trained and checked on. G groups differ in standardisation or dropout."""

    shift: torch.Tensor  # (2, F): as they are, standardised
    scale: torch.Tensor  # (2, F)
    train: torch.Tensor  # (2, n, F)
    valid: torch.Tensor  # (G, n, F)
    standardised: torch.Tensor  # (G,) long, 0 or 1
    dropout: torch.Tensor  # (G, 1, 1)
    group_sizes: list  # how many probes still train on each of the G


def _input_group(configuration):
    return configuration.standardise, configuration.dropout


def fit_grid(
    configurations, train, valid, kind, outputs, seed=0, patience=PATIENCE, steps=None, progress=None
):
    """Train a probe for each configuration as it would train alone. Returns a list of Probe.

    `train` is (features (n, F), targets (n, ...)). `valid` is the same or (features, targets, target_index
    (n,)): then the mean output of all rows of a target is scored. `outputs` is the number of classes, tags or
    values. Early stopping as in Castellon et al.: the primary metric on the validation split every 8 steps
    from step 0 on; a probe stops after `patience` checks without a better score and keeps its best weights.
    With `steps` all stop after so many steps, without any check (to measure speed). `progress(n)` is called
    when n probes have stopped.
    """
    probes = [None] * len(configurations)
    for batch_size, hidden in sorted({(c.batch, c.hidden) for c in configurations}):
        same = [i for i, c in enumerate(configurations) if (c.batch, c.hidden) == (batch_size, hidden)]
        same.sort(key=lambda i: _input_group(configurations[i]))  # probes that share an input are neighbours
        values = sum(a * b for a, b in itertools.pairwise((train[0].shape[1], *hidden, outputs)))
        # On a CPU a batch's weights, gradients and Adam averages should fit into the cache.
        width = len(same) if train[0].is_cuda else max(1, CACHE // (16 * values))
        for numbers in (same[first : first + width] for first in range(0, len(same), width)):
            batch = [configurations[i] for i in numbers]
            fitted = _fit_batch(batch, train, valid, kind, outputs, seed, patience, steps, progress)
            for i, probe in zip(numbers, fitted):
                probes[i] = probe
    return probes


def _fit_batch(configurations, train, valid, kind, outputs, seed, patience, steps, progress):
    """Train probes of one shape and batch size, sorted by `_input_group`, until the last one has stopped."""
    x, y = train
    generator = torch.Generator(x.device).manual_seed(seed)
    inputs = _prepare_inputs(configurations, x, valid[0])
    probes = _start_probes(configurations, x, outputs, generator)
    finished = [None] * len(configurations)
    for step in itertools.count():
        stop = torch.zeros(len(probes.number), dtype=torch.bool)
        if step == steps:
            probes.best_weights = probes.weights
            stop = ~stop
        elif steps is None and step % CHECK == 0:
            _validation_check(probes, inputs, valid, kind, step, patience)
            if step % (8 * CHECK) == 0:  # not at every check, because a GPU waits for the answer
                stop = (step - probes.best_step >= patience * CHECK).cpu()
        if stop.any():
            for s in stop.nonzero()[:, 0].tolist():
                number = int(probes.number[s])
                finished[number] = _finished_probe(configurations[number], probes, s, inputs)
            if progress:
                progress(int(stop.sum()))
            if stop.all():
                return finished
            _keep_probes(probes, inputs, (~stop).nonzero()[:, 0].to(x.device))
        rows = torch.randperm(len(x), generator=generator, device=x.device)[: configurations[0].batch]
        _adam_step(probes, inputs, rows, y[rows], kind, step, generator)


def _prepare_inputs(configurations, x, valid_x):
    """Standardise both splits by the training split, and find the G different inputs that are needed."""
    std = x.std(dim=0, correction=0)
    shift = torch.stack([torch.zeros_like(std), x.mean(dim=0)])
    scale = torch.stack([torch.ones_like(std), 1 / std.where(std > 0, 1.0)])
    groups = sorted({_input_group(c) for c in configurations})
    standardised = torch.tensor([int(flag) for flag, _ in groups], device=x.device)
    dropout = torch.tensor([rate for _, rate in groups], device=x.device)[:, None, None]
    train = (x - shift[:, None]) * scale[:, None]
    valid = (valid_x - shift[standardised, None]) * scale[standardised, None]
    group_sizes = [sum(_input_group(c) == group for c in configurations) for group in groups]
    return Inputs(shift, scale, train, valid, standardised, dropout, group_sizes)


def _start_probes(configurations, x, outputs, generator):
    """All probes start from the same weights, uniform as torch initialises a linear layer."""
    count, device = len(configurations), x.device

    def column(name):
        return torch.tensor([getattr(c, name) for c in configurations], device=device).float()[:, None, None]

    weights = []
    for a, b in itertools.pairwise((x.shape[1], *configurations[0].hidden, outputs)):
        uniform = (torch.rand(a + 1, b, generator=generator, device=device) * 2 - 1) / math.sqrt(a)
        weights.append(uniform[:-1].expand(count, -1, -1).clone())
        weights.append(uniform[-1:].expand(count, -1, -1).clone())
    groups = sorted({_input_group(c) for c in configurations})
    return ProbeBatch(
        number=torch.arange(count, device=device),
        input_group=torch.tensor([groups.index(_input_group(c)) for c in configurations], device=device),
        lr=column("lr"),
        dropout=column("dropout"),
        l2=column("l2"),
        weights=weights,
        exp_avg=[torch.zeros_like(w) for w in weights],
        exp_avg_sq=[torch.zeros_like(w) for w in weights],
        best_weights=[w.clone() for w in weights],
        best_score=torch.full((count,), -torch.inf, dtype=torch.float64, device=device),
        best_step=torch.zeros(count, dtype=torch.long, device=device),
    )


def _forward(probes, inputs, group_sizes, generator=None):
    """Outputs (S, B, C) of all probes for inputs (G, B, F). A generator adds dropout after hidden layers."""
    *hidden, weight, bias = probes.weights
    if hidden:
        x = inputs[probes.input_group]  # (S, B, F)
        for w, b in zip(hidden[::2], hidden[1::2]):
            x = torch.baddbmm(b, x, w).relu()
            if generator:
                uniform = torch.rand(x.shape[1:], generator=generator, device=x.device)  # one draw for all
                x = x * ((uniform >= probes.dropout) / (1 - probes.dropout))
        return torch.baddbmm(bias, x, weight)
    # A linear probe is narrow. The weights of all that share an input, side by side, make one wide matrix.
    outputs = []
    for x, w in zip(inputs, weight.split(group_sizes)):  # (B, F), (probes of the group, F, C)
        wide = x @ w.transpose(0, 1).flatten(1)  # (B, probes of the group * C)
        outputs.append(wide.unflatten(1, (len(w), w.shape[2])).transpose(0, 1))
    return torch.cat(outputs) + bias


def _adam_step(probes, inputs, rows, targets, kind, step, generator):
    """One step of every probe on the examples `rows` (B,). L2 is part of the gradient, as in torch."""
    uniform = torch.rand(len(rows), inputs.train.shape[2], generator=generator, device=rows.device)
    keep = (uniform >= inputs.dropout) / (1 - inputs.dropout)  # (G, B, F): one draw for all rates
    for w in probes.weights:
        w.requires_grad_()
    x = inputs.train[:, rows][inputs.standardised] * keep
    outputs = _forward(probes, x, inputs.group_sizes, generator)
    gradients = torch.autograd.grad(probe_loss(kind, outputs, targets), probes.weights)
    correction = 1 - 0.9 ** (step + 1)  # for the zeros that both averages start from
    correction_sq = (1 - 0.999 ** (step + 1)) ** 0.5
    with torch.no_grad():  # in place: memory for new tensors would cost more time than the sums
        state = zip(probes.weights, gradients, probes.exp_avg, probes.exp_avg_sq)
        for w, gradient, exp_avg, exp_avg_sq in state:
            gradient.addcmul_(w, probes.l2)
            exp_avg.lerp_(gradient, 0.1)
            exp_avg_sq.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
            # w -= lr * (exp_avg / correction) / (sqrt(exp_avg_sq) / correction_sq + 1e-8)
            denominator = torch.sqrt(exp_avg_sq, out=gradient).add_(1e-8 * correction_sq)
            w.addcdiv_(exp_avg, denominator.mul_(correction / correction_sq / -probes.lr))


@torch.no_grad()
def _validation_check(probes, inputs, valid, kind, step, patience):
    """Score all probes on the validation split, and copy the weights of those that are better than before."""
    _, targets, *target_index = valid
    outputs = _forward(probes, inputs.valid, inputs.group_sizes)
    outputs = probabilities(kind, outputs, *target_index, count=len(targets))
    score = primary_score(kind, targets, outputs)
    better = (score > probes.best_score) & (step - probes.best_step <= patience * CHECK)
    probes.best_score = torch.where(better, score, probes.best_score)
    probes.best_step = probes.best_step.where(~better, step)
    for best, w in zip(probes.best_weights, probes.weights):
        torch.where(better[:, None, None], w, best, out=best)


def _finished_probe(configuration, probes, s, inputs):
    """Probe number `s` of a batch as a `Probe`, with its best weights."""
    weights = [w[s].detach().clone() for w in probes.best_weights]
    layers = [(weight, bias[0]) for weight, bias in zip(weights[::2], weights[1::2])]
    shift, scale = inputs.shift[int(configuration.standardise)], inputs.scale[int(configuration.standardise)]
    return Probe(configuration, float(probes.best_score[s]), int(probes.best_step[s]), shift, scale, layers)


@torch.no_grad()
def _keep_probes(probes, inputs, keep):
    """Remove all probes but those at the places `keep` (long) from a batch."""
    for name, value in list(vars(probes).items()):
        setattr(probes, name, [w[keep] for w in value] if isinstance(value, list) else value[keep])
    inputs.group_sizes = torch.bincount(probes.input_group, minlength=len(inputs.standardised)).tolist()


def probe_loss(kind, outputs, targets):
    """The sum over the probes of each one's mean loss: outputs (S, B, C), targets (B,) or (B, C)."""
    targets = targets.expand(len(outputs), *targets.shape)
    if kind in ("classes", "key"):
        return F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction="sum") / outputs.shape[1]
    if kind == "tags":
        return F.binary_cross_entropy_with_logits(outputs, targets, reduction="sum") / outputs[0].numel()
    return (outputs - targets).square().sum() / outputs[0].numel()


def probabilities(kind, outputs, target_index=None, count=None):
    """A probe's outputs (..., n, C) as they are scored: softmax, sigmoid, or values.

    With `target_index` (n,), their mean over the rows of each of `count` targets: (..., count, C).
    """
    if kind in ("classes", "key"):
        outputs = outputs.softmax(dim=-1)
    elif kind == "tags":
        outputs = outputs.sigmoid()
    if target_index is None:
        return outputs
    return mean_rows(outputs.movedim(-2, 0), target_index, count).movedim(0, -2)


def mean_rows(rows, index, count):
    """The mean of the rows (n, ...) that have each index 0 ... count - 1: (count, ...)."""
    total = rows.new_zeros(count, *rows.shape[1:]).index_add_(0, index, rows)
    sizes = rows.new_zeros(count).index_add_(0, index, rows.new_ones(len(rows)))  # bincount makes a GPU wait
    return total / sizes.view(-1, *[1] * (rows.ndim - 1))


# --- The protocol: fit on train, choose on valid, score once on test ---------------------------------------


def readable_clips(task, features, split):
    """Numbers of the clips of one split that could be read. Raises ValueError if there is none."""
    pairs = enumerate(zip(task.clips, features.labels))
    numbers = [i for i, (clip, label) in pairs if clip.split == split and label is not None]
    if not numbers:
        raise ValueError(f"{task.name}: no clip of the {split} split could be read")
    return numbers


def split_rows(task, features, split, rows, per_segment=False):
    """One split of a representation's `rows` (n, ...): (x, targets, target_index).

    x has a row for each clip, the mean of its segments, or with `per_segment` a row for each segment. There
    is a target for each clip, or for each song if the task scores songs (giantsteps). target_index[i] is the
    number of x[i]'s target. A clip whose split has another name is not used. Raises ValueError if no clip can
    be read, or if no tag can be scored.
    """
    numbers = readable_clips(task, features, split)
    place = torch.full((len(task.clips),), -1)
    place[numbers] = torch.arange(len(numbers))
    clip_index = place[features.clip_index]
    x, clip_index = rows[clip_index >= 0], clip_index[clip_index >= 0]
    if not per_segment:
        x, clip_index = mean_rows(x, clip_index, len(numbers)), torch.arange(len(numbers))

    targets = torch.stack([torch.as_tensor(features.labels[i]) for i in numbers])
    targets = targets.float() if task.kind in ("tags", "regression") else targets.long()
    if task.kind == "tags" and split != "train" and (targets == targets[0]).all():
        raise ValueError(f"{task.name}: no tag is on some {split} clips and not on others, nothing to score")
    scored = [task.clips[i].group if task.per_group else i for i in numbers]  # songs or clips
    first = {}
    for n, song in enumerate(scored):
        first.setdefault(song, n)  # the clip that a song has its label from
    target_of = {song: n for n, song in enumerate(first)}
    target_of_clip = torch.tensor([target_of[song] for song in scored])
    return x, targets[list(first.values())], target_of_clip[clip_index]


def fit_probes(
    task, features, rows, grid, per_segment=False, seed=0, device="cpu", patience=PATIENCE, progress=None
):
    """A probe for each configuration of `grid` on a representation's `rows` (n, F), and the best on valid."""
    x, targets, target_index = split_rows(task, features, "train", rows, per_segment)
    train = x.to(device), targets[target_index].to(device)
    valid = [part.to(device) for part in split_rows(task, features, "valid", rows, per_segment)]
    probes = fit_grid(grid, train, valid, task.kind, len(task.names), seed, patience, progress=progress)
    return probes, max(probes, key=lambda probe: probe.valid)


def fit_all(task, jobs, per_segment=False, seed=0, device="cpu", patience=PATIENCE):
    """`fit_probes` for jobs {name: (features, rows, grid)}, one on each CPU core: {name: (probes, best)}."""
    with tqdm(total=sum(len(grid) for _, _, grid in jobs.values()), desc="probes", unit="probe") as bar:

        def fit(name):
            return fit_probes(task, *jobs[name], per_segment, seed, device, patience, bar.update)

        def cost(name):
            _, rows, grid = jobs[name]
            return sum(rows.shape[1] * (1 + sum(c.hidden)) for c in grid)

        names = sorted(jobs, key=cost, reverse=True)  # the longest first, so that no core waits at the end
        fitted = dict(zip(names, on_each_core(fit, names, device=device)))
    return {name: fitted[name] for name in jobs}


def predict(task, features, rows, probe, per_segment=False, device="cpu"):
    """A probe's output for the test split: (targets (n, ...), outputs (n, C) float64, groups (n,)).

    Rows (n, V, F) of V corrupted versions give outputs (V, n, C). `groups` has the number of each target's
    song.
    """
    x, targets, target_index = split_rows(task, features, "test", rows, per_segment)
    outputs = probe(x.to(device)).cpu().double().movedim(0, -2)
    groups = [task.clips[i].group for i in readable_clips(task, features, "test")]
    if task.per_group:
        groups = list(dict.fromkeys(groups))
    number = {group: n for n, group in enumerate(dict.fromkeys(groups))}
    groups = torch.tensor([number[group] for group in groups])
    return targets, probabilities(task.kind, outputs, target_index, len(targets)), groups


def bootstrap(kind, targets, outputs, groups=None, resamples=1000, seed=0):
    """95% interval of the primary metric on the test split, (low, high). Scores of leading axes are averaged.

    Groups (songs) are drawn with replacement, with all their clips. Clips of one song are not independent, so
    an interval over clips would be too narrow. `groups` (n,) is the group of each target, 0, 1, ...; None:
    all differ.
    """
    groups = torch.arange(len(targets)) if groups is None else groups
    order = groups.argsort(stable=True)
    members = order.split(torch.bincount(groups).tolist())
    generator = torch.Generator().manual_seed(seed)
    scores = []
    for _ in range(resamples):
        drawn = torch.randint(len(members), (len(members),), generator=generator)
        rows = order[drawn]  # enough where every group has one target
        if len(members) < len(targets):
            rows = torch.cat([members[group] for group in drawn.tolist()])
        scores.append(float(primary_score(kind, targets[rows], outputs[..., rows, :]).mean()))
    low, high = np.nanquantile(scores, [0.025, 0.975])
    return float(low), float(high)


def score_test(task, targets, outputs, groups):
    """Of what `predict` returns: {metric: score}, the primary metric's 95% interval, what was resampled."""
    clips = Counter(clip.group for clip in task.clips if clip.split == "test")
    unit = "clips"
    if max(clips.values()) > 1:
        unit = "songs" if task.name in DATASETS else "groups"  # of a table, groups may be anything
    return evaluate(task.kind, targets, outputs), bootstrap(task.kind, targets, outputs, groups), unit


def probe_task(task, features, grid, per_segment=False, seed=0, device="cpu", patience=PATIENCE):
    """The whole protocol for one task and one encoder's features. Returns the results as a plain dict.

    A hybrid model is probed three ways: square, vertical and both side by side (section 4.3). The best of all
    configurations of all three on the validation split, and no other, is scored on the test split.
    """
    rows = dict(features.rows)
    if len(rows) == 2:
        rows["concatenated"] = torch.cat(list(rows.values()), dim=1)
    jobs = {name: (features, x, grid) for name, x in rows.items()}
    fitted = fit_all(task, jobs, per_segment, seed, device, patience)
    name = max(fitted, key=lambda name: fitted[name][1].valid)
    winner = fitted[name][1]
    targets, outputs, groups = predict(task, features, rows[name], winner, per_segment, device)
    results = test_results(task, features, targets, outputs, groups)
    results |= {
        "representation": name,
        "valid": {name: best.valid for name, (_, best) in fitted.items()},
        "winner": winner.configuration._asdict(),
        "grid": {},
    }
    for name, (probes, _) in fitted.items():
        results["grid"][name] = [[*probe.configuration, probe.valid, probe.step] for probe in probes]
    return results


def test_results(task, features, targets, outputs, groups):
    """What the results of all methods have in common, from what `predict` returns for the test split."""
    scores, interval, unit = score_test(task, targets, outputs, groups)
    counts = Counter(clip.split for clip, label in zip(task.clips, features.labels) if label is not None)
    results = {
        "task": task.name,
        "clips": {split: counts[split] for split in SPLITS},
        "incomplete": bool(task.missing or features.skipped),
        "missing": task.missing,
        "skipped": features.skipped,
        "test": {metric: float(score) for metric, score in scores.items()},
        "interval": interval,
        "interval_over": unit,
        "names": list(task.names),
    }
    if task.kind in ("classes", "key"):
        count = len(task.names)
        pairs = torch.bincount(targets * count + outputs.argmax(dim=1), minlength=count**2)
        results["confusion"] = pairs.view(count, count).tolist()  # rows: the truth
    elif task.kind == "tags":
        results["per_tag"] = {}
        for metric in (roc_auc, average_precision):
            values = metric(targets, outputs, average=False).tolist()
            results["per_tag"][metric.__name__] = [None if math.isnan(value) else value for value in values]
    elif len(task.names) > 1:
        for target, score in zip(task.names, r2(targets, outputs, average=False)):
            results["test"][f"r2 {target}"] = float(score)
    return results


# --- Adaptation: an encoder and a head, trained on labelled clips (arXiv 2411.19371) -----------------------

ADAPT_BATCH = 16
ADAPT_CHECKS = 20  # validation checks in a run
ADAPT_PATIENCE = 8  # checks without a better score before the run stops
ADAPT_STEPS = 2000  # the paper has 25,000 and 75,000


class Classifier(nn.Module):
    """An encoder and a head: mean over tokens, Linear, Dropout, ReLU, Linear: (B, 128, 96) -> (B, outputs).

    The means over the tokens of a hybrid model's two patch shapes are concatenated, as in `embed`.
    """

    def __init__(self, encoder, outputs, bf16=False):
        super().__init__()
        self.encoder, self.bf16 = encoder, bf16
        width = SIZES[encoder.config.size][0] * len(encoder.patches)
        layers = nn.Linear(width, width), nn.Dropout(0.5), nn.ReLU(), nn.Linear(width, outputs)
        self.head = nn.Sequential(*layers)

    def forward(self, mel):
        with torch.autocast(mel.device.type, torch.bfloat16, enabled=self.bf16):
            means = [self.encoder.tokens(mel, patch).mean(dim=1) for patch in self.encoder.patches]
            return self.head(torch.cat(means, dim=1)).float()

    @torch.no_grad()
    def predict(self, mel, rows):
        """Outputs for the segments `rows` (n,) of `mel`, without dropout: (n, outputs)."""
        self.eval()
        device = self.head[0].weight.device
        return torch.cat([self(mel[part].to(device)) for part in rows.split(64)])


def load_mel(task, workers=None):
    """The mel segments of a task's clips: Features with rows {"mel": (n, 128, 96) float16}.

    They are in an unnamed file that is mapped into memory, so that there may be more than the memory holds.
    Raises ValueError if no clip can be read.
    """
    labels, skipped, clip_index = [], [], []
    with tempfile.TemporaryFile() as file:
        functions = [mel_segments]
        for number, arrays in _describe_task(task, functions, None, workers, "decoding", labels, skipped):
            clip_index += [number] * arrays[0].shape[1]
            file.write(arrays[0].tobytes())
        mel = np.memmap(file, np.float16, "r+", shape=(len(clip_index), data.N_MELS, data.FRAMES))
    return Features({"mel": torch.from_numpy(mel)}, torch.tensor(clip_index), labels, skipped)


def adapt_task(
    task, features, model, method, size=None, lr=None, steps=None, seed=0, device="cpu", bf16=False
):
    """Adapt a copy of a model to a task. Returns the results as a plain dict, and the trained Classifier.

    `features` is what `load_mel` returns; `method` and `size` are those of `adapt` in model.py. The weights
    with the best score on the validation split, and no others, are scored on the test split. The output for
    a clip is the mean over its segments. `lr` is 1e-4 if not given, 1e-5 for "full".
    """
    torch.manual_seed(seed)  # of new weights and of dropout
    network = Classifier(copy.deepcopy(model), len(task.names), bf16).to(device)
    trained = adapt(network.encoder, method, size)
    lr = lr or (1e-5 if method == "full" else 1e-4)
    started = time.monotonic()
    log = fit_classifier(task, features, network, lr, steps or ADAPT_STEPS, seed)
    seconds = time.monotonic() - started

    mel, rows = features.rows["mel"], torch.arange(len(features.clip_index))
    tested = predict(task, features, rows, partial(network.predict, mel), per_segment=True)
    step, _, valid = max(log, key=lambda check: check[2])
    results = test_results(task, features, *tested) | {
        "method": method,
        "size": size or ADAPTATIONS[method],
        "lr": lr,
        "trained": sum(p.numel() for p in trained),
        "trained_head": sum(p.numel() for p in network.head.parameters()),
        "encoder": sum(p.numel() for name, p in model.named_parameters() if "projector" not in name),
        "valid": {method: valid},
        "step": step,
        "seconds": seconds,
        "log": log,  # [step, loss, validation score]
    }
    return results, network


def fit_classifier(task, features, network, lr, steps, seed):
    """Train what is not frozen, and keep the weights of the best check. Returns [[step, loss, valid score]].

    Adam; gradients are clipped to norm 1; the rate falls from `lr` to 1e-7 on a cosine. A step takes one
    random segment of each of 16 clips. Raises ValueError if the loss is not finite.
    """
    mel, rows = features.rows["mel"], torch.arange(len(features.clip_index))
    device = network.head[0].weight.device
    train, targets, target_index = split_rows(task, features, "train", rows, per_segment=True)
    targets = targets[target_index]
    valid = split_rows(task, features, "valid", rows, per_segment=True)
    batches = random_segments(features.clip_index[train], torch.Generator().manual_seed(seed))
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=1e-7)
    check_every = max(1, steps // ADAPT_CHECKS)
    log, best_weights, best_step, best_score = [], None, 0, -math.inf

    bar = tqdm(range(1, steps + 1), f"{task.name}: adapting", unit="step")
    for step, places in zip(bar, batches):
        network.train()
        outputs = network(mel[train[places]].to(device))
        loss = probe_loss(task.kind, outputs[None], targets[places].to(device))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()

        if step % check_every == 0 or step == steps:
            loss = loss.item()
            if not math.isfinite(loss):
                raise ValueError(f"the loss of step {step} is {loss}: try a smaller --lr than {lr}")
            score = validation_score(task.kind, network, mel, *valid)
            log.append([step, loss, score])
            bar.set_postfix(loss=f"{loss:.3f}", valid=f"{score:.3f}")
            if score > best_score:
                best_weights = [parameter.detach().clone() for parameter in trained]
                best_step, best_score = step, score
            elif step - best_step >= ADAPT_PATIENCE * check_every:
                break
    bar.close()
    with torch.no_grad():
        for parameter, best in zip(trained, best_weights):
            parameter.copy_(best)
    return log


def validation_score(kind, network, mel, rows, targets, target_index):
    """The primary metric of a Classifier on what `split_rows` returns of the validation split."""
    outputs = network.predict(mel, rows).cpu().double()
    return float(primary_score(kind, targets, probabilities(kind, outputs, target_index, len(targets))))


def random_segments(clip_index, generator):
    """Yield batches (b,) of places in `clip_index` (n,), ascending: a random segment of each of 16 clips.

    Every clip is drawn once before any is drawn again; the last batch of such a round may be smaller.
    """
    _, counts = clip_index.unique_consecutive(return_counts=True)
    first = counts.cumsum(dim=0) - counts
    while True:
        for clips in torch.randperm(len(counts), generator=generator).split(ADAPT_BATCH):
            uniform = torch.rand(len(clips), dtype=torch.float64, generator=generator)
            yield first[clips] + (uniform * counts[clips]).long()


# --- Few labels --------------------------------------------------------------------------------------------


def label_subsets(task, labels, fractions, repeat=4, seed=0):
    """Nested random subsets of the training clips: {fraction: [a set of clip numbers for each draw]}.

    `labels` are those of the features, None for a clip that cannot be read. Each draw brings the groups
    (songs) into a random order, in which groups that together have all classes come first. A subset is the
    beginning of that order, at least those groups.
    """
    members = {}
    for i, (clip, label) in enumerate(zip(task.clips, labels)):
        if clip.split == "train" and label is not None:
            members.setdefault(clip.group, []).append(i)
    groups, subsets = list(members), {fraction: [] for fraction in fractions}
    for draw in range(repeat):
        order = [groups[i] for i in np.random.default_rng([seed, draw]).permutation(len(groups))]
        group_of_class = {}  # the first in the order
        if task.kind in ("classes", "key"):
            for group in order:
                for i in members[group]:
                    group_of_class.setdefault(labels[i], group)
        needed = set(group_of_class.values())
        order.sort(key=lambda group: group not in needed)  # the order is otherwise kept
        for fraction in fractions:
            count = max(1, len(needed), round(fraction * len(groups)))
            subsets[fraction].append({i for group in order[:count] for i in members[group]})
    return subsets


def few_labels(task, labels, fractions, train, repeat=4, seed=0):
    """Test scores of training with fewer labels: [{"fraction", "clips", "scores", "mean", "std"}].

    `train(task, seed)` is called for each subset, with a task in which the other training clips belong to no
    split. It returns a pair, the first of which is the results. Validation and test splits are whole. "clips"
    and "scores" have a number for each draw; "std" is the standard deviation of the scores.
    """
    table = []
    for fraction, draws in label_subsets(task, labels, fractions, repeat, seed).items():
        scores = []
        for draw, chosen in enumerate(draws):
            clips = list(task.clips)
            for i, clip in enumerate(clips):
                if clip.split == "train" and i not in chosen:
                    clips[i] = clip._replace(split="")
            results, _ = train(replace(task, clips=clips), seed + draw)
            scores.append(next(iter(results["test"].values())))
        row = {"fraction": fraction, "clips": [len(chosen) for chosen in draws], "scores": scores}
        table.append(row | {"mean": float(np.mean(scores)), "std": float(np.std(scores))})
    return table


# --- The command line --------------------------------------------------------------------------------------


class Encoder(NamedTuple):
    """An encoder as a command line names it, and where its features and results are kept."""

    name: str
    encoder: Myna | str
    key: str  # tells it from all others of its name
    folder: Path

    def cache(self, task):
        """The file of its features and its key, as `embed_task` takes them."""
        return self.folder / f"features_{task.name}_{self.name}.pt", self.key


BASELINES = Path("runs/baselines")  # results of encoders without a checkpoint


def open_checkpoint(path=None, patch=None):
    """The model in a checkpoint, or the newest under runs/, and its path; (None, None) if there is none."""
    if path:
        return load_model(path, patch), Path(path)
    found = sorted(Path("runs").glob("*/checkpoint.pt"), key=os.path.getmtime)
    if not found:
        return None, None
    try:
        return load_model(found[-1], patch), found[-1]
    except ValueError as error:
        raise ValueError(f"{error}. It is the newest under runs/; --checkpoint names another one") from error


def choose_encoders(names, args, size=None):
    """Encoders by name: "checkpoint", "random", "mfcc" or "chroma". Prints a line about each model."""
    model, path = None, None
    if "checkpoint" in names or "random" in names:
        given = None if args.checkpoint == "random" else args.checkpoint
        of_checkpoint = given or "checkpoint" in names  # otherwise --patch is that of the random weights
        model, path = open_checkpoint(given, args.patch if of_checkpoint else None)
    return [_choose_encoder(name, model, path, args.patch, size, args.seed or 0) for name in names]


def _choose_encoder(name, model, path, patch, size, seed):
    if name in HAND_MADE:
        return Encoder(name, name, "1", BASELINES)
    if name == "checkpoint":
        if model is None:
            advice = "`python train.py --demo` makes one, --checkpoint names one elsewhere"
            raise ValueError(f"there is no checkpoint under runs/: {advice}")
        stored = read_checkpoint(path)
        progress = ""
        if {"step", "settings"} <= stored.keys():
            progress = f", after step {stored['step']} of {stored['settings']['steps']}"
        print(f"checkpoint {path}: {model.config.size}, {model.config.patch}{progress}")
        folder = path.parent if path.name == "checkpoint.pt" else Path("runs") / path.stem
        return Encoder(model.config.patch, model, hashlib.sha1(path.read_bytes()).hexdigest(), folder)
    config = model.config if model else Config("tiny", "hybrid")
    config = replace(config, size=size or config.size, patch=patch or config.patch)
    name = f"random-{config.size}-{config.patch}{'-log' if config.log_mel else ''}"
    print(f"random weights: {name}" + (f", settings of {path} where not given" if model else ""))
    torch.manual_seed(seed)
    return Encoder(name, Myna(config).eval(), f"{config}, seed {seed}", BASELINES)


def embed_files(sources, out, model, per_segment, device, workers):
    """--embed: vectors of files and folders as an .npz of `vectors`, `paths` and, by segment, `seconds`."""
    paths = []
    for source in map(Path, sources):
        if not source.exists():
            raise ValueError(f"{source}: there is no such file or folder")
        paths += [source / name for name in audio_files(source)] if source.is_dir() else [source]
    if not paths:
        raise ValueError(f"no audio files in {', '.join(sources)}")
    if out.is_dir():
        raise ValueError(f"--out {out}: there is a folder of that name")
    clips = [Clip(path, 0.0, None, 0, "", "") for path in paths]
    features = embed_task(Task("files", "classes", (), clips, []), model, device=device, workers=workers)
    vectors, index = torch.cat(list(features.rows.values()), dim=1), features.clip_index
    used, counts = index.unique_consecutive(return_counts=True)
    if per_segment:
        number = torch.cat([torch.arange(count) for count in counts.tolist()])  # of a segment in its file
        columns = {"seconds": (number * data.FRAMES * data.HOP / SAMPLE_RATE).numpy()}
    else:
        vectors = torch.stack([rows.mean(dim=0) for rows in vectors.split(counts.tolist())])
        index, columns = used, {}
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{out}.part", "wb") as file:
        np.savez(file, vectors=vectors.numpy(), paths=np.array([str(paths[i]) for i in index]), **columns)
    os.replace(f"{out}.part", out)
    print(f"{out}: {len(vectors)} vectors of {vectors.shape[1]} numbers from {len(used)} files")
    for _, reason in features.skipped:
        print(f"  skipped: {reason}")


def print_counts(task):
    """--check: the clips of each split, beside the published numbers."""
    names = ", ".join(task.names[:5]) + (", ..." if len(task.names) > 5 else "")
    print(f"{task.name}: {task.kind}, {len(task.names)} outputs: {names}")
    counts = Counter(clip.split for clip in task.clips)
    for split in SPLITS:
        published = f"   published {task.published[split]:6,}" if task.published else ""
        print(f"  {split:<6}{counts[split]:7,} clips{published}")
    missing = ": " + ", ".join(task.missing[:5]) if task.missing else ""
    print(f"  {len(task.missing):,} files that the labels name are missing{missing}")
    if task.note:
        print(f"  {task.note}")


def print_results(results):
    """The results of `probe_task` or `adapt_task` as a table."""
    clips = ", ".join(f"{count} {split}" for split, count in results["clips"].items())
    if "method" in results:
        how = f"--adapt {results['method']}"
    elif results["grid_name"] == "quick":
        how = "24 of the 216 configurations (--grid full for all)"
    else:
        how = "all 216 configurations"
    print(f"\n{results['task']} with {results['model']}: {clips} clips, {how}")
    primary = next(iter(results["test"]))
    for name, score in results["valid"].items():
        chosen = len(results["valid"]) > 1 and name == results["representation"]
        mark = "  <- goes on to the test split" if chosen else ""
        print(f"  valid  {primary:<20} {score:7.1%}   {name}{mark}")
    low, high = results["interval"]
    for metric, score in results["test"].items():
        interval = f"   95% interval over {results['interval_over']}: {low:.1%} to {high:.1%}"
        print(f"  test   {metric:<20} {score:7.1%}{interval if metric == primary else ''}")
    if "method" in results:
        share = f"{results['trained'] / results['encoder']:.2%} of its {results['encoder']:,}"
        print(f"  trained {results['trained']:,} parameters of the encoder, {share}")
        print(f"          {results['trained_head']:,} parameters of the head")
        print(f"  weights of step {results['step']} of {results['log'][-1][0]}, {results['seconds']:.0f} s")
    else:
        winner = dict(results["winner"])
        hidden = winner.pop("hidden")
        shape = f"MLP {'-'.join(map(str, hidden))}" if hidden else "linear"
        print(f"  winner {shape}, " + ", ".join(f"{name} {value}" for name, value in winner.items()))
    print_skipped(results["missing"], results["skipped"])


def print_skipped(missing, skipped):
    """What makes results incomplete."""
    if missing or skipped:
        print(f"  INCOMPLETE: {len(missing)} files missing, {len(skipped)} clips unreadable")
        for _, reason in skipped[:10]:
            print(f"    {reason}")


def print_few_labels(results):
    """The results of --labels as a table."""
    how = f"--adapt {results['method']}" if results["method"] else "probes"
    print(f"\n{results['task']} with {results['model']}, {how}: {results['metric']} on the test split")
    print("  labels   clips     mean     std   draws")
    for row in results["labels"]:
        draws = " ".join(f"{score:.1%}" for score in row["scores"])
        clips, mean, std = np.mean(row["clips"]), row["mean"], row["std"]
        print(f"  {row['fraction']:6.1%} {clips:7.0f} {mean:8.1%} {std:7.1%}   {draws}")
    print_skipped(results["missing"], results["skipped"])


def command_line():
    """The parser of the options that are probe.py's alone."""
    parser = argparse.ArgumentParser(description="Probe a frozen encoder, adapt it, or just write vectors.")
    option = parser.add_argument
    option("--check", action="store_true", help="read labels and files, count them, and stop")
    option("--size", choices=list(SIZES), help="of --checkpoint random (default: the newest checkpoint's)")
    option("--features", choices=list(HAND_MADE), help="a hand-made feature instead of an encoder")
    option("--per-segment", action="store_true", help="train on segments, average outputs, as the authors do")
    option("--grid", choices=["full", "quick"], help="216 or 24 probes (default: full; for synth-* quick)")
    methods = ", ".join(ADAPTATIONS)
    option("--adapt", choices=list(ADAPTATIONS), metavar="METHOD", help=f"train the encoder, too: {methods}")
    option("--lr", type=float, help="of --adapt (default: 1e-4; full 1e-5)")
    option("--steps", type=int, help=f"of --adapt, at most (default: {ADAPT_STEPS})")
    option("--rank", type=int, help="of lora (2), width of adapter (16), tokens of prefix, prompt (32)")
    option("--precision", choices=["bf16", "float32"], help="of --adapt (default: bf16 on a GPU)")
    option("--labels", nargs="+", type=float, metavar="SHARE", help="train on random shares of the labels")
    option("--repeat", type=int, help="draws of each share (default: 4)")
    option("--embed", nargs="+", metavar="PATH", help="just write the embeddings of files or folders")
    option("--out", help="for --embed (default: vectors.npz)")
    return parser


def unused_options(args):
    """For `run_command`: (whether this mode was chosen, its name, the options that it does not use)."""
    of_encoders = ("checkpoint", "patch", "size", "per_segment")
    random = args.checkpoint == "random"
    training = "adapt", "labels"
    return [
        (args.embed, "--embed", ("task", "data", "kind", "check", "features", "grid", *training)),
        (not args.embed, "a task", ("out",)),
        (args.check, "--check", (*of_encoders, "features", "grid", "seed", "device", "workers", *training)),
        (args.features, f"--features {args.features}", (*of_encoders, "adapt")),
        (args.adapt, "--adapt", ("per_segment", "grid")),
        (not args.adapt, "a frozen encoder", ("lr", "steps", "rank", "precision")),
        (not args.labels, "all labels", ("repeat",)),
        (not random, "the weights of a checkpoint", ("size",)),
        (args.embed and not random, "--embed and the weights of a checkpoint", ("seed",)),
    ]


def run_command(parser, work, unused_options):
    """Add the options that stages 4 and 5 share, read the command line, and run `work(args)`.

    Options that the chosen mode does not use are refused. A mistake is one sentence and exit status 2.
    """
    option = parser.add_argument
    option("--task", help=f"{', '.join((*DATASETS, *SYNTH))}, or a labels.csv (default: synth-key)")
    option("--data", help="folder of the data set (default: datasets/TASK)")
    option("--kind", choices=list(METRICS), help="of the task in a labels.csv (default: told by its columns)")
    option("--checkpoint", help="file, or in probe.py 'random' (default: the newest under runs/)")
    option("--patch", choices=[*PATCHES, "hybrid"], help="of a released checkpoint or of random weights")
    option("--seed", type=int, help="of the probes and of random weights (default: 0)")
    option("--device", help="(default: cuda if there is one, else cpu)")
    option("--workers", type=int, help=f"decoding processes (default: {CORES})")
    args = parser.parse_args()
    try:
        on_embedded_music = (args.task or "synth-key") in SYNTH, "the embedded music", ("data",)
        for chosen, mode, options in [*unused_options(args), on_embedded_music]:
            for name in options:
                if chosen and getattr(args, name) is not parser.get_default(name):
                    raise ValueError(f"--{name.replace('_', '-')} has no effect with {mode}: leave it out")
        args.task = args.task or "synth-key"
        args.seed = args.seed or 0
        args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
        args.workers = CORES if args.workers is None else args.workers
        check_machine(args)
        work(args)
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"\n{parser.prog}: interrupted", file=sys.stderr, flush=True)
        os._exit(130)  # without waiting for what workers are in the middle of


def check_machine(args):
    """Raise ValueError for a --device or a number of --workers that cannot be used."""
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        cause = str(error).splitlines()[0]
        raise ValueError(f"--device {args.device} cannot be used here: {cause}") from error
    if args.workers < 1:
        raise ValueError(f"--workers {args.workers}: at least one process must decode")


def task_name(args, task):
    """The task in a result's file name, with a hash of its place unless that is the usual one."""
    if args.data is None and Path(args.task).name == args.task:
        return task.name
    place = f"{os.path.abspath(args.task)} {os.path.abspath(args.data or '')}"
    return f"{task.name}-{hashlib.sha1(os.fsencode(place)).hexdigest()[:6]}"


def probe(args):
    """What the command line asks for."""
    name = "random" if args.checkpoint == "random" else args.features or "checkpoint"
    if args.embed:
        model = choose_encoders([name], args, args.size)[0].encoder
        out = Path(args.out or "vectors.npz")
        return embed_files(args.embed, out, model, args.per_segment, args.device, args.workers)
    task = load_task(args.task, args.data, args.kind)
    if args.check:
        return print_counts(task)
    encoder = choose_encoders([name], args, args.size)[0]
    check_training_options(args, encoder.encoder)
    grid_name = args.grid or usual_grid(task)
    if args.adapt:
        features = load_mel(task, args.workers)
        on_gpu = torch.device(args.device).type == "cuda"
        bf16 = on_gpu if args.precision is None else args.precision == "bf16"

        def train(task, seed):
            how = args.adapt, args.rank, args.lr, args.steps, seed, args.device, bf16
            return adapt_task(task, features, encoder.encoder, *how)

    else:
        cache = {encoder.name: encoder.cache(task)}
        encoders = {encoder.name: encoder.encoder}
        features = embed_task(task, encoders, None, args.device, args.workers, cache)[encoder.name]
        grid = QUICK_GRID if grid_name == "quick" else GRID

        def train(task, seed):
            return probe_task(task, features, grid, args.per_segment, seed, args.device), None

    network = None
    if args.labels:
        table = few_labels(task, features.labels, args.labels, train, args.repeat or 4, args.seed)
        results = {"task": task.name, "metric": primary_metric(task.kind), "method": args.adapt}
        results |= {"labels": table, "missing": task.missing, "skipped": features.skipped}
    else:
        results, network = train(task, args.seed)
    results |= {"model": encoder.name, "key": encoder.key, "seed": args.seed}
    if not args.adapt:
        results |= {"grid_name": grid_name, "per_segment": args.per_segment}
    path = result_path(args, task, encoder)
    save_results(path, results, network)
    if args.labels:
        print_few_labels(results)
    else:
        print_results(results)
    print(f"  {path}")


def save_results(path, results, network=None):
    """Write the results, and beside them the encoder of a Classifier, merged if possible, with its head."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if network:
        merge(network.encoder)
        extra = {"head": network.head.state_dict(), "names": results["names"]}
        save_model(network.encoder, path.with_suffix(".pt"), **extra)
    path.with_suffix(".part").write_text(json.dumps(results))
    os.replace(path.with_suffix(".part"), path)


def usual_grid(task):
    """The name of the grid without --grid."""
    return "quick" if task.name in SYNTH else "full"


def check_training_options(args, encoder):
    """Raise ValueError for options of --adapt and --labels that make no sense, before any work."""
    for name in ("lr", "steps", "repeat"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"--{name} {value}: it must be above zero")
    for share in args.labels or ():
        if not 0 < share <= 1:
            raise ValueError(f"--labels {share}: a share of the labels is above 0 and at most 1")
    if args.adapt:
        adapt(copy.deepcopy(encoder), args.adapt, args.rank)


def result_path(args, task, encoder):
    """The file of the results. Its name has every option that differs from the default."""
    parts = ["adapted" if args.adapt else "probe", task_name(args, task)]
    if args.labels:
        parts[0] = "labels"
    parts += [args.adapt] if args.adapt else [encoder.name]
    parts += [encoder.name] if args.adapt and encoder.folder == BASELINES else []
    parts += ["-".join(f"{share:g}" for share in args.labels)] if args.labels else []
    parts += [args.kind] if args.kind else []
    parts += ["segments"] if args.per_segment else []
    parts += [args.grid] if args.grid and args.grid != usual_grid(task) else []
    for option in ("lr", "steps", "rank", "precision", "repeat", "seed"):
        value = getattr(args, option)
        parts += [f"{option}{value}"] if value else []
    return encoder.folder / f"{'_'.join(parts)}.json"


def main():
    """The command line."""
    run_command(command_line(), probe, unused_options)


if __name__ == "__main__":
    main()
