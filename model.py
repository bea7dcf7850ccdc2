"""Stage 2 of Myna: mel power -> patches -> 10% of them -> SimpleViT -> projector -> InfoNCE.

Input: B segments of mel power, (B, 128, 96): 128 mel bands by 96 frames (data.py makes them).
Output: one vector for each segment.

In training, 43 of a segment's 48 patches are dropped before anything is computed (section 3.2 of the paper).
The loss pulls the two views of a clip together and pushes all other clips away (section 3.1). After
training the projector is dropped, and `embed` uses every patch. The encoder is a SimpleViT (section 3.4). A
hybrid model has one tokenizer for each of the two patch shapes and shares the encoder and the projector
(section 3.5).

    model = load_model("runs/demo/checkpoint.pt")
    vectors = model.embed(segments)  # (B, 128, 96) -> (B, D); for a hybrid model (B, 2 D)

Where this differs from the paper or from the authors' released code:
- the loss is InfoNCE, as in the paper; their code trains with SogCLR, a moving-average variant of it
- every model sees 96 frames, 48 patches; their vertical model alone is trained on 98 frames, 49 patches
- the projector has two layers, D -> D -> 128; its sizes are not published
- data.py makes the spectrogram of a whole clip and cuts segments out of it. Algorithm 1 cuts the waveform
  first: its STFT mirrors the sound at the edges of each segment. Here it sees the sound beside the segment
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

MEL_BANDS, FRAMES = 128, 96  # of a segment
PATCHES = {"square": (16, 16), "vertical": (128, 2)}  # mel bands x frames
N_TOKENS = 48  # N, the patches of a segment; both shapes make 48 patches of P = 256 values
SIZES = {  # width D, depth, heads, width of the feed-forward layer
    "tiny": (128, 3, 2, 512),  # the demo's: 0.7 M parameters
    "vit-s": (384, 12, 6, 1536),  # the paper's (section 3.4): 22 M
    "vit-b": (768, 12, 12, 3072),  # of a later version of the paper: 85 M
}

# --- Patches and masking -----------------------------------------------------------------------------------


def patchify(mel, patch):
    """Cut segments into patches: (B, 128, T) -> (B, N, P).

    `patch` is a name in PATCHES or a pair (bands, frames). Both the patches and the values inside a patch are
    ordered by frequency first: the lowest bands from left to right, then the bands above them.
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

    The positions of the K largest of N random numbers are a draw without replacement, for all rows at once.
    Raises ValueError for a mask ratio below 0, or one that keeps no token.
    """
    if not 0 <= mask_ratio < 1:
        raise ValueError(f"a mask ratio of {mask_ratio}: it must be at least 0 and less than 1")
    kept = n_tokens - int(mask_ratio * n_tokens)
    return torch.rand(batch, n_tokens, generator=generator, device=device).topk(kept, dim=1).indices


def sincos_2d(height, width, dim):
    """Fixed position embedding of a grid of patches: (height * width, dim), rows in the order of `patchify`.

    The columns are four groups of equal size: sin(x w), cos(x w), sin(y w), cos(y w), where x is the time
    index, y the frequency index, and w (omega) falls geometrically from 1 to 1/10000 (SimpleViT; Beyer et
    al. 2022). Raises ValueError unless `dim` is a multiple of 4 and at least 8.
    """
    if dim % 4 or dim < 8:
        raise ValueError(f"a position embedding of width {dim}: it must be a multiple of 4, at least 8")
    omega = 10_000 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4 - 1))
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    y = y.reshape(-1, 1) * omega  # (N, dim / 4)
    x = x.reshape(-1, 1) * omega
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=1).float()


# --- SimpleViT, with the module names of the authors' released files ---------------------------------------


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


# --- Myna --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """The settings of a model; a checkpoint holds them as a plain dict. ValueError for unknown values."""

    size: str = "vit-s"  # a name in SIZES
    patch: str = "hybrid"  # "square", "vertical", or "hybrid" for both
    projection: int = 128  # width of the vectors that the loss compares; not published, SimCLR's choice
    log_mel: bool = False  # log(1 + power) in front of the tokenizer; off in the released models

    def __post_init__(self):
        if self.size not in SIZES:
            raise ValueError(f"size {self.size!r}: it must be one of {', '.join(SIZES)}")
        if self.patch not in (*PATCHES, "hybrid"):
            raise ValueError(f"patch {self.patch!r}: it must be one of {', '.join(PATCHES)}, hybrid")


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
            values = height * width  # P
            layers = nn.LayerNorm(values), nn.Linear(values, dim), nn.LayerNorm(dim)
            self.to_patch_embedding[patch] = nn.Sequential(*layers)
            position = sincos_2d(MEL_BANDS // height, FRAMES // width, dim)  # (N, D)
            self.register_buffer(f"position_{patch}", position, persistent=False)  # computed, so not stored

        self.transformer = Transformer(dim, depth, heads, hidden)
        self.projector = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, config.projection))

    def embed_patches(self, mel, patch, kept=None):
        """The encoder's input: (B, 128, 96) -> (B, K, D), a token for each patch, of `kept` (B, K) or of all.

        Raises ValueError for segments of another shape.
        """
        if mel.shape[1:] != (MEL_BANDS, FRAMES):
            expected = f"expected segments (B, {MEL_BANDS}, {FRAMES})"
            raise ValueError(f"{expected}, found {tuple(mel.shape)}: data.segments cuts them")
        patches = patchify(mel, patch)  # (B, N, P)
        position = getattr(self, f"position_{patch}")  # (N, D)

        if kept is not None:  # mask first: nothing below is computed for a dropped patch
            rows = torch.arange(len(kept), device=kept.device)[:, None]
            patches = patches[rows, kept]  # (B, K, P)
            position = position[kept]  # (B, K, D)

        patches = patches.float()  # a corpus is float16, in which the squares inside LayerNorm overflow
        if self.config.log_mel:
            patches = patches.log1p()
        return self.to_patch_embedding[patch](patches) + position  # (B, K, D)

    def tokens(self, mel, patch, kept=None):
        """The encoder's output: (B, 128, 96) -> (B, K, D), a token for each of the patches `kept` or all."""
        return self.transformer(self.embed_patches(mel, patch, kept))

    def forward(self, mel, patch, mask_ratio=0.9, kept=None):
        """The vectors that the loss compares, one for each view: (B, 128, 96) -> (B, projection).

        Each row sees the patches `kept` (B, K), or (1 - mask_ratio) of its patches, drawn here.
        """
        if kept is None:
            kept = keep_tokens(len(mel), N_TOKENS, mask_ratio, device=mel.device)
        return self.projector(self.tokens(mel, patch, kept).mean(dim=1))

    @torch.no_grad()
    def embed(self, mel, patch=None):
        """Embeddings, the mean over all 48 tokens, without the projector: (B, 128, 96) -> (B, D).

        A hybrid model concatenates the embeddings of its square and vertical patches, (B, 2 D), unless
        `patch` names one of them. Raises ValueError for a patch shape that the model does not have.
        """
        if patch not in (None, *self.patches):
            raise ValueError(f"this model has {' and '.join(self.patches)} patches, not {patch!r}")
        patches = self.patches if patch is None else (patch,)
        return torch.cat([self.tokens(mel, p).mean(dim=1) for p in patches], dim=1)


