"""How fast, against the obvious way of doing the same work in the same run: `python tests/bench.py`.

The grid of probes on features of GTZAN's size (443 clips x 384, 10 classes), a fixed number of steps without early stopping:
side by side as `probe.fit_grid` trains them, and one configuration after the other. Not collected by pytest.
"""

import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from probe import GRID, fit_grid  # noqa: E402


def seconds(configurations, train, steps):
    """Wall time of training these configurations, the device waited for."""
    started = time.perf_counter()
    fit_grid(configurations, train, train, "classes", 10, steps=steps)
    if train[0].is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def main():
    """The table."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator().manual_seed(0)
    train = torch.randn(443, 384, generator=generator).to(device), torch.randint(10, (443,), generator=generator).to(device)
    print(f"{device}, {torch.get_num_threads()} threads; milliseconds a step of 54 configurations")
    print(f"{'probes':<22}{'side by side':>14}{'one by one':>14}{'ratio':>8}")
    for hidden, name, steps in (((), "linear", 200), ((512,), "MLP of 512", 20)):
        for batch in (64, 256):
            chosen = [c for c in GRID if c.hidden == hidden and c.batch == batch]
            seconds(chosen[:2], train, 2)
            together = seconds(chosen, train, steps)
            alone = sum(seconds([c], train, steps) for c in chosen)
            print(f"{name + f', batch {batch}':<22}{together / steps * 1e3:>14.2f}{alone / steps * 1e3:>14.2f}{alone / together:>8.1f}")


if __name__ == "__main__":
    main()
