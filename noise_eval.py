"""Stage 5 of Myna: is a representation still useful when the sound is noisy?

Probes are trained on clean sound and scored on the test split, clean and with white noise added to the sound, at 0 dB unless
told otherwise (the protocol of "limited data", arXiv 2505.06042). Two probes of different capacity are compared, linear and
an MLP with hidden layers of 256 and 128, and four representations: the checkpoint, the same encoder with random weights,
MFCC and chroma. All hear the same noise. A hybrid model gives its square and vertical vectors side by side.

    python noise_eval.py                             the newest checkpoint under runs/ on the embedded music's keys
    python noise_eval.py --task gtzan --snr 0        any task of probe.py
    python noise_eval.py --sweep                     from 30 dB down to -10 dB
    python noise_eval.py --snr 10 0 --repeat 5       five draws of the noise: mean and spread
"""

import argparse
import hashlib
import json
import os
import sys
from dataclasses import replace
from functools import partial

import torch
from tqdm import tqdm

from data import CORES
from model import PATCHES
from probe import (
    BASELINES, METRICS, QUICK_GRID, Representation, bootstrap, check_machine, embed_all, evaluate, fit_probes, hand_made,
    load_task, on_each_core, predict, trained, untrained,
)  # fmt: skip

SWEEP = (30.0, 20.0, 10.0, 5.0, 0.0, -5.0, -10.0)  # dB
PROBES = {"linear": (), "MLP 256-128": (256, 128)}  # hidden layers, after arXiv 2505.06042
CLIPS_A_PROBE = 25  # embedded in the time that a probe takes, roughly; for the bar
REPRESENTATIONS = ("checkpoint", "random", "mfcc", "chroma")


def add_white_noise(wave, snr_db, generator=None):
    """White Gaussian noise added to sound, (..., samples) -> the same shape, at a signal-to-noise ratio of `snr_db` decibels.

    The signal's power is its mean square over the clip, any DC included; the noise's expected power is that over
    10^(snr_db / 10). Silence stays as it is. The sum may pass full scale and is not clipped: clipping would remove the peaks of
    signal and noise together, a distortion that depends on the clip's level, and the ratio would not be the one asked for.
    """
    wave = torch.as_tensor(wave)
    power = wave.double().square().mean(dim=-1, keepdim=True)
    deviation = (power * 10 ** (-snr_db / 10)).sqrt().to(wave.dtype)
    return wave + deviation * torch.randn(wave.shape, generator=generator, dtype=wave.dtype, device=wave.device)


def noisy_versions(wave, clip, snrs, repeats):
    """Each draw of a clip's noise at each SNR: a list of repeats * len(snrs) waves.

    A draw depends on the clip's name and place alone: one for all SNRs, only scaled, and the same for all representations.
    """
    place = f"{getattr(clip.path, 'name', clip.path)} {clip.offset}"
    seeds = [int(hashlib.sha1(f"{place} {repeat}".encode()).hexdigest()[:15], 16) for repeat in range(repeats)]
    return [add_white_noise(wave, snr, torch.Generator().manual_seed(seed)) for seed in seeds for snr in snrs]


def side_by_side(features):
    """All that a representation says of a row: (n, ..., F)."""
    return torch.cat(list(features.rows.values()), dim=-1)


def scored(kind, metric, targets, outputs, clean=None):
    """Scores of `outputs` (R, n, C), one entry for each draw of the noise, as a plain dict.

    The mean of every metric; of the primary one also each draw's value, a 95% bootstrap interval of the mean over test clips,
    and the drop from the score `clean`.
    """
    scores = evaluate(kind, targets, outputs)
    found = {name: float(values.mean()) for name, values in scores.items()}
    found |= {"draws": scores[metric].tolist(), "interval": bootstrap(kind, targets, outputs, metric)}
    if clean is not None:
        found["drop"] = clean - found[metric]  # as a share of 1
        found["drop_percent"] = 100 * found["drop"] / clean if clean > 0 else None  # of the clean score
    return found


