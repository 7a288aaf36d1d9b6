"""Repositories as histories of commits, with branches and tags; contents lie in a folder, so a restart keeps them."""

import hashlib
import json
import os
import threading
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hub_server.messages import HubError, entry_not_found, revision_not_found

LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".parquet", ".png", ".npz", ".arrow")
_ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()


@dataclass(frozen=True)
class File:
    """A file of a commit. `oid` is git's SHA-1 of what git holds: the content, or the pointer of an LFS file."""

    sha256: str
    size: int
    oid: str
    lfs: bool

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid


@dataclass
class Commit:
    sha: str
    parent: str | None
    title: str
    message: str
    author: str
    date: str
    files: dict[str, File]


@dataclass
class Repository:
    """A repository of one type (model, dataset, space) and its history."""

    kind: str
    name: str
    private: bool = False
    gated: bool = False
    created: str = ""
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    @property
    def namespace(self) -> str:
        return self.name.split("/")[0]

    def resolve(self, revision: str) -> Commit:
        """The commit that a branch, a tag or the beginning of a SHA names."""
        revision = revision.removeprefix("refs/heads/").removeprefix("refs/tags/")
        sha = self.branches.get(revision) or self.tags.get(revision)
        if sha is None and len(revision) >= 7:
            sha = next((known for known in self.commits if known.startswith(revision)), None)
        if sha is None:
            raise revision_not_found(revision)
        return self.commits[sha]

    def history(self, revision: str) -> list[Commit]:
        """The commits that led to a revision, newest first."""
        chain = [self.resolve(revision)]
        while chain[-1].parent is not None:
            chain.append(self.commits[chain[-1].parent])
        return chain


class Store:
    """Everything the server knows, kept under `folder`. Hold `lock` while reading or changing repositories."""

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder)
        (self.folder / "blobs").mkdir(parents=True, exist_ok=True)
        self.lock = threading.RLock()
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.moved: dict[str, str] = {}
        self._load()

    # ---- Contents ----

    def put_blob(self, content: bytes) -> str:
        """Keeps a content; returns its SHA-256."""
        sha256 = hashlib.sha256(content).hexdigest()
        path = self.folder / "blobs" / sha256
        if not path.exists():
            partial = path.with_name(f"{sha256}.{threading.get_ident()}")
            partial.write_bytes(content)
            partial.replace(path)
        return sha256

    def has_blob(self, sha256: str) -> bool:
        return (self.folder / "blobs" / sha256).exists()

    def blob(self, sha256: str) -> bytes:
        return (self.folder / "blobs" / sha256).read_bytes()

    def regular_file(self, content: bytes) -> File:
        oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        return File(self.put_blob(content), len(content), oid, lfs=False)

    def lfs_file(self, sha256: str, size: int | None = None) -> File:
        """An LFS file whose content was uploaded before, here or (with a size in bytes) to a Xet store."""
        if self.has_blob(sha256):
            size = (self.folder / "blobs" / sha256).stat().st_size
        elif size is None:
            raise HubError(422, f"LFS object {sha256} was not uploaded")
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
        return File(sha256, size, hashlib.sha1(b"blob %d\0" % len(pointer) + pointer).hexdigest(), lfs=True)

    # ---- Repositories ----

    def create(self, name: str, kind: str = "model", private: bool = False, gated: bool = False) -> Repository:
        repository = Repository(kind, name, private, gated, created=_now())
        self.repositories[kind, name] = repository
        self.commit(repository, "main", "initial commit", {".gitattributes": self.regular_file(_ATTRIBUTES)})
        return repository

    def commit(
        self,
        repository: Repository,
        branch: str,
        title: str,
        files: Mapping[str, File],
        message: str = "",
        author: str = "system",
    ) -> Commit:
        """A commit whose tree is exactly `files`, put on a branch."""
        parent = repository.branches.get(branch)
        names = sorted((path, file.oid) for path, file in files.items())
        seed = json.dumps([repository.name, parent, title, len(repository.commits), names])
        commit = Commit(hashlib.sha1(seed.encode()).hexdigest(), parent, title, message, author, _now(), dict(files))
        repository.commits[commit.sha] = commit
        repository.branches[branch] = commit.sha
        self.save()
        return commit

    def add_files(
        self, name: str, contents: Mapping[str, bytes], branch: str = "main", delete: Iterable[str] = ()
    ) -> Commit:
        """For tests: a commit made behind the back of the protocol, with any names and contents."""
        with self.lock:
            repository = self.repositories["model", name]
            files = dict(repository.resolve(branch).files)
            for path in delete:
                del files[path]
            for path, content in contents.items():
                lfs = path.endswith(LFS_SUFFIXES)
                files[path] = self.lfs_file(self.put_blob(content)) if lfs else self.regular_file(content)
            return self.commit(repository, branch, "made by a test", files)

    def read(self, name: str, path: str, revision: str = "main") -> bytes:
        """For tests: the content of a file of a model repository."""
        commit = self.repositories["model", name].resolve(revision)
        if path not in commit.files:
            raise entry_not_found(path)
        return self.blob(commit.files[path].sha256)

    def paths(self, name: str, revision: str = "main") -> list[str]:
        """For tests: the files of a model repository, without the `.gitattributes` that every one has."""
        files = self.repositories["model", name].resolve(revision).files
        return sorted(set(files) - {".gitattributes"})

    def titles(self, name: str, revision: str = "main") -> list[str]:
        """For tests: the titles of a model repository's commits, oldest first, without the initial commit."""
        history = self.repositories["model", name].history(revision)
        return [commit.title for commit in reversed(history)][1:]

    # ---- On disk ----

    def save(self) -> None:
        content = {"moved": self.moved, "repositories": [asdict(repo) for repo in self.repositories.values()]}
        partial = self.folder / "store.json.partial"
        partial.write_text(json.dumps(content))
        partial.replace(self.folder / "store.json")

    def _load(self) -> None:
        path = self.folder / "store.json"
        if not path.exists():
            return
        content = json.loads(path.read_text())
        self.moved = content["moved"]
        for values in content["repositories"]:
            values["commits"] = {sha: _commit(fields) for sha, fields in values["commits"].items()}
            self.repositories[values["kind"], values["name"]] = Repository(**values)


def _commit(fields: dict[str, Any]) -> Commit:
    return Commit(**{**fields, "files": {path: File(**file) for path, file in fields["files"].items()}})


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"
