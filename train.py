"""Stage 3 of Myna: pre-training (Algorithm 1 and section 3.6 of the paper).

Input: a corpus (data.py) or a folder of music. Output: runs/NAME/checkpoint.pt and, beside it, log.jsonl.

    python train.py --demo                                        a tiny model, minutes on two CPU cores
    python train.py --patch vertical --batch 4096                 the paper's recipe, on the embedded music
    python train.py --data corpora/mine --out runs/mine --resume  on your music; continue a run, or start it
    torchrun --nproc-per-node 4 train.py --data corpora/mine      one batch, shared by four GPUs
    python train.py --objective byol                              another objective (the end of model.py)

One step: draw a batch of clips, two segments of each clip, and the 5 of 48 patches to keep of each segment;
encode; InfoNCE; Adam. All random numbers of a step are drawn from (seed, step). So on one machine, a run that
was killed and resumed gives the same weights as one that was not, and processes that share a batch draw the
same one.
"""

import argparse
import datetime
import itertools
import json
import math
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from data import HOP, SAMPLE_RATE, Corpus, build_corpus, build_embedded_corpus, report
from model import N_TOKENS, OBJECTIVES, PATCHES, SIZES, Config, Myna
from model import keep_tokens, read_checkpoint, retrieval_accuracy, save_model, spread

RANK = int(os.environ.get("RANK", 0))  # index of this process (torchrun sets it)
WORLD = int(os.environ.get("WORLD_SIZE", 1))  # number of processes

# --- Settings ----------------------------------------------------------------------------------------------

DEMO = {"size": "tiny", "batch": 256, "steps": 600, "lr": 1e-3, "out": "runs/demo"}
NOT_STORED = ("demo", "epochs", "out", "resume", "save_minutes", "device", "compile", "chunk")
MAY_CHANGE = ("steps", "data")  # stored, but a resumed run may be longer, and its corpus may have moved
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
    """The settings of a run, and the checkpoint that it continues or None.

    A setting that is not in `argv` gets its default. --demo replaces the defaults by DEMO, --resume by the
    settings of the run that is continued. Raises ValueError for settings that cannot be used.
    """
    parser = command_line()
    if parser.parse_args(argv).demo:
        parser.set_defaults(**DEMO)
    args = parser.parse_args(argv)
    objective = "" if args.objective == "contrast" else f"{args.objective}_"
    out = Path(args.out or f"runs/{objective}{args.patch}_{args.size}_b{args.batch}_s{args.seed}")

    checkpoint = newest_checkpoint(out) if args.resume else None
    if checkpoint:
        stored = checkpoint.get("settings", {})
        if not {"objective", "planned_steps"} <= stored.keys():
            raise ValueError(f"{checkpoint['path']}: a model, but not a run that train.py can continue")
        parser.set_defaults(**stored)
        args = parser.parse_args(argv)
        for name, value in stored.items():
            if name not in MAY_CHANGE and getattr(args, name, value) != value:
                raise ValueError(f"{out} continues with its own settings: its {option(name)} is {value}")
    elif not args.resume and ((out / "log.jsonl").exists() or (out / "checkpoint.pt").exists()):
        raise ValueError(f"{out} holds a run: continue it with --resume, or name another folder with --out")
    args.out = out
    if args.mask is None:
        args.mask = OBJECTIVES[args.objective].mask
    check_settings(args)
    return args, checkpoint


def option(name):
    """The command-line option of a setting: "save_minutes" -> "--save-minutes"."""
    return f"--{name.replace('_', '-')}"


