"""Draws the training curve of a run: `python tools/plot_curve.py WORKDIR [PICTURE.svg]`."""

import sys
from pathlib import Path

import matplotlib

from nfnet_flax.training.metrics import read_rows

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def plot(workdir: Path, picture: Path) -> None:
    """Draws training loss and held-out top-1 (raw and EMA) against the step."""
    rows = read_rows(workdir / "metrics.jsonl")
    if not rows:
        raise SystemExit(f"{workdir / 'metrics.jsonl'} holds no metrics: train first")

    def series(name: str) -> tuple[list[int], list[float]]:
        found = [(row["step"], row[name]) for row in rows if row.get(name) is not None]  # null: it was not finite
        return [step for step, _ in found], [value for _, value in found]

    plt.rcParams["svg.hashsalt"] = "nfnet_flax"
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
    left.plot(*series("train/loss"), linewidth=1)
    left.set(xlabel="step", ylabel="training loss (label smoothing 0.1)", ylim=(0, None))
    for name, label in (("eval/top1", "raw"), ("eval_ema/top1", "EMA")):
        steps, values = series(name)
        right.plot(steps, [100 * value for value in values], marker="o", markersize=3, linewidth=1, label=label)
    right.set(xlabel="step", ylabel="held-out top-1, %")
    right.legend()
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, metadata={"Date": None})
    print(f"picture: {picture}")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        raise SystemExit(__doc__)
    folder = Path(sys.argv[1])
    plot(folder, Path(sys.argv[2]) if len(sys.argv) == 3 else folder / "curve.svg")
