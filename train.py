"""Stage 3 of Myna: pre-training (Algorithm 1 and section 3.6 of the paper).

Input: a corpus (data.py) or a folder of music. Output: runs/NAME/checkpoint.pt and, beside it, log.jsonl.

    python train.py --demo                                        a tiny model, minutes on two CPU cores
    python train.py --patch vertical --batch 4096                 the paper's recipe, on the embedded music
    python train.py --data corpora/mine --out runs/mine --resume  on your music; continue a run, or start it
    torchrun --nproc-per-node 4 train.py --data corpora/mine      one batch, shared by four GPUs
    python train.py --objective byol                              another objective (the end of model.py)

One step: draw clips, two segments of each clip, and the 5 of 48 patches to keep of each segment; encode;
InfoNCE; Adam. The random numbers of a step depend on (seed, step) alone. So on one machine, a run that was
killed and resumed gives the same weights as one that was not, and processes that share a batch draw the same.
"""

import argparse
import datetime
import json
import math
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from tqdm import tqdm

from data import HOP, SAMPLE_RATE, Corpus, build_corpus, build_embedded_corpus, report
from model import N_TOKENS, OBJECTIVES, PATCHES, SIZES, Config, Myna
from model import keep_tokens, read_checkpoint, retrieval_accuracy, save_model, spread

RANK = int(os.environ.get("RANK", 0))  # index of this process (torchrun sets it)
WORLD = int(os.environ.get("WORLD_SIZE", 1))  # number of processes
LOOP = []  # not empty: the loop of `train` has begun
STOP = []  # the signals received since then, which the loop reads

# --- Settings ----------------------------------------------------------------------------------------------

DEMO = {"size": "tiny", "batch": 256, "steps": 600, "lr": 1e-3, "out": "runs/demo"}
# These may differ when a run is resumed: they do not change the result, or are stored as steps.
NOT_STORED = ("demo", "epochs", "out", "resume", "save_minutes", "device", "compile", "chunk")
SMALLEST_SPREAD = 0.05  # standard deviation of the vectors, below which a collapse is reported


