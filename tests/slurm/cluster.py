"""A real SLURM of two nodes on this one machine: munged, slurmctld and two slurmd, as root, without systemd.

Everything lives in one temporary folder with ports and sockets of its own, so that it neither needs nor disturbs a
SLURM that the machine may have. Two names are added to /etc/hosts while it runs and taken away again.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

NODES = ("sam-node1", "sam-node2")
HOSTS = Path("/etc/hosts")
MARK = "# sam-repro test cluster"
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol", "squeue", "scancel")
SEARCH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"])

# Four CPUs a node whatever the machine has, and GPUs that are only names: the batch script asks for them. cred_expire
# is how long SLURM waits before a requeued job starts again, 120 s by default.
SLURM_CONF = """
ClusterName=sam-repro-test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=8
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
ReturnToService=2
KillWait=10
MinJobAge=600
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName={one} NodeHostname={host} NodeAddr=127.0.0.1 Port={port_one} CPUs=4 Gres=gpu:4 State=UNKNOWN
NodeName={two} NodeHostname={host} NodeAddr=127.0.0.1 Port={port_two} CPUs=4 Gres=gpu:4 State=UNKNOWN
PartitionName=gpu Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> list[str]:
    """The programs of a SLURM installation that are not there."""
    return [name for name in PROGRAMS if shutil.which(name, path=SEARCH) is None]


class Cluster:
    """The daemons, and the client commands with the environment that leads to them."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.daemons: list[subprocess.Popen[bytes]] = []
        self.env = os.environ | {"PATH": SEARCH, "SLURM_CONF": str(folder / "slurm.conf")}
        # What an enclosing SLURM job says of itself must not reach the jobs of this one.
        for name in [n for n in self.env if n.startswith(("SLURM_", "SBATCH_", "SRUN_")) and n != "SLURM_CONF"]:
            del self.env[name]

    def start(self) -> None:
        """Start everything; returns when both nodes are idle."""
        self.folder.chmod(0o755)  # munged insists
        (self.folder / "state").mkdir()
        names = {"host": socket.gethostname(), "folder": self.folder, "one": NODES[0], "two": NODES[1]}
        ports = dict(zip(("ctld_port", "port_one", "port_two"), free_ports(3), strict=True))
        (self.folder / "slurm.conf").write_text(SLURM_CONF.format(**names, **ports))
        for i in range(4):
            (self.folder / f"gpu{i}").touch()
        (self.folder / "gres.conf").write_text(f"AutoDetect=off\nName=gpu File={self.folder}/gpu[0-3]\n")
        (self.folder / "cgroup.conf").write_text("CgroupAutomount=no\n")
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        with open(HOSTS, "a") as hosts:
            hosts.writelines(f"127.0.0.1 {node} {MARK}\n" for node in NODES)
        files = {"key": key, "socket": "munge.socket", "pid": "munge.pid", "log": "munge.log", "seed": "munge.seed"}
        options = [f"--{'log' if k == 'log' else k}-file={self.folder / v}" for k, v in files.items() if k != "socket"]
        self.daemon("munged", "--foreground", "--force", f"--socket={self.folder}/munge.socket", *options)
        self.wait(lambda: (self.folder / "munge.socket").exists(), "munged did not start", seconds=20)
        self.daemon("slurmctld", "-D", "-c")
        for node in NODES:
            self.daemon("slurmd", "-D", "-c", "-N", node)
        self.wait(self.ready, "the nodes did not come up", seconds=60)

    def daemon(self, *command: str) -> None:
        """A process of the cluster, its output beside its log."""
        name = f"{command[0]}-{len(self.daemons)}.out"
        with open(self.folder / name, "wb") as out:
            path = shutil.which(command[0], path=SEARCH)
            self.daemons.append(
                subprocess.Popen([str(path), *command[1:]], env=self.env, stdout=out, stderr=out, cwd=self.folder)
            )

    def ready(self) -> bool:
        """Whether both nodes are idle."""
        done = subprocess.run(
            ["sinfo", "--noheader", "--format=%T %D"], env=self.env, capture_output=True, text=True, check=False
        )
        return done.stdout.split() == ["idle", "2"]

    def stop(self) -> None:
        """Cancel the jobs, end the daemons, take the names away."""
        try:
            if self.ready_to_cancel():
                self.call("scancel", "--user=root", "--signal=KILL", check=False)
                self.call("scancel", "--user=root", check=False)
        finally:
            for process in reversed(self.daemons):
                process.terminate()
            for process in self.daemons:
                try:
                    process.wait(20)
                except subprocess.TimeoutExpired:
                    process.kill()
            lines = HOSTS.read_text().splitlines(keepends=True)
            HOSTS.write_text("".join(line for line in lines if MARK not in line))

    def ready_to_cancel(self) -> bool:
        """Whether the controller runs."""
        return len(self.daemons) > 1 and self.daemons[1].poll() is None

    def call(self, *command: str, check: bool = True, cwd: Path | None = None, **env: str) -> str:
        """A client command's output."""
        done = subprocess.run(
            command, env=self.env | env, cwd=cwd, capture_output=True, text=True, timeout=120, check=False
        )
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def wait(self, condition: Callable[[], bool], problem: str, *, seconds: float = 120) -> None:
        """Wait for something, or fail with what the daemons last said."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                said = [f"{p.name}:\n" + "\n".join(p.read_text(errors="replace").splitlines()[-8:])
                        for p in sorted([*self.folder.glob("*.log"), *self.folder.glob("*.out")])]  # fmt: skip
                raise AssertionError(f"{problem}\n" + "\n".join(said))
            time.sleep(0.2)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on just now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]
    finally:
        for s in sockets:
            s.close()
