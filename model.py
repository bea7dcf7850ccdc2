"""Stage 2 of Myna: mel power -> patches -> 10% of them -> SimpleViT -> projector -> InfoNCE.

Input: B segments of mel power, (B, 128, 96), that data.py makes. Output: one vector for each segment.

In training, 43 of a segment's 48 patches are dropped before anything is computed (section 3.2 of the paper).
The loss pulls the two views of a clip together and pushes all other clips away (section 3.1). After training
the projector is dropped, and `embed` uses every patch. The encoder is a SimpleViT (section 3.4); a hybrid
model has a tokenizer for each patch shape (section 3.5). README.md lists all differences from the paper.

    model = load_model("runs/demo/checkpoint.pt")
    vectors = model.embed(segments)  # (B, 128, 96) -> (B, D); for a hybrid model (B, 2 D)
"""

import copy
import io
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint as recompute_in_backward

MEL_BANDS, FRAMES = 128, 96  # of a segment; the authors' vertical model alone is trained on 98 frames
PATCHES = {"square": (16, 16), "vertical": (128, 2)}  # mel bands x frames
N_TOKENS, P = 48, 256  # N patches of P values make a segment, for both shapes
SIZES = {  # width D, depth, heads, width of the feed-forward layer
    "tiny": (128, 3, 2, 512),  # the demo's: 0.7 M parameters
    "vit-s": (384, 12, 6, 1536),  # the paper's (section 3.4): 22 M
    "vit-b": (768, 12, 12, 3072),  # of a later version of the paper: 85 M
}
BLOCK = 2**28  # similarities in one block: all of them for up to 8,192 pairs, 1 GB and copies of it

# --- Patches and masking -----------------------------------------------------------------------------------


def patchify(mel, patch):
    """Cut segments into patches, a name in PATCHES or a pair (bands, frames): (B, 128, T) -> (B, N, P).

    Patches, and the values in a patch, are in this order: the lowest bands from left to right, then the next.
    """
    height, width = PATCHES.get(patch, patch)
    batch, bands, frames = mel.shape
    grid = mel.reshape(batch, bands // height, height, frames // width, width)
    grid = grid.transpose(2, 3)  # (B, rows, columns, height, width)
    return grid.reshape(batch, -1, height * width)  # (B, N, P)


def unpatchify(patches, patch):
    """The inverse of `patchify` for segments of 128 bands: (B, N, P) -> (B, 128, T)."""
    height, width = PATCHES.get(patch, patch)
    grid = patches.reshape(len(patches), MEL_BANDS // height, -1, height, width)
    return grid.transpose(2, 3).reshape(len(patches), MEL_BANDS, -1)


def keep_tokens(batch, n_tokens, mask_ratio, generator=None, device=None):
    """Draw the tokens that masking keeps: (B, K) long, K = N - int(mask_ratio * N) positions in each row.

    The K largest of N random numbers are a draw without replacement. ValueError for a ratio outside [0, 1).
    """
    if not 0 <= mask_ratio < 1:
        raise ValueError(f"a mask ratio of {mask_ratio}: it must be at least 0 and less than 1")
    kept = n_tokens - int(mask_ratio * n_tokens)
    return torch.rand(batch, n_tokens, generator=generator, device=device).topk(kept, dim=1).indices


def sincos_2d(height, width, dim):
    """Fixed position embedding of a grid of patches (SimpleViT; Beyer et al. 2022): (height * width, dim).

    Columns: sin(x w), cos(x w), sin(y w), cos(y w); x is time, y frequency, and w falls from 1 to 1/10000.
    """
    omega = 10_000 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4 - 1))
    grid = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    y, x = (index.reshape(-1, 1) * omega for index in grid)  # (N, dim / 4) each
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=1).float()


# --- The model, with the module names of the authors' released files ---------------------------------------


class Attention(nn.Module):
    """Multi-head self-attention after a LayerNorm, linear layers without biases: (B, K, D) -> (B, K, D)."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(dim)
        self.to_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.to_out = nn.Linear(dim, dim, bias=False)

    def forward(self, x):
        qkv = self.to_qkv(self.norm(x))  # (B, K, 3 D)
        qkv = qkv.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (3, B, heads, K, D / heads)
        out = F.scaled_dot_product_attention(*qkv)  # (B, heads, K, D / heads)
        return self.to_out(out.transpose(1, 2).flatten(2))  # (B, K, D)


class FeedForward(nn.Module):
    """LayerNorm, then two linear layers with an exact GELU between them: (B, K, D) -> (B, K, D)."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.net = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(self, x):
        return self.net(x)


