"""Repositories of the loopback Hub: files, commits, branches."""

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path

LFS_FROM_BYTES = 1 << 20
"""Files of this size, and all .safetensors, are kept as LFS objects."""


@dataclass(frozen=True)
class Blob:
    """A file's content, in memory or as a file that must not change."""

    content: bytes | Path
    lfs: bool
    size: int
    sha256: str
    git_oid: str

    @classmethod
    def of(cls, content: bytes | Path, path: str) -> "Blob":
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        if isinstance(content, bytes):
            sha256 = hashlib.sha256(content).hexdigest()
        else:
            with open(content, "rb") as f:
                sha256 = hashlib.file_digest(f, "sha256").hexdigest()
        lfs = path.endswith(".safetensors") or size >= LFS_FROM_BYTES
        plain = b"" if lfs else content if isinstance(content, bytes) else content.read_bytes()
        stored = f"oid sha256:{sha256}\nsize {size}\n".encode() if lfs else plain
        return cls(
            content,
            lfs,
            size,
            sha256,
            hashlib.sha1(b"blob %d\0" % len(stored) + stored).hexdigest(),
        )

    @property
    def etag(self) -> str:
        """Blob id in huggingface_hub: sha256 of an LFS file, git's sha1 of any other."""
        return self.sha256 if self.lfs else self.git_oid

    def read(self, begin: int, end: int) -> bytes:
        """Bytes begin..end (exclusive)."""
        if isinstance(self.content, bytes):
            return self.content[begin:end]
        with open(self.content, "rb") as f:
            return os.pread(f.fileno(), end - begin, begin)


@dataclass(frozen=True)
class Commit:
    """A state of a repository."""

    oid: str
    parent: str | None
    title: str
    files: dict[str, Blob]


@dataclass
class Repo:
    """A model repository with its history."""

    name: str
    private: bool = False
    gated: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.commits:
            self.commit(
                "main", {".gitattributes": Blob.of(b"*.safetensors filter=lfs\n", ".gitattributes")}
            )

    def commit(self, ref: str, files: dict[str, Blob], title: str = "initial commit") -> Commit:
        """Makes `files` the whole content of `ref`."""
        parent = self.refs.get(ref)
        listing = "".join(f"{path} {blob.etag}\n" for path, blob in sorted(files.items()))
        oid = hashlib.sha1(
            f"{self.name} {len(self.commits)} {parent} {title}\n{listing}".encode()
        ).hexdigest()
        self.commits[oid] = commit = Commit(oid, parent, title, dict(files))
        self.refs[ref] = oid
        return commit

    def at(self, revision: str) -> Commit | None:
        """The commit that a branch, a pull request or an id names."""
        return self.commits.get(self.refs.get(revision, revision))