def noise_check(task, representations, snrs, repeats=1, seed=0, device="cpu", workers=None):
    """Probes trained on clean sound, scored on clean sound and at each of `snrs` (dB), over `repeats` draws of the noise.

    Returns the results as a plain dict, with an entry in `scores` for each representation, probe and SNR (None: clean). Which of
    the quick grid's settings a probe gets is decided by the clean validation split. Raises ValueError as `embed_all` does.
    """
    metric = METRICS[task.kind][0]
    grids = {name: [c._replace(hidden=h) for c in QUICK_GRID if bool(c.hidden) == bool(h)] for name, h in PROBES.items()}
    test = replace(task, clips=[clip for clip in task.clips if clip.split == "test"])
    probes = CLIPS_A_PROBE * len(representations) * sum(map(len, grids.values()))
    advance = lambda count: bar.update(CLIPS_A_PROBE * count)
    with tqdm(total=len(task.clips) + len(test.clips) + probes, desc="clean sound", smoothing=0.05) as bar:
        clean = embed_all(task, representations, device, workers, bar=bar)
        bar.n = len(task.clips)  # also when the features were kept
        bar.set_description("noisy sound")
        versions = partial(noisy_versions, snrs=snrs, repeats=repeats)
        *noisy, power = embed_all(test, [*representations, Representation("power")], device, workers, versions, bar)
        bar.set_description("probes")

        def score(representation, features, heard, name):  # one probe: its entries for all SNRs
            rows, loud = side_by_side(features), side_by_side(heard)  # (n, F), (n, V, F)
            _, probe = fit_probes(task, features, rows, grids[name], seed=seed, device=device, progress=advance)
            y, outputs = predict(task, features, rows, probe, device=device)
            each = [predict(test, heard, loud[:, v], probe, device=device)[1] for v in range(loud.shape[1])]
            each = torch.stack(each).unflatten(0, (repeats, len(snrs)))  # (R, SNRs, n, C)
            entry = {"representation": representation.name, "probe": name, "configuration": probe.configuration._asdict()}
            entry["valid"] = probe.valid
            entries = [{**entry, "snr": None, **scored(task.kind, metric, y, outputs[None])}]
            for s, snr in enumerate(snrs):
                entries.append({**entry, "snr": snr, **scored(task.kind, metric, y, each[:, s], entries[0][metric])})
            return entries

        jobs = [(*job, name) for job in zip(representations, clean, noisy) for name in grids]
        scores = sum(on_each_core(score, *zip(*jobs), device=device), [])
    return {
        "task": task.name,
        "kind": task.kind,
        "metric": metric,
        "snrs": list(snrs),
        "repeats": repeats,
        "clips": len(power.owner),
        "silent_clips": int((power.rows["power"] == 0).all(dim=1).sum()),  # all noise is scaled to the clip's power
        "seed": seed,
        "keys": {representation.name: representation.key for representation in representations},  # of checkpoints, their SHA-1
        "incomplete": bool(task.missing or clean[0].left_out),
        "missing": task.missing,
        "left_out": clean[0].left_out,
        "scores": scores,
    }


def table(results):
    """The results for people: for each probe a row an SNR and a column a representation, then what capacity adds."""
    names = list(dict.fromkeys(row["representation"] for row in results["scores"]))
    found = {(row["probe"], row["representation"], row["snr"]): row for row in results["scores"]}
    metric = results["metric"]
    levels = {None: "clean", **{snr: f"{snr:g} dB" for snr in results["snrs"]}}
    spread = " ± deviation over draws" if results["repeats"] > 1 else ""
    heading = (
        f"{results['task']}, {results['clips']} test clips: {metric} in percent{spread} (95% of resamples), "
        "then the drop from clean in points and in percent of it"
    )
    lines = []  # of a head and cells
    for probe in PROBES:
        lines += [("", []), (probe, names)]
        for snr, level in levels.items():
            cells = []
            for row in (found[probe, name, snr] for name in names):
                low, high = row["interval"]
                cell = f"{100 * row[metric]:5.1f}"
                if len(row["draws"]) > 1:
                    cell += f" ±{100 * torch.tensor(row['draws']).std():.1f}"
                cell += f" ({100 * low:.0f} to {100 * high:.0f})"
                if snr is not None:
                    cell += f" {0 - round(100 * row['drop'], 1):+.1f}"  # not -0.0
                    cell += f" {0 - round(row['drop_percent']):+d}%" if row["drop_percent"] is not None else ""
                cells.append(cell)
            lines.append((f"  {level}", cells))
    small, large = PROBES
    lines += [("", []), ("MLP - linear", names)]
    for snr, level in levels.items():
        gains = [found[large, name, snr][metric] - found[small, name, snr][metric] for name in names]
        lines.append((f"  {level}", [f"{100 * gain:+5.1f}" for gain in gains]))
    width = 2 + max(len(cell) for _, cells in lines for cell in cells)
    rows = (f"{head:<15}" + "".join(f"{cell:<{width}}" for cell in cells) for head, cells in lines)
    return "\n".join([heading, *(row.rstrip() for row in rows)])