def check_settings(args):
    """Raise ValueError for settings that cannot be used."""
    for name in "batch chunk epochs steps lr temperature minutes save_minutes clusters".split():
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{option(name)} {value}: it must be above zero")
    if args.batch < 2:
        raise ValueError("--batch 1: a batch needs at least two pairs")
    if args.seed < 0 or not 0 <= args.weight_decay < math.inf:
        raise ValueError("--seed and --weight-decay must not be negative")
    keep_tokens(1, N_TOKENS, args.mask)  # raises ValueError for a mask ratio that keeps nothing
    objective = OBJECTIVES[args.objective]
    if args.patch not in objective.patches:
        raise ValueError(f"--objective {args.objective} takes --patch {' or '.join(objective.patches)}")
    if int(args.mask * N_TOKENS) == 0 and not objective.two_views:
        raise ValueError(f"--mask {args.mask:g}: --objective {args.objective} needs hidden patches")


def newest_checkpoint(out):
    """The newest undamaged checkpoint in a run's folder, and its "path"; None when none was written yet.

    Raises ValueError when all are damaged.
    """
    damaged = None
    for name in ("checkpoint_new.pt", "checkpoint.pt", "checkpoint_previous.pt"):  # see `save_run`
        if (out / name).exists():
            try:
                return {**read_checkpoint(out / name), "path": out / name}
            except ValueError as error:
                damaged = error
                print(f"{error}; trying the previous checkpoint", file=sys.stderr)
    if damaged:
        raise ValueError(f"{out}: no checkpoint can be read, so the run cannot continue; name another --out")


# --- Batches -----------------------------------------------------------------------------------------------


def open_corpus(args):
    """The corpus that --data names. If it must be built, process 0 builds it and the others wait."""
    if args.data is None:
        n_clips = max(2048, args.batch)
        path = Path(f"corpora/embedded_{n_clips}")
        say(f"No --data: training on the embedded music, {n_clips} clips of ten seconds, in {path}")
        build = lambda: build_embedded_corpus(n_clips, seed=0, out=path)  # the same music for every --seed
    elif (Path(args.data) / "index.jsonl").exists():
        path, build = Path(args.data), None
    else:
        path = Path("corpora") / Path(args.data).resolve().name
        build = lambda: build_corpus(args.data, path)
    if build and RANK == 0:
        report(build())
    if dist.is_initialized():
        dist.barrier()
    return Corpus(path)


def choose_clips(corpus, args):
    """Ids of the clips to train on, in an order that depends on the seed alone: all, or --minutes of them.

    Reduces --batch to what --minutes holds. Raises ValueError when the corpus is smaller than a batch.
    """
    order = torch.randperm(len(corpus), generator=torch.Generator().manual_seed(args.seed))
    if args.minutes is not None:
        seconds = (corpus.frames[order] - 1) * HOP / SAMPLE_RATE  # n frames span n - 1 hops
        ends = seconds.cumsum(0) / 60  # minutes of sound up to the end of each clip
        order = order[ends <= args.minutes]
        if len(order) < args.batch:
            smaller = len(order) // WORLD * WORLD
            say(f"--minutes {args.minutes:g}: {len(order)} clips, so --batch is {smaller}, not {args.batch}")
            args.batch = smaller
    if len(order) < max(2, args.batch):
        raise ValueError(f"--batch {args.batch}, but there are {len(order)} clips: use a smaller --batch")
    if args.batch % WORLD:
        raise ValueError(f"a batch of {args.batch} cannot be shared evenly by {WORLD} processes")
    return order


def choose_data(args, checkpoint, device):
    """The corpus and the clips to train on; on the GPU when they take less than half of its memory.

    Raises ValueError when the checkpoint was trained on another corpus.
    """
    corpus = open_corpus(args)
    if checkpoint and checkpoint["corpus"] != corpus.settings:
        source = checkpoint["corpus"]["source"]
        raise ValueError(f"{args.out} was trained on another corpus than {corpus.path}: on {source}")
    clips = choose_clips(corpus, args)
    if device.type == "cuda" and 2 * corpus.mel.nbytes < torch.cuda.mem_get_info(device)[1]:
        return corpus.to(device), clips.to(device)
    return corpus, clips