# --- The loss ----------------------------------------------------------------------------------------------


def info_nce(z1, z2, temperature=0.1, decoupled=False, anchors=None):
    """The contrastive loss of B pairs of views, (B, d) each: a scalar, the mean over all 2B views as anchors.

    With s(a, b) the cosine similarity over the temperature, and a' the other view of the clip of anchor a,

        loss(a) = -log( exp s(a, a') / sum over b of exp s(a, b) )

    default    NT-Xent (SimCLR): b runs over all 2B - 1 views except a. Chance level: ln(2B - 1).
    decoupled  as printed in section 3.1, with [j != i]: b runs over the 2B - 2 views of the other clips, so
               that the positive a' is missing in the denominator. Chance level: ln(2B - 2).

    The paper's formula is the decoupled form, but its text names SimCLR's. Its formula has anchors of view 1
    only; here both views are anchors, in both forms. `anchors` selects some of the 2B views (default: all).
    Raises ValueError for a single pair, which has no negatives.
    """
    if len(z1) < 2:
        raise ValueError("the contrastive loss needs at least two pairs: with one there are no negatives")
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


BLOCK = 2**28  # entries of the similarity matrix held at once: all of them for up to 8,192 pairs, 1 GB


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
    """How far vectors differ in direction: (n, d) -> scalar, from 0 (all equal: a collapse) to 1.

    The root of the summed variances of the d dimensions, each vector scaled to length 1. In log.jsonl: "std".
    """
    return F.normalize(z.float(), dim=1).var(dim=0, correction=0).sum().sqrt()


# --- Checkpoints -------------------------------------------------------------------------------------------