def command_line():
    """The parser of the command line."""
    parser = argparse.ArgumentParser(description="Probes trained on clean sound, tested on noisy sound.")
    parser.add_argument("--task", default="synth-key", help="any task of probe.py (default: %(default)s)")
    parser.add_argument("--data", help="folder of the data set (default: datasets/TASK)")
    parser.add_argument("--kind", choices=list(METRICS), help="of the task in a labels.csv (default: told by its columns)")
    parser.add_argument("--checkpoint", help="of train.py or the authors' (default: the newest under runs/)")
    parser.add_argument("--patch", choices=list(PATCHES), help="shape of the patches in a released file with one tokenizer")
    parser.add_argument("--representations", nargs="+", choices=REPRESENTATIONS, default=REPRESENTATIONS, help="(default: all)")
    levels = parser.add_mutually_exclusive_group()
    levels.add_argument("--snr", nargs="+", type=float, default=[0.0], metavar="DB", help="signal-to-noise ratios (default: 0)")
    levels.add_argument("--sweep", action="store_true", help="at " + ", ".join(f"{snr:g}" for snr in SWEEP) + " dB")
    parser.add_argument("--repeat", type=int, default=1, metavar="N", help="draws of the noise (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the probes and of random weights (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: %(default)s)")
    parser.add_argument("--workers", type=int, default=CORES, help="decoding processes (default: %(default)s)")
    return parser


def noise_eval(args):
    """What the command line asks for."""
    check_machine(args)
    snrs = list(SWEEP) if args.sweep else list(dict.fromkeys(args.snr))
    for snr in snrs:
        if not -100 <= snr <= 100:
            raise ValueError(f"--snr {snr:g}: a signal-to-noise ratio lies between -100 and 100 dB")
    if args.repeat < 1:
        raise ValueError(f"--repeat {args.repeat}: the noise must be drawn at least once")
    task = load_task(args.task, args.data, args.kind)
    wanted = list(dict.fromkeys(args.representations))
    model = trained(args.checkpoint, args.patch) if {"checkpoint", "random"} & set(wanted) else None
    make = {"checkpoint": lambda: model, "random": lambda: untrained(model.encoder.config, args.seed)}
    representations = [make[name]() if name in make else hand_made(name) for name in wanted]
    results = noise_check(task, representations, snrs, args.repeat, args.seed, args.device, args.workers)
    print("\n" + table(results))
    if results["silent_clips"]:
        print(f"silent clips, to which no noise was added: {results['silent_clips']}")
    if results["incomplete"]:
        print(f"INCOMPLETE: {len(results['missing'])} files missing, {len(results['left_out'])} clips unreadable")
        for line in [*results["missing"], *(reason for _, reason in results["left_out"])][:10]:
            print(f"  {line}")
    path = (model.folder if model else BASELINES) / f"noise_{task.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".part").write_text(json.dumps(results))
    os.replace(path.with_suffix(".part"), path)
    print(f"\n{path}")


def main():
    """The command line."""
    try:
        noise_eval(command_line().parse_args())
    except (ValueError, OSError) as error:
        print(f"noise_eval.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nnoise_eval.py: interrupted", file=sys.stderr, flush=True)
        os._exit(130)  # without waiting for what workers are in the middle of


if __name__ == "__main__":
    main()
