"""Stage 5 of Myna: is a representation still useful when the sound is noisy?

Probes are trained on clean sound. They are scored on the test split, clean and with white noise added to the
sound, by default at 0 dB (the protocol of "limited data", arXiv 2505.06042). Two probes of different capacity
are compared, linear and an MLP with hidden layers of 256 and 128, and four representations: the checkpoint,
the same encoder with random weights, MFCC and chroma. All get the same noise. The square and vertical vectors
of a hybrid model are concatenated.

    python noise_eval.py                         newest checkpoint under runs/, embedded music's keys
    python noise_eval.py --task gtzan --snr 0    any task of probe.py
    python noise_eval.py --sweep                 from 30 dB down to -10 dB
    python noise_eval.py --snr 10 0 --repeat 5   five draws of the noise: mean and standard deviation
"""

import argparse
import hashlib
import json
import os
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from probe import QUICK_GRID, choose_encoders, embed_task, fit_all
from probe import load_task, predict, run_command, score_test, task_name

SWEEP = (30.0, 20.0, 10.0, 5.0, 0.0, -5.0, -10.0)  # dB
PROBES = {"linear": (), "MLP 256-128": (256, 128)}  # hidden layers, after arXiv 2505.06042
REPRESENTATIONS = ("checkpoint", "random", "mfcc", "chroma")


def add_white_noise(wave, snr_db, generator=None):
    """Add white Gaussian noise to (..., samples) at a signal-to-noise ratio of `snr_db` decibels.

    The signal's power is its mean square over the clip, any DC included; the noise's expected power is that
    over 10^(snr_db / 10). Silence is unchanged. The sum may pass full scale and is not clipped: clipping
    would remove the peaks of signal and noise together, and the ratio would not be the requested one.
    """
    wave = torch.as_tensor(wave)
    power = wave.double().square().mean(dim=-1, keepdim=True)
    std = (power * 10 ** (-snr_db / 10)).sqrt().to(wave.dtype)
    return wave + std * torch.randn(wave.shape, generator=generator, dtype=wave.dtype, device=wave.device)


def common_folder(task):
    """The folder that holds all files of a task."""
    paths = [os.path.abspath(clip.path) for clip in task.clips if isinstance(clip.path, Path)]
    return os.path.commonpath(paths) if paths else ""


def noisy_versions(wave, clip, folder, snrs, repeats):
    """A clip with each draw of noise at each SNR: a list of repeats * len(snrs) waves.

    A draw depends on the clip's offset and its path relative to `folder` only. It is the same for all
    representations, for the data set in another place and, but for its scale, for all SNRs.
    """
    name = str(clip.path)  # of embedded music (seed, number)
    if isinstance(clip.path, Path):
        name = Path(os.path.relpath(os.path.abspath(clip.path), folder)).as_posix()
    waves = []
    for repeat in range(repeats):
        text = f"{name} {clip.offset} {repeat}".encode(errors="surrogateescape")
        seed = int(hashlib.sha1(text).hexdigest()[:15], 16)
        waves += [add_white_noise(wave, snr, torch.Generator().manual_seed(seed)) for snr in snrs]
    return waves


def mean_power(wave):
    """(samples,) -> (1,): 0 for silence."""
    return wave.double().square().mean()[None]


def concatenated(features):
    """All vectors of a representation side by side: (n, ..., F)."""
    return torch.cat(list(features.rows.values()), dim=-1)


def summary(task, targets, outputs, groups, clean=None):
    """Scores of outputs (R, n, C) from R draws of the noise, as a plain dict.

    The mean over draws of every metric; for the primary one also each draw's score, the 95% interval of the
    mean and the drop from the score `clean`.
    """
    scores, interval, unit = score_test(task, targets, outputs, groups)
    primary = next(iter(scores))
    found = {name: float(values.mean()) for name, values in scores.items()}
    found |= {"draws": scores[primary].tolist(), "interval": interval, "interval_over": unit}
    if clean is not None:
        found["drop"] = clean - found[primary]  # as a share of 1
        found["drop_percent"] = 100 * found["drop"] / clean if clean > 0 else None  # of the clean score
    return found


