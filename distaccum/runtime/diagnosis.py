"""Makes one message of the ranks' signs of life: which rank died or hung, and what it was doing."""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path

import torch.distributed as dist

from distaccum.errors import joined

_GLOO = re.compile(r"gloo/transport|Gloo connectFullMesh|Connection (closed|reset) by peer|Timed out waiting \d+ms for")
_MOST_NAMED = 4
AGAIN = "Start again with the same command: a run that has a checkpoint goes on from it."


class State(Enum):
    running = "running"
    failed = "failed"
    """On its way out after an error."""
    left = "left"
    """Gone in good order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sign:
    """The state of one rank, published with each beat."""

    rank: int
    beat: int
    """Grows with each beat; one that stands still is a rank of which nothing is heard."""
    state: State
    doing: str
    """As in "the forward of micro-step 3 of update 7"."""
    waits: bool
    """True in what a rank can't end by itself, because it waits for other ranks there."""
    seconds: float
    """How long it has been doing that."""
    where: str
    """The line of code that its main thread is in, if it has been there for a beat or more; else empty."""
    host: str
    """Where `pid` counts: the same for processes that can see each other."""
    pid: int
    log: str
    """Path of its log, or empty."""

    def to_json(self) -> str:
        return json.dumps({**asdict(self), "state": self.state.value})

    @classmethod
    def from_json(cls, text: str | bytes) -> Sign:
        fields = json.loads(text)
        return cls(**{**fields, "state": State(fields["state"])})


class Fate(Enum):
    """The state of a rank's process as seen from another. The first in order is the likeliest cause of a failure."""

    gone = 0
    stopped = 1
    mute = 2
    """The process is there, but not even its background thread runs."""
    left = 3
    busy = 4
    waiting = 5
    failed = 6


def this_host() -> str:
    """A name that two processes share when one can see the other's process number."""
    try:
        # Containers on one host can have one host name and process numbers of their own.
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{socket.gethostname()} without /proc"


def process_state(sign: Sign) -> Fate | None:
    """`gone` or `stopped` if the rank's process is seen to be; None if it runs, or can't be seen from here."""
    if sign.host != this_host() or not Path("/proc/self/stat").exists():
        return None
    try:
        status = Path(f"/proc/{sign.pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return Fate.gone
    return {"Z": Fate.gone, "X": Fate.gone, "T": Fate.stopped, "t": Fate.stopped}.get(status)


def is_broken_collective(error: BaseException) -> bool:
    """Whether an error, or its cause, is that of a rank that waited for one that died or hung."""
    return any(
        isinstance(cause, dist.DistError) or (isinstance(cause, RuntimeError) and bool(_GLOO.search(str(cause))))
        for cause in _chain(error)
    )


def _chain(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__


def judge(before: Sign | None, after: Sign) -> Fate:
    """Returns the fate of a rank whose process was there, or can't be seen from here.

    Args:
        before: its last sign when the failure was noticed; the same as `after` if no second look was taken.
        after: its last sign two beats later.
    """
    if after.state is State.failed:
        return Fate.failed
    if after.state is State.left:
        return Fate.left
    if before is not None and before is not after and after.beat == before.beat:
        if after.host != this_host():
            return Fate.gone
        # It was there a moment ago: the launcher has ended it meanwhile, as it does when another rank has died.
        return Fate.failed if process_state(after) is Fate.gone else Fate.mute
    return Fate.waiting if after.waits else Fate.busy


def explain(me: Sign, others: Mapping[Fate, Sequence[Sign]], *, timeout_seconds: float, error: BaseException) -> str:
    """One message that names the rank that keeps the others from going on.

    Args:
        me: this rank's own sign; the others have not reached what it is doing.
        others: the other ranks, by their fate.
        timeout_seconds: how long ranks wait for each other.
        error: what the wait ended with.
    """
    timed_out = any(re.search(r"[Tt]imed? ?out", str(cause)) for cause in _chain(error))
    for fate in sorted(others, key=lambda fate: fate.value):
        signs = others[fate]
        if fate is Fate.busy:
            # Where the wait ended early, a rank that is busy has just not noticed yet.
            signs = [sign for sign in signs if timed_out or sign.seconds >= timeout_seconds / 2]
        if signs and fate.value <= Fate.busy.value:
            return _accuse(fate, signs, me, timeout_seconds)
    everyone = sorted([me, *(sign for signs in others.values() for sign in signs)], key=lambda sign: sign.rank)
    if timed_out:
        places = _listed([f"rank {sign.rank} in {sign.doing}" for sign in everyone])
        return (
            f"the ranks waited for each other in vain for {timeout_seconds:g} s: {places}. Either they have come to "
            f"different collectives, or the network between them is stuck.{_logs(everyone)}"
        )
    return (
        f"the connection between the ranks broke in {me.doing}, although all of them are there: {reason_of(error)}. "
        f"That is the network, most likely. {AGAIN}"
    )


def reason_of(error: BaseException) -> str:
    """The first sentence of an error."""
    return " ".join(str(error).split()).partition(". ")[0]


def _accuse(fate: Fate, signs: Sequence[Sign], me: Sign, timeout_seconds: float) -> str:
    ranks = ("rank " if len(signs) == 1 else "ranks ") + _listed([str(sign.rank) for sign in signs])
    is_are, has, it_they, gives = ("is", "has", "it", "gives") if len(signs) == 1 else ("are", "have", "they", "give")
    last_heard = "Last heard of in " + _each([sign.doing for sign in signs], signs) + "."
    match fate:
        case Fate.gone:
            is_here = all(sign.host == me.host for sign in signs)
            why = "killed, perhaps for want of memory" if is_here else "killed, out of memory, or the host is down"
            return f"{ranks} {is_are} gone: {why}. {last_heard} {AGAIN}"
        case Fate.stopped:
            processes = _listed([str(sign.pid) for sign in signs])
            return (
                f"{ranks} {is_are} stopped, by SIGSTOP or by a debugger (process {processes}). {last_heard} End what "
                f"is stopped. {AGAIN}"
            )
        case Fate.mute:
            return (
                f"{ranks} {gives} no sign of life, although the process is there: it "
                f"hangs in a call that keeps all of Python waiting. {last_heard}{_logs(signs)} {AGAIN}"
            )
        case Fate.left:
            return f"{ranks} {has} left before the others. {last_heard} {AGAIN}"
    stays = [
        f"in {sign.doing} for {max(1.0, sign.seconds):.0f} s" + (f", at {sign.where}" if sign.where else "")
        for sign in signs
    ]
    return (
        f"{ranks} {has} not come to {me.doing} within {timeout_seconds:g} s: {it_they} {has} been "
        f"{_each(stays, signs)}.{_logs(signs)} If {it_they} {is_are} only slow, raise distributed.timeout_seconds."
    )


def _logs(signs: Sequence[Sign]) -> str:
    paths = [sign.log for sign in signs if sign.log]
    if not paths:
        return ""
    return f" {'Its stack is' if len(signs) == 1 else 'Their stacks are'} in {_listed(paths)}."


def _each(texts: Sequence[str], signs: Sequence[Sign]) -> str:
    """Joins one text a rank; returns it once if all are the same."""
    if len(set(texts)) == 1:
        return texts[0]
    return _listed([f"{text} (rank {sign.rank})" for text, sign in zip(texts, signs, strict=True)])


def _listed(texts: Sequence[str]) -> str:
    if len(texts) > _MOST_NAMED:
        texts = [*texts[:_MOST_NAMED], f"{len(texts) - _MOST_NAMED} more"]
    return joined(texts)