def save_model(model, path, **extra):
    """Write the model's config and weights, and the plain values or tensors in `extra`, to a checkpoint file.

    The file is written beside `path` and renamed. Raises OSError, with the cause, when it cannot be written;
    what was at `path` is then unchanged.
    """
    contents = io.BytesIO()  # torch's own writer does not tell a full disk from other errors
    settings = {"config": asdict(model.config), "adaptation": model.adaptation}
    torch.save({**settings, "model": model.state_dict(), **extra}, contents)
    part = Path(f"{path}.part")
    try:
        with open(part, "wb") as file:
            file.write(contents.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise OSError(f"{path} could not be written: {error.strerror}") from error


def read_checkpoint(path):
    """The dict in a checkpoint file, read so that no code in it is run. ValueError for other files."""
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"{path}: there is no such checkpoint") from None
    except (PermissionError, MemoryError):
        raise
    except Exception as error:  # torch raises many kinds of error for foreign and damaged files
        expected = "expected tensors and plain values as torch.save writes them"
        found = "found another kind of file, or one that is cut short"
        raise ValueError(f"{path}: {expected}, {found}") from error
    if not isinstance(contents, dict):
        raise ValueError(f"{path}: expected a dict of weights, found a {type(contents).__name__}")
    return contents


def load_model(path, patch=None):
    """A model, ready to embed, from a checkpoint of train.py or from one of the authors' released files.

    A released file with one tokenizer does not tell the shape of its patches, so `patch` must name it.
    Released files hold no projector; its weights stay as initialised. Adapted models come back with the
    modules that `adapt` inserted. Raises ValueError that tells what was expected and what was found.
    """
    contents = read_checkpoint(path)
    released = not {"config", "model"} <= contents.keys()
    if released:
        config, weights = _from_released(contents, path, patch)
    else:
        weights = contents["model"]
        try:
            config = Config(**contents["config"])
        except TypeError as error:
            expected = ", ".join(asdict(Config()))
            found = contents["config"]
            raise ValueError(f"{path}: expected the settings {expected}, found {found}") from error
    if patch not in (None, config.patch):
        found = f"found one with {config.patch} patches"
        raise ValueError(f"{path}: expected a model with {patch} patches, {found}")

    model = Myna(config)
    if contents.get("adaptation"):
        try:
            adapt(model, **contents["adaptation"])
        except (TypeError, ValueError) as error:
            found = contents["adaptation"]
            expected = "expected the method and size of an adaptation"
            raise ValueError(f"{path}: {expected}, found {found}") from error
    add_biases(model, weights)
    state = model.state_dict()
    for name, initial in state.items():
        found = weights.get(name)
        if found is not None and found.shape == initial.shape:
            state[name] = found
        elif not (released and name.startswith("projector.")):
            shape = "nothing" if found is None else tuple(found.shape)
            raise ValueError(f"{path}: expected {name} of shape {tuple(initial.shape)}, found {shape}")
    model.load_state_dict(state)
    return model.eval()


def _from_released(weights, path, patch):
    """The Config of the authors' released state dict, and its weights under the names of this file."""
    if "projector.0.weight" in weights:
        raise ValueError(f"{path}: expected a checkpoint of save_model, found weights without their settings")
    try:
        dim = len(weights["transformer.norm.weight"])
        depth = len({name.split(".")[2] for name in weights if name.startswith("transformer.layers.")})
        size = next(name for name, sizes in SIZES.items() if sizes[:2] == (dim, depth))
    except (KeyError, TypeError, StopIteration):
        expected = "a checkpoint of train.py or a released Myna of a known size"
        found = ", ".join(map(str, list(weights)[:3])) or "nothing"
        raise ValueError(f"{path}: expected {expected}, found a dict of {found}, ...") from None
    hybrid = any(name.startswith("to_patch_embedding_b.") for name in weights)
    if not hybrid and patch is None:
        problem = "this released model has one tokenizer, and the file does not tell the shape of its patches"
        raise ValueError(f"{path}: {problem}: name it with patch='square' or patch='vertical' (--patch)")

    # The first module of their tokenizers only reshapes, so that every number is one higher than here.
    shapes = {"to_patch_embedding": "square" if hybrid else patch, "to_patch_embedding_b": "vertical"}
    renamed = {}
    for name, value in weights.items():
        tokenizer, *rest = name.split(".")
        if tokenizer in shapes:
            number = str(int(rest[0]) - 1)
            name = ".".join(["to_patch_embedding", shapes[tokenizer], number, *rest[1:]])
        renamed[name] = value
    return Config(size, "hybrid" if hybrid else patch), renamed


