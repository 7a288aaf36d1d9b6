"""Whether a run can be published, found out before its first step."""

from __future__ import annotations

from transformers.utils import logging

from hf_recycle.hub.deadline import Deadline
from hf_recycle.hub.push.repository import Refused, Repository
from hf_recycle.hub.retry import say

logger = logging.get_logger(__name__)


def check_repository(repository: Repository) -> str:
    """The full name of the repository, made sure of; as the user wrote it if the Hub can't be reached, with a warning.

    Raises:
        Refused: if nothing can ever be pushed there.
    """
    try:
        return repository.ensure(Deadline(repository.policy.start_patience))
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
