# SPDX-License-Identifier: Apache-2.0
"""A corpus of real English that is already on the machine: the documentation inside Python.

Docstrings and longer comments of the standard library's source files (read with `ast`, nothing is
imported), the language reference that `help()` shows, and the text files that ship with Python;
2.7 MB (Python 3.12), one document per module, reference topic or file. Pick it for demonstrations
and tests that must train on real text without a download. Building takes about 3 s. The text
depends on the Python version, so its fingerprint belongs into every result.
"""

import ast
import hashlib
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path

SKIPPED_FOLDERS = frozenset(
    ("test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__")
)
FORMAT = 1
MIN_CHARACTERS = 40
MIN_PROSE = 0.72


# Training a tokenizer and tokenising read the corpus one after the other.
@lru_cache(maxsize=2)
def documents(root: Path | None = None) -> tuple[str, ...]:
    """Return the documents, in the order of their file names, without repeated pieces."""
    root = root or stdlib_folder()
    seen: set[str] = set()
    found = []
    for path in _files(root):
        name = path.relative_to(root).as_posix()
        for title, pieces in _pieces(path, name):
            kept = list(_unseen(map(clean, pieces), seen))
            if kept:
                found.append(f"{title}\n\n" + "\n\n".join(kept) + "\n")
    return tuple(found)


def fingerprint(root: Path | None = None) -> str:
    """Return the sha256 of the files the corpus is made from; 20 times cheaper than building it."""
    root = root or stdlib_folder()
    digest = hashlib.sha256(f"corpus format {FORMAT}\0".encode())
    for path in _files(root):
        data = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()}\0{len(data)}\0".encode() + data)
    return digest.hexdigest()


def stdlib_folder() -> Path:
    """Return the folder of the standard library's source files."""
    return Path(sysconfig.get_paths()["stdlib"])


def _files(root: Path) -> list[Path]:
    paths = (*root.rglob("*.py"), *root.rglob("*.txt"))
    inside = (p for p in paths if not SKIPPED_FOLDERS & set(p.relative_to(root).parts[:-1]))
    return sorted(inside, key=lambda path: path.relative_to(root).as_posix())


def _pieces(path: Path, name: str) -> Iterator[tuple[str, Iterable[str]]]:
    """Yield (title, pieces of text) for each document of a file."""
    source = path.read_bytes().decode("utf-8", errors="replace")
    if path.suffix == ".txt":
        yield path.stem.replace("_", " "), [source] if is_prose(source) else []
        return
    with warnings.catch_warnings():
        # Invalid escapes in old modules are not our concern.
        warnings.simplefilter("ignore")
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            return
    if name == "pydoc_data/topics.py":
        yield from ((topic, [text]) for topic, text in sorted(_topics(tree).items()))
        return
    module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    yield f"The module {module}", [*_docstrings(tree), *_comments(source)]


def _topics(tree: ast.Module) -> dict[str, str]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            return ast.literal_eval(node.value)
    return {}


def _docstrings(tree: ast.Module) -> Iterator[str]:
    holders = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, holders):
            text = ast.get_docstring(node)
            if text and is_prose(text):
                yield text


def _comments(source: str) -> Iterator[str]:
    """Yield blocks of whole-line comments that read like prose, not like disabled code."""
    for block in re.findall(r"(?:^[ \t]*#.*\n){2,}", source, flags=re.MULTILINE):
        lines = [re.sub(r"^[ \t]*#+ ?", "", line) for line in block.splitlines()]
        text = "\n".join(lines)
        if is_prose(text) and not _is_code(text):
            yield text


def _is_code(text: str) -> bool:
    try:
        ast.parse(text)
    except (SyntaxError, ValueError):
        return False
    return True


def is_prose(text: str) -> bool:
    """Tell whether text is long enough and mostly words of letters."""
    words = text.split()
    if len(text) < MIN_CHARACTERS or len(words) < 6:
        return False
    plain = sum(1 for word in words if word.strip(".,;:!?()\"'`").isalpha())
    return plain / len(words) >= MIN_PROSE


def clean(text: str) -> str:
    """Drop control characters and rulers, trailing blanks and repeated empty lines."""
    text = re.sub(r"[^\S\n]+$", "", text.replace("\xa0", " ").expandtabs(4), flags=re.MULTILINE)
    text = re.sub(r"[^\n\x20-\x7e\xa0-\U0010ffff]", "", text)
    text = re.sub(r"^[ ]*([-=*#~_+.])\1{7,}[ ]*\n?", "", text, flags=re.MULTILINE)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def _unseen(texts: Iterable[str], seen: set[str]) -> Iterator[str]:
    for text in texts:
        if text and text not in seen:
            seen.add(text)
            yield text
