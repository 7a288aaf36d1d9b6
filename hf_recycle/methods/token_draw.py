"""Inputs of feed-forward blocks at tokens drawn in proportion to their loss, for births that begin with them.

Tokens are drawn without replacement, batch by batch: the ones that stay are those of the least −log(u) / loss, where u
is uniform in (0, 1) (Efraimidis & Spirakis 2006). u belongs to the sample: it does not matter which process sees it.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hf_recycle.engines.replica_checksum import process_count
from hf_recycle.neurons.blocks import FeedForward
from hf_recycle.utils.seeds import generator_for


def losses_of_tokens(model: nn.Module, batch: Mapping[str, Any], argument: str) -> Tensor:
    """What a model that is not known to be a language model returns as "token_losses": float, `(batch, ...)`.

    Raises:
        ValueError: if it returns none.
    """
    device = next(model.parameters()).device
    outputs = model(**{name: value.to(device) if hasattr(value, "to") else value for name, value in batch.items()})
    losses = outputs.get("token_losses") if isinstance(outputs, Mapping) else None
    if losses is None:
        raise ValueError(
            f"{argument} needs the loss of each token, and the forward of {type(model).__name__} returns none: let it "
            'return {"loss": ..., "token_losses": ...}, or train a masked or causal language model with a '
            "RecyclingTrainer."
        )
    return losses


class TokenDraw:
    """The drawn tokens of one process, and what the blocks make of them.

    Args:
        blocks: whose inputs are kept.
        count: how many tokens are drawn.
        seed, step: the draw is a function of them and of the samples.
        argument: what asks for it, for messages.
    """

    def __init__(self, blocks: list[FeedForward], count: int, seed: int, step: int, argument: str):
        self._blocks, self._count, self._seed, self._step, self._argument = blocks, count, seed, step, argument
        self._keys = torch.empty(0, dtype=torch.float64)
        self._inputs = [torch.empty(0, block.in_slices[0].width, device=block.out_slice.device) for block in blocks]
        self._seen: dict[int, Tensor] = {}

    def see(self, number: int, module: nn.Module, args: tuple) -> None:
        """A hook on the in-projection of block `number`: notes its input in the current batch."""
        values = args[0].detach()
        self._seen[number] = values.movedim(1, -1) if isinstance(module, nn.Conv1d | nn.Conv2d) else values

    def take(self, losses: Tensor, first: int) -> None:
        """Draws among the tokens of a batch and those drawn before.

        Args:
            losses: `(batch, ...)`, zero for a token that is not to be drawn.
            first: number of the batch's first sample among all extra samples.

        Raises:
            ValueError: if a block has other tokens.
        """
        for number, block in enumerate(self._blocks):
            found = self._seen[number].shape[:-1] if number in self._seen else ()
            if found != losses.shape:
                raise ValueError(
                    f"{self._argument} needs the input of {block.name} at every token that has a loss, "
                    f"{tuple(losses.shape)}, and it has some of shape {tuple(found)}: choose another one."
                )
        lots = torch.cat([self._lots(first + row, losses[row].numel()) for row in range(len(losses))])
        weights = losses.detach().cpu().double().flatten()
        # A loss that is not finite is drawn first, and makes an input that is not finite: then nothing will be done.
        keys = torch.cat([self._keys, torch.where(weights.isfinite(), lots / weights, 0.0)])
        stay = keys.argsort(stable=True)[: min(self._count, int(keys.isfinite().sum()))]
        old, new = stay[stay < len(self._keys)], stay[stay >= len(self._keys)] - len(self._keys)
        poison = torch.where(weights[new].isfinite(), 1.0, torch.nan).unsqueeze(1)
        for number, kept in enumerate(self._inputs):
            rows = self._seen.pop(number).flatten(0, -2)
            rows = rows[new.to(rows.device)].float() * poison.to(rows.device, torch.float32)
            self._inputs[number] = torch.cat([kept[old.to(kept.device)], rows])
        self._keys = torch.cat([keys[: len(self._keys)][old], keys[len(self._keys) :][new]])

    def _lots(self, sample: int, tokens: int) -> Tensor:
        """−log(u) for the tokens of a sample, float64 `(tokens,)`."""
        generator = generator_for(self._seed, self._step, sample, "token")
        return -torch.log1p(-torch.rand(tokens, dtype=torch.float64, generator=generator))

    def drawn(self) -> list[Tensor]:
        """For each block the inputs at the tokens drawn, float32 `(n, d_model)` on its device, in the order of the
        draw; to be called on every process, on which they are the same."""
        processes = process_count()
        several, rank = processes > 1, dist.get_rank() if processes > 1 else 0
        # Every process fills in its own part, and a sum puts the parts together.
        keys = torch.zeros(processes, self._count, dtype=torch.float64)
        keys[rank] = torch.inf
        keys[rank, : len(self._keys)] = self._keys
        keys = _summed(keys.to(self._inputs[0].device)).cpu().flatten() if several else keys.flatten()
        order = keys.argsort(stable=True)[: min(self._count, int(keys.isfinite().sum()))]
        mine = order // self._count == rank
        found = []
        for kept in self._inputs:
            rows = kept.new_zeros(len(order), kept.shape[1])
            rows[mine.to(rows.device)] = kept[(order[mine] % self._count).to(kept.device)]
            found.append(_summed(rows) if several else rows)
        return found


def _summed(values: Tensor) -> Tensor:
    dist.all_reduce(values)
    return values
