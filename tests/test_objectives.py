"""The objectives beside Myna's own: each formula against loops in float64, and what every run promises."""

import json
import math
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import data
import probe
import train
from model import N_TOKENS, OBJECTIVES, PATCHES, keep_tokens, k_means, load_model, mfcc_of_patches
from model import patchify, spread

ROOT = Path(__file__).parent.parent
HIDDEN_PATCHES = ("mae", "data2vec", "hubert")
TWO_VIEWS = tuple(name for name in OBJECTIVES if name not in HIDDEN_PATCHES)
TEACHERS = ("byol", "clustering", "data2vec")
EVERY_SHAPE = [(name, patch) for name in OBJECTIVES for patch in OBJECTIVES[name].patches]
CPU = torch.device("cpu")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def power(batch, seed=0):
    """Something with the range of mel power: many orders of magnitude."""
    return torch.randn(batch, 128, 96, generator=generator(seed)).mul(3).exp().clamp(max=60_000)


def settings(name, *more, patch="vertical", batch=16):
    """The settings of a run of the tiny model."""
    arguments = ["--size", "tiny", "--objective", name, "--patch", patch, "--batch", str(batch)]
    arguments += ["--lr", "1e-3", "--clusters", "12"]
    args = train.command_line().parse_args([*arguments, *map(str, more)])
    train.check_settings(args)
    args.chunk = args.chunk or batch
    args.precision = args.precision or "float32"
    return args


def build(corpus, name, *more, **options):
    """A new objective with the tiny model, its optimizer, and its settings."""
    args = settings(name, *more, **options)
    clips = torch.arange(len(corpus))
    objective, optimizer = train.build_objective(args, corpus, clips, CPU, None)
    return objective, optimizer, args


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working folder with 176 clips of the embedded music in it."""
    folder = tmp_path_factory.mktemp("objectives")
    data.build_embedded_corpus(176, 3, folder / "corpora/small", workers=1)
    return folder


@pytest.fixture(scope="module")
def corpus(folder):
    return data.Corpus(folder / "corpora/small")


# --- the losses of two views -------------------------------------------------------------------------------


def dot(a, b):
    return sum(float(x) * float(y) for x, y in zip(a, b, strict=True))


def slow_byol(outputs):
    """2 - 2 cos(prediction of a view, teacher of the other view), the mean over both views and all pairs."""
    total = 0
    for view in (0, 1):
        for i in range(outputs.shape[1]):
            prediction, target = outputs[view, i, 0], outputs[1 - view, i, 1]
            cosine = dot(prediction, target) / math.sqrt(dot(prediction, prediction) * dot(target, target))
            total += 2 - 2 * cosine
    return total / (2 * outputs.shape[1])


def slow_softmax(values):
    powers = [math.exp(value - max(values)) for value in values]
    return [power / sum(powers) for power in powers]


def slow_clustering(outputs, centre, tau):
    """-sum over clusters of t log s, the mean over both views and all pairs."""
    total = 0
    for view in (0, 1):
        for i in range(outputs.shape[1]):
            student, teacher = outputs[view, i, 0].tolist(), outputs[1 - view, i, 1].tolist()
            s = slow_softmax([z / 0.1 for z in student])
            t = slow_softmax([(z - c) / tau for z, c in zip(teacher, centre.tolist())])
            total -= sum(t[k] * math.log(s[k]) for k in range(len(s)))
    return total / (2 * outputs.shape[1])


def slow_standardised(z):
    """Each number with mean 0 and variance 1 over the batch; 1e-5 is added to the variance."""
    columns = []
    for column in z.T.tolist():
        mean = sum(column) / len(column)
        variance = sum((x - mean) ** 2 for x in column) / len(column)
        columns.append([(x - mean) / math.sqrt(variance + 1e-5) for x in column])
    return columns


def slow_barlow(outputs):
    """Mean over the diagonal of (1 - C)^2, and mean outside the diagonal of C^2."""
    a, b = slow_standardised(outputs[0]), slow_standardised(outputs[1])
    d, pairs = len(a), outputs.shape[1]
    on = off = 0
    for i in range(d):
        for j in range(d):
            c = dot(a[i], b[j]) / pairs
            if i == j:
                on += (1 - c) ** 2
            else:
                off += c**2
    return on / d + off / (d * (d - 1))


def slow_vicreg(outputs):
    """Distance of the pairs; standard deviations below 1; covariances; both as means of the two views."""
    a, b = outputs.tolist()
    pairs, d = len(a), len(a[0])
    total = sum((a[i][k] - b[i][k]) ** 2 for i in range(pairs) for k in range(d)) / (pairs * d)
    for z in (a, b):
        mean = [sum(row[k] for row in z) / pairs for k in range(d)]
        for k in range(d):
            for m in range(d):
                c = sum((row[k] - mean[k]) * (row[m] - mean[m]) for row in z) / (pairs - 1)
                if k == m:
                    total += max(0, 1 - math.sqrt(c + 1e-5)) / d / 2
                else:
                    total += c**2 / (d * (d - 1)) / 2
    return total


def check_loss(loss, definition, outputs):
    """The value of a loss, and its gradient in three random directions, by differences of the definition.

    Returns the gradient.
    """
    outputs = outputs.double()
    fast = outputs.float().requires_grad_()
    value = loss(fast)
    assert value.item() == pytest.approx(definition(outputs), rel=1e-5)
    value.backward()
    for seed in range(3):
        direction = torch.randn(outputs.shape, generator=generator(seed), dtype=torch.float64)
        if outputs.dim() == 4:  # (2, B, 2, d): the teacher's outputs are constants
            direction[:, :, 1] = 0
        h = 1e-5 * direction
        difference = (definition(outputs + h) - definition(outputs - h)) / 2e-5
        assert (fast.grad * direction).sum().item() == pytest.approx(difference, rel=2e-3, abs=2e-5)
    return fast.grad


def test_byol_is_the_cosine_of_the_prediction_and_the_teacher_of_the_other_view(corpus):
    objective, *_ = build(corpus, "byol")
    outputs = torch.randn(2, 5, 2, 7, generator=generator())
    gradient = check_loss(lambda z: objective.loss(z, 0.3), slow_byol, outputs)
    assert (gradient[:, :, 1] == 0).all() and (gradient[:, :, 0] != 0).any()
    same = outputs[:1, :, :1].expand(2, 5, 2, 7)
    assert objective.loss(same, 0.3).item() == pytest.approx(0, abs=1e-6)
    outputs = torch.stack([same[:, :, 0], -same[:, :, 0]], dim=2)
    assert objective.loss(outputs, 0.3).item() == pytest.approx(4)  # opposite vectors


@pytest.mark.parametrize("progress, tau", [(0, 0.02), (0.05, 0.03), (0.1, 0.04), (1, 0.04)])
def test_clustering_is_the_cross_entropy_of_soft_clusters(corpus, progress, tau):
    objective, *_ = build(corpus, "clustering")
    objective.centre = torch.randn(9, generator=generator(1)) / 50
    definition = lambda z: slow_clustering(z, objective.centre, tau)
    outputs = torch.randn(2, 5, 2, 9, generator=generator()) / 20
    gradient = check_loss(lambda z: objective.loss(z, progress), definition, outputs)
    assert (gradient[:, :, 1] == 0).all() and (gradient[:, :, 0] != 0).any()


def test_the_centre_is_a_moving_average_of_the_teachers_outputs(corpus):
    """0.9 of the old centre, 0.1 of the mean over all views and, if hybrid, over both patch shapes."""
    objective, *_ = build(corpus, "clustering", patch="hybrid")
    assert (objective.centre == 0).all()
    expected = torch.zeros(512, dtype=torch.float64)
    for step in range(3):
        outputs = torch.randn(2, 2, 4, 2, 512, generator=generator(step))  # of two patch shapes
        for shape in outputs:
            objective.loss(shape, 0.5)
        mean = sum(outputs[s, v, i, 1].double() for s in (0, 1) for v in (0, 1) for i in range(4)) / 16
        expected = 0.9 * expected + 0.1 * mean
        objective.update(0.5)
        assert torch.allclose(objective.centre.double(), expected, atol=1e-6)
    assert not objective.centre.requires_grad and "centre" in objective.state_dict()


def test_barlow_compares_standardised_numbers(corpus):
    objective, *_ = build(corpus, "barlow")
    outputs = torch.randn(2, 6, 5, generator=generator()) * torch.tensor([1, 10, 0.1, 1, 3]) + 2
    check_loss(lambda z: objective.loss(z, 0.3), slow_barlow, outputs)
    constant = torch.ones(2, 6, 5)
    assert objective.loss(constant, 0.3).item() == pytest.approx(1)  # a collapse: C = 0
    z = torch.tensor([[1, 1], [1, -1], [-1, 1], [-1, -1.0]])
    assert objective.loss(torch.stack([z, z]), 0.3).item() == pytest.approx(0, abs=1e-6)


def test_vicreg_is_distance_variance_and_covariance(corpus):
    objective, *_ = build(corpus, "vicreg")
    outputs = torch.randn(2, 6, 5, generator=generator()) * torch.tensor([1, 4, 0.1, 1, 3]) + 2
    check_loss(lambda z: objective.loss(z, 0.3), slow_vicreg, outputs)
    constant = torch.ones(2, 6, 5)
    assert objective.loss(constant, 0.3).item() == pytest.approx(1 - math.sqrt(1e-5))  # a collapse
    z = 2 * torch.tensor([[1, 1], [1, -1], [-1, 1], [-1, -1.0]])
    assert objective.loss(torch.stack([z, z]), 0.3).item() == pytest.approx(0, abs=1e-6)


# --- the losses of hidden patches --------------------------------------------------------------------------


def slow_masked_mean(errors, kept):
    """The mean of a row's errors at the hidden patches."""
    hidden = [n for n in range(N_TOKENS) if n not in kept.tolist()]
    assert len(hidden) == N_TOKENS - len(kept)
    return sum(float(errors[n]) for n in hidden) / len(hidden)


