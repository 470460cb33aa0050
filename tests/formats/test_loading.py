"""Which disks are at the far end of a network, told from listings as Linux gives them."""

from pathlib import Path

import pytest

from qlora_formats import loading
from qlora_formats.loading import Mount, is_network, mount_of, network_mount

LISTING = r"""21 98 0:20 / /sys rw,nosuid,nodev,noexec,relatime shared:7 - sysfs sysfs rw
98 1 259:2 / / rw,relatime shared:1 - ext4 /dev/nvme0n1p2 rw,errors=remount-ro
120 98 0:50 / /data rw,relatime shared:60 - nfs4 filer.example.org:/export/data rw,vers=4.2,rsize=1048576
121 120 8:1 / /data/scratch rw,relatime shared:61 - xfs /dev/sda1 rw
122 98 0:51 / /mnt/with\040space\134here rw,relatime - cifs //server/share rw,vers=3.1.1
123 98 0:52 /home /home/ann/remote rw,nosuid,nodev,relatime shared:62 master:3 - fuse.sshfs ann@host: rw
124 98 0:53 / /wide rw,relatime - ext4 /dev/sdb1 rw
125 124 0:54 / /wide rw,relatime - lustre 10.0.0.1@tcp:/fs rw
126 98 0:55 / /usb rw,relatime - fuseblk /dev/sdc1 rw
127 98 0:56 / /local rw,relatime - fuse.bindfs /else rw
malformed line
"""


@pytest.mark.parametrize(
    ("path", "point", "kind"),
    [
        ("/", "/", "ext4"),
        ("/home/ann", "/", "ext4"),
        ("/home/ann/remote/models/llama", "/home/ann/remote", "fuse.sshfs"),
        ("/data", "/data", "nfs4"),
        ("/data/models", "/data", "nfs4"),
        ("/data/scratch/store", "/data/scratch", "xfs"),
        ("/data/scratchy", "/data", "nfs4"),
        ("/database", "/", "ext4"),
        ("/mnt/with space\\here/store", "/mnt/with space\\here", "cifs"),
        ("/wide/store", "/wide", "lustre"),
    ],
)
def test_a_path_lies_on_the_longest_mount_above_it_and_the_last_of_two(path: str, point: str, kind: str) -> None:
    assert mount_of(Path(path), LISTING) == Mount(Path(point), kind)


def test_nothing_is_known_without_a_listing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert mount_of(Path("/data"), "") is None
    monkeypatch.setattr(loading, "_MOUNTS", tmp_path / "absent")
    assert network_mount(Path("/data")) is None


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        (
            "nfs nfs4 cifs smb3 smbfs fuse.sshfs lustre ceph fuse.ceph fuse.ceph-fuse gpfs 9p beegfs afs glusterfs"
            " fuse.glusterfs fuse.gcsfuse fuse.s3fs fuse.mount-s3 fuse.mountpoint-s3 fuse.rclone fuse.juicefs",
            True,
        ),
        ("ext4 xfs btrfs zfs tmpfs overlay f2fs fuseblk fuse.bindfs fuse fuse. vfat nfsd sshfs virtiofs", False),
    ],
    ids=["network", "local"],
)
def test_kinds_of_file_systems_are_known_by_their_whole_name(kinds: str, expected: bool) -> None:
    assert {kind: is_network(kind) for kind in kinds.split()} == dict.fromkeys(kinds.split(), expected)


def test_links_are_followed_before_the_mount_is_looked_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "near").symlink_to(tmp_path / "far")
    listing = tmp_path / "mountinfo"
    listing.write_text(f"1 0 8:1 / / rw - ext4 /dev/sda1 rw\n2 1 0:9 / {tmp_path / 'far'} rw - nfs4 host:/x rw\n")
    monkeypatch.setattr(loading, "_MOUNTS", listing)
    assert network_mount(tmp_path / "near") == Mount(tmp_path / "far", "nfs4")
    assert network_mount(tmp_path) is None
