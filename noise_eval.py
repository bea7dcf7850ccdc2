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
import os
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from probe import QUICK_GRID, embed_task, fit_all, load_task, open_encoder
from probe import run_command, save_results, score_test

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


def noisy_versions(wave, clip, folder, snrs, repeats):
    """A clip with each draw of noise at each SNR: a list of repeats * len(snrs) waves.

    The noise depends on the clip's path below `folder`, its offset and the number of the draw. So it is the
    same for all representations, for the data set in another place and, but for its scale, for all SNRs.
    """
    name = str(clip.path)  # of embedded music (seed, number)
    if isinstance(clip.path, Path):
        name = Path(os.path.relpath(clip.path, folder)).as_posix()
    waves = []
    for repeat in range(repeats):
        text = f"{name} {clip.offset} {repeat}".encode(errors="surrogateescape")
        seed = int(hashlib.sha1(text).hexdigest()[:15], 16)
        waves += [add_white_noise(wave, snr, torch.Generator().manual_seed(seed)) for snr in snrs]
    return waves


def mean_power(wave):
    """Mean power of a wave, (samples,) -> (1,): a feature, by which `noise_check` counts silent clips."""
    return wave.double().square().mean()[None]


def noise_check(task, encoders, snrs, repeats=1, grid=QUICK_GRID, seed=0, device="cpu", workers=None):
    """Train probes on clean sound; score them on clean sound and at each of `snrs` (dB), `repeats` draws.

    `encoders` {name: encoder} are as in `embed_task`. Each probe gets the settings of `grid` that are best on
    the clean validation split. Returns the results as a plain dict; `scores` has an entry for each
    representation, probe and SNR (None: clean).
    """
    files = [os.path.abspath(clip.path) for clip in task.clips if isinstance(clip.path, Path)]
    folder = os.path.commonpath(files) if files else ""
    corrupt = partial(noisy_versions, folder=folder, snrs=snrs, repeats=repeats)
    test_task = replace(task, clips=[clip for clip in task.clips if clip.split == "test"])
    noisy = embed_task(test_task, {**encoders, "power": mean_power}, corrupt, device, workers, "noisy sound")
    clean = embed_task(task, encoders, None, device, workers, "clean sound")
    power = noisy.pop("power").rows["mean_power"]  # (n, V, 1)

    jobs = {}
    for probe_name, hidden in reversed(PROBES.items()):  # the MLP, which takes longer, first
        settings = [c._replace(hidden=hidden) for c in grid if bool(c.hidden) == bool(hidden)]
        for name in encoders:
            jobs[name, probe_name] = clean[name], clean[name].concatenated(), settings
    scores = []
    for (name, probe_name), (_, probe) in fit_all(task, jobs, False, seed, device).items():
        entry = {"representation": name, "probe": probe_name, "valid": probe.valid}
        entry["configuration"] = probe.configuration._asdict()
        on_clean = score_test(task, clean[name], clean[name].concatenated(), probe, device=device)
        scores.append({**entry, "snr": None, **on_clean})
        rows = noisy[name].concatenated().unflatten(1, (repeats, len(snrs)))  # (n, R, SNRs, F)
        for s, snr in enumerate(snrs):
            found = score_test(test_task, noisy[name], rows[:, :, s], probe, device=device)
            drop = on_clean["score"] - found["score"]  # as a share of 1
            share = 100 * drop / on_clean["score"] if on_clean["score"] > 0 else None
            scores.append({**entry, "snr": snr, **found, "drop": drop, "drop_percent": share})
    return {
        "task": task.name,
        "kind": task.kind,
        "snrs": list(snrs),
        "repeats": repeats,
        "clips": len(power),
        "silent_clips": int((power == 0).flatten(1).all(dim=1).sum()),  # no noise is added to them
        "seed": seed,
        "missing": task.missing,
        "skipped": next(iter(clean.values())).skipped,
        "scores": scores,
    }


