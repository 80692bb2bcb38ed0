"""A Slurm of three nodes, and one that has GPUs by its word, on this machine: Debian's slurmctld, slurmd and munge, as root."""

import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

NODES = ("n1", "n2", "n3")
GPU_NODE = "g1"
_COMMANDS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol", "squeue", "scancel", "sinfo")
CAN_RUN = os.geteuid() == 0 and all(shutil.which(command) for command in _COMMANDS)

# cred_expire: otherwise a requeued job waits for two minutes.
_CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=bf_interval=2,sched_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
GresTypes=gpu
KillWait=15
{node_lines}
PartitionName=main Nodes={nodes} Default=YES State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes={nodes} State=UP PriorityTier=9 PreemptMode=OFF
PartitionName=gpu Nodes={gpu_node} State=UP
"""


class Cluster:
    """A running cluster. environment: with which Slurm's commands reach it."""

    def __init__(self, folder: Path):
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
        self._folder = folder

    def run(self, *command: str | Path, cwd: Path | None = None) -> str:
        """Run a command of Slurm's; returns what it prints."""
        words = list(map(str, command))
        done = subprocess.run(words, env=self.environment, cwd=cwd, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout

    def submit(self, checkout: Path, log: Path, *arguments: str | Path, **environment: str) -> str:
        """Submit a batch script from a checkout; returns the job's number."""
        given = ["sbatch", "--parsable", f"--output={log}", f"--export={_exported(environment)}", *arguments]
        return self.run(*given, cwd=checkout).strip()

    def property(self, job: str, name: str) -> str:
        """A property of a job, as `scontrol show job` names it."""
        found = re.search(rf"\b{name}=(\S*)", self.run("scontrol", "show", "job", "-o", job))
        assert found is not None, name
        return found[1]

    def wait_for(self, job: str, *states: str, seconds: float = 900) -> str:
        """Wait until a job is in one of these states, or has come to an end; returns its state."""
        ends = time.monotonic() + seconds
        while (state := self.property(job, "JobState")) not in (*states, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"):
            assert time.monotonic() < ends, (state, self.run("scontrol", "show", "job", job))
            time.sleep(0.2)
        return state


def _exported(environment: dict[str, str]) -> str:
    return ",".join(["ALL", *(f"{name}={value}" for name, value in environment.items())])


@contextmanager
def running_cluster(folder: Path) -> Iterator[Cluster]:
    """Start a cluster whose files lie in a folder, and end it after the block."""
    _configure(folder)
    cluster, processes = Cluster(folder), []
    files = ("socket", "key-file", "pid-file", "seed-file", "log-file")
    munge = [f"--{name}={folder}/munge.{name.removesuffix('-file')}" for name in files]
    daemons = [["munged", "--foreground", "--force", *munge], ["slurmctld", "-D"]]
    daemons += [["slurmd", "-D", "-N", name] for name in (*NODES, GPU_NODE)]
    try:
        with (folder / "daemons.log").open("ab") as log:
            for daemon in daemons:
                processes.append(subprocess.Popen(daemon, env=cluster.environment, stdout=log, stderr=log))
                time.sleep(1 if daemon[0] in ("munged", "slurmctld") else 0)
        _wait_until_idle(cluster)
        yield cluster
    finally:
        with suppress(AssertionError, subprocess.TimeoutExpired):
            cluster.run("scancel", "--user=root")
            time.sleep(1)
        for process in reversed(processes):
            process.terminate()
        for process in processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(20)
            process.kill()


def _configure(folder: Path) -> None:
    host, ports = socket.gethostname().partition(".")[0], _free_ports(2 + len(NODES))
    lines = []
    for name, port in zip((*NODES, GPU_NODE), ports[1:], strict=True):
        gpus = " Gres=gpu:a100:2" if name == GPU_NODE else ""
        lines.append(f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=4{gpus}")
        (folder / f"spool-{name}").mkdir()
    text = _CONFIGURATION.format(
        host=host, port=ports[0], folder=folder, node_lines="\n".join(lines), nodes=",".join(NODES), gpu_node=GPU_NODE
    )
    (folder / "slurm.conf").write_text(text)

    # GPUs are files, of which Slurm only wants to see that they are there.
    files = [folder / f"gpu{number}" for number in range(2)]
    (folder / "gres.conf").write_text("".join(f"NodeName={GPU_NODE} Name=gpu Type=a100 File={file}\n" for file in files))
    for file in files:
        file.touch()
    (folder / "state").mkdir()
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o600)


def _wait_until_idle(cluster: Cluster) -> None:
    ends = time.monotonic() + 300
    while True:
        with suppress(AssertionError):
            states = cluster.run("sinfo", "-h", "-N", "-o", "%T").split()
            if states and set(states) == {"idle"}:
                return
        assert time.monotonic() < ends, cluster.run("sinfo", "-N", "-l")
        time.sleep(0.5)


def _free_ports(count: int) -> list[int]:
    servers = [socket.socket() for _ in range(count)]
    for server in servers:
        server.bind(("127.0.0.1", 0))
    ports = [int(server.getsockname()[1]) for server in servers]
    for server in servers:
        server.close()
    return ports
