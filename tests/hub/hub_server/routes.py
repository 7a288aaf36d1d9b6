"""Every endpoint: from a request to an answer. Nothing here knows of sockets."""

import re
import time
from urllib.parse import quote

from hub_server import commits, reading
from hub_server.access import Identity, check_download, check_read, check_write, identify, require_user
from hub_server.cards import validate
from hub_server.lfs import LargeFiles
from hub_server.messages import Answer, HubError, Request, json_answer, repo_not_found, revision_not_found
from hub_server.store import Repository, Store

_KINDS = {"models": "model", "datasets": "dataset", "spaces": "space"}
_REFERENCE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_./-]{0,250}")


class Moved(Exception):
    """The repository has another name now."""


class Routes:
    """Answers requests from a store.

    Args:
        store: the repositories.
        part_size: LFS objects larger than so many bytes go up in parts.
        page_size: entries of a page of a tree or a list of commits.
    """

    def __init__(self, store: Store, part_size: int, page_size: int):
        self.store = store
        self.page_size = page_size
        self.large_files = LargeFiles(store, part_size)
        self.cas: str | None = None  # where Xet uploads go, such as local:///some/folder; what is in it is not read

    def answer(self, request: Request) -> Answer:
        try:
            if request.parts[0] == "_lfs":
                return self._object(request)
            with self.store.lock:
                return self._answer(request, identify(request.token))
        except HubError as error:
            return error.answer()
        except Moved as moved:
            old, new = moved.args
            return Answer(307, headers={"Location": request.target.replace(quote(old), quote(new), 1)})

    def _answer(self, request: Request, identity: Identity | None) -> Answer:
        match request.method, *request.parts:
            case "GET", "api", "whoami-v2":
                return json_answer(require_user(identity).whoami())
            case "POST", "api", "validate-yaml":
                errors, warnings = validate(request.json()["content"], request.json().get("repoType") or "model")
                found = {
                    "errors": [{"message": text} for text in errors],
                    "warnings": [{"message": text} for text in warnings],
                }
                return json_answer(found, 400 if errors else 200)
            case "POST", "api", "repos", "create":
                return self._create(request, identity)
            case "DELETE", "api", "repos", "delete":
                return self._delete(request, identity)
            case "POST", "api", "repos", "move":
                return self._move(request, identity)
            case method, "api", kind, user, name, *rest if kind in _KINDS:
                repository = self._repository(_KINDS[kind], f"{user}/{name}", identity)
                if method in ("GET", "HEAD") or rest[:1] == ["paths-info"]:
                    return self._read(repository, rest, request, identity)
                return self._write(repository, rest, request, identity)
            case "POST", *folder, name, "info", "lfs", "objects", action if name.endswith(".git"):
                kind, repo_id = _split([*folder, name.removesuffix(".git")])
                check_write(self._repository(kind, repo_id, identity), identity)
                if action == "batch":
                    return self.large_files.batch(f"{'/'.join(folder)}/{name.removesuffix('.git')}", request)
                return self.large_files.verify(request)
            case "GET" | "HEAD", *_ if "resolve" in request.parts:
                at = request.parts.index("resolve")
                repository = self._repository(*_split(request.parts[:at]), identity)
                check_download(repository, identity)
                revision, path = request.parts[at + 1], "/".join(request.parts[at + 2 :])
                return reading.content(self.store, repository, revision, path, request)
        raise HubError(404, f"no such endpoint: {request.method} {request.path}")

    def _repository(self, kind: str, name: str, identity: Identity | None) -> Repository:
        repository = self.store.repositories.get((kind, name))
        if repository is None:
            if name in self.store.moved:
                raise Moved(name, self.store.moved[name])
            raise repo_not_found(identity is not None)
        check_read(repository, identity)
        return repository

    # ---- Repositories as a whole ----

    def _create(self, request: Request, identity: Identity | None) -> Answer:
        values = request.json()
        user = require_user(identity)
        kind = values.get("type") or "model"
        name = f"{values.get('organization') or user.user}/{values['name']}"
        namespace = name.split("/")[0]
        if not user.may_write_in(namespace):
            message = f'You don\'t have the rights to create a {kind} under the namespace "{namespace}"'
            raise HubError(403, message)
        prefix = "" if kind == "model" else f"{kind}s/"
        url = f"{request.origin}/{prefix}{name}"
        if (kind, name) in self.store.repositories:
            return json_answer({"error": f"You already created this {kind} repo", "url": url, "name": name}, 409)
        private = values.get("visibility") == "private" or bool(values.get("private"))
        self.store.create(name, kind, private=private)
        return json_answer({"url": url, "name": name, "private": private})

    def _delete(self, request: Request, identity: Identity | None) -> Answer:
        values = request.json()
        kind = values.get("type") or "model"
        name = f"{values.get('organization') or require_user(identity).user}/{values['name']}"
        check_write(self._repository(kind, name, identity), identity)
        del self.store.repositories[kind, name]
        self.store.save()
        return json_answer({})

    def _move(self, request: Request, identity: Identity | None) -> Answer:
        values = request.json()
        kind, old, new = values.get("type") or "model", values["fromRepo"], values["toRepo"]
        repository = self._repository(kind, old, identity)
        check_write(repository, identity)
        if not require_user(identity).may_write_in(new.split("/")[0]):
            raise HubError(403, "Forbidden: you may not write to that namespace")
        if (kind, new) in self.store.repositories:
            raise HubError(409, f"{new} exists")
        del self.store.repositories[kind, old]
        repository.name = new
        self.store.repositories[kind, new] = repository
        self.store.moved[old] = new
        self.store.save()
        return json_answer({})

    # ---- One repository ----

    def _read(self, repository: Repository, rest: list[str], request: Request, identity: Identity | None) -> Answer:
        match rest:
            case []:
                return reading.info(self.store, repository, "main", request)
            case ["revision", revision]:
                return reading.info(self.store, repository, revision, request)
            case ["tree", revision, *folder]:
                path = "/".join(folder)
                return reading.tree(repository, revision, path, request, self.page_size)
            case ["paths-info", revision]:
                return reading.paths_info(repository, revision, request)
            case ["refs"]:
                return reading.references(repository)
            case ["commits", revision]:
                return reading.commits(repository, revision, request, self.page_size)
            case ["xet-write-token", _] if self.cas:
                check_write(repository, identity)
                expires = int(time.time()) + 3600
                return json_answer({"accessToken": "xet", "exp": expires, "casUrl": self.cas})
            case ["auth-check"]:
                check_download(repository, identity)
                return json_answer({})
            case ["auth-check", "write"]:
                check_write(repository, identity)
                return json_answer({})
        raise HubError(404, f"no such endpoint: {request.method} {request.path}")

    def _write(self, repository: Repository, rest: list[str], request: Request, identity: Identity | None) -> Answer:
        check_write(repository, identity)
        match request.method, *rest:
            case "POST", "preupload", revision:
                return commits.preupload(repository, revision, request)
            case "POST", "commit", branch:
                return commits.commit(self.store, repository, branch, require_user(identity), request, bool(self.cas))
            case "POST", "branch", name:
                start = repository.resolve(request.json().get("startingPoint") or "main")
                self._new_reference(repository, repository.branches, name, start.sha)
            case "DELETE", "branch", name:
                if name == "main":
                    raise HubError(403, "the branch main can't be deleted")
                self._drop_reference(repository.branches, name)
            case "POST", "tag", revision:
                target = repository.resolve(revision)
                self._new_reference(repository, repository.tags, request.json()["tag"], target.sha)
            case "DELETE", "tag", name:
                self._drop_reference(repository.tags, name)
            case "PUT", "settings":
                self._settings(repository, request)
            case _:
                raise HubError(404, f"no such endpoint: {request.method} {request.path}")
        self.store.save()
        return json_answer({})

    def _settings(self, repository: Repository, request: Request) -> None:
        values = request.json()
        if "private" in values or "visibility" in values:
            repository.private = bool(values.get("private")) or values.get("visibility") == "private"
        if "gated" in values:
            repository.gated = bool(values["gated"])

    def _new_reference(self, repository: Repository, names: dict[str, str], name: str, sha: str) -> None:
        if not _REFERENCE.fullmatch(name) or ".." in name or name.startswith("refs/"):
            raise HubError(400, f"Invalid reference name: {name}")
        if name in names:
            raise HubError(409, f"Reference already exists: {name}")
        names[name] = sha

    def _drop_reference(self, names: dict[str, str], name: str) -> None:
        if name not in names:
            raise revision_not_found(name)
        del names[name]

    # ---- Objects: their addresses are secrets enough, as on the Hub ----

    def _object(self, request: Request) -> Answer:
        match request.method, *request.parts:
            case "PUT", "_lfs", oid:
                return self.large_files.put(oid, request.body)
            case "POST", "_lfs", oid, "complete":
                return self.large_files.complete(oid, request)
            case "PUT", "_lfs", oid, number:
                return self.large_files.put_part(oid, int(number), request.body)
        raise HubError(404, f"no such endpoint: {request.method} {request.path}")


def _split(parts: list[str]) -> tuple[str, str]:
    """The type and the name of a repository, from the beginning of a path."""
    if parts[0] in _KINDS and len(parts) == 3:
        return _KINDS[parts[0]], "/".join(parts[1:])
    return "model", "/".join(parts)
