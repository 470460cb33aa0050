"""How a file's tensors come into memory, and which disks decide about it. Imports no torch.

A mapping is shared with every process that maps the file and costs nothing until it is used. Where the disk is at the
far end of a network it costs a round trip per page, and a page that the network loses kills the process (SIGBUS);
there, reading is better.
"""

import re
from pathlib import Path
from typing import Literal, NamedTuple

Load = Literal["mmap", "read"]

_MOUNTS = Path("/proc/self/mountinfo")

# Kinds of file systems as the kernel names them; what one that runs as a program is called follows "fuse.".
_NETWORK = re.compile(
    r"9p|afs|beegfs|ceph|cifs|coda|gfs2|glusterfs|gpfs|lustre|nfs4?|ocfs2|orangefs|panfs|pvfs2|smb3|smbfs|wekafs"
    r"|fuse\.(blobfuse2?|ceph(-fuse)?|davfs2?|gcsfuse|glusterfs|goofys|hdfs|juicefs|mfs|mount(point)?-s3|quobyte|rclone"
    r"|s3fs|seaweedfs|smbnetfs|sshfs)"
)
_ESCAPE = re.compile(r"\\([0-7]{3})")


class Mount(NamedTuple):
    """Where a file system is mounted, and what kind it is, such as "nfs4"."""

    point: Path
    kind: str


def network_mount(path: Path) -> Mount | None:
    """The mount that `path` lies on if that is a network file system; None elsewhere, or where nothing says."""
    try:
        listing = _MOUNTS.read_text(errors="surrogateescape")
    except OSError:
        return None
    found = mount_of(path.resolve(), listing)
    return found if found is not None and is_network(found.kind) else None


def mount_of(path: Path, listing: str) -> Mount | None:
    """The mount that an absolute path without links lies on, from a listing as /proc/self/mountinfo has it."""
    found: Mount | None = None
    for line in listing.splitlines():
        # ID PARENT MAJOR:MINOR ROOT POINT OPTIONS [TAGS...] - KIND SOURCE OPTIONS
        before, separator, after = line.partition(" - ")
        fields, kinds = before.split(), after.split()
        if not separator or len(fields) < 5 or not kinds:
            continue
        point = Path(_ESCAPE.sub(lambda match: chr(int(match[1], 8)), fields[4]))
        # Of two on one point the later hides the earlier.
        if path.is_relative_to(point) and (found is None or len(point.parts) >= len(found.point.parts)):
            found = Mount(point, kinds[0])
    return found


def is_network(kind: str) -> bool:
    """Whether a kind of file system keeps its files on another machine."""
    return _NETWORK.fullmatch(kind) is not None
