"""What a run reports about itself: one JSON line a logged step, TensorBoard, W&B, a picture.

    readings of steps ──Meter──> line ──Sinks──> metrics.jsonl, tensorboard/, wandb/, loss_curve.png

Clocks are honest: tokens are real ones (specials count, filler does not) unless a name says padded; a window's rates
are over all of its wall clock but evaluation; shares are of the whole wall clock. Knows nothing of models and data.
"""

from __future__ import annotations

import json
import math
import secrets
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from moltron.common.manifest import staged_file
from moltron.config.schema import LoggingConfig

# Dense bf16 (fp16 where there is no bf16) peak in FLOP/s, from the makers' data sheets; first match wins.
PEAK_FLOPS = (
    ("B300", 2.25e15),
    ("B200", 2.25e15),
    ("H100 PCIe", 7.56e14),
    ("H100 NVL", 8.35e14),
    ("H100", 9.89e14),
    ("H200", 9.89e14),  # and GH200
    ("A100", 3.12e14),
    ("L40S", 3.62e14),
    ("L40", 1.81e14),
    ("L4", 1.21e14),
    ("A10", 1.25e14),
    ("A6000", 1.55e14),
    ("V100", 1.25e14),
    ("T4", 6.5e13),
    ("4090", 1.65e14),
)
PARTS = ("data", "eval", "checkpoint")


def peak_flops(device_name: str) -> float | None:
    """A GPU's peak by its name; None where it is unknown (a CPU): no MFU is reported then."""
    return next((peak for name, peak in PEAK_FLOPS if name in device_name), None)


def perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))  # stays a number in JSON


class Meter:
    """Sums over a window of steps and the time that its parts took."""

    def __init__(self, totals: Mapping[str, int], trained: float = 0.0, peak: float | None = None):
        """totals, trained: real tokens of each stream and seconds of the run so far, all its lives. peak: FLOP/s of all
        devices together, where it is known."""
        self.totals, self.trained, self.peak = dict(totals), trained, peak
        self.now = 0.0  # when the last step that was added ended
        self.reset(time.perf_counter())

    def reset(self, now: float) -> None:
        self.began = self.now = now
        self.window: Counter[str] = Counter()  # tokens, by kind
        self.window_flops = 0.0
        self.seconds: dict[str, float] = dict.fromkeys(PARTS, 0.0)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - began

    def add(self, counts: Mapping[str, int], flops: float, seconds: float | None = None) -> None:
        """One step over all ranks: real tokens and tokens with filler of each stream, FLOPs of the real tokens.

        seconds: from the end of the step before to the end of this one; None: it has just ended.
        """
        self.now = time.perf_counter() if seconds is None else self.now + seconds
        self.window.update(counts)
        self.window_flops += flops
        for name in self.totals:
            self.totals[name] += counts[name]

    def rates(self) -> dict[str, float | None]:
        """The window's rates and shares, up to the end of the last step added; begins the next window there."""
        wall = max(self.now - self.began, 1e-9)
        seconds = max(wall - self.seconds["eval"], 1e-9)
        self.trained += seconds
        kinds = [kind for name in self.totals for kind in (name, f"padded_{name}")]
        rates: dict[str, float | None] = {
            "seconds": self.trained,
            **{f"{kind}_per_second": self.window[kind] / seconds for kind in kinds},
            "data_wait": self.seconds["data"] / wall,
            "share_compute": max(1 - sum(self.seconds.values()) / wall, 0.0),
            "share_eval": self.seconds["eval"] / wall,
            "share_checkpoint": self.seconds["checkpoint"] / wall,
            "mfu": self.window_flops / seconds / self.peak if self.peak else None,
        }
        self.reset(self.now)
        return rates


def rewind(path: Path, step: int) -> list[dict[str, Any]]:
    """Of metrics.jsonl, drop a half-written line and all lines after `step`: a resumed run writes them again.

    Returns what stays.
    """
    lines = []
    if path.exists():
        for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(json.JSONDecodeError):
                lines.append(json.loads(text))
        lines = [line for line in lines if line["step"] <= step]
        with staged_file(path) as partial:
            partial.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return lines


class Sinks:
    """Everywhere a line goes. Made on rank 0 only."""

    def __init__(self, run_dir: Path, logging: LoggingConfig, config: dict[str, Any], step: int):
        """step: the last one done; lines after it, of a life that was cut off, are dropped."""
        self.run_dir = run_dir
        self.file = run_dir / "metrics.jsonl"
        self.lines = rewind(self.file, step)
        self.tensorboard = self.wandb = None
        if logging.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1 if step else None)
        if logging.wandb != "disabled":
            self.wandb = _start_wandb(run_dir, logging, config)

    def write(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        with open(self.file, "a", encoding="utf-8") as file:  # on disk when this returns to the operating system
            file.write(json.dumps(line) + "\n")
        numbers = {key: value for key, value in line.items() if key != "step" and value is not None}
        if self.tensorboard is not None:
            for key, value in numbers.items():
                self.tensorboard.add_scalar(key, value, line["step"])
        if self.wandb is not None:
            self.wandb.log(numbers, step=line["step"])

    def draw(self) -> None:
        draw_loss_curve(self.lines, self.run_dir / "loss_curve.png")

    def close(self) -> None:
        if self.tensorboard is not None:
            self.tensorboard.close()
        if self.wandb is not None:
            self.wandb.finish()


def _start_wandb(run_dir: Path, logging: LoggingConfig, config: dict[str, Any]) -> Any:
    try:
        import wandb
    except ImportError:
        raise ValueError(
            f"logging.wandb={logging.wandb} needs the wandb package: pip install wandb, or set logging.wandb=disabled"
        ) from None
    marker = run_dir / "wandb_id"
    if not marker.exists():
        marker.write_text(secrets.token_hex(4), encoding="utf-8")
    return wandb.init(
        project=logging.wandb_project,
        mode=logging.wandb,  # type: ignore[arg-type]
        dir=str(run_dir),
        id=marker.read_text(encoding="utf-8").strip(),
        resume="allow",
        config=config,
    )


def draw_loss_curve(lines: list[dict[str, Any]], path: Path) -> None:
    """Training and validation loss against the step, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for key, label, style in (("train_loss", "training", "-"), ("val_loss", "validation", "o-")):
        points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=4, linewidth=1.2)
    axes.set(xlabel="step", ylabel="loss (nats a target)")
    if axes.has_data():
        axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    with staged_file(path) as partial:
        FigureCanvasAgg(figure).print_png(str(partial))