def slow_normalised(values, eps):
    mean = sum(values) / len(values)
    variance = sum((x - mean) ** 2 for x in values) / len(values)
    return [(x - mean) / math.sqrt(variance + eps) for x in values]


@pytest.mark.parametrize("target", ["log", "patch"])
@pytest.mark.parametrize("patch", PATCHES)
def test_mae_is_the_squared_error_at_hidden_patches(corpus, patch, target):
    objective, _, args = build(corpus, "mae", "--target", target, patch=patch)
    mel, kept = power(3).half(), keep_tokens(3, N_TOKENS, 0.75, generator(1))
    prediction, visible = objective.predict(mel, patch, kept)
    outputs, vectors = objective(mel, patch, kept)
    assert prediction.shape == (3, 48, 256) and outputs.shape == (3,)
    for row in range(3):
        errors = []
        for n in range(N_TOKENS):
            values = [math.log1p(x) for x in patchify(mel, patch)[row, n].tolist()]
            if target == "patch":
                values = slow_normalised(values, 1e-6)
            guess = prediction[row, n].tolist()
            errors.append(sum((a - b) ** 2 for a, b in zip(guess, values, strict=True)) / 256)
        assert outputs[row].item() == pytest.approx(slow_masked_mean(errors, kept[row]), rel=1e-4)
    assert torch.allclose(vectors, visible.mean(dim=1)) and not vectors.requires_grad
    pairs = torch.stack([outputs, 2 * outputs])
    assert objective.loss(pairs, 0.5).item() == pytest.approx(1.5 * outputs.mean().item())


