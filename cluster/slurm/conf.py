"""The configuration of a throwaway SLURM: several nodes on one machine, without root, inside one directory.

Debian's build allows one slurmd a host name; nodes that are named by loopback addresses (127.0.0.11 and so on) have
distinct ones, and jobs can use a node's name as an address. Devices are character devices that exist everywhere.
"""

import getpass
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Shape:
    """How many nodes, and what each has."""

    nodes: int = 2
    cpus: int = 8
    gpus: int = 4
    grace_s: int = 15  # what a preempted job has to save

    @property
    def names(self) -> list[str]:
        return [f"127.0.0.{11 + number}" for number in range(self.nodes)]


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on at this moment."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("", 0))
        return [one.getsockname()[1] for one in sockets]


def slurm_conf(root: Path, shape: Shape, ports: list[int]) -> str:
    """slurm.conf; `ports` are of slurmctld and of each node."""
    gres = f" Gres=gpu:{shape.gpus}" if shape.gpus else ""
    nodes = "".join(
        f"NodeName={name} NodeAddr={name} Port={port} CPUs={shape.cpus} RealMemory=4096 State=UNKNOWN{gres}\n"
        for name, port in zip(shape.names, ports[1:], strict=True)
    )
    return f"{_settings(root, ports[0])}{nodes}{_partitions(shape)}"


def _settings(root: Path, port: int) -> str:
    user = getpass.getuser()
    return f"""\
ClusterName=local
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# cred_expire is how long a job that was put back waits; 5 s is the least that is taken
AuthInfo=socket={root}/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool-%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MailProg=/bin/true
GresTypes=gpu
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=0
# or nodes with more CPUs than the machine has are refused
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
EnforcePartLimits=ALL
ReturnToService=1
SlurmctldTimeout=10
SlurmdTimeout=6
InactiveLimit=0
KillWait=5
MinJobAge=3600
"""


def _partitions(shape: Shape) -> str:
    every = "Nodes=ALL State=UP MaxTime=1:00:00 DefaultTime=10"
    return (
        f"PartitionName=main Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime={shape.grace_s} {every}\n"
        f"PartitionName=high PriorityTier=10 PreemptMode=OFF {every}\n"
    )


def gres_conf(shape: Shape) -> str:
    """gres.conf: each device must be another string that names a character device."""
    return "".join(f"Name=gpu File={path}\n" for path in _devices(shape.gpus))


def _devices(count: int) -> Iterator[str]:
    for number in range(count):
        yield "/dev/" + "./" * number + "null"
