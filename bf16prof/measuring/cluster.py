"""What stops jobs on clusters: a host name that does not resolve, an interface that others cannot
reach, a shared folder without locks."""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

from bf16prof.locks import NO_FLOCK
from bf16prof.measuring.accelerator import run
from bf16prof.measuring.findings import Check, State

RESOLVE_S = 10.0
LOOPBACK = ("127.", "::1")
STARTERS = ("ssh", "pdsh", "srun")
_SHARED = """
nfs nfs4 lustre gpfs beegfs ceph fuse.ceph glusterfs fuse.glusterfs panfs wekafs pvfs2 orangefs afs efs cifs smb3 9p virtiofs fuse.sshfs
"""
SHARED = frozenset(_SHARED.split())
"""File systems that several hosts may see."""

_RESOLVE = "import socket, sys; print(socket.getaddrinfo(sys.argv[1], None)[0][4][0])"


def host_name() -> Check:
    """Whether this host's own name is known to it: torchrun dies otherwise, and gloo takes the
    address."""
    name, address = socket.gethostname(), own_address()
    if address is None:
        hint = f"as root: echo '127.0.1.1 {name}' >> /etc/hosts"
        return Check("host name", State.WARNING, f"{name} does not resolve: torchrun and gloo need that", hint)
    return Check("host name", State.OK, f"{name} is {address}")


def own_address() -> str | None:
    """The address that this host's name resolves to, asked in a process of its own: a resolver that
    hangs is not waited for."""
    try:
        done = run([sys.executable, "-c", _RESOLVE, socket.gethostname()], RESOLVE_S)
    except subprocess.TimeoutExpired:
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def network() -> Check:
    """The interfaces that gloo and NCCL would take, and whether other nodes could reach them."""
    gloo, nccl = gloo_interface(), nccl_interface()
    detail = f"gloo takes {gloo or 'none'}, NCCL {nccl or 'none'}"
    wanted = [name for name in (os.environ.get("GLOO_SOCKET_IFNAME"), os.environ.get("NCCL_SOCKET_IFNAME")) if name]
    unknown = [name for name in wanted if name not in _addresses() and name.isalnum()]
    if unknown:
        return Check("network", State.WARNING, f"{detail}: there is no {unknown[0]} here", f"there are {', '.join(_addresses())}")
    if gloo == "lo" and nccl not in (None, "lo"):
        return Check(
            "network", State.OK, f"{detail}: gloo reaches this machine only", f"on several nodes: export GLOO_SOCKET_IFNAME={nccl}"
        )
    return Check("network", State.OK, detail)


def gloo_interface() -> str | None:
    """torch's choice (ProcessGroupGloo.cpp, createDefaultDevice): the address of the host's name if
    it is one of ours, else loopback."""
    if asked := os.environ.get("GLOO_SOCKET_IFNAME"):
        return asked
    address = own_address()
    found = [name for name, addresses in _addresses().items() if address in addresses]
    if found or address is None or not address.startswith(LOOPBACK):
        return found[0] if found else "lo"
    return "lo"  # 127.0.1.1, which no interface is said to have


def nccl_interface() -> str | None:
    """NCCL's choice (its socket.cc, findInterfaces): InfiniBand, then any but Docker's and
    loopback, then those."""
    if asked := os.environ.get("NCCL_SOCKET_IFNAME"):
        return asked
    names = list(_addresses())
    groups = (
        [name for name in names if name.startswith("ib")],
        [name for name in names if not name.startswith(("docker", "lo"))],
        [name for name in names if name.startswith("docker")],
        [name for name in names if name.startswith("lo")],
    )
    return next((group[0] for group in groups if group), None)


def _addresses() -> dict[str, list[str]]:
    """Addresses by interface, of those that are up."""
    import psutil

    up = {name for name, stats in psutil.net_if_stats().items() if stats.isup}
    families = (socket.AF_INET, socket.AF_INET6)
    found = {name: [a.address for a in addresses if a.family in families] for name, addresses in psutil.net_if_addrs().items()}
    return {name: addresses for name, addresses in found.items() if addresses and name in up}


def starters() -> Check:
    """What could start ranks on other nodes."""
    found = [name for name in STARTERS if shutil.which(name)]
    if not found:
        return Check("launchers", State.MISSING, f"none of {', '.join(STARTERS)}: ranks start here, or by the same command on each node")
    return Check("launchers", State.OK, ", ".join(found))


def shared_cache(folder: Path) -> tuple[str, str]:
    """On which file system a folder is, if it may be shared between hosts, and a warning where
    locks do not hold there; else nothing."""
    kind = file_system(folder)
    if kind not in SHARED:
        return "", ""
    locked = _knows_locks(folder)
    return f" ({kind}: shared between hosts)", "" if locked else f"{kind} knows no locks here: two hosts may compile into it at once"


def file_system(folder: Path) -> str:
    """The type of the file system of an existing folder; empty where nobody says."""
    import psutil

    try:
        mounts = {Path(part.mountpoint): part.fstype for part in psutil.disk_partitions(all=True)}
    except OSError:  # there is no /proc
        return ""
    return next((mounts[parent] for parent in (folder.resolve(), *folder.resolve().parents) if parent in mounts), "")


def _knows_locks(folder: Path) -> bool:
    """Whether `flock` works there, asked without making a file."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:  # it may be written and not be read: nobody can tell
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in NO_FLOCK
    finally:
        os.close(descriptor)
    return True