@pytest.mark.parametrize("name", HIDDEN_PATCHES)
def test_the_decoder_reads_mask_tokens_in_the_places_of_hidden_patches(corpus, name):
    objective, *_ = build(corpus, name)
    read = []
    objective.decoder.register_forward_hook(lambda module, inputs, output: read.append(inputs[0]))
    mel, kept = power(3), keep_tokens(3, N_TOKENS, objective.mask, generator(1))
    prediction, visible = objective.predict(mel, "vertical", kept)
    for row in range(3):
        for n in range(N_TOKENS):
            places = kept[row].tolist()
            if n in places:
                token = visible[row, places.index(n)]
            else:
                token = objective.mask_token + objective.model.position_vertical[n]
            assert torch.equal(read[0][row, n], token)
    assert torch.equal(prediction, objective.to_prediction(objective.decoder(read[0])))
    assert len(objective.decoder.layers) <= 4 < 48 - kept.shape[1]


@pytest.mark.parametrize("patch", PATCHES)
def test_the_targets_of_data2vec_are_the_averaged_normalised_layers_of_the_teacher(corpus, patch):
    objective, *_ = build(corpus, "data2vec", patch=patch)
    (teacher,) = objective.teacher
    with torch.no_grad():
        for weight in teacher.parameters():  # another model than the student
            weight.add_(0.02 * torch.randn(weight.shape, generator=generator(2)))
    mel = power(2)
    targets = objective.targets(mel, patch)
    teacher.double()
    position = getattr(teacher, f"position_{patch}")
    x = teacher.to_patch_embedding[patch](patchify(mel, patch).double()) + position
    layers = []
    for attention, feed_forward in teacher.transformer.layers:
        x = x + attention(x)
        layers.append(feed_forward(x).detach())
        x = x + feed_forward(x)
    assert len(layers) == 3 and targets.shape == (2, 48, 128)
    for row in (0, 1):
        for channel in (0, 1, 64, 127):
            expected = np.zeros(48)
            for layer in layers[1:]:  # the top two of three, as 8 of 12
                expected += np.array(slow_normalised(layer[row, :, channel].tolist(), 1e-5)) / 2
            assert np.allclose(targets[row, :, channel], expected, atol=2e-4)
    assert not targets.requires_grad


def test_data2vec_is_the_squared_error_at_hidden_patches(corpus):
    objective, *_ = build(corpus, "data2vec")
    mel, kept = power(3), keep_tokens(3, N_TOKENS, 0.65, generator(1))
    targets = objective.targets(mel, "vertical").tolist()
    prediction = objective.predict(mel, "vertical", kept)[0].tolist()
    outputs, _ = objective(mel, "vertical", kept)
    for row in range(3):
        errors = []
        for n in range(N_TOKENS):
            squares = sum((a - b) ** 2 for a, b in zip(prediction[row][n], targets[row][n], strict=True))
            errors.append(squares / math.sqrt(128))
        assert outputs[row].item() == pytest.approx(slow_masked_mean(errors, kept[row]), rel=1e-4)


def slow_nearest(point, centroids):
    distances = [sum((a - b) ** 2 for a, b in zip(point, centroid)) for centroid in centroids]
    return min(range(len(centroids)), key=distances.__getitem__)


def test_hubert_is_the_cross_entropy_of_cosines_at_hidden_patches(corpus):
    objective, *_ = build(corpus, "hubert", "--clusters", 7)
    mel = corpus.sample_pairs(torch.arange(2), generator(4))[0]
    kept = keep_tokens(2, N_TOKENS, 0.65, generator(1))
    outputs, _ = objective(mel, "vertical", kept)
    prediction = objective.predict(mel, "vertical", kept)[0].tolist()
    moments = (mfcc_of_patches(mel).double() / objective.scale.double()).tolist()
    centroids, embedding = objective.centroids.tolist(), objective.embedding.tolist()
    clusters = objective.clusters(mel)
    assert clusters.shape == (2, 48) and len(clusters.unique()) > 1
    for row in (0, 1):
        errors = []
        for n in range(N_TOKENS):
            cluster = slow_nearest(moments[row][n], centroids)
            assert clusters[row, n] == cluster
            guess = prediction[row][n]
            scores = []
            for vector in embedding:
                cosine = dot(guess, vector) / math.sqrt(dot(guess, guess) * dot(vector, vector))
                scores.append(cosine / 0.1)
            errors.append(-math.log(slow_softmax(scores)[cluster]))
        assert outputs[row].item() == pytest.approx(slow_masked_mean(errors, kept[row]), rel=1e-4)


def test_the_clusters_of_hubert_do_not_depend_on_the_precision(corpus):
    objective, *_ = build(corpus, "hubert", "--clusters", 100)
    mel = corpus.sample_pairs(torch.arange(16), generator(4))[0]
    with torch.autocast("cpu", torch.bfloat16):
        rounded = objective.clusters(mel)
    assert torch.equal(rounded, objective.clusters(mel))


def test_mfcc_of_patches_are_the_definition():
    """Cepstral coefficients by loops, their differences, and the mean over the two frames of a moment."""
    mel = power(2, seed=5).half()
    mel[1, :, :40] = 0  # silence
    cosines = [[math.cos(math.pi * k * (n + 0.5) / 128) for n in range(128)] for k in range(13)]
    found = mfcc_of_patches(mel)
    assert found.shape == (2, 48, 39)
    for row in (0, 1):
        logs = [[math.log(max(x, 1e-6)) for x in frame] for frame in mel[row].T.tolist()]
        for k in range(13):
            scale = math.sqrt((1 if k == 0 else 2) / 128)  # an orthonormal transform
            c = [scale * dot(cosines[k], frame) for frame in logs]
            first = [c[t] - c[t - 1] if t > 0 else 0 for t in range(96)]
            second = [first[t] - first[t - 1] if t > 0 else 0 for t in range(96)]
            for place, frames in ((k, c), (13 + k, first), (26 + k, second)):
                expected = [(frames[2 * n] + frames[2 * n + 1]) / 2 for n in range(48)]
                assert np.allclose(found[row, :, place], expected, atol=2e-3)


