"""model.py against the definitions: loops in float64, the released files' shapes, and other files."""

import io
import math
import os
import pickle
import re
import resource

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import model as stage
from model import PATCHES, SIZES, Config, Myna, info_nce, info_nce_in_blocks, keep_tokens, load_model
from model import patchify, retrieval_accuracy, save_model, sincos_2d, unpatchify

GRIDS = {"square": (8, 6), "vertical": (1, 48)}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def tiny(patch="hybrid", seed=0, **settings):
    torch.manual_seed(seed)
    return Myna(Config("tiny", patch, **settings))


def power(batch, seed=0):
    """Something with the range of mel power: many orders of magnitude."""
    return torch.randn(batch, 128, 96, generator=generator(seed)).mul(3).exp().clamp(max=65_504)


# --- patches -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("patch", PATCHES)
def test_patchify_cuts_out_what_the_definition_says(patch):
    mel = torch.randn(2, 128, 96)
    height, width = PATCHES[patch]
    patches = patchify(mel, patch)
    assert patches.shape == (2, 48, 256)
    n = 0
    for row in range(128 // height):
        for column in range(96 // width):
            top, left = row * height, column * width
            values = [mel[1, top + f, left + t] for f in range(height) for t in range(width)]
            assert torch.equal(patches[1, n], torch.stack(values))
            n += 1
    assert torch.equal(unpatchify(patches, patch), mel)
    assert torch.equal(patchify(unpatchify(patches, patch), patch), patches)
    assert torch.equal(patchify(mel, PATCHES[patch]), patches)  # the shape itself works as well as its name


@pytest.mark.parametrize("ratio, kept", [(0.9, 5), (0.0, 48), (0.5, 24), (0.75, 12), (0.97, 2)])
def test_kept_tokens_are_distinct_and_every_one_equally_likely(ratio, kept):
    tokens = keep_tokens(20_000, 48, ratio, generator(3))
    assert tokens.shape == (20_000, kept) and tokens.dtype == torch.long
    assert all(len(set(row)) == kept for row in tokens[:200].tolist())
    counts = torch.bincount(tokens.flatten(), minlength=48).double()
    expected = 20_000 * kept / 48
    assert counts.sum() == 20_000 * kept
    assert (counts - expected).abs().max() < 5 * math.sqrt(expected)
    if kept < 48:  # and every pair of them
        both = torch.zeros(20_000, 48).scatter_(1, tokens, 1)
        together = (both.T @ both)[~torch.eye(48, dtype=torch.bool)]
        expected = 20_000 * kept * (kept - 1) / (48 * 47)
        assert (together - expected).abs().max() < 6 * math.sqrt(expected)
    assert torch.equal(tokens, keep_tokens(20_000, 48, ratio, generator(3)))


@pytest.mark.parametrize("ratio", [1.0, 1.5, -0.1])
def test_a_mask_that_keeps_nothing_is_refused(ratio):
    with pytest.raises(ValueError, match="mask ratio"):
        keep_tokens(2, 48, ratio)


def test_position_embedding_is_the_formula():
    table = sincos_2d(8, 6, 192)
    assert table.shape == (48, 192)
    for y in range(8):
        for x in range(6):
            for i in range(48):
                w = 10_000 ** -(i / 47)
                row = table[y * 6 + x]
                expected = [math.sin(x * w), math.cos(x * w), math.sin(y * w), math.cos(y * w)]
                assert row[[i, 48 + i, 96 + i, 144 + i]].tolist() == pytest.approx(expected, abs=1e-6)


# --- the encoder -------------------------------------------------------------------------------------------


def slow_encoder(model, mel, patch, kept):
    """One segment through the whole network, token by token and head by head, in float64."""
    weights = {name: value.double() for name, value in model.state_dict().items()}

    def norm(x, name):
        x = x - x.mean()
        return x / (x.square().mean() + 1e-5).sqrt() * weights[name + ".weight"] + weights[name + ".bias"]

    def linear(x, name):
        return weights[name + ".weight"] @ x + weights.get(name + ".bias", 0)

    height, width = PATCHES[patch]
    rows, columns = GRIDS[patch]
    dim, depth, heads, _ = SIZES[model.config.size]
    tokens = []
    for n in kept:
        y, x = divmod(n, columns)
        values = mel[y * height : (y + 1) * height, x * width : (x + 1) * width].double().reshape(-1)
        if model.config.log_mel:
            values = (1 + values).log()
        name = f"to_patch_embedding.{patch}"
        token = norm(linear(norm(values, name + ".0"), name + ".1"), name + ".2")
        tokens.append(token + sincos_2d(rows, columns, dim)[n].double())
    for i in range(depth):
        name = f"transformer.layers.{i}"
        qkv = [linear(norm(t, f"{name}.0.norm"), f"{name}.0.to_qkv") for t in tokens]
        size, added = dim // heads, []
        for a in range(len(tokens)):
            out = []
            for h in range(heads):
                part = lambda which: slice(which * dim + h * size, which * dim + (h + 1) * size)
                scores = [qkv[a][part(0)] @ qkv[b][part(1)] / math.sqrt(size) for b in range(len(tokens))]
                scores = torch.stack(scores)
                share = scores.exp() / scores.exp().sum()
                out.append(sum(share[b] * qkv[b][part(2)] for b in range(len(tokens))))
            added.append(linear(torch.cat(out), f"{name}.0.to_out"))
        tokens = [t + a for t, a in zip(tokens, added)]
        for a, t in enumerate(tokens):
            hidden = linear(norm(t, f"{name}.1.net.0"), f"{name}.1.net.1")
            gelu = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
            tokens[a] = t + linear(gelu, f"{name}.1.net.3")
    return sum(norm(t, "transformer.norm") for t in tokens) / len(tokens)


@pytest.mark.parametrize("patch", PATCHES)
@pytest.mark.parametrize("log_mel", [False, True])
def test_encoder_is_the_definition(patch, log_mel):
    model = tiny(log_mel=log_mel)
    for parameter in model.parameters():  # norms and biases that are not ones and zeros
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator(5))
    mel = power(2)
    kept = keep_tokens(2, 48, 0.9, generator(1))
    with torch.no_grad():
        fast = model.tokens(mel, patch, kept).mean(dim=1)
        for row in range(2):
            slow = slow_encoder(model, mel[row], patch, kept[row].tolist())
            assert (fast[row] - slow).norm() / slow.norm() < 1e-5
        everything = slow_encoder(model, mel[0], patch, range(48))
    assert (model.embed(mel, patch)[0] - everything).norm() / everything.norm() < 1e-5


@pytest.mark.parametrize("patch", PATCHES)
def test_nothing_is_computed_for_a_dropped_token(patch):
    model = tiny()
    seen = set()
    for module in model.modules():
        if isinstance(module, (nn.LayerNorm, nn.Linear, nn.GELU)):
            module.register_forward_hook(lambda module, inputs, output: seen.add(tuple(inputs[0].shape[:-1])))
    kept = keep_tokens(3, 48, 0.9, generator(2))
    mel = power(3)
    z = model(mel, patch, kept=kept)
    assert seen == {(3, 5), (3,)}  # five tokens a row everywhere, and the projector's mean of them
    patches = patchify(mel, patch)
    where = kept[..., None].expand(-1, -1, 256)
    poisoned = torch.full_like(patches, torch.nan).scatter(1, where, patches.gather(1, where))
    assert torch.equal(model(unpatchify(poisoned, patch), patch, kept=kept), z)


def test_forward_draws_a_new_mask_for_every_row_and_honours_the_ratio():
    model = tiny("square")
    mel = power(1).expand(8, -1, -1)
    z = model(mel, "square", 0.9)
    assert z.shape == (8, 128)
    assert len({tuple(row.tolist()) for row in z}) == 8
    full = model(mel, "square", 0.0)  # all tokens kept, in whatever order: the mean does not care
    assert torch.allclose(full, full[:1].expand_as(full), atol=1e-5)


def test_embed_takes_both_shapes_of_a_hybrid_model():
    model, mel = tiny(), power(3)
    both = model.embed(mel)
    assert both.shape == (3, 256) and not both.requires_grad
    assert torch.equal(both, torch.cat([model.embed(mel, "square"), model.embed(mel, "vertical")], dim=1))
    assert tiny("vertical").embed(mel).shape == (3, 128)
    with pytest.raises(ValueError, match=r"expected segments \(B, 128, 96\).*found \(3, 128, 97\)"):
        model.embed(torch.ones(3, 128, 97))
    assert torch.allclose(model.embed(mel.half().float()), model.embed(mel.half()))


@pytest.mark.parametrize("size, millions", [("vit-s", 22), ("vit-b", 86)])
def test_sizes_are_the_papers(size, millions):
    with torch.device("meta"):
        model = Myna(Config(size, "square"))
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(millions * 1e6, rel=0.02)


def test_unknown_settings_are_refused():
    with pytest.raises(ValueError, match="tiny, vit-s, vit-b"):
        Config("huge")
    with pytest.raises(ValueError, match="square, vertical, hybrid"):
        Config("tiny", "round")


# --- the loss ----------------------------------------------------------------------------------------------


def slow_loss(z1, z2, temperature, decoupled):
    """Every anchor and every other view, one at a time, in float64."""
    views = [(i, z.double() / z.double().norm()) for half in (z1, z2) for i, z in enumerate(half)]
    total = 0
    for a, (i, anchor) in enumerate(views):
        positive, denominator = None, []
        for b, (j, other) in enumerate(views):
            s = torch.exp(anchor @ other / temperature)
            if b == a:
                continue
            if j == i:
                positive = s
            if j != i or not decoupled:
                denominator.append(s)
        total -= torch.log(positive / sum(denominator))
    return total / len(views)


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_loss_is_the_equation(decoupled, temperature):
    z1, z2 = torch.randn(7, 16, generator=generator(1)), torch.randn(7, 16, generator=generator(2))
    expected = slow_loss(z1, z2, temperature, decoupled)
    assert info_nce(z1, z2, temperature, decoupled).item() == pytest.approx(expected.item(), rel=1e-5)
    z1.requires_grad_()
    (fast,) = torch.autograd.grad(info_nce(z1, z2, temperature, decoupled), z1)
    (slow,) = torch.autograd.grad(slow_loss(z1, z2, temperature, decoupled), z1)
    assert (fast - slow).norm() / slow.norm() < 1e-4
    with_anchors = info_nce(z1, z2, temperature, decoupled, torch.tensor([3, 9, 13]))  # of the 14 views
    each = [info_nce(z1, z2, temperature, decoupled, torch.tensor([a])).item() for a in range(14)]
    assert with_anchors.item() == pytest.approx((each[3] + each[9] + each[13]) / 3, rel=1e-5)
    assert sum(each) / 14 == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("decoupled", [False, True])
def test_loss_does_not_depend_on_order_and_length(decoupled):
    z1, z2 = torch.randn(9, 16, generator=generator(1)), torch.randn(9, 16, generator=generator(2))
    loss = info_nce(z1, z2, decoupled=decoupled)
    order = torch.randperm(9, generator=generator(3))
    assert torch.allclose(info_nce(z1[order], z2[order], decoupled=decoupled), loss, rtol=1e-5)
    assert torch.allclose(info_nce(z2, z1, decoupled=decoupled), loss, rtol=1e-5)
    assert torch.allclose(info_nce(3 * z1, 0.01 * z2, decoupled=decoupled), loss, rtol=1e-5)
    assert not torch.allclose(info_nce(z1[order], z2, decoupled=decoupled), loss, rtol=1e-3)


def test_loss_at_chance_level_and_at_its_best():
    same = torch.ones(32, 8)
    assert info_nce(same, same).item() == pytest.approx(math.log(2 * 32 - 1), rel=1e-6)
    assert info_nce(same, same, decoupled=True).item() == pytest.approx(math.log(2 * 32 - 2), rel=1e-6)
    apart = torch.eye(8)  # each pair alone in its direction
    assert info_nce(apart, apart).item() == pytest.approx(math.log(1 + 14 * math.exp(-10)), rel=1e-3)
    assert info_nce(apart, apart, decoupled=True).item() == pytest.approx(math.log(14) - 10, rel=1e-5)


class Largest(TorchDispatchMode):
    """Records the size of the largest tensor that any operation makes, in the backward pass as well."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        tensors = [leaf for leaf in torch.utils._pytree.tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        self.largest = max([self.largest, *(tensor.numel() for tensor in tensors)])
        return out


def similar_pairs():
    """Fifty pairs of views; in twenty of them the views are similar."""
    z1, z2 = torch.randn(50, 16, generator=generator(1)), torch.randn(50, 16, generator=generator(2))
    z2[:20] += 2 * z1[:20]
    return z1, z2


@pytest.mark.parametrize("decoupled", [False, True])
def test_loss_in_blocks_is_the_loss_without_the_whole_matrix(decoupled, monkeypatch):
    found = {}
    for block in (stage.BLOCK, 100 * 7, 1):  # at once; 7 rows at a time, the last time 2; row by row
        monkeypatch.setattr(stage, "BLOCK", block)
        leaves = [z.requires_grad_() for z in similar_pairs()]
        with Largest() as mode:
            loss = info_nce_in_blocks(*leaves, 0.2, decoupled)
            loss.backward()
            accuracy = retrieval_accuracy(*leaves)
        if block == 2**28:
            assert mode.largest == 100 * 100
        else:
            assert mode.largest <= max(700, 100 * 16)
        found[block] = (loss.item(), accuracy.item(), *(leaf.grad for leaf in leaves))
    whole = found[2**28]
    assert whole[0] == pytest.approx(slow_loss(*similar_pairs(), 0.2, decoupled).item(), rel=1e-5)
    for block in (700, 1):
        assert found[block][:2] == pytest.approx(whole[:2], rel=1e-6)
        for fast, slow in zip(found[block][2:], whole[2:]):
            assert torch.allclose(fast, slow, atol=1e-7, rtol=1e-4)


def test_retrieval_accuracy_is_the_definition():
    z = F.normalize(torch.cat(similar_pairs()).double(), dim=1)
    correct = 0
    for a in range(100):
        others = [b for b in range(100) if b != a]
        most_similar = max(others, key=lambda b: z[a] @ z[b])
        correct += most_similar == (a + 50) % 100
    assert retrieval_accuracy(*similar_pairs()).item() == pytest.approx(correct / 100) and 20 < correct < 90


def test_loss_is_computed_in_float32_under_autocast():
    z1 = torch.randn(64, 32, generator=generator(1)).bfloat16()
    z2 = (z1 + 0.01 * torch.randn(64, 32, generator=generator(2))).bfloat16()
    expected = slow_loss(z1, z2, 0.1, False).item()
    with torch.autocast("cpu", torch.bfloat16):
        assert info_nce(z1, z2).dtype == torch.float32
        assert info_nce(z1, z2).item() == pytest.approx(expected, rel=1e-4)
    far = torch.full((4, 8), 1e20, requires_grad=True)  # lengths whose squares overflow
    assert info_nce(far.bfloat16(), far.bfloat16(), 0.01).isfinite()


# --- files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("patch", ["square", "vertical", "hybrid"])
def test_saved_models_come_back(tmp_path, patch):
    model = tiny(patch, log_mel=True, projection=32)
    save_model(model, tmp_path / "m.pt", step=7)
    loaded = load_model(tmp_path / "m.pt")
    assert loaded.config == model.config
    assert torch.equal(loaded.embed(power(2)), model.embed(power(2)))
    first, kept = model.patches[0], torch.arange(5).expand(2, 5)
    assert torch.equal(loaded(power(2), first, kept=kept), model(power(2), first, kept=kept))
    assert torch.load(tmp_path / "m.pt", weights_only=True)["step"] == 7
    assert os.listdir(tmp_path) == ["m.pt"]


def released(hybrid, dim=384, depth=12, hidden=1536):
    """A state dict with the names and shapes of the authors' files."""
    shapes = {"transformer.norm": (dim,), "linear_head": (128, dim)}
    for tokenizer in ("to_patch_embedding", "to_patch_embedding_b") if hybrid else ("to_patch_embedding",):
        shapes |= {f"{tokenizer}.1": (256,), f"{tokenizer}.2": (dim, 256), f"{tokenizer}.3": (dim,)}
    for i in range(depth):
        layer = f"transformer.layers.{i}"
        shapes[f"{layer}.0.norm"] = shapes[f"{layer}.1.net.0"] = (dim,)
        shapes |= {f"{layer}.0.to_qkv": (3 * dim, dim), f"{layer}.0.to_out": (dim, dim)}
        shapes |= {f"{layer}.1.net.1": (hidden, dim), f"{layer}.1.net.3": (dim, hidden)}
    weights, noise = {}, generator(9)
    for name, shape in shapes.items():
        weights[name + ".weight"] = 0.05 * torch.randn(shape, generator=noise)
        if "to_qkv" not in name and "to_out" not in name:
            weights[name + ".bias"] = 0.05 * torch.randn(shape[0], generator=noise)
    return weights


@pytest.mark.parametrize("hybrid", [False, True])
def test_released_files_load(tmp_path, hybrid):
    weights = released(hybrid)
    torch.save(weights, tmp_path / "myna.pt")
    model = load_model(tmp_path / "myna.pt", patch=None if hybrid else "vertical")
    assert model.config.patch == ("hybrid" if hybrid else "vertical")
    assert model.embed(power(2)).shape == (2, 384 * (1 + hybrid))
    if hybrid:
        linear = model.to_patch_embedding["vertical"][1]
        assert torch.equal(linear.weight, weights["to_patch_embedding_b.2.weight"])
    assert model.config.size == "vit-s"
    norm, last = model.to_patch_embedding[model.patches[0]][0], model.transformer.layers[11][1].net[3]
    assert torch.equal(norm.bias, weights["to_patch_embedding.1.bias"])
    assert torch.equal(last.weight, weights["transformer.layers.11.1.net.3.weight"])


def bytes_of(contents):
    file = io.BytesIO()
    torch.save(contents, file)
    return file.getvalue()


ONE_SHORT = {k: v for k, v in released(True).items() if k != "transformer.layers.3.0.to_qkv.weight"}
MISTAKES = {
    "this is not a checkpoint": (b"hello", None),
    "or one that is cut short": (bytes_of(released(True))[:-1000], None),
    "file.pt: this is not": (bytes_of([1, 2]), None),
    "it is neither a checkpoint of train.py nor a released model": (bytes_of({"a": torch.ones(3)}), None),
    "it is neither a checkpoint of train.py": (bytes_of(released(False, dim=100)), "square"),
    "patch None: it must be one of square, vertical, hybrid (--patch)": (bytes_of(released(False)), None),
    "transformer.layers.3.0.to_qkv.weight is missing": (bytes_of(ONE_SHORT), None),
    "size mismatch for to_patch_embedding.square.1.weight": (
        bytes_of(released(True) | {"to_patch_embedding.2.weight": torch.ones(384, 255)}), None),
    "unexpected keyword argument 'depth'": (bytes_of({"config": {"depth": 3}, "model": {}}), None),
    "it has hybrid patches, not square": (bytes_of(released(True)), "square"),
}  # fmt: skip


@pytest.mark.parametrize("sentence", MISTAKES)
def test_other_files_are_a_sentence(tmp_path, sentence):
    path, (contents, patch) = tmp_path / "file.pt", MISTAKES[sentence]
    with pytest.raises(ValueError, match="no such checkpoint"):
        load_model(path)
    path.write_bytes(contents)
    with pytest.raises(ValueError, match=re.escape(sentence)) as caught:
        load_model(path, patch)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_a_crafted_file_cannot_run_code(tmp_path):
    class Crafted:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"config": {}, "model": Crafted()}, tmp_path / "zip.pt")
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(Crafted()))
    for name in ("zip.pt", "bare.pt"):
        with pytest.raises(ValueError, match="this is not a checkpoint"):
            load_model(tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_a_full_disk_leaves_the_file_before(tmp_path):
    path = tmp_path / "m.pt"
    save_model(tiny("square"), path)
    before = path.read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limit[1]))
    try:
        with pytest.raises(OSError, match="could not be written: File too large"):  # the cause
            save_model(tiny("square", seed=1), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["m.pt"]
