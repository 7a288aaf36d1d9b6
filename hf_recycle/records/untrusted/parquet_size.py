"""How much memory a parquet file takes once read, found out in a process of its own.

A few kilobytes may expand to gigabytes, and nothing in the file tells: Arrow decodes what the pages hold, whatever the
footer claims of them. Some damaged footers even end the process that looks at them. So another process reads the file
first, and ends itself as soon as Arrow has allocated too much.
"""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

_SECONDS = 120
_TOO_LARGE = 3


def parquet_problem(path: Path, most: int) -> str | None:
    """What keeps a parquet file from being read within `most` bytes; None if nothing does.

    A file that Arrow refuses with an error is no problem here: whoever reads it then says what is wrong.
    """
    # As a script: importing the package takes seconds.
    command = [sys.executable, __file__, str(path), str(most)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return f"it could not be read within {_SECONDS} seconds"
    if done.returncode == _TOO_LARGE:
        return f"it has {path.stat().st_size:,} bytes and expands to more than {most >> 20:,} MiB"
    return "it can't be read as parquet" if done.returncode < 0 else None  # a signal ended the process


def _read(path: str, most: int) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    def watch() -> None:
        while pa.default_memory_pool().bytes_allocated() <= most:
            time.sleep(0.002)
        os._exit(_TOO_LARGE)

    threading.Thread(target=watch, daemon=True).start()
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        if file.read().nbytes > most:
            os._exit(_TOO_LARGE)


if __name__ == "__main__":
    _read(sys.argv[1], int(sys.argv[2]))