# --- k-means -----------------------------------------------------------------------------------------------


def inertia(points, centroids):
    return torch.cdist(points.double(), centroids.double()).min(dim=1).values.square().sum().item()


def lloyd(points, centroids, iterations):
    """Lloyd's algorithm by loops over the clusters."""
    points, centroids = points.double(), centroids.double().clone()
    for _ in range(iterations):
        nearest = [slow_nearest(point, centroids.tolist()) for point in points.tolist()]
        for cluster in range(len(centroids)):
            own = [i for i, found in enumerate(nearest) if found == cluster]
            if own:
                centroids[cluster] = sum(points[i] for i in own) / len(own)
    return centroids


def blobs(per_blob=12, k=6):
    """Points around k places of the plane, of which some are close together."""
    places = 6 * torch.randn(k, 2, generator=generator(8))
    points = places.repeat_interleave(per_blob, 0) + torch.randn(k * per_blob, 2, generator=generator(9))
    return points[torch.randperm(len(points), generator=generator(10))]


def test_k_means_iterates_as_lloyds_algorithm_does():
    points = blobs()
    start = k_means(points, 6, generator(1), iterations=0)
    for iterations in (1, 3, 50):
        found = k_means(points, 6, generator(1), iterations=iterations)
        assert torch.allclose(found.double(), lloyd(points, start, iterations), atol=1e-5)
    assert torch.equal(found, k_means(points, 6, generator(1)))  # same seed, same result


def test_the_start_of_k_means_is_drawn_by_squared_distance():
    points = blobs()
    for seed in range(5):
        start = k_means(points, 6, generator(seed), iterations=0)
        rows = [(points == centroid).all(dim=1).nonzero().flatten().tolist() for centroid in start]
        assert all(len(row) == 1 for row in rows) and len({row[0] for row in rows}) == 6
    line = torch.tensor([[0.0], [1.0], [3.0]])
    chance = generator(3)
    second = [k_means(line, 2, chance, iterations=0)[1].item() for _ in range(2000)]
    assert set(second) == {1.0, 3.0}
    assert second.count(1.0) / 2000 == pytest.approx(1 / (1 + 9), abs=0.03)


def test_k_means_with_empty_clusters_and_equal_points():
    values = torch.tensor([[0.0, 0], [1, 0], [5, 5]])
    centroids = k_means(values.repeat(20, 1), 5, generator(0))  # two clusters stay empty
    assert centroids.isfinite().all() and len(centroids) == 5
    for centroid in centroids:
        assert (values == centroid).all(dim=1).any()
    assert {tuple(row) for row in centroids.tolist()} == {tuple(row) for row in values.tolist()}
    assert torch.equal(k_means(torch.ones(9, 2), 3, generator(0)), torch.ones(3, 2))
    points = blobs()
    assert torch.allclose(k_means(points, 1, generator(0)), points.mean(dim=0), atol=1e-5)


def test_hubert_clusters_the_moments_of_the_corpus(corpus):
    objective, *_ = build(corpus, "hubert", "--clusters", 20)
    segments = corpus.sample_pairs(torch.arange(96), generator(4)).flatten(0, 1)
    moments = mfcc_of_patches(segments).flatten(0, 1)
    scale = moments.std(dim=0)  # of other segments of the same clips
    assert torch.allclose(objective.scale, scale, rtol=0.2)
    points = moments[torch.randperm(len(moments), generator=generator())[:2000]] / objective.scale
    counts = torch.bincount(objective.clusters(segments).flatten(), minlength=20)
    assert (counts > 0).sum() == 20 and counts.max() < 0.5 * counts.sum()
    random_points = points[:20]
    assert inertia(points, objective.centroids) < 0.8 * inertia(points, random_points)


# --- masking, rows and teachers ----------------------------------------------------------------------------


def hide(mel, patch, kept):
    """The segments with every patch outside `kept` replaced by nan."""
    rows = torch.ones(len(mel), N_TOKENS, dtype=torch.bool).scatter(1, kept, False)
    height, width = PATCHES[patch]
    poisoned = mel.clone()
    for row, n in rows.nonzero().tolist():
        top, left = n // (96 // width) * height, n % (96 // width) * width
        poisoned[row, top : top + height, left : left + width] = torch.nan
    return poisoned


@pytest.mark.parametrize("name, patch", [pair for pair in EVERY_SHAPE if pair[1] != "hybrid"])
def test_the_encoder_never_sees_a_hidden_patch(corpus, name, patch):
    objective, *_ = build(corpus, name, patch=patch)
    mel, kept = power(3), keep_tokens(3, N_TOKENS, objective.mask, generator(1))
    poisoned = hide(mel, patch, kept)
    assert poisoned.isnan().sum() == 3 * (48 - kept.shape[1]) * 256
    compute = objective if name in TWO_VIEWS else objective.predict
    for clean, other in zip(compute(mel, patch, kept), compute(poisoned, patch, kept), strict=True):
        assert clean.isfinite().all() and torch.equal(clean, other)


