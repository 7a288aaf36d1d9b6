"""Large files: where to put them, in one piece or in parts, and whether they arrived."""

import hashlib
import math

from hub_server.messages import Answer, HubError, Request, json_answer
from hub_server.store import Store


class LargeFiles:
    """The LFS side of the server. Objects larger than `part_size` bytes go up in parts."""

    def __init__(self, store: Store, part_size: int):
        self.store = store
        self.part_size = part_size
        self._parts: dict[str, dict[int, bytes]] = {}

    def batch(self, name: str, request: Request) -> Answer:
        """Where to put each object; nothing for those that are there."""
        objects = []
        for wanted in request.json()["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"], "authenticated": True}
            if not self.store.has_blob(wanted["oid"]):
                entry["actions"] = {
                    "upload": self._upload(request.origin, wanted["oid"], wanted["size"]),
                    "verify": {"href": f"{request.origin}/{name}.git/info/lfs/objects/verify"},
                }
            objects.append(entry)
        return json_answer({"transfer": "multipart", "objects": objects})

    def _upload(self, origin: str, oid: str, size: int) -> dict:
        where = f"{origin}/_lfs/{oid}"
        if size <= self.part_size:
            return {"href": where}
        parts = math.ceil(size / self.part_size)
        header = {"chunk_size": str(self.part_size)}
        header |= {str(number): f"{where}/{number}" for number in range(1, parts + 1)}
        return {"href": f"{where}/complete", "header": header}

    def put(self, oid: str, content: bytes) -> Answer:
        """A whole object."""
        self._keep(oid, content)
        return Answer(200)

    def put_part(self, oid: str, number: int, content: bytes) -> Answer:
        self._parts.setdefault(oid, {})[number] = content
        return Answer(200, headers={"ETag": f'"{hashlib.md5(content).hexdigest()}"'})

    def complete(self, oid: str, request: Request) -> Answer:
        """Puts the parts of an object together."""
        parts = self._parts.get(oid, {})
        numbers = [part["partNumber"] for part in request.json()["parts"]]
        if sorted(parts) != sorted(numbers):
            raise HubError(400, "parts are missing")
        self._keep(oid, b"".join(parts[number] for number in sorted(parts)))
        del self._parts[oid]
        return json_answer({})

    def verify(self, request: Request) -> Answer:
        if not self.store.has_blob(request.json()["oid"]):
            raise HubError(404, "the object was not uploaded")
        return json_answer({})

    def _keep(self, oid: str, content: bytes) -> None:
        if hashlib.sha256(content).hexdigest() != oid:
            raise HubError(400, "the content does not have the SHA-256 that it was announced with")
        self.store.put_blob(content)
