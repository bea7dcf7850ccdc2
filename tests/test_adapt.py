"""Adaptation (the end of model.py, and --adapt and --labels of probe.py) against the definitions."""

import copy
import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from torch import nn

import data
import probe
from model import ADAPTATIONS, PATCHES, SIZES, Config, Myna, adapt, load_model, merge, save_model
from probe import Classifier, Clip, Features, Task, adapt_task, few_labels, fit_classifier, label_subsets
from probe import load_mel

INSERTED = ("lora", "adapter", "ssf", "prefix", "prompt")
UNCHANGED = ("full", "lora", "adapter", "bitfit", "head")  # the output right after insertion


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def tiny(patch="hybrid", seed=0):
    """A tiny model whose norms and biases are not ones and zeros."""
    torch.manual_seed(seed)
    model = Myna(Config("tiny", patch)).eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape)
    return model


def power(batch, seed=0):
    """Something with the range of mel power: many orders of magnitude."""
    return torch.randn(batch, 128, 96, generator=generator(seed)).mul(3).exp().clamp(max=65_504)


def adapted(method, patch="hybrid", size=None, noise=0.1):
    """A tiny adapted model whose trained parameters have moved, as after training."""
    model = tiny(patch)
    trained = adapt(model, method, size)
    assert {id(p) for p in trained} == {id(p) for p in model.parameters() if p.requires_grad}
    for parameter in trained:
        parameter.data += noise * torch.randn(parameter.shape)
    return model


# --- what is trained ---------------------------------------------------------------------------------------


def count_by_formula(method, name, size):
    """Trained parameters of an encoder of one patch shape, written out from the shapes of its layers."""
    dim, depth, _, hidden = SIZES[name]
    linears = [(dim, 3 * dim), (dim, dim), (dim, hidden), (hidden, dim)]  # of a layer: in, out
    norms = 2 * 2 * dim  # a weight and a bias, of attention and feed-forward
    tokenizer = 2 * 256 + 256 * dim + dim + 2 * dim
    return {
        "full": tokenizer + depth * (sum(a * b for a, b in linears) + hidden + dim + norms) + 2 * dim,
        "lora": depth * sum(size * (a + b) for a, b in linears),
        "adapter": depth * (2 * (2 * size * dim + size + dim) + norms),
        "ssf": depth * sum(2 * b for _, b in linears),
        "bitfit": depth * (hidden + dim + 2 * dim) + dim,
        "prefix": depth * 2 * size * dim,
        "prompt": size * dim,
        "head": 0,
    }[method]


@pytest.mark.parametrize("method", ADAPTATIONS)
@pytest.mark.parametrize("name", ["tiny", "vit-s"])
def test_the_count_of_trained_parameters_is_the_formula(method, name):
    sizes = {"lora": 2, "adapter": 16, "prefix": 32, "prompt": 32}
    trained = adapt(Myna(Config(name, "square")), method)
    assert sum(p.numel() for p in trained) == count_by_formula(method, name, sizes.get(method, 0))
    if method in sizes:
        trained = adapt(Myna(Config("tiny", "square")), method, 5)
        assert sum(p.numel() for p in trained) == count_by_formula(method, "tiny", 5)


@pytest.mark.parametrize("patch", ["square", "vertical", "hybrid"])
def test_the_counts_at_vit_s_do_not_depend_on_the_patch_shape(patch):
    known = {"lora": 147_456, "adapter": 322_944, "bitfit": 32_640, "ssf": 82_944}
    known |= {"prompt": 12_288, "prefix": 294_912}
    for method, count in known.items():
        with torch.device("meta"):
            assert sum(p.numel() for p in adapt(Myna(Config("vit-s", patch)), method)) == count


def is_trained(method, name):
    """Whether a method trains the parameter of that name, from the method's description."""
    if method == "full":
        return not name.startswith("projector.")
    if method == "bitfit":
        return name.startswith("transformer.") and name.endswith(".bias")
    own = {
        "lora": (".a.weight", ".b.weight"),
        "adapter": (".down.weight", ".down.bias", ".up.weight", ".up.bias"),
        "ssf": (".gamma", ".beta"),
        "prefix": (".keys", ".values"),
        "prompt": ("transformer.tokens",),
        "head": (),
    }[method]
    norm = ".layers." in name and (".norm." in name or ".net.0." in name)
    return name.endswith(own) or (method == "adapter" and norm)


