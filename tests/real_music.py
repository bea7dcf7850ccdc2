"""A small data set of real recordings: the music of free games in Debian. The label is the game.

    python tests/real_music.py datasets/games                        fetch the packages (900 MB) with apt-get
    python tests/real_music.py datasets/games --from FOLDER/*.deb    use packages or unpacked folders

Output: OUT/train, OUT/valid and OUT/test hold the tracks, a folder a game. OUT/pretrain has links to train
and valid, so that pre-training never hears a test track. OUT/labels.csv is for probe.py, OUT/copyright holds
the licences. The same packages give the same data set. OUT appears when it is complete: after an interruption
repeat the command. Not collected by pytest.
"""

import argparse
import csv
import hashlib
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import soundfile

sys.path.insert(0, str(Path(__file__).parent.parent))
from data import audio_files  # noqa: E402

GAMES = {  # Debian package: label
    "drascula-music": "drascula",
    "hedgewars-data": "hedgewars",
    "hyperrogue-music": "hyperrogue",
    "megaglest-data": "megaglest",
    "planetblupi-music-ogg": "planetblupi",
    "singularity-music": "singularity",
    "supertux-data": "supertux",
    "wesnoth-1.16-music": "wesnoth",
}
SPLITS = ("train", "valid", "test")
VALID_SHARE, TEST_SHARE = 0.2, 0.3  # of the tracks of a game; the rest is for training
TRACK_SECONDS, MAX_TRACKS = 45, 40  # the shortest track; how many of a game
CLIP_SECONDS, MAX_CLIPS = 10, 6  # of one track
COLUMNS = ("path", "label", "split", "group", "offset", "duration")


def run(*command, folder="."):
    """Run a program and hide its output. Raises ValueError with its last error message if it fails."""
    if shutil.which(command[0]) is None:
        raise ValueError(f"{command[0]} is not installed")
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace")
    if result.returncode:
        messages = result.stderr.strip().splitlines() or [f"{command[0]} failed"]
        raise ValueError(messages[-1])


def open_package(source, folder):
    """Unpack a Debian package below `folder`, where it is not there yet. Returns (its name, its own folder).

    `source` is the name of a package (it is fetched), a .deb file, or an unpacked folder (used where it is).
    A package is renamed to its place when it is complete. Raises ValueError if fetching or unpacking fails.
    """
    path = Path(source).resolve()
    if path.is_dir():
        return path.name, path
    package = path.name.split("_")[0]
    if not (folder / package).exists():
        part = folder / "unfinished"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        if not path.is_file():
            print(f"fetching {source}", flush=True)
            run("apt-get", "download", str(source), folder=part)
            path = next(part.glob("*.deb"))
        run("dpkg-deb", "-x", str(path), str(part / package))
        (part / package).rename(folder / package)
    return package, folder / package


def by_hash(names):
    """Names in an order that looks random and depends on the names alone."""
    return sorted(names, key=lambda name: hashlib.sha256(os.fsencode(name)).digest())


def find_tracks(folder, seen):
    """The tracks of a game: {path relative to `folder`: seconds}, at most 40, each of 45 s or more.

    Of files with the same content the first is taken; `seen` holds the content hashes, other games' included.
    Folders called `sounds` are skipped: the long files in them are wind and crickets, not music.
    """
    found = {}
    for name in audio_files(folder):
        path = Path(folder, name)
        try:
            info = soundfile.info(os.fsencode(path))
        except (OSError, soundfile.SoundFileError):
            continue  # a damaged file, or a link to a file of another package
        if info.frames < TRACK_SECONDS * info.samplerate or "sounds" in Path(name).parts:
            continue
        content = hashlib.sha256(path.read_bytes()).digest()
        if content not in seen:
            seen.add(content)
            found[name] = info.frames / info.samplerate
    return {name: found[name] for name in by_hash(found)[:MAX_TRACKS]}


def split_tracks(names):
    """The split of each of a game's three or more tracks: {name: split}. Every split gets at least one."""
    ordered = by_hash(names)
    n_test = max(1, round(TEST_SHARE * len(ordered)))
    n_valid = max(1, round(VALID_SHARE * len(ordered)))
    splits = ["test"] * n_test + ["valid"] * n_valid + ["train"] * (len(ordered) - n_test - n_valid)
    return dict(zip(ordered, splits))