# --- Other objectives: python train.py --objective NAME ----------------------------------------------------
# What else can be learned from the same patches?
#
# Two views (contrast, byol, clustering, barlow, vicreg): both views see 5 of 48 patches, as in Myna. The
# objectives differ in their head, in their formula, and in whether a teacher (a moving average of the
# student) makes one side. Formulas and widths are those of arXiv 2404.09177, with D in place of its 1024.
#
# Hidden patches (mae, data2vec, hubert): the encoder sees the visible patches of one segment, and a light
# decoder predicts something at each hidden one. This is the form of MAE and data2vec 2.0. music2vec and
# musicHuBERT (arXiv 2307.05161) put mask embeddings into the encoder's sequence instead.
#
# An objective has two parts. `forward` uses the weights and computes each row (segment) independently, so a
# batch can be split into chunks or over processes. `loss` uses no weights and takes the outputs of the whole
# batch. R is the number of rows in one call, B the number of pairs in the batch, K that of kept patches.


class Objective(nn.Module):
    """What all objectives share.

    - forward: segments (R, 128, 96), kept (R, K) -> outputs for `loss` (R, ...), vectors for the log (R, d)
    - loss: outputs of both views of the batch (2, B, ...), progress of the run from 0 to 1 -> scalar
    - prepare: called when a run begins, with some segments of the corpus
    - update: called after each step, for what is not learned by gradient
    """

    two_views = True  # whether rows i of both views are a pair
    mask = 0.9  # default mask ratio
    patches = (*PATCHES, "hybrid")  # the patch shapes that it can be used with
    scheduled = False  # whether anything depends on the progress of the run

    def __init__(self, model, settings):
        super().__init__()
        self.model, self.settings = model, settings  # the settings of train.py
        self.dim, self.depth, self.heads, self.feed_forward = SIZES[model.config.size]

    def prepare(self, mel, generator):
        pass

    def update(self, progress):
        pass


class Contrast(Objective):
    """Myna's own objective (section 3.1): `info_nce` of the projections of two views."""

    def forward(self, mel, patch, kept):
        z = self.model(mel, patch, kept=kept)  # (R, projection)
        return z, z.detach()

    def loss(self, outputs, progress):
        return info_nce_in_blocks(*outputs, self.settings.temperature, self.settings.decoupled)


class Head(nn.Sequential):
    """Linear layers without biases, with LayerNorm and ReLU after all but the last: (R, a) -> (R, z).

    arXiv 2404.09177 has BatchNorm. LayerNorm keeps rows independent, so that several processes give the
    result of one; BYOL works without batch statistics too (Richemond et al. 2020).
    """

    def __init__(self, *widths):
        layers = []
        for a, b in zip(widths[:-2], widths[1:-1]):
            layers += [nn.Linear(a, b, bias=False), nn.LayerNorm(b), nn.ReLU()]
        super().__init__(*layers, nn.Linear(widths[-2], widths[-1], bias=False))


class TeacherObjective(Objective):
    """What byol and clustering share: a head, and a teacher, which is a moving average of encoder and head.

    The teacher's momentum rises from 0.996 to 1 on a cosine (Grill et al. 2020). It receives no gradient.
    """

    scheduled = True

    def __init__(self, model, settings, *widths):
        super().__init__(model, settings)
        self.head = Head(*widths)
        self.predictor = nn.Identity()
        self.teacher = make_teacher(model, self.head)

    def forward(self, mel, patch, kept):
        vectors = lambda model, head: head(model.tokens(mel, patch, kept).mean(dim=1))
        z = vectors(self.model, self.head)  # (R, d)
        with torch.no_grad():
            target = vectors(*self.teacher)
        return torch.stack([self.predictor(z), target], dim=1), z.detach()  # (R, 2, d)

    def update(self, progress):
        momentum = 1 - 0.004 * (1 + math.cos(math.pi * progress)) / 2
        move_teacher(self.teacher, nn.ModuleList([self.model, self.head]), momentum)


def make_teacher(*student):
    """A copy of the student's modules that receives no gradient."""
    return copy.deepcopy(nn.ModuleList(student)).requires_grad_(False)


@torch.no_grad()
def move_teacher(teacher, student, momentum):
    """teacher <- momentum * teacher + (1 - momentum) * student, for every weight of two equal modules."""
    for slow, fast in zip(teacher.parameters(), student.parameters()):
        slow.lerp_(fast, 1 - momentum)


