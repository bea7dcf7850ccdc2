"""probe.py: metrics against counting, the grid against single probes, features against their definitions."""

import argparse
import csv
import hashlib
import itertools
import json
import math
import os
import shutil
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import data
import probe
from model import Config, Myna, save_model
from probe import Clip, Configuration, Features, Task, accuracy, average_precision, fit_grid, load_task, r2
from probe import roc_auc, split_rows, weighted_key_score


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def made_task(labels, splits, groups=None, kind="classes", names="ab", **more):
    """A task of files 0.wav, 1.wav, ..., which need not exist."""
    groups = groups or map(str, range(len(labels)))
    clips = [Clip(Path(f"{i}.wav"), 0.0, None, *rest) for i, rest in enumerate(zip(labels, splits, groups))]
    return Task("t", kind, tuple(names), clips, **more)


# --- metrics ------------------------------------------------------------------------------------------------


def slow_auc(targets, scores):
    pairs = [(p, n) for p in scores[targets == 1] for n in scores[targets == 0]]
    return sum(1.0 if p > n else 0.5 if p == n else 0.0 for p, n in pairs) / len(pairs) if pairs else math.nan


def slow_precision(targets, scores):
    area, recall_before = 0.0, 0.0
    for threshold in sorted(set(scores.tolist()), reverse=True):
        chosen = targets[scores >= threshold]
        recall = chosen.sum() / max(1, targets.sum())
        area += (recall - recall_before) * chosen.mean()
        recall_before = recall
    return area


def labels_and_scores(seed, ties):
    rng = np.random.default_rng(seed)
    targets = (rng.random((40, 6)) < 0.3).astype(float)
    targets[:, 1], targets[:, 2] = 0, 1  # tags that nothing has, that everything has
    scores = rng.standard_normal((3, 40, 6))
    return targets, np.round(scores) if ties else scores


@pytest.mark.parametrize("ties", [False, True])
def test_auc_and_average_precision_count_pairs_and_steps(ties):
    targets, scores = labels_and_scores(1, ties)
    auc, ap = roc_auc(targets, scores), average_precision(targets, scores)
    assert auc.shape == ap.shape == (3,) and auc.dtype == torch.float64
    for s in range(3):
        slow = [slow_auc(targets[:, t], scores[s, :, t]) for t in range(6)]
        assert auc[s].item() == pytest.approx(np.nanmean(slow), abs=1e-12)
        each = roc_auc(targets, scores[s], average=False)
        assert each.tolist() == pytest.approx(slow, abs=1e-12, nan_ok=True)
        slow = [slow_precision(targets[:, t], scores[s, :, t]) for t in range(6)]
        assert ap[s].item() == pytest.approx(np.mean(slow), abs=1e-12)
        each = average_precision(torch.tensor(targets), torch.tensor(scores[s]), average=False)
        assert each.tolist() == pytest.approx(slow, abs=1e-12)
    assert roc_auc(np.ones((4, 1)), np.zeros((4, 1))).isnan()
    one = np.array([[0], [1], [0], [0]])  # the only positive is the second best: recall 1 at precision 1 / 2
    assert average_precision(one, np.array([[4], [3], [2], [1]])).item() == 0.5
    assert roc_auc(targets, np.zeros((40, 6))).item() == 0.5
    first = targets[:, :1]
    assert roc_auc(first, first).item() == average_precision(first, first).item() == 1


def test_r2_is_the_formula():
    rng = np.random.default_rng(2)
    y, p = rng.standard_normal((30, 2)), rng.standard_normal((4, 30, 2))
    slow = []
    for s in range(4):
        total = [sum((y[:, t] - y[:, t].mean()) ** 2) for t in range(2)]
        slow.append([1 - sum((y[:, t] - p[s, :, t]) ** 2) / total[t] for t in range(2)])
    assert r2(y, p).tolist() == pytest.approx([sum(row) / 2 for row in slow], abs=1e-12)
    assert r2(y, p[0], average=False).tolist() == pytest.approx(slow[0], abs=1e-12)
    constant = np.ones((5, 1))
    assert r2(constant, constant).item() == 1 and r2(constant, constant + 0.1).item() == 0


def test_every_kind_has_its_metrics_the_primary_one_first():
    g = generator(3)
    outputs = torch.randn(2, 50, 24, generator=g)
    classes, numbers = torch.randint(24, (50,), generator=g), torch.randn(50, 24, generator=g)
    slow = [[max(range(24), key=row.__getitem__) for row in part] for part in outputs.tolist()]
    chosen = torch.tensor(slow)
    tags = (numbers > 0).float()
    right, key = accuracy(classes, chosen), weighted_key_score(classes, chosen)
    auc, area = roc_auc(tags, outputs), average_precision(tags, outputs)
    for kind, targets, metrics in [
        ("classes", classes, {"accuracy": right}),
        ("key", classes, {"weighted_key_score": key, "accuracy": right}),
        ("tags", tags, {"roc_auc": auc, "average_precision": area}),
        ("regression", numbers, {"r2": r2(numbers, outputs)}),
    ]:
        scores = probe.evaluate(kind, targets, outputs)
        assert list(scores) == list(metrics) == list(probe.METRICS[kind])
        assert all(torch.equal(scores[name], metrics[name]) for name in metrics)
        assert probe.primary_metric(kind) == list(metrics)[0]
        assert torch.equal(probe.primary_score(kind, targets, outputs), scores[probe.primary_metric(kind)])


def test_key_score_is_mirex():
    names = "C Db D Eb E F Gb G Ab A Bb B".split()
    number = {f"{tonic} major": n for n, tonic in enumerate(names)}
    number |= {f"{tonic} minor": 12 + n for n, tonic in enumerate(names)}
    for target, estimate, score in [
        ("C major", "C major", 1), ("C major", "G major", 0.5), ("G major", "C major", 0),
        ("C major", "A minor", 0.3), ("A minor", "C major", 0.3), ("C major", "C minor", 0.2),
        ("C minor", "C major", 0.2), ("E minor", "B minor", 0.5), ("B minor", "E minor", 0),
        ("Eb minor", "Gb major", 0.3), ("Bb major", "F major", 0.5), ("C major", "E minor", 0),
    ]:  # fmt: skip
        assert weighted_key_score([number[target]], [number[estimate]]).item() == score, (target, estimate)
    everything = torch.arange(24)
    total = sum(weighted_key_score(everything, torch.full((24,), k)).item() for k in range(24))
    assert total == pytest.approx(1 + 0.5 + 0.3 + 0.2)  # right, fifth, relative, parallel
    both = torch.stack([everything, (everything + 12) % 24])
    assert weighted_key_score(everything, both).tolist() == pytest.approx([1, 0.2])
    assert accuracy(everything, both).tolist() == [1, 0]
    assert accuracy(np.array([1, 2, 3, 3]), np.array([1, 2, 3, 4])).item() == 0.75


# --- the grid ----------------------------------------------------------------------------------------------


def toy(kind, n=70, features=12, outputs=4, seed=0):
    """Training and validation rows whose targets a probe can learn to some degree."""
    g = generator(seed)
    centre = 2 * torch.randn(outputs, features, generator=g)
    splits = []
    for size in (n, 40):
        x = torch.randn(size, features, generator=g)
        y = torch.randint(outputs, (size,), generator=g)
        x = x + centre[y]
        if kind == "tags":
            y = (x @ centre.T / 4 + torch.randn(size, outputs, generator=g) > 0).float()
        elif kind == "regression":
            y = x @ centre.T / 8 + torch.randn(size, outputs, generator=g)
        splits.append((3 * x + 5, y))
    return splits


def loss_and_score(kind, outputs, targets):
    """torch's own loss, and the metric."""
    if kind == "tags":
        loss = torch.nn.functional.binary_cross_entropy_with_logits(outputs, targets)
        return loss, roc_auc(targets, outputs.detach().sigmoid()).item()
    if kind == "regression":
        return torch.nn.functional.mse_loss(outputs, targets), r2(targets, outputs.detach()).item()
    loss = torch.nn.functional.cross_entropy(outputs, targets)
    return loss, (outputs.argmax(1) == targets).double().mean().item()


def alone(c, train, valid, kind, outputs, patience, seed=0):
    """One configuration as a page of PyTorch: nn.Linear, torch's Adam, a loop."""
    (x, y), (valid_x, valid_y), n = train, valid, len(train[0])
    draws = generator(seed)
    mean, std = (x.mean(0), x.std(0, correction=0)) if c.standardise else (0, 1)
    x, valid_x = (x - mean) / std, (valid_x - mean) / std
    layers = []
    for a, b in itertools.pairwise((x.shape[1], *c.hidden, outputs)):
        layer = torch.nn.Linear(a, b)
        initial = (torch.rand(a + 1, b, generator=draws) * 2 - 1) / a**0.5
        layer.weight.data, layer.bias.data = initial[:-1].T.clone(), initial[-1].clone()
        layers.append(layer)
    weights = [weight for layer in layers for weight in layer.parameters()]
    optimizer = torch.optim.Adam(weights, lr=c.lr, weight_decay=c.l2)

    def forward(h, train):
        for i, layer in enumerate(layers):
            if train:
                h = h * (torch.rand(h.shape, generator=draws) >= c.dropout) / (1 - c.dropout)
            h = layer(h)
            h = h.relu() if i < len(layers) - 1 else h
        return h

    best, best_step, step = -math.inf, 0, 0
    while True:
        if step % 8 == 0:
            with torch.no_grad():
                out = forward(valid_x, False)
            score = loss_and_score(kind, out, valid_y)[1]
            if score > best:
                best, best_step, kept = score, step, out
            if step - best_step >= patience * 8:
                return best, best_step, kept
        rows = torch.randperm(n, generator=draws)[: min(c.batch, n)]
        optimizer.zero_grad()
        loss_and_score(kind, forward(x[rows], True), y[rows])[0].backward()
        optimizer.step()
        step += 1


