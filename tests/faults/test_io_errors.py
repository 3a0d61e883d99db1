"""Conversions whose calls fail: an error names the file, and the same command continues to the same
bytes.
"""

import errno
import hashlib
from pathlib import Path

import pytest
from faults.shim import Fault, FaultyCommands, Kill, compiler
from make_checkpoint import SHAPES, make_checkpoint

pytestmark = pytest.mark.skipif(not compiler(), reason="needs a C compiler and LD_PRELOAD")

ENOTSUPP = 524
OUT, SOURCE = "/result", "/checkpoint"
LAYER, TRUNK = "layer-000.safetensors", "trunk.safetensors"
FULL, DAMAGED, STALE = errno.ENOSPC, errno.EIO, errno.ESTALE


@pytest.fixture(scope="module")
def small_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / SOURCE[1:]
    make_checkpoint(folder, SHAPES["mini"], 1)
    return folder


def command_for(source: Path, out: Path) -> list[object]:
    # One worker: the calls come in the same order each time.
    return [
        "convert",
        source,
        "-o",
        out,
        "-q",
        "--solver",
        "hqq",
        "--calibrate",
        "none",
        "--max-workers",
        1,
    ]


def hashes(out: Path) -> dict[str, str]:
    files = (file for file in sorted(out.rglob("*")) if file.is_file())
    return {
        str(file.relative_to(out)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files
    }


@pytest.fixture(scope="module")
def good(
    commands: FaultyCommands, small_source: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    out = tmp_path_factory.mktemp("good") / "out"
    assert commands.run(*command_for(small_source, out)).code == 0
    return hashes(out)


# (fault, exit code, file in the message, text of the message)
STOPPED = [
    (Fault("mkdir", OUT, errno.EROFS), 1, "result", "Read-only file system (EROFS)"),
    (Fault("mkdir", f"{OUT}/experts", FULL), 4, "experts", "no space left in"),
    (
        Fault("create", ".moe-convert.lock", errno.EACCES),
        1,
        ".moe-convert.lock",
        "Permission denied (EACCES)",
    ),
    (
        Fault("lock", ".moe-convert.lock", DAMAGED),
        1,
        ".moe-convert.lock",
        "cannot be locked: Input/output error",
    ),
    (Fault("create", ".moe-convert.journal", errno.EMFILE), 1, ".moe-convert.journal", "ulimit -n"),
    (
        Fault("write", ".moe-convert.journal", FULL, first=5),
        4,
        ".moe-convert.journal",
        "no space left in",
    ),
    (
        Fault("fsync", ".moe-convert.journal", DAMAGED, first=3),
        1,
        ".moe-convert.journal",
        "check the disk",
    ),
    (
        Fault("allocate", TRUNK, FULL),
        4,
        f"{TRUNK}.partial",
        "free space and run the same command again",
    ),
    (
        Fault("write", TRUNK, errno.EDQUOT, first=3),
        4,
        f"{TRUNK}.partial",
        "the disk quota is used up in",
    ),
    (Fault("truncate", LAYER, STALE), 1, f"{LAYER}.partial", "mount the network file system again"),
    (Fault("write", LAYER, errno.EFBIG, first=2), 4, f"{LAYER}.partial", "no file of this size"),
    (Fault("fsync", LAYER, DAMAGED, first=2), 1, f"{LAYER}.partial", "Input/output error (EIO)"),
    (Fault("rename", LAYER, STALE), 1, LAYER, "Stale file handle (ESTALE)"),
    (Fault("fsync_folder", f"{OUT}/experts", DAMAGED), 1, "experts", "Input/output error (EIO)"),
    (Fault("stat", LAYER, STALE, first=4), 1, LAYER, "Stale file handle (ESTALE)"),
    (Fault("write", "config.json.partial", FULL), 4, "config.json.partial", "no space left in"),
    (Fault("rename", "moe_index.json", FULL), 4, "moe_index.json", "no space left in"),
    (
        Fault("unlink", ".moe-convert.journal", errno.EPERM),
        1,
        ".moe-convert.journal",
        "cannot be removed",
    ),
    (
        Fault("open", f"{SOURCE}/model", errno.EACCES),
        1,
        "model.safetensors",
        "check the permissions",
    ),
    (
        Fault("read", f"{SOURCE}/model", DAMAGED),
        1,
        "model.safetensors",
        "cannot be read: Input/output error (EIO)",
    ),
    (
        Fault("read", f"{SOURCE}/model", STALE, first=90),
        1,
        "model.safetensors",
        "mount the network file system again",
    ),
    (
        Fault("read", f"{SOURCE}/config.json", DAMAGED),
        1,
        "config.json",
        "cannot be read: Input/output error (EIO)",
    ),
    (
        Fault("read", f"{SOURCE}/tokenizer.json", STALE),
        1,
        "tokenizer.json",
        "Stale file handle (ESTALE)",
    ),
]


@pytest.mark.parametrize(
    ("fault", "code", "named", "says"), STOPPED, ids=[str(case[0]) for case in STOPPED]
)
def test_failing_call_is_said_and_the_same_command_goes_on(
    commands: FaultyCommands,
    small_source: Path,
    good: dict[str, str],
    tmp_path: Path,
    fault: Fault,
    code: int,
    named: str,
    says: str,
) -> None:
    out = tmp_path / OUT[1:]
    ended = commands.run(*command_for(small_source, out), faults=[fault])
    assert ended.hits == 1
    assert ended.code == code, ended.output
    assert ended.output.startswith("error: ")
    assert "Traceback" not in ended.output
    assert named in ended.output
    assert says in ended.output
    assert commands.run(*command_for(small_source, out)).code == 0
    assert hashes(out) == good


LACKING = [
    *(
        ("lock", OUT, error, "run only one process")
        for error in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, ENOTSUPP)
    ),
    *(("fsync_folder", OUT, error, "") for error in (errno.EINVAL, errno.EBADF)),
    *(("allocate", OUT, error, "") for error in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)),
]