def command_line():
    """The parser of the command line."""
    parser = argparse.ArgumentParser(description="Pre-train Myna. Defaults: the paper's.", allow_abbrev=False)
    add = parser.add_argument
    add("--demo", action="store_true", help="a tiny model on the embedded music, minutes on two CPU cores")
    add("--data", help="a corpus, or a folder of music (default: the embedded music)")
    add("--minutes", type=float, help="use only so much of the corpus (subsets are nested)")
    add("--patch", choices=[*PATCHES, "hybrid"], default="hybrid", help="16x16, 128x2, or both (default)")
    add("--size", choices=list(SIZES), default="vit-s", help="of the encoder (default: %(default)s)")
    add("--objective", choices=list(OBJECTIVES), default="contrast", help="(default: contrast)")
    add("--target", choices=["log", "patch"], default="log", help="of mae: log power, or the same normalised")
    add("--clusters", type=int, default=100, help="of hubert (default: %(default)s)")
    add("--log-mel", action="store_true", help="log(1 + power) in front of the tokenizer")
    add("--batch", type=int, default=4096, help="pairs in a step, over all processes (default: %(default)s)")
    add("--chunk", type=int, help="pairs encoded at once: same result, less memory (default: all; CPU: 256)")
    add("--mask", type=float, help="share of patches dropped (default: 0.9; mae 0.75; data2vec, hubert 0.65)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=int, help="passes over the corpus (default: 500)")
    length.add_argument("--steps", type=int, help="or a number of steps")
    add("--lr", type=float, default=3e-4, help="learning rate, constant (default: %(default)s)")
    add("--weight-decay", type=float, default=1e-5, help="L2 in Adam's gradient (default: %(default)s)")
    add("--temperature", type=float, default=0.1, help="of the loss (default: %(default)s)")
    add("--decoupled", action="store_true", help="the loss as printed: no positive in the denominator")
    add("--seed", type=int, default=0, help="of all random numbers (default: %(default)s)")
    add("--out", help="folder of the run (default: runs/PATCH_SIZE_bBATCH_sSEED)")
    add("--resume", action="store_true", help="continue the run in --out with its settings, or start it")
    add("--save-minutes", type=float, default=10, help="between checkpoints (default: %(default)s)")
    add("--device", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    add("--precision", choices=["bf16", "float32"], help="of the encoder's products (default: bf16 on a GPU)")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile (default: on a GPU)")
    return parser


def read_settings(argv):
    """The settings of a run, and the checkpoint that it continues or None. ValueError for unusable ones."""
    parser = command_line()
    if "--demo" in argv:
        parser.set_defaults(**DEMO)
    args = parser.parse_args(argv)
    objective = "" if args.objective == "contrast" else f"{args.objective}_"
    out = Path(args.out or f"runs/{objective}{args.patch}_{args.size}_b{args.batch}_s{args.seed}")

    checkpoint = newest_checkpoint(out) if args.resume else None
    if checkpoint:
        parser.set_defaults(**checkpoint["settings"])
        args = parser.parse_args(argv)
        for name, value in checkpoint["settings"].items():
            may_change = name in ("steps", "data")  # a longer run; a corpus that was moved
            if not may_change and getattr(args, name) != value:
                raise ValueError(f"{out} continues with its own settings: its {name} is {value}")
    elif out.exists() and not args.resume:
        raise ValueError(f"{out} exists: continue that run with --resume, or name another folder with --out")

    args.out = out
    check_settings(args)
    return args, checkpoint


def check_settings(args):
    """Set the default of --mask. Raises ValueError for settings that cannot be used."""
    for name in "batch chunk epochs steps lr temperature minutes save_minutes clusters".split():
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} {value}: it must be above zero")
    if args.batch < 2 or args.batch % WORLD or args.seed < 0:
        raise ValueError(f"--batch: two or more, shared evenly by {WORLD} processes; --seed: not negative")

    objective = OBJECTIVES[args.objective]
    args.mask = objective.mask if args.mask is None else args.mask
    keep_tokens(1, N_TOKENS, args.mask)  # raises ValueError for a mask ratio that keeps nothing
    if args.patch not in objective.patches:
        raise ValueError(f"--objective {args.objective} takes --patch {' or '.join(objective.patches)}")
    if int(args.mask * N_TOKENS) == 0 and not objective.two_views:
        raise ValueError(f"--mask {args.mask:g}: --objective {args.objective} needs hidden patches")


def choose_device(args):
    """The device of this process. Sets the settings that depend on it, and connects the processes."""
    name = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name
    gpu = name.startswith("cuda")
    args.compile = gpu if args.compile is None else args.compile
    try:
        if gpu:
            torch.cuda.set_device(name)
        trial = torch.ones(8, device=name)
        if args.compile:
            torch.compile(torch.nn.GELU())(trial)
    except Exception as error:  # torch raises many kinds of error here
        advice = ", or only with --no-compile" if args.compile else ""
        raise ValueError(f"--device {name} cannot be used here{advice}: {error}".split("\n")[0]) from error

    args.chunk = args.chunk or (args.batch if gpu else 256)
    args.precision = args.precision or ("bf16" if gpu and torch.cuda.is_bf16_supported(False) else "float32")
    if WORLD > 1 and not dist.is_initialized():
        a_day = datetime.timedelta(days=1)  # the others wait while process 0 builds a corpus
        backend, gpu_of_process = ("nccl", trial.device) if gpu else ("gloo", None)
        dist.init_process_group(backend, timeout=a_day, device_id=gpu_of_process)
    return trial.device


# --- Batches -----------------------------------------------------------------------------------------------


def open_corpus(args, device):
    """The corpus that --data names, built if necessary; on the GPU if it fits in half of its memory."""
    if RANK > 0:
        dist.barrier()  # until process 0 has built the corpus
    if args.data is None:
        n_clips = max(2048, args.batch)
        tqdm.write(f"No --data: training on the embedded music, {n_clips} clips of ten seconds")
        corpus = build_embedded_corpus(n_clips, 0, f"corpora/embedded_{n_clips}")  # for every --seed
    elif Path(args.data, "index.jsonl").exists():
        corpus = Corpus(args.data)
    else:
        corpus = build_corpus(args.data, Path("corpora", Path(args.data).resolve().name))
    report(corpus)
    if RANK == 0 and WORLD > 1:
        dist.barrier()
    fits = device.type == "cuda" and 2 * corpus.mel.nbytes < torch.cuda.mem_get_info(device)[1]
    return corpus.to(device) if fits else corpus


def choose_clips(corpus, args):
    """Ids of the clips to train on, in random order: all, or --minutes of them, which may reduce --batch."""
    order = torch.randperm(len(corpus), generator=torch.Generator().manual_seed(args.seed))
    if args.minutes is not None:
        seconds = (corpus.frames.cpu()[order] - 1) * HOP / SAMPLE_RATE  # n frames span n - 1 hops
        order = order[seconds.cumsum(0) / 60 <= args.minutes]
        if len(order) < max(2, WORLD):
            raise ValueError(f"--minutes {args.minutes:g} leaves {len(order)} clips: use more minutes")
        args.batch = min(args.batch, len(order) // WORLD * WORLD)
    if len(order) < args.batch:
        raise ValueError(f"--batch {args.batch}, but there are {len(order)} clips: use a smaller --batch")
    return order.to(corpus.mel.device)


def draw_batch(corpus, clips, step, args, part=slice(None)):
    """The random choices of a step: views (2, b, 128, 96), and the tokens to keep, {patch: (2, b, K)}."""
    epoch, position = divmod(step, len(clips) // args.batch)
    ids = shuffled(clips, args.seed, epoch)[position * args.batch : (position + 1) * args.batch]
    generator = generator_of(corpus.mel.device, args.seed, 1, step)  # draws for all B pairs, not only `part`
    views = corpus.sample_pairs(ids, generator, part)
    kept = {}
    for patch in PATCHES if args.patch == "hybrid" else (args.patch,):
        tokens = keep_tokens(2 * args.batch, N_TOKENS, args.mask, generator, generator.device)
        kept[patch] = tokens.view(2, args.batch, -1)[:, part]
    return views, kept


@lru_cache(maxsize=1)  # shuffling a large corpus takes longer than a step
def shuffled(clips, seed, epoch):
    """The clips in the order of an epoch, the same on every device."""
    return clips[torch.randperm(len(clips), generator=generator_of("cpu", seed, 0, epoch))]


def generator_of(device, *numbers):
    """A generator with a seed made of several numbers: neighbouring steps draw unrelated random numbers."""
    seed = np.random.SeedSequence(numbers).generate_state(1)[0]
    return torch.Generator(device).manual_seed(int(seed))


def batches(corpus, clips, first_step, args, device):
    """The batches of the steps from `first_step` on, on the device. A thread draws the next one ahead."""
    part = slice(RANK * args.batch // WORLD, (RANK + 1) * args.batch // WORLD)  # of each batch
    with ThreadPoolExecutor(1) as thread:
        ahead = thread.submit(draw_batch, corpus, clips, first_step, args, part)
        for step in range(first_step + 1, args.steps + 1):
            views, kept = ahead.result()
            ahead = thread.submit(draw_batch, corpus, clips, step, args, part)
            yield views.to(device), {patch: tokens.to(device) for patch, tokens in kept.items()}


# --- One step ----------------------------------------------------------------------------------------------


def build_objective(args, corpus, clips, device, checkpoint):
    """The objective, which holds the model, and Adam: new, or as they are in the checkpoint."""
    torch.manual_seed(args.seed)
    model = Myna(Config(args.size, args.patch, log_mel=args.log_mel))
    objective = OBJECTIVES[args.objective](model, args).to(device)
    learned = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    adam = torch.optim.Adam(learned, args.lr, weight_decay=args.weight_decay, fused=device.type == "cuda")
    if checkpoint:
        objective.load_state_dict(checkpoint["objective"])
        adam.load_state_dict(checkpoint["optimizer"])
    else:
        ids = clips[torch.linspace(0, len(clips) - 1, 512).long()]  # some of --minutes only
        generator = torch.Generator(corpus.mel.device).manual_seed(args.seed)
        segments = corpus.sample_pairs(ids, generator).flatten(0, 1)
        objective.prepare(segments, torch.Generator().manual_seed(args.seed))
    return objective, adam


def train_step(objective, optimizer, views, kept, progress, args):
    """One update of the weights. Returns loss, spread and retrieval accuracy, (3,), on the device."""
    optimizer.zero_grad()
    figures = []
    for patch, tokens in kept.items():  # hybrid: the mean of both patch shapes' losses (section 3.5)
        figures.append(backward(objective, views, patch, tokens, 1 / len(kept), progress, args))
    if WORLD > 1:  # each process has differentiated the whole loss by its own vectors only: sum over them
        gradients = [parameter.grad for parameter in objective.parameters() if parameter.grad is not None]
        total = parameters_to_vector(gradients)
        dist.all_reduce(total)
        vector_to_parameters(total, gradients)
    optimizer.step()
    objective.update(progress)
    return torch.stack(figures).mean(dim=0)


def backward(objective, views, patch, kept, weight, progress, args):
    """Add the gradient of `weight` times one patch shape's loss to the weights' gradients.

    The loss compares all vectors of the batch, but only --chunk pairs are encoded at a time. If there are
    several chunks, stage 1 stores nothing for the backward pass and stage 3 encodes each chunk again
    (gradient caching; Gao et al. 2021): the same gradient, in the memory of one chunk.
    Returns (3,): the loss, the spread of the vectors, and their retrieval accuracy (nan without two views).
    """

    def encode(rows):
        with torch.autocast(views.device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            outputs, vectors = objective(views[:, rows].flatten(0, 1), patch, kept[:, rows].flatten(0, 1))
        return outputs.unflatten(0, (2, -1)), vectors.unflatten(0, (2, -1))  # (2, pairs, ...) each

    # 1. Encode this process's pairs, chunk by chunk.
    chunks = [slice(first, first + args.chunk) for first in range(0, views.shape[1], args.chunk)]
    with torch.set_grad_enabled(len(chunks) == 1):
        outputs, vectors = (torch.cat(parts, dim=1) for parts in zip(*map(encode, chunks)))  # (2, b, ...)

    # 2. Compute the loss of the whole batch, and its gradient with respect to this process's vectors.
    own = outputs.detach().requires_grad_()
    loss = objective.loss(gather(own), progress)
    (gradient,) = torch.autograd.grad(weight * loss, own)

    # 3. Backpropagate that gradient through the encoder, chunk by chunk.
    for rows in chunks:
        encoded = outputs if len(chunks) == 1 else encode(rows)[0]
        encoded.backward(gradient[:, rows])

    vectors = gather(vectors)  # (2, B, d)
    accuracy = retrieval_accuracy(*vectors) if objective.two_views else loss.new_tensor(torch.nan)
    return torch.stack([loss.detach(), spread(vectors.flatten(0, 1)), accuracy])


def gather(z):
    """The vectors of all processes: (2, b, d) -> (2, B, d). Only this process's own carry a gradient."""
    if WORLD == 1:
        return z
    parts = [torch.empty_like(z) for _ in range(WORLD)]
    dist.all_gather(parts, z.detach().contiguous())
    parts[RANK] = z
    return torch.cat(parts, dim=1)


# --- The run -----------------------------------------------------------------------------------------------


def save_run(out, objective, optimizer, step, settings, corpus):
    """Write checkpoint.pt beside the previous one and rename it, so that there is always a complete one."""
    if not all(parameter.isfinite().all() for parameter in objective.parameters()):
        raise ValueError(f"the weights after step {step} are not finite, nothing saved; lower --lr")
    state = {"optimizer": optimizer.state_dict(), "objective": objective.state_dict(), "step": step}
    save_model(objective.model, out / "checkpoint.pt", **state, settings=settings, corpus=corpus)


def newest_checkpoint(out):
    """The checkpoint of a run, or None before the first one. ValueError for a damaged or a foreign file."""
    path = out / "checkpoint.pt"
    checkpoint = read_checkpoint(path) if path.exists() else None
    if checkpoint and "planned_steps" not in checkpoint.get("settings", {}):
        raise ValueError(f"{path}: a model, but not a run that train.py can continue")
    return checkpoint


def start_log(out, settings, checkpoint):
    """Begin log.jsonl in the run's folder, or cut it back to the checkpoint. Returns its path."""
    path, lines = out / "log.jsonl", []
    if checkpoint and path.exists():
        whole = [line for line in path.read_text().splitlines() if line.endswith("}")]  # the last may be half
        lines = [line for line in whole if json.loads(line).get("step", 0) <= checkpoint["step"]]
    lines = lines or [json.dumps({"time": time.time(), "settings": settings})]
    out.mkdir(parents=True, exist_ok=True)
    (out / "log.part").write_text("\n".join(lines) + "\n")
    os.replace(out / "log.part", path)
    return path


def stop_soon(number, frame):
    """Handle SIGINT and SIGTERM: the loop finishes its step, saves and ends. Before it or twice: at once."""
    if STOP or not LOOP:
        raise KeyboardInterrupt
    STOP.append(number)
    if RANK == 0:
        print("\nStopping soon (--resume continues); press Ctrl-C again to stop at once.", file=sys.stderr)


def train(args, checkpoint=None):
    """The whole run: set up, train, save."""
    device = choose_device(args)
    settings = {name: value for name, value in vars(args).items() if name not in NOT_STORED}
    corpus = open_corpus(args, device)
    if checkpoint and checkpoint["corpus"] != corpus.settings:
        raise ValueError(f"{args.out} was trained on another corpus: on {checkpoint['corpus']['source']}")
    clips = choose_clips(corpus, args)
    objective, optimizer = build_objective(args, corpus, clips, device, checkpoint)
    if args.compile:
        objective.compile()

    per_epoch = len(clips) // args.batch
    if args.epochs:
        args.steps = args.epochs * per_epoch
    args.steps = args.steps or 500 * per_epoch  # section 3.6
    done = checkpoint["step"] if checkpoint else 0
    if done >= args.steps:
        raise ValueError(f"{args.out} has {done} steps already, and --steps is {args.steps}")
    planned = checkpoint["settings"]["planned_steps"] if checkpoint else args.steps  # the length of schedules
    settings |= {"steps": args.steps, "planned_steps": planned}
    if objective.scheduled and args.steps > planned:
        tqdm.write(f"the schedules of {args.objective} stay those of a run of {planned:,} steps")
    header = {**settings, "batch": args.batch, "clips": len(clips), "device": str(device)}
    log_path = start_log(args.out, header, checkpoint) if RANK == 0 else os.devnull
    tqdm.write(f"{args.out}: {args.steps:,} steps of {args.batch:,} pairs, {per_epoch:,} an epoch, {device}")

    LOOP.append(True)
    logged = saved = time.monotonic()
    options = {"total": args.steps, "initial": done, "unit": "step", "disable": RANK > 0}
    bar = tqdm(batches(corpus, clips, done, args, device), **options)
    with bar, open(log_path, "a") as log:
        for step, (views, kept) in enumerate(bar, done + 1):
            figures = train_step(objective, optimizer, views, kept, min(1, step / planned), args)
            loss, std, retrieval = figures.tolist()  # waits for a GPU
            if not math.isfinite(loss):
                raise ValueError(f"the loss of step {step} is not finite, nothing saved; lower --lr")

            speed = args.batch / (time.monotonic() - logged)
            logged = time.monotonic()
            line = {"step": step, "epoch": step / per_epoch, "loss": loss, "std": std}
            line |= {"retrieval": None if math.isnan(retrieval) else retrieval}
            line |= {"pairs_per_second": speed, "time": time.time()}
            print(json.dumps(line), file=log, flush=True)
            bar.set_postfix_str(f"loss {loss:.3f}, std {std:.2f}, {speed:,.0f} pairs/s", refresh=False)
            if step == done + 3:  # the first steps are slower
                left = tqdm.format_interval((args.steps - step) * args.batch / speed)
                tqdm.write(f"about {left} left at {speed:,.0f} pairs/s")

            stop = torch.tensor(len(STOP), device=device)
            if WORLD > 1:
                dist.all_reduce(stop)  # all processes stop after the same step
            if RANK == 0 and (stop or step == args.steps or logged - saved > 60 * args.save_minutes):
                save_run(args.out, objective, optimizer, step, settings, corpus.settings)
                saved = logged
            if stop:
                break
    if RANK == 0:
        summarise(args, log_path)


def summarise(args, log_path):
    """Print the result of a run and the next command."""
    log = [json.loads(line) for line in log_path.read_text().splitlines()[1:]]
    mean = lambda name: np.mean([line[name] for line in log[-20:]])
    others = 2 * args.batch - 1
    print(f"steps      {log[-1]['step']:,} of {args.steps:,}; figures are means of the last {len(log[-20:])}")
    print(f"loss       {log[0]['loss']:.2f} at the start, {mean('loss'):.2f} at the end")
    if args.objective == "contrast":
        print(f"           chance level: {math.log(others - args.decoupled):.2f}")
    if mean("std") < SMALLEST_SPREAD:
        print(f"collapse   all vectors are nearly equal (std {mean('std'):.3f}): use a smaller --lr")
    if log[0]["retrieval"] is not None:
        print(f"retrieval  {mean('retrieval'):.1%} of the views find their partner; chance: {1 / others:.2%}")
    print(f"next       python probe.py --task synth-key --checkpoint {args.out / 'checkpoint.pt'}")


def main():
    """Train with the settings of the command line; a mistake is one sentence and exit status 2."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop_soon)
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")  # one process prints
    try:
        train(*read_settings(sys.argv[1:]))
    except KeyboardInterrupt:
        print("\nInterrupted. The same command with --resume continues the run.", file=sys.stderr, flush=True)
        os._exit(130)  # without waiting for threads and worker processes
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error):
            error = "memory is full: use a smaller --chunk (same result) or --batch"
        elif isinstance(error, RuntimeError):
            raise
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)
    if WORLD > 1:
        dist.destroy_process_group()
    sys.exit(128 + STOP[0] if STOP else 0)


if __name__ == "__main__":
    main()