@pytest.fixture
def double():
    """Rounding errors grow over many steps of a network with ReLUs; in float64 they stay small enough."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


SHAPES = [("classes", ()), ("tags", (9,)), ("regression", (8, 5)), ("classes", (16,))]


@pytest.mark.parametrize("kind, hidden", SHAPES)
def test_each_probe_of_a_batch_is_what_it_would_be_alone(kind, hidden, double):
    train, valid = toy(kind)
    configurations = [
        Configuration(True, hidden, 32, 1e-2, 0.5, 0.0, 12),
        Configuration(False, hidden, 32, 1e-3, 0.25, 1e-3, 12),
        Configuration(True, hidden, 32, 3e-3, 0.0, 1e-4, 20),
        Configuration(True, hidden, 256, 1e-2, 0.25, 0.0, 12),  # a batch larger than the split
    ]
    together = fit_grid(configurations, train, valid, kind, 4)
    assert [p.configuration for p in together] == configurations
    for c, found in zip(configurations, together):
        best, step, outputs = alone(c, train, valid, kind, 4, c.patience)
        assert found.step == step and found.valid == pytest.approx(best, abs=1e-5)
        assert (found(valid[0]) - outputs).abs().max() < 1e-4 * outputs.abs().max()
    # They stopped at different checks of the eight between two removals, and the batch went on without them.
    assert len({p.step // 64 for p in together if p.configuration.batch == 32}) > 1


def test_the_same_probe_comes_from_any_batch():
    train, valid = toy("classes")
    chosen = [c for c in probe.GRID if c.batch == 64 and c.hidden == () and c.lr == 1e-3]
    chosen = [c._replace(patience=24) for c in chosen]
    together = fit_grid(chosen, train, valid, "classes", 4)
    single = fit_grid(chosen[5:6], train, valid, "classes", 4)[0]
    assert together[5].step == single.step and together[5].valid == single.valid
    assert torch.allclose(together[5].layers[0][0], single.layers[0][0], atol=1e-5)


def test_a_probe_reports_the_score_of_the_weights_it_keeps():
    train, valid = toy("tags")
    for found in fit_grid(probe.QUICK_GRID[::5], train, valid, "tags", 4):
        assert roc_auc(valid[1], found(valid[0]).sigmoid()).item() == pytest.approx(found.valid, abs=1e-6)


@pytest.mark.parametrize("patience, steps", [(1, 64), (8, 64), (9, 128)])
def test_probes_that_never_improve_stop_at_the_next_multiple_of_64(patience, steps, monkeypatch):
    (x, y), _ = toy("classes")
    taken, counts = [], []
    step = probe.ProbeBatch.adam_step
    monkeypatch.setattr(probe.ProbeBatch, "adam_step", lambda self, n: (taken.append(n), step(self, n)))
    never = x, torch.full_like(y, -1)  # no output is right
    grid = [c._replace(patience=patience) for c in probe.QUICK_GRID[:3]]
    found = fit_grid(grid, (x, y), never, "classes", 4, 0, counts.append)
    assert taken == list(range(steps)) and sum(counts) == 3
    assert [(p.configuration, p.step, p.valid) for p in found] == [(c, 0, 0.0) for c in grid]


def test_targets_are_scored_by_the_mean_of_their_rows():
    outputs = torch.randn(2, 6, 3, generator=generator(1))
    target_index = torch.tensor([0, 0, 1, 2, 2, 2])
    averaged = probe.probabilities("classes", outputs, target_index, 3)
    assert averaged.shape == (2, 3, 3)
    assert torch.allclose(averaged[1, 2], outputs[1, 3:].softmax(-1).mean(0))
    assert torch.allclose(averaged[0, 1], outputs[0, 2].softmax(-1))


def test_the_grid_is_appendix_c():
    assert len(set(probe.GRID)) == 216 and len(set(probe.QUICK_GRID)) == 24
    assert {c._replace(patience=256) for c in probe.QUICK_GRID} <= set(probe.GRID)
    assert {c.patience for c in probe.GRID} == {256} and {c.patience for c in probe.QUICK_GRID} == {64}
    for name, values in {
        "standardise": {False, True},
        "hidden": {(), (512,)},
        "batch": {64, 256},
        "lr": {1e-5, 1e-4, 1e-3},
        "dropout": {0.25, 0.5, 0.75},
        "l2": {0, 1e-4, 1e-3},
    }.items():
        assert {getattr(c, name) for c in probe.GRID} == values


def test_bootstrap_interval_covers_what_it_should():
    y = torch.cat([torch.zeros(300), torch.ones(100)]).long()
    outputs = torch.tensor([1.0, 0.0]).expand(400, 2)  # always class 0: accuracy 0.75, standard error 0.0217
    low, high = probe.bootstrap("classes", y, outputs)
    assert low == pytest.approx(0.75 - 1.96 * 0.02165, abs=0.01)
    assert high == pytest.approx(0.75 + 1.96 * 0.02165, abs=0.01)
    # Every clip four times, as four clips of a song: nothing more is known, but clips seem to say so.
    songs = torch.arange(400).repeat(4)
    four, many = y.repeat(4), outputs.repeat(4, 1)
    assert probe.bootstrap("classes", four, many, songs) == pytest.approx((low, high), abs=1e-9)
    low_of_clips, high_of_clips = probe.bootstrap("classes", four, many)
    assert high_of_clips - low_of_clips < 0.6 * (high - low)


@pytest.mark.parametrize("kind", ["tags", "regression", "key"])
def test_bootstrap_draws_whole_songs(kind):
    """Against dictionaries and lists: the same songs drawn, all clips of each as often as it is drawn."""
    g = generator(3)
    outputs = torch.rand(2, 30, 24, generator=g).double()
    y = {
        "tags": (torch.rand(30, 24, generator=g) < 0.5).double(),
        "regression": torch.randn(30, 24, generator=g),
        "key": torch.randint(24, (30,), generator=g),
    }[kind]
    songs = torch.tensor([0, 1, 0, 2, 3, 3, 3, 4, 5, 6] + list(range(7, 27)))[torch.randperm(30, generator=g)]
    clips_of = {song: [i for i in range(30) if songs[i] == song] for song in range(27)}
    draws, scores = generator(5), []
    for _ in range(40):
        drawn = torch.randint(27, (27,), generator=draws).tolist()
        clips = [clip for song in drawn for clip in clips_of[song]]
        each = []
        for version in outputs:
            each.append(float(next(iter(probe.evaluate(kind, y[clips], version[clips]).values()))))
        scores.append(sum(each) / 2)
    expected = np.quantile(scores, [0.025, 0.975])
    assert probe.bootstrap(kind, y, outputs, songs, resamples=40, seed=5) == pytest.approx(tuple(expected))


# --- features ----------------------------------------------------------------------------------------------


def test_mfcc_is_the_definition():
    wave = data.synthesize(1, 4)[0][0, :40_000]
    mel = data.mel_spectrogram(wave / wave.abs().max()).double().numpy()
    level = 10 * np.log10(np.maximum(mel, 1e-10))
    level = np.maximum(level, level.max() - 80)
    coefficients = np.zeros((20, mel.shape[1]))
    for k in range(20):
        for m in range(128):
            scale = math.sqrt((1 if k == 0 else 2) / 128)
            coefficients[k] += level[m] * math.cos(math.pi * k * (2 * m + 1) / 256) * scale
    first, second = np.diff(coefficients), np.diff(np.diff(coefficients))
    statistics = [f(x, axis=1) for x in (coefficients, first, second) for f in (np.mean, np.std)]
    expected = np.concatenate(statistics)
    found = probe.mfcc(wave).numpy()
    assert found.shape == (120,) and np.abs(found - expected).max() < 1e-3 * np.abs(expected).max()
    assert np.allclose(probe.mfcc(0.01 * wave), found, atol=0.05)  # the sound is peak-normalised


@pytest.mark.parametrize("pitch", range(48, 84, 5))
def test_chroma_hears_the_pitch_class_in_any_octave(pitch):
    t = torch.arange(32_000) / 16_000
    wave = sum(0.5**h * torch.sin(2 * torch.pi * 440 * 2 ** ((pitch - 69) / 12) * 2**h * t) for h in range(3))
    found = probe.chroma(wave)
    assert found.shape == (72,) and found[:12].argmax() == pitch % 12
    assert found[12:].isfinite().all()
    assert probe.chroma(torch.zeros(100)).isfinite().all() and probe.mfcc(torch.zeros(100)).isfinite().all()


# --- the labelled data sets, against the rules worked out by hand or slowly ---------------------------------


def sound(path, seconds=0.5, rate=8000):
    path.parent.mkdir(parents=True, exist_ok=True)
    wave = 0.1 * np.sin(np.arange(int(seconds * rate)) * 0.1)
    soundfile.write(path, wave, rate, format={".mp3": "MP3", ".au": "AU", ".wav": "WAV"}[path.suffix])


def text(path, content, encoding="utf-8"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode(encoding))


def sha1(name):
    return int.from_bytes(hashlib.sha1(name.encode("utf-8")).digest(), "big")


def found(pattern, *conditions):
    """The first name of a pattern such as 'Ólafur {}' that fulfils all conditions, tried in order."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    names = (pattern.format(a + b + c) for a in letters for b in letters for c in letters)
    return next(name for name in names if all(condition(name) for condition in conditions))


def splits(task):
    return dict(Counter(clip.split for clip in task.clips))