def draw_batch(corpus, clips, step, args, part=slice(None)):
    """The random choices of a step: views (2, b, 128, 96), and the tokens to keep, {patch: (2, b, K)}.

    They are drawn from (seed, step) for the whole batch of B pairs; `part` selects the b pairs of this
    process.
    """
    epoch, position = divmod(step, len(clips) // args.batch)
    order = shuffled(len(clips), mix_seed(args.seed, 0, epoch), clips.device)
    ids = clips[order[position * args.batch : (position + 1) * args.batch]]
    device = corpus.mel.device
    generator = torch.Generator(device).manual_seed(mix_seed(args.seed, 1, step))
    views = corpus.sample_pairs(ids, generator, part)
    kept = {}
    for patch in PATCHES if args.patch == "hybrid" else (args.patch,):
        tokens = keep_tokens(2 * args.batch, N_TOKENS, args.mask, generator, device)
        kept[patch] = tokens.view(2, args.batch, -1)[:, part]
    return views, kept


@lru_cache(maxsize=1)  # shuffling a large corpus takes longer than a step
def shuffled(n, seed, device):
    """The order of the clips in an epoch, the same on every device."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed)).to(device)


def mix_seed(*numbers):
    """One seed from several numbers, so that neighbouring seeds and steps give unrelated random numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def batches(corpus, clips, first_step, args, device):
    """The batches from `first_step` on, on the device. A thread draws the next one during the step."""
    share = args.batch // WORLD
    part = slice(RANK * share, (RANK + 1) * share)
    with ThreadPoolExecutor(1) as thread:
        ahead = thread.submit(draw_batch, corpus, clips, first_step, args, part)
        for step in itertools.count(first_step + 1):
            views, kept = ahead.result()
            ahead = thread.submit(draw_batch, corpus, clips, step, args, part)
            yield views.to(device), {patch: tokens.to(device) for patch, tokens in kept.items()}


# --- One step ----------------------------------------------------------------------------------------------


def gather(z):
    """The vectors of all processes: (2, b, d) -> (2, B, d). Only this process's own carry a gradient."""
    if not dist.is_initialized():
        return z
    parts = [torch.empty_like(z) for _ in range(WORLD)]
    dist.all_gather(parts, z.detach().contiguous())
    parts[RANK] = z
    return torch.cat(parts, dim=1)


def backward(objective, views, patch, kept, weight, progress, args):
    """Add the gradient of `weight` times one patch shape's loss to the weights' gradients.

    The loss compares all vectors of the batch, so there are three stages:
    1. Encode this process's pairs, --chunk of them at a time.
    2. Compute the loss of the whole batch, and its gradient with respect to this process's vectors.
    3. Backpropagate that gradient through the encoder, chunk by chunk.
    If there are several chunks, stage 1 stores nothing for the backward pass and stage 3 encodes each chunk
    again (gradient caching; Gao et al. 2021): the same gradient, in the memory of one chunk.
    Returns (3,): the loss, the spread of the vectors, and their retrieval accuracy (nan without two views).
    """

    def encode(rows):
        mel, tokens = views[:, rows].flatten(0, 1), kept[:, rows].flatten(0, 1)
        with torch.autocast(mel.device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            outputs, vectors = objective(mel, patch, tokens)
        return outputs.unflatten(0, (2, -1)), vectors.unflatten(0, (2, -1))  # (2, pairs, ...) each

    # 1. encode
    chunks = [slice(first, first + args.chunk) for first in range(0, views.shape[1], args.chunk)]
    with torch.set_grad_enabled(len(chunks) == 1):
        outputs, vectors = zip(*[encode(rows) for rows in chunks])
        outputs, vectors = torch.cat(outputs, dim=1), torch.cat(vectors, dim=1)  # (2, b, ...) each

    # 2. the loss of the whole batch
    own = outputs.detach().requires_grad_()
    loss = objective.loss(gather(own), progress)
    (gradient,) = torch.autograd.grad(weight * loss, own)

    # 3. backpropagate
    if len(chunks) == 1:
        outputs.backward(gradient)
    else:
        for rows in chunks:
            encode(rows)[0].backward(gradient[:, rows])

    vectors = gather(vectors)  # (2, B, d)
    accuracy = retrieval_accuracy(*vectors) if objective.two_views else loss.new_tensor(torch.nan)
    return torch.stack([loss.detach(), spread(vectors.flatten(0, 1)), accuracy])


def sum_gradients(parameters):
    """Sum the gradients of all processes. Each has differentiated the whole loss by its own vectors only."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    for gradient, total in zip(gradients, flat.split([gradient.numel() for gradient in gradients])):
        gradient.copy_(total.view_as(gradient))


def train_step(objective, optimizer, views, kept, progress, args):
    """One update of the weights. Returns loss, spread and retrieval accuracy, (3,), on the device.

    Hybrid: the mean of both patch shapes' losses for the same segments (section 3.5). The shapes are computed
    one after the other, so that memory is that of one.
    """
    optimizer.zero_grad()
    figures = []
    for patch, tokens in kept.items():
        figures.append(backward(objective, views, patch, tokens, 1 / len(kept), progress, args))
    if dist.is_initialized():
        sum_gradients(objective.parameters())
    optimizer.step()
    objective.update(progress)
    return torch.stack(figures).mean(dim=0)


# --- The run -----------------------------------------------------------------------------------------------


def say(line):
    """Print a line, once for all processes."""
    if RANK == 0:
        tqdm.write(line)


def choose_device(args):
    """The device of this process. Sets the defaults that depend on it, and connects the processes.

    Raises ValueError for a --device or a --compile that does not work on this machine.
    """
    name = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from error

    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    args.chunk = args.chunk or (args.batch if on_gpu else 256)
    if args.precision is None:
        args.precision = "bf16" if on_gpu and torch.cuda.is_bf16_supported(False) else "float32"
    if args.compile is None:
        args.compile = on_gpu
    if args.compile and not compile_works(device):
        needs = "a C++ compiler, Python's headers and, for a GPU, Triton"
        raise ValueError(f"torch.compile does not work here (it needs {needs}): use --no-compile")

    if WORLD > 1 and not dist.is_initialized():
        backend, to_device = ("nccl", device) if on_gpu else ("gloo", None)
        a_day = datetime.timedelta(days=1)  # the others wait while process 0 builds a corpus
        dist.init_process_group(backend, timeout=a_day, device_id=to_device)
    return device


def compile_works(device):
    """Whether torch.compile works on this machine, tried on a small module."""
    try:
        torch.compile(torch.nn.GELU())(torch.ones(8, device=device))
        return True
    except Exception:  # torch raises many kinds of error here
        return False


def build_objective(args, corpus, clips, device, checkpoint):
    """The objective, which holds the model, and Adam: new, or as they are in the checkpoint."""
    torch.manual_seed(args.seed)
    model = Myna(Config(args.size, args.patch, log_mel=args.log_mel))
    objective = OBJECTIVES[args.objective](model, args).to(device)
    learned = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    fused = device.type == "cuda"
    optimizer = torch.optim.Adam(learned, args.lr, weight_decay=args.weight_decay, fused=fused)
    if checkpoint:
        objective.load_state_dict(checkpoint["objective"])
        groups = optimizer.state_dict()["param_groups"]  # the settings above; only Adam's means are loaded
        optimizer.load_state_dict({**checkpoint["optimizer"], "param_groups": groups})
    else:
        ids = clips[torch.linspace(0, len(clips) - 1, 512).long()]  # some of --minutes only
        generator = torch.Generator(corpus.mel.device).manual_seed(args.seed)
        segments = corpus.sample_pairs(ids, generator).flatten(0, 1)
        objective.prepare(segments, torch.Generator().manual_seed(args.seed))
    return objective, optimizer


def start_log(out, settings, checkpoint):
    """Prepare the run's folder, and cut its log back to the checkpoint. Returns the path of log.jsonl."""
    if RANK > 0:
        return Path(os.devnull)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "log.jsonl"
    lines = [json.dumps({"time": time.time(), "settings": settings})]
    if checkpoint:
        os.replace(checkpoint["path"], out / "checkpoint.pt")  # instead of a damaged or older one
        old = path.read_text().splitlines() if path.exists() else []
        lines = old[:1] or lines
        for line in old[1:]:  # the last one may be cut short
            if line.endswith("}") and json.loads(line)["step"] <= checkpoint["step"]:
                lines.append(line)
    (out / "log.part").write_text("".join(line + "\n" for line in lines))
    os.replace(out / "log.part", path)
    return path


def save_run(out, objective, optimizer, step, settings, corpus):
    """Write checkpoint.pt, and keep its predecessor as checkpoint_previous.pt.

    The older predecessor is removed first, so that the disk holds two checkpoints at most. Raises ValueError
    when a weight is not finite, and OSError when the file cannot be written; checkpoint.pt is then unchanged.
    """
    if not all(parameter.isfinite().all() for parameter in objective.parameters()):
        raise ValueError(f"the weights after step {step} are not finite: stopped, nothing saved; lower --lr")
    newest, new, previous = out / "checkpoint.pt", out / "checkpoint_new.pt", out / "checkpoint_previous.pt"
    previous.unlink(missing_ok=True)
    state = {"optimizer": optimizer.state_dict(), "objective": objective.state_dict(), "step": step}
    save_model(objective.model, new, **state, settings=settings, corpus=corpus)
    if newest.exists():
        os.replace(newest, previous)
    os.replace(new, newest)


@contextmanager
def stop_signals():
    """A list that collects SIGINT and SIGTERM for the loop to read. A second signal interrupts at once."""
    received = []

    def receive(number, frame):
        if received:
            raise KeyboardInterrupt
        received.append(number)
        print("\nStopping soon; press Ctrl-C again to stop at once.", file=sys.stderr)

    handlers = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def share_stop(stop, device):
    """Add a signal to `stop` when any process has received one, so that all stop after the same step."""
    if dist.is_initialized():
        stopped = torch.tensor(len(stop), device=device)
        dist.all_reduce(stopped)
        if stopped and not stop:
            stop.append(signal.SIGTERM)


def log_line(figures, step, per_epoch, speed):
    """A line of log.jsonl as a dict: means of `figures` (steps, 3).

    `speed` is in pairs per second. Raises ValueError when a loss is not finite.
    """
    broken = (~figures[:, 0].isfinite()).nonzero()
    if len(broken):
        first = step - len(figures) + 1 + int(broken[0])
        raise ValueError(f"the loss of step {first} is not finite: stopped, nothing saved; lower --lr")
    loss, std, accuracy = figures.mean(dim=0).tolist()
    retrieval = None if math.isnan(accuracy) else accuracy
    line = {"step": step, "epoch": step / per_epoch, "loss": loss, "std": std, "retrieval": retrieval}
    return {**line, "pairs_per_second": speed, "time": time.time()}


def train(args, checkpoint=None):
    """The whole run: set up, train, save. Returns the signal that ended it early, or None."""
    device = choose_device(args)
    settings = {name: value for name, value in vars(args).items() if name not in NOT_STORED}
    corpus, clips = choose_data(args, checkpoint, device)
    objective, optimizer = build_objective(args, corpus, clips, device, checkpoint)
    if args.compile:
        objective.compile()

    per_epoch = len(clips) // args.batch
    done = checkpoint["step"] if checkpoint else 0
    args.steps = args.epochs * per_epoch if args.epochs else (args.steps or 500 * per_epoch)
    planned = checkpoint["settings"]["planned_steps"] if checkpoint else args.steps  # the length of schedules
    settings |= {"steps": args.steps, "planned_steps": planned}
    log_path = start_log(args.out, {**settings, "clips": len(clips), "device": str(device)}, checkpoint)
    say(f"{args.out}: {args.steps:,} steps of {args.batch:,} pairs, {per_epoch:,} in an epoch, on {device}")
    if args.steps > planned and objective.scheduled:
        say(f"Schedules end at step {planned:,}, as planned when the run began.")

    interval = 10 if device.type == "cuda" else 1  # steps between log lines: reading the figures waits
    figures, n_lines = [], 0
    begun = logged = saved = time.monotonic()
    bar = tqdm(total=args.steps, initial=done, unit="step", disable=RANK > 0)
    with stop_signals() as stop, bar, open(log_path, "a") as log:
        steps = range(done + 1, args.steps + 1)
        for step, (views, kept) in zip(steps, batches(corpus, clips, done, args, device)):
            progress = min(1, step / planned)
            figures.append(train_step(objective, optimizer, views, kept, progress, args))
            bar.update()
            if step % interval and step < args.steps:
                continue

            figures = torch.stack(figures).cpu()  # (steps, 3); waits for a GPU
            now = time.monotonic()
            speed = args.batch * len(figures) / (now - logged)
            line = log_line(figures, step, per_epoch, speed)
            print(json.dumps(line), file=log, flush=True)
            bar.set_postfix_str(f"loss {line['loss']:.3f}, std {line['std']:.2f}, {speed:,.0f} pairs/s")
            figures, logged, n_lines = [], now, n_lines + 1
            if n_lines == 3 or (n_lines == 1 and now - begun > 10):  # speed is lower in the first steps
                left = tqdm.format_interval((args.steps - step) * args.batch / speed)
                say(f"about {left} left ({speed:,.0f} pairs/s)")

            share_stop(stop, device)
            last = step == args.steps or len(stop) > 0
            if RANK == 0 and (last or now - saved > 60 * args.save_minutes):
                try:
                    save_run(args.out, objective, optimizer, step, settings, corpus.settings)
                except OSError as error:
                    if last:
                        raise
                    say(f"{error}; training continues, and saves again in {args.save_minutes:g} minutes")
                saved = time.monotonic()
            if stop:
                break
    if RANK == 0:
        summarise(args, log_path)
    return stop[0] if stop else None


def summarise(args, log_path):
    """Print the result of a run and the next command."""
    log = [json.loads(line) for line in log_path.read_text().splitlines()[1:]]
    step = log[-1]["step"] if log else 0
    path = args.out / "checkpoint.pt"
    say(f"{path} holds the model after {step:,} of {args.steps:,} steps")
    if step < args.steps:
        say(f"Stopped by a signal. To continue: python train.py --resume --out {args.out}")
        return
    loss, std = (np.mean([line[name] for line in log[-20:]]) for name in ("loss", "std"))
    others = 2 * args.batch - 1
    say(f"loss       {log[0]['loss']:.2f} at the start, {loss:.2f} at the end")
    if args.objective == "contrast":
        candidates = others - 1 if args.decoupled else others
        say(f"           chance level: {math.log(candidates):.2f}")
    if std < SMALLEST_SPREAD:
        say(f"collapse   all vectors are nearly equal (standard deviation {std:.3f}): use a smaller --lr")
    if log[0]["retrieval"] is not None:
        accuracy = np.mean([line["retrieval"] for line in log[-20:]])
        say(f"retrieval  {accuracy:.1%} of the views find their partner; chance level: {1 / others:.2%}")
    say(f"next       python probe.py --task synth-key --checkpoint {path}")


def main():
    """Train with the settings of the command line; a mistake is one sentence and exit status 2."""
    try:
        stopped = train(*read_settings(sys.argv[1:]))
    except KeyboardInterrupt:
        print("\nInterrupted. The same command with --resume continues the run.", file=sys.stderr, flush=True)
        os._exit(130)  # without waiting for threads and worker processes
    except (ValueError, OSError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)
    except (RuntimeError, MemoryError) as error:
        is_full = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        if not (is_full or "can't allocate memory" in str(error)):
            raise
        print("train.py: memory is full: use a smaller --chunk (same result) or --batch", file=sys.stderr)
        sys.exit(2)
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(128 + stopped if stopped else 0)


if __name__ == "__main__":
    main()
