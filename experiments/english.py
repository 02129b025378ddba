"""A few million words of real English, as ids of a vocabulary ordered by frequency."""

import gzip
import re
import zlib
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.cache import user_cache
from experiments.command import BadInput
from experiments.fetching import RoadClosed, unpack_debian_package

PACKAGE = "dict-gcide"  # the definitions and quotations of Webster's of 1913
DICTIONARY = Path("usr/share/dictd/gcide.dict.dz")
UNKNOWN = "<unknown>"
# Pronunciation, etymology and tags, and the author of a quotation are not prose.
NOT_PROSE = re.compile(r"\\[^\\\n]*\\|\[[^\]]*\]|--[^\n]*")
WORD = re.compile(r"[a-z]+(?:'[a-z]+)?|[.;]")


class English(NamedTuple):
    """The id of each word of a text; ids grow as words get rarer, 0 is unknown."""

    ids: np.ndarray
    vocabulary: list[str]
    source: str


def load(text: Path | None, classes: int) -> English:
    """The words of a file, or of Debian's dictionary, which is fetched if need be.

    Raises:
        BadInput: there is no such file, or no dictionary and no way to get it.
    """
    prose, source = _dictionary() if text is None else _file(text)
    return as_ids(WORD.findall(prose.lower()), classes, source)


def as_ids(words: list[str], classes: int, source: str) -> English:
    """All but the most frequent words become unknown."""
    frequent = [word for word, _ in Counter(words).most_common(classes - 1)]
    vocabulary = [UNKNOWN, *frequent]
    places = {word: i for i, word in enumerate(vocabulary)}
    ids = np.array([places.get(word, 0) for word in words], np.int32)
    return English(ids, vocabulary, source)


def _file(path: Path) -> tuple[str, str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace"), path.name
    except OSError as error:
        raise BadInput(
            f"{path} cannot be read ({error.strerror}): give a file of words with "
            "--text, or leave it out."
        ) from error


def _dictionary() -> tuple[str, str]:
    folder = user_cache() / PACKAGE
    places = [Path("/") / DICTIONARY, folder / DICTIONARY]
    if not any(place.is_file() for place in places):
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            unpack_debian_package(PACKAGE, folder)
        except (RoadClosed, OSError) as error:
            raise BadInput(
                f"There is no English text: Debian's package {PACKAGE} is not "
                f"installed and cannot be fetched ({error}). Give a file of your own "
                f"with --text FILE."
            ) from error
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise BadInput(f"{folder} holds no {DICTIONARY}: delete it and try again.")
    try:
        text = gzip.decompress(path.read_bytes()).decode("utf-8", errors="replace")
    except (OSError, EOFError, zlib.error) as error:
        raise BadInput(f"{path} is damaged: delete {folder} and try again.") from error
    return NOT_PROSE.sub(" ", text), f"Debian's package {PACKAGE}"