@pytest.mark.parametrize(
    "folder, suffix", [("genres", ".au"), ("genres_original", ".wav"), ("Data/genres_original", ".wav")]
)
def test_gtzan(tmp_path, folder, suffix):
    for name in ("blues.00029", "blues.00030", "rock.00099", "hiphop.00000", "jazz.00001"):
        sound(tmp_path / folder / name.split(".")[0] / f"{name}{suffix}")
    text(tmp_path / "Data/images_original/blues/blues00029.png", "")
    text(tmp_path / "__MACOSX/genres/blues/._blues.00029.wav", "")
    train = "blues/blues.00029.wav\nrock/rock.00099.wav\nblues/blues.00077.wav\n"
    text(tmp_path / "lists/train_filtered.txt", train)
    text(tmp_path / "lists/valid_filtered.txt", "hiphop/hiphop.00000.wav\r\n")
    text(tmp_path / "lists/test_filtered.txt", "jazz/jazz.00001.wav")  # no list has blues.00030
    task = load_task("gtzan", tmp_path)
    assert (task.name, task.kind, task.per_group) == ("gtzan", "classes", False)
    assert task.names == tuple("blues classical country disco hiphop jazz metal pop reggae rock".split())
    seen = [(clip.path.stem, clip.label, clip.split, clip.offset, clip.duration) for clip in task.clips]
    assert seen == [
        ("blues.00029", 0, "train", 0, None),
        ("rock.00099", 9, "train", 0, None),
        ("hiphop.00000", 4, "valid", 0, None),
        ("jazz.00001", 5, "test", 0, None),
    ]
    assert all(clip.path.suffix == suffix and clip.path.is_file() for clip in task.clips)
    assert task.missing == ["blues.00077.wav"]
    assert task.published == {"train": 443, "valid": 197, "test": 290}


def test_gtzan_says_what_is_not_there(tmp_path):
    message = "nowhere: no such folder.*marsyas.*coreyker/dnn-mgr.*genres/blues"
    with pytest.raises(ValueError, match=message):
        load_task("gtzan", tmp_path / "nowhere")
    text(tmp_path / "train_filtered.txt", "blues/blues.00029.wav\n")
    text(tmp_path / "valid_filtered.txt", "blues/blues.00030.wav\n")
    with pytest.raises(ValueError, match=r"no test_filtered.txt below this folder.*coreyker") as error:
        load_task("gtzan", tmp_path)
    assert "train_filtered.txt below" not in str(error.value) and "\n" not in str(error.value)
    text(tmp_path / "test_filtered.txt", "")
    message = r"none of its sound files is there, such as \['blues.00029.wav'\].*marsyas"
    with pytest.raises(ValueError, match=message):
        load_task("gtzan", tmp_path)
    text(tmp_path / "test_filtered.txt", "polka/polka.00001.wav")
    with pytest.raises(ValueError, match="test_filtered.txt: 'polka/polka.00001.wav'"):
        load_task("gtzan", tmp_path)


def test_mtt(tmp_path):
    """188 tags; tag 180 - i is the i-th most frequent but for ties and for tags of unused clips only."""
    tags = ["no voice", "zither"] + [f"tag {i}" for i in range(2, 188)]
    folders = "0123456789abcdef"
    clips = []  # id, folder, artist, tags
    for i in range(64):
        chosen = {f"tag {180 - k}" for k in range(48) if i <= 48 - k}  # tag 180: 49, 179: 48, ... 133: 2
        chosen |= {"tag 20", "zither", "tag 10"} if i == 50 else set()  # a tie, and there is room for one
        clips.append((str(2 + i), folders[i % 16], chosen))
    clips[60] = ("60000", "d", {"tag 100"})  # this one's sound is not there
    for number in ("35644", "55753", "57881"):
        clips.insert(7, (number, "8", {"tag 100"}))  # with the missing clip: tag 100 is there 4 times
    clips[30] = (clips[30][0], clips[30][1], set())  # a clip without any tag
    root = tmp_path / "magnatagatune"
    sound(tmp_path / "one.mp3", 0.3)
    root.mkdir()
    with open(root / "annotations_final.csv", "w", newline="") as file:
        table = csv.writer(file, delimiter="\t", quoting=csv.QUOTE_ALL)
        table.writerow(["clip_id", *tags, "mp3_path"])
        for k, (number, folder, chosen) in enumerate(clips):
            song = f"zoë_{'x' if k % 2 else 'y'}-album-0{k // 32}-a_song_1-29-58"
            path = f"{folder}/{song}-{29 * k}-{29 * k + 29}.mp3"
            clips[k] += (path,)
            table.writerow([number, *("1" if tag in chosen else "0" for tag in tags), path])
            if number != "60000":
                (root / folder).mkdir(exist_ok=True)
                os.link(tmp_path / "one.mp3", root / path)
    text(root / "clip_info_final.csv", '"clip_id"\t"track_number"\t"title"\t"artist"\n')

    task = load_task("mtt", tmp_path)
    count = Counter(tag for _, _, chosen, _ in clips for tag in chosen)
    slow = [tag for n in range(100, 0, -1) for tag in tags if count[tag] == n][:50]
    assert slow[-1] == "zither" and "tag 100" in slow and "tag 20" not in slow
    assert (task.kind, task.names) == ("tags", tuple(slow))
    kept = [clip for clip in clips if clip[0] not in ("35644", "55753", "57881", "60000")]
    assert [str(clip.path.relative_to(root)) for clip in task.clips] == [path for *_, path in kept]
    labels = [[float(tag in chosen) for tag in slow] for _, _, chosen, _ in kept]
    assert [clip.label for clip in task.clips] == labels
    assert sum(not any(clip.label) for clip in task.clips) >= 1
    for clip, (_, folder, _, path) in zip(task.clips, kept):
        assert clip.split == ("valid" if folder == "c" else "test" if folder in ("d", "e", "f") else "train")
        assert path.startswith(clip.group + "-") and clip.group.endswith("a_song_1-29-58")
    assert set(splits(task)) == {"train", "valid", "test"}
    assert task.missing == [path for number, _, _, path in clips if number == "60000"]
    assert sum(task.published.values()) == 25_860


def is_valid(name):
    return sha1(name.strip().lower()) % 116 >= 100


def is_train(name):
    return not is_valid(name)


def giantsteps(root, tracks, keys, test, length=30.5):
    """The publishers' two folders. tracks: (id, artists); keys: (id, key, confidence); test: (id, text)."""
    mtg, key = root / "giantsteps-mtg-key-dataset", root / "giantsteps-key-dataset"
    lines = ["ID\tARTIST\tTITLE\tGENRE"]
    lines += [f"{i}\t{artists}\tA Song, 12\" cut\tTechno" for i, artists in tracks]
    text(mtg / "annotations/beatport_metadata.txt", "\r\n".join(lines) + "\r\n")
    lines = ["ID\tMANUAL KEY\tC\t", *("\t".join(row) + "\t" for row in keys)]
    text(mtg / "annotations/annotations.txt", "\n".join(lines) + "\n")
    for i, name in test:
        text(key / f"annotations/key/{i}.LOFI.key", name)
    sound(root / "one.mp3", length)
    for folder, ids in ((mtg / "audio", [i for i, *_ in keys]), (key / "audio", [i for i, _ in test])):
        folder.mkdir(parents=True, exist_ok=True)
        for i in ids:
            os.link(root / "one.mp3", folder / f"{i}.LOFI.mp3")
    return mtg, key


def slow_giantsteps_split(tracks):
    """{id: split} straight from the words of FACTS.md, with lists and flags."""
    names = [(i, [name.strip().lower() for name in artists.split(",")]) for i, artists in tracks]
    flag = {name: is_valid(name) for _, group in names for name in group}
    for _ in range(2):
        for _, group in names:
            if any(flag[name] for name in group):
                for name in group:
                    flag[name] = True
    return {i: "valid" if any(flag[name] for name in group) else "train" for i, group in names}


def test_giantsteps_splits(tmp_path):
    """Valid artists spread over shared tracks: two passes over the whole file, in order, updated at once."""
    raw = lambda name: sha1(name) % 116 >= 100
    latin = lambda name: int(hashlib.sha1(name.lower().encode("latin-1")).hexdigest(), 16) % 116 >= 100
    ascii_only = lambda name: sha1(name.lower().encode("ascii", "ignore").decode()) % 116 >= 100
    others = [lambda n: not raw(n), lambda n: not latin(n), lambda n: not ascii_only(n)]
    a = found("ÓLAFUR Þ{}", is_valid, *others)
    b, c, d, e, f, g, h, lonely = (found(f"Artist {letter} {{}}", is_train) for letter in "BCDEFGHL")
    first = found("First {}", lambda n: sha1(n.lower()) % 116 == 100)
    last = found("Last {}", lambda n: sha1(n.lower()) % 116 == 99)
    tracks = [
        ("1", f"{d}, {c}"),  # c becomes valid in the second pass, one row too late for d
        ("2", f"{c},{b}"),
        ("3", f"{b.upper()} , {a}"),  # names are compared in lower case
        ("4", f"{a.lower()},{e}"),
        ("5", f"{e}, {f}"),  # and down the file the first pass does it all
        ("6", f"{f}, {g}"),
        ("7", f"{g}, {h}"),
        *((str(10 + i), artist) for i, artist in enumerate((a, b, c, d, e, f, g, h, lonely, first, last))),
    ]
    unused = {"3", "4"}  # tracks without a key spread it too
    keys = [(i, "C major", "2") for i, _ in tracks if i not in unused]
    giantsteps(tmp_path, tracks, keys, [("900", "C major")])
    task = load_task("giantsteps", tmp_path)
    split = {clip.group: clip.split for clip in task.clips}
    slow = {i: s for i, s in slow_giantsteps_split(tracks).items() if i not in unused}
    assert split == slow | {"900": "test"}
    assert split == {
        **dict.fromkeys(("1", "2", "5", "6", "7", "10", "11", "12", "14", "15", "16", "17", "19"), "valid"),
        **{"13": "train", "18": "train", "20": "train", "900": "test"},
    }


