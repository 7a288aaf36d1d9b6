"""Commits over the protocol: what to upload how, and NDJSON lines made into a new tree."""

import base64
import json
from typing import Any

from hub_server.access import Identity
from hub_server.cards import validate
from hub_server.messages import Answer, HubError, Request, entry_not_found, json_answer
from hub_server.store import LFS_SUFFIXES, File, Repository, Store

_REGULAR_LIMIT = 10 * 1024 * 1024


def preupload(repository: Repository, revision: str, request: Request) -> Answer:
    """Which files go up as LFS objects, and what the branch holds under their names."""
    files = repository.resolve(revision).files
    answers = []
    for entry in request.json()["files"]:
        lfs = entry["path"].endswith(LFS_SUFFIXES) or entry["size"] >= _REGULAR_LIMIT
        answer: dict[str, Any] = {"path": entry["path"], "uploadMode": "lfs" if lfs else "regular"}
        present = files.get(entry["path"])
        answers.append(answer | {"shouldIgnore": False, "oid": present.etag if present else None})
    return json_answer({"files": answers})


def commit(
    store: Store, repository: Repository, branch: str, identity: Identity, request: Request, has_cas: bool = False
) -> Answer:
    """One commit from NDJSON lines; large files may be in a Xet store instead of here.

    Raises:
        HubError: 412 if the branch has moved on from `parentCommit`, 400 for a bad name or card, 404 for a branch
            or file that is not there.
    """
    lines = [json.loads(line) for line in request.body.splitlines() if line.strip()]
    header, *changes = lines
    if header["key"] != "header":
        raise HubError(400, "the first line of a commit must be its header")
    head = repository.resolve(branch)
    if branch not in repository.branches:
        raise HubError(400, f"{branch} is not a branch")
    expected = header["value"].get("parentCommit")
    if expected is not None and not head.sha.startswith(expected):
        raise HubError(412, "A commit has happened since. Please refresh and try again.")
    files = dict(head.files)
    for change in changes:
        _apply(store, files, change["key"], change["value"], has_cas)
    made = store.commit(
        repository,
        branch,
        header["value"]["summary"],
        files,
        message=header["value"].get("description", ""),
        author=identity.user,
    )
    url = f"{request.origin}/{repository.name}/commit/{made.sha}"
    return json_answer({"success": True, "commitOid": made.sha, "commitUrl": url, "hookOutput": ""})


def _apply(store: Store, files: dict[str, File], key: str, value: dict[str, Any], has_cas: bool) -> None:
    path = value["path"]
    if path.startswith("/") or any(part in ("", ".", "..", ".git") for part in path.rstrip("/").split("/")):
        raise HubError(400, f"invalid path {path!r}")
    if key == "file":
        content = base64.b64decode(value["content"])
        if path == "README.md" and (errors := validate(content.decode())[0]):
            raise HubError(400, "Invalid metadata in README.md: " + "; ".join(errors))
        files[path] = store.regular_file(content)
    elif key == "lfsFile":
        files[path] = store.lfs_file(value["oid"], value["size"] if has_cas else None)
    elif key == "deletedFile":
        if path not in files:
            raise entry_not_found(f"A file with this name doesn't exist: {path}")
        del files[path]
    elif key == "deletedFolder":
        inside = [name for name in files if name.startswith(path.rstrip("/") + "/")]
        if not inside:
            raise entry_not_found(f"A folder with this name doesn't exist: {path}")
        for name in inside:
            del files[name]
    else:
        raise HubError(400, f"unknown operation {key!r}")