def clip_offsets(seconds):
    """Where the clips of a track start, in seconds: the middles of up to six equal parts of it."""
    parts = min(MAX_CLIPS, int(seconds // CLIP_SECONDS))
    return [(i + 0.5) * seconds / parts - CLIP_SECONDS / 2 for i in range(parts)]


def add_game(game, folder, tracks, out):
    """Copy the tracks of one game into the folders of their splits. Returns the rows of labels.csv."""
    rows = []
    common = os.path.commonpath([folder / Path(name).parent for name in tracks])
    for name, split in sorted(split_tracks(tracks).items()):
        track = Path(game, os.path.relpath(folder / name, common))
        target = out / split / track
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / name, target)
        for offset in clip_offsets(tracks[name]):
            path = Path(split, track).as_posix()
            rows.append((path, game, split, track.as_posix(), f"{offset:.3f}", CLIP_SECONDS))
    return rows


def build(sources, out):
    """Make the data set `out` from sources of `open_package`. Raises ValueError with fewer than two games."""
    part = out.with_name(out.name + ".part")
    for name in (*SPLITS, "pretrain", "copyright"):
        shutil.rmtree(part / name, ignore_errors=True)  # of an interrupted build; its packages are used again
    (part / "pretrain").mkdir(parents=True)
    (part / "copyright").mkdir()
    rows, seen = [], set()
    for source in sources:
        try:
            package, folder = open_package(source, part / "packages")
            game = GAMES.get(package, package)
            if (part / "train" / game).exists():
                raise ValueError(f"there is a game {game} already")
            tracks = find_tracks(folder, seen)
            if len(tracks) < len(SPLITS):
                raise ValueError(f"{len(tracks)} tracks of {TRACK_SECONDS} s or more, at least 3 are needed")
        except ValueError as error:
            print(f"skipped {source}: {error}", file=sys.stderr)
            continue
        rows += add_game(game, folder, tracks, part)
        licence = folder / "usr/share/doc" / package / "copyright"
        if licence.is_file():
            shutil.copyfile(licence, part / "copyright" / package)
    if len({game for _, game, *_ in rows}) < 2:
        raise ValueError("fewer than two games: run apt-get update and try again, or use --from")
    for split in ("train", "valid"):
        (part / "pretrain" / split).symlink_to(Path("..", split))
    with open(part / "labels.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([COLUMNS, *rows])
    shutil.rmtree(part / "packages", ignore_errors=True)
    part.rename(out)


def report(out):
    """Print the tracks, hours and clips of every game and split, and the next two commands."""
    with open(out / "labels.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    tracks, hours, clips = Counter(), Counter(), Counter()
    for path, game, split in sorted({(row["path"], row["label"], row["split"]) for row in rows}):
        for line in (game, "all"):
            tracks[line, split] += 1
            hours[line, split] += soundfile.info(os.fsencode(out / path)).duration / 3600
    for row in rows:
        for line in (row["label"], "all"):
            clips[line, row["split"]] += 1
    print(f"{out}: tracks, hours, clips\n{'':<16}" + "".join(f"{split:>24}" for split in SPLITS))
    for line in (*sorted({row["label"] for row in rows}), "all"):
        cells = [(tracks[line, split], hours[line, split], clips[line, split]) for split in SPLITS]
        print(f"{line:<16}" + "".join(f"{n:>10}{length:>7.2f} h{m:>5}" for n, length, m in cells))
    print(f"licences: {out / 'copyright'} (of each package, usr/share/doc/PACKAGE/copyright)")
    settings = "--size tiny --batch 256 --steps 1500 --lr 1e-3 --out runs/games"
    print(f'next: python train.py --data "{out / "pretrain"}" {settings}')
    print(f'then: python probe.py --task "{out / "labels.csv"}" --checkpoint runs/games/checkpoint.pt')


def main():
    """The command line: build the data set where it is not there, and report what it holds."""
    parser = argparse.ArgumentParser(description="Build a labelled data set from the music of free games.")
    parser.add_argument("out", type=Path, help="folder of the data set, below datasets/ for example")
    parser.add_argument("--from", dest="sources", nargs="+", metavar="PATH", help=".deb files or folders")
    args = parser.parse_args()
    try:
        if not (args.out / "labels.csv").exists():
            if args.out.exists():
                raise ValueError(f"{args.out} exists and holds no labels.csv: choose another name")
            if not args.sources and shutil.which("apt-get") is None:
                raise ValueError("apt-get is not installed: use Debian or Ubuntu, or --from with folders")
            build(args.sources or GAMES, args.out)
        report(args.out)
    except KeyboardInterrupt:
        sys.exit("\nInterrupted: repeat the command to continue.")
    except (ValueError, OSError) as error:
        print(f"real_music.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