@pytest.mark.parametrize("seed", range(3))
def test_giantsteps_splits_at_random(tmp_path, seed):
    rng = np.random.default_rng(seed)
    names = [found(f"Ärtist {i}{{}}", is_valid if i % 9 == 0 else is_train) for i in range(60)]
    artists = [rng.choice(names, rng.choice((1, 1, 2, 3)), replace=False) for _ in range(60)]
    tracks = [(str(i), ", ".join(group)) for i, group in enumerate(artists)]
    giantsteps(tmp_path, tracks, [(i, "A minor", "2") for i, _ in tracks], [("900", "C major")])
    split = {clip.group: clip.split for clip in load_task("giantsteps", tmp_path).clips}
    assert split == slow_giantsteps_split(tracks) | {"900": "test"} and len(set(split.values())) == 3


def test_giantsteps_labels_and_clips(tmp_path):
    keys = [("11", "D# minor", "2"), ("12", " Bb major ", " 2"), ("13", "C major", "1")]
    keys += [("14", "F# minor / A major", "2"), ("15", "C# major", "2")]
    keys += [("16", "B minor", "2"), ("17", "E major", "")]
    root = tmp_path / "datasets" / "giantsteps-master"
    test = [("91", "G# minor\n"), ("92", "Gb major"), ("93", "A\tminor"), ("94", "C minor")]
    mtg, key = giantsteps(root, [(i, "Somebody") for i, *_ in keys if i != "16"], keys, test, length=61)
    text(mtg / "annotations/key/11.LOFI.key", "C major")  # of the training set: no test song
    text(key / "annotations/genre/91.LOFI.genre", "techno")
    text(key / "annotations/key/._91.LOFI.key", "\0\5\x16")  # what a Mac leaves behind
    for path, seconds in ((mtg / "audio/12.LOFI.mp3", 121), (key / "audio/91.LOFI.mp3", 12)):
        path.unlink()
        sound(path, seconds)
    (mtg / "audio/15.LOFI.mp3").unlink()
    (key / "audio/92.LOFI.mp3").unlink()
    (key / "audio/94.LOFI.mp3").unlink()
    text(key / "audio/94.LOFI.mp3", "no sound at all")
    task = load_task("giantsteps", tmp_path)
    assert (task.kind, task.names) == ("key", data.KEYS)
    assert task.per_group and task.published == {"train": 3687, "valid": 942, "test": 2406}
    seen = {}
    for clip in task.clips:
        assert clip.duration == 30 and clip.path.name == f"{clip.group}.LOFI.mp3"
        seen.setdefault((clip.group, data.KEYS[clip.label], clip.split == "test"), []).append(clip.offset)
    assert seen == {
        ("11", "Eb minor", False): [0, 30],
        ("12", "Bb major", False): [0, 30, 60, 90],
        ("16", "B minor", False): [0, 30],
        ("91", "Ab minor", True): [0],  # shorter than a clip
        ("93", "A minor", True): [0, 30],
        ("94", "C minor", True): [0],  # not decodable: embedding will say so
    }
    assert sorted(task.missing) == ["15.LOFI.mp3", "92.LOFI.mp3"]
    text(key / "annotations/key/95.LOFI.key", "H major")
    with pytest.raises(ValueError, match="95.LOFI.key: 'H major' is not a key"):
        load_task("giantsteps", tmp_path)


def test_files_of_an_hour_are_no_songs(tmp_path):
    for seconds, pieces in ((29, 1), (30, 1), (59.9, 1), (60, 2), (3599, 119), (3600, 1)):
        soundfile.write(tmp_path / "long.wav", np.zeros(int(seconds * 10), "int16"), 10)
        assert probe._count_pieces(tmp_path / "long.wav", 30) == pieces