@pytest.mark.parametrize("method", ADAPTATIONS)
def test_only_what_a_method_names_receives_a_gradient_and_moves(method):
    model = adapted(method)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    if trained:
        optimizer = torch.optim.Adam(trained, lr=0.01)
        for patch in PATCHES:
            model.tokens(power(3), patch).square().mean(dim=1).log().mean().backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        expected = is_trained(method, name)
        assert parameter.requires_grad == expected, name
        assert (parameter.grad is not None) == expected, name
        assert torch.equal(parameter, before[name]) != expected, name


# --- what is computed --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ADAPTATIONS)
@pytest.mark.parametrize("patch", ["vertical", "hybrid"])
def test_the_output_right_after_insertion(method, patch):
    plain, model = tiny(patch).embed(power(3)), tiny(patch)
    adapt(model, method)
    vectors = model.embed(power(3))
    assert vectors.shape == plain.shape
    if method in UNCHANGED:
        assert torch.equal(vectors, plain)
    elif method == "ssf":  # gamma is near 1 and beta near 0
        change = (vectors - plain).norm() / plain.norm()
        assert 0 < change < 0.2


@pytest.mark.parametrize("method", ["lora", "ssf", "adapter"])
def test_a_wrapped_layer_is_its_formula(method):
    model = adapted(method).double()
    layer = model.transformer.layers[1][1]
    x = torch.randn(2, 48, 128, dtype=torch.float64, generator=generator(1))
    if method == "adapter":
        y = layer.sublayer(x)
        for row in range(2):
            for token in range(0, 48, 7):
                hidden = layer.down.weight @ y[row, token] + layer.down.bias
                hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
                expected = y[row, token] + layer.up.weight @ hidden + layer.up.bias
                assert torch.allclose(layer(x)[row, token], expected, atol=1e-12)
        return
    wrapped = layer.net[1]
    weight, bias, token = wrapped.linear.weight, wrapped.linear.bias, x[1, 5]
    if method == "lora":
        expected = weight @ token + bias + wrapped.b.weight @ wrapped.a.weight @ token
        assert wrapped.a.weight.shape == (2, 128) and wrapped.b.weight.shape == (512, 2)
    else:
        expected = torch.stack(
            [wrapped.gamma[i] * (weight[i] @ token + bias[i]) + wrapped.beta[i] for i in range(512)]
        )
    assert torch.allclose(wrapped(x)[1, 5], expected, atol=1e-12)


def test_a_prefix_is_attended_to_like_tokens():
    model = adapted("prefix", size=3).double()
    layer = model.transformer.layers[0][0]
    inner, x = layer.attention, torch.randn(2, 5, 128, dtype=torch.float64, generator=generator(1))
    qkv = inner.to_qkv(inner.norm(x))
    for row in range(2):
        for token in range(5):
            heads = []
            for h in range(2):
                part = slice(64 * h, 64 * h + 64)
                query = qkv[row, token, :128][part]
                keys = [key[part] for key in layer.keys] + [qkv[row, t, 128:256][part] for t in range(5)]
                values = [value[part] for value in layer.values]
                values += [qkv[row, t, 256:][part] for t in range(5)]
                share = torch.stack([query @ key / 8 for key in keys]).exp()
                share = share / share.sum()
                heads.append(sum(share[i] * values[i] for i in range(8)))
            expected = inner.to_out.weight @ torch.cat(heads)
            assert torch.allclose(layer(x)[row, token], expected, atol=1e-10)


def test_a_prompt_is_tokens_in_front_and_not_in_the_mean():
    model = adapted("prompt", "square", size=4)
    mel = power(2)
    prompt, inner = model.transformer.tokens, model.transformer.transformer
    sequence = torch.stack([torch.cat([prompt, row]) for row in model.embed_patches(mel, "square")])
    outputs = inner(sequence)  # (2, 4 + 48, D)
    assert outputs.shape == (2, 52, 128)
    assert torch.allclose(model.embed(mel), outputs[:, 4:].mean(dim=1), atol=1e-6)
    assert not torch.allclose(model.embed(mel), outputs.mean(dim=1), atol=1e-3)


@pytest.mark.parametrize("method", INSERTED)
def test_an_adapted_model_takes_masked_tokens_and_bfloat16(method):
    model = adapted(method, "square")
    kept = torch.tensor([[0, 5, 47], [1, 2, 3]])
    with torch.autocast("cpu", torch.bfloat16):
        low = model.tokens(power(2), "square", kept)
    full = model.tokens(power(2), "square", kept)
    assert low.shape == full.shape == (2, 3, 128)
    assert (low - full).norm() / full.norm() < 0.05


