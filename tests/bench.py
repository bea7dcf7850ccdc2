"""How fast: against the obvious way of doing the same work in the same run, and against the machine.

    python tests/bench.py            all of it, minutes on two CPU cores; with a GPU, on that
    python tests/bench.py step grid  some of it: mel, corpus, pairs, step, objectives, ranks, grid, faults

A line gives the figure, that of the obvious way, their ratio, and the limit: the operations or bytes that
the work needs over what this machine does in a plain matrix product or a plain copy, measured first. Every
stage does a fixed amount of work, once to warm up and then once to three times, the best of which counts; of
train.py, the median of a run's steps. Not collected by pytest.
"""

import argparse
import json
import os
import pickle
import random
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path

import numpy as np
import soundfile
import torch
from torch.nn import functional as F

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from data import (  # noqa: E402
    CORES, FRAMES, HOP, N_FFT, N_MELS, SAMPLE_RATE, Corpus,
    build_corpus, build_embedded_corpus, load_audio, mel_filterbank, mel_spectrogram,
)  # fmt: skip
from model import OBJECTIVES, SIZES, Config, Myna, info_nce, patchify  # noqa: E402
from probe import CHECK, GRID, fit_grid  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GPU = DEVICE.type == "cuda"
TOKENS, KEPT = 48, 5


def seconds(work, repeats=3):
    """The shortest wall time of so many calls, after one that does not count, a GPU waited for."""
    best = float("inf")
    for repeat in range(repeats + 1):
        started = time.perf_counter()
        work()
        if GPU:
            torch.cuda.synchronize()
        if repeat:
            best = min(best, time.perf_counter() - started)
    return best


def machine():
    """What this machine does: (operations a second in a float32 matrix product, bytes a second in a copy)."""
    n = 8192 if GPU else 1536
    a = torch.randn(n, n, device=DEVICE)
    big = torch.empty(2**30 if GPU else 2**27, dtype=torch.uint8, device=DEVICE).random_()
    other = big.clone()
    return 2 * n**3 / seconds(lambda: a @ a), 2 * len(big) / seconds(lambda: other.copy_(big))


def line(name, unit, ours, obvious=None, limit=None):
    """One row of the table; figures are per second, more is better."""
    cells = [f"{name:<44}", f"{ours:>12,.0f}", f"{obvious:>12,.0f}" if obvious else " " * 12]
    cells += [
        f"{ours / obvious:>7.1f}x" if obvious else " " * 8,
        f"{limit:>14,.0f} {ours / limit:>5.0%}" if limit else " " * 20,
        f"  {unit}",
    ]
    print("".join(cells).rstrip(), flush=True)


