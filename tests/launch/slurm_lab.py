"""A real SLURM on this machine: a controller and two emulated nodes on loopback, in a folder and on ports of its own.

The nodes are named by loopback addresses, 127.0.0.2 and up, so that their names resolve from everywhere, as those of a
cluster's nodes do. They believe to have more CPUs than there are.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

NODES = ("127.0.0.2", "127.0.0.3")
CPUS = 4
"""CPUs that each node believes to have."""

_DAEMONS = ("munged", "slurmctld", "slurmd")
_ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"}

_CONFIGURATION = """\
ClusterName=lab
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,sched_min_interval=0,bf_interval=1,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
KillWait=30
MinJobAge=600
CompleteWait=0
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=30 State=UP PriorityTier=1 GraceTime=20
PartitionName=urgent Nodes=ALL MaxTime=30 State=UP PriorityTier=10 PreemptMode=OFF
"""


def why_not() -> str | None:
    """Why there can be no lab here; None where there can."""
    missing = [name for name in _DAEMONS if shutil.which(name, path=_search_path()) is None]
    if missing:
        return f"SLURM is not installed: there is no {', '.join(missing)} (apt-get install slurm-wlm munge)"
    if os.geteuid() != 0:
        return "a SLURM of one's own has to be started by root"
    return None


@dataclass(frozen=True)
class Job:
    """How a job ended."""

    id: str
    state: str
    exit_code: int
    log: str

    @property
    def last_line(self) -> str:
        return self.log.rstrip("\n").rpartition("\n")[2]


class SlurmLab:
    """Starts the daemons in `folder`; `close` ends them and all jobs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._daemons: list[subprocess.Popen[bytes]] = []
        for name in ("state", "spool", "log"):
            (folder / name).mkdir(parents=True)
        ports = _free_ports(1 + len(NODES))
        nodes = [
            f"NodeName={name} NodeAddr={name} NodeHostname=localhost Port={port} CPUs={CPUS} SocketsPerBoard=1 "
            f"CoresPerSocket={CPUS} ThreadsPerCore=1 RealMemory=4000 State=UNKNOWN"
            for name, port in zip(NODES, ports[1:], strict=True)
        ]
        configuration = _CONFIGURATION.format(folder=folder, controller_port=ports[0], nodes="\n".join(nodes))
        (folder / "slurm.conf").write_text(configuration)
        # What slurmd would do with control groups, which a container may not let it do.
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "munge.key").chmod(0o400)
        self.environment = {
            # No trace of a job that this may itself be running in.
            **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))},
            "PATH": _search_path(),
            "SLURM_CONF": str(folder / "slurm.conf"),
        }
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def submit(self, script: Path, *overrides: str, options: Sequence[str] = (), cwd: Path, **environment: str) -> str:
        """Submits a batch script from the folder `cwd`; returns the job's number. Its log is `cwd/slurm-<job>.out`."""
        return self._run("sbatch", "--parsable", *options, str(script), *overrides, cwd=cwd, **environment).strip()

    def state(self, job: str) -> dict[str, str]:
        """What SLURM knows about a job (or one of an array, `12_0`): JobState, ExitCode, Restarts, …"""
        shown = self._run("scontrol", "show", "job", "--oneliner", job)
        return dict(re.findall(r"(\w+)=(\S*)", shown.splitlines()[0]))

    def wait(self, job: str, timeout: float = 120) -> Job:
        """Waits for a job to end.

        Raises:
            TimeoutError: with what the job has written so far.
        """
        state: dict[str, str] = {}

        def has_ended() -> bool:
            state.update(self.state(job))
            return state["JobState"] in _ENDED

        self.wait_until(has_ended, job, timeout)
        return Job(job, state["JobState"], int(state["ExitCode"].partition(":")[0]), self._log(state))

    def wait_until(self, condition: Callable[[], bool], job: str, timeout: float = 120) -> None:
        """Waits for a condition that a job should bring about.

        Raises:
            AssertionError: the job has ended without it.
            TimeoutError: with what the job has written so far.
        """
        deadline = time.monotonic() + timeout
        while not condition():
            state = self.state(job)
            # A job that has ended may have done so after the condition was looked at.
            assert state["JobState"] not in _ENDED or condition(), f"{state['JobState']}:\n{self._log(state)}"
            if time.monotonic() > deadline:
                raise TimeoutError(f"job {job} is {state['JobState']} after {timeout} s:\n{self._log(state)}")
            time.sleep(0.1)

    def wait_for_requeue(self, job: str, restarts: int) -> None:
        """Waits until a job is back in the queue, for the `restarts`-th time, and lets it start soon.

        SLURM itself would leave it there for two minutes.
        """

        def is_back() -> bool:
            state = self.state(job)
            return state["JobState"] == "PENDING" and state["Restarts"] == str(restarts)

        self.wait_until(is_back, job)
        # A job that starts in the second in which its former self ended is taken for that one: "credential revoked".
        time.sleep(2)
        self._run("scontrol", "update", f"JobId={job}", "StartTime=now")

    def signal_script(self, job: str, signal: str) -> None:
        """Sends a signal to a job's batch script alone, as `#SBATCH --signal=B:…` has it sent."""
        self._run("scancel", "--batch", f"--signal={signal}", job)

    def cancel(self, *jobs: str) -> None:
        self._run("scancel", *jobs)

    def preempt(self, cwd: Path) -> str:
        """Submits a short job that takes all nodes from those that run; returns its number."""
        options = ("--partition=urgent", "--exclusive", f"--nodes={len(NODES)}", "--job-name=urgent")
        return self._run("sbatch", "--parsable", *options, "--wrap=sleep 1", cwd=cwd).strip()

    def close(self) -> None:
        """Ends all jobs, then the daemons, the first one last."""
        if len(self._daemons) == len(_DAEMONS) + len(NODES) - 1:
            self._run("scancel", "--user=root")
            deadline = time.monotonic() + 10
            while self._run("squeue", "--noheader", "--states=running,completing") and time.monotonic() < deadline:
                self._run("scancel", "--user=root", "--full", "--signal=KILL")
                time.sleep(0.2)
        for daemon in reversed(self._daemons):
            daemon.terminate()
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self._daemons.clear()

    def _start(self) -> None:
        munge = [f"--key-file={self.folder}/munge.key", f"--socket={self.folder}/munge.socket"]
        munge += [f"--pid-file={self.folder}/munged.pid", f"--seed-file={self.folder}/munge.seed"]
        # --force: as root, which it would refuse.
        self._daemon("munged", "--foreground", "--force", *munge)
        self._wait_for("munged", lambda: (self.folder / "munge.socket").exists())
        self._daemon("slurmctld", "-D", "-c")
        for name in NODES:
            self._daemon("slurmd", "-D", "-N", name)
        self._wait_for("the nodes", lambda: self._is_every_node_idle())

    def _is_every_node_idle(self) -> bool:
        command = ["sinfo", "--noheader", "--Node", "--partition=main", "--states=idle"]
        found = subprocess.run(command, capture_output=True, text=True, check=False, env=self.environment)
        return len(found.stdout.split("\n")) - 1 == len(NODES)

    def _daemon(self, *command: str) -> None:
        with open(self.folder / "log" / f"{command[0]}-{len(self._daemons)}.out", "wb") as output:
            self._daemons.append(
                subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=self.environment, cwd="/"
                )
            )

    def _wait_for(self, what: str, condition: Callable[[], bool], seconds: float = 30) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline or any(daemon.poll() is not None for daemon in self._daemons):
                logs = "\n".join(f"{path.name}:\n{path.read_text()}" for path in (self.folder / "log").iterdir())
                raise RuntimeError(f"{what} did not come up:\n{logs}")
            time.sleep(0.1)

    def _run(self, *command: str, cwd: Path | None = None, **environment: str) -> str:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, cwd=cwd, env={**self.environment, **environment}
        )
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
        return done.stdout

    def _log(self, state: Mapping[str, str]) -> str:
        path = Path(state["StdOut"])
        return path.read_text(errors="replace") if path.exists() else ""


def _search_path() -> str:
    """Where to look for daemons too, which are not in everybody's PATH."""
    return os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"])


def _free_ports(number: int) -> list[int]:
    sockets = [socket.socket() for _ in range(number)]
    try:
        for one in sockets:
            one.bind(("", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()