# --- merging and files -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ADAPTATIONS)
@pytest.mark.parametrize("patch", ["square", "hybrid"])
def test_a_merged_model_gives_the_same_vectors(tmp_path, method, patch):
    model = adapted(method, patch)
    before = model.embed(power(4))
    merge(model)
    after = model.embed(power(4))
    assert (after - before).norm() / before.norm() < 1e-5
    if method in ("lora", "ssf"):
        assert model.adaptation is None
        kinds = {type(module) for module in model.modules()}
        assert kinds == {type(module) for module in tiny(patch).modules()}  # plain layers alone
    elif method in INSERTED:
        assert torch.equal(after, before) and model.adaptation["method"] == method
    save_model(model, tmp_path / "m.pt")
    assert torch.equal(load_model(tmp_path / "m.pt").embed(power(4)), after)


@pytest.mark.parametrize("method", ADAPTATIONS)
@pytest.mark.parametrize("patch", ["vertical", "hybrid"])
def test_saved_adapted_models_come_back(tmp_path, method, patch):
    size = None if ADAPTATIONS[method] is None else 7
    model = adapted(method, patch, size)
    save_model(model, tmp_path / "m.pt", head={"0.weight": torch.ones(2)})
    loaded = load_model(tmp_path / "m.pt")
    assert loaded.adaptation == model.adaptation
    assert loaded.adaptation == ({"method": method, "size": size} if method in INSERTED else None)
    assert torch.equal(loaded.embed(power(2)), model.embed(power(2)))
    for (name, p), (other, q) in zip(model.named_parameters(), loaded.named_parameters()):
        assert name == other and torch.equal(p, q)


def test_a_merged_model_can_be_adapted_and_merged_again(tmp_path):
    model = adapted("ssf")
    merge(model)
    adapt(model, "lora", 3)
    for layers in model.transformer.layers:
        layers[0].to_qkv.b.weight.data += 0.1
    save_model(model, tmp_path / "m.pt")
    loaded = load_model(tmp_path / "m.pt")
    assert torch.equal(loaded.embed(power(2)), model.embed(power(2)))
    merge(loaded)
    change = loaded.embed(power(2)) - model.embed(power(2))
    assert change.norm() / model.embed(power(2)).norm() < 1e-5


