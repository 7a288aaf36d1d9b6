"""Which feed-forward neurons of a model are small? A table of its layers, and the share of small neurons as a figure.

python examples/analyze_model.py google/bert_uncased_L-2_H-128_A-2 figures
"""

import sys
from pathlib import Path

from transformers import AutoModel

from hf_recycle import neuron_magnitudes
from hf_recycle.plots.style import line_style, one_panel, save


def main(model_name: str, folder: str) -> None:
    magnitudes = neuron_magnitudes(AutoModel.from_pretrained(model_name))  # {block: float32 (d_ff,)}
    figure, panel = one_panel(3.0, model_name, "share of the neurons of a layer", "magnitude over the layer's median")
    print(f"{'block':<40} {'neurons':>8} {'median':>8} {'below half of it':>17}")
    for number, (block, values) in enumerate(magnitudes.items()):
        median = values.median()
        print(f"{block:<40} {len(values):>8,} {median:>8.3f} {(values < median / 2).float().mean():>17.1%}")
        shares = [(rank + 0.5) / len(values) for rank in range(len(values))]
        panel.plot(shares, (values.sort().values / median).tolist(), **line_style(number), label=block)
    for path in save(figure, Path(folder, "magnitudes")):
        print(path)


if __name__ == "__main__":
    main(*sys.argv[1:])
