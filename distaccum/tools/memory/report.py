"""The memory of a rank, as tables, in words and as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field

from rich.console import Console
from rich.table import Table
from rich.text import Text

from distaccum.observers.formatting import byte_size
from distaccum.tools.bench.terminal import table_of
from distaccum.tools.memory.lines import PeakLine
from distaccum.tools.memory.measuring import Footprint


@dataclass(frozen=True, slots=True)
class Row:
    """The memory under one setting.

    Attributes:
        setting: the setting in words.
        overrides: those that turn the configured setting into this one.
        micro_batch: samples of a micro-batch.
        accumulate: under FSDP, where it adds up gradients; None where parameters stay gathered.
    """

    setting: str
    overrides: str
    world_size: int
    accumulation_steps: int
    micro_batch: int
    footprint: Footprint
    accumulate: str | None = None

    @property
    def line(self) -> PeakLine:
        return PeakLine(self.footprint.peak)

    @property
    def peak(self) -> int:
        return self.line.at(self.micro_batch)

    @property
    def activations(self) -> int:
        return PeakLine(self.footprint.activations).at(self.micro_batch)

    @property
    def rest(self) -> int:
        """Bytes between two windows, gradients included."""
        found = self.footprint
        return found.parameters + found.buffers + found.gradients + found.optimizer + found.averages + found.other

    @property
    def moment(self) -> str:
        """The moment of the peak, at the nearest measured size."""
        nearest = min(self.footprint.peaks, key=lambda size: abs(size - self.micro_batch))
        moments = self.footprint.peaks[nearest]
        return max(moments, key=moments.__getitem__)


@dataclass(slots=True)
class Report:
    """All rows, the configured setting first."""

    model: str
    device: str
    precision: str
    limit: int
    usable: int
    share: int
    rows: list[Row]
    left_out: list[str] = field(default_factory=list)
    """Settings that could not be measured, with the reasons."""
    can_install_8bit: bool = False
    """Whether the 8-bit optimizer was left out because its package isn't installed."""

    @property
    def configured(self) -> Row:
        return self.rows[0]

    @property
    def fits(self) -> bool:
        return self.configured.peak <= self.usable

    def largest(self, row: Row) -> int:
        """Returns the largest micro-batch that fits, up to a rank's whole share of a window."""
        return row.line.largest(self.usable, max(1, self._share(row)))

    def _share(self, row: Row) -> int:
        return -(-self.share * self.configured.world_size // row.world_size)

    def words(self) -> list[str]:
        """Returns the conclusions, the most important first."""
        row = self.configured
        most, share = self.largest(row), self._share(row)
        peak, usable = byte_size(row.peak), byte_size(self.usable)
        said = []
        if self.fits:
            said.append(f"It fits: {peak} of {usable} at the peak, which is in the {row.moment}.")
        else:
            said.append(f"It does not fit: {peak} at the peak, in the {row.moment}, and {usable} are usable.")
        if most >= share:
            said.append(f"A rank's whole share of a window, {share} samples, fits into one micro-batch.")
        elif most:
            steps = -(-share // most)
            said.append(
                f"The largest micro-batch that fits is {most}: batch.micro_batch_size={most}, with {steps} micro-steps "
                "a window. The update stays the same."
            )
        else:
            said.append("Not even a micro-batch of one sample fits.")
        if (row.micro_batch > most) and (fitting := [other for other in self.rows[1:] if other.peak <= self.usable]):
            best = min(fitting, key=lambda other: (other.world_size > row.world_size, other.peak))
            said.append(
                f"With micro-batches of {best.micro_batch}, this fits: {best.overrides} ({byte_size(best.peak)})."
            )
        said.append(self._what_first())
        said += self._flavours()
        if self.left_out:
            said.append(f"Not measured: {'; '.join(self.left_out)}.")
        if self.can_install_8bit:
            said.append('8-bit AdamW (optim=adamw8bit) was not measured: pip install "distaccum[adam8bit]" for that.')
        return said

    def _what_first(self) -> str:
        """Names the change that saves most."""
        row = self.configured
        savings = [(row.peak - other.peak, other) for other in self.rows[1:]]
        saved, best = max(savings, key=lambda entry: entry[0], default=(0, row))
        if saved <= 0:
            return "None of the other settings measured needs less."
        return (
            f"To save memory, change first: {best.overrides}, which saves {byte_size(saved)} "
            f"({100 * saved / row.peak:.0f} % of the peak)."
        )

    def _flavours(self) -> list[str]:
        """Says where FSDP should add up gradients; nothing where fewer than two ways were measured."""
        rows = {row.accumulate: row for row in reversed(self.rows) if row.accumulate is not None}
        if len(rows) < 2:
            return []
        peaks = ", ".join(f"{way} {byte_size(rows[way].peak)}" for way in ("whole", "sharded", "node") if way in rows)
        reasons = {
            "whole": "which fits and sends least",
            "sharded": "as whole gradients do not fit",
            "node": "as the others do not fit",
        }
        fitting = [way for way in reasons if way in rows and rows[way].peak <= self.usable]
        text = f"Peaks under fsdp by strategy.accumulate: {peaks}."
        if not fitting:
            return [f"{text} None fits."]
        text += f" Take {fitting[0]}, {reasons[fitting[0]]}"
        if "node" in fitting[1:]:
            text += "; over a slow link between nodes take node"
        return [f"{text}."]

    def print(self, console: Console) -> None:
        row = self.configured
        found = row.footprint
        console.print(
            Text(
                f"{self.model} on {self.device}, {self.precision}; rank 0 of {row.world_size}, "
                f"{row.accumulation_steps} micro-steps × {row.micro_batch}"
            )
        )
        parts = Table(box=None, show_header=False, pad_edge=False)
        parts.add_column()
        parts.add_column(justify="right")
        parts.add_column(style="dim")
        per_sample = row.activations / row.micro_batch
        entries = [
            ("parameters", found.parameters, ""),
            ("buffers", found.buffers, ""),
            ("gradients", found.gradients, ""),
            ("optimizer", found.optimizer, ""),
            ("averages", found.averages, "of the weights"),
            ("buckets and others", found.other, ""),
            ("activations", row.activations, f"{byte_size(round(per_sample))} per sample"),
            ("temporary", max(0, row.peak - row.rest - row.activations), f"at the peak, in the {row.moment}"),
            ("peak", row.peak, f"of {byte_size(self.limit)}"),
        ]
        for name, size, note in entries:
            if size:
                parts.add_row(name, byte_size(size), note)
        console.print(parts)
        if len(self.rows) > 1:
            console.print(self._table())
        for sentence in self.words():
            console.print(Text(sentence))

    def _table(self) -> Table:
        table = table_of("setting", "batch", "rest", "activ.", "peak", "largest")
        for row in self.rows:
            table.add_row(
                Text(row.setting),
                str(row.micro_batch),
                byte_size(row.rest),
                byte_size(row.activations),
                Text(byte_size(row.peak), style="" if row.peak <= self.usable else "red"),
                str(self.largest(row)),
            )
        return table

    def as_json(self) -> str:
        rows = []
        for row in self.rows:
            derived = {
                "peak": row.peak,
                "moment": row.moment,
                "activation_bytes_per_sample": row.activations / row.micro_batch,
                "largest_micro_batch": self.largest(row),
            }
            plain = asdict(row)
            footprint = plain.pop("footprint")
            rows.append(plain | derived | footprint)
        head = {key: getattr(self, key) for key in ("model", "device", "precision", "limit", "usable", "fits")}
        return json.dumps({**head, "words": self.words(), "rows": rows}, indent=2)