def test_mistakes_are_a_sentence(tmp_path):
    for method, size in [("lora", 0), ("adapter", -1), ("prefix", 100_000), ("ssf", 2), ("full", 1)]:
        with pytest.raises(ValueError, match=f"size {size}: from 1 to 1024"):
            adapt(tiny(), method, size)
    model, path = tiny(), tmp_path / "m.pt"
    adapt(model, "prefix")
    with pytest.raises(ValueError, match="adapted before, with prefix"):
        adapt(model, "lora")

    wrong = [{"method": "magic"}, {"size": 2}, {"method": "lora", "size": 0}, {"method": "lora", "size": "2"}]
    wrong += [["lora", 2], "lora", {"method": ["lora"]}, {"method": "lora", "rank": 2}]
    wrong += [{"method": "lora", "size": 2}, {"method": "prefix", "size": 4}]  # not what the weights are of
    for adaptation in wrong:
        save_model(model, path, adaptation=adaptation)
        with pytest.raises(ValueError, match="cannot be loaded: .") as caught:
            load_model(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_an_inserted_module_is_on_the_models_device():
    with torch.device("meta"):
        model = Myna(Config("tiny", "square"))
    for parameter in adapt(model, "adapter"):
        assert parameter.is_meta
    assert all(isinstance(module.down, nn.Linear) for layer in model.transformer.layers for module in layer)


# --- a made-up task ----------------------------------------------------------------------------------------


def made_up(kind="classes", n=48, seed=0):
    """Clips of one to three segments. The label tells whether odd bands and odd frames are loud."""
    g, rng = generator(seed), np.random.default_rng(seed)
    clips, labels, mel, clip_index = [], [], [], []
    for i in range(n):
        bands, frames = (int(x) for x in rng.integers(0, 2, 2))
        label = {"classes": bands + 2 * frames, "key": bands + 12 * frames}
        label |= {"tags": [float(bands), float(frames)], "regression": [float(bands)]}
        label = label[kind]
        split = ("train", "train", "valid", "test")[i % 4]
        clips.append(Clip(Path(f"{i}.wav"), 0.0, None, label, split, f"song {i // 8}, {split}"))
        labels.append(label)
        count = 1 + i % 3
        segments = torch.rand(count, 128, 96, generator=g)
        segments[:, 1::2] *= 1 + 9 * bands
        segments[:, :, 1::2] *= 1 + 9 * frames
        mel.append(segments.half())
        clip_index += [i] * count
    names = {"classes": "abcd", "key": data.KEYS, "tags": "ab", "regression": "a"}[kind]
    task = Task("made-up", kind, tuple(names), clips, [])
    return task, Features({"mel": torch.cat(mel)}, torch.tensor(clip_index), labels, [])


def small():
    """A tiny model of one patch shape, as it is initialised."""
    torch.manual_seed(0)
    return Myna(Config("tiny", "square", log_mel=True)).eval()


# --- training ----------------------------------------------------------------------------------------------


def test_the_head_is_mean_linear_dropout_relu_linear():
    network = Classifier(tiny("hybrid"), 3).eval()
    means = torch.cat([network.encoder.tokens(power(2), patch).mean(dim=1) for patch in PATCHES], dim=1)
    first, last = network.head[0], network.head[3]
    assert first.weight.shape == (256, 256) and last.weight.shape == (3, 256)
    hidden = (means @ first.weight.T + first.bias).clamp(min=0)
    assert torch.allclose(network(power(2)), hidden @ last.weight.T + last.bias, atol=1e-5)
    network.train()
    assert network.head[1].p == 0.5 and not torch.equal(network(power(2)), network(power(2)))


class Recording(nn.Module):
    """In place of a Classifier: keeps what it is trained on; its output is a learned constant."""

    def __init__(self):
        super().__init__()
        self.head, self.seen = nn.Sequential(nn.Linear(1, 1)), []

    def forward(self, mel):
        self.seen.append(mel[:, 0, 0].long())
        return self.head[0].bias.expand(len(mel), 1)

    def predict(self, mel):
        return torch.zeros(len(mel), 1)


@pytest.mark.parametrize("clips, drawn", [(40, 16), (9, 9)])
def test_a_step_takes_a_random_segment_of_each_of_16_random_clips(clips, drawn, monkeypatch):
    monkeypatch.setattr(probe, "ADAPT_PATIENCE", 1000)
    counts = torch.tensor([3, 1, 2, 5] * 10)[:clips]  # segments of the clips
    groups = [Clip(Path(f"{i}.wav"), 0.0, None, [float(i)], "train", str(i)) for i in range(clips)]
    groups.insert(5, groups[0]._replace(split="valid"))  # the rows of training clips have gaps
    task = Task("t", "regression", ("x",), groups)
    clip_index = torch.tensor([i for i in range(clips + 1) if i != 5]).repeat_interleave(counts)
    clip_index, rows = torch.cat([clip_index, torch.tensor([5])]).sort()
    mel = torch.arange(len(rows))[:, None, None].half()
    features = Features({"mel": mel}, clip_index, [clip.label for clip in task.clips], [])
    seen = []
    for seed in (1, 1, 2):
        network = Recording()
        fit_classifier(task, features, network, 1e-3, 400, seed)
        seen.append(torch.stack(network.seen))
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], seen[2])
    assert seen[0].shape == (400, drawn)
    for places in seen[0]:
        assert len(clip_index[places].unique()) == drawn and 5 not in clip_index[places]
    found = torch.bincount(seen[0].flatten(), minlength=len(rows))[clip_index != 5]
    expected = 400 * drawn / clips / counts.repeat_interleave(counts)
    assert ((found - expected).abs() <= 5 * expected.sqrt()).all()


@pytest.mark.parametrize("method", ["head", "lora"])
@pytest.mark.parametrize("kind", ["classes", "tags", "regression"])
def test_an_easy_task_is_learned(method, kind):
    task, features = made_up(kind)
    model = small()
    before = copy.deepcopy(model.state_dict())
    results, network = adapt_task(task, features, model, method, lr=3e-3, steps=30)
    chance = {"classes": 0.25, "tags": 0.5, "regression": 0.0}[kind]
    assert results["test"][probe.primary_metric(kind)] > chance + 0.3
    assert results["valid"][method] > chance + 0.3
    assert results["score"] == results["test"][results["metric"]] and results["interval_over"] == "groups"
    counts = {"lora": count_by_formula("lora", "tiny", 2), "head": 0}
    assert results["trained"] == counts[method]
    assert results["trained_head"] == 128 * 128 + 128 + 128 * len(task.names) + len(task.names)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name  # the copy was trained
    frozen = {name: value for name, value in network.encoder.state_dict().items() if name in before}
    assert all(torch.equal(value, before[name]) for name, value in frozen.items()) and frozen


