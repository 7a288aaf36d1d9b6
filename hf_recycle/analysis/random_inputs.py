"""Random inputs that a model can compute with, the same every time."""

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from hf_recycle.errors import UserError

_AUDIO = 16_000  # samples: a second
_IMAGE = 64  # pixels of a side


def random_inputs(model: PreTrainedModel, batch: int, length: int) -> dict[str, Tensor]:
    """Tokens, at most `length` and as many as the model's positions allow, an image or a sound for each of `batch`
    samples: what the model takes.

    Raises:
        UserError: the model takes something else.
    """
    failure: Exception | None = None
    for inputs in _guesses(model, batch, length):
        inputs = {name: values.to(model.device) for name, values in inputs.items()}
        try:
            outputs(model, {name: values[:1] for name, values in inputs.items()})
        except Exception as error:  # of any kind: a forward pass with what it does not take
            failure = failure or error
        else:
            return inputs
    why = f" ({str(failure).strip().splitlines()[0][:150]})" if failure and str(failure).strip() else ""
    raise UserError(
        f"{type(model).__name__} takes {model.main_input_name}, and no random input that it computes with is known here"
        f"{why}: the smaller model could not be checked"
    )


@torch.inference_mode()
def outputs(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """The first tensor that a model gives, in float32; what it draws is the same every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        found = model(**inputs)
    return next(value for value in found.to_tuple() if isinstance(value, Tensor)).float()


def _guesses(model: PreTrainedModel, batch: int, length: int) -> Iterator[dict[str, Tensor]]:
    """All kinds of input together, then each alone: the main one first."""
    config = model.config
    guessed: dict[str, Tensor | None] = {
        "input_ids": _tokens(config.get_text_config(), batch, length),
        "pixel_values": _image(config, batch, model),
        "input_values": _normal((batch, _AUDIO), model.dtype),
        "input_features": _features(config, batch, model.dtype),
    }
    kinds = {name: values for name, values in guessed.items() if values is not None}
    together: dict[str, Tensor] = {name: kinds[name] for name in ("input_ids", "pixel_values") if name in kinds}
    main = {name: kinds[name] for name in kinds if name == model.main_input_name}
    guesses: list[dict[str, Tensor]] = [main, together, *({name: kinds[name]} for name in kinds)]
    for inputs in guesses:
        if not inputs:
            continue
        if "input_ids" in inputs:
            inputs = {**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])}
        if config.is_encoder_decoder and "input_ids" in kinds:
            inputs = {**inputs, "decoder_input_ids": kinds["input_ids"]}
        yield inputs


def _tokens(config: PreTrainedConfig, batch: int, length: int) -> Tensor | None:
    if getattr(config, "vocab_size", None) is None:
        return None
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None:
        # The RoBERTa family counts positions from its padding id.
        length = max(1, min(length, positions - (getattr(config, "pad_token_id", None) or 0) - 1))
    return torch.randint(config.vocab_size, (batch, length), generator=_generator())


def _image(config: PreTrainedConfig, batch: int, model: PreTrainedModel) -> Tensor | None:
    config = getattr(config, "vision_config", config)
    # Convolutional models name no size, and take any.
    size = getattr(config, "image_size", _IMAGE if model.main_input_name == "pixel_values" else None)
    if size is None:
        return None
    height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    return _normal((batch, getattr(config, "num_channels", 3), height, width), model.dtype)


def _features(config: PreTrainedConfig, batch: int, dtype: torch.dtype) -> Tensor | None:
    config = getattr(config, "audio_config", config)
    bins, frames = getattr(config, "num_mel_bins", None), getattr(config, "max_source_positions", 64)
    return None if bins is None else _normal((batch, bins, 2 * frames), dtype)


def _normal(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=_generator()).to(dtype)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
