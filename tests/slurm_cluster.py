"""A real SLURM of one node, for tests: all its files below one folder, all its ports on the loopback device.

Needs Debian's packages slurmctld, slurmd, slurm-client and munge, and root (slurmd starts jobs as their users).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
from pathlib import Path

from train_stub import wait_for

DAEMONS = ("munged", "slurmctld", "slurmd")
CONFIGURATION = """
ClusterName=nnunet_l2g_test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# a requeued job starts only after its old credential has expired: by default after two minutes
AuthInfo=socket={folder}/munge.socket,cred_expire=10
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
KillWait=5
JobRequeue=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
GresTypes=gpu
NodeName=localhost NodeAddr=127.0.0.1 CPUs=2 RealMemory=1000 Gres=gpu:2 State=UNKNOWN
PartitionName=low Nodes=localhost Default=YES MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=high Nodes=localhost MaxTime=INFINITE State=UP PriorityTier=2
"""
GPUS = "NodeName=localhost Name=gpu File=/dev/zero\nNodeName=localhost Name=gpu File=/dev/full\n"  # to be given out, not used


def why_not() -> str | None:
    """Why no cluster can be started here, or None."""
    missing = [name for name in (*DAEMONS, "sbatch", "srun", "squeue") if shutil.which(name, path=search_path()) is None]
    if missing:
        return f"no {', '.join(missing)} (Debian: apt-get install slurmctld slurmd slurm-client munge)"
    return None if os.geteuid() == 0 else "needs root: slurmd starts jobs as their users"


def search_path() -> str:
    return os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


class Cluster:
    """Runs inside `with`. Partitions: low (default), and high, which preempts it. SLURM_CONF=`conf` leads clients to it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.conf = str(folder / "slurm.conf")
        self.daemons: list[subprocess.Popen] = []

    def __enter__(self) -> Cluster:
        for name in ("state", "spool"):
            (self.folder / name).mkdir(parents=True)
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(64))
        key.chmod(0o600)
        Path(self.conf).write_text(CONFIGURATION.format(folder=self.folder, ports=free_ports(2)))
        (self.folder / "gres.conf").write_text(GPUS)
        try:
            files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
            options = [f"--{option}={self.folder}/munge.{ending}" for option, ending in files.items()]
            self._start("munged", "--foreground", "--force", *options)
            wait_for((self.folder / "munge.socket").exists, 30)
            self._start("slurmctld", "-D", "-f", self.conf)
            self._start("slurmd", "-D", "-f", self.conf, "-N", "localhost")
            wait_for(lambda: "idle" in self.run("sinfo", "--noheader", check=False), 30)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        with contextlib.suppress(subprocess.SubprocessError):  # jobs first: slurmd leaves them running
            self.run("scancel", "--user=root", "--signal=KILL", check=False)
            self.run("scancel", "--user=root", check=False)
            wait_for(lambda: not self.run("squeue", "--noheader", check=False).strip(), 30)
        for daemon in reversed(self.daemons):
            daemon.terminate()
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def run(self, *command: str, check: bool = True) -> str:
        """Output of one of SLURM's commands."""
        options = {"env": os.environ | {"SLURM_CONF": self.conf}, "stdout": subprocess.PIPE, "text": True, "timeout": 60}
        return subprocess.run(command, check=check, **options).stdout

    def _start(self, name: str, *options: str) -> None:
        with (self.folder / f"{name}.output").open("wb") as output:
            streams = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": output, "start_new_session": True}
            argv = [shutil.which(name, path=search_path()), *options]
            self.daemons.append(subprocess.Popen(argv, env=os.environ | {"SLURM_CONF": self.conf}, **streams))


def free_ports(count: int) -> list[int]:
    """Ports nobody listens on at this moment."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