def slow_test_score(task, features, network):
    """Accuracy on the test split: segment by segment, the mean probability of a clip, the largest."""
    right = []
    for i, clip in enumerate(task.clips):
        if clip.split == "test":
            total = 0
            for n in (features.clip_index == i).nonzero()[:, 0].tolist():
                with torch.no_grad():
                    total = total + network.eval()(features.rows["mel"][n : n + 1])[0].double().softmax(dim=0)
            right.append(int(total.argmax()) == features.labels[i])
    return sum(right) / len(right)


def test_the_test_score_is_the_mean_over_a_clips_segments():
    task, features = made_up()
    results, network = adapt_task(task, features, small(), "bitfit", lr=1e-3, steps=5)
    assert results["test"]["accuracy"] == pytest.approx(slow_test_score(task, features, network))


def test_training_never_sees_the_test_split():
    task, features = made_up()
    results, network = adapt_task(task, features, small(), "ssf", lr=1e-3, steps=10)
    of_test = torch.tensor([task.clips[i].split == "test" for i in features.clip_index.tolist()])
    mel = features.rows["mel"].clone()
    mel[of_test] = 1000 * torch.rand(mel[of_test].shape).half()
    labels = list(features.labels)
    for i, clip in enumerate(task.clips):
        labels[i] = (labels[i] + 1) % 4 if clip.split == "test" else labels[i]
    changed = Features({"mel": mel}, features.clip_index, labels, [])
    other_results, other = adapt_task(task, changed, small(), "ssf", lr=1e-3, steps=10)
    assert other_results["log"] == results["log"]
    for name, value in network.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])
    assert other_results["test"] != results["test"]


def test_the_weights_of_the_best_validation_check_are_kept(monkeypatch):
    task, features = made_up()
    scores = [0.1, 0.5, 0.3, 0.7, *[0.7, 0.2, 0.6, 0.1, 0.3, 0.2, 0.1, 0.4], 0.9]  # 0.9 is after eight checks
    seen = []

    def scripted(kind, targets, outputs):
        assert targets.tolist() == [clip.label for clip in task.clips if clip.split == "valid"]
        assert outputs.shape == (12, 4)
        return scores[len(seen) - 1]

    def predict(self, mel):
        seen.append({name: value.clone() for name, value in self.state_dict().items()})
        return torch.zeros(len(mel), 4)

    monkeypatch.setattr(probe, "primary_score", scripted)
    monkeypatch.setattr(probe, "test_results", lambda *_: {})
    monkeypatch.setattr(Classifier, "predict", predict)
    results, network = adapt_task(task, features, small(), "adapter", lr=1e-3, steps=40)
    assert [check[2] for check in results["log"]] == scores[:12]
    assert [check[0] for check in results["log"]] == list(range(2, 26, 2))
    assert results["step"] == 8 and results["valid"] == {"adapter": 0.7}
    for name, value in network.state_dict().items():
        assert torch.equal(value, seen[3][name])
    assert not torch.equal(seen[3]["head.0.weight"], seen[11]["head.0.weight"])


def test_the_rate_falls_on_a_cosine_and_gradients_are_cut(monkeypatch):
    rates, norms = [], []

    class Recorded(torch.optim.Adam):
        def step(self):
            group = self.param_groups[0]
            rates.append(group["lr"])
            norms.append(math.sqrt(sum(float(p.grad.double().square().sum()) for p in group["params"])))
            assert group["weight_decay"] == 0 and group["betas"] == (0.9, 0.999)
            super().step()

    monkeypatch.setattr(torch.optim, "Adam", Recorded)
    monkeypatch.setattr(probe, "ADAPT_PATIENCE", 1000)
    task, features = made_up("regression")
    features.labels[:] = [[100 * value for value in label] for label in features.labels]
    fit_classifier(task, features, Classifier(small().requires_grad_(False), 1), 1e-3, 25, 0)
    expected = [1e-7 + (1e-3 - 1e-7) * (1 + math.cos(math.pi * step / 25)) / 2 for step in range(25)]
    assert rates == pytest.approx(expected, rel=1e-6)
    assert max(norms) == pytest.approx(1, rel=1e-4)


def test_the_default_rates_are_the_papers_and_larger_for_a_tiny_model(monkeypatch):
    task, features = made_up()
    asked = []

    def stopped(task, features, network, lr, steps, seed):
        asked.append((lr, steps))
        return [[1, 0.0, 0.0]]

    monkeypatch.setattr(probe, "fit_classifier", stopped)
    for size, method in (("vit-s", "full"), ("vit-s", "lora"), ("tiny", "full"), ("tiny", "lora")):
        adapt_task(task, features, Myna(Config(size, "vertical")), method)
    assert asked == [(rate, probe.ADAPT_STEPS) for rate in (1e-5, 1e-4, 1e-3, 1e-3)]


