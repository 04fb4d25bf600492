"""Emulates hosts on one machine: network namespaces joined by a link whose rate the kernel limits. Linux, as root."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import common

ADDRESSES = ("10.77.0.1", "10.77.0.2")
INTERFACE = "eth0"


def why_impossible() -> str | None:
    """Returns why this machine can't emulate hosts; None if it can."""
    if not sys.platform.startswith("linux"):
        return "network namespaces are Linux's"
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        return f"{' and '.join(missing)} missing (apt-get install iproute2)"
    try:
        with two_hosts("100mbit"):
            return None
    except subprocess.CalledProcessError as error:
        return f"`{' '.join(error.cmd)}` failed: {error.stderr.strip()}"


@contextmanager
def two_hosts(rate: str) -> Iterator[tuple[str, str]]:
    """Sets up two namespaces with a link between them; yields their names.

    Args:
        rate: of the link in each direction, as `tc` takes it: "100mbit". No delay is added.
    """
    hosts = f"distaccum-{os.getpid()}-0", f"distaccum-{os.getpid()}-1"
    try:
        for host in hosts:
            _run("ip", "netns", "add", host)
        link = ["ip", "link", "add", INTERFACE, "netns", hosts[0], "type", "veth"]
        _run(*link, "peer", "name", INTERFACE, "netns", hosts[1])
        for host, address in zip(hosts, ADDRESSES, strict=True):
            _run("ip", "-n", host, "link", "set", "lo", "up")
            _run("ip", "-n", host, "addr", "add", f"{address}/24", "dev", INTERFACE)
            _run("ip", "-n", host, "link", "set", INTERFACE, "up")
            # Each side limits what it sends. A larger bucket would let small syncs through at no cost.
            shape = ["tbf", "rate", rate, "burst", "64kb", "latency", "400ms"]
            _run("tc", "-n", host, "qdisc", "add", "dev", INTERFACE, "root", *shape)
        yield hosts
    finally:
        for host in hosts:
            with suppress(subprocess.CalledProcessError):
                _run("ip", "netns", "del", host)


def on_hosts(hosts: tuple[str, str], script: str, *words: str, ranks_of_host: int = 1) -> Iterator[common.Row]:
    """Runs `script rank WORDS…` on each host; returns the rows that rank 0 sends.

    Args:
        ranks_of_host: if there are several, the script is the first of them and starts the others, by
            `as_ranks_of_host`.

    Raises:
        SystemExit: a rank failed.
    """
    everywhere = {
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": str(ranks_of_host),
        "WORLD_SIZE": str(len(hosts) * ranks_of_host),
        "MASTER_ADDR": ADDRESSES[0],
        "MASTER_PORT": "29500",
        "GLOO_SOCKET_IFNAME": INTERFACE,
    }
    commands = []
    for number, host in enumerate(hosts):
        own = {**everywhere, "RANK": str(number * ranks_of_host)}
        environment = (f"{name}={value}" for name, value in own.items())
        commands.append(["ip", "netns", "exec", host, "env", *environment, sys.executable, script, "rank", *words])
    yield from common.rows_of(*commands)


def as_ranks_of_host(run: Callable[[], None]) -> None:
    """Runs a function on all ranks of this host: in this process, and in copies of it, which import nothing again.

    Raises:
        SystemExit: it failed in a copy.
    """
    first = int(os.environ["RANK"])
    copies = [
        multiprocessing.get_context("fork").Process(target=_as_rank, args=(run, first + local, local))
        for local in range(1, int(os.environ["LOCAL_WORLD_SIZE"]))
    ]
    for copy in copies:
        copy.start()
    run()
    for copy in copies:
        copy.join()
        if copy.exitcode:
            raise SystemExit(f"exit status {copy.exitcode} of another rank of the host")


def _as_rank(run: Callable[[], None], rank: int, local: int) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(local))
    run()


def bytes_sent() -> int:
    """Returns the bytes that this host has sent to others, headers and acknowledgements included."""
    return int(Path(f"/sys/class/net/{INTERFACE}/statistics/tx_bytes").read_text())


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)
