"""train.py as people use it: whole runs in processes of their own, killed, resumed, shared, and misused."""

import json
import math
import os
import random
import re
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
from model import Config, Contrast, Myna, info_nce, load_model, save_model

ROOT = Path(__file__).parent.parent
SMALL = ["--size", "tiny", "--batch", "16", "--steps", "12", "--lr", "1e-3"]


def run(folder, *arguments, processes=None, **options):
    launcher = ["-m", "torch.distributed.run", *processes] if processes else []
    command = [sys.executable, *launcher, str(ROOT / "train.py"), *map(str, arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=170, **options)


def start(folder, *arguments):
    command = [sys.executable, ROOT / "train.py", *map(str, arguments)]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


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


def losses(out):
    return [line["loss"] for line in log_of(out)[1:]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working folder with a small corpus in it, and an undisturbed run of twelve steps."""
    folder = tmp_path_factory.mktemp("train")
    data.build_embedded_corpus(40, 3, folder / "corpora/small", workers=1)
    done = run(folder, "--data", "corpora/small", "--out", "runs/whole", *SMALL)
    assert done.returncode == 0, done.stderr
    return folder


def test_a_run_leaves_a_model_and_a_log_and_says_so(folder):
    first, *lines = log_of(folder / "runs/whole")
    settings = first["settings"]
    assert (settings["patch"], settings["steps"], settings["clips"]) == ("hybrid", 12, 40)
    assert [line["step"] for line in lines] == list(range(1, 13))
    for line in lines:
        assert math.isfinite(line["loss"]) and 0 <= line["retrieval"] <= 1 and line["pairs_per_second"] > 0
    assert lines[-1]["epoch"] == 12 / (40 // 16)
    assert load_model(folder / "runs/whole/checkpoint.pt").config == Config("tiny", "hybrid")

    again = run(folder, "--data", "corpora/small", "--out", "runs/again", *SMALL)
    said = again.stderr + again.stdout
    assert again.returncode == 0 and "checkpoint.pt" in said and "chance level" in said
    assert re.search(r" \d/12 \[\d\d:\d\d<\d\d:\d\d, .*step.*loss .* pairs/s", said)  # with the time left
    whole = weights(folder / "runs/whole/checkpoint.pt")
    assert same(whole, weights(folder / "runs/again/checkpoint.pt"))  # same seed, same result
    other = run(folder, "--data", "corpora/small", "--out", "runs/other", *SMALL, "--seed", 1)
    assert other.returncode == 0 and not same(whole, weights(folder / "runs/other/checkpoint.pt"))


def test_the_first_steps_are_the_algorithm(folder):
    """Two steps of Algorithm 1, written out with Adam's formula, give the script's losses and weights."""
    settings = ["--size", "tiny", "--batch", 16, "--steps", 2, "--lr", 1e-3, "--weight-decay", 0.1]
    settings += ["--mask", 0.9]
    assert run(folder, "--data", "corpora/small", "--out", "runs/two", *settings).returncode == 0
    torch.manual_seed(0)
    model = Myna(Config("tiny", "hybrid"))
    initial = {name: p.detach().clone() for name, p in model.named_parameters()}
    args = train.command_line().parse_args(list(map(str, settings)))
    corpus = data.Corpus(folder / "corpora/small")
    clips = train.choose_clips(corpus, args)
    means = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in model.named_parameters()}
    for step in range(2):
        views, kept = train.draw_batch(corpus, clips, step, args)
        losses = []
        for patch in ("square", "vertical"):
            z1, z2 = (model(views[i], patch, kept=kept[patch][i]) for i in (0, 1))
            losses.append(info_nce(z1, z2))
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
    found = weights(folder / "runs/two/checkpoint.pt")
    for name, p in model.named_parameters():
        # The update of a whole tensor is compared: where a gradient is near zero, Adam divides it by its own
        # size, so that single weights depend on the order of sums.
        update = p.detach() - initial[name]
        assert (found[name] - p.detach()).norm() < 2e-3 * update.norm(), name


def step_of(folder, chunk, patch="hybrid"):
    """A train_step on 16 pairs: its figures, the gradients, and the most segments encoded at once."""
    settings = ["--size", "tiny", "--batch", "16", "--patch", patch, "--chunk", str(chunk), "--mask", "0.9"]
    args = train.command_line().parse_args(settings)
    args.precision = "float32"
    corpus = data.Corpus(folder / "corpora/small")
    views, kept = train.draw_batch(corpus, train.choose_clips(corpus, args), 0, args)
    torch.manual_seed(0)
    model = Myna(Config("tiny", patch))
    rows = []
    model.transformer.register_forward_hook(lambda module, inputs, output: rows.append(len(inputs[0])))
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    figures = train.train_step(Contrast(model, args), optimizer, views, kept, 0.5, args)
    return figures, {name: p.grad.double() for name, p in model.named_parameters()}, max(rows)


@pytest.mark.parametrize("chunk", [1, 5, 8])
def test_a_batch_in_chunks_gives_the_gradient_of_the_whole_batch(folder, chunk):
    figures, gradients, rows = step_of(folder, 16)
    chunk_figures, chunk_gradients, chunk_rows = step_of(folder, chunk)
    assert (rows, chunk_rows) == (32, 2 * chunk)
    assert torch.allclose(figures, chunk_figures, rtol=1e-5)
    for name, gradient in gradients.items():
        assert (gradient - chunk_gradients[name]).norm() < 1e-4 * gradient.norm() + 1e-9, name
    assert gradients["projector.0.weight"].norm() > 1e-3


def test_every_clip_once_an_epoch_and_new_segments_each_time(folder):
    corpus = data.Corpus(folder / "corpora/small")
    args = train.command_line().parse_args(["--seed", "4", "--batch", "10", "--mask", "0.9"])
    clips = train.choose_clips(corpus, args)
    asked = []
    corpus.sample_pairs = lambda ids, *rest: asked.append(ids) or torch.zeros(2, 1)
    for step in range(8):
        train.draw_batch(corpus, clips, step, args)
    first, second = torch.cat(asked[:4]), torch.cat(asked[4:])
    assert torch.equal(first.sort().values, torch.arange(40))
    assert torch.equal(second.sort().values, torch.arange(40))
    assert not torch.equal(first, second)

    corpus = data.Corpus(folder / "corpora/small")
    args.batch = 40
    (views1, kept1), (views2, kept2) = (train.draw_batch(corpus, clips, step, args) for step in (0, 1))
    assert not torch.equal(kept1["square"], kept2["square"])
    assert not torch.equal(kept1["square"], kept1["vertical"])
    assert not torch.equal(kept1["square"][0], kept1["square"][1])
    half, half_kept = train.draw_batch(corpus, clips, 0, args, slice(20, 40))
    assert torch.equal(half, views1[:, 20:]) and torch.equal(half_kept["vertical"], kept1["vertical"][:, 20:])


def test_minutes_are_nested_subsets(folder):
    corpus = data.Corpus(folder / "corpora/small")

    def chosen(minutes, seed=0):
        settings = ["--minutes", str(minutes), "--seed", str(seed), "--batch", "4"]
        return set(train.choose_clips(corpus, train.command_line().parse_args(settings)).tolist())

    sets = {minutes: chosen(minutes) for minutes in (1, 2, 5, 100)}
    assert len(sets[1]) == 6 and len(sets[2]) == 12 and len(sets[100]) == 40  # clips of 312 hops, 9.984 s
    assert sets[1] < sets[2] < sets[5] < sets[100]
    assert sets[2] != chosen(2, seed=1)
    done = run(folder, "--data", "corpora/small", "--out", "runs/minutes", "--minutes", 2, *SMALL)
    assert done.returncode == 0 and "12 steps of 12 pairs" in done.stdout
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
        # a step after the checkpoint, and half a line
        log.write('{"time": 1, "step": 99, "loss": 1}\n{"time": 1, "st')
    assert run(folder, *settings).returncode == 0
    assert same(weights(out / "checkpoint.pt"), weights(folder / "runs/whole/checkpoint.pt"))
    assert [line.get("step") for line in log_of(out)] == [None, *range(1, 13)]
    assert losses(out) == losses(folder / "runs/whole")
    assert sorted(file.name for file in out.iterdir()) == ["checkpoint.pt", "log.jsonl"]


def test_a_damaged_or_a_foreign_checkpoint_is_a_sentence(folder):
    out = folder / "runs/damaged"
    out.mkdir()
    save_model(Myna(Config("tiny", "square")), out / "checkpoint.pt")
    foreign = run(folder, "--data", "corpora/small", "--out", out, "--resume", *SMALL)
    os.truncate(out / "checkpoint.pt", 100_000)
    damaged = run(folder, "--data", "corpora/small", "--out", out, "--resume", *SMALL)
    for done, sentence in ((foreign, "not a run that train.py can continue"), (damaged, "cut short")):
        assert done.returncode == 2 and sentence in done.stderr and done.stderr.count("\n") == 1


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
    assert log_of(out)[-1]["step"] == 12
    assert same(weights(out / "checkpoint.pt"), weights(folder / "runs/whole/checkpoint.pt"))


def test_a_second_signal_stops_at_once(folder):
    process = start(folder, "--data", "corpora/small", "--out", "runs/twice", *SMALL[:5], 100000)
    wait_for_steps(process, folder / "runs/twice/log.jsonl", 2)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    output = "".join(process.communicate())
    assert process.returncode == 130 and "Traceback" not in output and "--resume" in output


def test_a_corpus_cut_short_under_a_run_is_a_sentence(folder):
    shutil.copytree(folder / "corpora/small", folder / "corpora/cut")
    process = start(folder, "--data", "corpora/cut", "--out", "runs/cut", *SMALL[:5], "100000", *SMALL[6:])
    wait_for_steps(process, folder / "runs/cut/log.jsonl", 2)
    os.truncate(folder / "corpora/cut/mel.f16", 100_000)
    output = "".join(process.communicate(timeout=60))
    assert process.returncode == 2 and "mel.f16" in output and "Traceback" not in output


def test_two_processes_compute_what_one_does(folder):
    processes = ["--standalone", "--nproc-per-node", "2"]
    short = [*SMALL[:5], "3", *SMALL[6:], "--data", "corpora/small"]
    one, two = folder / "runs/one", folder / "runs/shared"
    assert run(folder, *short, "--out", one).returncode == 0
    done = run(folder, *short, "--out", two, processes=processes)
    assert done.returncode == 0, done.stderr
    for a, b in zip(log_of(one)[1:], log_of(two)[1:], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["retrieval"] == pytest.approx(b["retrieval"], abs=0.07)
    checkpoints = [torch.load(out / "checkpoint.pt", weights_only=True) for out in (one, two)]
    states = [checkpoint["optimizer"]["state"] for checkpoint in checkpoints]
    for i in states[0]:  # Adam's means of the gradients: of the whole gradients, not of halves of them
        a, b = (state[i]["exp_avg"] for state in states)
        assert (a - b).norm() <= 1e-3 * a.norm() + 1e-7, i
    arguments = ["--out", folder / "runs/odd", "--size", "tiny", "--batch", 15, "--steps", 1]
    odd = run(folder, "--data", "corpora/small", *arguments, processes=processes)
    assert odd.returncode != 0 and "shared evenly by 2 processes" in odd.stderr
    assert 'train.py", line' not in odd.stderr


def test_a_loss_that_is_not_finite_stops_the_run(folder):
    settings = [*SMALL[:-2], "--lr", 1e30, "--save-minutes", 1e-9]
    done = run(folder, "--data", "corpora/small", "--out", "runs/nan", *settings)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    lines = log_of(folder / "runs/nan")[1:]
    assert f"the loss of step {len(lines) + 1} is not finite" in done.stderr
    assert all(math.isfinite(line["loss"]) for line in lines)
    assert torch.load(folder / "runs/nan/checkpoint.pt", weights_only=True)["step"] == len(lines)


def test_a_full_disk_keeps_the_checkpoint_that_is_there(folder):
    out = folder / "runs/full"
    shorter = [*SMALL[:5], "3", *SMALL[6:]]
    assert run(folder, "--data", "corpora/small", "--out", out, *shorter).returncode == 0
    before = (out / "checkpoint.pt").read_bytes()
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, resource.RLIM_INFINITY))
    done = run(folder, "--data", "corpora/small", "--out", out, "--resume", *SMALL, preexec_fn=limit)
    assert done.returncode == 2 and "could not be written: File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert (out / "checkpoint.pt").read_bytes() == before
    assert not list(out.glob("*.part"))
    assert run(folder, "--data", "corpora/small", "--out", out, "--resume", *SMALL).returncode == 0
    assert same(weights(out / "checkpoint.pt"), weights(folder / "runs/whole/checkpoint.pt"))


def test_two_checkpoints_at_most_are_on_the_disk(tmp_path, monkeypatch):
    model = Myna(Config("tiny", "square"))
    objective = Contrast(model, train.command_line().parse_args([]))
    optimizer = torch.optim.Adam(model.parameters())
    there = []  # names of the files when a new one is complete

    def replace(part, path):
        there.append(sorted(file.name for file in tmp_path.iterdir()))
        os.rename(part, path)

    monkeypatch.setattr(os, "replace", replace)
    for step in (1, 2, 3):
        train.save_run(tmp_path, objective, optimizer, step, {"planned_steps": 3}, {})
        assert train.newest_checkpoint(tmp_path)["step"] == step
    assert there == [["checkpoint.pt.part"], *[["checkpoint.pt", "checkpoint.pt.part"]] * 2]
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
)
def test_full_memory_is_a_sentence_that_names_chunk(error, monkeypatch, capfd):
    def fail(*arguments):
        raise error

    monkeypatch.setattr(train, "train", fail)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit) as left:
        train.main()
    said = capfd.readouterr().err
    assert left.value.code == 2 and "--chunk" in said and said.count("\n") == 1


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--data", "missing"], "no such folder"),
        (["--data", "corpora/small", "--batch", 41], "there are 40 clips: use a smaller --batch"),
        (["--data", "corpora/small", "--out", "runs/whole"], "continue that run with --resume"),
        (["--data", "corpora/small", "--out", "runs/whole", "--resume", "--lr", 0.5], "its lr is 0.001"),
        (["--data", "corpora/small", "--minutes", 0.1], "leaves 0 clips: use more minutes"),
        (["--data", "corpora/small", "--mask", 1], "mask ratio"),
        (["--data", "corpora/small", "--steps", 0], "above zero"),
        (["--data", "corpora/small", "--chunk", 0], "above zero"),
        (["--data", "corpora/small", "--lr", "nan"], "above zero"),
        (["--data", "corpora/small", "--batch", 1], "two or more"),
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
    settings = ["--size", "tiny", "--batch", 40, "--steps", 60, "--lr", 1e-3, "--patch", "vertical"]
    assert run(folder, "--data", "corpora/small", "--out", "runs/learn", *settings).returncode == 0
    lines = log_of(folder / "runs/learn")[1:]
    assert np.mean([line["loss"] for line in lines[-5:]]) < lines[0]["loss"] - 0.7
    assert np.mean([line["retrieval"] for line in lines[-5:]]) > 10 / 79


def test_help_fits_a_screen(folder):
    done = run(folder, "--help", env={**os.environ, "COLUMNS": "120"})
    assert done.returncode == 0 and done.stdout.count("\n") < 45


def compile_works():
    try:
        train.choose_device(train.command_line().parse_args(["--device", "cpu", "--compile"]))
        return True
    except ValueError:
        return False


@pytest.mark.skipif(not compile_works(), reason="torch.compile does not work here")
def test_bfloat16_and_compiling_on_a_cpu(folder):
    """What a GPU run uses: the same losses as float32 without, to bfloat16's rounding."""
    arguments = ["--data", "corpora/small", *SMALL, "--patch", "vertical", "--steps", 3]
    for name, more in (("plain", []), ("bf16", ["--precision", "bf16", "--compile"])):
        done = run(folder, *arguments, "--out", f"runs/{name}", *more)
        assert done.returncode == 0, done.stderr
    plain, bf16 = losses(folder / "runs/plain"), losses(folder / "runs/bf16")
    assert plain != bf16 and np.allclose(plain, bf16, rtol=0.03)
    kept = weights(folder / "runs/bf16/checkpoint.pt")
    assert kept.keys() == weights(folder / "runs/plain/checkpoint.pt").keys()
    assert all(weight.dtype == torch.float32 for weight in kept.values())
    resume = ["--data", "corpora/small", "--out", "runs/bf16", "--resume"]
    done = run(folder, *resume, "--precision", "float32")
    assert done.returncode == 2 and "its precision is bf16" in done.stderr
    done = run(folder, *resume, "--no-compile", "--steps", 4)
    assert done.returncode == 0
    assert log_of(folder / "runs/bf16")[0]["settings"]["precision"] == "bf16"


def test_where_compiling_does_not_work_it_is_a_sentence(folder):
    nothing = {"CXX": "/nonexistent", "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}
    arguments = ["--data", "corpora/small", "--out", "runs/uncompiled", "--compile", *SMALL]
    done = run(folder, *arguments, env={**os.environ, **nothing})
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--no-compile" in done.stderr


def test_a_corpus_larger_than_memory_trains_from_the_disk(folder):
    """Six gigabytes of (empty) corpus, and a limit of 1.5 on the process's own memory."""
    big = folder / "corpora/big"
    big.mkdir()
    clips = 75_000
    entries = [[10.0 * i, 313] for i in range(clips)]
    index = [{"source": "zeros"}, {"file": "zeros", "clips": entries}, {"totals": {}}]
    (big / "index.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in index))
    with open(big / "mel.f16", "wb") as file:
        file.truncate(clips * 313 * 128 * 2)
    limit = lambda: resource.setrlimit(resource.RLIMIT_DATA, (1536 * 2**20,) * 2)
    arguments = ["--data", big, "--out", "runs/big", "--size", "tiny", "--batch", 64, "--steps", 3]
    done = run(folder, *arguments, preexec_fn=limit, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert losses(folder / "runs/big")[-1] == pytest.approx(math.log(127), rel=1e-3)  # all pieces are equal
    read_whole = "import sys, numpy; len(numpy.fromfile(sys.argv[1], numpy.float16))"  # the limit does limit
    command = [sys.executable, "-c", read_whole, big / "mel.f16"]
    refused = subprocess.run(command, preexec_fn=limit, capture_output=True, text=True)
    assert refused.returncode == 1 and "MemoryError" in refused.stderr
