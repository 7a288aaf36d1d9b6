"""Whether a run can be published, found out before its first step, by one process for all."""

from __future__ import annotations

import torch
import torch.distributed as dist
from transformers.utils import logging

from hf_recycle.hub.repository import Refused, Repository
from hf_recycle.hub.retry import ASKING, limit_waiting, say

logger = logging.get_logger(__name__)


def check_repository(repository: Repository) -> str:
    """The full name of the repository, made sure of; as the user wrote it if the Hub can't be reached, with a warning.

    Raises:
        Refused: if nothing can ever be pushed there.
    """
    limit_waiting(ASKING)
    try:
        return repository.ensure()
    except Refused:
        raise
    except Exception as error:
        logger.warning(
            "The Hub can't be reached now (%s). Training starts; what it publishes to %s is kept in its output folder "
            "and pushed once the Hub answers.",
            say(error),
            repository.name,
        )
        return repository.name


def share(outcome: str | Refused | None, device: torch.device) -> str:
    """Tells all processes what process 0 found out: a name, or a refusal that each of them then raises.

    Args:
        outcome: on process 0; ignored on the others.
        device: one that the process group can send from.
    """
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        message = [(isinstance(outcome, Refused), str(outcome))]
        dist.broadcast_object_list(message, src=0, device=device)
        refused, text = message[0]
        outcome = Refused(text) if refused and not isinstance(outcome, Refused) else outcome if refused else text
    if isinstance(outcome, Refused):
        raise outcome
    return outcome
