"""Stage 2 of Myna: mel power -> patches -> the tenth of them that is kept -> SimpleViT -> projector -> InfoNCE.

Comes in: segments of mel power (B, 128, 96), B of them, 128 bands by 96 frames (data.py). Goes out: one vector a segment.
While training, 43 of 48 patches are thrown away before anything is computed (section 3.2), and the loss pulls the two
views of a piece together and all other pieces away (section 3.1). Afterwards the projector is dropped, and `embed` looks at
every patch. The encoder is a plain SimpleViT (section 3.4); a hybrid model has one tokenizer for each of the two patch
shapes and shares all the rest (section 3.5).

    model = load_model("runs/demo/checkpoint.pt")
    vectors = model.embed(segments)                      # (B, 128, 96) -> (B, D), for a hybrid model (B, 2 D)
"""

import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

MEL_BANDS, FRAMES = 128, 96  # of a segment
PATCHES = {"square": (16, 16), "vertical": (128, 2)}  # mel bands x frames; both make N = 48 patches of P = 256 values
SIZES = {  # width D, depth, heads, width of the feed-forward layer
    "tiny": (128, 3, 2, 512),  # the demo's, 0.7 M parameters
    "vit-s": (384, 12, 6, 1536),  # the paper's (section 3.4), 22 M
    "vit-b": (768, 12, 12, 3072),  # the paper's later version's, 85 M
}

# ----------------------------------------------------------------------------------------------------------------------
# Patches, and which of them are kept
# ----------------------------------------------------------------------------------------------------------------------


def patchify(mel, patch):
    """Cut (B, 128, T) into patches: (B, N, P), for a name in PATCHES or a (bands, frames) pair.

    The order is frequency-major, both of the patches (low bands first, there from left to right) and inside a patch.
    """
    height, width = PATCHES.get(patch, patch)
    batch, bands, frames = mel.shape
    grid = mel.reshape(batch, bands // height, height, frames // width, width)
    return grid.transpose(2, 3).reshape(batch, -1, height * width)  # (B, rows, columns, height, width) -> (B, N, P)


def unpatchify(patches, patch):
    """The inverse of `patchify` for segments of 128 bands: (B, N, P) -> (B, 128, T)."""
    height, width = PATCHES.get(patch, patch)
    grid = patches.reshape(len(patches), MEL_BANDS // height, -1, height, width)
    return grid.transpose(2, 3).reshape(len(patches), MEL_BANDS, -1)


def keep_tokens(batch, n_tokens, mask_ratio, generator=None, device=None):
    """Which tokens survive masking: (B, K) long, K = N - int(mask_ratio N) distinct positions, each set equally likely.

    The largest K of N random numbers are a fair draw without replacement, for all rows at once. Raises ValueError
    for a ratio that keeps nothing or is negative.
    """
    kept = n_tokens - int(mask_ratio * n_tokens) if 0 <= mask_ratio < 1 else 0
    if not kept:
        raise ValueError(f"a mask ratio of {mask_ratio}: it must be at least 0 and below 1, so that some of {n_tokens} tokens are kept")
    return torch.rand(batch, n_tokens, generator=generator, device=device).topk(kept, dim=1).indices


def sincos_2d(height, width, dim):
    """Fixed position embedding of a grid: (height * width, dim), rows in the order of `patchify`.

    A quarter of the columns each: sin(x w), cos(x w), sin(y w), cos(y w), with x the time and y the frequency index and w
    falling geometrically from 1 to 1/10000 (SimpleViT; Beyer et al. 2022). `dim` is a multiple of 4, at least 8.
    """
    if dim % 4 or dim < 8:
        raise ValueError(f"a position embedding of width {dim}: it must be a multiple of 4, at least 8")
    omega = 10_000 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4 - 1))
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    y, x = y.reshape(-1, 1) * omega, x.reshape(-1, 1) * omega  # (N, dim / 4)
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=1).float()


# ----------------------------------------------------------------------------------------------------------------------
# SimpleViT. The modules are named as in the authors' released files, so that those load as they are.
# ----------------------------------------------------------------------------------------------------------------------


