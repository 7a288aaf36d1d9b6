"""The built-in corpus: Python's own documentation, which is on every machine that can run this package.

It is made of the help topics (`pydoc_data.topics`) and of the docstrings of the standard library, cut into
paragraphs and cleaned of what is not prose. The text depends on the Python version, on nothing else.
"""

import ast
import functools
import hashlib
import re
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

VALIDATION_SHARE = 0.05

# Left out: not part of the standard library, absent on some distributions, or mostly generated.
_SKIPPED_FOLDER = re.compile(
    r"(?:site|dist)-packages|tests?|idle_test|idlelib|lib2to3|turtledemo|ensurepip|pydoc_data|config-.*"
)
# Doctests, grammar rules, tables, signatures, log output: a paragraph with one of these is not prose.
_NOT_PROSE = re.compile(r">>>|\.\.\. |::=|\+--|==|--|\| |\|$|__\w+__\(self|\\n|\$ |[{}]|</|/>")
_WORD = re.compile(r"[A-Za-z]+(?:'[a-z]+)?")
_FUNCTION_WORD = re.compile(
    r"\b(?:the|an?|of|to|is|are|be|and|or|in|it|for|if|that|this|with|as|on|by|from|not|at|can|will|when|which|was)\b",
    re.IGNORECASE,
)


@functools.cache
def builtin_corpus() -> tuple[list[str], list[str]]:
    """The paragraphs to train on and those to validate on, about 95% and 5%.

    A paragraph's side is decided by a hash of its text, so that it stays there whatever surrounds it. The
    order is that of the documents: neighbours in a list were neighbours in the text.

    Raises:
        RuntimeError: this Python was installed without its documentation and sources.
    """
    train: list[str] = []
    validation: list[str] = []
    seen = set()
    for paragraph in _paragraphs(_documents()):
        key = paragraph.casefold()
        if key in seen:
            continue
        seen.add(key)
        (validation if _is_validation(paragraph) else train).append(paragraph)
    if not train or not validation:
        raise RuntimeError(
            "the built-in corpus is empty: this Python has neither its help topics nor the sources of its standard "
            "library; pass train_file or dataset_name instead"
        )
    return train, validation


@functools.cache
def corpus_fingerprint() -> str:
    """A hash of what the corpus is made of, which is had without making it."""
    digest = hashlib.sha256()
    for part in (*(topic.encode() for topic in _help_topics()), *(path.read_bytes() for path in _sources())):
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()


def _is_validation(paragraph: str) -> bool:
    digest = hashlib.sha256(paragraph.encode()).digest()
    return int.from_bytes(digest[:4], "big") < VALIDATION_SHARE * 2**32


def _documents() -> Iterator[str]:
    yield from _help_topics()
    for path in _sources():
        yield from _docstrings(path)


def _sources() -> Iterator[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        if path.is_file() and not any(map(_SKIPPED_FOLDER.fullmatch, path.relative_to(root).parts[:-1])):
            yield path


def _help_topics() -> Iterator[str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions package it apart
        return
    for name in sorted(topics):
        yield topics[name]


def _docstrings(path: Path) -> Iterator[str]:
    """The docstrings of one source file, in the order of the file."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):  # templates and samples of broken code
        return
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield text
        if isinstance(node, ast.stmt | ast.Module):  # expressions hold no docstring: three times faster
            pending.extend(reversed(list(ast.iter_child_nodes(node))))


def _paragraphs(documents: Iterable[str]) -> Iterator[str]:
    for document in documents:
        for block in re.split(r"\n\s*\n", document):
            paragraph = " ".join(block.split())
            if _is_prose(paragraph):
                yield paragraph


def _is_prose(paragraph: str) -> bool:
    """Whether it reads as English: words, mostly, held together by the small words English needs."""
    if _NOT_PROSE.search(paragraph):
        return False
    words = _WORD.findall(paragraph)
    if len(words) < 5 or sum(map(len, words)) < 0.7 * len(paragraph.replace(" ", "")):
        return False
    return len(_FUNCTION_WORD.findall(paragraph)) >= 0.12 * len(words)