class Byol(TeacherObjective):
    """BYOL (Grill et al. 2020): predict the teacher's vector of the other view. There are no negatives.

        loss = 2 - 2 cos(predictor(student(view 1)), teacher(view 2)), and with the views exchanged

    Without the predictor, one constant vector for all segments is a solution.
    """

    def __init__(self, model, settings):
        dim = SIZES[model.config.size][0]
        super().__init__(model, settings, dim, dim, dim, 2 * dim)
        self.predictor = Head(2 * dim, dim // 4, 2 * dim)

    def loss(self, outputs, progress):
        prediction, target = outputs.float().unbind(dim=2)  # (2, B, 2 D) each
        target = target.detach().flip(0)  # of the other view
        return (2 - 2 * F.cosine_similarity(prediction, target, dim=-1)).mean()


class Clustering(TeacherObjective):
    """Clustering in DINO's form (Caron et al. 2021): give both views the same soft cluster.

        loss = -sum over clusters of t log s, and with the views exchanged, where
        s = softmax(student(view 1) / 0.1),  t = softmax((teacher(view 2) - centre) / tau)

    The centre, a moving average of the teacher's outputs, keeps one cluster from taking all; the small tau
    keeps t from becoming uniform. There are 4 D clusters. Adapted: tau rises from 0.02 to 0.04 in the first
    tenth of the run, instead of the first epochs.
    """

    def __init__(self, model, settings):
        dim = SIZES[model.config.size][0]
        super().__init__(model, settings, dim, dim, dim, dim // 4, 4 * dim)
        self.register_buffer("centre", torch.zeros(4 * dim))
        self.means = []  # of the teacher's outputs in this step, one for each patch shape

    def loss(self, outputs, progress):
        student, teacher = outputs.float().unbind(dim=2)  # (2, B, 4 D) each
        teacher = teacher.detach().flip(0)  # of the other view
        self.means.append(teacher.mean(dim=(0, 1)))
        tau = 0.02 + 0.02 * min(1, 10 * progress)
        target = ((teacher - self.centre) / tau).softmax(dim=-1)
        return -(target * (student / 0.1).log_softmax(dim=-1)).sum(dim=-1).mean()

    def update(self, progress):
        super().update(progress)
        self.centre.lerp_(torch.stack(self.means).mean(dim=0), 0.1)
        self.means.clear()


def off_diagonal(matrix):
    """The entries of a square matrix outside its diagonal."""
    return matrix[~torch.eye(len(matrix), dtype=torch.bool, device=matrix.device)]


class Barlow(Objective):
    """Barlow Twins (Zbontar et al. 2021): each dimension equal in both views, uncorrelated with the others.

        C = a^T b / B, with a and b both views' vectors, each dimension standardised over the batch
        loss = mean over the diagonal of (1 - C)^2 + mean of C^2 outside the diagonal

    These are means, as in arXiv 2404.09177, not the original's sums, so that its factor 0.005 does not apply.
    """

    def __init__(self, model, settings):
        super().__init__(model, settings)
        self.head = Head(self.dim, self.dim, self.dim, 2 * self.dim)

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

    The last two are means over both views. Weights 1, 1, 1 as in arXiv 2404.09177. (The original: 25, 25, 1.)
    """

    def loss(self, outputs, progress):
        a, b = outputs.float()  # (B, 2 D) each
        loss = (a - b).square().mean()
        for z in (a, b):
            covariance = z.T.cov()  # (2 D, 2 D)
            deviation = (covariance.diagonal() + 1e-5).sqrt()
            loss = loss + F.relu(1 - deviation).mean() / 2 + off_diagonal(covariance).square().mean() / 2
        return loss


class MaskedAutoencoder(Objective):
    """MAE (He et al. 2022; section 4.6): predict the hidden patches themselves, by mean squared error.

    The decoder is a transformer of at most 4 layers. A learned mask token, with its position, is its input
    for each hidden patch; the encoder's tokens carry their positions already. Target: log(1 + power), as in
    the authors' code; with --target patch the same, normalised in each patch to mean 0 and variance 1, as in
    MAE's own paper. (The tokenizer's LayerNorm removes a patch's level, so that the level of a hidden patch
    is hard to predict.) Mask ratio 0.75 is MAE's; the Myna paper does not state its own.
    """

    two_views = False  # both segments of a clip are used, but not compared
    mask = 0.75
    width = 256  # of a prediction; None: D

    def __init__(self, model, settings):
        super().__init__(model, settings)
        self.mask_token = nn.Parameter(torch.randn(self.dim))
        self.decoder = Transformer(self.dim, min(4, self.depth), self.heads, self.feed_forward)
        self.to_prediction = nn.Linear(self.dim, self.width or self.dim)

    def predict(self, mel, patch, kept):
        """Predictions at all patches (R, N, width), and the encoder's tokens of the kept ones (R, K, D)."""
        visible = self.model.tokens(mel, patch, kept)
        masked = self.mask_token + getattr(self.model, f"position_{patch}")  # (N, D)
        where = kept[..., None].expand(-1, -1, self.dim)
        sequence = masked.expand(len(mel), -1, -1).scatter(1, where, visible.to(masked.dtype))  # (R, N, D)
        return self.to_prediction(self.decoder(sequence)), visible

    def error(self, prediction, mel, patch):
        """How wrong each prediction is: (R, N, width) -> (R, N)."""
        target = patchify(mel, patch).float().log1p()
        if self.settings.target == "patch":
            target = F.layer_norm(target, target.shape[-1:], eps=1e-6)
        return (prediction - target).square().mean(dim=-1)

    def forward(self, mel, patch, kept):
        prediction, visible = self.predict(mel, patch, kept)
        error = self.error(prediction.float(), mel, patch)  # (R, N)
        is_hidden = torch.ones_like(error).scatter(1, kept, 0)
        outputs = (error * is_hidden).sum(dim=1) / is_hidden.sum(dim=1)  # (R,)
        return outputs, visible.mean(dim=1).detach()

    def loss(self, outputs, progress):
        return outputs.mean()


class Data2vec(MaskedAutoencoder):
    """data2vec (Baevski et al. 2022; music2vec): predict the teacher's features of the hidden patches.

    The teacher, a moving average of the encoder (momentum 0.999 to 0.9999, linear), sees all patches. Target:
    the feed-forward outputs of the top two thirds of its layers (8 of 12), each channel normalised over the
    segment's patches, averaged over the layers. Error: squared, summed over D, divided by sqrt(D). Mask 0.65
    as in music2vec.
    """

    mask = 0.65
    width = None
    scheduled = True

    def __init__(self, model, settings):
        super().__init__(model, settings)
        self.teacher = make_teacher(model)

    @torch.no_grad()
    def targets(self, mel, patch):
        """The teacher's features of all patches: (R, 128, 96) -> (R, N, D)."""
        (teacher,) = self.teacher
        x = teacher.embed_patches(mel, patch)
        features = []
        for attention, feed_forward in teacher.transformer.layers:
            x = x + attention(x)
            added = feed_forward(x)
            features.append(F.instance_norm(added.float().transpose(1, 2)).transpose(1, 2))
            x = x + added
        return torch.stack(features[-(2 * self.depth // 3) :]).mean(dim=0)

    def error(self, prediction, mel, patch):
        return (prediction - self.targets(mel, patch)).square().sum(dim=-1) / self.dim**0.5

    def update(self, progress):
        move_teacher(self.teacher, nn.ModuleList([self.model]), 0.999 + 0.0009 * progress)


class Hubert(MaskedAutoencoder):
    """HuBERT (Hsu et al. 2021; musicHuBERT): predict the cluster of each hidden patch, by cross-entropy.

    Patches are vertical, two frames each. The cluster of a patch is the nearest of --clusters centroids,
    found by k-means on the MFCC of 20,000 patches of the corpus. Score of a cluster: the cosine of the
    prediction and the cluster's learned embedding, over 0.1. Mask ratio 0.65 as in musicHuBERT.
    """

    mask = 0.65
    patches = ("vertical",)

    def __init__(self, model, settings):
        super().__init__(model, settings)
        self.embedding = nn.Parameter(torch.randn(settings.clusters, self.width))
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
        scores = F.normalize(prediction, dim=-1) @ F.normalize(self.embedding, dim=-1).T / 0.1
        return F.cross_entropy(scores.transpose(1, 2), self.clusters(mel), reduction="none")


def mfcc_of_patches(mel):
    """39 MFCC values of each vertical patch: mel power (R, 128, 96) -> (R, 48, 39).

    13 cepstral coefficients (orthonormal DCT-II of log power), and their first and second differences.
    """
    k = torch.arange(13.0, device=mel.device)[:, None]
    n = torch.arange(MEL_BANDS, device=mel.device)
    dct = torch.cos(torch.pi / MEL_BANDS * (n + 0.5) * k) * (2 / MEL_BANDS) ** 0.5  # (13, 128)
    dct[0] /= 2**0.5
    mfcc = dct @ mel.float().clamp(min=1e-6).log()  # (R, 13, 96)
    first = mfcc.diff(prepend=mfcc[..., :1])
    second = first.diff(prepend=first[..., :1])
    frames = torch.cat([mfcc, first, second], dim=1)  # (R, 39, 96)
    return frames.unflatten(2, (-1, 2)).mean(dim=3).transpose(1, 2)


def k_means(points, k, generator, iterations=50):
    """Centroids (k, d) of points (n, d): Lloyd's algorithm, k-means++ start (Arthur, Vassilvitskii 2007)."""
    centroids = points[:1]
    distance = torch.full((len(points),), torch.inf)
    for _ in range(k - 1):  # the next one is a point, drawn in proportion to its squared distance
        distance = torch.minimum(distance, (points - centroids[-1]).square().sum(dim=1))
        drawn = torch.multinomial(distance + 1e-12, 1, generator=generator)
        centroids = torch.cat([centroids, points[drawn]])
    for _ in range(iterations):
        nearest = torch.cdist(points, centroids).argmin(dim=1)
        count = torch.bincount(nearest, minlength=k)[:, None]
        total = torch.zeros_like(centroids).index_add_(0, nearest, points)
        centroids = torch.where(count > 0, total / count.clamp(min=1), centroids)  # an empty cluster stays
    return centroids


OBJECTIVES = {
    "contrast": Contrast,
    "byol": Byol,
    "clustering": Clustering,
    "barlow": Barlow,
    "vicreg": Vicreg,
    "mae": MaskedAutoencoder,
    "data2vec": Data2vec,
    "hubert": Hubert,
}


# --- Adaptation: python probe.py --adapt METHOD ------------------------------------------------------------
# The model is frozen. What is trained is some of its parameters, or small new modules around its own.
# Methods and settings are those of arXiv 2411.19371, which compares them on two other music models.


class Lora(nn.Module):
    """LoRA (Hu et al. 2022): a change of low rank to a linear layer, W x + b + B A x.

    A is (rank, in) and B (out, rank). B is zero at the start, so that nothing changes before training.
    """

    def __init__(self, linear, rank):
        super().__init__()
        self.linear = linear
        self.a = nn.Linear(linear.in_features, rank, bias=False)  # Kaiming, torch's default
        self.b = nn.Linear(rank, linear.out_features, bias=False)
        nn.init.zeros_(self.b.weight)

    def forward(self, x):
        return self.linear(x) + self.b(self.a(x))

    def merged(self):
        self.linear.weight += self.b.weight @ self.a.weight
        return self.linear


class Ssf(nn.Module):
    """SSF (Lian et al. 2022): scale and shift each output of a linear layer, gamma (W x + b) + beta.

    gamma is drawn from N(1, 0.02) and beta from N(0, 0.02), so that the output changes a little at once.
    """

    def __init__(self, linear):
        super().__init__()
        self.linear = linear
        self.gamma = nn.Parameter(1 + 0.02 * torch.randn(linear.out_features))
        self.beta = nn.Parameter(0.02 * torch.randn(linear.out_features))

    def forward(self, x):
        return self.gamma * self.linear(x) + self.beta

    def merged(self):
        bias = 0 if self.linear.bias is None else self.linear.bias
        self.linear.weight *= self.gamma[:, None]
        self.linear.bias = nn.Parameter(self.gamma * bias + self.beta)
        return self.linear


class Adapter(nn.Module):
    """Adapter (Houlsby et al. 2019): two small linear layers after a sublayer, y + W_up GELU(W_down y).

    y is the output of attention or feed-forward, before it is added to its input. W_up and both biases are
    zero at the start. The LayerNorms of the layers are trained, too.
    """

    def __init__(self, sublayer, bottleneck):
        super().__init__()
        self.sublayer = sublayer
        dim = next(sublayer.parameters()).shape[0]  # of its LayerNorm
        self.down = nn.Linear(dim, bottleneck)
        self.up = nn.Linear(bottleneck, dim)
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, x):
        y = self.sublayer(x)
        return y + self.up(F.gelu(self.down(y)))


class Prefix(nn.Module):
    """Prefix tuning (Li and Liang 2021): learned keys and values in front of those of an attention.

    Every token attends to them as well. Adapted: they are trained directly, not through an MLP.
    """

    def __init__(self, attention, tokens):
        super().__init__()
        self.attention = attention
        dim = attention.to_out.in_features
        self.keys = nn.Parameter(0.02 * torch.randn(tokens, dim))
        self.values = nn.Parameter(0.02 * torch.randn(tokens, dim))

    def forward(self, x):
        attention = self.attention
        q, k, v = attention.to_qkv(attention.norm(x)).chunk(3, dim=2)  # (B, K, D) each
        k = torch.cat([self.keys.to(k.dtype).expand(len(x), -1, -1), k], dim=1)  # (B, tokens + K, D)
        v = torch.cat([self.values.to(v.dtype).expand(len(x), -1, -1), v], dim=1)
        q, k, v = (part.unflatten(2, (attention.heads, -1)).transpose(1, 2) for part in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v)  # (B, heads, K, D / heads)
        return attention.to_out(out.transpose(1, 2).flatten(2))  # (B, K, D)


class Prompt(nn.Module):
    """Prompt tuning (Lester et al. 2021): learned tokens in front of the sequence of the transformer.

    Adapted: their outputs are dropped, so that an embedding is the mean over the patches' tokens alone.
    """

    def __init__(self, transformer, tokens):
        super().__init__()
        self.transformer = transformer
        self.tokens = nn.Parameter(0.02 * torch.randn(tokens, len(transformer.norm.weight)))

    def forward(self, x):
        x = torch.cat([self.tokens.expand(len(x), -1, -1), x], dim=1)  # (B, tokens + K, D)
        return self.transformer(x)[:, len(self.tokens) :]  # (B, K, D)


# Method: default size (LoRA's rank, the width of an adapter, the number of prefix or prompt tokens).
ADAPTATIONS = {"full": None, "lora": 2, "adapter": 16, "ssf": None, "bitfit": None}
ADAPTATIONS |= {"prefix": 32, "prompt": 32, "head": None}


def adapt(model, method, size=None):
    """Put a method of ADAPTATIONS into a Myna, in place. Returns the list of its trained parameters.

    All other parameters are frozen, and the projector always. "full" is fine-tuning; "bitfit" trains the
    transformer's biases (Ben Zaken et al. 2022; its attention has none); "head" trains nothing in the
    encoder. Raises ValueError for an unknown method, a wrong size, and a model with inserted modules.
    """
    if method not in ADAPTATIONS:
        raise ValueError(f"adaptation {method!r}: it must be one of {', '.join(ADAPTATIONS)}")
    if model.adaptation:
        raise ValueError(f"this model has been adapted before, with {model.adaptation['method']}")
    default = ADAPTATIONS[method]
    if size is not None and (default is None or not 1 <= size <= 1024):
        raise ValueError(f"size {size}: from 1 to 1024 for lora, adapter, prefix or prompt; none for others")
    size = size or default
    transformer = model.transformer

    model.requires_grad_(False)  # the modules inserted below are new, and therefore trained
    if method == "full":
        model.to_patch_embedding.requires_grad_()
        transformer.requires_grad_()
    elif method == "lora":
        replace_modules(transformer, nn.Linear, lambda linear: Lora(linear, size))
    elif method == "adapter":
        replace_modules(transformer, (Attention, FeedForward), lambda sublayer: Adapter(sublayer, size))
        for module in transformer.layers.modules():
            if isinstance(module, nn.LayerNorm):
                module.requires_grad_()
    elif method == "ssf":
        replace_modules(transformer, nn.Linear, Ssf)
    elif method == "bitfit":
        for name, parameter in transformer.named_parameters():
            parameter.requires_grad_(name.endswith("bias"))
    elif method == "prefix":
        replace_modules(transformer, Attention, lambda attention: Prefix(attention, size))
    elif method == "prompt":
        model.transformer = Prompt(transformer, size)

    if method in ("lora", "adapter", "ssf", "prefix", "prompt"):
        model.adaptation = {"method": method, "size": size}
    model.to(model.projector[0].weight.device)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def replace_modules(parent, kind, wrap):
    """Put wrap(module) in the place of every module of class `kind` below `parent`."""
    for name, module in list(parent.named_children()):
        if isinstance(module, kind):
            setattr(parent, name, wrap(module))
        else:
            replace_modules(module, kind, wrap)


@torch.no_grad()
def merge(model):
    """Compute LoRA and SSF into the weights of the linear layers, in place. Other methods stay as they are.

    The vectors do not change, and the model costs no more than before. SSF gives biases to the linear layers
    of the attention.
    """
    replace_modules(model.transformer, (Lora, Ssf), lambda module: module.merged())
    if model.adaptation and model.adaptation["method"] in ("lora", "ssf"):
        model.adaptation = None


def add_biases(model, weights):
    """Give a bias to each linear layer without one for which `weights` holds one (see `merge`)."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module.bias is None and f"{name}.bias" in weights:
            module.bias = nn.Parameter(torch.zeros(module.out_features))
