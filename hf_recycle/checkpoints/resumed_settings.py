"""The settings that a resumed run goes on with: those that it began with, if they are still asked for."""

from typing import Any

from hf_recycle.methods.settings import METHODS, MagnitudeSettings, Settings
from hf_recycle.records.files import RecyclingFileError


def began_with(
    folder, config: dict[str, Any], current: dict[str, Any], max_steps: int, seed: int
) -> dict[str, Settings]:
    """The resolved settings of the methods that were on when a checkpoint was written, by prefix.

    A method that was on must go on as it was; one that was off may begin, and recording may change at any time. A
    number of steps that was given as a share of the training stays what it was in the training as it began.

    Args:
        folder: the checkpoint, for messages.
        config: of the checkpoint.
        current: the settings as they are given now, flat.
        max_steps, seed: of the training that goes on.

    Raises:
        RecyclingFileError: if a method was on with other settings, or the recorded ones are not allowed.
    """
    found: dict[str, Settings] = {}
    for method in METHODS:
        given_then, given_now = method.from_flat(config["arguments"]), method.from_flat(current)
        try:
            if method is MagnitudeSettings or not given_then.enabled:
                continue
            given_then.validate(method.prefix)
            began = method.from_flat(config["arguments"] | config.get("resolved", {}))
            began.validate(method.prefix)
            began = began.resolve(max_steps, seed)
        except (TypeError, ValueError) as error:
            raise RecyclingFileError(
                f"The checkpoint {folder} records settings that are not allowed: {error}"
            ) from None
        now = given_now.resolve(max_steps, seed)
        # A share of the steps stays what it was; a seed that is not given is that of the training, which may change.
        differing = [n for n in now.differing(began) if n == "seed" or n in given_now.differing(given_then)]
        if differing:
            pairs = ", ".join(
                f"{method.prefix}{name}={_shown(name, given_then, began)!r} (now {_shown(name, given_now, now)!r})"
                for name in differing
            )
            raise RecyclingFileError(
                f"The checkpoint {folder} was made with {pairs}: resume it with the same settings, or start a new run "
                "from its weights."
            )
        found[method.prefix] = began
    return found


def _shown(name: str, given: Settings, resolved: Settings) -> Any:
    value = getattr(given, name)
    return getattr(resolved, name) if value is None else value