def bench_mel(flops, copy):
    """The mel front end, against an STFT as a convolution with windowed sines and cosines."""
    waves = torch.randn(64 if GPU else 8, 10 * SAMPLE_RATE, device=DEVICE)
    angle = 2 * torch.pi * torch.outer(torch.arange(N_FFT // 2 + 1), torch.arange(N_FFT)) / N_FFT
    kernels = (
        (torch.stack([angle.cos(), angle.sin()]) * torch.hann_window(N_FFT)).view(-1, 1, N_FFT).to(DEVICE)
    )
    bank = mel_filterbank().to(DEVICE)

    def convolution():
        padded = F.pad(waves[:, None], (N_FFT // 2, N_FFT // 2), mode="reflect")
        return bank @ F.conv1d(padded, kernels, stride=HOP).unflatten(1, (2, -1)).square().sum(dim=1)

    assert torch.allclose(convolution(), mel_spectrogram(waves), rtol=1e-2, atol=1e-2)
    sound = waves.numel() / SAMPLE_RATE
    operations = (
        waves.numel() / HOP * (2.5 * N_FFT * np.log2(N_FFT) + 2 * N_MELS * (N_FFT // 2 + 1))
    )  # a real FFT, the bank
    limit = sound / (operations / flops)
    line(
        "mel of 10 s waves, not a convolution",
        "seconds of sound",
        sound / seconds(lambda: mel_spectrogram(waves)),
        sound / seconds(convolution),
        limit,
    )


def bench_corpus(flops, copy):
    """Four hours a core into a corpus, against one file after the other; the limit is decoding alone."""
    with tempfile.TemporaryDirectory() as folder:
        music, generator = Path(folder, "music"), np.random.default_rng(0)
        music.mkdir()
        for number in range(30):
            wave = 0.1 * generator.standard_normal(120 * 44_100).cumsum() / 100
            soundfile.write(music / f"{number}.flac", wave - wave.mean(), 44_100)
        some = sorted(music.glob("*.flac"))  # for what takes them one by one
        for number, path in product(range(4 * CORES - 1), some):
            os.link(path, music / f"{path.stem}_{number}.flac")

        def one_by_one():
            for path in some:
                np.save(
                    path.with_suffix(".npy"),
                    mel_spectrogram(torch.as_tensor(load_audio(path))).half().numpy(),
                )

        started = time.perf_counter()
        with open(os.devnull, "w") as nowhere:
            stderr, sys.stderr = sys.stderr, nowhere  # the bar
            build_corpus(music, Path(folder, "corpus"))
            sys.stderr = stderr
        ours = 120 * len(some) * 4 * CORES / (time.perf_counter() - started)
        obvious = 120 * len(some) / seconds(one_by_one, 1)
        decode = 120 * len(some) / seconds(lambda: [soundfile.read(path) for path in some], 1) * CORES
    line("corpus from FLAC, the workers' start in it", "seconds of sound", ours, obvious, decode)


def fake_corpus(path, clips):
    """A corpus of ten-second clips of noise: a few megabytes of it, repeated, with an index that fits."""
    path.mkdir()
    frames = 10 * SAMPLE_RATE // HOP + 1
    block = torch.randn(64 * frames, N_MELS).exp().half().numpy().tobytes()
    with open(path / "mel.f16", "wb") as file:
        for _ in range(clips // 64):
            file.write(block)
    clips = clips // 64 * 64
    entries = [
        {"source": "noise"},
        {"file": "noise", "clips": [[10.0 * i, frames] for i in range(clips)]},
        {"totals": {}},
    ]
    (path / "index.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return Corpus(path)


class Pickled(torch.utils.data.Dataset):
    """Clips in files of their own."""

    def __init__(self, folder, count):
        self.folder, self.count = folder, count

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        mel = pickle.loads(Path(self.folder, f"{i}.pickle").read_bytes())
        starts = torch.randint(mel.shape[1] - FRAMES + 1, (2,)).tolist()
        return [mel[:, start : start + FRAMES] for start in starts]


def bench_pairs(flops, copy):
    """Pairs from a corpus, against clips pickled one a file behind a DataLoader with a worker a core."""
    with tempfile.TemporaryDirectory() as folder:
        corpus = fake_corpus(Path(folder, "corpus"), 4096)
        for i in range(len(corpus)):
            rows = corpus.mel[corpus.first[i] : corpus.first[i] + corpus.frames[i]]
            Path(folder, f"{i}.pickle").write_bytes(pickle.dumps(rows.T.contiguous()))
        batch = max(
            32, 512 // CORES
        )  # what the workers have ready stays in shared memory, of which containers have little
        loader = torch.utils.data.DataLoader(
            Pickled(folder, len(corpus)), batch, shuffle=True, num_workers=CORES
        )
        if GPU:
            corpus.to(DEVICE)
        generator = torch.Generator(DEVICE).manual_seed(0)

        def ours():
            for ids in torch.randperm(len(corpus)).split(512):
                corpus.sample_pairs(ids, generator).to(DEVICE)

        def obvious():
            for views in loader:
                torch.stack(views).to(DEVICE)

        limit = copy / (2 * 2 * FRAMES * N_MELS * 2)  # two views, read and written
        line(
            "pairs from a memory map, not from pickles",
            "pairs",
            len(corpus) / seconds(ours),
            len(corpus) / seconds(obvious, 1),
            limit,
        )


def train(folder, name, *arguments, processes=1, threads=None):
    """train.py as people run it: the median of its pairs a second over the second half of its steps."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if processes > 1 else []
    command = [
        sys.executable,
        *launcher,
        str(ROOT / "train.py"),
        "--out",
        f"runs/{name}",
        *map(str, arguments),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)} if threads else None
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    speeds = [
        json.loads(text)["pairs_per_second"]
        for text in Path(folder, "runs", name, "log.jsonl").read_text().splitlines()[1:]
    ]
    return statistics.median(speeds[len(speeds) // 2 :])


def operations_of_a_pair(size):
    """Operations of a pair, forward and backward: two views of five tokens. A multiply-add counts two."""
    dim, depth, _, hidden = SIZES[size]
    return 2 * KEPT * 3 * 2 * (256 * dim + depth * (4 * dim**2 + 2 * dim * hidden + 2 * KEPT * dim))


def obvious_steps(corpus, size, patch, batch):
    """Pairs a second when all tokens are projected, and a mask is drawn for one example after the other."""
    torch.manual_seed(0)
    model = Myna(Config(size, patch)).to(DEVICE)
    optimizer = torch.optim.Adam(model.parameters(), 3e-4)
    generator = torch.Generator().manual_seed(0)

    def step():
        views = (
            corpus.sample_pairs(torch.randint(len(corpus), (batch,)), torch.Generator(corpus.mel.device))
            .to(DEVICE)
            .flatten(0, 1)
        )
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=GPU):
            tokens = model.to_patch_embedding[patch](patchify(views, patch).float()) + getattr(
                model, f"position_{patch}"
            )
            kept = [row[torch.randperm(TOKENS, generator=generator)[:KEPT].to(DEVICE)] for row in tokens]
            z = model.projector(model.transformer(torch.stack(kept)).mean(dim=1))
        info_nce(*z.unflatten(0, (2, -1))).backward()
        optimizer.step()
        optimizer.zero_grad()

    return batch / seconds(step)


def bench_step(flops, copy):
    """Steps through train.py's own loop; on a GPU with the paper's batch, bfloat16 and a large corpus."""
    size, batch, steps, clips = "vit-s", 64, 6, 1024
    if GPU:  # 24 GB of corpus, or a third of a smaller card
        batch, steps, clips = 4096, 400, min(300_000, torch.cuda.mem_get_info()[1] // (3 * 313 * 256))
        a = torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16)
        flops = 2 * 8192**3 / seconds(lambda: a @ a)
        print(f"{flops / 1e9:,.0f} GFLOP/s in a bfloat16 matrix product, the limit of the steps")
    with tempfile.TemporaryDirectory() as folder:
        corpus = fake_corpus(Path(folder, "noise"), clips)
        limit = flops / operations_of_a_pair(size)
        run = ["--data", "noise", "--size", size, "--batch", batch, "--steps", steps]
        ours = {
            patch: train(folder, patch, *run, "--patch", patch) for patch in ("square", "vertical", "hybrid")
        }
        if GPU:
            corpus.to(DEVICE)
        for patch in ("square", "vertical"):
            line(
                f"step of {batch} pairs, {size} {patch}",
                "pairs",
                ours[patch],
                obvious_steps(corpus, size, patch, batch),
                limit,
            )
        line(f"step of {batch} pairs, {size} hybrid", "pairs", ours["hybrid"], limit=limit / 2)


def bench_objectives(flops, copy):
    """What a teacher or a decoder costs: steps of each objective; "obvious" is contrast."""
    batch, steps = (1024, 60) if GPU else (64, 4)
    with tempfile.TemporaryDirectory() as folder:
        fake_corpus(Path(folder, "noise"), 2048 if GPU else 1024)
        run = [
            "--data",
            "noise",
            "--patch",
            "vertical",
            "--size",
            "vit-s",
            "--batch",
            batch,
            "--steps",
            steps,
        ]
        contrast = None
        for name in OBJECTIVES:
            speed = train(folder, name, *run, "--objective", name)
            contrast = contrast or speed  # the first one
            line(f"objectives: {name}, {batch} pairs of ViT-S", "pairs", speed, contrast)


def bench_ranks(flops, copy):
    """Two processes that share a batch against one (obvious), a thread each."""
    if CORES < 2:
        return print("ranks: one core only, left out")
    with tempfile.TemporaryDirectory() as folder:
        fake_corpus(Path(folder, "noise"), 1024)
        run = [
            "--data",
            "noise",
            "--patch",
            "vertical",
            "--size",
            "vit-s",
            "--batch",
            256,
            "--steps",
            4,
            "--device",
            "cpu",
        ]
        one = train(folder, "one", *run, threads=1)
        line(
            "ranks: two against one, 256 pairs of ViT-S",
            "pairs",
            train(folder, "two", *run, processes=2, threads=1),
            one,
            2 * one,
        )


def bench_grid(flops, copy):
    """Probes on features of GTZAN's size (443 x 384, 10 classes), against one after the other."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(443, 384, generator=generator), torch.randint(10, (443,), generator=generator)
    x, y = x.to(DEVICE), y.to(DEVICE)
    valid = x, torch.full_like(y, -1)  # no output is right, so all probes stop when their patience ends
    for hidden, name, steps in (((), "linear", 192), ((512,), "MLP of 512", 64)):
        for batch in (64, 256):
            chosen = [c for c in GRID if c.hidden == hidden and c.batch == batch]
            chosen = [c._replace(patience=steps // CHECK) for c in chosen]
            fit = lambda some: fit_grid(some, (x, y), valid, "classes", 10)
            together = seconds(lambda: fit(chosen), 2)
            alone = seconds(lambda: [fit([c]) for c in chosen], 1)
            values = sum(a * b for a, b in zip((384, *hidden), (*hidden, 10)))
            work = len(chosen) * steps
            line(
                f"grid of {len(chosen)} probes, {name}, batch {batch}",
                "probe steps",
                work / together,
                work / alone,
                flops / (6 * batch * values),
            )


def bench_faults(flops, copy):
    """A run killed twenty times at random moments and resumed: the same weights as an undisturbed one?"""
    with tempfile.TemporaryDirectory() as folder:
        with open(os.devnull, "w") as nowhere:
            stderr, sys.stderr = sys.stderr, nowhere
            build_embedded_corpus(64, 0, Path(folder, "small"))
            sys.stderr = stderr
        run = [
            "--data",
            "small",
            "--size",
            "tiny",
            "--batch",
            16,
            "--steps",
            200,
            "--save-minutes",
            1e-9,
            "--resume",
            "--device",
            "cpu",
        ]
        train(folder, "whole", *run)
        chance, kills = random.Random(0), 0
        log = Path(folder, "runs/killed/log.jsonl")
        while kills < 20:
            process = subprocess.Popen(
                [sys.executable, ROOT / "train.py", "--out", "runs/killed", *map(str, run)],
                cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip
            before = log.read_bytes().count(b"\n") if log.exists() else 0
            while process.poll() is None and not (log.exists() and log.read_bytes().count(b"\n") > before):
                time.sleep(0.005)
            time.sleep(chance.uniform(0, 0.05))
            process.kill()
            process.communicate()
            kills += process.returncode == -9  # and not when it was faster
            if process.returncode == 0:
                break
        train(folder, "killed", *run)
        a, b = (
            torch.load(Path(folder, "runs", name, "checkpoint.pt"), weights_only=True)["model"]
            for name in ("whole", "killed")
        )
        same = all(torch.equal(a[name], b[name]) for name in a)
        print(
            f"faults: killed {kills} times at random moments of 200 steps and resumed: "
            f"weights {'the same to the bit' if same else 'DIFFER'}"
        )
        assert same


def main():
    """The table."""
    stages = {
        name.removeprefix("bench_"): stage for name, stage in globals().items() if name.startswith("bench_")
    }
    parser = argparse.ArgumentParser(description="How fast, against the obvious way and against the machine.")
    parser.add_argument(
        "stages", nargs="*", choices=[*stages, "all"], default="all", metavar="STAGE", help=", ".join(stages)
    )
    asked = parser.parse_args().stages
    flops, copy = machine()
    name = torch.cuda.get_device_name() if GPU else f"CPU, {CORES} cores, {torch.get_num_threads()} threads"
    print(
        f"{name}: {flops / 1e9:,.0f} GFLOP/s in a matrix product, {copy / 1e9:,.1f} GB/s in a copy; "
        "figures a second, more is better\n"
    )
    print(f"{'':<44}{'ours':>12}{'obvious':>12}{'ratio':>8}{'limit':>14}{'of it':>6}")
    for stage in stages if "all" in asked else asked:
        stages[stage](flops, copy)


if __name__ == "__main__":
    main()
