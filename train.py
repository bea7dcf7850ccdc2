"""Stage 3 of Myna: pre-training (Algorithm 1 and section 3.6 of the paper).

    python train.py --demo                                  a tiny model on the embedded music, minutes on two cores
    python train.py --data MUSIC_FOLDER --patch vertical    the paper's recipe on your own recordings
    python train.py --data corpora/mine --out runs/mine --resume      go on with a run, or start it
    torchrun --nproc-per-node 4 train.py --data corpora/mine          the same batch, shared by four GPUs

A corpus (data.py) goes in, `runs/NAME/checkpoint.pt` comes out, with `log.jsonl` beside it. One step: draw a batch of
clips, two segments of each and the 5 of 48 patches to keep of each; encode; InfoNCE; Adam. Nothing else is random, and
all of it is drawn from (seed, step): a run that was killed and resumed does what the undisturbed one would have done,
and several processes that share a batch all draw the whole of it and compute their part.
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
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from data import FRAMES, HOP, N_MELS, SAMPLE_RATE, Corpus, build_corpus, build_embedded_corpus, report
from model import BLOCK, SIZES, Config, Myna, contrast, keep_tokens, read_checkpoint, save_model

N_TOKENS = 48  # of either patch shape
DEMO = {"size": "tiny", "batch": 256, "steps": 600, "lr": 1e-3, "out": "runs/demo"}  # a small model bears larger steps

NOT_STORED = ("demo", "epochs", "out", "resume", "save_minutes", "device", "compile")  # free to differ each time a run goes on
FREE = ("steps", "data")  # stored as defaults, and free to differ: a longer run, a corpus that was moved


def command_line():
    """The parser of the command line."""
    parser = argparse.ArgumentParser(description="Pre-train Myna. Every default is the paper's value.", allow_abbrev=False)
    parser.add_argument("--demo", action="store_true", help="the tiny model on the embedded music, minutes on two CPU cores")
    parser.add_argument("--data", help="a corpus, or a folder of music (default: the embedded music)")
    parser.add_argument("--minutes", type=float, help="use so much of the corpus only, the same nested subsets for a seed")
    patches = ["square", "vertical", "hybrid"]
    parser.add_argument("--patch", choices=patches, default="hybrid", help="16x16, 128x2 or both (default: %(default)s)")
    parser.add_argument("--size", choices=list(SIZES), default="vit-s", help="of the encoder (default: %(default)s)")
    parser.add_argument("--log-mel", action="store_true", help="log(1 + power) in front of the tokenizer")
    parser.add_argument("--batch", type=int, default=4096, help="pairs a step, over all processes (default: %(default)s)")
    parser.add_argument("--mask", type=float, default=0.9, help="share of the patches thrown away (default: %(default)s)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=int, help="passes over the corpus (default: 500)")
    length.add_argument("--steps", type=int, help="or a number of steps")
    parser.add_argument("--lr", type=float, default=3e-4, help="learning rate, constant (default: %(default)s)")
    parser.add_argument("--weight-decay", type=float, default=1e-5, help="L2 in Adam's gradient (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.1, help="of the loss (default: %(default)s)")
    parser.add_argument("--decoupled", action="store_true", help="the loss as printed, without the positive below the line")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default: %(default)s)")
    parser.add_argument("--out", help="folder of the run (default: runs/PATCH_SIZE_bBATCH_sSEED)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out, with its settings, or start it")
    parser.add_argument("--save-minutes", type=float, default=10, help="between checkpoints (default: %(default)s)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a GPU when there is one)")
    parser.add_argument("--precision", choices=["bf16", "float32"], help="of the encoder's products (default: bf16 on a GPU)")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="the encoder (default: on a GPU)")
    return parser


def read_settings(argv):
    """The command line, with the demo's or the resumed run's settings as defaults. Returns (settings, checkpoint or None)."""
    parser = command_line()
    if parser.parse_args(argv).demo:
        parser.set_defaults(**DEMO)
    args = parser.parse_args(argv)
    out = Path(args.out or f"runs/{args.patch}_{args.size}_b{args.batch}_s{args.seed}")
    checkpoint = newest_checkpoint(out) if args.resume else None
    if checkpoint:
        stored = checkpoint["settings"]
        parser.set_defaults(**stored)
        args = parser.parse_args(argv)
        differ = [name for name in stored if name not in FREE and getattr(args, name) != stored[name]]
        if differ:
            own = ", ".join(f"its --{name.replace('_', '-')} is {stored[name]}" for name in differ)
            raise ValueError(f"{out} goes on with its own settings alone: {own}")
    elif not args.resume and ((out / "log.jsonl").exists() or (out / "checkpoint.pt").exists()):
        raise ValueError(f"{out} holds a run: --resume goes on with it, another --out begins a new one")
    args.out = out
    for name in ("batch", "epochs", "steps", "lr", "temperature", "minutes", "save_minutes"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} {value}: it must be above zero")
    if args.batch < 2:
        raise ValueError("--batch 1: a contrast needs at least two pairs")
    if args.seed < 0 or not 0 <= args.weight_decay < math.inf:
        raise ValueError("--seed and --weight-decay must not be negative")
    keep_tokens(1, N_TOKENS, args.mask)  # complains of a ratio that keeps nothing
    return args, checkpoint


def newest_checkpoint(out):
    """The newest whole checkpoint in a run's folder, None when none was written yet."""
    paths = [path for path in (out / "checkpoint.pt", out / "checkpoint_before.pt") if path.exists()]
    for path in paths:
        try:
            checkpoint = read_checkpoint(path)
            if not {"settings", "optimizer", "step", "corpus"} <= checkpoint.keys():
                raise ValueError(f"{path}: a model, but not a checkpoint of training that can go on")
            return {**checkpoint, "path": path}
        except ValueError as error:
            print(f"{error}{'; trying the one before' if path is not paths[-1] else ''}", file=sys.stderr)
    if paths:
        raise ValueError(f"{out}: no checkpoint can be read, so the run cannot go on; begin a new one with another --out")


