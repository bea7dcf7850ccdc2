"""Stage 4 of Myna: labelled clips -> embeddings -> a grid of linear and MLP probes -> the task's metric.

Input: a checkpoint and labelled sound. Output: a table, and the results as JSON beside the checkpoint.

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
    the target with the same mode 0.5, the relative one 0.3, the parallel one 0.2 (the same as mir_eval).
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
    return targets, torch.searchsorted(scores, scores), torch.searchsorted(scores, scores, right=True)


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
    """Area under the precision-recall curve as a sum of steps; equal scores are one threshold, as in sklearn.

    targets (n, T) of 0 and 1, scores (..., n, T). Mean over all T tags, where one without positives counts 0;
    with `average=False` one value for each tag.
    """
    positive, first, _ = _sort_by_score(targets, scores)
    positives = positive.sum(dim=-1, keepdim=True)
    below = positive.cumsum(dim=-1) - positive  # positives at lower places
    found = (positives - below).gather(-1, first)  # positives that score at least as much as each place
    precision = found / (positive.shape[-1] - first)
    area = (precision * positive).sum(dim=-1) / positives.squeeze(-1).clamp(min=1)
    return area.mean(dim=-1) if average else area


def r2(targets, predictions, average=True):
    """Coefficient of determination: targets (n, T), predictions (..., n, T). Mean over targets, or each.

    For a target that is constant, 1 where the prediction equals it and 0 otherwise, as in sklearn.
    """
    targets, predictions = torch.as_tensor(targets).double(), torch.as_tensor(predictions).double()
    residual = (targets - predictions).square().sum(dim=-2)
    total = (targets - targets.mean(dim=0)).square().sum(dim=0)
    score = torch.where(total == 0, (residual == 0).double(), 1 - residual / total)
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


def evaluate(kind, targets, outputs):
    """{name: score} for a probe's outputs (..., n, C), probabilities or values; the primary metric first."""
    predictions = outputs.argmax(dim=-1) if kind in ("classes", "key") else outputs
    return {name: metric(targets, predictions) for name, metric in METRICS[kind].items()}


def primary_score(kind, targets, outputs):
    """The primary metric of `evaluate` alone."""
    predictions = outputs.argmax(dim=-1) if kind in ("classes", "key") else outputs
    return METRICS[kind][primary_metric(kind)](targets, predictions)


# --- Tasks: labelled clips ---------------------------------------------------------------------------------
# Each data set is read from the files that its publisher distributes; extra folders above them do not matter.
# A new data set is one function and one line in DATASETS. The docstring of the function says where to get the
# data and how the folder must look; it is shown to users when something is missing.

SPLITS = ("train", "valid", "test")


class Clip(NamedTuple):
    """A labelled piece of a sound file."""

    path: Path | tuple  # for the embedded music the pair (seed, number)
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
    missing: list[str] = ()  # listed files that do not exist
    per_group: bool = False  # average the predicted probabilities over a group before scoring
    published: dict | None = None  # clips per split, as published
    note: str = ""  # what a user should know before using the scores


def _files(root):
    """{last one, two or three parts of a path: path} for all files and folders, up to six levels deep.

    The suffix is in lower case. The entry "" is the folder itself.
    """
    found = {"": Path(root)}
    for folder, folders, names in os.walk(root, followlinks=True):
        folders.sort()
        above = Path(folder).relative_to(root).parts
        for name in sorted(folders + names):
            stem, suffix = os.path.splitext(name)
            parts = (*above, stem + suffix.lower())
            for count in (1, 2, 3):
                found.setdefault("/".join(parts[-count:]), Path(folder, name))
        if len(above) == 5:  # this also ends links that lead back up
            folders.clear()
    return found


def _sound(files, name):
    """The path of a sound file that a label names, in any format: copies are often converted."""
    stem = name.removesuffix(Path(name).suffix)
    found = (files[stem + suffix] for suffix in sorted(AUDIO_SUFFIXES) if stem + suffix in files)
    return next(found, files[""] / name)


def _rows(path, columns, delimiter=","):
    """Yield ("PATH, line N", {column: field}) for each row of a table that is not blank.

    Fields beyond the last column are under None. Raises ValueError if one of `columns` is missing.
    """
    with open(path, newline="", encoding="utf-8-sig", errors="replace") as file:
        reader = csv.DictReader(file, delimiter=delimiter, skipinitialspace=True, restval="")
        try:
            reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
            for column in columns:
                if column not in reader.fieldnames:
                    first = delimiter.join(reader.fieldnames)
                    raise ValueError(f"{path}: no column {column!r} in the first line, {first[:200]!r}")
            for row in reader:
                more = row.pop(None, None)
                row = {name: field.strip() for name, field in row.items()} | ({None: more} if more else {})
                if any(row.values()):
                    yield f"{path}, line {reader.line_num}", row
        except csv.Error as error:
            raise ValueError(f"{path}, line {reader.line_num}: not a table ({error})") from error


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
    """{group: split} by rank of the SHA-1: a tenth test, a tenth valid, at least one each, the rest train."""
    ranked = sorted(set(groups), key=_sha1)
    tenth = max(1, round(len(ranked) / 10))
    test, valid = ranked[:tenth], ranked[tenth : 2 * tenth]
    return dict.fromkeys(ranked, "train") | dict.fromkeys(valid, "valid") | dict.fromkeys(test, "test")


def _standardise(clips, where):
    """Subtract from each target its mean and divide by its standard deviation, both over train and valid."""
    targets = np.array([clip.label for clip in clips])  # (n, T)
    development = targets[[clip.split != "test" for clip in clips]]
    if not len(development) or not np.ptp(development, axis=0).all():
        raise ValueError(f"{where}: a target has the same value for all clips of train and valid")
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
            stem, genre = match[0], GENRES.index(match[1])
            clips.append(Clip(_sound(files, stem + ".wav"), 0.0, None, genre, split, stem))
    return Task("gtzan", "classes", GENRES, clips, published={"train": 443, "valid": 197, "test": 290})


def _mtt(files):
    """MagnaTagATune (Law et al., 2009): 50 most frequent tags, split by folder (van den Oord et al., 2014).

    Where to get it: mirg.city.ac.uk, The MagnaTagATune Dataset; the sound is a zip in three parts.
    The folder holds: annotations_final.csv, and the zip's sixteen folders 0, 1, ... f of .mp3 files.
    """
    rows, tags, count = [], [], Counter()
    split_of = dict.fromkeys("0123456789ab", "train") | {"c": "valid"} | dict.fromkeys("def", "test")
    for where, row in _rows(files["annotations_final.csv"], ("clip_id", "mp3_path"), "\t"):
        number, name, tags = row.pop("clip_id"), row.pop("mp3_path"), list(row)
        if name[:1] not in split_of:
            raise ValueError(f"{where}: {name!r} is in none of the folders 0 to f")
        present = {tag for tag in tags if row[tag] == "1"}
        rows.append((number, name, present))
        count.update(present)
    tags = sorted(tags, key=lambda tag: -count[tag])[:50]  # of equally frequent tags the first columns
    clips = []
    for number, name, present in rows:
        if number in ("35644", "55753", "57881"):  # corrupt as published
            continue
        label = [float(tag in present) for tag in tags]
        song = re.sub(r"-\d+-\d+\.mp3$", "", name)  # a name ends in the clip's first and last second
        clips.append(Clip(_sound(files, name), 0.0, None, label, split_of[name[:1]], song))
    return Task("mtt", "tags", tuple(tags), clips, published={"train": 18_706, "valid": 1_825, "test": 5_329})


def _validation_artists(tracks):
    """Artists of GiantSteps' validation split, as in JukeMIR, for tracks as sets of artists.

    Those with hash % 116 >= 100, and then, in two passes, all who share a track with one of them.
    """
    valid = {artist for artists in tracks for artist in artists if _sha1(artist) % 116 >= 100}
    for _ in range(2):
        for artists in tracks:
            if artists & valid:
                valid |= artists
    return valid


