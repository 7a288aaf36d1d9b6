"""The figures of a folder, drawn by another process: beside training, which would wait for Python's lock otherwise.

Measured once, on two cores with other programs running: a step of a tiny BERT of 12 layers took 99 ms alone and 294 ms
beside a thread that drew; 145 ms alone and 168 ms beside a process that did (medians).
"""

import functools
import os
import subprocess
import sys
import tempfile
from pathlib import Path

_CODE = "from hf_recycle.plots.beside import draw_here; draw_here()"
_PATIENCE = 300.0  # seconds; 15 to 25 were measured on two cores with nine programs on them, 158 with fourteen
_NICENESS = 5  # training goes first


def figures_beside(folder: Path, unigram_entropy: float | None = None) -> dict[str, bytes]:
    """What `figure_images` draws for the run in `folder`; at once if it was the last one asked for.

    Raises:
        RuntimeError: it can't be drawn, in a sentence.
    """
    try:
        changed = max(path.stat().st_mtime_ns for path in folder.glob("recycling_*"))
    except ValueError:
        raise RuntimeError(f"{folder} holds no recycling files to draw figures of") from None
    return dict(_drawn(folder.absolute(), unigram_entropy, changed))


@functools.lru_cache(maxsize=1)  # for a push that is tried again
def _drawn(folder: Path, unigram_entropy: float | None, changed: int) -> dict[str, bytes]:
    # What this process can import, that one can.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with tempfile.TemporaryDirectory() as output:
        entropy = [] if unigram_entropy is None else [str(unigram_entropy)]
        try:
            done = subprocess.run(
                [sys.executable, "-c", _CODE, str(folder), output, *entropy],
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=_PATIENCE,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"drawing takes longer than {_PATIENCE:.0f} s") from None
        if done.returncode:
            said = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
            raise RuntimeError(f"drawing failed: {said[0]}")
        return {path.name: path.read_bytes() for path in sorted(Path(output).iterdir())}


def draw_here() -> None:
    """The other process: draws the run of a folder into another folder; with the unigram entropy, if it is known."""
    if hasattr(os, "nice"):
        os.nice(_NICENESS)
    from hf_recycle.plots.run import figure_images
    from hf_recycle.records.history import RecyclingHistory

    folder, output, *entropy = sys.argv[1:]
    images = figure_images(RecyclingHistory.of_own_run(folder), unigram_entropy=float(entropy[0]) if entropy else None)
    for name, image in images.items():
        Path(output, name).write_bytes(image)
