"""The arguments that `RecyclingArguments` adds to `TrainingArguments`. `--help` reads them without torch."""

from dataclasses import dataclass, field, make_dataclass
from typing import Any

from hf_recycle.methods.presets import PRESETS
from hf_recycle.methods.settings import METHODS, flat_fields

# The settings of every method under flat names: `RecyclingSettings.steps` is `recycle_steps`.
_OfMethods: Any = make_dataclass(
    "MethodArguments",
    [item for method in METHODS for item in flat_fields(method)],
    repr=False,  # that of TrainingArguments, which hides tokens
    namespace={"__module__": __name__},
)


@dataclass(repr=False)
class OwnArguments(_OfMethods):
    """The settings of the methods, and what every training of a `RecyclingTrainer` can have beside them."""

    preset: str | None = field(
        default=None,
        metadata={
            "help": "Settings of methods to begin with: article, the article's method, or recommended, which recycles "
            "dead and dormant neurons if there are enough. An argument that is given wins; in Python, one that "
            "differs from its default.",
            "choices": PRESETS,
        },
    )
    masked_head: bool = field(
        default=True,
        metadata={"help": "Compute the head of a masked language model on masked positions only: same loss, faster."},
    )
    chunked_head: bool = field(
        default=True,
        metadata={
            "help": "Compute the head of a causal language model in chunks of tokens: the same loss, and memory for "
            "the logits of one chunk. Off with masked_head=False too."
        },
    )
    recompute_activations: bool = field(
        default=True,
        metadata={
            "help": "Compute FF activations again in the backward pass instead of keeping them beside their "
            "pre-activations: the same numbers, less memory. Not with torch_compile, which decides that itself, "
            "gradient checkpointing or ZeRO-3."
        },
    )
    onednn_linear: bool = field(
        default=False,
        metadata={
            "help": "On a CPU, compute float32 linear layers by oneDNN while training, not by PyTorch's usual library: "
            "about twice as fast on AMD's processors from Zen 5 on; sums come in another order, so last digits differ. "
            "Not with torch_compile or DeepSpeed."
        },
    )
    deterministic_masking: bool | None = field(
        default=None,
        metadata={
            "help": "Masks as a pure function of (seed, pass over the data, sample), so that a resumed run sees the "
            "masks of an uninterrupted one. None: yes, unless every method and our head are off; then the collator "
            "is left as it is, and training is that of the stock Trainer."
        },
    )
    ff_pattern: str | None = field(
        default=None,
        metadata={
            "help": "Linear layers of the feed-forward blocks, for a model of unknown layout: 'fc1 -> fc2', "
            "'gate + up -> down' or 'fused:Wi -> Wo'."
        },
    )
    ff_blocks: str | None = field(
        default=None,
        metadata={
            "help": "Of a composite model, the part whose feed-forward blocks are meant, by a word of its name: "
            "vision, language, encoder, decoder, ...; None: all parts."
        },
    )
    verify_checkpoint: bool = field(
        default=False,
        metadata={
            "help": "Also keep checksums of files over 64 MiB (weights, optimizer) with each checkpoint, which takes "
            "about a second per GB. What has a checksum is compared when training resumes; of other files the size is."
        },
    )
    trust_pickled_checkpoint: bool = field(
        default=False,
        metadata={
            "help": "Resume from a repository of the Hub also where DeepSpeed or torch.distributed.checkpoint have to "
            "unpickle the shards of its checkpoint: whoever wrote them can then run any code on this machine."
        },
    )

    hub_tag_steps: bool = field(
        default=False,
        metadata={"help": "Tag the commit of each published checkpoint as step-N. With push_to_hub."},
    )
    hub_license: str | None = field(
        default=None,
        metadata={"help": "License of the model, for its card, as the Hub names it: apache-2.0, mit, cc-by-4.0, ..."},
    )
    hub_language: list[str] | None = field(
        default=None,
        metadata={"help": "Languages of the training data, for the model's card, by their ISO 639 codes: en, de, ..."},
    )
