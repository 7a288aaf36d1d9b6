"""Whether what methods change will be in the checkpoints: a PEFT model saves its adapter only."""

import sys

from torch import nn

from hf_recycle.neurons.blocks import FeedForward


def check_weights_are_saved(model: nn.Module, blocks: list[FeedForward]) -> None:
    """Refuses a PEFT model that trains feed-forward weights which its saved adapter lacks.

    Raises:
        ValueError: naming the first such block and what to do.
    """
    peft = sys.modules.get("peft")  # whoever made such a model has imported it
    if peft is None or not isinstance(model, peft.PeftModel):
        return
    # The parameters themselves, because what is sharded has no address.
    parameters = model.state_dict(keep_vars=True)
    saved = {
        id(tensor)
        for adapter in model.peft_config
        for tensor in peft.get_peft_model_state_dict(model, parameters, adapter, save_embedding_layers=False).values()
    }
    for block in blocks:
        for piece in block.slices:
            if piece.parameter.requires_grad and id(piece.parameter) not in saved:
                raise ValueError(
                    f"The weights of block {block.name!r} are trained, but checkpoints of this PEFT model would hold "
                    "its adapter without them, and what happens to neurons would be lost: name their layers in the "
                    "adapter's modules_to_save, or train the model without PEFT."
                )