def test_the_seed_decides():
    task, features = made_up()
    logs = []
    for seed in (3, 3, 4):
        torch.rand(5)  # random numbers drawn elsewhere do not matter
        logs.append(adapt_task(task, features, small(), "lora", lr=1e-3, steps=4, seed=seed)[0]["log"])
    assert logs[0] == logs[1] != logs[2]


def test_a_loss_that_is_not_finite_stops_the_run():
    task, features = made_up()
    features.rows["mel"][:] = torch.nan
    with pytest.raises(ValueError, match="loss of step 1 is nan: try a smaller --lr"):
        adapt_task(task, features, small(), "head", steps=3)


# --- few labels --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["classes", "key", "tags", "regression"])
@pytest.mark.parametrize("songs", [True, False])
def test_subsets_are_nested_have_all_classes_and_whole_groups(kind, songs):
    task, features = made_up(kind, n=160)
    if not songs:
        task.clips = [clip._replace(group=str(clip.path)) for clip in task.clips]
    features.labels[0] = None  # a clip that cannot be read
    readable = {i for i, clip in enumerate(task.clips) if clip.split == "train"} - {0}
    groups = {task.clips[i].group for i in readable}
    fractions = [1, 0.01, 0.5, 0.1]
    subsets = label_subsets(task, features.labels, fractions, repeat=5, seed=1)
    assert list(subsets) == fractions
    for draw in range(5):
        drawn = [subsets[fraction][draw] for fraction in sorted(fractions)]
        assert all(smaller <= larger for smaller, larger in zip(drawn, drawn[1:]))
        assert drawn[-1] == readable
        for fraction, chosen in zip(sorted(fractions), drawn):
            if kind in ("classes", "key"):
                present = {features.labels[i] for i in chosen}
                assert present == {features.labels[i] for i in readable} and len(present) == 4
            of_chosen = {task.clips[i].group for i in chosen}
            assert chosen == {i for i in readable if task.clips[i].group in of_chosen}
            least = 4 if kind in ("classes", "key") else 1
            exact = round(fraction * len(groups))
            assert max(1, exact) <= len(of_chosen) <= max(least, exact)
    assert len({frozenset(chosen) for chosen in subsets[0.1]}) > 1  # draws differ
    assert label_subsets(task, features.labels, fractions, repeat=5, seed=1) == subsets
    assert label_subsets(task, features.labels, [0.1], repeat=2, seed=1)[0.1] == subsets[0.1][:2]
    assert label_subsets(task, features.labels, fractions, repeat=5, seed=2) != subsets


def test_every_training_clip_is_equally_likely():
    task, features = made_up("regression", n=160)
    task.clips = [clip._replace(group=str(clip.path)) for clip in task.clips]
    subsets = label_subsets(task, features.labels, [0.25], repeat=400)
    counts = np.bincount([i for chosen in subsets[0.25] for i in chosen], minlength=160)
    counts = counts[[clip.split == "train" for clip in task.clips]]
    assert counts.sum() == 400 * 20 and abs(counts - 100).max() < 5 * math.sqrt(75)


def test_few_labels_trains_on_each_subset_and_nothing_else_changes():
    task, features = made_up()
    calls = []

    def train(part, seed):
        calls.append((frozenset(i for i, clip in enumerate(part.clips) if clip.split == "train"), seed))
        for clip, whole in zip(part.clips, task.clips):
            assert clip == whole or (whole.split == "train" and clip == whole._replace(split=""))
        return {"score": 0.1 * len(calls), "test": {"accuracy": 5.0}}, None

    table = few_labels(task, features.labels, [0.3, 1], train, repeat=3, seed=7)
    subsets = label_subsets(task, features.labels, [0.3, 1], 3, 7)
    expected = [(frozenset(subsets[f][draw]), 7 + draw) for f in (0.3, 1) for draw in range(3)]
    assert calls == expected
    assert [row["fraction"] for row in table] == [0.3, 1]
    assert table[0]["scores"] == pytest.approx([0.1, 0.2, 0.3]) and table[1]["mean"] == pytest.approx(0.5)
    assert table[0]["std"] == pytest.approx(math.sqrt((0.01 + 0 + 0.01) / 2))
    assert table[0]["clips"] == [len(chosen) for chosen in subsets[0.3]] and table[1]["clips"] == [24] * 3
    for row in table:
        json.dumps(row)


