"""The search: one setting after the other; each candidate and the best so far are timed in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

from distaccum.config import ByLengthBatchConfig, DDPConfig, FSDPConfig, TrainConfig
from distaccum.config.enums import Accumulate, Compression
from distaccum.config.tools import TuneConfig
from distaccum.errors import UserError
from distaccum.tools.bench.sessions import PlacementFailedError, Session
from distaccum.tools.tune import settings as keys
from distaccum.tools.tune.contenders import Contender, Verdict, spread_of, verdict_of
from distaccum.tools.tune.report import Confirmation, TuneRow
from distaccum.tools.tune.settings import (
    TuneSetting,
    applied,
    merged,
    micro_batch_of,
    overrides_of,
    value_in,
    with_micro_batch,
)

_HOPELESS = 1.25
"""A candidate whose first turn takes longer than the best's by this factor gets no second one."""
_DATA_SHARE = 0.03
"""Loader workers are tried where the best waits for data for at least this fraction of its time."""
_BUCKETS_MIB = (1.0, 5.0, 25.0, 100.0)
_WORKERS = (1, 2, 4)


class Search:
    """Finds the fastest setting.

    Args:
        base: the training as it is configured, on `world_size` ranks.
        start: starts the processes of a configuration; the string names their log.
        tell: called with the current step, and with each finished row.

    Attributes:
        rows: what was tried, in order; the first is the configuration as it is.
        not_tried: candidates that the time was too short for.
    """

    def __init__(
        self,
        config: TuneConfig,
        base: TrainConfig,
        world_size: int,
        start: Callable[[TrainConfig, str], Session],
        tell: Callable[[str, TuneRow | None], None],
    ) -> None:
        self.section = config.tune
        self.base = base
        self.world_size = world_size
        self.rows: list[TuneRow] = []
        self.not_tried: list[str] = []
        self._start = start
        self._tell = tell
        self._deadline = 0.0
        self._ran_out_of_memory = False
        self._is_on_gpu = False
        self._lengths_differ = False
        self.gradient_bytes = 0
        self.default = self._contender("as configured", {})
        self.best = self.default

    def run(self) -> None:
        """Tries all settings, those that others depend on first.

        Raises:
            UserError: the configuration as it is can't be trained.
        """
        self._begin()
        self._deadline = time.monotonic() + 60 * self.section.minutes
        self._micro_batch()
        if self._cut():
            self._micro_batch()
        self._accumulate()
        self._checkpointing()
        self._buckets()
        self._workers()
        self._compressions()

    @property
    def best_config(self) -> TrainConfig:
        """The training with the best setting so far."""
        return applied(self.base, self.best.setting)

    def close(self) -> None:
        for contender in (self.default, self.best):
            contender.stop()

    # The settings to try

    def _begin(self) -> None:
        self._tell("starting · as configured", None)
        row = TuneRow(knob="default", title="as configured", overrides=[])
        try:
            self.default.prepare(None)
            facts = self.default.ask("facts")[0]
            updates = self.default.updates_for(self.section.round_seconds)
            for turn in range(self.section.rounds):
                self._tell(f"turn {turn + 1} · as configured", None)
                self.default.time(updates)
        except PlacementFailedError as failure:
            raise UserError(
                f"the configuration can't be trained here as it is, so it can't be tuned: {failure}"
            ) from failure
        self._is_on_gpu = self.default.prepared["device"] != "CPU"
        self._lengths_differ = bool(facts["lengths_differ"])
        self.gradient_bytes = int(facts["gradient_bytes"])
        row.samples_per_second = self.default.samples_per_second
        row.memory = self.default.memory
        self._add(row)

    def _micro_batch(self) -> None:
        """Doubles as long as that helps; halves if it didn't at all."""
        start = micro_batch_of(self.best_config, self.world_size)
        share = -(-(self.base.batch.global_batch_size or 0) // self.world_size)
        is_larger_better = self._climb(self._larger(start, share))
        if not is_larger_better:
            self._climb(iter([size for size in (start // 2, start // 4) if size >= 1]))

    @staticmethod
    def _larger(start: int, share: int) -> Iterator[int]:
        size = start
        while size < share:
            size = min(2 * size, share)
            yield size

    def _climb(self, sizes: Iterator[int]) -> bool:
        """Tries one size after the other; stops at a loss, a failure, or the second one that makes no difference."""
        alike, has_won = 0, False
        for size in sizes:
            verdict = self._try("micro-batch", f"micro-batch {size}", with_micro_batch(self.best_config, size))
            has_won = has_won or verdict is Verdict.faster
            alike = alike + 1 if verdict is Verdict.alike else 0
            if verdict in (Verdict.slower, None) or alike == 2:
                break
        return has_won

    def _cut(self) -> bool:
        is_by_length = isinstance(self.base.batch, ByLengthBatchConfig)
        if not is_by_length and not self._lengths_differ:
            return False
        other = keys.UNIFORM if is_by_length else keys.BY_LENGTH
        setting: dict[str, Any] = {keys.CUT: other}
        if not is_by_length:
            # By length the number of micro-steps follows, so the micro-batch has to be said.
            config = self.best_config
            setting |= with_micro_batch(config, micro_batch_of(config, self.world_size))
        return self._try("cut", f"cut {other}", setting) is Verdict.faster

    def _accumulate(self) -> None:
        """Under FSDP, tries whole gradients, which send less; and shards, if a larger micro-batch had no room."""
        strategy = self.base.strategy
        if not isinstance(strategy, FSDPConfig) or self.world_size == 1:
            return
        if strategy.accumulate is not Accumulate.whole:
            self._try("accumulate", "whole gradients", {keys.ACCUMULATE: Accumulate.whole})
        elif self._ran_out_of_memory:
            # All ranks are on this host: unless fewer share parameters, it is one node.
            shards = Accumulate.sharded if strategy.shard_size is None else Accumulate.node
            size = 2 * micro_batch_of(self.best_config, self.world_size)
            setting = {**with_micro_batch(self.best_config, size), keys.ACCUMULATE: shards}
            title = f"gradients in shards, micro-batch {size}"
            if self._try("accumulate", title, setting) is Verdict.faster:
                self._micro_batch()

    def _checkpointing(self) -> None:
        """Tries checkpointing where a larger micro-batch had no room; elsewhere it can't be faster."""
        name = keys.CHECKPOINTING.partition(".")[2]
        if not self._ran_out_of_memory or value_in(self.base.model, name) is not False:
            return
        size = 2 * micro_batch_of(self.best_config, self.world_size)
        setting = {**with_micro_batch(self.best_config, size), keys.CHECKPOINTING: True}
        if self._try("checkpointing", f"activation checkpointing, micro-batch {size}", setting) is Verdict.faster:
            self._micro_batch()

    def _buckets(self) -> None:
        strategy = self.base.strategy
        if not isinstance(strategy, DDPConfig) or self.world_size == 1:
            return
        gradients = self.gradient_bytes / 2**20
        for size in _BUCKETS_MIB:
            # Above what there is to send, all sizes are one bucket.
            is_same = size == strategy.bucket_cap_mb or min(size, strategy.bucket_cap_mb) >= gradients
            if not is_same:
                self._try("bucket", f"buckets of {size:g} MiB", {keys.BUCKET: size})

    def _workers(self) -> None:
        given = self.base.data.num_workers
        if self.best.data_share < _DATA_SHARE or not isinstance(given, int):
            return
        for count in _WORKERS:
            if count > given and self._try(
                "workers", f"{count} loader worker{'s' if count > 1 else ''}", {keys.WORKERS: count}
            ) in (Verdict.slower, None):
                break

    def _compressions(self) -> None:
        if not isinstance(self.base.strategy, DDPConfig) or self.world_size == 1:
            return
        for compression in self.section.compressions:
            setting: dict[str, Any] = {keys.COMPRESSION: compression}
            if compression is Compression.powersgd:
                setting["strategy.powersgd_start_update"] = 2
            self._try("compression", f"compression {compression.name}", setting, is_inexact=True)

    # One candidate

    def _try(self, knob: str, title: str, changes: TuneSetting, *, is_inexact: bool = False) -> Verdict | None:
        """Times a candidate turn by turn with the best; takes it if it is faster. None: it can't run, or time is up."""
        if time.monotonic() > self._deadline:
            self.not_tried.append(title)
            return None
        setting = merged(self.best.setting, changes)
        contender = self._contender(title, setting)
        row = TuneRow(knob=knob, title=title, overrides=overrides_of(setting), is_inexact=is_inexact)
        verdict = None
        try:
            ratios = self._ratios(contender)
            verdict = verdict_of(ratios, self.section.min_gain)
            row.ratio, row.low_ratio, row.high_ratio = spread_of(ratios)
            row.samples_per_second, row.memory = contender.samples_per_second, contender.memory
            row.verdict = verdict.value
            row.is_taken = verdict is Verdict.faster and (not is_inexact or self.section.accept_inexact)
        except PlacementFailedError as failure:
            self._ran_out_of_memory = self._ran_out_of_memory or failure.kind == "memory"
            row.verdict = str(failure)
        finally:
            if not row.is_taken:
                contender.stop()
        if row.is_taken:
            self.best.stop()
            self.best = contender
        self._add(row)
        return verdict

    def _ratios(self, contender: Contender) -> list[float]:
        """Returns the times of a candidate divided by those of the best, turn by turn."""
        best = self.best
        limit = self.section.memory_gb
        if self._is_on_gpu:
            best.stop()  # the candidate needs its memory
        self._tell(f"starting · {contender.title}", None)
        contender.prepare(limit * 2**30 if limit is not None else None)
        updates = best.updates_for(self.section.round_seconds)
        ratios: list[float] = []
        for turn in range(self.section.rounds):
            self._tell(f"turn {turn + 1} · {contender.title}", None)
            against = best.rounds[turn % len(best.rounds)].seconds if self._is_on_gpu else best.time(updates)
            ratios.append(contender.time(updates) / against)
            if ratios[0] > _HOPELESS:
                break
        return ratios

    def confirm(self) -> Confirmation | None:
        """Times the best and the default in turns once more; the default becomes the best again if it is no slower.

        Returns:
            None if there is nothing to confirm.
        """
        if self.best is self.default:
            return None
        turns = self.section.confirm_rounds
        updates = self.best.updates_for(self.section.round_seconds)
        if self._is_on_gpu:
            self.best.stop()  # the default needs its memory
        for turn in range(turns):
            self._tell(f"confirming · turn {turn + 1}", None)
            # Who is first in one turn is second in the next.
            for contender in (self.default, self.best) if turn % 2 == 0 else (self.best, self.default):
                contender.time(updates)
                if self._is_on_gpu:
                    contender.stop()
        default, mine = ([one.seconds for one in them.rounds[-turns:]] for them in (self.default, self.best))
        ratios = [new / old for new, old in zip(mine, default, strict=True)]
        ratio, low, high = spread_of(ratios)
        is_faster = verdict_of(ratios, 0.0) is Verdict.faster
        confirmation = Confirmation(
            default_seconds=statistics.median(default),
            seconds=statistics.median(mine),
            ratio=ratio,
            low_ratio=low,
            high_ratio=high,
            is_faster=is_faster,
        )
        if not is_faster:
            self.best.stop()
            self.best = self.default
        return confirmation

    def _contender(self, title: str, setting: TuneSetting) -> Contender:
        name = "_".join(overrides_of(setting)).replace("/", "_") or "default"
        return Contender(title, setting, lambda: self._start(applied(self.base, setting), name))

    def _add(self, row: TuneRow) -> None:
        self.rows.append(row)
        self._tell("", row)