@pytest.mark.parametrize("name, patch", EVERY_SHAPE)
def test_rows_are_independent(corpus, name, patch):
    """A batch in parts gives the same outputs: --chunk and several processes rely on it."""
    objective, *_ = build(corpus, name, patch=patch)
    mel, kept = power(5), keep_tokens(5, N_TOKENS, objective.mask, generator(1))
    for shape in objective.model.patches:
        whole = objective(mel, shape, kept)
        parts = [objective(mel[rows], shape, kept[rows]) for rows in (slice(0, 1), slice(1, 5))]
        for one, several in zip(whole, zip(*parts), strict=True):
            assert torch.allclose(one, torch.cat(several), rtol=1e-4, atol=1e-5)
        mel_with_nan = mel.clone()
        mel_with_nan[3] = torch.nan  # all of another row
        for one, other in zip(whole, objective(mel_with_nan, shape, kept), strict=True):
            assert torch.allclose(one[[0, 1, 2, 4]], other[[0, 1, 2, 4]], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_a_step_in_chunks_is_the_undivided_step(corpus, name):
    """The same figures, gradients of the model and of the heads, teacher and centre."""
    patch = "vertical" if name == "hubert" else "hybrid"
    results = []
    for chunk in (16, 5):
        objective, optimizer, args = build(corpus, name, "--chunk", chunk, patch=patch)
        views, kept = train.draw_batch(corpus, torch.arange(96), 0, args)
        figures = train.train_step(objective, optimizer, views, kept, 0.05, args)
        gradients = {key: p.grad for key, p in objective.named_parameters() if p.grad is not None}
        state = objective.state_dict()
        fixed = {key: state[key] for key in ("centre", "centroids", "scale") if key in state}
        results.append((figures, {**gradients, **fixed}))
    (figures, whole), (chunk_figures, chunks) = results
    assert torch.allclose(figures, chunk_figures, rtol=1e-4, equal_nan=True)
    assert whole.keys() == chunks.keys()
    for key, tensor in whole.items():
        assert (tensor - chunks[key]).norm() <= 2e-4 * tensor.norm() + 1e-8, key
    for shape in PATCHES if patch == "hybrid" else (patch,):
        assert whole[f"model.to_patch_embedding.{shape}.1.weight"].norm() > 0
    learned = {key.split(".")[0] for key in whole}
    for part in ("head", "predictor", "decoder", "to_prediction", "mask_token", "embedding"):
        present = any(key.split(".")[0] == part for key, _ in objective.named_parameters())
        assert (part in learned) == present, part


MOMENTUM = {
    "byol": lambda progress: 1 - (1 - 0.996) * (math.cos(math.pi * progress) + 1) / 2,
    "clustering": lambda progress: 1 - (1 - 0.996) * (math.cos(math.pi * progress) + 1) / 2,
    "data2vec": lambda progress: 0.999 + (0.9999 - 0.999) * progress,
}


@pytest.mark.parametrize("name", TEACHERS)
def test_teachers_are_moving_averages_and_receive_no_gradient(corpus, name):
    objective, optimizer, args = build(corpus, name, patch="hybrid")
    student = [objective.model] if name == "data2vec" else [objective.model, objective.head]
    named = lambda modules: torch.nn.ModuleList(modules).named_parameters()
    state = lambda modules: {key: value.double().clone() for key, value in named(modules)}
    teacher = dict(objective.teacher.named_parameters())
    start = state(student)
    assert teacher.keys() == start.keys()
    for key, weight in teacher.items():  # the teacher starts as the student, in memory of its own
        assert torch.equal(weight.double(), start[key]) and not weight.requires_grad
    memory = {p.data_ptr() for m in student for p in m.parameters()}
    assert memory.isdisjoint(p.data_ptr() for p in teacher.values())
    optimised = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert optimised.isdisjoint(map(id, teacher.values()))

    with torch.no_grad():
        for weight in teacher.values():
            weight.add_(torch.randn(weight.shape, generator=generator(3)) / 20)
    assert MOMENTUM[name](0) == {"data2vec": 0.999}.get(name, 0.996)
    assert MOMENTUM[name](1) == {"data2vec": 0.9999}.get(name, 1)
    for step, progress in enumerate((1e-9, 0.3, 0.8, 1.0)):
        old = {key: weight.double().clone() for key, weight in teacher.items()}
        views, kept = train.draw_batch(corpus, torch.arange(96), step, args)
        train.train_step(objective, optimizer, views, kept, progress, args)
        new, momentum = state(student), MOMENTUM[name](progress)
        assert any(not torch.equal(new[key], start[key]) for key in new)
        for key, weight in teacher.items():
            expected = momentum * old[key] + (1 - momentum) * new[key]
            assert torch.allclose(weight.double(), expected, rtol=0, atol=3e-7), key
            assert weight.grad is None and not weight.requires_grad


def test_targets_carry_no_gradient(corpus):
    """Outputs that come from a teacher are constants: no gradient reaches anything through them."""
    mel, kept = power(4), keep_tokens(4, N_TOKENS, 0.9, generator(1))
    for name in ("byol", "clustering"):
        objective, *_ = build(corpus, name)
        outputs, vectors = objective(mel, "vertical", kept)
        first = list(objective.parameters())[:3]
        options = {"allow_unused": True, "materialize_grads": True}
        gradients = torch.autograd.grad(outputs[:, 1].sum(), first, **options)
        assert all((gradient == 0).all() for gradient in gradients) and not vectors.requires_grad
    for name in HIDDEN_PATCHES:
        objective, *_ = build(corpus, name)
        outputs, vectors = objective(mel, "vertical", kept)
        assert outputs.requires_grad and not vectors.requires_grad
        for key, value in objective.state_dict().items():
            if key.startswith(("teacher", "centroids", "scale")):
                assert not value.requires_grad


def test_spread_is_0_for_equal_vectors_and_1_for_evenly_spread_ones():
    assert spread(torch.ones(50, 8) * torch.rand(50, 1, generator=generator())) < 1e-3  # of any length
    axes = torch.cat([torch.eye(8), -torch.eye(8)])
    assert spread(axes).item() == pytest.approx(1, abs=1e-6)
    z = torch.randn(6, 4, generator=generator(1)) + 1
    unit = [[x / math.sqrt(dot(row, row)) for x in row] for row in z.tolist()]
    total = 0
    for k in range(4):
        column = [row[k] for row in unit]
        mean = sum(column) / 6
        total += sum((x - mean) ** 2 for x in column) / 6
    assert spread(z).item() == pytest.approx(math.sqrt(total), rel=1e-5)
    assert spread(torch.randn(4000, 32, generator=generator(2))).item() == pytest.approx(1, abs=0.01)


# --- the command line --------------------------------------------------------------------------------------


def test_the_default_masks_are_those_of_the_help(folder, monkeypatch):
    monkeypatch.chdir(folder)
    said = " ".join(train.command_line().format_help().split())
    (text,) = re.findall(r"share of patches dropped \(default: ([^)]*)\)", said)
    first, *others = text.split("; ")  # 0.9; mae 0.75; data2vec, hubert 0.65
    stated = dict.fromkeys(OBJECTIVES, float(first))
    for other in others:
        names, ratio = other.rsplit(" ", 1)
        stated.update(dict.fromkeys(names.split(", "), float(ratio)))
    assert (stated["byol"], stated["mae"], stated["data2vec"], stated["hubert"]) == (0.9, 0.75, 0.65, 0.65)
    assert stated.keys() == OBJECTIVES.keys()
    for name in OBJECTIVES:
        arguments = ["--objective", name, "--patch", "vertical", "--out", "runs/none"]
        assert train.read_settings(arguments)[0].mask == stated[name]
        assert train.read_settings([*arguments, "--mask", "0.5"])[0].mask == 0.5


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--objective", "hubert", "--patch", "square"], "--objective hubert takes --patch vertical"),
        (["--objective", "hubert"], "--objective hubert takes --patch vertical"),  # the default is hybrid
        (["--objective", "mae", "--mask", "0"], "--mask 0: --objective mae needs hidden patches"),
        (["--objective", "data2vec", "--mask", "0.02"], "--mask 0.02: --objective data2vec needs hidden"),
        (["--objective", "hubert", "--patch", "vertical", "--mask", "0"], "needs hidden patches"),
        (["--objective", "mae", "--mask", "nan"], "mask ratio"),
        (["--objective", "mae", "--mask", "1"], "mask ratio"),
        (["--objective", "hubert", "--patch", "vertical", "--clusters", "0"], "--clusters 0"),
        (["--objective", "dreaming"], "invalid choice"),
        (["--objective", "mae", "--target", "phase"], "invalid choice"),
    ],
)
def test_mistakes_are_one_sentence(folder, arguments, sentence, monkeypatch, capfd):
    monkeypatch.chdir(folder)
    command = ["train.py", "--data", "corpora/small", "--batch", "8", "--out", "runs/mistake", *arguments]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as left:
        train.main()
    said = capfd.readouterr().err
    assert left.value.code == 2 and sentence in said and "Traceback" not in said
    assert said.count("\n") == 1 or "usage" in said