# ----------------------------------------------------------------------------------------------------------------------
# What to train on
# ----------------------------------------------------------------------------------------------------------------------


def open_corpus(args, rank):
    """The corpus that --data names, built first where need be; by rank 0 alone, while the others wait."""
    if args.data is None:
        clips = max(2048, args.batch)
        path, build = Path(f"corpora/embedded_{clips}"), lambda: build_embedded_corpus(clips, 0, path)
        if rank == 0:
            print(f"No --data: training on the embedded music, {clips} clips of ten seconds, in {path}")
    elif (Path(args.data) / "index.jsonl").exists():
        path, build = Path(args.data), None
    else:
        path, build = Path("corpora") / Path(args.data).resolve().name, lambda: build_corpus(args.data, path)
    if build and rank == 0:
        report(build())
    if dist.is_initialized():
        dist.barrier()
    return Corpus(path)


def choose_clips(corpus, minutes, seed):
    """Ids of the clips to train on: all, or `minutes` of them, the first so many of an order that the seed alone decides."""
    order = torch.randperm(len(corpus), generator=torch.Generator().manual_seed(seed))
    if minutes is None:
        return order
    ends = (corpus.frames[order] - 1).cumsum(0) * HOP / SAMPLE_RATE / 60
    if minutes > ends[-1]:
        print(f"--minutes {minutes:g}: the corpus has {ends[-1]:.0f}, all of them are used")
    chosen = order[: int((ends <= minutes).sum())]
    if len(chosen) < 2:
        raise ValueError(f"--minutes {minutes:g} holds {len(chosen)} clips of this corpus, and a batch needs two at least")
    return chosen


