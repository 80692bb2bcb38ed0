"""Checks and preparations before the ranks of a job start: GPUs, the address of the first node, a port there."""

import ipaddress
import socket
from collections.abc import Mapping
from pathlib import Path

from pipeline.slurm.commands import gpus_of, host_names, name_of, node_address, properties

ON_CPU = "SELECTIVE_MTP_ON_CPU"
"""Environment variable that allows a job without GPUs on nodes that have some."""

_OF_ANOTHER_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "SRUN_CPUS_PER_TASK")
"""Variables that a job has of another launcher, within which it was submitted; each task would take itself for that rank. So it
is with all of `_TORCHRUN`, by which no rank would be the one that the others meet at."""
_TORCHRUN = "TORCHELASTIC_"

_CONTRADICTING = ("SLURM_NTASKS_PER_GPU", "SLURM_GRES", "SLURM_STEP_GRES", "SLURM_CONSTRAINT")
"""Variables that srun takes for options, and that are never its own here: tasks are counted a node, and the others are about an
allocation, which is there."""

_READ_BY_SRUN = {
    "SLURM_GPUS": "TresPerJob",
    "SLURM_GPUS_PER_NODE": "TresPerNode",
    "SLURM_GPUS_PER_TASK": "TresPerTask",
    "SLURM_GPUS_PER_SOCKET": "TresPerSocket",
    "SLURM_CPUS_PER_GPU": "CpusPerTres",
    "SLURM_TRES_PER_TASK": "TresPerTask",
    "SLURM_MEM_PER_CPU": "MinMemoryCPU",
    "SLURM_MEM_PER_NODE": "MinMemoryNode",
    "SLURM_MEM_PER_GPU": "MemPerTres",
    "SLURM_THREADS_PER_CORE": "ReqB:S:C:T",
}
"""Variables that srun takes for options, and the property that a job has if it was submitted with such an option: the last one
has a number at its end then, and else an asterisk."""
_FIRST_PORT, _PORTS = 20000, 10000
_FIRST_EPHEMERAL = 32768
_EPHEMERAL_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")


class StartError(Exception):
    """The job cannot start; the message says what to do."""


def check_gpus(environment: Mapping[str, str]) -> str | None:
    """See that a job on nodes with GPUs uses them; returns a warning where some are left idle.

    Raises:
        StartError: the nodes have GPUs, and the job asked for none.
    """
    nodes = environment["SLURM_JOB_NODELIST"]
    allocated = environment.get("SLURM_GPUS_ON_NODE") or environment.get("SLURM_JOB_GPUS")
    if not allocated:
        gpus = None if environment.get(ON_CPU) else gpus_of(nodes)
        if gpus is None:
            return None
        count = gpus.partition("(")[0].rpartition(":")[2]
        number = count if count.isdecimal() else "N"
        raise StartError(
            f"the nodes {nodes} have GPUs ({gpus}) and this job asked for none, so it would train in float32 on CPU cores; add "
            f"--gpus-per-node={number} --ntasks-per-node={number} to sbatch's options (a rank a GPU), or to train on CPU cores "
            f"all the same --export=ALL,{ON_CPU}=1"
        )
    tasks = environment.get("SLURM_TASKS_PER_NODE", "").partition(",")[0].partition("(")[0]
    if allocated.isdecimal() and tasks.isdecimal() and int(tasks) < int(allocated):
        return (
            f"each node has {allocated} GPUs for this job and {tasks} task(s): a rank uses one GPU, so the others stay idle; "
            f"--ntasks-per-node={allocated} uses them all"
        )
    return None


def meeting_address(nodes: str, given: str | None = None) -> str:
    """The address at which all ranks meet: MASTER_ADDR if it is set, else the first node's name, or where nothing knows that
    name, the address by which Slurm reaches the node.

    Raises:
        StartError: it cannot be looked up, or each node would take it for itself; ranks would try for ever.
    """
    if given is not None:
        return _checked(given, host_names(nodes))
    name = host_names(nodes)[0]
    if _is_known(name):
        return name
    address = node_address(name)
    if address and _is_known(address):
        return address
    raise StartError(
        f"the name of the first node, {name}, cannot be looked up on {socket.gethostname()}, nor can its NodeAddr "
        f"({address or 'none'}); have the cluster's names resolve (DNS or /etc/hosts), or set MASTER_ADDR in launch/site.sh"
    )


