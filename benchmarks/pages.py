"""Parts of pages that are made from code or measured."""


def renew_between(text: str, name: str, content: str) -> str:
    """`text` with what lies between the markers `<!-- name: begin -->` and `<!-- name: end -->` replaced."""
    before, begin, rest = text.partition(f"<!-- {name}: begin -->")
    _, end, after = rest.partition(f"<!-- {name}: end -->")
    if not begin or not end:
        raise ValueError(f"the text has no <!-- {name}: begin --> ... <!-- {name}: end -->")
    return f"{before}{begin}\n{content}\n{end}{after}"
