"""Who may do what: users, their tokens and their organisations."""

from dataclasses import dataclass, field
from typing import Any

from hub_server.messages import HubError, repo_not_found
from hub_server.store import Repository

ALICE = "hf_aliceMayWriteEverythingOfHers00"
ALICE_READ = "hf_aliceMayOnlyRead000000000000000"
ALICE_FINE_GRAINED = "hf_aliceFineGrainedWithWrite000000"
ALICE_NO_WRITE = "hf_aliceFineGrainedWithoutWrite000"
BOB = "hf_bobIsAStranger00000000000000000"
CAROL = "hf_carolReadsInTheOrganisation0000"
INVALID = "hf_nobodyHasThisToken0000000000000"


@dataclass(frozen=True)
class Identity:
    """A token: whose it is, its role (read, write or fineGrained with permissions) and the owner's organisations."""

    user: str
    role: str
    organisations: dict[str, str] = field(default_factory=dict)
    permissions: tuple[str, ...] = ()

    def may_write_in(self, namespace: str) -> bool:
        if self.role == "read" or (self.role == "fineGrained" and "repo.write" not in self.permissions):
            return False
        return namespace == self.user or self.organisations.get(namespace) in ("write", "admin")

    def belongs_to(self, namespace: str) -> bool:
        return namespace == self.user or namespace in self.organisations

    def whoami(self) -> dict[str, Any]:
        access: dict[str, Any] = {"displayName": "test", "role": self.role, "createdAt": "2026-01-01T00:00:00.000Z"}
        if self.role == "fineGrained":
            entity = {"_id": self.user, "type": "user", "name": self.user}
            access["fineGrained"] = {
                "canReadGatedRepos": True,
                "global": [],
                "scoped": [{"entity": entity, "permissions": list(self.permissions)}],
            }
        return {
            "type": "user",
            "id": self.user,
            "name": self.user,
            "fullname": self.user.title(),
            "isPro": False,
            "orgs": [
                {"type": "org", "id": name, "name": name, "fullname": name.title(), "roleInOrg": role}
                for name, role in self.organisations.items()
            ],
            "auth": {"type": "access_token", "accessToken": access},
        }


_ACME = {"acme": "write"}
IDENTITIES = {
    ALICE: Identity("alice", "write", _ACME),
    ALICE_READ: Identity("alice", "read", _ACME),
    ALICE_FINE_GRAINED: Identity("alice", "fineGrained", _ACME, ("repo.content.read", "repo.write")),
    ALICE_NO_WRITE: Identity("alice", "fineGrained", _ACME, ("repo.content.read",)),
    BOB: Identity("bob", "write"),
    CAROL: Identity("carol", "write", {"acme": "read"}),
}


def identify(token: str | None) -> Identity | None:
    """The owner of a token, None without one.

    Raises:
        HubError: 401 for a token that nobody has, whatever is asked.
    """
    if token is None:
        return None
    if token not in IDENTITIES:
        raise HubError(401, "Invalid credentials in Authorization header")
    return IDENTITIES[token]


def require_user(identity: Identity | None) -> Identity:
    if identity is None:
        raise HubError(401, "Invalid username or password.")
    return identity


def check_read(repository: Repository, identity: Identity | None) -> None:
    """Raises HubError if the repository is private and the caller does not belong to its namespace."""
    if repository.private and not (identity and identity.belongs_to(repository.namespace)):
        raise repo_not_found(identity is not None)


def check_download(repository: Repository, identity: Identity | None) -> None:
    """As `check_read`, and for a gated repository: strangers see it, but not its files."""
    check_read(repository, identity)
    if repository.gated and not (identity and identity.belongs_to(repository.namespace)):
        message = f"Access to model {repository.name} is restricted and you are not in the authorized list."
        raise HubError(403 if identity else 401, message, "GatedRepo")


def check_write(repository: Repository, identity: Identity | None) -> None:
    check_read(repository, identity)
    if not require_user(identity).may_write_in(repository.namespace):
        raise HubError(403, "Forbidden: pass a token that may write to this repository")