def attention_of_few(q, k, v):
    """softmax(q k' / sqrt(d)) v for the few tokens that masking leaves, (B, heads, K, d) each, on a GPU.

    Fused attention works on tiles of 64 tokens and more, nearly all of it idle for 5; torch.compile makes these sums one pass
    over q, k and v.
    """
    weights = (q[..., :, None, :] * k[..., None, :, :]).sum(dim=-1) * q.shape[-1] ** -0.5  # (B, heads, K, K)
    return (weights.softmax(dim=-1)[..., None] * v[..., None, :, :]).sum(dim=-2)


class Attention(nn.Module):
    """Multi-head self-attention, LayerNorm in front, no biases in its two linear layers: (B, K, D) -> (B, K, D)."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(dim)
        self.to_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.to_out = nn.Linear(dim, dim, bias=False)

    def forward(self, x):
        qkv = self.to_qkv(self.norm(x))  # (B, K, 3 D)
        q, k, v = qkv.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, heads, K, D / heads)
        few = q.is_cuda and x.shape[1] <= 8
        out = attention_of_few(q, k, v) if few else F.scaled_dot_product_attention(q, k, v)
        return self.to_out(out.transpose(1, 2).flatten(2))  # (B, K, D)


class FeedForward(nn.Module):
    """Two linear layers with an exact GELU between them and the LayerNorm in front: (B, K, D) -> (B, K, D)."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.net = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(self, x):
        return self.net(x)


class Transformer(nn.Module):
    """`depth` pairs of attention and feed-forward, each added to what came in, and a last LayerNorm."""

    def __init__(self, dim, depth, heads, hidden):
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleList([Attention(dim, heads), FeedForward(dim, hidden)]) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)

    def forward(self, x):
        for attention, feed_forward in self.layers:
            x = x + attention(x)
            x = x + feed_forward(x)
        return self.norm(x)


# ----------------------------------------------------------------------------------------------------------------------
# Myna
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """What a model is built from; every checkpoint holds it as a plain dict. Raises ValueError for unknown names."""

    size: str = "vit-s"  # a name in SIZES
    patch: str = "hybrid"  # "square", "vertical", or "hybrid": both
    projection: int = 128  # width of the vectors that are contrasted; not published, SimCLR's choice
    log_mel: bool = False  # log(1 + power) in front of the tokenizer; off in the released models

    def __post_init__(self):
        if self.size not in SIZES:
            raise ValueError(f"size {self.size!r}: it must be one of {', '.join(SIZES)}")
        if self.patch not in (*PATCHES, "hybrid"):
            raise ValueError(f"patch {self.patch!r}: it must be one of {', '.join(PATCHES)}, hybrid")


class Myna(nn.Module):
    """Tokenizers (one for each patch shape in use), the shared encoder, and the projector."""

    def __init__(self, config=Config()):
        super().__init__()
        self.config = config
        dim, depth, heads, hidden = SIZES[config.size]
        self.patches = tuple(PATCHES) if config.patch == "hybrid" else (config.patch,)
        self.to_patch_embedding = nn.ModuleDict()
        for patch in self.patches:
            height, width = PATCHES[patch]
            values = height * width  # P
            self.to_patch_embedding[patch] = nn.Sequential(nn.LayerNorm(values), nn.Linear(values, dim), nn.LayerNorm(dim))
            position = sincos_2d(MEL_BANDS // height, FRAMES // width, dim)
            self.register_buffer(f"position_{patch}", position, persistent=False)  # (N, D); made anew, never stored
        self.transformer = Transformer(dim, depth, heads, hidden)
        self.projector = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, config.projection))

    def encode(self, mel, patch, kept=None):
        """Mean of the encoder's output tokens: (B, 128, 96) -> (B, D), from the patches `kept` (B, K) or from all."""
        if mel.shape[1:] != (MEL_BANDS, FRAMES):
            raise ValueError(f"expected segments (B, {MEL_BANDS}, {FRAMES}), found {tuple(mel.shape)}: data.segments cuts them")
        patches = patchify(mel, patch)  # (B, N, P)
        position = getattr(self, f"position_{patch}")  # (N, D)
        if kept is not None:  # mask first, work later: nothing below sees a dropped patch
            patches = patches[torch.arange(len(kept), device=kept.device)[:, None], kept]  # (B, K, P)
            position = position[kept]  # (B, K, D)
        patches = patches.float()  # the corpus is float16; its squares would not fit
        if self.config.log_mel:
            patches = patches.log1p()
        tokens = self.to_patch_embedding[patch](patches) + position  # (B, K, D)
        return self.transformer(tokens).mean(dim=1)

    def forward(self, mel, patch, mask_ratio=0.9, kept=None):
        """A training view: (B, 128, 96) -> (B, projection), seeing (1 - mask_ratio) of the patches, drawn for each row.

        `kept` (B, K) names the patches to see instead (train.py draws them from its own generator).
        """
        if kept is None:
            n_tokens = getattr(self, f"position_{patch}").shape[0]
            kept = keep_tokens(len(mel), n_tokens, mask_ratio, device=mel.device)
        return self.projector(self.encode(mel, patch, kept))

    @torch.no_grad()
    def embed(self, mel, patch=None):
        """Features of segments for use elsewhere: (B, 128, 96) -> (B, D), every patch seen, projector dropped.

        A hybrid model gives the vectors of its square and vertical patches side by side, (B, 2 D), or, with `patch`, one.
        """
        if patch not in (None, *self.patches):
            raise ValueError(f"this model knows {' and '.join(self.patches)} patches, not {patch!r}")
        return torch.cat([self.encode(mel, p) for p in ((patch,) if patch else self.patches)], dim=1)