class Transformer(nn.Module):
    """`depth` pairs of attention and feed-forward, each added to its input, and a LayerNorm at the end."""

    def __init__(self, dim, depth, heads, hidden):
        super().__init__()
        pairs = [nn.ModuleList([Attention(dim, heads), FeedForward(dim, hidden)]) for _ in range(depth)]
        self.layers = nn.ModuleList(pairs)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x):
        for attention, feed_forward in self.layers:
            x = x + attention(x)
            x = x + feed_forward(x)
        return self.norm(x)


@dataclass(frozen=True)
class Config:
    """The settings of a model; a checkpoint holds them as a plain dict."""

    size: str = "vit-s"  # a name in SIZES
    patch: str = "hybrid"  # "square", "vertical", or "hybrid" for both
    projection: int = 128  # the projector is D -> D -> 128, SimCLR's choice; the authors' is not published
    log_mel: bool = False  # log(1 + power) in front of the tokenizer; off in the released models

    def __post_init__(self):
        if self.size not in SIZES:
            raise ValueError(f"size {self.size!r}: it must be one of {', '.join(SIZES)}")
        if self.patch not in (*PATCHES, "hybrid"):
            raise ValueError(f"patch {self.patch!r}: it must be one of square, vertical, hybrid (--patch)")


class Myna(nn.Module):
    """A tokenizer for each patch shape in use, the shared encoder, and the projector."""

    adaptation = None  # the modules that `adapt` inserted: {"method": name, "size": number or None}

    def __init__(self, config=Config()):
        super().__init__()
        self.config = config
        self.patches = tuple(PATCHES) if config.patch == "hybrid" else (config.patch,)
        dim, depth, heads, hidden = SIZES[config.size]
        self.to_patch_embedding = nn.ModuleDict()
        for patch in self.patches:
            height, width = PATCHES[patch]
            layers = nn.LayerNorm(P), nn.Linear(P, dim), nn.LayerNorm(dim)
            self.to_patch_embedding[patch] = nn.Sequential(*layers)
            position = sincos_2d(MEL_BANDS // height, FRAMES // width, dim)  # (N, D)
            self.register_buffer(f"position_{patch}", position, persistent=False)  # computed, so not stored
        self.transformer = Transformer(dim, depth, heads, hidden)
        self.projector = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, config.projection))

    def embed_patches(self, mel, patch, kept=None):
        """The encoder's input: (B, 128, 96), patches to keep (B, K) or None for all -> (B, K, D)."""
        if mel.shape[1:] != (MEL_BANDS, FRAMES):
            raise ValueError(f"expected segments (B, 128, 96) as of data.segments, found {tuple(mel.shape)}")
        patches = patchify(mel, patch)  # (B, N, P)
        position = getattr(self, f"position_{patch}")  # (N, D)
        if kept is not None:  # mask first: nothing below is computed for a dropped patch
            rows = torch.arange(len(kept), device=kept.device)[:, None]
            patches = patches[rows, kept]  # (B, K, P)
            position = position[kept]  # (B, K, D)
        patches = patches.float()  # a corpus is float16, the weights are float32
        if self.config.log_mel:
            patches = patches.log1p()
        return self.to_patch_embedding[patch](patches) + position  # (B, K, D)

    def tokens(self, mel, patch, kept=None):
        """The encoder's output: (B, 128, 96), patches to keep (B, K) or None for all -> (B, K, D)."""
        return self.transformer(self.embed_patches(mel, patch, kept))

    def forward(self, mel, patch, mask_ratio=0.9, kept=None):
        """The vectors that the loss compares: (B, 128, 96) -> (B, projection). By default `kept` is drawn."""
        if kept is None:
            kept = keep_tokens(len(mel), N_TOKENS, mask_ratio, device=mel.device)
        return self.projector(self.tokens(mel, patch, kept).mean(dim=1))

    @torch.no_grad()
    def embed(self, mel, patch=None):
        """The mean of all 48 tokens: (B, 128, 96) -> (B, D). Hybrid: (B, 2 D), or `patch` names one shape."""
        if patch not in (None, *self.patches):
            raise ValueError(f"this model has {' and '.join(self.patches)} patches, not {patch!r}")
        patches = self.patches if patch is None else (patch,)
        return torch.cat([self.tokens(mel, p).mean(dim=1) for p in patches], dim=1)


# --- The loss ----------------------------------------------------------------------------------------------