def _cell(row, draws):
    """A score in percent, its interval and, on noisy sound, the change in points and in percent of clean."""
    low, high = row["interval"]
    cell = f"{100 * row['score']:5.1f}"
    if draws > 1 and row["snr"] is not None:
        cell += f" ±{100 * torch.tensor(row['draws']).std():.1f}"
    cell += f" ({100 * low:.0f} to {100 * high:.0f})"
    if row["snr"] is not None:
        cell += f" {0 - round(100 * row['drop'], 1):+.1f}"  # not -0.0
        if row["drop_percent"] is not None:
            cell += f" {0 - round(row['drop_percent']):+d}%"
    return cell


def table(results):
    """The results as text: for each probe a line per SNR, with a column per representation."""
    rows = {(row["probe"], row["snr"], row["representation"]): row for row in results["scores"]}
    names = list(dict.fromkeys(name for _, _, name in rows))
    first = results["scores"][0]
    draws = " ± standard deviation over draws" if results["repeats"] > 1 else ""
    text = f"{results['task']}, {results['clips']} test clips: {first['metric']} in percent{draws}\n"
    text += f"  (95% interval over {first['interval_over']}), change from clean in points and in percent\n"
    for probe in PROBES:
        lines = [(probe, names)]
        for snr in (None, *results["snrs"]):
            level = "  clean" if snr is None else f"  {snr:g} dB"
            lines.append((level, [_cell(rows[probe, snr, name], results["repeats"]) for name in names]))
        width = 2 + max(len(cell) for _, cells in lines for cell in cells)
        for head, cells in lines:
            text += f"\n{head:<15}" + "".join(f"{cell:<{width}}" for cell in cells).rstrip()
        text += "\n"
    return text


def command_line():
    """The parser of the options that are noise_eval.py's alone."""
    parser = argparse.ArgumentParser(description="Probes trained on clean sound, tested on noisy sound.")
    parser.add_argument("--representations", nargs="+", choices=REPRESENTATIONS, help="(default: all)")
    levels = parser.add_mutually_exclusive_group()
    levels.add_argument("--snr", nargs="+", type=float, metavar="DB", help="signal-to-noise (default: 0)")
    levels.add_argument("--sweep", action="store_true", help=f"at {' '.join(map(str, SWEEP))} dB")
    parser.add_argument("--repeat", type=int, metavar="N", help="draws of the noise (default: 1)")
    return parser


def unused_options(args):
    """See `run_command`."""
    hand_made = not {"checkpoint", "random"} & set(args.representations or REPRESENTATIONS)
    return [(hand_made, "with hand-made representations", "checkpoint patch")]


def run_noise_eval(args):
    """Check what the options ask for, print the table and save the results."""
    snrs = list(SWEEP) if args.sweep else list(dict.fromkeys(args.snr or [0.0]))
    for snr in snrs:
        if not -100 <= snr <= 100:
            raise ValueError(f"--snr {snr:g}: a signal-to-noise ratio lies between -100 and 100 dB")
    if args.checkpoint == "random":
        raise ValueError("--checkpoint random is for probe.py: use --representations random here")
    task = load_task(args.task, args.data, args.kind)
    names = [name for name in REPRESENTATIONS if name in (args.representations or REPRESENTATIONS)]
    chosen = [open_encoder(name, args) for name in names]
    encoders = {encoder.name: encoder.encoder for encoder in chosen}
    machine = {"device": args.device, "workers": args.workers}
    results = noise_check(task, encoders, snrs, args.repeat or 1, seed=args.seed, **machine)
    results["keys"] = {encoder.name: encoder.key for encoder in chosen}  # of checkpoints, their SHA-1

    print("\n" + table(results))
    if results["silent_clips"]:
        print(f"silent clips, to which no noise was added: {results['silent_clips']}")
    more = list(encoders) if len(encoders) < len(REPRESENTATIONS) else []
    save_results(results, chosen[0].folder, "noise", task, more, args, "snr sweep repeat kind seed")


def main():
    """The command line."""
    run_command(command_line(), run_noise_eval, unused_options)


if __name__ == "__main__":
    main()