def _checked(address: str, nodes: list[str]) -> str:
    """Return the MASTER_ADDR that was given, such as one that the shell still had from a job on one machine."""
    remedy = f"unset it, so that the ranks meet on {nodes[0]}, or set another one in launch/site.sh"
    if not _is_known(address):
        raise StartError(f"MASTER_ADDR={address} cannot be looked up on {socket.gethostname()}; {remedy}")
    if len(nodes) > 1 and all(ipaddress.ip_address(each).is_loopback for each in _addresses(address)):
        raise StartError(f"MASTER_ADDR={address} is each machine's own, and the job has {len(nodes)} nodes; {remedy}")
    # This runs on the first node, whose rank is the one that the others meet at.
    if not any(_is_own(each) for each in _addresses(address)):
        raise StartError(f"MASTER_ADDR={address} is no address of the first node, {nodes[0]}; {remedy}")
    return address


def meeting_port(job: str, taken: Mapping[str, str]) -> int:
    """A port that is free on this machine, the first node of the job: MASTER_PORT if it is set, else one of a range of its own.

    Linux gives ports of its ephemeral range to any connection, so the range lies below that. Jobs that share a node begin
    their search at different ports.

    Raises:
        StartError: MASTER_PORT is in use, or no port is free.
    """
    given = taken.get("MASTER_PORT")
    if given is not None:
        if not (given.isdecimal() and _is_free(int(given))):
            raise StartError(f"MASTER_PORT={given} is in use on {socket.gethostname()}; unset it, or choose another one")
        return int(given)

    first, count = _port_range()
    begin = int(job) if job.isdecimal() else 0
    for offset in range(count):
        port = first + (begin + offset) % count
        if _is_free(port):
            return port
    raise StartError(f"no port from {first} to {first + count - 1} is free on {socket.gethostname()}; set MASTER_PORT")


def _port_range() -> tuple[int, int]:
    try:
        lowest = int(_EPHEMERAL_RANGE.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        lowest = _FIRST_EPHEMERAL
    # A site that begins the ephemeral range far down leaves little, and port numbers below 1024 are the system's.
    first = _FIRST_PORT if lowest >= _FIRST_PORT + 100 else max(1024, lowest - _PORTS)
    return first, max(1, min(_PORTS, lowest - first))


def _is_known(name: str) -> bool:
    return bool(_addresses(name))


def _addresses(name: str) -> set[str]:
    """The addresses that this machine has for a name; none if it cannot be looked up."""
    try:
        return {str(address[0]).partition("%")[0] for *_, address in socket.getaddrinfo(name, None)}
    except OSError:
        return set()


def _is_own(address: str) -> bool:
    """True if this machine has the address."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as tried:
            tried.bind((address, 0))
    except OSError:
        return False
    return True


def _is_free(port: int) -> bool:
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server.bind(("", port))
        except (OSError, OverflowError):
            return False
    return True


def add_to_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of the ranks: where they meet, and what srun does not pass on by itself.

    Raises:
        StartError: they could not meet.
    """
    left_out = {*_OF_ANOTHER_LAUNCHER, *_CONTRADICTING, *_of_another_job(environment)}
    left_out |= {name for name in environment if name.startswith(_TORCHRUN)}
    added = {name: value for name, value in environment.items() if name not in left_out}
    added["MASTER_ADDR"] = meeting_address(environment["SLURM_JOB_NODELIST"], environment.get("MASTER_ADDR"))
    added["MASTER_PORT"] = str(meeting_port(environment["SLURM_JOB_ID"], environment))
    added["PYTHONUNBUFFERED"] = "1"
    return added


def _of_another_job(environment: Mapping[str, str]) -> list[str]:
    """Name the variables of the job within which this one was submitted. sbatch passes them on, and replaces only those of its
    own options: srun would ask for GPUs or memory that this job does not have, and start nothing."""
    inherited = [name for name in _READ_BY_SRUN if name in environment]
    found = properties(name_of(environment)) if inherited else {}
    return [name for name in inherited if found.get(_READ_BY_SRUN[name], "*").endswith("*")]
