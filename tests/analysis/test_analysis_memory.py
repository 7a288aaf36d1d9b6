"""A checkpoint larger than the memory allowed to the process that analyses it."""

import json
import os
import struct
import subprocess
import sys

import numpy as np
import pytest

D_MODEL, D_FF, LAYERS = 2048, 8192, 3
TENSOR = 4 * D_MODEL * D_FF  # bytes

SCRIPT = """
import resource, sys
import torch
from hf_recycle.analysis.model import analyze
from hf_recycle.analysis.source import Source

def memory(name):
    lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return 1024 * int(lines[name].split()[0])

analyze(Source(sys.argv[1]))  # what is imported and allocated once
allowed = memory("VmData") + int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_DATA, (allowed, allowed))
blocks = analyze(Source(sys.argv[2])).blocks
print(len(blocks), *(int((block.magnitudes > 0).sum()) for block in blocks))
"""


def write_model(folder, d_model, d_ff, layers):
    """A sharded BERT whose feed-forward weights are mostly holes of the file: no disk is filled."""
    config = {
        "architectures": ["BertModel"],
        "model_type": "bert",
        "hidden_size": d_model,
        "intermediate_size": d_ff,
        "num_hidden_layers": layers,
        "num_attention_heads": 1,
        "vocab_size": 8,
        "max_position_embeddings": 8,
    }
    (folder / "config.json").write_text(json.dumps(config))
    places = {}
    for layer in range(layers):
        name, prefix = f"model-{layer}.safetensors", f"encoder.layer.{layer}"
        header, end = {}, 0
        shapes = {
            f"{prefix}.intermediate.dense.weight": (d_ff, d_model),
            f"{prefix}.intermediate.dense.bias": (d_ff,),
            f"{prefix}.output.dense.weight": (d_model, d_ff),
        }
        for key, shape in shapes.items():
            size = 4 * int(np.prod(shape))
            header[key] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
            end += size
            places[key] = name
        text = json.dumps(header).encode()
        with (folder / name).open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            start = file.tell()
            # The first ten neurons, and one row of the out-projection.
            file.write(np.random.default_rng(layer).normal(size=10 * d_model).astype(np.float32).tobytes())
            file.seek(start + header[f"{prefix}.output.dense.weight"]["data_offsets"][0])
            file.write(np.ones(d_ff, np.float32).tobytes())
            file.truncate(start + end)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_bounded_by_the_largest_tensor(tmp_path):
    small, large = tmp_path / "small", tmp_path / "large"
    for folder, sizes in ((small, (16, 64, 1)), (large, (D_MODEL, D_FF, LAYERS))):
        folder.mkdir()
        write_model(folder, *sizes)
    allowed = TENSOR
    total = sum(path.stat().st_size for path in large.iterdir())
    assert total > 5 * allowed

    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(small), str(large), str(allowed)],
        capture_output=True,
        text=True,
        check=False,
        # Every buffer on its own, given back when it is freed: what the allocator keeps varies from run to run.
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"},
    )

    assert done.returncode == 0, done.stderr[-3000:]
    blocks, *alive = map(int, done.stdout.split())
    assert blocks == LAYERS
    assert alive == [10] * LAYERS
