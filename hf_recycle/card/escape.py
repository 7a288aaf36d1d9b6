"""Texts of unknown origin into Markdown."""

import re

# What Markdown or HTML could take for markup. An underscore between letters is not among them.
_MARKUP = re.compile(
    r"[&<>|*`\[\]\\~$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|:(?=//)|@"  # anywhere
    r"|^[-+=#](?=\W|$)|^\d+[.)](?=\s|$)"  # at the start of a line
)
_PLAIN = re.compile(r"[\w .,:/+=()%\-]*", re.ASCII)


def one_line(text: object) -> str:
    """The text without line ends, control characters and what turns the direction of writing."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())


def markdown_text(text: object) -> str:
    """Text that shows as it is: character references never act as markup, in a table's cell neither."""
    return _MARKUP.sub(lambda match: "".join(f"&#{ord(c)};" for c in match[0]), one_line(text))


def markdown_code(text: object) -> str:
    """The same in the typeface of code."""
    line = one_line(text)
    if not line:
        return ""
    return f"`{line}`" if _PLAIN.fullmatch(line) else f"<code>{markdown_text(line)}</code>"
