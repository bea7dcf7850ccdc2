"""train.py as people meet it: whole runs in processes of their own, killed, resumed, shared, and given nonsense."""

import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import train
from model import Config, Myna, info_nce, load_model

ROOT = Path(__file__).parent.parent
SMALL = ["--size", "tiny", "--batch", "16", "--steps", "12", "--lr", "1e-3"]


def run(folder, *arguments, processes=None, **options):
    command = [sys.executable, *(["-m", "torch.distributed.run", *processes] if processes else []), str(ROOT / "train.py"), *map(str, arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=170, **options)


def start(folder, *arguments):
    return subprocess.Popen([sys.executable, ROOT / "train.py", *map(str, arguments)], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_steps(process, log, steps):
    while process.poll() is None and not (log.exists() and log.read_bytes().count(b"\n") > steps):
        time.sleep(0.01)
    assert process.poll() is None, process.communicate()


def weights(path):
    return torch.load(path, weights_only=True)["model"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def log_of(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working folder with a small corpus in it, and an undisturbed run of twelve steps."""
    folder = tmp_path_factory.mktemp("train")
    data.build_embedded_corpus(40, 3, folder / "corpora/small", workers=1)
    done = run(folder, "--data", "corpora/small", "--out", "runs/whole", *SMALL)
    assert done.returncode == 0, done.stderr
    return folder


def test_a_run_leaves_a_model_and_a_log_and_says_so(folder):
    lines = log_of(folder / "runs/whole")
    assert lines[0]["settings"]["patch"] == "hybrid" and lines[0]["settings"]["steps"] == 12 and lines[0]["settings"]["clips"] == 40
    assert [line["step"] for line in lines[1:]] == list(range(1, 13))
    assert all(math.isfinite(line["loss"]) and 0 <= line["retrieval"] <= 1 and line["pairs_per_second"] > 0 for line in lines[1:])
    assert lines[-1]["epoch"] == 12 / (40 // 16)
    model = load_model(folder / "runs/whole/checkpoint.pt")
    assert model.config == Config("tiny", "hybrid")
    again = run(folder, "--data", "corpora/small", "--out", "runs/again", *SMALL)
    assert again.returncode == 0 and "checkpoint.pt" in again.stderr + again.stdout and "about" in again.stderr + again.stdout
    assert same(weights(folder / "runs/whole/checkpoint.pt"), weights(folder / "runs/again/checkpoint.pt"))  # same seed, same result
    other = run(folder, "--data", "corpora/small", "--out", "runs/other", *SMALL, "--seed", 1)
    assert other.returncode == 0 and not same(weights(folder / "runs/whole/checkpoint.pt"), weights(folder / "runs/other/checkpoint.pt"))


def test_the_first_steps_are_the_algorithm(folder):
    """Two steps of Algorithm 1, written out with whole tensors and Adam's formula, give the script's losses and weights."""
    settings = ["--data", "corpora/small", "--out", "runs/two", "--size", "tiny", "--batch", 16, "--steps", 2, "--lr", 1e-3, "--weight-decay", 0.1]
    assert run(folder, *settings).returncode == 0
    torch.manual_seed(0)
    model = Myna(Config("tiny", "hybrid"))
    args = train.command_line().parse_args([])
    corpus = data.Corpus(folder / "corpora/small")
    clips = train.choose_clips(corpus, None, 0)
    means = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in model.named_parameters()}
    for step in range(2):
        views, kept = train.draw_batch(corpus, clips, 16, step, args)
        losses = []
        for patch in ("square", "vertical"):
            losses.append(info_nce(model(views[0], patch, kept=kept[patch][0]), model(views[1], patch, kept=kept[patch][1])))
        loss = sum(losses) / 2
        assert log_of(folder / "runs/two")[step + 1]["loss"] == pytest.approx(loss.item(), rel=1e-5)
        model.zero_grad()
        loss.backward()
        for name, p in model.named_parameters():
            m, v = means[name]
            g = p.grad + 0.1 * p.data  # L2 in the gradient
            m.mul_(0.9).add_(0.1 * g)
            v.mul_(0.999).add_(0.001 * g * g)
            p.data -= 1e-3 * (m / (1 - 0.9 ** (step + 1))) / ((v / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
    for name, found in weights(folder / "runs/two/checkpoint.pt").items():
        assert torch.allclose(found, model.state_dict()[name], atol=2e-5), name  # Adam divides by small numbers


def test_every_clip_once_an_epoch_and_new_segments_each_time(folder):
    corpus = data.Corpus(folder / "corpora/small")
    clips = train.choose_clips(corpus, None, 0)
    args = train.command_line().parse_args(["--seed", "4"])
    asked = []
    corpus.pairs = lambda ids, *rest: asked.append(ids) or torch.zeros(2, 1)
    for step in range(8):
        train.draw_batch(corpus, clips, 10, step, args)
    first, second = torch.cat(asked[:4]), torch.cat(asked[4:])
    assert torch.equal(first.sort().values, torch.arange(40)) and torch.equal(second.sort().values, torch.arange(40))
    assert not torch.equal(first, second)
    corpus = data.Corpus(folder / "corpora/small")
    (views1, kept1), (views2, kept2) = (train.draw_batch(corpus, clips, 40, step, args) for step in (0, 1))
    assert not torch.equal(kept1["square"], kept2["square"]) and not torch.equal(kept1["square"], kept1["vertical"])
    assert not torch.equal(kept1["square"][0], kept1["square"][1])
    half, half_kept = train.draw_batch(corpus, clips, 40, 0, args, slice(20, 40))
    assert torch.equal(half, views1[:, 20:]) and torch.equal(half_kept["vertical"], kept1["vertical"][:, 20:])


def test_minutes_are_nested_subsets(folder):
    corpus = data.Corpus(folder / "corpora/small")
    sets = {m: set(train.choose_clips(corpus, m, 0).tolist()) for m in (1, 2, 5, 100)}
    assert len(sets[1]) == 6 and len(sets[2]) == 12 and len(sets[100]) == 40  # clips of 312 hops, 9.984 s
    assert sets[1] < sets[2] < sets[5] < sets[100]
    assert sets[2] != set(train.choose_clips(corpus, 2, 1).tolist())
    done = run(folder, "--data", "corpora/small", "--out", "runs/minutes", "--minutes", 2, *SMALL)
    assert done.returncode == 0 and "--minutes 2: that is 12 clips, and the batch shrinks from 16 to 12" in done.stdout + done.stderr
    assert log_of(folder / "runs/minutes")[0]["settings"]["clips"] == 12


def test_killed_and_resumed_it_ends_with_the_same_bits(folder):
    out = folder / "runs/killed"
    settings = ["--data", "corpora/small", "--out", out, "--resume", "--save-minutes", 1e-9, *SMALL]
    chance = random.Random(0)
    for steps in sorted(chance.sample(range(1, 10), 5)):
        process = start(folder, *settings)
        wait_for_steps(process, out / "log.jsonl", steps)
        time.sleep(chance.uniform(0, 0.02))  # at any moment of a step, a save, or the start
        process.kill()
        process.communicate()
    with open(out / "log.jsonl", "a") as log:
        log.write('{"time": 1, "step": 99, "loss": 1}\n{"time": 1, "st')  # steps after the checkpoint, and half a line
    assert run(folder, *settings).returncode == 0
    assert same(weights(out / "checkpoint.pt"), weights(folder / "runs/whole/checkpoint.pt"))
    assert [line.get("step") for line in log_of(out)] == [None, *range(1, 13)]
    assert [line["loss"] for line in log_of(out)[1:]] == [line["loss"] for line in log_of(folder / "runs/whole")[1:]]
    before = torch.load(out / "checkpoint_before.pt", weights_only=True)
    assert before["step"] == 11 and not (out / "checkpoint_new.pt").exists()


def test_a_damaged_checkpoint_is_noticed_and_the_one_before_used(folder):
    out = folder / "runs/killed"
    whole = (out / "checkpoint.pt").read_bytes()
    (out / "checkpoint.pt").write_bytes(whole[: len(whole) // 3])
    spare = (out / "checkpoint_before.pt").read_bytes()
    done = run(folder, "--data", "corpora/small", "--out", out, "--resume", *SMALL)
    assert done.returncode == 0 and "cut short" in done.stderr
    assert (out / "checkpoint_before.pt").read_bytes() == spare  # and not the damaged one in its place
    assert same(weights(out / "checkpoint.pt"), weights(folder / "runs/whole/checkpoint.pt"))
    for name in ("checkpoint.pt", "checkpoint_before.pt"):
        (out / name).write_bytes(b"nothing")
    done = run(folder, "--out", out, "--resume")
    assert done.returncode == 2 and "no checkpoint can be read" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_leaves(folder, number):
    out = folder / f"runs/signal{number}"
    process = start(folder, "--data", "corpora/small", "--out", out, *SMALL)
    wait_for_steps(process, out / "log.jsonl", 3)
    process.send_signal(number)
    output = "".join(process.communicate())
    assert process.returncode == 128 + number and "Traceback" not in output and "--resume" in output
    step = torch.load(out / "checkpoint.pt", weights_only=True)["step"]
    assert 3 <= step < 12 and log_of(out)[-1]["step"] == step
    done = run(folder, "--resume", "--out", out)  # the settings are the run's own
    assert done.returncode == 0, done.stderr
    assert log_of(out)[-1]["step"] == 12 and same(weights(out / "checkpoint.pt"), weights(folder / "runs/whole/checkpoint.pt"))


def test_a_corpus_cut_short_under_a_run_is_a_sentence(folder):
    shutil.copytree(folder / "corpora/small", folder / "corpora/cut")
    process = start(folder, "--data", "corpora/cut", "--out", "runs/cut", *SMALL[:5], "100000", *SMALL[6:])
    wait_for_steps(process, folder / "runs/cut/log.jsonl", 2)
    os.truncate(folder / "corpora/cut/mel.f16", 100_000)
    output = "".join(process.communicate(timeout=60))
    assert process.returncode == 2 and "has lost its tail" in output and "Traceback" not in output


def test_two_processes_compute_what_one_does(folder):
    processes = ["--standalone", "--nproc-per-node", "2"]
    short = [*SMALL[:5], "3", *SMALL[6:], "--data", "corpora/small"]
    one, two = folder / "runs/one", folder / "runs/shared"
    assert run(folder, *short, "--out", one).returncode == 0
    done = run(folder, *short, "--out", two, processes=processes)
    assert done.returncode == 0, done.stderr
    for a, b in zip(log_of(one)[1:], log_of(two)[1:], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4) and a["retrieval"] == pytest.approx(b["retrieval"], abs=0.07)
    states = [torch.load(out / "checkpoint.pt", weights_only=True)["optimizer"]["state"] for out in (one, two)]
    for i in states[0]:  # Adam's means of the gradients: of the whole gradients, not of halves of them
        a, b = (state[i]["exp_avg"] for state in states)
        assert (a - b).norm() <= 1e-3 * a.norm() + 1e-7, i
    odd = run(folder, "--data", "corpora/small", "--out", folder / "runs/odd", "--size", "tiny", "--batch", 15, "--steps", 1, processes=processes)
    assert odd.returncode != 0 and "shared evenly by 2 processes" in odd.stderr and "train.py\", line" not in odd.stderr


def test_a_loss_that_is_not_finite_stops_the_run(folder):
    done = run(folder, "--data", "corpora/small", "--out", "runs/nan", *SMALL[:-2], "--lr", 1e30, "--save-minutes", 1e-9)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "is not finite" in done.stderr and "step" in done.stderr
    lines = log_of(folder / "runs/nan")[1:]
    assert f"step {len(lines) + 1} " in done.stderr and all(math.isfinite(line["loss"]) for line in lines)
    assert torch.load(folder / "runs/nan/checkpoint.pt", weights_only=True)["step"] == len(lines)


def test_a_full_disk_keeps_the_checkpoint_before(folder):
    out = folder / "runs/full"
    assert run(folder, "--data", "corpora/small", "--out", out, *SMALL[:5], "3", *SMALL[6:]).returncode == 0
    before = (out / "checkpoint.pt").read_bytes()
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, resource.RLIM_INFINITY))
    done = run(folder, "--data", "corpora/small", "--out", out, "--resume", *SMALL, preexec_fn=limit)
    assert done.returncode == 2 and "could not be written" in done.stderr and "Traceback" not in done.stderr
    assert (out / "checkpoint.pt").read_bytes() == before
    assert not list(out.glob("*.part"))
    assert run(folder, "--data", "corpora/small", "--out", out, "--resume", *SMALL).returncode == 0
    assert same(weights(out / "checkpoint.pt"), weights(folder / "runs/whole/checkpoint.pt"))


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--data", "missing"], "no such folder"),
        (["--data", "corpora/small", "--batch", 41], "take --batch 40 or less"),
        (["--data", "corpora/small", "--out", "runs/whole"], "--resume goes on with it"),
        (["--data", "corpora/small", "--out", "runs/whole", "--resume", "--lr", 0.5], "its --lr is 0.001"),
        (["--data", "corpora/small", "--minutes", 0.1], "a batch needs two"),
        (["--data", "corpora/small", "--mask", 1], "mask ratio"),
        (["--data", "corpora/small", "--steps", 0], "above zero"),
        (["--data", "corpora/small", "--lr", "nan"], "above zero"),
        (["--data", "corpora/small", "--batch", 1], "at least two"),
        (["--data", "corpora/small", "--patch", "round"], "invalid choice"),
        (["--data", "corpora/small", "--device", "abacus"], "abacus"),
        (["--data", "corpora/small", "--device", "cuda:99"], "cannot be used here"),
    ],
)
def test_mistakes_are_one_sentence(folder, arguments, sentence, monkeypatch, capfd):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as left:
        train.main()
    said = capfd.readouterr().err
    assert left.value.code == 2 and sentence in said
    assert said.count("\n") == 1 or "usage" in said


def test_a_batch_that_cannot_fit_is_refused_before_it_is_tried(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(train, "memory_free", lambda device: 10**9)
    with pytest.raises(ValueError, match="take a smaller --batch"):
        args = train.command_line().parse_args(["--data", "corpora/small", "--batch", "40", "--size", "vit-b", "--mask", "0", "--out", "runs/big"])
        args.out = Path(args.out)
        train.train(args, None)
    assert not (folder / "runs/big").exists()


@pytest.mark.parametrize("size, batch, mask", [("tiny", 256, 0.9), ("tiny", 64, 0.0), ("vit-s", 64, 0.9)])
def test_the_estimate_of_memory_is_near_what_a_step_takes(size, batch, mask):
    script = f"""
import torch, train
from model import Config, Myna
args = train.command_line().parse_args(["--size", "{size}", "--mask", "{mask}"])
device = torch.device("cpu")
open("/proc/self/clear_refs", "w").write("5")  # the peak so far, which may be a parent's, is forgotten
peak = lambda: int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024
before = peak()
model = Myna(Config("{size}"))
optimizer = torch.optim.Adam(model.parameters())
views = torch.rand(2, {batch}, 128, 96).half()
kept = {{p: train.keep_tokens(2 * {batch}, 48, {mask}).view(2, {batch}, -1) for p in model.patches}}
for _ in range(2):
    train.train_step(model, optimizer, views, kept, args, device)
print(peak() - before, train.memory_needed("{size}", {batch}, {mask}))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    measured, estimated = map(float, done.stdout.split())
    assert 0.6 * measured < estimated + 1e8 and estimated < 2 * measured + 1e8, (measured, estimated)


def test_a_folder_of_music_becomes_a_corpus_once(folder):
    import soundfile

    (folder / "songs").mkdir()
    for i, wave in enumerate(data.synthesize(4, 9)[0].numpy()):
        soundfile.write(folder / f"songs/{i}.flac", wave, 16_000)
    arguments = ["--data", "songs", "--size", "tiny", "--patch", "vertical", "--batch", 4, "--steps", 2]
    assert run(folder, *arguments, "--out", "runs/songs").returncode == 0
    stamp = (folder / "corpora/songs/mel.f16").stat().st_mtime_ns
    assert run(folder, *arguments, "--out", "runs/songs2").returncode == 0
    assert (folder / "corpora/songs/mel.f16").stat().st_mtime_ns == stamp
    assert load_model(folder / "runs/songs/checkpoint.pt").config.patch == "vertical"
    assert same(weights(folder / "runs/songs/checkpoint.pt"), weights(folder / "runs/songs2/checkpoint.pt"))


def test_training_learns(folder):
    done = run(folder, "--data", "corpora/small", "--out", "runs/learn", "--size", "tiny", "--batch", 40, "--steps", 60, "--lr", 1e-3, "--patch", "vertical")
    assert done.returncode == 0
    lines = log_of(folder / "runs/learn")[1:]
    assert np.mean([line["loss"] for line in lines[-5:]]) < lines[0]["loss"] - 0.7
    assert np.mean([line["retrieval"] for line in lines[-5:]]) > 10 / 79


def test_help_fits_a_screen(folder):
    done = run(folder, "--help", env={**os.environ, "COLUMNS": "120"})
    assert done.returncode == 0 and done.stdout.count("\n") < 45


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU")
def test_bfloat16_and_compiling_on_a_cpu(folder):
    """What a GPU run uses: the same losses as float32 without, to bfloat16's rounding."""
    arguments = ["--data", "corpora/small", *SMALL, "--patch", "vertical", "--steps", 3]
    for name, more in (("plain", []), ("bf16", ["--precision", "bf16", "--compile"])):
        done = run(folder, *arguments, "--out", f"runs/{name}", *more)
        assert done.returncode == 0, done.stderr
    plain, bf16 = ([line["loss"] for line in log_of(folder / f"runs/{name}")[1:]] for name in ("plain", "bf16"))
    assert plain != bf16 and np.allclose(plain, bf16, rtol=0.03)
    kept = weights(folder / "runs/bf16/checkpoint.pt")
    assert kept.keys() == weights(folder / "runs/plain/checkpoint.pt").keys() and all(w.dtype == torch.float32 for w in kept.values())
    done = run(folder, "--data", "corpora/small", "--out", "runs/bf16", "--resume", "--precision", "float32")
    assert done.returncode == 2 and "its --precision is bf16" in done.stderr
    done = run(folder, "--data", "corpora/small", "--out", "runs/bf16", "--resume", "--no-compile", "--steps", 4)
    assert done.returncode == 0 and log_of(folder / "runs/bf16")[0]["settings"]["precision"] == "bf16"


def test_where_compiling_does_not_work_it_is_a_sentence(folder):
    nothing = {"CXX": "/nonexistent", "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}
    done = run(folder, "--data", "corpora/small", "--out", "runs/uncompiled", "--compile", *SMALL, env={**os.environ, **nothing})
    assert done.returncode == 2 and "torch.compile does not work here" in done.stderr and done.stderr.count("\n") == 1


def test_a_corpus_larger_than_memory_trains_from_the_disk(folder):
    """Six gigabytes of (empty) corpus, and a limit of 1.5 on the memory that the process may have of its own."""
    big = folder / "corpora/big"
    big.mkdir()
    clips = 75_000
    index = [{"source": "zeros"}, {"file": "zeros", "clips": [[10.0 * i, 313] for i in range(clips)]}, {"totals": {}}]
    (big / "index.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in index))
    with open(big / "mel.f16", "wb") as file:
        file.truncate(clips * 313 * 128 * 2)
    limit = lambda: resource.setrlimit(resource.RLIMIT_DATA, (1536 * 2**20,) * 2)
    arguments = ["--data", big, "--out", "runs/big", "--size", "tiny", "--batch", 64, "--steps", 3]
    done = run(folder, *arguments, preexec_fn=limit, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert log_of(folder / "runs/big")[-1]["loss"] == pytest.approx(math.log(127), rel=1e-3)  # all pieces are the same
    read_whole = "import sys, numpy; len(numpy.fromfile(sys.argv[1], numpy.float16))"  # the limit does limit
    refused = subprocess.run([sys.executable, "-c", read_whole, big / "mel.f16"], preexec_fn=limit, capture_output=True, text=True)
    assert refused.returncode == 1 and "MemoryError" in refused.stderr