# ----------------------------------------------------------------------------------------------------------------------
# The loss
# ----------------------------------------------------------------------------------------------------------------------


BLOCK = 2**28  # entries of the similarity matrix that are held at once, a gigabyte: all of it up to 8,192 pairs


def similarities(z1, z2, rows=slice(None)):
    """Cosine similarity of every view with every other: (B, d) twice -> (2B, 2B) float32, or only some `rows` of it.

    No view is compared with itself: there it says -inf.
    """
    z = F.normalize(torch.cat([z1, z2]).float(), dim=1)
    own = torch.arange(len(z), device=z.device)[rows, None]
    with torch.autocast(z.device.type, enabled=False):  # bfloat16 would round 1.000 and 0.999 to the same number
        return (z[rows] @ z.T).scatter_(1, own, -torch.inf)


def anchor_losses(z1, z2, temperature=0.1, decoupled=False, rows=slice(None)):
    """The loss of each view as an anchor, (2B,) in nats, and whether its partner is the nearest of all views, (2B,) bool.

    With s(a, b) the cosine similarity over the temperature and a' the other view of a's piece, the loss of an anchor a is

        -log  exp s(a, a') / sum over b of exp s(a, b)

    NT-Xent (SimCLR; the default):        b runs over all views but a itself, 2B - 1 of them; knowing nothing costs ln(2B - 1)
    decoupled (as section 3.1 prints it): b runs over all views of the other pieces, 2B - 2, so a' is missing below the line

    There are two because the paper prints the second, with [j != i], and says that it uses SimCLR's, which is the first. The
    printed sum has only the views z(1) as anchors; here both views are, in both forms.
    """
    logits = similarities(z1, z2, rows) / temperature  # (2B, 2B)
    partner = torch.arange(2 * len(z1), device=z1.device).roll(len(z1))[rows]  # where a' is: (2B,)
    nearest = logits.detach().argmax(dim=1) == partner
    positive = logits.gather(1, partner[:, None])  # (2B, 1)
    if decoupled:
        logits = logits.scatter(1, partner[:, None], -torch.inf)
    return (logits.logsumexp(dim=1, keepdim=True) - positive).squeeze(1), nearest