def info_nce(z1, z2, temperature=0.1, decoupled=False, anchors=None):
    """The contrastive loss of B pairs of views, (B, d) each: a scalar, the mean over all 2B views as anchors.

    With s(a, b) the cosine similarity over the temperature, and a' the other view of the clip of anchor a,

        loss(a) = -log( exp s(a, a') / sum over b of exp s(a, b) )

    The sum is over every view b but a: NT-Xent of SimCLR, the default. Chance level: ln(2B - 1).
    decoupled: the sum excludes a', too, as printed in section 3.1. Chance level: ln(2B - 2).
    Both views are anchors; as printed, only view 1 is. The authors' code trains with SogCLR, a moving-average
    variant. `anchors` selects some of the 2B views. Raises ValueError for a single pair.
    """
    if len(z1) < 2:
        raise ValueError("the contrastive loss needs two pairs: with one there are no negatives")
    z = F.normalize(torch.cat([z1, z2]).float(), dim=1)  # (2B, d)
    own = torch.arange(len(z), device=z.device) if anchors is None else anchors  # (A,)
    partner = (own + len(z1)) % len(z)  # (A,), the place of a'
    with torch.autocast(z.device.type, enabled=False):  # bfloat16 cannot tell 0.999 from 1
        similarity = (z[own] / temperature) @ z.T  # (A, 2B)
    positive = similarity.gather(1, partner[:, None]).squeeze(1)  # (A,)
    denominator = similarity.scatter(1, own[:, None], -torch.inf)  # a view is not compared with itself
    if decoupled:
        denominator = denominator.scatter(1, partner[:, None], -torch.inf)
    return (denominator.logsumexp(dim=1) - positive).mean()