def noise_check(
    task, encoders, snrs, repeats=1, grid=QUICK_GRID, seed=0, patience=256,
    device="cpu", workers=None, cache=None,
):  # fmt: skip
    """Train probes on clean sound; score them on clean sound and at each of `snrs` (dB), `repeats` draws.

    `encoders` {name: encoder} and `cache` are as in `embed_task`. Each probe gets the settings of `grid` that
    are best on the clean validation split, after early stopping with `patience` (see `fit_grid`). Returns the
    results as a plain dict; `scores` has an entry for each representation, probe and SNR (None: clean).
    """
    test = replace(task, clips=[clip for clip in task.clips if clip.split == "test"])
    corrupt = partial(noisy_versions, folder=common_folder(task), snrs=snrs, repeats=repeats)
    clean = embed_task(task, encoders, None, device, workers, cache, label="clean sound")
    noisy = embed_task(test, {**encoders, "power": mean_power}, corrupt, device, workers, label="noisy sound")
    power = concatenated(noisy.pop("power"))  # (n, V, 1)

    jobs = {}
    for name in encoders:
        for probe_name, hidden in PROBES.items():
            settings = [c._replace(hidden=hidden) for c in grid if bool(c.hidden) == bool(hidden)]
            jobs[name, probe_name] = clean[name], concatenated(clean[name]), settings
    scores = []
    fitted = fit_all(task, jobs, seed=seed, device=device, patience=patience)
    for (name, probe_name), (_, probe) in fitted.items():
        entry = {"representation": name, "probe": probe_name, "configuration": probe.configuration._asdict()}
        entry["valid"] = probe.valid
        targets, outputs, groups = predict(task, clean[name], concatenated(clean[name]), probe, device=device)
        on_clean = summary(task, targets, outputs[None], groups)
        metric = next(iter(on_clean))
        scores.append({**entry, "snr": None, **on_clean})
        _, outputs, _ = predict(test, noisy[name], concatenated(noisy[name]), probe, device=device)
        outputs = outputs.unflatten(0, (repeats, len(snrs)))  # (R, SNRs, n, C)
        for s, snr in enumerate(snrs):
            on_noisy = summary(task, targets, outputs[:, s], groups, on_clean[metric])
            scores.append({**entry, "snr": snr, **on_noisy})
    skipped = next(iter(clean.values())).skipped
    return {
        "task": task.name,
        "kind": task.kind,
        "metric": metric,
        "snrs": list(snrs),
        "repeats": repeats,
        "clips": len(power),
        "silent_clips": int((power == 0).flatten(1).all(dim=1).sum()),  # no noise is added to them
        "seed": seed,
        "incomplete": bool(task.missing or skipped),
        "missing": task.missing,
        "skipped": skipped,
        "scores": scores,
    }


def _cell(row, metric):
    """A score in percent, its interval and, on noisy sound, the drop from clean in points and in percent."""
    low, high = row["interval"]
    cell = f"{100 * row[metric]:5.1f}"
    if len(row["draws"]) > 1:
        cell += f" ±{100 * torch.tensor(row['draws']).std():.1f}"
    cell += f" ({100 * low:.0f} to {100 * high:.0f})"
    if row["snr"] is not None:
        cell += f" {0 - round(100 * row['drop'], 1):+.1f}"  # not -0.0
        if row["drop_percent"] is not None:
            cell += f" {0 - round(row['drop_percent']):+d}%"
    return cell


def table(results):
    """The results as text: for each probe a row per SNR, a column per representation; then MLP - linear."""
    metric = results["metric"]
    rows = {(row["probe"], row["representation"], row["snr"]): row for row in results["scores"]}
    names = list(dict.fromkeys(name for _, name, _ in rows))
    levels = {None: "clean", **{snr: f"{snr:g} dB" for snr in results["snrs"]}}
    lines = []  # of a head and cells
    for probe in PROBES:
        lines += [("", []), (probe, names)]
        for snr, level in levels.items():
            found = [rows[probe, name, snr] for name in names]
            lines.append((f"  {level}", [_cell(row, metric) for row in found]))
    linear, mlp = PROBES
    lines += [("", []), ("MLP - linear", names)]
    for snr, level in levels.items():
        gains = [rows[mlp, name, snr][metric] - rows[linear, name, snr][metric] for name in names]
        lines.append((f"  {level}", [f"{100 * gain:+5.1f}" for gain in gains]))
    width = 2 + max(len(cell) for _, cells in lines for cell in cells)
    draws = " ± standard deviation over draws" if results["repeats"] > 1 else ""
    unit = results["scores"][0]["interval_over"]
    text = [
        f"{results['task']}, {results['clips']} test clips: {metric} in percent{draws}",
        f"  (95% interval over {unit}), then the drop from clean in points and in percent of the clean score",
    ]
    for head, cells in lines:
        text.append("".join([f"{head:<15}", *(f"{cell:<{width}}" for cell in cells)]).rstrip())
    return "\n".join(text)