def draw_batch(corpus, clips, batch, step, args, part=slice(None)):
    """All that is random in a step: views (2, b, 128, 96), and of each the patches to keep, {patch: (2, b, K)}.

    Drawn from (seed, step) for the whole batch; `part` is the slice of it, b pairs, that this process computes.
    """
    epoch, position = divmod(step, len(clips) // batch)
    order = shuffled(len(clips), seed_of(args.seed, 0, epoch), clips.device)
    ids = clips[order[position * batch : (position + 1) * batch]]
    generator = torch.Generator(corpus.mel.device).manual_seed(seed_of(args.seed, 1, step))
    views = corpus.pairs(ids, generator, part)
    kept = {}
    for patch in ("square", "vertical") if args.patch == "hybrid" else (args.patch,):
        kept[patch] = keep_tokens(2 * batch, N_TOKENS, args.mask, generator, corpus.mel.device).view(2, batch, -1)[:, part]
    return views, kept


@lru_cache(maxsize=1)  # a large corpus takes longer to shuffle than a step
def shuffled(n, seed, device):
    """The order of an epoch, the same on every device."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed)).to(device)


def seed_of(*numbers):
    """Mix numbers into one seed, so that neighbouring seeds and steps have nothing to do with each other."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def one_ahead(function, step):
    """function(step), function(step + 1), ... without end, the next one made by a thread while the caller uses the last."""
    with ThreadPoolExecutor(1) as thread:
        ready = thread.submit(function, step)
        while True:
            batch = ready.result()
            step += 1
            ready = thread.submit(function, step)
            yield batch


# ----------------------------------------------------------------------------------------------------------------------
# What it will take
# ----------------------------------------------------------------------------------------------------------------------


def memory_needed(size, batch, mask, world=1):
    """Bytes that a step of `batch` pairs takes of each of `world` processes at its peak, the corpus aside.

    Counted as if all were float32; with bfloat16 on a GPU it is somewhat less.
    """
    dim, depth, _, hidden = SIZES[size]
    views = 2 * batch // world
    tokens = views * (N_TOKENS - int(mask * N_TOKENS))
    activations = tokens * depth * (9 * dim + 2 * hidden)  # kept for the backward pass
    segments = views * N_MELS * FRAMES * 2  # float16 and copies of it: the batch, the next one, its patches
    similarity = 4 * min((2 * batch) ** 2, BLOCK)  # views with views, and what the loss makes of them
    weights = 4 * depth * (4 * dim**2 + 2 * dim * hidden)  # with gradients and Adam's two means
    return 4 * (activations + segments + similarity + weights)


def memory_free(device):
    """Bytes that can still be had on the device; infinity where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return math.inf


def compiles(device):
    """Whether torch.compile works here, tried on something small."""
    try:
        torch.compile(torch.nn.GELU())(torch.ones(8, device=device))
    except Exception:  # whatever it stumbles over
        return False
    return True


def duration(seconds):
    """Seconds as people say them: '40 s', '12 min', '3.5 h', '12 days'."""
    for unit, size in (("days", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.{0 if seconds >= 10 * size else 1}f} {unit}"
    return f"{seconds:.0f} s"


# ----------------------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------------------


def batch_loss(forward, views, kept, patch, args):
    """One patch shape's loss, and the share of views whose partner is the nearest view of the whole batch (both scalars).

    With several processes, each computes its own rows' vectors and then the loss of the whole batch. It differentiates that
    by its own vectors alone; summed over the processes these gradients are the gradient of the loss.
    """
    z = forward(views.flatten(0, 1), patch, kept=kept[patch].flatten(0, 1)).unflatten(0, (2, -1))  # (2, b, projection)
    if dist.is_initialized():
        parts = [torch.empty_like(z) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, z.detach().contiguous())
        parts[dist.get_rank()] = z
        z = torch.cat(parts, dim=1)  # (2, B, projection)
    return contrast(*z, args.temperature, args.decoupled)


def train_step(forward, optimizer, views, kept, args, device):
    """One update of the weights. Returns loss and retrieval share, tensors on the device (reading them would wait for it).

    Hybrid: the mean of both shapes' losses from two passes over the same segments (section 3.5), one after the other so that
    only one pass's activations are in memory.
    """
    optimizer.zero_grad()
    figures = []
    for patch in kept:
        with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            loss, retrieval = batch_loss(forward, views, kept, patch, args)
        (loss / len(kept)).backward()
        figures.append(torch.stack([loss.detach(), retrieval]))
    if dist.is_initialized():
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
        flat = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat)
        for gradient, summed in zip(gradients, flat.split([g.numel() for g in gradients])):
            gradient.copy_(summed.view_as(gradient))
    optimizer.step()
    return torch.stack(figures).mean(dim=0)


def train(args, checkpoint):
    """The whole run: prepare, say what it will take, loop, save. Returns the signal that ended it early, or None."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
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
    args.precision = args.precision or ("bf16" if on_gpu and torch.cuda.is_bf16_supported(False) else "float32")
    if world > 1 and not dist.is_initialized():  # a day, since the others wait while rank 0 builds a corpus
        backend, long = "nccl" if on_gpu else "gloo", datetime.timedelta(days=1)
        dist.init_process_group(backend, timeout=long, device_id=device if on_gpu else None)
    say = tqdm.write if rank == 0 else lambda line: None
    wanted = on_gpu if args.compile is None else args.compile
    if wanted and not compiles(device):
        needed = "torch.compile does not work here: it needs a C++ compiler, Python's headers and, for a GPU, Triton"
        if args.compile:
            raise ValueError(f"--compile: {needed}")
        say(f"{needed}; going on without it, more slowly")
        wanted = False
    args.compile = wanted

    # 1) the corpus, and how much of it
    corpus = open_corpus(args, rank)
    clips = choose_clips(corpus, args.minutes, args.seed)
    batch = args.batch
    if batch > len(clips):
        if args.minutes is None:
            found = f"{corpus.path} holds {len(clips)}"
            raise ValueError(f"a batch of {batch} needs as many clips, and {found}: take --batch {len(clips)} or less")
        batch = len(clips) // world * world
        say(f"--minutes {args.minutes:g}: that is {len(clips)} clips, and the batch shrinks from {args.batch} to {batch}")
    if batch % world:
        raise ValueError(f"a batch of {batch} cannot be shared evenly by {world} processes")
    part = slice(rank * batch // world, (rank + 1) * batch // world)
    per_epoch = len(clips) // batch
    total = args.epochs * per_epoch if args.epochs else (args.steps or 500 * per_epoch)

    # 2) memory: the step's, and the corpus's when it fits on the GPU
    needed, free = memory_needed(args.size, batch, args.mask, world), memory_free(device)
    if needed * (1 if on_gpu else world) > free:
        sizes = f"takes about {needed / 1e9:.1f} GB in each process and {free / 1e9:.1f} GB are free on {device}"
        raise ValueError(f"a batch of {batch} {sizes}: take a smaller --batch")
    if on_gpu and needed + corpus.mel.nbytes < 0.9 * torch.cuda.mem_get_info(device)[1]:
        corpus.to(device)  # decided by all the memory there is, not by what is free: the same each time and for each process
        clips = clips.to(device)  # so that drawing a batch copies nothing from here to there: that would wait for the GPU

    # 3) model and optimiser
    torch.manual_seed(args.seed)
    model = Myna(Config(args.size, args.patch, log_mel=args.log_mel)).to(device)
    optimizer = torch.optim.Adam(model.parameters(), args.lr, weight_decay=args.weight_decay, fused=on_gpu)
    step = 0  # steps done
    identity = {**corpus.settings, "clips": len(corpus)}
    if checkpoint:
        if checkpoint["corpus"] != identity:
            source = checkpoint["corpus"]["source"]
            raise ValueError(f"{args.out} was trained on another corpus, of {source}, not on what {corpus.path} holds now")
        model.load_state_dict(checkpoint["model"])
        for group in checkpoint["optimizer"]["param_groups"]:
            group["fused"] = on_gpu  # and not as it was where the run was begun
        optimizer.load_state_dict(checkpoint["optimizer"])
        step = checkpoint["step"]
    forward = torch.compile(model) if args.compile else model

    # 4) the log, cut back to the checkpoint
    log_path = args.out / "log.jsonl"
    settings = {key: value for key, value in vars(args).items() if key not in NOT_STORED} | {"steps": total}
    if rank == 0:
        args.out.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({"time": time.time(), "settings": {**settings, "clips": len(clips), "device": str(device)}})]
        if checkpoint:
            old = log_path.read_text().splitlines() if log_path.exists() else []
            lines = (old or lines)[:1] + [line for line in old[1:] if line.endswith("}") and json.loads(line)["step"] <= step]
        (args.out / "log.part").write_text("".join(line + "\n" for line in lines))
        os.replace(args.out / "log.part", log_path)

    whole = not checkpoint or checkpoint["path"].name == "checkpoint.pt"  # else it is damaged: the one before stays

    def save():
        nonlocal whole
        if not all(p.isfinite().all() for p in model.parameters()):  # the loss would only notice a step later
            raise ValueError(f"the weights after step {step} are not finite: stopped, nothing saved; try a smaller --lr")
        newest, before, fresh = args.out / "checkpoint.pt", args.out / "checkpoint_before.pt", args.out / "checkpoint_new.pt"
        save_model(model, fresh, optimizer=optimizer.state_dict(), step=step, settings=settings, corpus=identity)
        if newest.exists() and whole:
            os.replace(newest, before)
        os.replace(fresh, newest)
        whole = True

    memory = f"about {needed / 1e9:.1f} GB of memory"
    say(f"{args.out}: {total:,} steps of {batch:,} pairs, {per_epoch:,} an epoch, on {device}; {memory}")

    # 5) the loop
    stop = []

    def told_to_stop(number, frame):
        if stop:  # for the second time
            raise KeyboardInterrupt
        stop.append(number)
        print("\nStopping after this step; once more to stop at once.", file=sys.stderr)

    signal.signal(signal.SIGINT, told_to_stop)
    signal.signal(signal.SIGTERM, told_to_stop)

    def draw(at):
        views, kept = draw_batch(corpus, clips, batch, at, args, part)
        if on_gpu and not views.is_cuda:  # pinned memory is copied while the GPU works; for other memory it would wait
            views, kept = views.pin_memory(), {patch: tokens.contiguous().pin_memory() for patch, tokens in kept.items()}
        return views, kept

    batches = map(draw, itertools.count(step)) if corpus.mel.is_cuda else one_ahead(draw, step)
    every = 10 if on_gpu else 1  # steps between looks at the figures, since a look waits for the GPU
    pending, looks, estimated = [], 0, False
    begun = looked = saved = time.monotonic()
    bar = tqdm(total=total, initial=step, unit="step", disable=rank > 0)
    with bar, open(log_path if rank == 0 else os.devnull, "a") as log:
        while step < total:
            views, kept = next(batches)
            views = views.to(device, non_blocking=True)
            kept = {patch: tokens.to(device, non_blocking=True) for patch, tokens in kept.items()}
            pending.append(train_step(forward, optimizer, views, kept, args, device))
            step += 1
            bar.update()
            if step % every and step < total:
                continue

            seen, now = torch.stack(pending).cpu(), time.monotonic()
            broken = (~seen[:, 0].isfinite()).nonzero()
            if len(broken):  # before anything is logged or saved
                at = step - len(pending) + 1 + int(broken[0])
                raise ValueError(f"the loss of step {at} is not finite: stopped, earlier checkpoints are kept; lower --lr")
            loss, retrieval = seen.mean(dim=0).tolist()
            speed = batch * len(pending) / (now - looked)
            epoch = step / per_epoch
            shown = f"epoch {epoch:.1f}, loss {loss:.3f}, nearest {retrieval:.1%}, {speed:,.0f} pairs/s"
            bar.set_postfix_str(shown, refresh=False)
            if rank == 0:
                line = {"step": step, "epoch": epoch, "loss": loss, "retrieval": retrieval, "pairs_per_second": speed}
                print(json.dumps({"time": time.time(), **line}), file=log, flush=True)
            pending, looked, looks = [], now, looks + 1
            if not estimated and (looks == 3 or (looks > 1 and now - begun > 10)):  # the first steps are slower
                estimated = True
                left = (total - step) * batch / speed
                hint = "; python train.py --demo takes minutes" if left > 3600 and not on_gpu else ""
                say(f"about {duration(left)} to go at {speed:,.0f} pairs/s{hint}")

            if world > 1:  # all stop at the same step, whoever was told to
                told = torch.tensor(len(stop), device=device)
                dist.all_reduce(told)
                stop += [signal.SIGTERM] if told and not stop else []
            if rank == 0 and (stop or step == total or now - saved > args.save_minutes * 60):
                try:
                    save()
                except OSError as error:  # a full disk, say: the checkpoints before are as they were
                    if stop or step == total:
                        raise
                    say(f"{error}; training goes on, and tries again in {args.save_minutes:g} minutes")
                saved = time.monotonic()
            if stop:
                break

    # 6) what became of it
    say(f"{args.out / 'checkpoint.pt'} holds the model after {step:,} of {total:,} steps")
    if stop:
        say(f"Stopped by a signal; to go on: python train.py --resume --out {args.out}")
        return stop[0]
    looks = [json.loads(line) for line in log_path.read_text().splitlines()[1:]] if rank == 0 else []
    if looks:
        last = looks[-20:]
        loss, retrieval = (sum(look[key] for look in last) / len(last) for key in ("loss", "retrieval"))
        others = 2 * batch - 1
        nothing = math.log(others - args.decoupled)
        say(f"loss      {looks[0]['loss']:.2f} at the start, {loss:.2f} at the end; knowing nothing costs {nothing:.2f}")
        if loss > nothing - 0.05:
            say("          so nothing was learned yet; if it stays so, all vectors have become one: try a smaller --lr")
        say(f"nearest   {retrieval:.1%} of the views find their partner nearest of {others:,} others; chance: {1 / others:.2%}")
        say(f"next      python probe.py --task synth-key --checkpoint {args.out / 'checkpoint.pt'}")


def main():
    """The command line."""
    try:
        stopped = train(*read_settings(sys.argv[1:]))
    except (ValueError, OSError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)
    except torch.OutOfMemoryError as error:
        print(f"train.py: the GPU's memory is full ({str(error).splitlines()[0]}): take a smaller --batch", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nInterrupted; the same command with --resume goes on from the last checkpoint.", file=sys.stderr, flush=True)
        os._exit(130)  # without waiting for what threads and workers are in the middle of
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(128 + stopped if stopped else 0)


if __name__ == "__main__":
    main()
