"""Where a stream is, so that a resumed run need not read again what was read before."""

import copy
import io
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers.utils import logging

from hf_recycle.errors import UserError, first_line
from hf_recycle.internals.of_datasets import resumes_exactly

logger = logging.get_logger(__name__)

STREAM_STATE_FILE = "stream_state.pt"


def can_resume(stream: Any) -> bool:
    """Whether a stream has a state, and is exactly where it was when it is given back to it."""
    if not (hasattr(stream, "state_dict") and hasattr(stream, "load_state_dict")):
        return False
    return not isinstance(stream, datasets.IterableDataset) or resumes_exactly(stream)


class StreamState:
    """The states of a stream after its last few batches, by the number of examples read in the epoch.

    A loader reads ahead, so at a checkpoint the newest state is too new.

    Args:
        stream: one that can resume.
        every: examples of a batch.
    """

    def __init__(self, stream: Any, every: int) -> None:
        self._stream, self._every = stream, every
        self._states: deque[tuple[int, Any]] = deque(maxlen=4)
        self._start: tuple[int, Any] | None = None

    def iterate(self) -> Iterator[tuple[int, Any]]:
        """The stream's examples with their places. After `load`, the first are None, as many as were read before."""
        place, self._states = 0, deque(maxlen=4)
        if self._start is not None:
            (place, state), self._start = self._start, None
            self._stream.load_state_dict(state)
            yield from ((number, None) for number in range(place))
        for number, example in enumerate(self._stream, start=place):
            if (number + 1) % self._every == 0:
                self._states.append((number + 1, copy.deepcopy(self._stream.state_dict())))
            yield number, example

    def save(self, folder: str, batches: int) -> None:
        """Writes the state after so many batches of the epoch, if it is known and can be read again."""
        state = dict(self._states).get(batches * self._every)
        if state is None:
            return
        content = io.BytesIO()
        try:
            torch.save({"examples": batches * self._every, "state": state}, content)
            torch.load(io.BytesIO(content.getvalue()), weights_only=True)
        except Exception as error:  # a class of the user's may raise anything
            logger.warning_once(
                f"The state_dict of {type(self._stream).__name__} holds more than numbers, strings, tensors and "
                f"containers of them, so it is not saved ({first_line(error)}): a resumed run reads the stream again "
                "up to where it was."
            )
            return
        Path(folder, STREAM_STATE_FILE).write_bytes(content.getvalue())

    def load(self, folder: str, batches: int) -> None:
        """Lets the next epoch begin after so many batches, if that is what the folder's state says.

        Raises:
            UserError: if the file can't be read.
        """
        path = Path(folder, STREAM_STATE_FILE)
        if not path.is_file():
            return
        try:
            saved = torch.load(path, weights_only=True)
            examples, state = saved["examples"], saved["state"]
        except Exception as error:  # a damaged pickle may raise anything
            raise UserError(
                f"{path} is damaged ({type(error).__name__}): delete it, and the stream is read again."
            ) from None
        if examples == batches * self._every:
            self._start = examples, state