def command_line():
    """The parser of the options that are noise_eval.py's alone."""
    parser = argparse.ArgumentParser(description="Probes trained on clean sound, tested on noisy sound.")
    parser.add_argument("--representations", nargs="+", choices=REPRESENTATIONS, help="(default: all)")
    levels = parser.add_mutually_exclusive_group()
    levels.add_argument("--snr", nargs="+", type=float, metavar="DB", help="signal-to-noise (default: 0)")
    levels.add_argument("--sweep", action="store_true", help=f"at {' '.join(map(str, SWEEP))} dB")
    parser.add_argument("--repeat", type=int, default=1, metavar="N", help="draws of the noise (default: 1)")
    return parser


def unused_options(args):
    """See `run_command`."""
    hand_made = not {"checkpoint", "random"} & set(args.representations or REPRESENTATIONS)
    return [(hand_made, "hand-made representations", ("checkpoint", "patch"))]


def result_name(args, task, snrs, encoders):
    """The name of the result file; what differs from the defaults is in it."""
    parts = ["noise", task_name(args, task)]
    parts += [args.kind] if args.kind else []
    parts += list(encoders) if len(encoders) < len(REPRESENTATIONS) else []
    if args.sweep:
        parts.append("sweep")
    elif snrs != [0.0]:
        parts.append("snr" + ",".join(f"{snr:g}" for snr in snrs))
    parts += [f"x{args.repeat}"] if args.repeat > 1 else []
    parts += [f"seed{args.seed}"] if args.seed else []
    return "_".join(parts) + ".json"


def noise_eval(args):
    """What the command line asks for."""
    snrs = list(SWEEP) if args.sweep else list(dict.fromkeys(args.snr or [0.0]))
    for snr in snrs:
        if not -100 <= snr <= 100:
            raise ValueError(f"--snr {snr:g}: a signal-to-noise ratio lies between -100 and 100 dB")
    if args.repeat < 1:
        raise ValueError(f"--repeat {args.repeat}: the noise must be drawn at least once")
    if args.checkpoint == "random":
        raise ValueError("--checkpoint random is for probe.py: use --representations random here")
    task = load_task(args.task, args.data, args.kind)
    names = [name for name in REPRESENTATIONS if name in (args.representations or REPRESENTATIONS)]
    chosen = choose_encoders(names, args)
    encoders = {encoder.name: encoder.encoder for encoder in chosen}
    cache = {encoder.name: encoder.cache(task) for encoder in chosen}
    machine = {"device": args.device, "workers": args.workers}
    results = noise_check(task, encoders, snrs, args.repeat, QUICK_GRID, args.seed, cache=cache, **machine)
    results["keys"] = {encoder.name: encoder.key for encoder in chosen}  # of checkpoints, their SHA-1
    path = chosen[0].folder / result_name(args, task, snrs, encoders)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".part").write_text(json.dumps(results))
    os.replace(path.with_suffix(".part"), path)

    print("\n" + table(results))
    if results["silent_clips"]:
        print(f"silent clips, to which no noise was added: {results['silent_clips']}")
    if results["incomplete"]:
        missing, skipped = results["missing"], results["skipped"]
        print(f"INCOMPLETE: {len(missing)} files missing, {len(skipped)} clips unreadable")
        for line in [*missing, *(reason for _, reason in skipped)][:10]:
            print(f"  {line}")
    print(f"\n{path}")


def main():
    """The command line."""
    run_command(command_line(), noise_eval, unused_options)


if __name__ == "__main__":
    main()