@pytest.mark.parametrize(("function", "path", "error", "warns"), LACKING)
def test_file_system_that_lacks_a_call_is_used_without(
    commands: FaultyCommands, small_source: Path, good: dict[str, str], tmp_path: Path,
    function: str, path: str, error: int, warns: str,
) -> None:  # fmt: skip
    out = tmp_path / OUT[1:]
    ended = commands.run(
        *command_for(small_source, out), faults=[Fault(function, path, error, count=0)]
    )
    assert ended.hits
    assert ended.code == 0, ended.output
    assert ended.output.count(warns) == 1 or not warns
    assert hashes(out) == good


def test_lock_that_would_block_is_another_writer(
    commands: FaultyCommands, small_source: Path, tmp_path: Path
) -> None:
    fault = Fault("lock", ".moe-convert.lock", errno.EWOULDBLOCK)
    ended = commands.run(*command_for(small_source, tmp_path / "out"), faults=[fault])
    assert ended.code == 1
    assert "another process is writing to" in ended.output


def test_folder_that_takes_no_new_file_is_said_before_the_work(
    commands: FaultyCommands, small_source: Path, tmp_path: Path
) -> None:
    # A file without a name, and the one with a name that is tried then.
    faults = [Fault("create", name, errno.EROFS) for name in (tmp_path.name, ".moe-convert.probe")]
    ended = commands.run(*command_for(small_source, tmp_path / "out"), faults=faults)
    assert ended.hits == 2
    assert ended.code == 1
    assert ".moe-convert.probe" in ended.output
    assert "choose a place that can be written" in ended.output
    assert not (tmp_path / "out").exists()


def test_kill_while_the_folder_is_tried_leaves_nothing(
    commands: FaultyCommands, small_source: Path, tmp_path: Path
) -> None:
    out = tmp_path / OUT[1:]
    out.mkdir()
    assert commands.run(*command_for(small_source, out), faults=[Kill("after", OUT, 1)]).code == -9
    assert hashes(out) == {}


def test_largest_file_that_the_file_system_refuses_is_said_before_the_work(
    commands: FaultyCommands, small_source: Path, tmp_path: Path
) -> None:
    fault = Fault("seek", f"{tmp_path.name}/#", errno.EINVAL)
    ended = commands.run(*command_for(small_source, tmp_path / "out"), faults=[fault])
    assert ended.code == 4
    assert "choose a disk with another file system" in ended.output
    assert not (tmp_path / "out").exists()
