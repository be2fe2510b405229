"""Two simulated hosts: network namespaces with a virtual cable between them.

Each has its own name, address and an /etc/hosts with both; a port bound to one's
loopback is unreachable from the other.
"""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

NAMES = ("host0", "host1")
# Runs on a host before its program.
SET_UP = """
mount --make-rprivate /
mount --bind "$0" /etc/hosts
hostname "$1"
shift
exec "$@"
"""


def missing() -> str | None:
    """The reason why hosts cannot be simulated on this machine."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return "network namespaces need root and iproute2"
    probe = f"probe{os.getpid()}"
    if subprocess.run(["ip", "netns", "add", probe], capture_output=True).returncode:
        return "network namespaces are not allowed here"
    subprocess.run(["ip", "netns", "delete", probe], check=True)
    return None


@contextlib.contextmanager
def two_hosts(folder: Path) -> Iterator[list[list[str]]]:
    """Yields, for each host, the prefix of a command that runs there."""
    own = [f"{name}-{os.getpid()}" for name in NAMES]
    addresses = ["10.93.0.1", "10.93.0.2"]
    hosts = folder / "hosts"
    lines = [f"{at} {name}" for at, name in zip(addresses, NAMES, strict=True)]
    hosts.write_text("\n".join(["127.0.0.1 localhost", *lines, ""]))
    ends = [f"cable{number}" for number in range(2)]
    with contextlib.ExitStack() as stack:
        for name in own:
            _ip("netns", "add", name)
            stack.callback(_ip, "netns", "delete", name)
        cable = ["type", "veth", "peer", "name", ends[1], "netns", own[1]]
        _ip("link", "add", ends[0], "netns", own[0], *cable)
        for name, end, address in zip(own, ends, addresses, strict=True):
            _ip("-netns", name, "address", "add", f"{address}/24", "dev", end)
            for device in (end, "lo"):
                _ip("-netns", name, "link", "set", device, "up")
        yield [
            ["ip", "netns", "exec", inside, "unshare", "--uts", "--mount"]
            + ["bash", "-c", SET_UP, str(hosts), name]
            for inside, name in zip(own, NAMES, strict=True)
        ]


def _ip(*arguments):
    subprocess.run(["ip", *arguments], check=True)