def contrast(z1, z2, temperature=0.1, decoupled=False):
    """The contrastive loss of B pairs of views (B, d), and the share of views whose partner is the nearest: two scalars.

    A similarity matrix of more than BLOCK entries is never held as a whole, but made so many rows at a time, and once more in
    the backward pass. Raises ValueError for a single pair.
    """
    if len(z1) < 2:
        raise ValueError("the contrastive loss needs at least two pairs: with one there is nothing to push away")
    size = max(1, BLOCK // (2 * len(z1)))
    blocks = [slice(first, first + size) for first in range(0, 2 * len(z1), size)]
    if len(blocks) == 1:
        losses, nearest = anchor_losses(z1, z2, temperature, decoupled)
    else:
        parts = [checkpoint(anchor_losses, z1, z2, temperature, decoupled, rows, use_reentrant=False) for rows in blocks]
        losses, nearest = map(torch.cat, zip(*parts))
    return losses.mean(), nearest.float().mean()


def info_nce(z1, z2, temperature=0.1, decoupled=False):
    """The contrastive loss of B pairs of views (B, d): a scalar in nats, the mean of `anchor_losses` over all 2B views."""
    return contrast(z1, z2, temperature, decoupled)[0]


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints
# ----------------------------------------------------------------------------------------------------------------------


def save_model(model, path, **extra):
    """Write the model's settings and weights, and whatever plain values or tensors `extra` holds, beside `path`; then rename.

    Raises OSError when it cannot be written; what was at `path` is then still there.
    """
    beside = Path(f"{path}.part")
    try:
        with open(beside, "wb") as file:
            torch.save({"config": asdict(model.config), "model": model.state_dict(), **extra}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except (OSError, RuntimeError) as error:
        beside.unlink(missing_ok=True)
        raise OSError(f"{path} could not be written ({error})") from error


def read_checkpoint(path):
    """The dict in a checkpoint file, read so that a crafted file cannot run code. Raises ValueError for other files."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"{path}: there is no such checkpoint") from None
    except Exception as error:  # the reader meets a foreign or damaged file with whatever error it stumbles over
        expected = "tensors and plain values as torch.save writes them"
        raise ValueError(f"{path}: expected {expected}, found another kind of file, or one that is cut short") from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path}: expected a dict of weights, found a {type(checkpoint).__name__}")
    return checkpoint


def _released(weights, path, patch):
    """The authors' released state dict -> its Config, and the weights under this file's names."""
    if "projector.0.weight" in weights:
        raise ValueError(f"{path}: expected a checkpoint with its settings, found bare weights; write it with save_model")
    try:
        dim = len(weights["transformer.norm.weight"])
        depth = len({name.split(".")[2] for name in weights if name.startswith("transformer.layers.")})
        size = {SIZES[size][:2]: size for size in SIZES}[dim, depth]
    except (KeyError, TypeError):
        found = ", ".join(map(str, list(weights)[:3])) or "nothing"
        expected = "a checkpoint of train.py or a released Myna of a known size"
        raise ValueError(f"{path}: expected {expected}, found a dict of {found}, ...") from None
    hybrid = any(name.startswith("to_patch_embedding_b.") for name in weights)
    if not hybrid and patch is None:
        unknown = "a released model with one tokenizer, and the file does not tell the shape of its patches"
        raise ValueError(f"{path}: {unknown}; say patch='square' or patch='vertical' (--patch on a command line)")
    shapes = {"to_patch_embedding": "square" if hybrid else patch, "to_patch_embedding_b": "vertical"}
    for name in list(weights):  # their tokenizers begin with a module that only reshapes; here that is `patchify`
        tokenizer, number, *rest = name.split(".")
        if tokenizer in shapes:
            weights[".".join(["to_patch_embedding", shapes[tokenizer], str(int(number) - 1), *rest])] = weights[name]
    return Config(size, "hybrid" if hybrid else patch), weights


def load_model(path, patch=None):
    """A model, ready to embed, from a checkpoint of train.py or one of the authors' released files.

    A released file with one tokenizer does not tell the shape of its patches, so `patch` must; released files hold no
    projector, so theirs is left as initialised. Raises ValueError, saying what was expected and what was found.
    """
    checkpoint = read_checkpoint(path)
    released = not {"config", "model"} <= checkpoint.keys()
    try:
        if released:
            config, weights = _released(checkpoint, path, patch)
        else:
            config, weights = Config(**checkpoint["config"]), checkpoint["model"]
    except TypeError as error:
        expected = ", ".join(asdict(Config()))
        raise ValueError(f"{path}: expected the settings {expected}, found {checkpoint['config']}") from error
    if patch not in (None, config.patch):
        raise ValueError(f"{path}: expected a model with {patch} patches, found one with {config.patch} patches")
    model = Myna(config)
    state = model.state_dict()
    for name in state:
        found = weights.get(name)
        if found is not None and found.shape == state[name].shape:
            state[name] = found
        elif not (released and name.startswith("projector.")):
            shape = "nothing" if found is None else tuple(found.shape)
            raise ValueError(f"{path}: expected {name} of shape {tuple(state[name].shape)}, found {shape}")
    model.load_state_dict(state)
    return model.eval()