# --- runs --------------------------------------------------------------------------------------------------


def command(folder, name, out, *more, steps=6, patch="vertical"):
    """The arguments of a small run."""
    arguments = ["--data", folder / "corpora/small", "--out", folder / "runs" / out, "--size", "tiny"]
    arguments += ["--objective", name, "--patch", patch, "--batch", 8, "--lr", 1e-3, "--clusters", 12]
    return list(map(str, [*arguments, "--steps", steps, *more]))


def train_here(arguments):
    assert train.train(*train.read_settings(arguments)) is None


def checkpoint_of(folder, out):
    return torch.load(folder / "runs" / out / "checkpoint.pt", weights_only=True)


def log_of(folder, out):
    return [json.loads(line) for line in (folder / "runs" / out / "log.jsonl").read_text().splitlines()[1:]]


def same(a, b):
    """Whether two nested dicts and lists hold the same values and the same bits."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.fixture(scope="module")
def runs(folder):
    """An undisturbed run of six steps with each objective: {name: its checkpoint}."""
    checkpoints = {}
    for name in OBJECTIVES:
        patch = "vertical" if name == "hubert" else "hybrid"
        train_here(command(folder, name, name, patch=patch))
        checkpoints[name] = checkpoint_of(folder, name)
    return checkpoints


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_a_run_leaves_a_log_and_a_model(folder, runs, name):
    log = log_of(folder, name)
    assert [line["step"] for line in log] == [1, 2, 3, 4, 5, 6]
    for line in log:
        assert math.isfinite(line["loss"]) and 0 < line["std"] <= 1
        if name in TWO_VIEWS:
            assert 0 <= line["retrieval"] <= 1
        else:
            assert line["retrieval"] is None
    checkpoint = runs[name]
    assert checkpoint["settings"]["objective"] == name and checkpoint["settings"]["planned_steps"] == 6
    stored = {key: value for key, value in checkpoint["objective"].items() if key.startswith("model.")}
    assert same(stored, {f"model.{key}": value for key, value in checkpoint["model"].items()})

    model = load_model(folder / "runs" / name / "checkpoint.pt")
    assert model.config.patch == ("vertical" if name == "hubert" else "hybrid")
    assert same(dict(model.state_dict()), dict(checkpoint["model"]))
    untrained = train.Myna(model.config)
    keys = dict(model.named_parameters()).keys()
    assert checkpoint["model"].keys() == untrained.state_dict().keys() >= keys
    vectors = model.embed(power(2))
    assert vectors.isfinite().all() and vectors.shape == (2, 128 * len(model.patches))


def test_what_the_checkpoints_hold_beside_the_model(runs):
    parts = {name: {key.split(".")[0] for key in runs[name]["objective"]} - {"model"} for name in OBJECTIVES}
    decoder = {"mask_token", "decoder", "to_prediction"}
    assert parts == {
        "contrast": set(),
        "byol": {"head", "predictor", "teacher"},
        "clustering": {"head", "teacher", "centre"},
        "barlow": {"head"},
        "vicreg": {"head"},
        "mae": decoder,
        "data2vec": {*decoder, "teacher"},
        "hubert": {*decoder, "embedding", "centroids", "scale"},
    }
    assert runs["hubert"]["objective"]["centroids"].shape == (12, 39)
    assert runs["clustering"]["objective"]["centre"].abs().max() > 0


def test_probe_embeds_with_these_models(folder, runs, monkeypatch, capfd):
    """Clustering stands for all: a checkpoint's model has the same keys for every objective."""
    wave = data.synthesize(1, 9)[0][0].numpy()
    soundfile.write(folder / "song.wav", wave, 16_000)
    path = folder / "runs/clustering/checkpoint.pt"
    arguments = ["--embed", folder / "song.wav", "--checkpoint", path, "--out", folder / "vectors.npz"]
    monkeypatch.setattr(sys, "argv", ["probe.py", *map(str, arguments), "--device", "cpu", "--workers", "1"])
    try:
        probe.main()
    except SystemExit as left:
        assert not left.code, capfd.readouterr().err
    found = np.load(folder / "vectors.npz")["vectors"]
    mel = data.mel_spectrogram(torch.from_numpy(soundfile.read(folder / "song.wav", dtype="float32")[0]))
    expected = load_model(path).embed(data.segments(mel)).mean(dim=0)
    assert np.allclose(found[0], expected, rtol=1e-2, atol=1e-3)


