"""A Hub for the tests: a local server that speaks the protocol of the Hugging Face Hub, with faults on request.

`HubServer` runs in a thread; `python -m hub_server --store FOLDER` runs it as a process of its own.
"""

from hub_server.access import ALICE, ALICE_FINE_GRAINED, ALICE_NO_WRITE, ALICE_READ, BOB, CAROL, INVALID
from hub_server.faults import Fault
from hub_server.server import HubServer
from hub_server.store import Store

__all__ = [
    "ALICE",
    "ALICE_FINE_GRAINED",
    "ALICE_NO_WRITE",
    "ALICE_READ",
    "BOB",
    "CAROL",
    "INVALID",
    "Fault",
    "HubServer",
    "Store",
]