def info_nce_in_blocks(z1, z2, temperature=0.1, decoupled=False):
    """`info_nce` in bounded memory: BLOCK similarities at once, computed again in the backward pass."""
    views = 2 * len(z1)
    blocks = torch.arange(views, device=z1.device).split(max(1, BLOCK // views))
    if len(blocks) == 1:
        return info_nce(z1, z2, temperature, decoupled)
    arguments = z1, z2, temperature, decoupled
    losses = [recompute_in_backward(info_nce, *arguments, block, use_reentrant=False) for block in blocks]
    return sum(loss * len(block) for loss, block in zip(losses, blocks)) / views


@torch.no_grad()
def retrieval_accuracy(z1, z2):
    """Share of the 2B views whose most similar view is their partner (top-1): (B, d) twice -> scalar."""
    z = F.normalize(torch.cat([z1, z2]).float(), dim=1)  # (2B, d)
    correct = 0
    for own in torch.arange(len(z), device=z.device).split(max(1, BLOCK // len(z))):
        similarity = (z[own] @ z.T).scatter(1, own[:, None], -torch.inf)
        correct = correct + (similarity.argmax(dim=1) == (own + len(z1)) % len(z)).sum()
    return correct / len(z)


def spread(z):
    """The standard deviation of vectors scaled to length 1: (n, d) -> scalar, from 0 (a collapse) to 1."""
    return F.normalize(z.float(), dim=1).var(dim=0, correction=0).sum().sqrt()


# --- Checkpoints -------------------------------------------------------------------------------------------


def save_model(model, path, **extra):
    """Write a checkpoint: the model's config and weights, and the plain values or tensors in `extra`.

    It is written beside `path` and renamed. If that fails: OSError with the cause, `path` is unchanged.
    """
    contents = io.BytesIO()  # torch's own writer does not tell a full disk from other errors
    settings = {"config": asdict(model.config), "adaptation": model.adaptation}
    torch.save({**settings, "model": model.state_dict(), **extra}, contents)
    part = Path(f"{path}.part")
    try:
        part.write_bytes(contents.getbuffer())
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise OSError(f"{path} could not be written: {error.strerror}") from error


def read_checkpoint(path):
    """The dict in a checkpoint file, read so that no code in it is run. ValueError for other files."""
    try:
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except FileNotFoundError:
        raise ValueError(f"{path}: there is no such checkpoint") from None
    except (PermissionError, MemoryError):
        raise
    except Exception as error:  # torch raises many kinds of error for foreign and damaged files
        raise ValueError(f"{path}: this is not a checkpoint, or one that is cut short") from error


def load_model(path, patch=None):
    """A model, ready to embed, from a checkpoint of train.py or from one of the authors' released files.

    A released file with one tokenizer does not tell the shape of its patches, so `patch` must name it.
    Released files hold no projector: it stays random. Raises ValueError for a file that does not fit.
    """
    contents = read_checkpoint(path)
    try:
        if "config" not in contents:
            contents = _from_released(contents, patch)
        model, weights = Myna(Config(**contents["config"])), contents["model"]
        if patch not in (None, model.config.patch):
            raise ValueError(f"it has {model.config.patch} patches, not {patch}")
        if contents.get("adaptation"):
            adapt(model, **contents["adaptation"])
        for name, module in model.named_modules():
            if f"{name}.bias" in weights and module.bias is None:  # `merge` gave it one
                module.bias = nn.Parameter(weights[f"{name}.bias"])
        missing = model.load_state_dict(weights, strict=False).missing_keys
        if any(not name.startswith("projector.") for name in missing):
            raise ValueError(f"{missing[0]} is missing")
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} cannot be loaded: {' '.join(str(error).split())[:300]}") from error
    return model.eval()


def _from_released(weights, patch):
    """The authors' state dict in the form that `save_model` writes."""
    width = len(weights.get("transformer.norm.weight", ""))
    size = next((size for size in SIZES if SIZES[size][0] == width), None)
    if size is None:
        raise ValueError("it is neither a checkpoint of train.py nor a released model")
    if "to_patch_embedding_b.1.weight" in weights:
        patch = "hybrid"
    shapes = PATCHES if patch == "hybrid" else [patch]
    for shape, theirs in zip(shapes, ("to_patch_embedding", "to_patch_embedding_b")):
        for number in (0, 1, 2):  # one higher in their files, where module 0 only reshapes
            for kind in ("weight", "bias"):
                ours = f"to_patch_embedding.{shape}.{number}.{kind}"
                weights[ours] = weights.get(f"{theirs}.{number + 1}.{kind}")
    return {"config": {"size": size, "patch": patch}, "model": weights}


# --- Other objectives: python train.py --objective NAME ----------------------------------------------------
# Two views (contrast, byol, clustering, barlow, vicreg): both see 5 of 48 patches. Formulas and widths are
# those of arXiv 2404.09177, with D for its 1024. Its heads have BatchNorm, which mixes the segments of a
# batch; these have LayerNorm.
# Hidden patches (mae, data2vec, hubert): a light decoder predicts something at the patches that the encoder
# does not see, as in MAE and data2vec 2.0. music2vec and musicHuBERT (arXiv 2307.05161) have no decoder:
# their encoder sees a mask embedding in the place of each hidden patch.
# R is the number of segments in one call, B that of pairs in the batch, K that of kept patches.


class Objective(nn.Module):
    """What all objectives share. `forward` computes each segment independently: a batch can be split.

    forward: segments (R, 128, 96), kept (R, K) -> outputs for `loss` (R, ...), vectors for the log (R, d)
    loss: outputs of both views of the batch (2, B, ...), progress of the run from 0 to 1 -> scalar
    """

    two_views = True  # whether rows i of both views are a pair
    mask = 0.9  # default mask ratio
    patches = (*PATCHES, "hybrid")  # the patch shapes that it can be used with
    scheduled = False  # whether anything depends on the progress of the run

    def __init__(self, model, settings):
        super().__init__()
        self.model, self.settings = model, settings  # the settings of train.py
        self.dim = SIZES[model.config.size][0]

    def prepare(self, mel, generator):
        """Called when a run begins, with some segments of the corpus."""

    def update(self, progress):
        """Called after each step, for what is not learned by gradient."""


class Contrast(Objective):
    """Myna's own objective (section 3.1): `info_nce` of the projections of two views."""

    def forward(self, mel, patch, kept):
        z = self.model(mel, patch, kept=kept)  # (R, projection)
        return z, z.detach()

    def loss(self, outputs, progress):
        return info_nce_in_blocks(*outputs, self.settings.temperature, self.settings.decoupled)


def make_head(*widths):
    """Linear layers without biases, with LayerNorm and ReLU between them: (R, a) -> (R, z)."""
    layers = []
    for a, b in zip(widths, widths[1:]):
        layers += [nn.Linear(a, b, bias=False), nn.LayerNorm(b), nn.ReLU()]
    return nn.Sequential(*layers[:-2])


class TeacherObjective(Objective):
    """What byol and clustering share: a head, and a teacher, a moving average of encoder and head."""

    scheduled = True

    def __init__(self, model, settings, *widths):
        super().__init__(model, settings)
        self.head = make_head(*(int(self.dim * width) for width in widths))
        self.predictor = nn.Identity()
        self.teacher = copy.deepcopy(nn.ModuleList([model, self.head])).requires_grad_(False)

    def forward(self, mel, patch, kept):
        z = self.head(self.model.tokens(mel, patch, kept).mean(dim=1))  # (R, d)
        model, head = self.teacher
        target = head(model.tokens(mel, patch, kept).mean(dim=1))  # (R, d), without gradient
        return torch.stack([self.predictor(z), target], dim=1), z.detach()  # (R, 2, d)

    def update(self, progress):
        momentum = 1 - 0.004 * (1 + math.cos(math.pi * progress)) / 2  # from 0.996 to 1 (Grill et al. 2020)
        move_teacher(self.teacher, nn.ModuleList([self.model, self.head]), momentum)


@torch.no_grad()
def move_teacher(teacher, student, momentum):
    """teacher <- momentum * teacher + (1 - momentum) * student, for every weight of two equal modules."""
    for slow, fast in zip(teacher.parameters(), student.parameters()):
        slow.lerp_(fast, 1 - momentum)


class Byol(TeacherObjective):
    """BYOL (Grill et al. 2020): predict the teacher's vector of the other view. There are no negatives.

        loss = 2 - 2 cos(predictor(student(view 1)), teacher(view 2)), and with the views exchanged
    """

    def __init__(self, model, settings):
        super().__init__(model, settings, 1, 1, 1, 2)
        self.predictor = make_head(2 * self.dim, self.dim // 4, 2 * self.dim)

    def loss(self, outputs, progress):
        prediction, target = outputs.float().unbind(dim=2)  # (2, B, 2 D) each
        target = target.detach().flip(0)  # of the other view
        return (2 - 2 * F.cosine_similarity(prediction, target, dim=-1)).mean()


class Clustering(TeacherObjective):
    """Clustering in DINO's form (Caron et al. 2021): predict the teacher's soft cluster of the other view.

        loss = -sum of t log s, and with the views exchanged, over 4 D clusters, where
        s = softmax(student(view 1) / 0.1),  t = softmax((teacher(view 2) - centre) / tau)

    Adapted: tau rises from 0.02 to 0.04 in the first tenth of the run, not in the first epochs.
    """

    def __init__(self, model, settings):
        super().__init__(model, settings, 1, 1, 1, 1 / 4, 4)
        self.register_buffer("centre", torch.zeros(4 * self.dim))  # a moving average of the teacher's outputs
        self.means = []  # of the teacher's outputs in this step, one for each patch shape

    def loss(self, outputs, progress):
        student, teacher = outputs.float().unbind(dim=2)  # (2, B, 4 D) each
        teacher = teacher.detach().flip(0)  # of the other view
        self.means.append(teacher.mean(dim=(0, 1)))
        tau = 0.02 + 0.02 * min(1, 10 * progress)  # small, against a collapse to uniform targets
        target = ((teacher - self.centre) / tau).softmax(dim=-1)  # the centre: against one cluster for all
        return -(target * (student / 0.1).log_softmax(dim=-1)).sum(dim=-1).mean()

    def update(self, progress):
        super().update(progress)
        self.centre.lerp_(torch.stack(self.means).mean(dim=0), 0.1)
        self.means.clear()


def off_diagonal(matrix):
    """The entries of a square matrix outside its diagonal."""
    return matrix[~torch.eye(len(matrix), dtype=torch.bool, device=matrix.device)]


class Barlow(Objective):
    """Barlow Twins (Zbontar et al. 2021): each dimension equal in both views, uncorrelated with others.

        C = a^T b / B, with the vectors a and b of both views, each dimension standardised over the batch
        loss = mean over the diagonal of (1 - C)^2 + mean of C^2 outside the diagonal (there: sums)
    """

    def __init__(self, model, settings):
        super().__init__(model, settings)
        self.head = make_head(self.dim, self.dim, self.dim, 2 * self.dim)

    def forward(self, mel, patch, kept):
        z = self.head(self.model.tokens(mel, patch, kept).mean(dim=1))  # (R, 2 D)
        return z, z.detach()

    def loss(self, outputs, progress):
        z = outputs.float()
        z = z - z.mean(dim=1, keepdim=True)
        a, b = z / (z.square().mean(dim=1, keepdim=True) + 1e-5).sqrt()  # (B, 2 D) each
        correlation = a.T @ b / len(a)  # (2 D, 2 D)
        return (1 - correlation.diagonal()).square().mean() + off_diagonal(correlation).square().mean()


class Vicreg(Barlow):
    """VICReg (Bardes et al. 2022): equal vectors for both views; spread out, uncorrelated dimensions.

        loss = mean (a - b)^2 + mean relu(1 - sqrt(var + 1e-5)) + mean of cov^2 outside the diagonal
    """

    def loss(self, outputs, progress):
        a, b = outputs.float()  # (B, 2 D) each
        loss = (a - b).square().mean()
        for z in (a, b):  # the three terms have equal weights; the original's are 25, 25, 1
            covariance = z.T.cov()  # (2 D, 2 D)
            std = (covariance.diagonal() + 1e-5).sqrt()
            loss = loss + F.relu(1 - std).mean() / 2 + off_diagonal(covariance).square().mean() / 2
        return loss


class MaskedAutoencoder(Objective):
    """MAE (He et al. 2022; section 4.6): predict the hidden patches themselves.

        loss = mean over the hidden patches of (prediction - target)^2, target = log(1 + power)

    With --target patch each target is normalised, as in MAE's paper: the tokenizer's LayerNorm removes a
    patch's level, so that the level of a hidden patch is hard to predict.
    """

    two_views = False  # both segments of a clip are used, but not compared
    mask = 0.75  # MAE's; the Myna paper does not state its own

    def __init__(self, model, settings, width=256):
        super().__init__(model, settings)
        dim, depth, heads, hidden = SIZES[model.config.size]
        self.mask_token = nn.Parameter(torch.randn(dim))  # in the place of each hidden patch
        self.decoder = Transformer(dim, min(4, depth), heads, hidden)
        self.to_prediction = nn.Linear(dim, width)

    def predict(self, mel, patch, kept):
        """Predictions at all patches (R, N, width), and the encoder's tokens of the kept ones (R, K, D)."""
        visible = self.model.tokens(mel, patch, kept)
        masked = (self.mask_token + getattr(self.model, f"position_{patch}")).expand(len(mel), -1, -1)
        sequence = masked.scatter(1, kept[..., None].expand_as(visible), visible.to(masked.dtype))
        return self.to_prediction(self.decoder(sequence)), visible

    def error(self, prediction, mel, patch):
        """How wrong each prediction is: (R, N, width) -> (R, N)."""
        target = patchify(mel, patch).float().log1p()  # as in the authors' code
        if self.settings.target == "patch":
            target = F.layer_norm(target, target.shape[-1:], eps=1e-6)
        return (prediction - target).square().mean(dim=-1)

    def forward(self, mel, patch, kept):
        prediction, visible = self.predict(mel, patch, kept)
        error = self.error(prediction.float(), mel, patch)  # (R, N)
        is_hidden = torch.ones_like(error).scatter(1, kept, 0)
        return (error * is_hidden).sum(dim=1) / is_hidden.sum(dim=1), visible.mean(dim=1).detach()

    def loss(self, outputs, progress):
        return outputs.mean()


class Data2vec(MaskedAutoencoder):
    """data2vec (Baevski et al. 2022; music2vec): predict a teacher's features of the hidden patches.

        loss = mean over the hidden patches of sum over D of (prediction - target)^2 / sqrt(D)
    """

    mask = 0.65  # music2vec's
    scheduled = True

    def __init__(self, model, settings):
        super().__init__(model, settings, width=SIZES[model.config.size][0])
        self.teacher = copy.deepcopy(nn.ModuleList([model])).requires_grad_(False)

    def targets(self, mel, patch):
        """The mean of what the feed-forwards of its top layers (8 of 12) add: (R, 128, 96) -> (R, N, D)."""
        x, features = self.teacher[0].embed_patches(mel, patch), []
        for attention, feed_forward in self.teacher[0].transformer.layers:
            x = x + attention(x)
            added = feed_forward(x)
            x = x + added
            features.append(F.instance_norm(added.float().mT).mT)  # each channel over the segment's patches
        return torch.stack(features[-(2 * len(features) // 3) :]).mean(dim=0)

    def error(self, prediction, mel, patch):
        return (prediction - self.targets(mel, patch)).square().sum(dim=-1) / self.dim**0.5

    def update(self, progress):
        move_teacher(self.teacher, nn.ModuleList([self.model]), 0.999 + 0.0009 * progress)


class Hubert(MaskedAutoencoder):
    """HuBERT (Hsu et al. 2021; musicHuBERT): predict the MFCC cluster of the hidden patches.

        loss = -log softmax(cos(prediction, embedding of each cluster) / 0.1), of the patch's cluster
    """

    mask = 0.65  # musicHuBERT's
    patches = ("vertical",)

    def __init__(self, model, settings):
        super().__init__(model, settings)
        self.embedding = nn.Parameter(torch.randn(settings.clusters, 256))  # of each cluster
        self.register_buffer("centroids", torch.zeros(settings.clusters, 39))
        self.register_buffer("scale", torch.ones(39))  # standard deviation of each MFCC value

    def prepare(self, mel, generator):
        mfcc = mfcc_of_patches(mel.cpu()).flatten(0, 1)  # (R * N, 39)
        mfcc = mfcc[torch.randperm(len(mfcc), generator=generator)[:20_000]]
        self.scale.copy_(mfcc.std(dim=0).clamp(min=1e-6))
        self.centroids.copy_(k_means(mfcc / self.scale.cpu(), len(self.centroids), generator))

    def clusters(self, mel):
        """The cluster of each patch: (R, 128, 96) -> (R, 48) long."""
        with torch.autocast(mel.device.type, enabled=False):  # differences of MFCC are lost in bfloat16
            return torch.cdist(mfcc_of_patches(mel) / self.scale, self.centroids).argmin(dim=-1)

    def error(self, prediction, mel, patch):
        scores = F.normalize(prediction, dim=-1) @ F.normalize(self.embedding, dim=-1).T / 0.1  # cosines
        return F.cross_entropy(scores.transpose(1, 2), self.clusters(mel), reduction="none")


def mfcc_of_patches(mel):
    """13 MFCC and their first and second differences, of vertical patches: (R, 128, 96) -> (R, 48, 39)."""
    k = torch.arange(13.0, device=mel.device)[:, None]
    n = torch.arange(MEL_BANDS, device=mel.device)
    dct = torch.cos(torch.pi / MEL_BANDS * (n + 0.5) * k) * (2 / MEL_BANDS) ** 0.5  # DCT-II, (13, 128)
    dct[0] /= 2**0.5  # orthonormal
    mfcc = dct @ mel.float().clamp(min=1e-6).log()  # (R, 13, 96)
    first = mfcc.diff(prepend=mfcc[..., :1])
    second = first.diff(prepend=first[..., :1])
    frames = torch.cat([mfcc, first, second], dim=1)  # (R, 39, 96)
    return frames.unflatten(2, (-1, 2)).mean(dim=3).transpose(1, 2)


def k_means(points, k, generator, iterations=50):
    """Centroids (k, d) of points (n, d): Lloyd's algorithm, k-means++ start (Arthur, Vassilvitskii 2007)."""
    centroids, distance = points[:1], torch.full((len(points),), torch.inf)
    for _ in range(k - 1):  # the next one is a point, drawn in proportion to its squared distance
        distance = torch.minimum(distance, (points - centroids[-1]).square().sum(dim=1))
        drawn = torch.multinomial(distance + 1e-12, 1, generator=generator)
        centroids = torch.cat([centroids, points[drawn]])
    for _ in range(iterations):  # each becomes the mean of its points; one without points stays
        rows = torch.cdist(points, centroids).argmin(dim=1)[:, None].expand_as(points)
        centroids = centroids.scatter_reduce(0, rows, points, "mean", include_self=False)
    return centroids


OBJECTIVES = {"contrast": Contrast, "byol": Byol, "clustering": Clustering, "barlow": Barlow}
OBJECTIVES |= {"vicreg": Vicreg, "mae": MaskedAutoencoder, "data2vec": Data2vec, "hubert": Hubert}


# --- Adaptation: python probe.py --adapt METHOD ------------------------------------------------------------
# Each method trains some parameters, or new modules around others. Methods and settings: arXiv 2411.19371.


class Lora(nn.Module):
    """LoRA (Hu et al. 2022): a change of low rank to a linear layer, W x + b + B A x. B starts at zero."""

    def __init__(self, linear, rank):
        super().__init__()
        self.linear = linear
        self.a = nn.Linear(linear.in_features, rank, bias=False)  # Kaiming, torch's default
        self.b = nn.Linear(rank, linear.out_features, bias=False)
        nn.init.zeros_(self.b.weight)

    def forward(self, x):
        return self.linear(x) + self.b(self.a(x))


class Ssf(nn.Module):
    """SSF (Lian et al. 2022): scale and shift each output of a linear layer, gamma (W x + b) + beta."""

    def __init__(self, linear, size):  # it has no size
        super().__init__()
        self.linear = linear
        self.gamma = nn.Parameter(1 + 0.02 * torch.randn(linear.out_features))
        self.beta = nn.Parameter(0.02 * torch.randn(linear.out_features))

    def forward(self, x):
        return self.gamma * self.linear(x) + self.beta


class Adapter(nn.Module):
    """Adapter (Houlsby et al. 2019): attention or feed-forward y becomes y + W_up GELU(W_down y)."""

    def __init__(self, sublayer, bottleneck):
        super().__init__()
        self.sublayer = sublayer
        norm = next(module for module in sublayer.modules() if isinstance(module, nn.LayerNorm))
        norm.requires_grad_()  # trained, too
        self.down = nn.Linear(len(norm.weight), bottleneck)
        self.up = nn.Linear(bottleneck, len(norm.weight))
        for parameter in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(parameter)

    def forward(self, x):
        y = self.sublayer(x)
        return y + self.up(F.gelu(self.down(y)))


class Prefix(nn.Module):
    """Prefix tuning (Li and Liang 2021; here without MLP): learned keys and values before those of tokens."""

    def __init__(self, attention, tokens):
        super().__init__()
        self.attention = attention
        self.keys = nn.Parameter(0.02 * torch.randn(tokens, attention.to_out.in_features))
        self.values = nn.Parameter(0.02 * torch.randn(tokens, attention.to_out.in_features))

    def forward(self, x):
        q, k, v = self.attention.to_qkv(self.attention.norm(x)).chunk(3, dim=2)  # (B, K, D) each
        k = torch.cat([self.keys.expand(len(x), -1, -1), k], dim=1)  # (B, tokens + K, D)
        v = torch.cat([self.values.expand(len(x), -1, -1), v], dim=1)
        q, k, v = (part.unflatten(2, (self.attention.heads, -1)).transpose(1, 2) for part in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v)  # (B, heads, K, D / heads)
        return self.attention.to_out(out.transpose(1, 2).flatten(2))  # (B, K, D)


class Prompt(nn.Module):
    """Prompt tuning (Lester et al. 2021): learned tokens before the sequence; their outputs are dropped."""

    def __init__(self, transformer, tokens):
        super().__init__()
        self.transformer = transformer
        self.tokens = nn.Parameter(0.02 * torch.randn(tokens, len(transformer.norm.weight)))

    def forward(self, x):
        x = torch.cat([self.tokens.expand(len(x), -1, -1), x], dim=1)  # (B, tokens + K, D)
        return self.transformer(x)[:, len(self.tokens) :]  # (B, K, D)


ADAPTATIONS = {"full": None, "lora": 2, "adapter": 16, "ssf": None, "bitfit": None}  # method: default size
ADAPTATIONS |= {"prefix": 32, "prompt": 32, "head": None}
INSERTED = {"lora": (Lora, nn.Linear), "ssf": (Ssf, nn.Linear), "prefix": (Prefix, Attention)}
INSERTED |= {"adapter": (Adapter, (Attention, FeedForward)), "prompt": (Prompt, Transformer)}


def adapt(model, method, size=None):
    """Put a method of ADAPTATIONS into a Myna, in place, and freeze the rest. Returns the trained parameters.

    "full" trains the encoder, "bitfit" the transformer's biases (Ben Zaken et al. 2022), "head" nothing.
    Raises ValueError for an unknown method, a wrong size, and a model with inserted modules.
    """
    if method not in ADAPTATIONS:
        raise ValueError(f"adaptation {method!r}: it must be one of {', '.join(ADAPTATIONS)}")
    if model.adaptation:
        raise ValueError(f"this model has been adapted before, with {model.adaptation['method']}")
    if size is not None and (ADAPTATIONS[method] is None or not 1 <= size <= 1024):
        raise ValueError(f"size {size}: from 1 to 1024 for lora, adapter, prefix or prompt; none for others")
    size = size or ADAPTATIONS[method]
    model.requires_grad_(method == "full")  # inserted modules are new, and therefore trained
    model.projector.requires_grad_(False)
    if method == "bitfit":
        for name, parameter in model.transformer.named_parameters():
            parameter.requires_grad_(name.endswith("bias"))
    elif method in INSERTED:
        inserted, kind = INSERTED[method]
        for name, module in list(model.named_modules()):
            if name.startswith("transformer") and isinstance(module, kind):
                model.set_submodule(name, inserted(module, size))
        model.adaptation = {"method": method, "size": size}
    model.to(model.projector[0].weight.device)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@torch.no_grad()
def merge(model):
    """Fold LoRA or SSF into the linear layers, in place. The vectors stay the same, up to rounding."""
    for name, module in list(model.named_modules()):
        if isinstance(module, (Lora, Ssf)):
            identity = torch.eye(module.linear.in_features).to(module.linear.weight)
            bias = module(torch.zeros_like(identity[0]))
            module.linear.weight.copy_((module(identity) - bias).T)
            module.linear.bias = nn.Parameter(bias)
            model.set_submodule(name, module.linear)
            model.adaptation = None