def test_giantsteps_needs_both_sets(tmp_path):
    mtg, key = giantsteps(tmp_path, [("11", "Somebody")], [("11", "C major", "2")], [("91", "C major")])
    key.rename(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/annotations/key").rename(tmp_path / "elsewhere/annotations/genre")
    message = "no annotations/key below .*github.com/GiantSteps.*key-dataset/annotations"
    with pytest.raises(ValueError, match=message):
        load_task("giantsteps", tmp_path)


@pytest.mark.parametrize("name", data.KEYS)
def test_keys_by_all_their_names(name):
    tonic, mode = name.split()
    sharp = {"Db": "C#", "Eb": "D#", "Gb": "F#", "Ab": "G#", "Bb": "A#"}.get(tonic, tonic)
    for t in (tonic, sharp):
        short = {"major": ("", "M", ":maj", " maj"), "minor": ("m", ":min", "min", " Minor")}[mode]
        t = t.replace("#", "♯").replace("b", "♭") if tonic in ("Db", "Gb") else t
        assert {probe._key(t + s, "") for s in (*short, f" {mode}")} == {data.KEYS.index(name)}


def emomusic_split(artist):
    letters = "abcdefghijklmnopqrstuvwxyz"
    kept = [" " if c.isspace() else c for c in artist.lower() if c in letters or c.isspace()]
    while "  " in (joined := "".join(kept).strip()):
        kept = list(joined.replace("  ", " "))
    return "valid" if sha1(joined) % 10 in (8, 9) else "train"


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_emomusic(tmp_path, encoding):
    valid = lambda name: emomusic_split(name) == "valid"
    train = lambda name: emomusic_split(name) == "train"
    plain_valid = lambda name: sha1(name) % 10 >= 8
    letters = "abcdefghijklmnopqrstuvwxyz "
    spaced_valid = lambda name: plain_valid("".join(c for c in name.lower() if c in letters))
    rest = lambda number: lambda name: sha1(name) % 10 == number
    others = [lambda n: not plain_valid(n), lambda n: not spaced_valid(n)]
    known = found("The 3 {},  & the Ünknowns!", valid, *others)
    sigur = found("Sigur Rós {}", valid, lambda n: not plain_valid(n.lower()))
    songs = [  # id, artist, title, set, arousal, valence
        ("2", sigur, "Plain", "development", "3.1", "3.0"),
        ("3", known, '"Get Me Gone", again', "development", "4.4", "6.8"),
        ("4", found("{}", rest(7)), "Tabbed", "development", "5.7", "5"),
        ("5", found("mc {}", rest(0)), "Missing", "development", "6.25", "4.5"),
        ("6", found("dj {}", rest(8)), "Eight, nine", "development", "4.0", "4.0"),
        ("7", found("X{}", valid), "Test, with a comma", "evaluation", "8.0", "2.5"),
        ("8", found("Y{}", train), "Test", "evaluation", "1.0", "7.5"),
    ]
    folder = tmp_path / "emomusic" / "annotations"
    header = "song_id,file_name,Artist,Song title,start of the segment (min.sec),"
    header += "end of the segment (min.sec),Genre,Mediaeval 2013 set "
    quoted = lambda field: '"' + field.replace('"', '""') + '\t"'
    rows = [f"{i},{i}.mp3,{quoted(a)}, {quoted(t)},0.25,1.10,Blues\t,{kind} " for i, a, t, kind, *_ in songs]
    rows = [header, *rows, "9,9.mp3,Nobody,Not annotated,0,1,Pop,development"]
    text(folder / "songs_info.csv", "\r\n".join(rows), encoding)
    rows = [f"{i}, {arousal} ,1.5, {valence},1.0" for i, *_, arousal, valence in songs]
    rows = ["song_id, mean_arousal, std_arousal, mean_valence, std_valence", *rows]
    text(folder / "static_annotations.csv", "\n".join(rows))
    for i in ("2", "3", "4", "6", "7", "8", "9"):
        sound(tmp_path / f"emomusic/clips_45seconds/{i}.mp3")
    sound(tmp_path / "emomusic/clips_fulllength/5.mp3")  # another publication of it
    task = load_task("emomusic", tmp_path)
    assert (task.kind, task.names) == ("regression", ("arousal", "valence"))
    split = {"2": "valid", "3": "valid", "4": "train", "6": "valid", "7": "test", "8": "test"}
    assert {clip.group: clip.split for clip in task.clips} == split
    for clip in task.clips:
        assert (clip.path.name, clip.offset, clip.duration) == (f"{clip.group}.mp3", 0, None)
    assert task.missing == ["clips_45seconds/5.mp3"]
    numbers = {i: (float(arousal), float(valence)) for i, *_, arousal, valence in songs}
    development = np.array([numbers[i] for i in ("2", "3", "4", "5", "6")])
    mean = development.sum(axis=0) / 5
    deviation = np.sqrt(((development - mean) ** 2).sum(axis=0) / 5)
    for clip in task.clips:
        assert np.allclose(clip.label, (np.array(numbers[clip.group]) - mean) / deviation, atol=1e-12)
    text(folder / "static_annotations.csv", "song_id,mean_arousal,std_arousal,mean_valence\n2,3,1,n/a")
    with pytest.raises(ValueError, match="static_annotations.csv, line 2: 'n/a' is not a number"):
        load_task("emomusic", tmp_path)


@pytest.mark.parametrize("folder", ["audio", "TinySOL/audio"])
def test_tinysol(tmp_path, folder):
    notes = [  # path, fold, abbreviation, full name, label, split
        ("Brass/Bass_Tuba/ordinario/BTb-ord-F#1-pp-N-N.wav", 0, "BTb", "Bass Tuba", 0, "valid"),
        ("Strings/Violin/ordinario/Vn-ord-D4-ff-3c-N.wav", 1, "Vn", "Violin", 8, "test"),
        ("Strings/Viola/ordinario/Va-ord-C4-ff-3c-N.wav", 2, "Va", "Viola", 7, "train"),
        ("Keyboards/Accordion/ordinario/Acc-ord-C4-ff-N-T8u.wav", 3, "Acc", "Accordion", 4, "train"),
        ("Winds/Oboe/ordinario/Ob-ord-C5-mf-N-N.wav", 4, "Ob", "Oboe", 13, "train"),
        ("Winds/Flute/ordinario/Fl-ord-C5-mf-N-N.wav", 4, "Fl", "Flute", 12, "train"),  # no file
    ]
    header = "Path,Fold,Family,Instrument (abbr.),Instrument (in full),Technique (abbr.),Pitch"
    rows = [f"{path},{fold},Family,{short},{full},ord,C4" for path, fold, short, full, *_ in notes]
    text(tmp_path / "annotation/TinySOL_metadata.csv", "\r\n".join([header, *rows]))
    for path, *_ in notes[:-1]:
        sound(tmp_path / folder / path)
    task = load_task("tinysol", tmp_path)
    assert (task.name, task.kind, len(task.names), task.per_group) == ("tinysol", "classes", 14, False)
    assert task.missing == [Path(notes[-1][0]).name]
    for clip, (path, _, short, _, label, split) in itertools.zip_longest(task.clips, notes[:-1]):
        assert (clip.path, clip.offset, clip.duration) == (tmp_path / folder / path, 0, None)
        assert (clip.label, clip.split, task.names[clip.label]) == (label, split, short)
    assert len({clip.group for clip in task.clips}) == 5
    for row in ("Brass/x.wav,5,Brass,BTb,Bass Tuba", "Brass/x.wav,0,Brass,Pno,Piano"):
        text(tmp_path / "annotation/TinySOL_metadata.csv", f"{header}\n{row}")
        with pytest.raises(ValueError, match="metadata.csv, line 2: '.' is no fold or '...' no instrument"):
            load_task("tinysol", tmp_path)


@pytest.mark.parametrize("folder", ["", "Beatport EDM Key"])
def test_beatport(tmp_path, folder):
    root = tmp_path / folder
    rows = [(100 + i, ("D minor", "Eb major", "D# major ")[i % 3]) for i in range(45)]  # D# major is Eb major
    rows += [(200, "F minor"), (201, "C major\n"), (202, "C major"), (203, " B  minor")]
    unused = [(300, "F minor | Ab major"), (301, "X"), (302, "unknown"), (303, "F other")]
    unused += [(304, "F minor phrygian"), (305, ""), (306, "minor"), (307, "E")]
    sound(tmp_path / "one.mp3", 0.3)
    (root / "audio").mkdir(parents=True)
    for number, key in rows + unused:
        stem = f"{number} Lindstrøm, J. - Vol. {number} (Original Mix)"
        text(root / f"keys/{stem}.txt", key)
        if number != 103:
            os.link(tmp_path / "one.mp3", root / f"audio/{stem}{'.wav' if number == 105 else '.mp3'}")
            text(root / f"audio/{stem}.txt", "")
    text(root / "audio/._100 Lindstrøm.mp3", "")  # what a Mac leaves behind
    text(root / "keys/._100 Lindstrøm.txt", "C major")
    task = load_task("beatport", tmp_path)
    assert (task.name, task.kind, task.names, task.per_group) == ("beatport", "key", data.KEYS, False)
    assert task.missing == ["audio/103 Lindstrøm, J. - Vol. 103 (Original Mix).mp3"]

    labels = {"D minor": 14, "Eb major": 3, "D# major ": 3, "F minor": 17}
    labels |= {"C major\n": 0, "C major": 0, " B  minor": 23}
    expected = {}
    for label in range(24):
        numbers = [str(number) for number, key in rows if labels[key] == label]
        ranked = sorted(numbers, key=sha1)
        tenth = {15: 2, 30: 3, 1: 1, 2: 1, 0: 0}[len(ranked)]
        for rank, number in enumerate(ranked):
            expected[number] = label, "test" if rank < tenth else "valid" if rank < 2 * tenth else "train"
    assert Counter(split for _, split in expected.values()) == {"train": 35, "valid": 6, "test": 8}
    del expected["103"]  # a missing file changes no other clip's split
    assert {clip.group: (clip.label, clip.split) for clip in task.clips} == expected
    for clip in task.clips:
        assert (clip.offset, clip.duration) == (0, None) and clip.path.name.startswith(f"{clip.group} ")
    assert "GiantSteps-MTG-Key" in task.note and "8 tracks" in task.note
    for number, key in unused:
        assert f"{number} ({key!r})" in task.note
    (root / "keys").rename(root / "keys.zip")
    with pytest.raises(ValueError, match="no keys below this folder.*1101082.*never train on one"):
        load_task("beatport", tmp_path)


@pytest.mark.parametrize("name", ["mtt", "emomusic", "tinysol"])
def test_a_folder_without_the_tables(tmp_path, name):
    text(tmp_path / "readme.txt", "")
    with pytest.raises(ValueError, match=r"below this folder\. .*Where to get it: .*The folder holds: .*csv"):
        load_task(name, tmp_path)
    text(tmp_path / "annotations_final.csv", "clip_id\tno voice\n2\t1\n")
    if name == "mtt":
        with pytest.raises(ValueError, match="annotations_final.csv: no column 'mp3_path'"):
            load_task(name, tmp_path)


def test_links_are_followed_and_end(tmp_path, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("another disk")
    text(elsewhere / "sound.wav", "")
    (tmp_path / "a").mkdir()
    (tmp_path / "a/genres").symlink_to(elsewhere, target_is_directory=True)
    text(tmp_path / "a/b/labels.txt", "")
    (tmp_path / "a/b/up").symlink_to(tmp_path, target_is_directory=True)
    text(tmp_path / "1/2/3/4/5/deep.txt", "")
    text(tmp_path / "1/2/3/4/5/6/too_deep.txt", "")
    files = probe._files(tmp_path)
    assert files["b/labels.txt"] == files["labels.txt"] == tmp_path / "a/b/labels.txt"
    assert files["genres/sound.wav"].is_file()
    assert "deep.txt" in files and "too_deep.txt" not in files


# --- the embedded music -------------------------------------------------------------------------------------


def test_embedded_tasks():
    for name, kind, names in [
        ("synth-key", "key", data.KEYS),
        ("synth-style", "classes", tuple(data.STYLES)),
        ("synth-tags", "tags", data.TAGS),
        ("synth-mood", "regression", ("arousal", "valence")),
    ]:
        task = load_task(name)
        assert (task.name, task.kind, task.names, list(task.missing)) == (name, kind, names, [])
        assert splits(task) == {"train": 600, "valid": 200, "test": 400}
        assert len({clip.path for clip in task.clips}) == len({clip.group for clip in task.clips}) == 1200
        seeds = {(clip.split, clip.path[0]) for clip in task.clips}
        assert len({seed for _, seed in seeds} - {0}) == len(seeds) == 3  # each split has its own; not 0
        assert all(clip.label is None for clip in task.clips)


def test_unknown_names():
    names = "gtzan, mtt, giantsteps, emomusic, tinysol, beatport, synth-key"
    with pytest.raises(ValueError, match=f"'gtzam'.*{names}.*csv"):
        load_task("gtzam")
    with pytest.raises(ValueError, match="'ranking'.*classes, key, tags, regression"):
        load_task("labels.csv", kind="ranking")


# --- labels.csv ---------------------------------------------------------------------------------------------


@pytest.fixture
def table(tmp_path):
    """Writes my.csv from lines, with sound files 0.wav ... 29.wav in the folder clips beside it."""
    sound(tmp_path / "clips/0.wav", 0.1)
    for i in range(1, 30):
        os.link(tmp_path / "clips/0.wav", tmp_path / f"clips/{i}.wav")

    def write(*lines, encoding="utf-8"):
        text(tmp_path / "my.csv", "\n".join(lines) + "\n", encoding)
        return tmp_path / "my.csv"

    return write


def test_csv_classes(table, tmp_path):
    lines = ["clips/0.wav,rock,train,a,1.5,3", "clips/1.wav, Jazz ,valid,b,,"]
    lines += ['"clips/2.wav","é, b",test,c,0,0.5', ",,,,,"]
    lines += ["clips/3.wav,rock,train,a", "clips/no.wav,only here,test,c,,"]
    for encoding in ("utf-8", "utf-8-sig"):
        task = load_task(table("path,label,split,group,offset,duration", *lines, encoding=encoding))
        assert (task.name, task.kind) == ("my", "classes")
        assert task.names == ("Jazz", "only here", "rock", "é, b") and task.missing == ["clips/no.wav"]
        assert task.clips == [
            (tmp_path / "clips/0.wav", 1.5, 3.0, 2, "train", "a"),
            (tmp_path / "clips/1.wav", 0.0, None, 0, "valid", "b"),
            (tmp_path / "clips/2.wav", 0.0, 0.5, 3, "test", "c"),
            (tmp_path / "clips/3.wav", 0.0, None, 2, "train", "a"),
        ]


def test_csv_of_sound_elsewhere(table, tmp_path):
    path = table("path,label,split", "0.wav,a,train", "1.wav,b,valid", f"{tmp_path}/clips/2.wav,b,test")
    clips = load_task(path, root=tmp_path / "clips").clips
    assert [clip.path.name for clip in clips] == ["0.wav", "1.wav", "2.wav"]
    with pytest.raises(ValueError, match=r"none of its sound files .*\['x.wav'\]. Paths are relative"):
        load_task(table("path,label,split", "x.wav,a,train", "y.wav,b,valid", "z.wav,b,test"))


def test_csv_other_kinds(table):
    three = ["clips/0.wav,train", "clips/1.wav,valid", "clips/2.wav,test"]
    lines = lambda *labels: [f"{line},{label}" for line, label in zip(three, labels)]
    task = load_task(table("path,split,label", *lines("C# minor", "Am", "Bb")), kind="key")
    assert (task.kind, task.names, [clip.label for clip in task.clips]) == ("key", data.KEYS, [13, 21, 10])
    task = load_task(table("path,split,tags", *lines("loud|fast", "", "fast | soft|")))
    assert (task.kind, task.names) == ("tags", ("fast", "loud", "soft"))
    assert [clip.label for clip in task.clips] == [[1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [1.0, 0.0, 1.0]]
    task = load_task(table("path,split,tempo", *lines("100", "120", "150")))
    assert (task.kind, task.names) == ("regression", ("tempo",))
    assert np.allclose([clip.label for clip in task.clips], [[-1], [1], [4]])
    task = load_task(table("path,split,label", *lines("100", "120", "150")), kind="regression")
    assert task.names == ("label",) and np.allclose(task.clips[2].label, [4])
    assert load_task(table("path,split,label", *lines("100", "120", "150"))).kind == "classes"
    rows = lines("1,5,0,3,g", "2,7,1,3,h", "3,-1e1,2,3,i")
    task = load_task(table("path,split,x,y,offset,duration,group", *rows))
    assert task.names == ("x", "y")


@pytest.mark.parametrize("expected", [(1, 1, 1), (2, 1, 1), (8, 1, 1), (11, 2, 2), (24, 3, 3)])
def test_csv_without_splits(table, expected):
    """80/10/10 of the groups, each whole, none empty, the same for any order of the rows and any folder."""
    groups = sum(expected)
    lines = [f"clips/{i}.wav,{'ab'[i % 2]},song {i % groups}" for i in range(30)]
    task = load_task(table("path,label,group", *lines))
    split_of = {clip.group: clip.split for clip in task.clips}
    assert all(clip.split == split_of[clip.group] for clip in task.clips) and len(split_of) == groups
    count = Counter(split_of.values())
    assert (count["train"], count["valid"], count["test"]) == expected
    again = load_task(table("path,label,group", *lines[::-1]))
    assert {clip.group: clip.split for clip in again.clips} == split_of


def test_csv_groups_are_files_if_not_said(table):
    lines = [f"{'./' if i % 2 else ''}clips/{i % 5}.wav,{'ab'[i % 2]},{i / 100}" for i in range(30)]
    split_of = {}
    for clip in load_task(table("path,label,offset", *lines)).clips:
        assert split_of.setdefault(clip.path.name, clip.split) == clip.split
    assert set(split_of.values()) == {"train", "valid", "test"}
    paths = [f"clips/{i}.wav" for i in range(30)]
    task = load_task(table("path,label", *(f"{p},{p[-5]}" for p in paths)))
    one = {clip.group: clip.split for clip in task.clips}
    order = sorted(paths, key=lambda p: hashlib.sha1(p.encode()).hexdigest())
    assert one == {p: "test" if i < 3 else "valid" if i < 6 else "train" for i, p in enumerate(order)}


def test_csv_one_file_written_in_many_ways(table, tmp_path):
    """Its clips are one group; the group's name, and so the split, is that of the plain relative path."""
    (tmp_path / "link").symlink_to(tmp_path / "clips", target_is_directory=True)
    ways = ["clips/{}.wav", "./clips/{}.wav", "clips/../clips/{}.wav", "clips//{}.wav"]
    ways.append(f"{tmp_path}/clips/{{}}.wav")
    plain = load_task(table("path,label", *(f"clips/{i}.wav,{'ab'[i % 2]}" for i in range(30))))
    split_of = {clip.path.name: clip.split for clip in plain.clips}
    for ways in (ways[:4], ways[3::-1], ways, ["link/{}.wav", *ways]):
        lines = [f"{way.format(i)},{'ab'[i % 2]}" for way in ways for i in range(30)]
        task = load_task(table("path,label", *lines))
        assert len(task.clips) == len(lines)
        assert len({(clip.path.name, clip.group) for clip in task.clips}) == 30
        again = load_task(table("path,label", *lines[::-1]))
        assert {(c.group, c.split) for c in again.clips} == {(c.group, c.split) for c in task.clips}
        assert all(clip.split == split_of[clip.path.name] for clip in task.clips)
    split = ["clips/0.wav,a,train", "clips/1.wav,b,valid", "clips/2.wav,b,test"]
    for way in ("./clips/0.wav", "clips/../clips/0.wav", f"{tmp_path}/clips/0.wav", "link/0.wav"):
        assert len(load_task(table("path,label,split", *split, f"{way},a,train")).clips) == 4
        with pytest.raises(ValueError, match="line 5: test, but its group is also in train: 'clips/0.wav'"):
            load_task(table("path,label,split", *split, f"{way},a,test"))
    parts = [f"{line},song {i}" for i, line in enumerate(split)] + ["./clips/0.wav,a,test,song 3"]
    assert [clip.split for clip in load_task(table("path,label,split,group", *parts)).clips][3] == "test"


LABELS = "path,label,split"
GOOD = ("clips/0.wav,a,train", "clips/1.wav,b,valid", "clips/2.wav,b,test")
ALL_A = tuple(line.replace(",b", ",a") for line in GOOD)
NUMBERS = ("clips/0.wav,.1,train", "clips/1.wav,.1,valid", "clips/2.wav,2,test")


@pytest.mark.parametrize(
    "header, rows, kind, message",
    [
        ("", [], None, "no column 'path'"),
        (LABELS, [], None, "no clips in it"),
        ("file,label", ["clips/0.wav,a"], None, "no column 'path' in the first line, 'file,label'"),
        ("path;label", ["clips/0.wav;a"], None, "no column 'path' in the first line, 'path;label'"),
        ("path,split", ["clips/0.wav,train"], None, "nothing to predict"),
        ("path,mood,split", GOOD, "classes", "no column 'label'"),
        ("path,mood,split", GOOD, "key", "no column 'label'"),
        (LABELS, GOOD, "tags", "no column 'tags'"),
        (LABELS, [*GOOD, "clips/3.wav,a,eval"], None, "line 5: .*'eval' is none of train,"),
        (LABELS, [*GOOD, "clips/3.wav,a,"], None, "line 5: the split '' is none of"),
        (LABELS, [*GOOD, "", "clips/3.wav,,train"], None, "line 6: no label"),
        (LABELS, [*GOOD, ",a,train"], None, "line 5: no path"),
        (LABELS, [*GOOD, "3, live.wav,a,train"], None, "line 5: .*more fields than columns"),
        (LABELS, [*GOOD, '"clips/3.wav,a,train'], None, "line 5: the split '' is none of"),
        (LABELS, [*GOOD, "x" * 200_000], None, "not a table .*field larger than"),
        ("path,mood,split", GOOD, None, "line 2, mood: 'a' is not a number"),
        ("path,x,split", [NUMBERS[0], "clips/1.wav,nan,valid"], None, "line 3, x: 'nan' is not a number"),
        ("path,x,split", [NUMBERS[0], "clips/1.wav,,valid"], None, "line 3, x: '' is not a number"),
        ("path,x,split", NUMBERS, None, "a target has the same value"),
        ("path,label,split,offset", ["clips/0.wav,a,train,x"], None, "line 2, offset: 'x' is not"),
        ("path,label,split,offset", ["clips/0.wav,a,train,-1"], None, "line 2: the offset must not"),
        ("path,label,split,duration", ["clips/0.wav,a,train,0"], None, "line 2: .*duration must be more"),
        (LABELS, GOOD, "key", "line 2: 'a' is not a key"),
        (LABELS, GOOD[:2], None, "no clips for test"),
        ("path,label", ["clips/0.wav,a", "clips/1.wav,b"], None, "no clips for train; .*three groups"),
        (LABELS, ALL_A, None, r"nothing to predict.*\['a'\]"),
        ("path,tags", [f"clips/{i}.wav," for i in range(3)], None, "nothing to predict"),
        ("path,label,split,group", map(",".join, zip(GOOD, "gjg")), None, "line 4: .*in train: 'g'"),
    ],
)
def test_csv_with_something_wrong(table, header, rows, kind, message):
    with pytest.raises(ValueError, match=f"my.csv.*{message}") as error:
        load_task(table(header, *rows), kind=kind)
    assert "\n" not in str(error.value)


def test_csv_of_another_encoding(table, tmp_path):
    lines = "path,label,split", *GOOD, "clips/é.wav,a,train", "clips/3.wav,é,train"
    task = load_task(table(*lines, encoding="latin-1"))  # a letter is lost, and what it spoils is told
    assert task.missing == ["clips/\ufffd.wav"] and task.names == ("a", "b", "\ufffd")
    with pytest.raises(ValueError, match="my.csv: no column 'path' in the first line"):
        load_task(table(*lines, encoding="utf-16"))
    with pytest.raises(ValueError, match="none.csv: there is no such file"):
        load_task(tmp_path / "none.csv")


# --- the whole stage ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """24 sounds of two timbres, one of them short, a corrupt file, a missing one, and a model."""
    folder = tmp_path_factory.mktemp("labelled")
    rng, rows = np.random.default_rng(0), ["path,label,split"]
    for i in range(24):
        kind, split = ("tone", "noise")[i % 2], ("train", "train", "valid", "test")[i // 2 % 4]
        t = np.arange(int(8000 * (4 if i else 0.5))) / 8000  # the first is shorter than a segment
        tone = np.sin(2 * np.pi * rng.uniform(300, 600) * t)
        wave = tone if kind == "tone" else rng.standard_normal(len(t))
        soundfile.write(folder / f"{i}.wav", 0.1 * wave, 8000)
        rows.append(f"{i}.wav,{kind},{split}")
    (folder / "bad.wav").write_text("no sound")
    (folder / "labels.csv").write_text("\n".join([*rows, "bad.wav,tone,train", "gone.wav,tone,train"]))
    torch.manual_seed(0)
    (folder / "runs/small").mkdir(parents=True)
    save_model(Myna(Config("tiny", "hybrid")), folder / "runs/small/checkpoint.pt", step=3)
    return folder


@pytest.fixture
def newer_run(labelled):
    """The folder of a run whose checkpoint would be the newest one."""
    folder = labelled / "runs/newer"
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


def in_this_process(function, jobs, workers):
    return (function(*job) for job in jobs)


@pytest.fixture
def command(labelled, monkeypatch, capfd):
    """Runs probe.py without worker processes, with little patience and a small grid; returns its output."""
    monkeypatch.chdir(labelled)
    monkeypatch.setattr(probe, "in_workers", in_this_process)
    few = [c._replace(patience=16) for c in probe.QUICK_GRID if not c.hidden and c.dropout == 0.25]
    monkeypatch.setattr(probe, "QUICK_GRID", few)
    monkeypatch.setattr(probe, "GRID", few[:2])

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["probe.py", *map(str, arguments)])
        probe.main()
        return capfd.readouterr().out

    return run


def test_from_a_table_of_labels_to_a_result(labelled, command, monkeypatch):
    monkeypatch.setattr(probe, "in_workers", data.in_workers)
    task = ("--task", "labels.csv", "--grid", "quick", "--workers", 1)
    said = command(*task)
    for words in (
        "checkpoint runs/small/checkpoint.pt: tiny, hybrid, step 3",
        "labels with hybrid: 12 train, 6 valid, 6 test clips",
        "best of 12 probes on valid: ",
        "square",
        "vertical",
        "concatenated",
        "95% interval over clips",
        "INCOMPLETE: 1 files missing, 1 clips unreadable",
        "gone.wav",
        "bad.wav",
        "runs/small/probe_labels_hybrid_grid-quick.json",
    ):
        assert words in said, words
    results = json.loads((labelled / "runs/small/probe_labels_hybrid_grid-quick.json").read_text())
    assert results["clips"] == {"train": 12, "valid": 6, "test": 6} and results["missing"] == ["gone.wav"]
    assert results["skipped"][0][0] == "bad.wav" and "libsndfile" in results["skipped"][0][1]
    assert results["test"] == {"accuracy": 1} and results["score"] == 1 and results["interval"] == [1, 1]
    assert (results["task"], results["model"], results["seed"]) == ("labels", "hybrid", 0)
    assert set(results["valid"]) == {"square", "vertical", "concatenated"}
    assert all(len(tried) == 4 for tried in results["grid"].values())
    checkpoint = (labelled / "runs/small/checkpoint.pt").read_bytes()
    assert results["key"] == hashlib.sha1(checkpoint).hexdigest()
    assert "features from" in command(*task, "--per-segment")  # the sound was not read again
    name = "runs/small/probe_labels_hybrid_grid-quick_per_segment.json"
    assert json.loads((labelled / name).read_text())["score"] == 1
    command(*task, "--features", "mfcc")
    assert (labelled / "runs/baselines/probe_labels_mfcc_grid-quick.json").exists()


def test_results_of_other_questions_have_other_names(labelled, command):
    for path in (labelled / "runs/small").glob("probe_*"):
        path.unlink()
    questions = ["", "--grid full", "--grid quick", "--per-segment", "--seed 1", "--kind classes"]
    for question in questions:
        command("--task", "labels.csv", "--workers", 1, *question.split())
    names = {path.name for path in (labelled / "runs/small").glob("probe_*")}
    more = ("", "_grid-full", "_grid-quick", "_per_segment", "_seed-1", "_kind-classes")
    assert names == {f"probe_labels_hybrid{option}.json" for option in more}


def test_results_of_other_places_have_other_names(labelled, command):
    (labelled / "deeper").mkdir()
    (labelled / "deeper/labels.csv").write_text((labelled / "labels.csv").read_text())
    names = set()
    for place in (("labels.csv",), ("deeper/labels.csv", "--data", "."), ("labels.csv", "--data", ".")):
        names.add(command("--workers", 1, "--features", "mfcc", "--task", *place).split()[-1])
    assert len(names) == 3 and "runs/baselines/probe_labels_mfcc.json" in names


def test_features_are_kept_until_what_decides_them_changes(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(probe, "in_workers", in_this_process)
    for i in range(4):
        sound(tmp_path / f"{i}.wav", 4.0)
    task = made_task(range(4), ["train"] * 4, names="abcd")
    task.clips = [clip._replace(path=tmp_path / clip.path) for clip in task.clips]
    path = tmp_path / "kept/features_t_x.pt"

    def kept(task, key="2"):
        encoder = probe.Encoder("x", "mfcc", key, tmp_path / "kept")
        found.append(probe.embed_once(task, encoder, argparse.Namespace(device="cpu", workers=1)))
        return f"features from {path}" in capfd.readouterr().out

    found = []
    assert not kept(task, "1") and kept(task, "1") and kept(task, "1")
    assert torch.equal(found[0].rows["mfcc"], found[1].rows["mfcc"]) and found[0].labels == found[1].labels
    assert not kept(task)
    os.utime(tmp_path / "2.wav", (1, 1))
    assert not kept(task)
    moved = replace(task, clips=[task.clips[0]._replace(offset=0.5), *task.clips[1:]])
    assert not kept(moved)
    assert kept(replace(moved, clips=[c._replace(split="unused") for c in moved.clips]))
    monkeypatch.setattr(data, "HOP", 256)
    assert not kept(moved)
    path.write_bytes(path.read_bytes()[:-100])  # cut short: made again
    assert not kept(moved) and kept(moved)


@pytest.mark.parametrize("best", ["square", "vertical", "concatenated"])
def test_the_best_patch_shape_on_validation_goes_on(best):
    """Only one of two shapes describes the labels, or only both together do; and test never decides."""
    g, labels = generator(0), [i // 3 % 4 for i in range(360)]
    task = made_task(labels, ["train", "valid", "test"] * 120, names="abcd")
    y = torch.tensor(labels)
    told = {"square": (y, y * 0), "vertical": (y * 0, y), "concatenated": (y // 2, y % 2)}[best]
    rows = {}
    for name, part in zip(("square", "vertical"), told):
        rows[name] = torch.nn.functional.one_hot(part, 4).float() + 0.01 * torch.randn(360, 4, generator=g)
        if best not in (name, "concatenated"):  # on the test split the other is right
            rows[name][2::3] = torch.nn.functional.one_hot(y[2::3], 4).float()
    features = Features(rows, torch.arange(360), labels, [])
    results = probe.probe_task(task, features, [probe.GRID[0]._replace(lr=0.03, patience=16)])
    assert results["representation"] == best == max(results["valid"], key=results["valid"].get)
    others = [score for name, score in results["valid"].items() if name not in (best, "concatenated")]
    assert results["valid"][best] == 1 and max(others) < 0.8
    assert results["test"]["accuracy"] == results["score"] == 1


def test_random_weights_are_shaped_like_the_newest_checkpoint(
    labelled, newer_run, command, tmp_path, monkeypatch
):
    task = ("--task", "labels.csv", "--checkpoint", "random", "--workers", 1)
    save_model(Myna(Config("tiny", "square", log_mel=True)), newer_run / "checkpoint.pt")
    said = command(*task)
    assert "random weights: random-tiny-square-log, settings of runs/newer/checkpoint.pt" in said
    assert (labelled / "runs/baselines/probe_labels_random-tiny-square-log.json").exists()
    assert "random weights: random-tiny-vertical-log" in command(*task, "--patch", "vertical")
    (tmp_path / "a.wav").write_bytes((labelled / "1.wav").read_bytes())
    monkeypatch.chdir(tmp_path)  # no checkpoint here
    command("--embed", "a.wav", "--checkpoint", "random", "--patch", "vertical", "--workers", 1)
    with np.load(tmp_path / "vectors.npz") as found:
        torch.manual_seed(0)
        expected = Myna(Config("tiny", "vertical")).embed(data.mel_segments(data.load_audio("a.wav")))
        assert np.allclose(found["vectors"], expected.mean(dim=0), atol=1e-5)


def test_a_damaged_newest_checkpoint_is_named(labelled, newer_run, command, capfd):
    small = "runs/small/checkpoint.pt"
    (newer_run / "checkpoint.pt").write_bytes((labelled / small).read_bytes()[:5000])
    with pytest.raises(SystemExit):
        command("--task", "labels.csv")
    said = capfd.readouterr().err
    assert "runs/newer/checkpoint.pt" in said and "--checkpoint names another one" in said
    assert said.startswith("probe.py: ") and said.count("\n") == 1
    assert "runs/small" in command("--embed", "1.wav", "--checkpoint", small, "--workers", 1)


def test_features_of_a_clip_are_the_mean_of_its_segments(labelled):
    task = load_task(labelled / "labels.csv")
    torch.manual_seed(0)
    model = Myna(Config("tiny", "hybrid"))
    features = probe.embed_task(task, model, workers=1)
    train = split_rows(task, features, "train", features.rows["vertical"])
    clips = [clip for clip in task.clips if clip.split == "train" and clip.path.name != "bad.wav"]
    assert len(train.x) == len(clips) and train.target_index.tolist() == list(range(len(clips)))
    for row, label, clip in zip(train.x, train.targets, clips):
        mel = data.mel_spectrogram(data.load_audio(clip.path)).half()
        assert torch.allclose(row, model.embed(data.segments(mel), "vertical").mean(dim=0), atol=1e-4)
        assert label == clip.label
    assert features.skipped[0][0].endswith("bad.wav") and "libsndfile" in features.skipped[0][1]


def twice(wave, clip):
    """Two versions of a clip, which can be told from each other and depend on the clip."""
    return [wave, wave.flip(0) * (1 + len(clip.path.name))]


def loudest(wave):
    return wave.abs().max()[None]


def test_several_encoders_and_corrupted_clips(labelled, tmp_path):
    for name, number in (("a", 1), ("bb", 4), ("short", 0)):
        (tmp_path / f"{name}.wav").write_bytes((labelled / f"{number}.wav").read_bytes())
    rng = np.random.default_rng(0)
    soundfile.write(tmp_path / "long.wav", 0.1 * rng.standard_normal(16_000 * 10), 16_000)
    clips = [Clip(p, 0.0, None, 0, "test", p.name) for p in sorted(tmp_path.glob("*.wav"))]
    task = Task("t", "classes", ("x",), clips)
    torch.manual_seed(0)
    models = {"one": Myna(Config("tiny", "hybrid")), "other": Myna(Config("tiny", "square"))}
    encoders = {**models, "mfcc": "mfcc", "mine": loudest}
    clean = probe.embed_task(task, encoders, workers=2)
    found = probe.embed_task(task, encoders, corrupt=twice, workers=2)
    assert {name: list(f.rows) for name, f in found.items()} == {
        "one": ["square", "vertical"], "other": ["square"], "mfcc": ["mfcc"], "mine": ["loudest"]
    }  # fmt: skip
    assert clean["one"].clip_index.tolist() == [0, 1, 2, 2, 2, 3]
    assert clean["mine"].clip_index.tolist() == [0, 1, 2, 3]
    for number, clip in enumerate(clips):
        wave = data.load_audio(clip.path)
        for version, heard in enumerate(twice(wave, clip)):
            mel = data.mel_segments(heard)
            for name, model in models.items():
                for patch in model.patches:
                    expected = model.embed(mel, patch).mean(dim=0)
                    assert torch.allclose(found[name].rows[patch][number, version], expected, atol=1e-4)
            assert torch.allclose(found["mfcc"].rows["mfcc"][number, version], probe.mfcc(heard), atol=1e-3)
            assert found["mine"].rows["loudest"][number, version] == heard.abs().max()
        expected = models["one"].embed(data.mel_segments(wave), "square")
        rows = clean["one"].rows["square"][clean["one"].clip_index == number]
        assert torch.allclose(rows, expected, atol=1e-4)
    alone = probe.embed_task(task, models["other"], workers=1)
    assert torch.allclose(alone.rows["square"], clean["other"].rows["square"], atol=1e-4)


def test_splits_that_cannot_be_scored_are_a_sentence():
    task = made_task([[1.0, 0.0]] * 3, ("train", "valid", "valid"), kind="tags")
    features = Features({}, torch.arange(3), [clip.label for clip in task.clips], [])
    assert len(split_rows(task, features, "train", torch.randn(3, 4)).x) == 1
    with pytest.raises(ValueError, match="t: no tag is on some valid clips"):
        split_rows(task, features, "valid", torch.randn(3, 4))
    with pytest.raises(ValueError, match="t: no clip of the test split could be read"):
        split_rows(task, features, "test", torch.randn(3, 4))


def test_targets_are_in_the_order_of_the_clips():
    labels = [i // 3 * 2 % 5 for i in range(12)]
    task = made_task(labels, ["valid"] * 12, [f"song {i // 3}" for i in range(12)], names="abcde")
    rows = torch.randn(24, 4)
    features = Features({}, torch.arange(12).repeat_interleave(2), labels, [])
    x, targets, target_index, groups = split_rows(task, features, "valid", rows)
    assert targets.tolist() == labels and target_index.tolist() == list(range(12))
    assert torch.allclose(x, rows.view(12, 2, 4).mean(dim=1))
    assert groups.tolist() == [i // 3 for i in range(12)]
    task.per_group = True
    x, targets, target_index, groups = split_rows(task, features, "valid", rows, per_segment=True)
    assert targets.tolist() == [0, 2, 4, 1] and target_index.tolist() == [i // 6 for i in range(24)]
    assert torch.equal(x, rows) and groups.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("per_group", [False, True])
def test_predictions_carry_the_songs_that_are_resampled(per_group):
    task = made_task([0] * 6, ["test"] * 6, ["b", "a", "b", "unread", "c", "a"], per_group=per_group)
    features = Features({}, torch.tensor([0, 1, 1, 2, 4, 5]), [0, 1, 0, None, 1, 1], [])
    rows = torch.randn(6, 3, 2, generator=generator(0))  # three versions
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    found = probe.Probe(None, 0, 0, torch.zeros(2), torch.ones(2), [(weight, torch.zeros(2))])
    test = split_rows(task, features, "test", rows)
    outputs = probe.predict(task, test, found)
    clip_means = torch.stack([rows[0], rows[1:3].mean(dim=0), rows[3], rows[4], rows[5]])
    expected = clip_means.double().softmax(dim=-1)  # (clips, versions, classes)
    if per_group:
        expected = torch.stack([expected[[1, 4]].mean(dim=0), expected[[0, 2]].mean(dim=0), expected[3]])
    assert test.targets.tolist() == ([1, 0, 1] if per_group else [0, 1, 0, 1, 1])
    assert test.groups.tolist() == ([0, 1, 2] if per_group else [1, 0, 1, 2, 0])  # by name
    assert outputs.shape == (3, len(test.targets), 2) and outputs.dtype == torch.float64
    assert torch.allclose(outputs, expected.transpose(0, 1), atol=1e-6)
    one = split_rows(task, features, "test", rows[:, 1])
    assert torch.allclose(probe.predict(task, one, found), outputs[1])

    results = probe.test_results(task, test, outputs)
    scores = accuracy(test.targets, outputs.argmax(dim=-1))
    assert results["draws"] == scores.tolist() and results["metric"] == "accuracy"
    assert results["score"] == results["test"]["accuracy"] == scores.mean().item()
    assert results["interval"] == probe.bootstrap("classes", test.targets, outputs, test.groups)
    assert results["interval_over"] == "groups"
    assert probe.test_results(replace(task, name="mtt"), test, outputs)["interval_over"] == "songs"
    clips = test._replace(groups=torch.arange(len(test.targets)))
    assert probe.test_results(task, clips, outputs)["interval_over"] == ("groups" if per_group else "clips")


def test_each_target_of_a_regression_has_its_score():
    y, outputs = torch.randn(20, 2, generator=generator(0)), torch.randn(3, 20, 2, generator=generator(1))
    task = made_task(y.tolist(), ["test"] * 20, kind="regression")
    test = split_rows(task, Features({}, torch.arange(20), y.tolist(), []), "test", torch.zeros(20, 1))
    results = probe.test_results(task, test, outputs)
    each = [r2(y[:, t : t + 1], outputs[..., t : t + 1]).mean().item() for t in range(2)]
    assert results["test"] == pytest.approx({"r2": sum(each) / 2, "r2 a": each[0], "r2 b": each[1]})
    assert results["score"] == results["test"]["r2"] and len(results["draws"]) == 3


def test_just_the_embeddings(labelled, command):
    said = command("--embed", ".", "--out", "deep/v.npz", "--workers", 1)
    assert "skipped: " in said and "bad.wav" in said
    with np.load(labelled / "deep/v.npz") as found:
        assert found["vectors"].shape == (24, 256) and len(found["paths"]) == 24
        for vector, name in list(zip(found["vectors"], found["paths"]))[:6]:
            torch.manual_seed(0)
            mel = data.mel_segments(data.load_audio(labelled / str(name)))
            expected = Myna(Config("tiny", "hybrid")).embed(mel).mean(dim=0)
            assert np.allclose(vector, expected, atol=1e-6)
    soundfile.write(labelled / "long.wav", 0.1 * np.random.default_rng(0).standard_normal(16_000 * 7), 16_000)
    command("--embed", "1.wav", "long.wav", "3.wav", "--out", "s.npz", "--per-segment", "--workers", 1)
    with np.load(labelled / "s.npz") as found:
        assert found["vectors"].shape == (4, 256)
        assert np.allclose(found["seconds"], [0, 0, 96 * 512 / 16_000, 0])
        assert found["paths"].tolist() == ["1.wav", "long.wav", "long.wav", "3.wav"]
    (labelled / "long.wav").unlink()


def test_cores_are_shared_and_given_back(monkeypatch):
    def fit(task, features, *more):
        if features == "fails":
            raise ZeroDivisionError
        return features, torch.get_num_threads()

    monkeypatch.setattr(probe, "fit_probes", fit)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        for count, threads in ((1, 4), (2, 2), (3, 1), (9, 1)):
            jobs = {str(i): (i, None, []) for i in range(count)}
            assert probe.fit_all(None, jobs) == {str(i): (i, threads) for i in range(count)}
        with pytest.raises(ZeroDivisionError):
            probe.fit_all(None, {"0": (0, None, []), "1": ("fails", None, [])})
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ("--task gtzan", "Where to get it"),
        ("--task nonsense", "no task 'nonsense'"),
        ("--task missing.csv", "missing.csv"),
        ("--checkpoint missing.pt", "no such checkpoint"),
        ("--embed missing", "no such file or folder"),
        ("--embed runs/small", "no audio files in runs/small"),
        ("--embed 1.wav --out runs", "--out runs is a folder"),
        ("--task labels.csv --device nonsense", "--device nonsense cannot be used here"),
        ("--task labels.csv --workers 0", "--workers 0: it must be above zero"),
        ("--task labels.csv --workers -1", "--workers -1: it must be above zero"),
        ("--task synth-key --kind tags", "for a table of your own"),
        ("--features mfcc --per-segment", "--per-segment has no effect with --features mfcc"),
        ("--features mfcc --checkpoint random", "--checkpoint has no effect with --features mfcc"),
        ("--size tiny", "--size has no effect without --checkpoint random"),
        ("--out v.npz", "--out has no effect without --embed"),
        ("--check --grid quick", "--grid has no effect with --check"),
        ("--check --per-segment", "--per-segment has no effect with --check"),
        ("--data .", "--data has no effect with the embedded music"),
        ("--task synth-mood --data .", "--data has no effect with the embedded music"),
        ("--embed 1.wav --task gtzan", "--task has no effect with --embed"),
        ("--embed 1.wav --grid full", "--grid has no effect with --embed"),
        ("--embed 1.wav --features mfcc", "--features has no effect with --embed"),
    ],
)
def test_mistakes_are_one_sentence(arguments, sentence, command, capfd):
    with pytest.raises(SystemExit) as end:
        command(*arguments.split())
    said = capfd.readouterr().err
    assert end.value.code == 2 and sentence in said and "Traceback" not in said


def test_no_checkpoint_is_a_sentence(tmp_path, command, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        command("--task", "synth-key")
    assert "there is no checkpoint under runs/" in capfd.readouterr().err


def test_check_counts_without_embedding(command):
    said = command("--task", "labels.csv", "--check")
    assert "labels: classes, 2 outputs: noise, tone" in said
    assert "13 clips" in said and "1 listed files are missing: gone.wav" in said
