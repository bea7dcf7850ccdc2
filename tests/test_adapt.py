"""Adaptation (the end of model.py, and --adapt and --labels of probe.py) against the definitions."""

import math

import pytest
import torch
from torch import nn

from model import ADAPTATIONS, PATCHES, SIZES, Config, Myna, adapt, load_model, merge, save_model

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


def test_a_method_returns_exactly_the_parameters_that_it_trains():
    for method in ADAPTATIONS:
        model = tiny()
        returned = {id(p) for p in adapt(model, method)}
        assert returned == {id(p) for p in model.parameters() if p.requires_grad}


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
    sequence = torch.stack([torch.cat([prompt, row]) for row in model.tokenize(mel, "square")])
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
    with pytest.raises(ValueError, match="one of full, lora, adapter, ssf, bitfit, prefix, prompt, head"):
        adapt(tiny(), "magic")
    for method, size in [("lora", 0), ("adapter", -1), ("prefix", 100_000), ("ssf", 2), ("full", 1)]:
        with pytest.raises(ValueError, match=f"size {size}: from 1 to 1024"):
            adapt(tiny(), method, size)
    model = tiny()
    adapt(model, "prefix")
    with pytest.raises(ValueError, match="adapted before, with prefix"):
        adapt(model, "lora")

    path = tmp_path / "m.pt"
    wrong = [{"method": "magic"}, {"size": 2}, {"method": "lora", "size": 0}, {"method": "lora", "size": "2"}]
    for adaptation in [*wrong, ["lora", 2], "lora", {"method": ["lora"]}, {"method": "lora", "rank": 2}]:
        save_model(model, path, adaptation=adaptation)
        with pytest.raises(ValueError) as caught:
            load_model(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
        assert "method and size of an adaptation" in str(caught.value)
        assert str(adaptation) in str(caught.value)
    save_model(model, path, adaptation={"method": "lora", "size": 2})  # other weights than it says
    with pytest.raises(ValueError, match="expected transformer.layers.0.0.norm.weight of shape"):
        load_model(path)
    save_model(model, path, adaptation={"method": "prefix", "size": 4})
    with pytest.raises(ValueError, match=r"expected .*keys of shape \(4, 128\), found \(32, 128\)"):
        load_model(path)


def test_an_inserted_module_is_on_the_models_device():
    with torch.device("meta"):
        model = Myna(Config("tiny", "square"))
    for parameter in adapt(model, "adapter"):
        assert parameter.is_meta
    assert all(isinstance(module.down, nn.Linear) for layer in model.transformer.layers for module in layer)
