"""A one-host SLURM cluster from Debian's packages slurm-wlm and munge."""

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
PATH = f"{os.environ['PATH']}:/usr/sbin"

CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/linear
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES State=UP
"""


def missing() -> str | None:
    """The reason why there can be no cluster on this machine."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
    if absent:
        return f"not installed: {', '.join(absent)} (apt-get install slurm-wlm munge)"
    return None if os.geteuid() == 0 else "SLURM's daemons are started by root"


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[dict[str, str]]:
    """Yields the environment in which SLURM's commands find the cluster."""
    for name in ("state", "spool"):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(1024))
    config = folder / "slurm.conf"
    config.write_text(
        CONFIG.format(
            host=socket.gethostname(),
            folder=folder,
            ports=_free_ports(),
            cpus=os.cpu_count(),
        )
    )
    environment = {**os.environ, "PATH": PATH, "SLURM_CONF": str(config)}
    munged = [
        "munged",
        "--foreground",
        "--force",
        *(f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "log")),
        f"--seed-file={folder}/munge.seed",
        f"--socket={folder}/munge.socket",
    ]
    daemons = []
    try:
        for command in (munged, ["slurmctld", "-D", "-c"], ["slurmd", "-D"]):
            with (folder / f"{command[0]}.out").open("wb") as output:
                daemons.append(
                    subprocess.Popen(
                        command, env=environment, stdout=output, stderr=output
                    )
                )
            time.sleep(0.5)
        wait_for(environment, "idle", "sinfo", "--noheader", "--format=%T")
        yield environment
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait(timeout=60)


def wait_for(environment: dict[str, str], word: str, *command: str) -> None:
    """Repeats a command until its output has `word`."""
    deadline = time.monotonic() + 300
    while word not in (answer := ask(environment, *command)):
        assert time.monotonic() < deadline, answer
        time.sleep(0.2)


def ask(environment: dict[str, str], *command: str) -> str:
    """The output of a SLURM command."""
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=60
    )
    return done.stdout + done.stderr


def _free_ports():
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(2)]
        for probe in probes:
            probe.bind(("localhost", 0))
        return [probe.getsockname()[1] for probe in probes]
