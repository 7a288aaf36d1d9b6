"""Names of blocks that fit into a figure or a line."""

from collections.abc import Sequence


def short_names(blocks: Sequence[str], width: int = 28) -> dict[str, str]:
    """Names without the parts all blocks share: {block: short name of at most `width` characters}.

    "encoder.layer.0.ff", "encoder.layer.1.ff" become "layer.0", "layer.1": the last shared word in front of a
    number stays. Names that are still too long lose their middle.
    """
    parts = [block.split(".") for block in blocks]
    shared = 0
    while len(blocks) > 1 and all(len(p) > shared + 1 and p[shared] == parts[0][shared] for p in parts):
        shared += 1
    while len(blocks) > 1 and all(len(p) > shared + 1 and p[-1] == parts[0][-1] for p in parts):
        parts = [p[:-1] for p in parts]
    if shared and any(p[shared].isdigit() for p in parts):
        shared -= 1
    return {block: _clip(".".join(p[shared:]), width) for block, p in zip(blocks, parts, strict=True)}


def _clip(name: str, width: int) -> str:
    if len(name) <= width:
        return name
    half = (width - 1) // 2
    return f"{name[: width - 1 - half]}…{name[-half:]}"
