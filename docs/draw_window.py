"""Draws docs/images/window.svg, a window being cut: python docs/draw_window.py.

The samples are those that `distaccum.planning` puts there: seed 0, epoch 0, 24 samples in windows of 10, 2 ranks.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

from distaccum.planning import resolve_batch, shuffled, window_bounds

NUM_SAMPLES, WINDOW_SIZE, RANKS, MICRO_BATCH_SIZE = 24, 10, 2, 2
SHOWN = 1  # the window that is cut, from 0
WIDTH, HEIGHT = 720, 470
CELL, GAP, LEFT = 25, 3, 24

STYLE = """
  svg { font: 13px ui-sans-serif, system-ui, sans-serif; }
  .card { fill: #ffffff; stroke: #c9ced6; }
  .text { fill: #1f2733; } .quiet { fill: #5b6675; } .strong { font-weight: 600; }
  .other { fill: #e9ecf1; } .line { stroke: #7b8696; fill: none; } .lane { fill: #f5f6f9; }
  .r0 { fill: #cfe0fb; } .r1 { fill: #fde0bd; } .sync { fill: none; stroke: #c2255c; stroke-width: 2; }
  .synctext { fill: #c2255c; } .sum { fill: #e6f4ea; stroke: #3f9160; }
  @media (prefers-color-scheme: dark) {
    .card { fill: #1e2129; stroke: #454b57; }
    .text { fill: #e8ebf0; } .quiet { fill: #a5afbd; }
    .other { fill: #343a46; } .line { stroke: #8893a3; } .lane { fill: #262b35; }
    .r0 { fill: #2c4f86; } .r1 { fill: #7d4f16; } .sync { stroke: #ff7aa8; }
    .synctext { fill: #ff7aa8; } .sum { fill: #1f3a2a; stroke: #5fb582; }
  }
"""


class Drawing:
    """SVG elements, in the order in which they are drawn."""

    def __init__(self) -> None:
        self.parts: list[str] = []

    def box(self, x: float, y: float, width: float, height: float, kind: str, radius: float = 3) -> None:
        self.parts.append(f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="{radius}" class="{kind}"/>')

    def text(self, x: float, y: float, words: str, kind: str = "text", anchor: str = "start") -> None:
        self.parts.append(f'<text x="{x}" y="{y}" class="{kind}" text-anchor="{anchor}">{words}</text>')

    def heading(self, y: float, title: str, words: str) -> None:
        self.text(LEFT, y, f'<tspan class="strong">{title}</tspan><tspan dx="12" class="quiet">{words}</tspan>')

    def line(self, *points: tuple[float, float], kind: str = "line") -> None:
        path = " ".join(f"{x},{y}" for x, y in points)
        self.parts.append(f'<polyline points="{path}" class="{kind}"/>')

    def sample(self, x: float, y: float, number: int, kind: str) -> None:
        self.box(x, y, CELL, CELL, kind)
        self.text(x + CELL / 2, y + 17, str(number), anchor="middle")

    def svg(self) -> str:
        head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">'
        title = "<title>A window of an epoch is cut into micro-batches of two ranks, and made one update</title>"
        return "\n".join([head, title, f"<style>{STYLE}</style>", *self.parts, "</svg>\n"])


def place(position: int) -> float:
    """Where the cell of a position in the epoch begins."""
    return LEFT + position * (CELL + GAP)


def draw() -> str:
    drawing = Drawing()
    drawing.box(0.5, 0.5, WIDTH - 1, HEIGHT - 1, "card", 8)
    order = [int(sample) for sample in shuffled(range(NUM_SAMPLES), NUM_SAMPLES, seed=0, epoch=0)]
    bounds = window_bounds(NUM_SAMPLES, WINDOW_SIZE)
    start, stop = bounds[SHOWN]
    plan = resolve_batch(world_size=RANKS, global_batch_size=WINDOW_SIZE, micro_batch_size=MICRO_BATCH_SIZE)
    cut = plan.cut(stop - start)

    drawing.heading(30, "The order of an epoch", f"{NUM_SAMPLES} samples, shuffled by seed and epoch alone")
    ranks = [rank for rank, sizes in enumerate(cut.sizes) for _ in range(sum(sizes))]
    for position, sample in enumerate(order):
        kind = f"r{ranks[position - start]}" if start <= position < stop else "other"
        drawing.sample(place(position), 44, sample, kind)
    for number, (first, last) in enumerate(bounds):
        left, right = place(first) + 1, place(last) - GAP - 1
        drawing.line((left, 76), (left, 82), (right, 82), (right, 76))
        size = f"{last - first} samples" if last - first == WINDOW_SIZE else str(last - first)
        kind = "text strong" if number == SHOWN else "quiet"
        drawing.text((left + right) / 2, 99, f"window {number}: {size}", kind, "middle")

    how = f"{RANKS} ranks, micro-batches of at most {MICRO_BATCH_SIZE}; any other cut will do"
    drawing.text(LEFT, 140, f"A cut of window {SHOWN}", "text strong")
    drawing.text(LEFT + 142, 140, how, "quiet")
    columns = [150, 330, 510]
    for step, x in enumerate(columns):
        drawing.text(x + 75, 168, f"micro-step {step + 1}", "quiet", "middle")
    for rank in range(RANKS):
        y = 178 + rank * 58
        drawing.box(LEFT, y, WIDTH - 2 * LEFT, 48, "lane", 5)
        drawing.text(LEFT + 14, y + 29, f"rank {rank}", "text strong")
        for x, (first, last) in zip(columns, cut.micro_batches(rank), strict=True):
            width = (last - first) * (CELL + GAP) - GAP
            for number, position in enumerate(range(start + first, start + last)):
                drawing.sample(x + 75 - width / 2 + number * (CELL + GAP), y + 11, order[position], f"r{rank}")
        for before, after in pairwise(columns):
            drawing.line((before + 128, y + 24), (after + 22, y + 24))
    drawing.box(columns[-1] + 13, 174, 124, 114, "sync", 6)
    drawing.text(columns[-1] + 75, 306, "the one sync", "synctext strong", "middle")
    drawing.text((columns[0] + columns[1]) / 2 + 75, 306, "no_sync: gradients stay on the rank", "quiet", "middle")

    middle = WIDTH / 2
    drawing.line((middle, 316), (middle, 336))
    drawing.line((middle - 5, 331), (middle, 337), (middle + 5, 331))
    drawing.box(LEFT, 344, WIDTH - 2 * LEFT, 58, "sum", 5)
    sums = "both sums over all micro-steps and all ranks; one division, at the end"
    drawing.text(middle, 368, "Σ grad(loss_sum)  ÷  Σ weight", "text strong", "middle")
    drawing.text(middle, 389, sums, "quiet", "middle")
    drawing.line((middle, 404), (middle, 424))
    drawing.line((middle - 5, 419), (middle, 425), (middle + 5, 419))
    drawing.text(middle, 447, "clip, step: one update, the same for every cut", "text strong", "middle")
    return drawing.svg()


if __name__ == "__main__":
    path = Path(__file__).parent / "images" / "window.svg"
    path.parent.mkdir(exist_ok=True)
    path.write_text(draw(), encoding="utf-8")