RESUMED = {"byol": "hybrid", "clustering": "hybrid", "hubert": "vertical"}


def kill_when_it_has_logged(process, log, steps, chance):
    """SIGKILL once `log` holds so many steps, at any moment of the step, the save or the end after it."""
    while process.poll() is None and not (log.exists() and log.read_bytes().count(b"\n") > steps):
        time.sleep(0.005)
    time.sleep(chance.uniform(0, 0.02))
    assert process.poll() is None
    process.kill()


@pytest.mark.parametrize("name", list(RESUMED))
def test_killed_and_resumed_it_ends_with_the_same_bits(folder, runs, name):
    """Weights, heads, teacher, centre and centroids, Adam's means, and the log."""
    out = f"killed_{name}"
    arguments = command(folder, name, out, "--resume", "--save-minutes", 1e-9, patch=RESUMED[name])
    log = folder / "runs" / out / "log.jsonl"
    chance = random.Random(len(name))
    script = [sys.executable, str(ROOT / "train.py"), *arguments]
    process = subprocess.Popen(script, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    kill_when_it_has_logged(process, log, chance.choice([2, 3]), chance)
    process.wait()
    assert 1 <= train.newest_checkpoint(folder / "runs" / out)["step"] <= 5
    train_here(arguments)
    resumed = checkpoint_of(folder, out)
    for part in ("model", "objective", "optimizer"):
        assert same(resumed[part], runs[name][part]), part
    for line, expected in zip(log_of(folder, out), log_of(folder, name), strict=True):
        assert all(line[key] == expected[key] for key in ("step", "loss", "std", "retrieval"))


def test_a_longer_run_keeps_its_schedules_and_says_so(folder, runs, capfd):
    """Momentum and tau end where they were planned to end: BYOL's teacher stands still after step 6."""
    arguments = command(folder, "byol", "longer", patch="hybrid")
    train_here(arguments)
    first = checkpoint_of(folder, "longer")
    assert same(first["objective"], runs["byol"]["objective"])
    assert "schedules" not in capfd.readouterr().out
    train_here([*arguments, "--resume", "--steps", "9"])
    assert "the schedules of byol stay those of a run of 6 steps" in capfd.readouterr().out
    longer = checkpoint_of(folder, "longer")
    assert (longer["step"], longer["settings"]["planned_steps"], longer["settings"]["steps"]) == (9, 6, 9)
    assert [line["step"] for line in log_of(folder, "longer")] == list(range(1, 10))
    for key, value in longer["objective"].items():
        if key.startswith("teacher"):
            assert torch.equal(value, first["objective"][key])  # momentum 1
    assert not same(longer["model"], first["model"])
    train_here([*arguments, "--resume", "--steps", "10"])  # and once more: 6 is not forgotten
    assert checkpoint_of(folder, "longer")["settings"]["planned_steps"] == 6


def test_the_progress_of_a_run_goes_from_its_first_step_to_1(folder, monkeypatch):
    seen = []
    figures = torch.tensor([1.0, 0.5, 0.5])
    monkeypatch.setattr(train, "train_step", lambda *arguments: seen.append(arguments[4]) or figures)
    train_here(command(folder, "byol", "progress", steps=4))
    assert seen == [0.25, 0.5, 0.75, 1]
    train_here(command(folder, "byol", "progress", "--resume", steps=6))
    assert seen[4:] == [1, 1]


def test_k_means_sees_only_the_minutes_of_the_run(corpus, monkeypatch):
    """Of --minutes 1, six clips: no other clip of the corpus decides about the clusters."""
    clips = train.choose_clips(corpus, settings("hubert", "--minutes", 1, batch=4))
    asked = []
    sample = corpus.sample_pairs
    monkeypatch.setattr(corpus, "sample_pairs", lambda ids, *rest: asked.append(ids) or sample(ids, *rest))
    train.build_objective(settings("hubert", "--clusters", 5), corpus, clips, CPU, None)
    assert set(torch.cat(asked).tolist()) == set(clips.tolist()) and len(clips) == 6


DRIVER = """
import sys, train
import torch.distributed as dist
folder, *names = sys.argv[1:]
for name in names:
    arguments = f"--data {folder}/corpora/small --out {folder}/runs/two_{name} --size tiny --steps 3"
    arguments += f" --lr 1e-3 --batch 8 --patch hybrid --objective {name}"
    train.train(*train.read_settings(arguments.split()))
dist.destroy_process_group()
"""


def test_two_processes_compute_what_one_does(folder):
    """Losses, standard deviations, Adam's means of the gradients, teacher and centre."""
    names = ("byol", "clustering", "mae", "barlow", "vicreg", "data2vec")
    (folder / "driver.py").write_text(DRIVER)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *launch, str(folder / "driver.py"), str(folder), *names],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=170,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for name in names:
        train_here(command(folder, name, f"one_{name}", steps=3, patch="hybrid"))
        for one, two in zip(log_of(folder, f"one_{name}"), log_of(folder, f"two_{name}"), strict=True):
            assert one["loss"] == pytest.approx(two["loss"], rel=2e-4), name
            assert one["std"] == pytest.approx(two["std"], rel=2e-3), name
        one, two = checkpoint_of(folder, f"one_{name}"), checkpoint_of(folder, f"two_{name}")
        a, b = (checkpoint["optimizer"]["state"] for checkpoint in (one, two))
        assert a.keys() == b.keys()
        for i in a:  # of the whole gradients, not of halves of them
            mean = a[i]["exp_avg"]
            assert (mean - b[i]["exp_avg"]).norm() <= 5e-3 * mean.norm() + 1e-7, (name, i)
        for key, value in one["objective"].items():
            if key.startswith(("teacher", "centre")):
                difference = (value - two["objective"][key]).norm()
                assert difference <= 1e-3 * value.norm() + 1e-5, (name, key)