def _count_pieces(path, seconds):
    """Number of whole pieces of `seconds` in a file; 1 if it is shorter, unreadable, or an hour long."""
    try:
        duration = soundfile.info(str(path)).duration
    except (OSError, soundfile.SoundFileError):  # load_audio reports the cause later
        duration = 0
    return int(duration // seconds) if seconds <= duration < 3600 else 1


def _giantsteps(files):
    """GiantSteps keys: train and valid from the MTG-Key set (Faraldo), test the Key set (Knees et al., 2015).

    Where to get it: github.com/GiantSteps, giantsteps-mtg-key-dataset and giantsteps-key-dataset, which have
    scripts for the sound.
    The folder holds: giantsteps-mtg-key-dataset/annotations/annotations.txt and beatport_metadata.txt;
    giantsteps-key-dataset/annotations/key/<ID>.LOFI.key; and, anywhere, the <ID>.LOFI.mp3 of both.
    """
    artists_of = {}
    for _, row in _rows(files["beatport_metadata.txt"], ("ID", "ARTIST"), "\t"):
        artists_of[row["ID"]] = {artist.strip().lower() for artist in row["ARTIST"].split(",")}
    valid = _validation_artists(list(artists_of.values()))

    songs, table = [], files["annotations/annotations.txt"]  # songs: (ID, key, split)
    for where, row in _rows(table, ("ID", "MANUAL KEY", "C"), "\t"):
        if row["C"] == "2" and "/" not in row["MANUAL KEY"]:  # confidence 2, exactly one key
            split = "valid" if artists_of.get(row["ID"], set()) & valid else "train"
            songs.append((row["ID"], _key(row["MANUAL KEY"], where), split))
    for tail, path in files.items():
        match = re.fullmatch(r"annotations/key/([^.]+)\.LOFI\.key", tail)
        if match and path.parent.parent != table.parent:  # the MTG set may have such a folder, too
            songs.append((match[1], _key(path.read_text("utf-8-sig", "replace"), path), "test"))

    clips = []
    for song, key, split in songs:
        path = _sound(files, f"{song}.LOFI.mp3")
        clips += [Clip(path, 30.0 * i, 30.0, key, split, song) for i in range(_count_pieces(path, 30))]
    published = {"train": 3_687, "valid": 942, "test": 2_406}
    return Task("giantsteps", "key", KEYS, clips, per_group=True, published=published)


def _emomusic(files):
    """emoMusic (Soleymani et al., 2013): arousal and valence of 45 seconds, standardised. Its own test set.

    Where to get it: the University of Geneva's page emoMusic, 1000 songs for emotional analysis of music.
    The folder holds: songs_info.csv and static_annotations.csv in annotations, clips_45seconds/<song_id>.mp3.
    """
    clips, means, table = [], {}, files["static_annotations.csv"]
    for where, row in _rows(table, ("song_id", "mean_arousal", "mean_valence")):
        means[row["song_id"]] = [_float(row["mean_arousal"], where), _float(row["mean_valence"], where)]
    for _, row in _rows(files["songs_info.csv"], ("song_id", "Artist", "Mediaeval 2013 set")):
        song = row["song_id"]
        if song not in means:
            continue
        artist = " ".join(re.sub(r"[^a-z\s]", "", row["Artist"].lower()).split())
        split = "valid" if _sha1(artist) % 10 >= 8 else "train"  # by artist, as in JukeMIR
        if row["Mediaeval 2013 set"] == "evaluation":
            split = "test"
        path = _sound(files, f"clips_45seconds/{song}.mp3")
        clips.append(Clip(path, 0.0, None, means[song], split, song))
    clips = _standardise(clips, table)  # a missing file changes no other clip's label
    published = {"train": 504, "valid": 115, "test": 125}
    return Task("emomusic", "regression", ("arousal", "valence"), clips, published=published)


TINYSOL_INSTRUMENTS = tuple("BTb Hn Tbn TpC Acc Vc Cb Va Vn ASax Bn ClBb Fl Ob".split())


def _tinysol(files):
    """TinySOL (Cella et al., 2020): single notes of 14 instruments; fold 0 is valid, 1 test, 2 to 4 train.

    Where to get it: zenodo.org/records/3685367, TinySOL.tar.gz and TinySOL_metadata.csv.
    The folder holds: TinySOL_metadata.csv; audio/Brass/Bass_Tuba/ordinario/BTb-ord-F#1-pp-N-N.wav and so on.
    """
    split_of = {"0": "valid", "1": "test", "2": "train", "3": "train", "4": "train"}
    clips = []
    for where, row in _rows(files["TinySOL_metadata.csv"], ("Path", "Fold", "Instrument (abbr.)")):
        fold, instrument = row["Fold"], row["Instrument (abbr.)"]
        if fold not in split_of or instrument not in TINYSOL_INSTRUMENTS:
            raise ValueError(f"{where}: {fold!r} is no fold or {instrument!r} no instrument")
        name = row["Path"].split("/")[-1]  # unique
        label = TINYSOL_INSTRUMENTS.index(instrument)
        clips.append(Clip(_sound(files, name), 0.0, None, label, split_of[fold], name))
    return Task("tinysol", "classes", TINYSOL_INSTRUMENTS, clips)


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
            clips.append(Clip(_sound(files, f"audio/{stem}.mp3"), 0.0, None, _key(text, path), "", number))
        else:
            unused.append(f"{number} ({text!r})")
    split_of = {}
    for key in range(24):
        split_of |= _ranked_splits(clip.group for clip in clips if clip.label == key)
    clips = [clip._replace(split=split_of[clip.group]) for clip in clips]
    note = "All IDs are in GiantSteps-MTG-Key too. "
    note += f"{len(unused)} tracks are not used, they have no single key: {', '.join(unused)}"
    return Task("beatport", "key", KEYS, clips, note=note)


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


def _own_clip(where, row, folder, kind, columns):
    """One row of a user's table as a Clip. Its label is still a class name, or a set of tags."""
    if not row["path"] or None in row:
        raise ValueError(f"{where}: no path, or more fields than columns")
    offset = _float(row.get("offset") or 0, f"{where}, offset")
    duration = _float(row["duration"], f"{where}, duration") if row.get("duration") else None
    if offset < 0 or (duration is not None and duration <= 0):
        raise ValueError(f"{where}: the offset must not be negative, and the duration must be more than 0")
    if row.get("split") not in (None, *SPLITS):
        raise ValueError(f"{where}: the split {row['split']!r} is none of {', '.join(SPLITS)}")

    if kind == "regression":
        label = [_float(row[name], f"{where}, {name}") for name in columns]
    elif kind == "tags":
        label = {tag.strip() for tag in row["tags"].split("|")} - {""}
    elif row["label"]:
        label = _key(row["label"], where) if kind == "key" else row["label"]
    else:
        raise ValueError(f"{where}: no label")
    path = folder / row["path"]
    file = os.path.relpath(os.path.realpath(path), os.path.realpath(folder))  # the same however it is written
    return Clip(path, offset, duration, label, row.get("split"), row.get("group") or Path(file).as_posix())


def _own_table(path, folder, kind):
    """The task in a user's own table, as `load_task` describes it; its paths are relative to `folder`."""
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file")
    needed = {"classes": ["path", "label"], "key": ["path", "label"], "tags": ["path", "tags"]}
    rows = list(_rows(path, needed.get(kind, ["path"])))
    if not rows:
        raise ValueError(f"{path}: no clips in it")
    columns = [c for c in rows[0][1] if c not in (None, "path", "split", "group", "offset", "duration")]
    kind = kind or ("classes" if "label" in columns else "tags" if "tags" in columns else "regression")
    clips = [_own_clip(where, row, folder, kind, columns) for where, row in rows]

    names = KEYS if kind == "key" else columns
    labels = [clip.label for clip in clips]
    if kind == "classes":
        names = sorted(set(labels))
        labels = [names.index(label) for label in labels]
    elif kind == "tags":
        names = sorted(set().union(*labels))
        labels = [[float(name in tags) for name in names] for tags in labels]
    if len(names) < (2 if kind == "classes" else 1):
        raise ValueError(f"{path}: nothing to predict: {kind} with the names {names}")

    split_of = {}
    for (where, _), clip in zip(rows, clips):
        other = split_of.setdefault(clip.group, clip.split)
        if clip.split != other:
            raise ValueError(f"{where}: {clip.split}, but its group is also in {other}: {clip.group!r}")
    if clips[0].split is None:
        split_of = _ranked_splits(split_of)
    for split in SPLITS:
        if split not in split_of.values():
            raise ValueError(f"{path}: no clips for {split}; a table without splits needs three groups")
    clips = [clip._replace(label=label, split=split_of[clip.group]) for clip, label in zip(clips, labels)]
    clips = _standardise(clips, path) if kind == "regression" else clips
    name = path.name if path.stem in (*DATASETS, *SYNTH) else path.stem
    return Task(name, kind, tuple(names), clips)


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
    if kind and (kind not in METRICS or not is_table):
        raise ValueError(f"kind {kind!r}: {', '.join(METRICS)} are for a table of your own, NAME.csv")
    if name in SYNTH:
        clips = []
        for split, (seed, count) in SYNTH_SPLITS.items():
            clips += [Clip((seed, i), 0.0, None, None, split, f"{seed}/{i}") for i in range(count)]
        return Task(name, *SYNTH[name], clips)
    root = Path(root or (Path(name).parent if is_table else f"datasets/{name}"))
    advice = f"Paths are relative to {root}."
    if is_table:
        task = _own_table(Path(name), root, kind)
    elif name in DATASETS:
        reader, needed = DATASETS[name]
        advice, files = " ".join(reader.__doc__.split()), _files(root)
        absent = [file for file in needed if file not in files]
        if absent:
            problem = f"no {' and no '.join(absent)} below this folder" if root.is_dir() else "no such folder"
            raise ValueError(f"{root}: {problem}. {advice}")
        task = reader(files)
    else:
        known = ", ".join((*DATASETS, *SYNTH))
        raise ValueError(f"no task {name!r}: there are {known}, or a table of your own, NAME.csv")

    present = {path for path in {clip.path for clip in task.clips} if path.is_file()}
    missing = dict.fromkeys(clip.path for clip in task.clips if clip.path not in present)
    task.missing = [os.path.relpath(path, root) for path in missing]
    task.clips = [clip for clip in task.clips if clip.path in present]
    if not task.clips:
        raise ValueError(f"{name}: none of its sound files is there, such as {task.missing[:1]}. {advice}")
    return task


# --- Representations: from a clip to rows of numbers -------------------------------------------------------


def load_clip(clip):
    """The wave (samples,) of a clip, and the labels that come with it (embedded music) or None."""
    if isinstance(clip.path, tuple):
        waves, labels = data.synthesize(1, *clip.path)
        return waves[0], {name: values[0].tolist() for name, values in labels.items()}
    return load_audio(clip.path, clip.offset, clip.duration), None


def _peak_normalised(wave):
    """The wave with a maximum of 1, padded to at least four windows, for the hand-made features."""
    wave = F.pad(wave, (0, max(0, 4 * N_FFT - len(wave))))
    return wave / wave.abs().max().clamp(min=1e-9)


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
    level = 10 * mel_spectrogram(_peak_normalised(wave)).clamp(min=1e-10).log10()
    level = level.clamp(min=level.max() - 80)
    k, n = torch.arange(20.0)[:, None], torch.arange(128.0)
    dct = torch.cos(torch.pi / 128 * (n + 0.5) * k) * (2 / 128) ** 0.5
    dct[0] /= 2**0.5
    return _statistics(dct @ level)


def chroma(wave):
    """Castellon's harmony feature: statistics of 12 pitch classes of the peak-normalised sound, (72,).

    His feature folds a constant-Q transform at 22,050 Hz. This one folds an STFT at 16 kHz: a Gaussian (std
    half a semitone) distributes each bin over the pitch classes, and another (std two octaves) weights bins
    by their distance from 440 Hz. Each frame's maximum is 1.
    """
    window = torch.hann_window(2 * N_FFT)
    spectrum = torch.stft(_peak_normalised(wave), 2 * N_FFT, 512, window=window, return_complex=True)
    power = spectrum.real.square() + spectrum.imag.square()  # (bins, T)
    hertz = torch.arange(1, N_FFT + 1) * SAMPLE_RATE / (2 * N_FFT)  # without the bin at 0 Hz
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
    labels: list  # one for each clip of the task; None for a clip that cannot be read
    skipped: list  # [path, reason] of the clips that cannot be read

    def concatenated(self):
        """The rows of all patch shapes side by side: (n, ..., F)."""
        return torch.cat(list(self.rows.values()), dim=-1)


def embed_task(task, encoder, corrupt=None, device="cpu", workers=None, title="embedding"):
    """The Features of a task's clips.

    `encoder` is a Myna, which gives a row for each segment, or "mfcc", "chroma" or a function(wave) -> (F,),
    which give a row for each clip. With several, {name: encoder}, each clip is decoded once and the result is
    {name: Features}. `corrupt(wave, clip)` returns V versions of a wave; a clip then has one row (V, F), the
    mean over its segments. Decoding, `corrupt` and functions run in worker processes, which must be able to
    import them. Raises ValueError if no clip can be read.
    """
    if not isinstance(encoder, dict):
        return embed_task(task, {"": encoder}, corrupt, device, workers, title)[""]
    encoders = {name: HAND_MADE[e] if isinstance(e, str) else e for name, e in encoder.items()}
    front_end = {name: mel_segments if isinstance(e, Myna) else e for name, e in encoders.items()}
    functions = list(dict.fromkeys(front_end.values()))  # several models share the mel segments
    labels, skipped = [], []
    features = {name: Features({}, [], labels, skipped) for name in encoders}
    described = _describe_task(task, functions, labels, skipped, corrupt, workers, title)
    for clips in _batches(described):
        for name, one in encoders.items():
            inputs = [arrays[functions.index(front_end[name])] for _, arrays in clips]  # (V, n, ...) each
            for part, vectors in _encode(one, inputs, device).items():  # (V, n, F) of each clip
                rows = [x.mean(dim=1)[None] if corrupt else x[0] for x in vectors]
                features[name].rows.setdefault(part, []).extend(rows)
            for (number, _), x in zip(clips, inputs):
                features[name].clip_index += [number] * (1 if corrupt else x.shape[1])
    for found in features.values():
        found.rows = {part: torch.cat(rows) for part, rows in found.rows.items()}
        found.clip_index = torch.tensor(found.clip_index)
    return features


def _batches(described, least=64):
    """Lists of described clips with `least` segments together: small batches gain nothing from two cores."""
    clips, segments = [], 0
    for number, arrays in described:
        clips.append((number, arrays))
        segments += max(len(array.flatten(0, 1)) for array in arrays)
        if segments >= least:
            yield clips
            clips, segments = [], 0
    if clips:
        yield clips


def _encode(encoder, inputs, device):
    """What an encoder makes of several clips (V, n, ...): {patch shape or name: a list of (V, n, F)}."""
    if not isinstance(encoder, Myna):
        return {getattr(encoder, "__name__", "function"): inputs}
    x, encoded = torch.cat([clip.flatten(0, 1) for clip in inputs]), {}
    for patch in encoder.to(device).patches:
        vectors = torch.cat([encoder.embed(part.to(device), patch).cpu() for part in x.split(256)])
        vectors = vectors.split([len(clip.flatten(0, 1)) for clip in inputs])
        encoded[patch] = [v.unflatten(0, clip.shape[:2]) for v, clip in zip(vectors, inputs)]
    return encoded


def _describe_task(task, functions, labels, skipped, corrupt=None, workers=None, title="decoding"):
    """Yield (number, what each function makes of it (V, n, ...)) of each clip that can be read.

    Appends to the lists `labels` and `skipped` of `Features`. Raises ValueError if no clip can be read.
    """
    jobs = ((clip, functions, corrupt) for clip in task.clips)
    results = tqdm(in_workers(_describe, jobs, workers or CORES), title, len(task.clips), unit="clip")
    for number, (clip, (arrays, own_labels, reason)) in enumerate(zip(task.clips, results)):
        if reason:
            labels.append(None)
            skipped.append([str(clip.path), reason])
        else:
            labels.append(own_labels[task.name.removeprefix("synth-")] if own_labels else clip.label)
            yield number, [torch.from_numpy(array) for array in arrays]
    if len(skipped) == len(labels):
        raise ValueError(f"{task.name}: no clip could be read, the first: {(skipped or ['none'])[0]}")


def _describe(clip, functions, corrupt):
    """In a worker process: one clip as each function describes each version of it.

    Returns (a list of arrays (V, n, ...), labels, None), or (None, None, the reason why it cannot be read).
    """
    try:
        wave, labels = load_clip(clip)
    except ValueError as error:
        return None, None, str(error)
    waves = corrupt(wave, clip) if corrupt else [wave]
    arrays = [torch.stack([torch.atleast_2d(f(wave)) for wave in waves]).numpy() for f in functions]
    return arrays, labels, None


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
    patience: int = 256  # validation checks without a better score before it stops


GRID = [
    Configuration(*values)
    for values in itertools.product(
        (False, True), ((), (512,)), (64, 256), (1e-5, 1e-4, 1e-3), (0.25, 0.5, 0.75), (0.0, 1e-4, 1e-3)
    )
]  # 216
QUICK_GRID = [c._replace(patience=64) for c in GRID if c.batch == 64 and c.lr == 1e-3 and c.l2 != 1e-4]  # 24
CACHE = 24 * 2**20  # bytes of a processor's cache that a batch of probes may fill
CHECK = 8  # steps between validation checks


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


def _input_of(configuration):
    """The settings that change a probe's input. Probes that agree in them are a group with one input."""
    return configuration.standardise, configuration.dropout


def fit_grid(configurations, train, valid, kind, n_outputs, seed=0, progress=None):
    """Train a probe for each configuration as it would train alone. Returns a list of Probe.

    `train` is (features (n, F), targets (n, ...)). `valid` is the same or (features, targets, target_index
    (n,)): then the mean output of all rows of a target is scored. `n_outputs` counts classes, tags or values.
    Early stopping as in Castellon et al.: the primary metric on the validation split every 8 steps
    from step 0 on; a probe stops after its patience without a better score and keeps its best weights.
    `progress(n)` is called when n probes have stopped.
    """
    probes = [None] * len(configurations)
    for batch_size, hidden in sorted({(c.batch, c.hidden) for c in configurations}):
        same = [i for i, c in enumerate(configurations) if (c.batch, c.hidden) == (batch_size, hidden)]
        same.sort(key=lambda i: _input_of(configurations[i]))  # the probes of a group are neighbours
        values = sum(a * b for a, b in itertools.pairwise((train[0].shape[1], *hidden, n_outputs)))
        # On a CPU a batch's weights, gradients and Adam averages should fit into the cache.
        width = len(same) if train[0].is_cuda else max(1, CACHE // (16 * values))
        for numbers in (same[first : first + width] for first in range(0, len(same), width)):
            batch = ProbeBatch([configurations[i] for i in numbers], *train, kind, n_outputs, seed)
            for i, probe in zip(numbers, batch.fit(valid, progress or (lambda n: None))):
                probes[i] = probe
    return probes


class ProbeBatch:
    """S probes of one shape and batch size in training. Axis S of every tensor belongs to the probes.

    The probes are sorted by `_input_of`, which puts them into G groups.
    """

    def __init__(self, configurations, x, targets, kind, n_outputs, seed):
        """All probes start from the same weights, uniform as torch initialises a linear layer."""
        self.configurations, self.x, self.targets, self.kind = configurations, x, targets, kind
        self.generator = torch.Generator(x.device).manual_seed(seed)
        std = x.std(dim=0, correction=0)
        self.shift = torch.stack([torch.zeros_like(std), x.mean(dim=0)])  # (2, F): as it is, standardised
        self.scale = torch.stack([torch.ones_like(std), 1 / std.where(std > 0, 1.0)])

        groups = sorted({_input_of(c) for c in configurations})
        self.standardised = torch.tensor([int(flag) for flag, _ in groups], device=x.device)  # (G,)
        self.input_dropout = torch.tensor([rate for _, rate in groups], device=x.device)[:, None, None]
        count = len(configurations)
        self.configuration_index = torch.arange(count, device=x.device)  # (S,) of each probe
        self.input_group = torch.tensor([groups.index(_input_of(c)) for c in configurations], device=x.device)
        self.patience = torch.tensor([c.patience for c in configurations], device=x.device)  # (S,)
        for name in ("lr", "dropout", "l2"):  # (S, 1, 1) each
            values = torch.tensor([getattr(c, name) for c in configurations], device=x.device)
            setattr(self, name, values.float()[:, None, None])

        self.weights = []  # for each layer a weight (S, in, out) and a bias (S, 1, out)
        for a, b in itertools.pairwise((x.shape[1], *configurations[0].hidden, n_outputs)):
            uniform = torch.rand(a + 1, b, generator=self.generator, device=x.device) * 2 - 1
            for part in (uniform / math.sqrt(a)).split([a, 1]):
                self.weights.append(part.expand(count, -1, -1).clone())
        self.exp_avg = [torch.zeros_like(w) for w in self.weights]  # Adam's mean of the gradients
        self.exp_avg_sq = [torch.zeros_like(w) for w in self.weights]  # and of their squares
        self.best_weights = [w.clone() for w in self.weights]
        self.best_score = torch.full((count,), -torch.inf, dtype=torch.float64, device=x.device)
        self.best_step = torch.zeros(count, dtype=torch.long, device=x.device)
        self.count_groups()

    def count_groups(self):
        """How many probes of each group are left, as a list: G numbers."""
        self.input_group_sizes = torch.bincount(self.input_group, minlength=len(self.standardised)).tolist()

    def fit(self, valid, progress):
        """Train until the last probe has stopped. Returns a `Probe` for each configuration."""
        finished = [None] * len(self.configurations)
        valid = (self.inputs_of_groups(valid[0]), *valid[1:])
        for step in itertools.count():
            if step % CHECK == 0:
                self.check(valid, step)
            if step % (8 * CHECK) == 0:  # not at every check, because a GPU waits for the answer
                stop = (step - self.best_step >= self.patience * CHECK).cpu()
                for s in stop.nonzero()[:, 0].tolist():
                    finished[int(self.configuration_index[s])] = self.finished_probe(s)
                progress(int(stop.sum()))
                if stop.all():
                    return finished
                if stop.any():
                    self.keep((~stop).nonzero()[:, 0].to(self.x.device))
            self.adam_step(step)

    def inputs_of_groups(self, x):
        """The input of each group, standardised or not: (n, F) -> (G, n, F)."""
        return (x - self.shift[self.standardised, None]) * self.scale[self.standardised, None]

    def forward(self, x, dropout=False):
        """Outputs of all probes for the inputs of the groups: (G, B, F) -> (S, B, C)."""
        *hidden, weight, bias = self.weights
        if hidden:
            x = x[self.input_group]  # (S, B, F)
            for w, b in zip(hidden[::2], hidden[1::2]):
                x = torch.baddbmm(b, x, w).relu()
                if dropout:
                    x = x * self.dropout_mask(x.shape[1:], self.dropout)
            return torch.baddbmm(bias, x, weight)
        # A linear probe is narrow. The weights of a group, side by side, make one wide matrix.
        outputs = []
        for x, w in zip(x, weight.split(self.input_group_sizes)):  # (B, F), (probes of the group, F, C)
            wide = x @ w.transpose(0, 1).flatten(1)  # (B, probes of the group * C)
            outputs.append(wide.unflatten(1, (len(w), w.shape[2])).transpose(0, 1))
        return torch.cat(outputs) + bias

    def dropout_mask(self, shape, rate):
        """Zeros and 1 / (1 - rate), for every rate (..., 1, 1) from the same random numbers."""
        uniform = torch.rand(shape, generator=self.generator, device=self.x.device)
        return (uniform >= rate) / (1 - rate)

    def adam_step(self, step):
        """One step of every probe on the same random examples. L2 is part of the gradient, as in torch."""
        order = torch.randperm(len(self.x), generator=self.generator, device=self.x.device)
        rows = order[: self.configurations[0].batch]
        x = self.inputs_of_groups(self.x[rows])  # (G, B, F)
        x = x * self.dropout_mask(x.shape[1:], self.input_dropout)
        for w in self.weights:
            w.requires_grad_()
        loss = probe_loss(self.kind, self.forward(x, dropout=True), self.targets[rows])
        gradients = torch.autograd.grad(loss, self.weights)

        correction = 1 - 0.9 ** (step + 1)  # for the zeros that both averages start from
        correction_sq = (1 - 0.999 ** (step + 1)) ** 0.5
        with torch.no_grad():  # in place: memory for new tensors would cost more time than the sums
            state = zip(self.weights, gradients, self.exp_avg, self.exp_avg_sq)
            for w, gradient, exp_avg, exp_avg_sq in state:
                gradient.addcmul_(w, self.l2)
                exp_avg.lerp_(gradient, 0.1)
                exp_avg_sq.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
                # w -= lr * (exp_avg / correction) / (sqrt(exp_avg_sq) / correction_sq + 1e-8)
                denominator = torch.sqrt(exp_avg_sq, out=gradient).add_(1e-8 * correction_sq)
                w.addcdiv_(exp_avg, denominator.mul_(correction / correction_sq / -self.lr))

    @torch.no_grad()
    def check(self, valid, step):
        """Score all probes on the validation split; keep the weights of those that are better than before."""
        x, targets, *target_index = valid
        outputs = probabilities(self.kind, self.forward(x), *target_index, count=len(targets))
        score = primary_score(self.kind, targets, outputs)
        better = (score > self.best_score) & (step - self.best_step <= self.patience * CHECK)
        self.best_score = torch.where(better, score, self.best_score)
        self.best_step = self.best_step.where(~better, step)
        for best, w in zip(self.best_weights, self.weights):
            torch.where(better[:, None, None], w, best, out=best)

    def finished_probe(self, s):
        """The probe at place `s` as a `Probe`, with its best weights."""
        configuration = self.configurations[int(self.configuration_index[s])]
        weights = [w[s].detach().clone() for w in self.best_weights]
        layers = [(weight, bias[0]) for weight, bias in zip(weights[::2], weights[1::2])]
        flag, score, step = int(configuration.standardise), float(self.best_score[s]), int(self.best_step[s])
        return Probe(configuration, score, step, self.shift[flag], self.scale[flag], layers)

    @torch.no_grad()
    def keep(self, places):
        """Remove all probes but those at `places` (long)."""
        for name in "configuration_index input_group patience lr dropout l2 best_score best_step".split():
            setattr(self, name, getattr(self, name)[places])
        for name in ("weights", "exp_avg", "exp_avg_sq", "best_weights"):
            setattr(self, name, [w[places] for w in getattr(self, name)])
        self.count_groups()


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


class Split(NamedTuple):
    """One split of a task. A target belongs to a clip, or to a song where the task scores songs."""

    x: torch.Tensor  # (n, ...) a row for each clip, the mean of its segments, or for each segment
    targets: torch.Tensor  # (m,) or (m, T)
    target_index: torch.Tensor  # (n,) long: the target of each row
    groups: torch.Tensor  # (m,) long: the group of each target, 0, 1, ...


def split_rows(task, features, split, rows, per_segment=False):
    """The `Split` "train", "valid" or "test" of a task. `rows` (n, ...) belong to features.clip_index.

    Raises ValueError if no clip of it can be read, or if no tag can be scored.
    """
    pairs = enumerate(zip(task.clips, features.labels))
    numbers = [i for i, (clip, label) in pairs if clip.split == split and label is not None]
    if not numbers:
        raise ValueError(f"{task.name}: no clip of the {split} split could be read")
    place = torch.full((len(task.clips),), -1)
    place[numbers] = torch.arange(len(numbers))
    clip_index = place[features.clip_index]
    x, clip_index = rows[clip_index >= 0], clip_index[clip_index >= 0]
    if not per_segment:
        x, clip_index = mean_rows(x, clip_index, len(numbers)), torch.arange(len(numbers))

    units = [task.clips[i].group if task.per_group else i for i in numbers]  # what is scored: songs or clips
    _, first, unit = np.unique(units, return_index=True, return_inverse=True)
    scored = [numbers[place] for place in first]  # one clip of each unit
    targets = torch.tensor([features.labels[i] for i in scored])
    if task.kind == "tags" and split != "train" and (targets == targets[0]).all():
        raise ValueError(f"{task.name}: no tag is on some {split} clips and not on others, nothing to score")
    _, groups = np.unique([task.clips[i].group for i in scored], return_inverse=True)
    return Split(x, targets, torch.from_numpy(unit)[clip_index], torch.from_numpy(groups))


def fit_probes(task, features, rows, grid, per_segment=False, seed=0, device="cpu", progress=None):
    """A probe for each configuration of `grid` on a representation's `rows` (n, F), and the best on valid."""
    train, valid = (split_rows(task, features, split, rows, per_segment) for split in ("train", "valid"))
    train = train.x.to(device), train.targets[train.target_index].to(device)
    valid = [part.to(device) for part in valid[:3]]
    probes = fit_grid(grid, train, valid, task.kind, len(task.names), seed, progress)
    return probes, max(probes, key=lambda probe: probe.valid)


def fit_all(task, jobs, per_segment=False, seed=0, device="cpu"):
    """`fit_probes` for jobs {name: (features, rows (n, F), list of Configuration)}: {name: (probes, best)}.

    On a CPU each core works on a job of its own, because small matrix products gain little from several
    cores. The jobs start in their order: put the longest first.
    """

    def fit(name):
        return fit_probes(task, *jobs[name], per_segment, seed, device, bar.update)

    cores = torch.get_num_threads()
    threads = min(cores, len(jobs)) if torch.device(device).type == "cpu" else 1
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(cores // threads,))
    with tqdm(total=sum(len(grid) for _, _, grid in jobs.values()), desc="probes", unit="probe") as bar:
        try:
            return dict(zip(jobs, pool.map(fit, jobs)))
        finally:  # when interrupted, without waiting for the rest
            pool.shutdown(wait=False, cancel_futures=True)


def predict(task, split, probe, device="cpu"):
    """A probe's outputs for a `Split` as they are scored: (m, C) float64, or (V, m, C) for rows (n, V, F)."""
    outputs = probe(split.x.to(device)).cpu().double().movedim(0, -2)
    return probabilities(task.kind, outputs, split.target_index, len(split.targets))


def bootstrap(kind, targets, outputs, groups=None, resamples=1000, seed=0):
    """95% interval of the primary metric on the test split, (low, high). Scores of leading axes are averaged.

    Groups (songs) are drawn with replacement, with all their clips. Clips of one song are not independent, so
    an interval over clips would be too narrow. `groups` (n,) is the group of each target, 0, 1, ...; None:
    all differ.
    """
    groups = torch.arange(len(targets)) if groups is None else groups
    members = groups.argsort(stable=True).split(torch.bincount(groups).tolist())
    generator = torch.Generator().manual_seed(seed)
    scores = []
    for _ in range(resamples):
        drawn = torch.randint(len(members), (len(members),), generator=generator)
        rows = torch.cat([members[group] for group in drawn.tolist()])
        scores.append(float(primary_score(kind, targets[rows], outputs[..., rows, :]).mean()))
    low, high = np.nanquantile(scores, [0.025, 0.975])
    return float(low), float(high)


def probe_task(task, features, grid, per_segment=False, seed=0, device="cpu"):
    """The whole protocol for one task and one encoder's features. Returns the results as a plain dict.

    A hybrid model is probed three ways: square, vertical and both side by side (section 4.3). The best of all
    configurations of all three on the validation split, and no other, is scored on the test split.
    """
    rows = dict(features.rows)
    if len(rows) == 2:
        rows["concatenated"] = features.concatenated()
    jobs = {name: (features, x, grid) for name, x in rows.items()}
    fitted = fit_all(task, jobs, per_segment, seed, device)
    name = max(fitted, key=lambda name: fitted[name][1].valid)
    winner = fitted[name][1]
    scores_of_grid = {}
    for part, (probes, _) in fitted.items():
        scores_of_grid[part] = [[*probe.configuration, probe.valid, probe.step] for probe in probes]
    return score_test(task, features, rows[name], winner, per_segment, device) | {
        "representation": name,
        "valid": {name: best.valid for name, (_, best) in fitted.items()},
        "winner": winner.configuration._asdict(),
        "grid": scores_of_grid,
    }


def score_test(task, features, rows, probe, per_segment=False, device="cpu"):
    """The `test_results` of a probe on the test split. Scores of rows (n, V, F) are means over V."""
    test = split_rows(task, features, "test", rows, per_segment)
    return test_results(task, test, predict(task, test, probe, device))


def test_results(task, test, outputs):
    """Scores of outputs (..., m, C) for the test `Split`, means over the leading axes V, as a plain dict.

    Keys: metric (the primary one), score (its value), interval (low, high), interval_over (what was
    resampled), test {metric: score}, draws (the score of each of V).
    """
    scores = evaluate(task.kind, test.targets, outputs)
    metric, draws = next(iter(scores.items()))
    if task.kind == "regression" and len(task.names) > 1:
        each = r2(test.targets, outputs, average=False).unbind(dim=-1)
        scores |= {f"r2 {name}": score for name, score in zip(task.names, each)}
    unit = "songs" if task.name in DATASETS else "groups"  # in a user's table a group need not be a song
    if not task.per_group and test.groups.max() + 1 == len(test.groups):
        unit = "clips"
    return {
        "metric": metric,
        "score": float(draws.mean()),  # of that metric
        "interval": bootstrap(task.kind, test.targets, outputs, test.groups),
        "interval_over": unit,
        "test": {name: float(score.mean()) for name, score in scores.items()},
        "draws": draws.flatten().tolist(),
    }


# --- Adaptation: an encoder and a head, trained on labelled clips (arXiv 2411.19371) -----------------------

ADAPT_BATCH = 16
ADAPT_CHECKS = 20  # validation checks in a run
ADAPT_PATIENCE = 8  # checks without a better score before the run stops
ADAPT_STEPS = 2000  # the paper has 25,000 and 75,000


class Classifier(nn.Module):
    """An encoder and a head: mean over tokens, Linear, Dropout, ReLU, Linear: (B, 128, 96) -> (B, outputs).

    The means over the tokens of a hybrid model's two patch shapes are concatenated, as in `embed`.
    """

    def __init__(self, encoder, n_outputs, bf16=False):
        super().__init__()
        self.encoder, self.bf16 = encoder, bf16
        width = SIZES[encoder.config.size][0] * len(encoder.patches)
        layers = nn.Linear(width, width), nn.Dropout(0.5), nn.ReLU(), nn.Linear(width, n_outputs)
        self.head = nn.Sequential(*layers)

    def forward(self, mel):
        mel = mel.to(self.head[0].weight.device)
        with torch.autocast(mel.device.type, torch.bfloat16, enabled=self.bf16):
            means = [self.encoder.tokens(mel, patch).mean(dim=1) for patch in self.encoder.patches]
            return self.head(torch.cat(means, dim=1)).float()

    @torch.no_grad()
    def predict(self, mel):
        """Outputs for segments (n, 128, 96), without dropout: (n, outputs)."""
        self.eval()
        return torch.cat([self(part) for part in mel.split(64)])


def load_mel(task, workers=None):
    """The mel segments of a task's clips: Features with rows {"mel": (n, 128, 96) float16}.

    They are in an unnamed file that is mapped into memory, so that there may be more than the memory holds.
    Raises ValueError if no clip can be read.
    """
    clip_index, labels, skipped = [], [], []
    with tempfile.TemporaryFile() as file:
        for number, (segments,) in _describe_task(task, [mel_segments], labels, skipped, workers=workers):
            clip_index += [number] * segments.shape[1]
            file.write(segments.numpy().tobytes())
        mel = np.memmap(file, np.float16, "r+", shape=(len(clip_index), data.N_MELS, data.FRAMES))
    return Features({"mel": torch.from_numpy(mel)}, torch.tensor(clip_index), labels, skipped)


def adapt_task(
    task, features, model, method, size=None, lr=None, steps=None, seed=0, device="cpu", bf16=False
):
    """Adapt a copy of a model to a task. Returns the results as a plain dict, and the trained Classifier.

    `features` is what `load_mel` returns; `method` and `size` (rank, width or number of tokens) are those of
    `adapt` in model.py. The weights with the best score on the validation split, and no others, are scored on
    the test split. The output for a clip is the mean over its segments. If `lr` is None it is 1e-4, 1e-5 for
    "full" (the paper's), and for a tiny model, for which these are too small, 1e-3.
    """
    torch.manual_seed(seed)  # of new weights and of dropout
    network = Classifier(copy.deepcopy(model), len(task.names), bf16).to(device)
    trained = adapt(network.encoder, method, size)
    usual = 1e-5 if method == "full" else 1e-4
    lr = lr or (1e-3 if model.config.size == "tiny" else usual)
    started = time.monotonic()
    log = fit_classifier(task, features, network, lr, steps or ADAPT_STEPS, seed)
    seconds = time.monotonic() - started

    step, _, valid = max(log, key=lambda check: check[2])
    every_row = torch.arange(len(features.clip_index))
    predict_rows = lambda rows: network.predict(features.rows["mel"][rows])
    results = score_test(task, features, every_row, predict_rows, per_segment=True) | {
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

    Adam; gradients are clipped to norm 1; the rate falls from `lr` to 1e-7 on a cosine. A step takes a random
    segment of each of 16 random clips. Raises ValueError if the loss at a check is not finite.
    """
    mel, every_row = features.rows["mel"], torch.arange(len(features.clip_index))
    train, valid = (split_rows(task, features, split, every_row, True) for split in ("train", "valid"))
    targets = train.targets[train.target_index].to(network.head[0].weight.device)  # of each segment
    counts = features.clip_index[train.x].unique_consecutive(return_counts=True)[1]  # segments of each clip
    first = counts.cumsum(dim=0) - counts
    generator = torch.Generator().manual_seed(seed)
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=1e-7)
    check_every = max(1, steps // ADAPT_CHECKS)
    best_weights, best_step, best_score = [p.detach().clone() for p in trained], 0, -math.inf
    log = []

    bar = tqdm(range(1, steps + 1), f"{task.name}: adapting", unit="step")
    for step in bar:
        clips = torch.randperm(len(counts), generator=generator)[:ADAPT_BATCH]
        places = first[clips] + (torch.rand(len(clips), generator=generator) * counts[clips]).long()
        network.train()
        loss = probe_loss(task.kind, network(mel[train.x[places]])[None], targets[places])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()

        if step % check_every == 0 or step == steps:
            if not loss.isfinite():
                raise ValueError(f"the loss of step {step} is {loss.item()}: try a smaller --lr than {lr}")
            outputs = predict(task, valid, lambda rows: network.predict(mel[rows]))
            score = float(primary_score(task.kind, valid.targets, outputs))
            log.append([step, loss.item(), score])
            bar.set_postfix(loss=f"{loss.item():.3f}", valid=f"{score:.3f}")
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
    groups, subsets = list(members), {fraction: [] for fraction in fractions}  # from 0 to 1
    for draw in range(repeat):
        order = [groups[i] for i in np.random.default_rng([seed, draw]).permutation(len(groups))]
        group_of_class = {}  # the first in the order
        if task.kind in ("classes", "key"):
            for group in order:
                for i in members[group]:
                    group_of_class.setdefault(labels[i], group)
        needed = set(group_of_class.values())
        order.sort(key=lambda group: group not in needed)  # the order is otherwise kept
        for fraction in subsets:
            count = max(1, len(needed), round(fraction * len(groups)))
            subsets[fraction].append({i for group in order[:count] for i in members[group]})
    return subsets


def few_labels(task, labels, fractions, train, repeat=4, seed=0):
    """Test scores of training with fewer labels: [{"fraction", "clips", "scores", "mean", "std"}].

    `train(task, seed)` returns a pair, first the results, for a task in which the training clips outside a
    subset belong to no split. Validation and test splits are whole. "clips" and "scores" have a number for
    each draw, "std" is their sample standard deviation (one draw: None).
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
            scores.append(results["score"])
        row = {"fraction": fraction, "clips": [len(chosen) for chosen in draws], "scores": scores}
        std = float(np.std(scores, ddof=1)) if repeat > 1 else None
        table.append(row | {"mean": float(np.mean(scores)), "std": std})
    return table


# --- The command line --------------------------------------------------------------------------------------

BASELINES = Path("runs/baselines")  # results of encoders without a checkpoint


class Encoder(NamedTuple):
    """An encoder as a command line names it, and where its features and results are kept."""

    name: str
    encoder: Myna | str  # as `embed_task` takes it
    key: str  # identifies the weights
    folder: Path


def open_encoder(name, args):
    """The Encoder "checkpoint", "random", "mfcc" or "chroma". Prints a line about a model."""
    if name in HAND_MADE:
        return Encoder(name, name, "1", BASELINES)  # the key: another number when the feature changes
    given = None if args.checkpoint == "random" else args.checkpoint
    newest = max(Path("runs").glob("*/checkpoint.pt"), key=os.path.getmtime, default=None)
    path = Path(given) if given else newest
    if name == "random":
        return _random_encoder(path, args)
    if path is None:
        advice = "`python train.py --demo` makes one, --checkpoint names one elsewhere"
        raise ValueError(f"there is no checkpoint under runs/: {advice}")
    try:
        model = load_model(path, args.patch)
    except ValueError as error:
        hint = "" if given else ". It is the newest under runs/; --checkpoint names another one"
        raise ValueError(f"{error}{hint}") from error
    step = read_checkpoint(path).get("step", "unknown")
    print(f"checkpoint {path}: {model.config.size}, {model.config.patch}, step {step}")
    folder = path.parent if path.name == "checkpoint.pt" else Path("runs") / path.stem
    return Encoder(model.config.patch, model, hashlib.sha1(path.read_bytes()).hexdigest(), folder)


def _random_encoder(path, args):
    """Random weights, with the settings of a checkpoint where --size and --patch do not say otherwise."""
    settings = read_checkpoint(path).get("config", {}) if path else {"size": "tiny"}
    config = Config(**settings)
    size = getattr(args, "size", None) or config.size
    config = replace(config, size=size, patch=args.patch or config.patch)
    name = f"random-{config.size}-{config.patch}{'-log' if config.log_mel else ''}"
    print(f"random weights: {name}" + (f", settings of {path} where not given" if path else ""))
    torch.manual_seed(args.seed)
    return Encoder(name, Myna(config).eval(), f"{config}, seed {args.seed}", BASELINES)


def embed_once(task, encoder, args):
    """`embed_task` for an Encoder. The Features are kept in its folder, with a hash of what decides them."""
    clips = [[str(clip.path), clip.offset, clip.duration, str(clip.label)] for clip in task.clips]
    files = [clip.path.stat() for clip in task.clips if isinstance(clip.path, Path)]
    clips += [[file.st_mtime_ns, file.st_size] for file in files]
    if not files:  # embedded music: the first clip stands for how it is made
        clips.append(load_clip(task.clips[0])[0].tolist())
    decides = [encoder.key, SAMPLE_RATE, N_FFT, data.HOP, data.N_MELS, data.FRAMES, clips]
    key = hashlib.sha1(json.dumps(decides).encode()).hexdigest()

    path = encoder.folder / f"features_{task.name}_{encoder.name}.pt"
    try:
        kept = read_checkpoint(path)
        if kept.pop("key") == key:
            print(f"features from {path}")
            return Features(**kept)
    except (ValueError, KeyError, TypeError):  # not there, damaged, or of another version
        pass
    features = embed_task(task, encoder.encoder, None, args.device, args.workers)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"key": key, **vars(features)}, path.with_suffix(".part"))
    os.replace(path.with_suffix(".part"), path)
    return features


def embed_files(args, model):
    """--embed: vectors of files and folders as an .npz of `vectors`, `paths` and, by segment, `seconds`."""
    paths, out = [], Path(args.out or "vectors.npz")
    for source in map(Path, args.embed):
        if not source.exists():
            raise ValueError(f"{source}: there is no such file or folder")
        paths += [source / name for name in audio_files(source)] if source.is_dir() else [source]
    if not paths:
        raise ValueError(f"no audio files in {', '.join(args.embed)}")
    if out.is_dir():
        raise ValueError(f"--out {out} is a folder")
    clips = [Clip(path, 0.0, None, 0, "", "") for path in paths]
    features = embed_task(Task("files", "classes", (), clips), model, None, args.device, args.workers)
    vectors, index, columns = features.concatenated(), features.clip_index, {}
    used, place, counts = index.unique_consecutive(return_inverse=True, return_counts=True)
    if args.per_segment:
        number = torch.cat([torch.arange(count) for count in counts.tolist()])  # of a segment in its file
        columns = {"seconds": (number * data.FRAMES * data.HOP / SAMPLE_RATE).numpy()}
    else:
        vectors, index = mean_rows(vectors, place, len(used)), used
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
    print(f"  {len(task.missing):,} listed files are missing{missing}")
    if task.note:
        print(f"  {task.note}")


def print_results(results):
    """The results of `probe_task` or `adapt_task` as a table."""
    clips = ", ".join(f"{count} {split}" for split, count in results["clips"].items())
    print(f"\n{results['task']} with {results['model']}: {clips} clips")
    for name, score in results["valid"].items():
        print(f"  valid  {results['metric']:<20} {score:7.1%}   {name}")
    low, high = results["interval"]
    for metric, score in results["test"].items():
        interval = f"   95% interval over {results['interval_over']}: {low:.1%} to {high:.1%}"
        print(f"  test   {metric:<20} {score:7.1%}{interval if metric == results['metric'] else ''}")
    if "method" in results:
        trained, total = results["trained"], results["encoder"]
        print(f"  trained {trained:,} of the encoder's {total:,} parameters ({trained / total:.2%})")
        print(f"          {results['trained_head']:,} parameters of the head")
        print(f"  weights of step {results['step']} of {results['log'][-1][0]}, {results['seconds']:.0f} s")
    else:
        best = ", ".join(f"{name} {value}" for name, value in results["winner"].items())
        tried = sum(map(len, results["grid"].values()))
        print(f"  best of {tried} probes on valid: {results['representation']}, {best}")


def print_few_labels(results):
    """The results of --labels as a table."""
    how = f"--adapt {results['method']}" if results["method"] else "probes"
    print(f"\n{results['task']} with {results['model']}, {how}: {results['metric']} on the test split")
    print("  labels   clips     mean     std   draws")
    for row in results["labels"]:
        draws = " ".join(f"{score:.1%}" for score in row["scores"])
        std = "–" if row["std"] is None else f"{row['std']:.1%}"
        print(f"  {row['fraction']:6.1%} {np.mean(row['clips']):7.0f} {row['mean']:8.1%} {std:>7}   {draws}")


def command_line():
    """The parser of the options that are probe.py's alone."""
    parser = argparse.ArgumentParser(description="Probe a frozen encoder, adapt it, or just write vectors.")
    option = parser.add_argument
    option("--check", action="store_true", help="read labels and files, count them, and stop")
    option("--size", choices=list(SIZES), help="of --checkpoint random (default: the newest checkpoint's)")
    option("--features", choices=list(HAND_MADE), help="a hand-made feature instead of an encoder")
    option("--per-segment", action="store_true", help="probe segments as the authors do; --embed: a row each")
    grid_help = "216 probes, or 24 with less patience (default: full; for synth-* quick)"
    option("--grid", choices=["full", "quick"], help=grid_help)
    methods = ", ".join(ADAPTATIONS)
    option("--adapt", choices=list(ADAPTATIONS), metavar="METHOD", help=f"train the encoder, too: {methods}")
    option("--lr", type=float, help="of --adapt (default: 1e-4, full 1e-5; for a tiny model 1e-3)")
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
    return [
        (args.embed, "with --embed", "task data kind check features grid adapt labels"),
        (not args.embed, "without --embed", "out"),
        (args.check, "with --check", "checkpoint patch size per_segment features grid adapt labels"),
        (args.features, f"with --features {args.features}", "checkpoint patch size per_segment adapt"),
        (args.adapt, "with --adapt", "per_segment grid"),
        (not args.adapt, "without --adapt", "lr steps rank precision"),
        (not args.labels, "without --labels", "repeat"),
        (args.checkpoint != "random", "without --checkpoint random", "size"),
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
    option("--seed", type=int, default=0, help="of the probes and of random weights (default: 0)")
    option("--device", help="(default: cuda if there is one, else cpu)")
    option("--workers", type=int, default=CORES, help=f"decoding processes (default: {CORES})")
    args = parser.parse_args()
    try:
        on_embedded_music = (args.task or "synth-key") in SYNTH, "with the embedded music", "data"
        for chosen, mode, names in [*unused_options(args), on_embedded_music]:
            for name in names.split():
                if chosen and getattr(args, name) != parser.get_default(name):
                    raise ValueError(f"--{name.replace('_', '-')} has no effect {mode}: leave it out")
        args.task = args.task or "synth-key"
        args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
        if args.seed < 0:
            raise ValueError(f"--seed {args.seed}: it must not be negative")
        for name in ("lr", "steps", "repeat", "workers", "rank"):
            value = getattr(args, name, None)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"--{name} {value}: it must be above zero")
        try:
            torch.empty(0, device=args.device)
        except (RuntimeError, AssertionError) as error:
            cause = str(error).splitlines()[0]
            raise ValueError(f"--device {args.device} cannot be used here: {cause}") from error
        work(args)
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"\n{parser.prog}: interrupted", file=sys.stderr, flush=True)
        os._exit(130)  # without waiting for what workers are in the middle of


def run_probe(args):
    """Run the mode that the options choose."""
    task = None if args.embed else load_task(args.task, args.data, args.kind)
    if args.check:
        return print_counts(task)
    for share in args.labels or ():
        if not 0 < share <= 1:
            raise ValueError(f"--labels {share}: a share of the labels is above 0 and at most 1")
    name = args.features or "checkpoint"
    encoder = open_encoder("random" if args.checkpoint == "random" else name, args)
    if args.embed:
        return embed_files(args, encoder.encoder)

    for split in SPLITS:
        if all(clip.split != split for clip in task.clips):
            raise ValueError(f"{task.name}: no sound of the {split} split is there; --check counts the files")

    if args.adapt:
        adapt(copy.deepcopy(encoder.encoder), args.adapt, args.rank)  # raises before any work
        features = load_mel(task, args.workers)
        bf16 = args.precision == "bf16" or (args.precision is None and args.device.startswith("cuda"))
    else:
        features = embed_once(task, encoder, args)
    quick = args.grid == "quick" or (args.grid is None and task.name in SYNTH)

    def train_once(task, seed):
        if not args.adapt:
            grid = QUICK_GRID if quick else GRID
            return probe_task(task, features, grid, args.per_segment, seed, args.device), None
        settings = args.rank, args.lr, args.steps, seed, args.device, bf16
        return adapt_task(task, features, encoder.encoder, args.adapt, *settings)

    network = None
    if args.labels:
        table = few_labels(task, features.labels, args.labels, train_once, args.repeat or 4, args.seed)
        results = {"metric": primary_metric(task.kind), "method": args.adapt, "labels": table}
    else:
        results, network = train_once(task, args.seed)
    pairs = zip(task.clips, features.labels)
    counts = Counter(clip.split for clip, label in pairs if label is not None)
    results |= {"task": task.name, "clips": {split: counts[split] for split in SPLITS}, "seed": args.seed}
    results |= {"model": encoder.name, "key": encoder.key}
    results |= {"missing": task.missing, "skipped": features.skipped}
    (print_few_labels if args.labels else print_results)(results)
    kind, more = ("adapted", [args.adapt]) if args.adapt else ("probe", [])
    if not args.adapt or encoder.folder == BASELINES:
        more = [*more, encoder.name]
    options = "labels repeat kind grid per_segment lr steps rank precision seed"
    path = save_results(results, encoder.folder, kind, task, more, args, options)
    if network:
        merge(network.encoder)  # where the method allows it
        extra = {"head": network.head.state_dict(), "names": list(task.names)}
        save_model(network.encoder, path.with_suffix(".pt"), **extra)


def save_results(results, folder, kind, task, more, args, options):
    """Print what is missing or skipped, and write the results as JSON. Returns the file's path.

    Its name contains every one of `options` that is set, and a hash of the task's folder if --data is given
    or a table is in another folder.
    """
    missing, skipped = results["missing"], [reason for _, reason in results["skipped"]]
    if missing or skipped:
        print(f"  INCOMPLETE: {len(missing)} files missing, {len(skipped)} clips unreadable")
        for line in [*missing, *skipped][:10]:
            print(f"    {line}")

    parts = [kind, task.name, *more]
    if args.data or Path(args.task).name != args.task:
        place = f"{os.path.abspath(args.task)} {os.path.abspath(args.data or '')}"
        parts[1] += f"-{hashlib.sha1(os.fsencode(place)).hexdigest()[:6]}"
    for option in options.split():
        value = getattr(args, option)
        if value:
            values = [] if value is True else value if isinstance(value, list) else [value]
            parts.append("-".join([option, *map(str, values)]))
    path = folder / ("_".join(parts) + ".json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".part").write_text(json.dumps(results))  # renamed: a killed run leaves no half file
    os.replace(path.with_suffix(".part"), path)
    print(f"  {path}")
    return path


def main():
    """The command line."""
    run_command(command_line(), run_probe, unused_options)


if __name__ == "__main__":
    main()