# --- the command line --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """20 sounds of two timbres, one of them short, a corrupt file, and a model."""
    folder = tmp_path_factory.mktemp("adapted")
    rng, rows = np.random.default_rng(0), ["path,label,split"]
    for i in range(20):
        kind, split = ("tone", "noise")[i % 2], ("train", "train", "train", "valid", "test")[i // 2 % 5]
        t = np.arange(int(8000 * (7 if i else 0.5))) / 8000  # the first is shorter than a segment
        tone = np.sin(2 * np.pi * rng.uniform(300, 600) * t)
        wave = tone if kind == "tone" else rng.standard_normal(len(t))
        soundfile.write(folder / f"{i}.wav", 0.1 * wave, 8000)
        rows.append(f"{i}.wav,{kind},{split}")
    (folder / "bad.wav").write_text("no sound")
    (folder / "labels.csv").write_text("\n".join([*rows, "bad.wav,tone,train"]))
    (folder / "runs/small").mkdir(parents=True)
    save_model(tiny("hybrid"), folder / "runs/small/checkpoint.pt")
    return folder


@pytest.fixture
def command(labelled, monkeypatch, capfd):
    """Runs probe.py on those sounds, without worker processes and with a small grid; returns its output."""
    monkeypatch.chdir(labelled)
    monkeypatch.setattr(probe, "in_workers", lambda function, jobs, workers: (function(*job) for job in jobs))
    few = [c._replace(patience=8) for c in probe.QUICK_GRID if not c.hidden and c.dropout == 0.25]
    monkeypatch.setattr(probe, "GRID", few)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["probe.py", "--task", "labels.csv", *map(str, arguments)])
        probe.main()
        return capfd.readouterr().out

    return run


def test_mel_is_that_of_each_clip(labelled, monkeypatch):
    task = probe.load_task(labelled / "labels.csv")
    features = load_mel(task, workers=1)
    mel = features.rows["mel"]
    assert mel.dtype == torch.float16 and mel.shape[1:] == (128, 96)
    assert features.labels[-1] is None and features.skipped[0][0].endswith("bad.wav")
    for i in range(20):
        expected = data.mel_segments(data.load_audio(labelled / f"{i}.wav"))
        assert torch.equal(mel[features.clip_index == i], expected)
        assert features.labels[i] == task.clips[i].label
    assert (features.clip_index == 0).sum() == 1 and (features.clip_index == 1).sum() == 2
    task.clips = task.clips[-1:]
    with pytest.raises(ValueError, match="no clip could be read, the first: .*bad.wav"):
        load_mel(task, workers=1)


@pytest.mark.parametrize("method", ["lora", "prompt"])
def test_adapt_writes_results_and_a_model_that_others_can_load(method, labelled, command):
    said = command("--adapt", method, "--steps", 4)
    name = f"adapted_labels_{method}_steps-4"
    trained = count_by_formula(method, "tiny", {"lora": 2, "prompt": 32}[method])
    for words in ("12 train, 4 valid, 4 test clips", f"trained {trained:,} of", "weights of step"):
        assert words in said, said
    assert f"{name}.json" in said and "1 clips unreadable" in said and "95% interval over clips" in said
    results = json.loads((labelled / f"runs/small/{name}.json").read_text())
    assert results["method"] == method and results["trained"] == trained
    assert results["skipped"][0][0] == "bad.wav" and results["missing"] == []
    assert results["seconds"] > 0 and len(results["log"]) == 4 and results["model"] == "hybrid"
    assert {"accuracy"} == set(results["test"]) and len(results["interval"]) == 2

    path = labelled / f"runs/small/{name}.pt"
    model = load_model(path)
    assert model.adaptation == (None if method == "lora" else {"method": "prompt", "size": 32})
    network = Classifier(model, 2).eval()
    stored = torch.load(path, weights_only=True)
    network.head.load_state_dict(stored["head"])
    assert stored["names"] == ["noise", "tone"]
    features = load_mel(probe.load_task(labelled / "labels.csv"), 1)
    score = slow_test_score(probe.load_task(labelled / "labels.csv"), features, network)
    assert score == results["test"]["accuracy"]
    said = command("--checkpoint", path)  # a frozen encoder like any other
    assert f"runs/{name}/probe_labels_hybrid.json" in said