# --- collapse ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("std, warned", [(0.001, True), (0.049, True), (0.051, False), (0.9, False)])
def test_a_collapse_is_reported_in_one_sentence(folder, tmp_path, capfd, std, warned):
    args, _ = train.read_settings(command(folder, "byol", "made_up", steps=30))
    lines = [{"settings": {}}]
    for step in range(1, 31):
        spread_then = 0.8 if step <= 10 else std  # the last 20 steps count
        lines.append({"step": step, "loss": 1.0, "std": spread_then, "retrieval": 0.5})
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    train.summarise(args, tmp_path / "log.jsonl")
    said = [line for line in capfd.readouterr().out.splitlines() if line.startswith("collapse")]
    assert len(said) == warned
    assert all(f"{std:.3f}" in line and "--lr" in line for line in said)


# --- learning ----------------------------------------------------------------------------------------------

TRAINING, HELD_OUT = torch.arange(144), torch.arange(144, 176)  # clips


def learn(corpus, name, *more, steps, batch, lr=1e-3, wrong_pairs=False):
    """A short training. Returns the objective, and the held-out loss before it.

    With `wrong_pairs`, the second views of the clips in a batch are exchanged: nothing can be learned.
    """
    args = settings(name, *more, batch=batch)
    objective, optimizer = train.build_objective(args, corpus, TRAINING, CPU, None)
    optimizer.param_groups[0]["lr"] = lr
    before = held_out(objective, corpus)
    for step in range(steps):
        views, kept = train.draw_batch(corpus, TRAINING, step, args)
        if wrong_pairs:
            views = torch.stack([views[0], views[1].roll(1, 0)])
        train.train_step(objective, optimizer, views, kept, (step + 1) / steps, args)
    return objective, before


@torch.no_grad()
def held_out(objective, corpus, shift=0):
    """Loss and standard deviation of vectors of held-out clips; with a shift, of wrong pairs."""
    views = corpus.sample_pairs(HELD_OUT, generator(9))
    mel = torch.cat([views[0], views[1].roll(shift, 0)])
    kept = keep_tokens(len(mel), N_TOKENS, objective.settings.mask, generator(9))
    outputs, vectors = objective(mel, "vertical", kept)
    loss = objective.loss(outputs.unflatten(0, (2, -1)), 1.0)
    if objective.settings.objective == "clustering":
        objective.means.clear()
    return loss.item(), spread(vectors).item()


def learned(before, after):
    """Whether the held-out loss has fallen by 7% or more, and the vectors have not collapsed."""
    return after[0] < 0.93 * before[0] and after[1] > train.SMALLEST_SPREAD


@pytest.mark.parametrize("name", TWO_VIEWS)
def test_two_views_learn_and_wrong_pairs_do_not(corpus, name):
    """In 55 steps. For BYOL wrong pairs lower the loss too, but by a collapse."""
    rate = 1e-3 if name in TEACHERS else 3e-4
    length = {"steps": 55, "batch": 32, "lr": rate}
    objective, before = learn(corpus, name, **length)
    if name == "clustering":  # its loss rises while the centre forms: compare with learning rate 0
        before = held_out(learn(corpus, name, **{**length, "lr": 0})[0], corpus)
    wrong, _ = learn(corpus, name, **length, wrong_pairs=True)
    if name == "vicreg":  # the terms without pairs vary as much as the loss falls: compare with wrong pairs
        own, other = (held_out(o, corpus)[0] / held_out(o, corpus, 1)[0] for o in (objective, wrong))
        assert own < 0.8 < other and held_out(objective, corpus)[1] > train.SMALLEST_SPREAD
        return
    assert learned(before, held_out(objective, corpus)) and not learned(before, held_out(wrong, corpus))


@pytest.mark.parametrize("name", ["mae", "hubert"])
def test_hidden_patches_are_predicted_from_the_visible_ones(corpus, name):
    """Better than at the start, and than from the visible patches of another clip."""
    objective, before = learn(corpus, name, "--target", "patch", steps=40, batch=8, lr=2e-3)
    after = held_out(objective, corpus)
    assert learned(before, after)
    assert after[0] < 0.93 * from_visible(objective, corpus, 1)


@torch.no_grad()
def from_visible(objective, corpus, shift):
    """The held-out error when a segment is predicted from the visible patches of the one `shift` before."""
    mel = corpus.sample_pairs(HELD_OUT, generator(9)).flatten(0, 1)
    kept = keep_tokens(len(mel), N_TOKENS, objective.settings.mask, generator(9))
    prediction, _ = objective.predict(mel.roll(shift, 0), "vertical", kept)
    error = objective.error(prediction.float(), mel, "vertical")
    hidden = torch.ones_like(error).scatter(1, kept, 0)
    return ((error * hidden).sum() / hidden.sum()).item()


def test_data2vec_learns(corpus):
    """Better than at the start, and than the best constant: zero, the mean of each channel."""
    objective, before = learn(corpus, "data2vec", steps=70, batch=4)
    after = held_out(objective, corpus)
    assert learned(before, after)
    targets = objective.targets(corpus.sample_pairs(HELD_OUT, generator(9)).flatten(0, 1), "vertical")
    zero = targets.square().sum(dim=-1).mean().item() / math.sqrt(128)
    assert after[0] < 0.93 * zero
