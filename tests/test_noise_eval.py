"""Noise of the asked level, the same for all; probes that are stage 4's; a table that adds up."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import data
import noise_eval
import probe
from model import Config, Myna, save_model
from noise_eval import add_white_noise, noise_check, noisy_versions, table
from probe import load_task

ROOT = Path(__file__).parent.parent


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# --- the noise ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("snr", [30, 20.0, 3.5, 0, -10])
@pytest.mark.parametrize("scale, offset", [(0.3, 0), (1e-4, 0), (30.0, 0), (0.1, 0.5), (0, 0.2)])
def test_measured_snr_is_the_asked_one(snr, scale, offset):
    wave = scale * torch.sin(torch.arange(1_000_000) * 0.05) + offset
    noise = add_white_noise(wave.double(), snr, generator()) - wave.double()
    power = float(wave.double().square().mean())
    measured = 10 * math.log10(power / float(noise.square().mean()))
    assert abs(measured - snr) < 0.05
    assert abs(float(noise.mean())) < 5 * float(noise.std()) / 1000  # no DC of its own


def test_noise_is_white_and_gaussian():
    noise = add_white_noise(torch.full((2**18,), 0.1), 0, generator()).double() - 0.1
    spectrum = torch.fft.rfft(noise).abs().square()[1:].view(8, -1).mean(dim=1)  # eight bands
    assert float(spectrum.max() / spectrum.min()) < 1.1
    beyond = [float((noise.abs() > k * 0.1).double().mean()) for k in (1, 2, 3)]
    assert np.allclose(beyond, [0.3173, 0.0455, 0.0027], atol=0.004)


def test_same_seed_same_noise_scaled_to_each_level():
    wave = torch.randn(16_000, generator=generator(1)).double()
    a, again, other = (add_white_noise(wave, 0, generator(seed)) for seed in (5, 5, 6))
    assert torch.equal(a, again) and not torch.equal(a, other)
    b = add_white_noise(wave, 20, generator(5))
    assert torch.allclose(a - wave, 10 * (b - wave), atol=1e-12)


def test_silence_stays_and_nothing_is_clipped():
    assert torch.equal(add_white_noise(torch.zeros(1000), -10, generator()), torch.zeros(1000))
    loud = add_white_noise(torch.ones(10_000), 0, generator())
    assert loud.max() > 2.5 and loud.dtype == torch.float32
    waves = torch.stack([torch.full((50_000,), level) for level in (0, 0.5, 0.01)])  # each by its own power
    noise = add_white_noise(waves, 0, generator()) - waves
    assert np.allclose(noise.std(dim=1), [0, 0.5, 0.01], rtol=0.02)


def test_a_clip_has_one_draw_for_all_levels_wherever_the_data_set_lies():
    wave = torch.randn(8000, generator=generator(2)).double()
    clip = probe.Clip(Path("/a/01/x.wav"), 3.0, None, 0, "test", "g")
    first, second, third, fourth = noisy_versions(wave, clip, "/a", snrs=(20, 0), repeats=2)
    assert torch.allclose(10 * (first - wave), second - wave)
    assert torch.allclose(10 * (third - wave), fourth - wave)
    correlation = torch.corrcoef(torch.stack([second - wave, fourth - wave]))[0, 1]
    assert abs(float(correlation)) < 0.05  # the draws differ
    moved = clip._replace(path=Path("/b/01/x.wav"))
    assert torch.equal(noisy_versions(wave, moved, "/b", (20,), 1)[0], first)
    others = [clip._replace(offset=6.0), clip._replace(path=(103, 4))]
    others += [clip._replace(path=Path(path)) for path in ("/a/01/y.wav", "/a/02/x.wav", "/a/x.wav")]
    for other in others:
        assert not torch.equal(noisy_versions(wave, other, "/a", (20,), 1)[0], first)


# --- the check ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """Sixty tones of two kinds, low and high with overlap, three of the test clips silent; a checkpoint."""
    folder = tmp_path_factory.mktemp("noise")
    rng, rows = np.random.default_rng(0), ["path,label,split"]
    for i in range(60):
        split = ("train", "valid", "test")[i // 2 % 3]
        t = np.arange(int(16_000 * 3.1)) / 16_000
        wave = 0.1 * np.sin(2 * np.pi * (rng.uniform(300, 500) + 150 * (i % 2)) * t)
        soundfile.write(folder / f"{i}.wav", wave * (not (split == "test" and i < 12)), 16_000)
        rows.append(f"{i}.wav,{('low', 'high')[i % 2]},{split}")
    (folder / "tones.csv").write_text("\n".join(rows))
    (folder / "runs/small").mkdir(parents=True)
    torch.manual_seed(0)
    save_model(Myna(Config("tiny", "hybrid")), folder / "runs/small/checkpoint.pt")
    return folder


GRID = [c._replace(patience=16) for c in probe.QUICK_GRID if c.l2 == 0 and c.dropout != 0.5]


@pytest.fixture(scope="module")
def checked(labelled):
    """The check on a random encoder, on chroma, and on an encoder that ignores its input."""
    task = load_task(labelled / "tones.csv")
    torch.manual_seed(0)
    model, constant = Myna(Config("tiny", "vertical")).eval(), Myna(Config("tiny", "vertical")).eval()
    for weight in constant.parameters():
        weight.data.zero_()
    encoders = {"model": model, "chroma": "chroma", "constant": constant}
    return task, encoders, noise_check(task, encoders, (10.0, -30.0), 2, GRID, workers=2)


def test_clean_scores_are_stage_4s(checked):
    task, encoders, results = checked
    rows = {(row["representation"], row["probe"]): row for row in results["scores"] if row["snr"] is None}
    for name in ("model", "chroma"):
        features = probe.embed_task(task, encoders[name], workers=2)
        for probe_name, hidden in noise_eval.PROBES.items():
            grid = [c._replace(hidden=hidden) for c in GRID if bool(c.hidden) == bool(hidden)]
            assert len(grid) == 4
            expected = probe.probe_task(task, features, grid)
            row = rows[name, probe_name]
            for key in ("metric", "score", "interval", "interval_over", "test", "draws"):
                assert row[key] == expected[key]
            assert row["valid"] == expected["valid"][list(features.rows)[0]]
            assert row["configuration"] == expected["winner"]


def test_noisy_scores_are_of_noisy_clips(checked):
    """One probe and one level, clip by clip, with the noise added here."""
    task, encoders, results = checked
    features = probe.embed_task(task, encoders["model"], workers=1)
    grid = [c for c in GRID if not c.hidden]
    _, best = probe.fit_probes(task, features, features.rows["vertical"], grid)
    folder, draws = task.clips[0].path.parent, [0, 0]
    clips = [clip for clip in task.clips if clip.split == "test"]
    for clip in clips:
        wave = probe.load_clip(clip)[0]
        for draw, noisy in enumerate(noisy_versions(wave, clip, folder, (-30.0,), 2)):
            vector = encoders["model"].embed(data.mel_segments(noisy)).mean(dim=0)
            draws[draw] += int(best(vector).argmax() == clip.label)
    rows = {(row["representation"], row["probe"], row["snr"]): row for row in results["scores"]}
    assert rows["model", "linear", -30.0]["draws"] == pytest.approx([right / len(clips) for right in draws])


def test_drops(checked):
    _, _, results = checked
    assert results["clips"] == 20 and results["silent_clips"] == 2 + 2
    assert not results["missing"] and not results["skipped"] and results["repeats"] == 2
    assert len(results["scores"]) == 3 * 2 * 3
    rows = {(row["representation"], row["probe"], row["snr"]): row for row in results["scores"]}
    for probe_name in noise_eval.PROBES:
        for snr in (10.0, -30.0):
            constant = rows["constant", probe_name, snr]
            assert constant["drop"] == 0 == constant["drop_percent"]
            assert len(rows["model", probe_name, snr]["draws"]) == 2
        assert rows["chroma", probe_name, None]["score"] > 0.6
        assert rows["chroma", probe_name, -30.0]["drop"] > 0.05
        for name in ("model", "chroma"):
            row, clean = rows[name, probe_name, -30.0], rows[name, probe_name, None]
            assert row["score"] == row["test"]["accuracy"] == pytest.approx(sum(row["draws"]) / 2)
            assert row["drop"] == pytest.approx(clean["score"] - row["score"])
            assert row["drop_percent"] == pytest.approx(100 * row["drop"] / clean["score"])


def test_table_names_everything_once(checked):
    text = table(checked[2])
    lines = text.splitlines()
    heads = [line.split()[0] for line in lines if line and not line.startswith(" ")]
    assert heads == ["tones,", "linear", "MLP"]
    for level in ("clean", "10 dB", "-30 dB"):
        assert sum(line.startswith(f"  {level} ") for line in lines) == 2
    for line in lines:
        if line.startswith(("linear", "MLP")):
            assert line.endswith("constant") and "model" in line and "chroma" in line
    assert "accuracy in percent" in text and "95% interval over clips" in text and max(map(len, lines)) < 150


@pytest.mark.parametrize("drops", [0.156, 1.0])
def test_columns_of_the_table_do_not_touch(drops):
    clean = {"metric": "accuracy", "snr": None, "score": 1.0, "interval": [1, 1], "interval_over": "clips"}
    noisy = clean | {"snr": 0.0, "score": 1 - drops, "interval": [0, 0.42], "draws": [0.2, 0.7]}
    noisy |= {"drop": drops, "drop_percent": 100 * drops}
    names = {"representation": "a"}, {"representation": "b"}
    scores = [row | n | {"probe": p} for row in (clean, noisy) for n in names for p in noise_eval.PROBES]
    results = {"task": "t", "clips": 9, "repeats": 2, "snrs": [0.0], "scores": scores}
    for line in table(results).splitlines():
        if line.startswith("  0 dB"):
            assert line.count("  ") >= 2 and re.search(r"%  +\d", line[10:]), line


def test_no_percentage_of_a_score_below_zero(monkeypatch):
    """A regression whose probe is worse than the mean on clean sound."""
    clips = [probe.Clip(Path(f"{i}.wav"), 0.0, None, [i % 3], "test", str(i)) for i in range(3)]
    task = probe.Task("t", "regression", ("x",), clips)
    features = probe.Features({"mean_power": torch.ones(3, 1, 1)}, torch.arange(3), [[0.0], [1.0], [2.0]], [])
    found = probe.Probe(probe.GRID[0], 0.0, 0, None, None, [])
    monkeypatch.setattr(noise_eval, "embed_task", lambda task, encoders, *_: {n: features for n in encoders})
    monkeypatch.setattr(noise_eval, "fit_all", lambda *_: {("e", "linear"): ([], found)})
    for scores in ((-1.0, -1.5), (0.5, 0.25)):
        given = iter(scores)
        score_test = lambda *_, **__: {"score": next(given)}
        monkeypatch.setattr(noise_eval, "score_test", score_test)
        on_clean, on_noisy = noise_check(task, {"e": "mfcc"}, [0.0])["scores"]
        assert on_noisy["drop"] == scores[0] - scores[1]
        assert on_noisy["drop_percent"] == (50 if scores[0] > 0 else None)


def test_command_line(labelled, monkeypatch, capfd):
    monkeypatch.chdir(labelled)
    (labelled / "bad.wav").write_text("no sound")
    rows = (labelled / "tones.csv").read_text()
    (labelled / "flawed.csv").write_text(rows + "\nbad.wav,low,train\ngone.wav,high,test\n")
    monkeypatch.setattr(noise_eval, "PROBES", {"linear": (), "MLP 8": (8,)})
    monkeypatch.setattr(noise_eval, "QUICK_GRID", GRID[::2])
    arguments = ["--task", "flawed.csv", "--representations", "checkpoint", "random", "--workers", "2"]

    def run(*more):
        monkeypatch.setattr(sys, "argv", ["noise_eval.py", *arguments, *more])
        noise_eval.main()
        return capfd.readouterr()

    said = run("--snr", "5", "5", "-5")
    path = "runs/small/noise_flawed_hybrid_random-tiny-hybrid_snr-5.0-5.0--5.0.json"
    assert path in said.out and "no noise was added: 4" in said.out
    results = json.loads((labelled / path).read_text())
    assert "1 files missing, 1 clips unreadable" in said.out and "  gone.wav" in said.out
    assert "bad.wav: damaged" in said.out
    assert results["missing"] == ["gone.wav"] and results["seed"] == 0
    names = {"hybrid", "random-tiny-hybrid"}
    assert results["snrs"] == [5, -5] and set(results["keys"]) == names
    assert {row["representation"] for row in results["scores"]} == names
    bars = {text.split(":")[0] for text in said.err.split("\r") if ":" in text}
    assert bars == {"clean sound", "noisy sound", "probes"}
    assert (results["repeats"], results["kind"]) == (1, "classes")
    assert {row["metric"] for row in results["scores"]} == {"accuracy"}


@pytest.mark.parametrize(
    "arguments, name",
    [
        ("", "small/noise_synth-key.json"),
        ("--sweep --repeat 3", "small/noise_synth-key_sweep_repeat-3.json"),
        ("--task synth-tags --snr 2.5 -10 --seed 7", "small/noise_synth-tags_snr-2.5--10.0_seed-7.json"),
        ("--task tones.csv --kind classes", "small/noise_tones_kind-classes.json"),
        ("--representations mfcc", "baselines/noise_synth-key_mfcc.json"),

        ("--representations mfcc checkpoint", "small/noise_synth-key_hybrid_mfcc.json"),
        ("--representations random --patch square", "baselines/noise_.*random.*square.*"),
    ],
)
def test_result_names(arguments, name, labelled, monkeypatch, capsys):
    monkeypatch.chdir(labelled)
    found = {"scores": [], "missing": [], "skipped": [], "silent_clips": 0}
    monkeypatch.setattr(noise_eval, "noise_check", lambda *_, **__: found)
    monkeypatch.setattr(noise_eval, "table", lambda results: "")
    monkeypatch.setattr(sys, "argv", ["noise_eval.py", *arguments.split()])
    noise_eval.main()
    path = capsys.readouterr().out.split()[-1]
    assert re.fullmatch(f"runs/{name}", path) and (labelled / path).exists()


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--task", "nonsense"], "no task 'nonsense'"),
        (["--checkpoint", "missing.pt"], "no such checkpoint"),
        (["--checkpoint", "random"], "use --representations random"),
        (["--snr", "nan"], "between -100 and 100 dB"),
        (["--snr", "0", "1e9"], "between -100 and 100 dB"),
        (["--repeat", "0"], "--repeat 0: it must be above zero"),
        (["--repeat", "-1"], "--repeat -1: it must be above zero"),
        (["--task", "gtzan"], "Where to get it"),
        (["--sweep", "--snr", "7"], "not allowed with"),
        (["--snr", "loud"], "invalid float value: 'loud'"),
        (["--representations", "mfcc", "--patch", "square"], "--patch has no effect with hand-made"),
        (["--data", "."], "--data has no effect with the embedded music"),
    ],
)
def test_mistakes_are_one_sentence(labelled, arguments, sentence):
    command = [sys.executable, ROOT / "noise_eval.py", *arguments]
    done = subprocess.run(command, cwd=labelled, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and sentence in done.stderr and "Traceback" not in done.stderr