def test_random_weights_can_be_trained_from_nothing(labelled, command):
    said = command("--checkpoint", "random", "--adapt", "full", "--steps", 2, "--precision", "bf16")
    assert "runs/baselines/adapted_labels_full_random-tiny-hybrid_steps-2_precision-bf16.json" in said
    results = json.loads((labelled / said.split()[-1]).read_text())
    assert results["trained"] == results["encoder"] and results["lr"] == 1e-3
    assert load_model((labelled / said.split()[-1]).with_suffix(".pt")).adaptation is None


def test_labels_gives_one_table(labelled, command):
    said = command("--labels", 0.5, 1, "--repeat", 2)
    path = labelled / "runs/small/probe_labels_hybrid_labels-0.5-1.0_repeat-2.json"
    table = json.loads(path.read_text())["labels"]
    assert [row["clips"] for row in table] == [[6, 6], [12, 12]] and all(len(r["scores"]) == 2 for r in table)
    assert "hybrid, probes: accuracy on the test split" in said and "50.0%       6" in said
    said = command("--labels", 1, "--repeat", 1, "--features", "mfcc")
    assert "baselines/probe_labels_mfcc_labels-1.0_repeat-1.json" in said
    said = command("--labels", 0.5, "--adapt", "head", "--steps", 2, "--repeat", 2)
    assert "--adapt head: accuracy" in said
    assert "small/adapted_labels_head_labels-0.5_repeat-2_steps-2.json" in said
    results = json.loads((labelled / said.split()[-1]).read_text())
    assert results["method"] == "head" and results["labels"][0]["clips"] == [6, 6]
    assert not list((labelled / "runs/small").glob("*_labels-*.pt"))


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ("--adapt lora --features mfcc", "--adapt has no effect with --features mfcc"),
        ("--adapt lora --grid full", "--grid has no effect with --adapt"),
        ("--adapt lora --per-segment", "--per-segment has no effect with --adapt"),
        ("--adapt lora --rank 0", "--rank 0: it must be above zero"),
        ("--adapt ssf --rank 2", "size 2: from 1 to 1024"),
        ("--adapt lora --lr 0", "--lr 0.0: it must be above zero"),
        ("--adapt lora --steps 0", "--steps 0: it must be above zero"),
        ("--adapt lora --lr nan", "--lr nan: it must be above zero"),
        ("--adapt lora --steps -3", "--steps -3: it must be above zero"),
        ("--adapt lora --check", "--adapt has no effect with --check"),
        ("--steps 3", "--steps has no effect without --adapt"),
        ("--precision bf16", "--precision has no effect without --adapt"),
        ("--repeat 3", "--repeat has no effect without --labels"),
        ("--labels 0", "--labels 0.0: a share of the labels is above 0 and at most 1"),
        ("--labels 0.1 1.5", "--labels 1.5: a share of the labels is above 0 and at most 1"),
        ("--labels nan", "--labels nan: a share"),
        ("--labels 0.5 --repeat 0", "--repeat 0: it must be above zero"),
        ("--adapt magic", "invalid choice: 'magic'"),
    ],
)
def test_wrong_options_are_one_sentence(arguments, sentence, command, capfd):
    with pytest.raises(SystemExit) as status:
        command(*arguments.split())
    assert status.value.code == 2
    said = capfd.readouterr().err.splitlines()
    assert sentence in said[-1] and not any("Traceback" in line for line in said)


def test_an_adapted_checkpoint_is_not_adapted_twice(labelled, command, capfd):
    model = tiny("hybrid")
    adapt(model, "prefix")
    save_model(model, labelled / "prefix.pt")
    with pytest.raises(SystemExit):
        command("--checkpoint", "prefix.pt", "--adapt", "lora")
    assert "this model has been adapted before, with prefix" in capfd.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_interrupted_or_killed_it_leaves_no_half_result(labelled, number):
    said, before = labelled / "said.txt", sorted((labelled / "runs").rglob("*"))
    arguments = "--task labels.csv --adapt head --steps 1000000 --workers 1".split()
    with open(said, "w") as output:
        command = [sys.executable, Path(probe.__file__), *arguments]
        process = subprocess.Popen(command, cwd=labelled, stdout=output, stderr=output)
    limit = time.monotonic() + 120
    while "adapting" not in said.read_text():
        assert process.poll() is None and time.monotonic() < limit, said.read_text()
        time.sleep(0.1)
    process.send_signal(number)
    assert process.wait(timeout=30) == (130 if number == signal.SIGINT else -number)
    assert "Traceback" not in said.read_text() and sorted((labelled / "runs").rglob("*")) == before
    assert ("interrupted" in said.read_text()) == (number == signal.SIGINT)
