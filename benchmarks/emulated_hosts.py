"""Emulates hosts on one machine: network namespaces joined by a link whose rate the kernel limits. Linux, as root."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
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


def on_hosts(hosts: tuple[str, str], script: str, *words: str) -> Iterator[common.Row]:
    """Runs `script rank WORDS…` on each host, as the two ranks of a world; returns the rows that rank 0 sends.

    Raises:
        SystemExit: a rank failed.
    """
    everywhere = {
        "LOCAL_RANK": "0",
        "WORLD_SIZE": str(len(hosts)),
        "MASTER_ADDR": ADDRESSES[0],
        "MASTER_PORT": "29500",
        "GLOO_SOCKET_IFNAME": INTERFACE,
    }
    commands = []
    for rank, host in enumerate(hosts):
        environment = (f"{name}={value}" for name, value in {**everywhere, "RANK": str(rank)}.items())
        commands.append(["ip", "netns", "exec", host, "env", *environment, sys.executable, script, "rank", *words])
    yield from common.rows_of(*commands)


def bytes_sent() -> int:
    """Returns the bytes that this host has sent, headers and acknowledgements included."""
    return int(Path(f"/sys/class/net/{INTERFACE}/statistics/tx_bytes").read_text())


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)
