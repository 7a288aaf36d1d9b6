"""Where the packaged recipes lie."""

from pathlib import Path


def recipe_root() -> Path:
    """The folder of the packaged recipes: inside an installed package, or at the top of a checkout."""
    package = Path(__file__).resolve().parent.parent
    packaged = package / "recipes"
    return packaged if packaged.is_dir() else package.parent / "recipes"
