"""Features of a published dictionary -> their pages and labels on Neuronpedia. The one door to it.

A label is text that a language model wrote about a feature's strongest activations: a name to read
a table by, no evidence. It is therefore never waited for long and never missed: without the client
(extra `neuronpedia`), without a network, or without an explanation on the site there is none.

Labels that came are kept in a JSONL file, by model, source and feature. A key, where there is one,
comes from the environment, NEURONPEDIA_API_KEY; reading features needs none. The client, when it
is imported, reads a `.env` file into the environment.
"""

from __future__ import annotations

import io
import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any

from fusion_lens.dictionaries import Card
from fusion_lens.errors import DictionaryError, InputFileError, OutputError
from fusion_lens.judge_cache import ReplyCache

_SITE = "https://www.neuronpedia.org"
# model/source, as in gpt2-small/6-res-jb; no part of a path that leads elsewhere
_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)

_LONGEST_CONNECT = 3.0
_LONGEST_LABEL = 300
# a run asks for the labels of many dictionaries: an unreachable site is not waited for each time
_PAUSE = 60.0
_FAILED_AT: list[float] = []

_LOG = logging.getLogger(__name__)


def dashboard_url(neuronpedia_id: str, feature: int) -> str:
    """The page of a feature; `neuronpedia_id` is MODEL/SOURCE, as a `Card` gives it.

    Raises:
        DictionaryError: if it is of another form, or the feature below 0.
    """
    if not _ID.fullmatch(neuronpedia_id) or feature < 0:
        raise DictionaryError(
            "neuronpedia_id must be MODEL/SOURCE, as in gpt2-small/6-res-jb, and feature at least "
            f"0, but got {neuronpedia_id!r} and {feature}."
        )
    return f"{_SITE}/{neuronpedia_id}/{feature}"


def published_labels(
    card: Card,
    features: Iterable[int],
    *,
    cache: str | Path | None = None,
    timeout: float = 10.0,
) -> dict[int, str]:
    """The labels of those features that have one, in the order given; one line each.

    `timeout` is in seconds, for all requests together; 0 reads the cache alone. A feature that was
    not reached is absent, and asked for by the next call, but not within a minute of a site that
    did not answer or refused to. `cache` is a JSONL file; the default is in the user's cache
    folder, and a fault of that one is no error.

    Raises:
        DictionaryError: if the dictionary has no such feature.
        InputFileError: if `cache` is a file of another kind.
        OutputError: if it cannot be written.
    """
    wanted = list(dict.fromkeys(features))
    if wanted and not 0 <= min(wanted) <= max(wanted) < card.d_sae:
        raise DictionaryError(
            f"features of {card.name} must be 0 to {card.d_sae - 1}, "
            f"but got {min(wanted)} to {max(wanted)}."
        )
    source = card.neuronpedia_id or ""
    if not wanted or not _ID.fullmatch(source):
        _LOG.debug("no labels: %s has no usable Neuronpedia id (%r)", card.name, source)
        return {}
    tolerated = () if cache is not None else (InputFileError, OutputError)
    kept = ReplyCache(None)
    with suppress(*tolerated):
        kept = ReplyCache(_default_cache() if cache is None else Path(cache))
    found = {i: _line(kept.get(f"{source}/{i}") or "") for i in wanted}
    for feature, label in _fetched(source, [i for i in wanted if not found[i]], timeout):
        found[feature] = label
        with suppress(*tolerated):
            kept.put(f"{source}/{feature}", label)
    return {feature: label for feature, label in found.items() if label}


def _fetched(source: str, features: list[int], timeout: float) -> Iterator[tuple[int, str]]:
    """What the site has, as it comes; ends at the first sign that it cannot be reached."""
    deadline, answered = time.monotonic() + timeout, False
    if not features or any(time.monotonic() - failed < _PAUSE for failed in _FAILED_AT):
        return
    try:
        get = _client()
        for feature in features:
            left = deadline - time.monotonic()
            if left <= 0:
                _LOG.debug("no more labels: %g s are over", timeout)
                return
            label = _label(get(f"{source}/{feature}", left), feature)
            answered = True
            if label:
                yield feature, label
    except ImportError:
        _LOG.debug("no labels: pip install 'fusion-lens[neuronpedia]' brings the client")
    except Exception as error:
        # whatever the client raises is a label that is not there; its text may quote the key
        _LOG.debug("no labels: Neuronpedia gave %s", type(error).__name__)
        # a site that answered until the time was over can be asked again
        if not answered or time.monotonic() < deadline:
            _FAILED_AT[:] = [time.monotonic()]


def _client() -> Callable[[str, float], Any]:
    """The site's record of MODEL/SOURCE/FEATURE, within so many seconds; None if it has none.

    Raises:
        ImportError: if the client is not installed.
    """
    from neuronpedia import SAEFeatureRequest
    from requests import HTTPError

    key = os.environ.get("NEURONPEDIA_API_KEY")
    # it will not be made without a key, and sends no header where there is none
    request = SAEFeatureRequest(api_key=key or "none")
    request.api_key = key

    def get(uri: str, seconds: float) -> Any:
        # not SAEFeature.get: it waits for ever. Both print
        with redirect_stdout(io.StringIO()):
            try:
                return request.send_request(
                    uri, method="GET", timeout=(min(seconds, _LONGEST_CONNECT), seconds)
                )
            except HTTPError:
                return None

    return get


def _label(record: Any, feature: int) -> str:
    """The first explanation that says something; empty without one."""
    match record:
        case {"index": index, "explanations": [*explanations]} if str(index) == str(feature):
            texts = (each.get("description") for each in explanations if isinstance(each, dict))
            lines = (_line(text) for text in texts if isinstance(text, str))
            return next(filter(None, lines), "")
    return ""


def _line(text: str) -> str:
    """One printable line: what a server sends may hold a terminal's control sequences."""
    shown = "".join(char if char.isprintable() else " " for char in text)
    return " ".join(shown.split())[:_LONGEST_LABEL]


def _default_cache() -> Path | None:
    """Where this user's programs keep what can be fetched again; None without a home."""
    # the specification: a relative one is to be ignored
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        folder = named if named.is_absolute() else Path.home() / ".cache"
    except RuntimeError:
        return None
    return folder / "fusion_lens" / "neuronpedia.jsonl"
