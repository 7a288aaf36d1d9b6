"""Reading a repository over the protocol: info, tree, paths, references, commits, contents."""

import hashlib
import re
from typing import Any
from urllib.parse import urlencode

from hub_server.cards import metadata
from hub_server.messages import Answer, HubError, Request, entry_not_found, json_answer
from hub_server.store import Commit, File, Repository, Store


def info(store: Store, repository: Repository, revision: str, request: Request) -> Answer:
    commit = repository.resolve(revision)
    sizes = request.query.get("blobs", "").lower() in ("true", "1")
    card = metadata(_text(store, commit, "README.md"))
    values = {
        "_id": hashlib.sha1(repository.name.encode()).hexdigest()[:24],
        "id": repository.name,
        "modelId": repository.name,
        "author": repository.namespace,
        "sha": commit.sha,
        "lastModified": commit.date,
        "createdAt": repository.created,
        "private": repository.private,
        "gated": "auto" if repository.gated else False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": card.get("tags") or [],
        "siblings": [_sibling(path, file, sizes) for path, file in sorted(commit.files.items())],
    }
    values |= {key: card[key] for key in ("library_name", "pipeline_tag") if key in card}
    return json_answer(values | ({"cardData": card} if card else {}))


def _text(store: Store, commit: Commit, path: str) -> str:
    file = commit.files.get(path)
    return store.blob(file.sha256).decode(errors="replace") if file else ""


def _sibling(path: str, file: File, sizes: bool) -> dict[str, Any]:
    entry: dict[str, Any] = {"rfilename": path}
    if sizes:
        entry |= {"size": file.size, "blobId": file.oid}
        if file.lfs:
            entry["lfs"] = {"size": file.size, "sha256": file.sha256, "pointerSize": 130}
    return entry


def tree(repository: Repository, revision: str, folder: str, request: Request, page_size: int) -> Answer:
    """One page of the files and folders under a folder."""
    commit = repository.resolve(revision)
    entries = _entries(commit)
    prefix = f"{folder}/" if folder else ""
    inside = [entry for path, entry in sorted(entries.items()) if path.startswith(prefix)]
    if folder and not inside:
        raise entry_not_found(folder)
    if request.query.get("recursive", "").lower() not in ("true", "1"):
        inside = [entry for entry in inside if "/" not in entry["path"][len(prefix) :]]
    if request.query.get("expand", "").lower() in ("true", "1"):
        last = {"id": commit.sha, "title": commit.title, "date": commit.date}
        inside = [entry | {"lastCommit": last} for entry in inside]
    return _page(inside, request, page_size)


def paths_info(repository: Repository, revision: str, request: Request) -> Answer:
    entries = _entries(repository.resolve(revision))
    wanted = [path.strip("/") for path in request.form().get("paths", [])]
    return json_answer([entries[path] for path in wanted if path in entries])


def references(repository: Repository) -> Answer:
    def listed(kind: str, names: dict[str, str]) -> list[dict[str, str]]:
        return [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": sha} for name, sha in names.items()]

    branches, tags = listed("heads", repository.branches), listed("tags", repository.tags)
    return json_answer({"branches": branches, "converts": [], "tags": tags, "pullRequests": []})


def commits(repository: Repository, revision: str, request: Request, page_size: int) -> Answer:
    listed = [
        {
            "id": commit.sha,
            "title": commit.title,
            "message": commit.message,
            "authors": [{"user": commit.author}],
            "date": commit.date,
        }
        for commit in repository.history(revision)
    ]
    return _page(listed, request, page_size)


def content(store: Store, repository: Repository, revision: str, path: str, request: Request) -> Answer:
    """A file or a range of it, with the headers from which the client fills its cache."""
    commit = repository.resolve(revision)
    file = commit.files.get(path)
    if file is None:
        error = entry_not_found(path).answer()
        # The client notes in its cache that this commit has no such file.
        error.headers["X-Repo-Commit"] = commit.sha
        return error
    body = store.blob(file.sha256)
    headers = {
        "X-Repo-Commit": commit.sha,
        "ETag": f'"{file.oid}"',
        "Accept-Ranges": "bytes",
        "Content-Type": "application/octet-stream",
    }
    if file.lfs:
        headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(file.size)}
    asked = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range") or "")
    if not asked:
        return Answer(200, body, headers)
    first, last = int(asked[1]), min(int(asked[2] or len(body) - 1), len(body) - 1)
    if first > last:
        raise HubError(416, "Range not satisfiable")
    headers["Content-Range"] = f"bytes {first}-{last}/{len(body)}"
    return Answer(206, body[first : last + 1], headers)


def _entries(commit: Commit) -> dict[str, dict[str, Any]]:
    """Files, and the folders above them."""
    entries: dict[str, dict[str, Any]] = {}
    for path, file in commit.files.items():
        parts = path.split("/")
        for depth in range(1, len(parts)):
            folder = "/".join(parts[:depth])
            oid = hashlib.sha1(folder.encode()).hexdigest()
            entries[folder] = {"type": "directory", "oid": oid, "size": 0, "path": folder}
        entries[path] = {"type": "file", "oid": file.oid, "size": file.size, "path": path}
        if file.lfs:
            entries[path]["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": 130}
    return entries


def _page(entries: list[dict[str, Any]], request: Request, page_size: int) -> Answer:
    start = int(request.query.get("cursor", 0))
    size = min(int(request.query.get("limit", page_size)), page_size)
    answer = json_answer(entries[start : start + size])
    if start + size < len(entries):
        query = urlencode({**request.query, "cursor": start + size})
        answer.headers["Link"] = f'<{request.origin}{request.path}?{query}>; rel="next"'
    return answer
