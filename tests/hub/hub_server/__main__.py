"""Serve a store: `python -m hub_server --store FOLDER [--port N]`. Prints its address and runs until it is killed."""

import argparse
import threading

from hub_server.server import HubServer
from hub_server.store import Store

parser = argparse.ArgumentParser(prog="python -m hub_server")
parser.add_argument("--store", required=True, help="the folder that keeps the repositories")
parser.add_argument("--port", type=int, default=0)
arguments = parser.parse_args()
with HubServer(Store(arguments.store), port=arguments.port) as server:
    print(server.url, flush=True)
    threading.Event().wait()
