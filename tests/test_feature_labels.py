from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import pytest
from label_server import Act, LabelServer, explains, fails, says, serving

from fusion_lens import feature_labels
from fusion_lens.dictionaries import Card
from fusion_lens.errors import DictionaryError, InputFileError, OutputError
from fusion_lens.feature_labels import dashboard_url, published_labels

ID = "gpt2-small/6-res-jb"
KEY = "np-a-key-of-a-test"

Start = Callable[[Mapping[str, Act]], LabelServer]


def card(neuronpedia_id: str | None = ID) -> Card:
    return Card(
        name="res-jb",
        layers=(5,),
        hook_names=("blocks.6.hook_resid_pre",),
        d_model=8,
        d_sae=100,
        neuronpedia_id=neuronpedia_id,
    )


def cached(path: Path) -> dict[str, str]:
    lines = path.read_text("utf-8").splitlines()
    return {record["key"]: record["reply"] for record in map(json.loads, lines)}


@pytest.fixture(autouse=True)
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user without a key, and the folder of their cache."""
    monkeypatch.setattr(feature_labels, "_FAILED_AT", [])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHON_DOTENV_DISABLED", "1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("NEURONPEDIA_API_KEY", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Start a site, which the client takes for Neuronpedia."""
    pytest.importorskip("neuronpedia")
    from neuronpedia.requests.base_request import NPRequest

    with ExitStack() as stack:

        def begin(script: Mapping[str, Act]) -> LabelServer:
            server = stack.enter_context(serving(script))
            monkeypatch.setattr(NPRequest, "BASE_URL", server.base_url)
            return server

        yield begin


@pytest.fixture
def no_client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "neuronpedia", None)


def test_the_page_of_a_feature() -> None:
    assert dashboard_url(ID, 14057) == "https://www.neuronpedia.org/gpt2-small/6-res-jb/14057"
    odd = "gemma-2-9b/12-gemmascope-mlp-16k__l0-42"
    assert dashboard_url(odd, 0) == f"https://www.neuronpedia.org/{odd}/0"
    assert dashboard_url("llama3.1-8b/1-r", 2).endswith("/llama3.1-8b/1-r/2")


@pytest.mark.parametrize(
    "name",
    [
        "",
        "gpt2-small",
        "gpt2-small/",
        "/6-res-jb",
        "a/b/c",
        "../api",
        "a/..",
        "a/b?c",
        "a b/c",
        "a/b\n",
    ],
)
def test_an_id_of_another_form_has_no_page(name: str) -> None:
    with pytest.raises(DictionaryError, match="neuronpedia_id must be MODEL/SOURCE"):
        dashboard_url(name, 3)


def test_a_negative_feature_has_no_page() -> None:
    with pytest.raises(DictionaryError, match=r"feature at least 0, but got 'gpt2.*' and -1"):
        dashboard_url(ID, -1)


def test_labels_come_from_the_site_in_the_order_asked_for_and_are_kept(
    start: Start, user: Path
) -> None:
    server = start({f"{ID}/7": explains("time-related phrases"), f"{ID}/3": explains("vendors")})
    labels = published_labels(card(), [7, 3, 7])
    assert list(labels.items()) == [(7, "time-related phrases"), (3, "vendors")]
    assert server.asked == [f"{ID}/7", f"{ID}/3"]
    kept = cached(user / "fusion_lens" / "neuronpedia.jsonl")
    assert kept == {f"{ID}/7": "time-related phrases", f"{ID}/3": "vendors"}
    assert list(published_labels(card(), [3, 7]).items()) == [
        (3, "vendors"),
        (7, "time-related phrases"),
    ]
    assert len(server.asked) == 2


def test_labels_of_one_dictionary_are_not_another_s(start: Start, tmp_path: Path) -> None:
    other = "gpt2-small/7-res-jb"
    start({f"{ID}/7": explains("of six"), f"{other}/7": explains("of seven")})
    cache = tmp_path / "labels.jsonl"
    assert published_labels(card(), [7], cache=cache) == {7: "of six"}
    assert published_labels(card(other), [7], cache=cache) == {7: "of seven"}
    assert published_labels(card(), [7], cache=cache) == {7: "of six"}


def test_a_feature_the_site_does_not_know_has_no_label_and_the_next_is_still_asked_for(
    start: Start, user: Path
) -> None:
    server = start({f"{ID}/2": fails(500), f"{ID}/3": explains("vendors")})
    assert published_labels(card(), [1, 2, 3]) == {3: "vendors"}
    assert cached(user / "fusion_lens" / "neuronpedia.jsonl") == {f"{ID}/3": "vendors"}
    # a label may have been written since
    assert published_labels(card(), [1, 3]) == {3: "vendors"}
    assert server.asked == [f"{ID}/{n}" for n in (1, 2, 3, 1)]


@pytest.mark.parametrize(
    "record",
    [
        explains(),
        explains("", "  ", None, 3),
        explains(explanations=None),
        explains(explanations=["vendors"]),
        explains("of another", index="8"),
        says("null"),
        says("[]"),
    ],
)
def test_a_record_without_a_usable_explanation_is_no_label(start: Start, record: Act) -> None:
    start({f"{ID}/7": record, f"{ID}/9": explains("vendors")})
    assert published_labels(card(), [7, 9]) == {9: "vendors"}


def test_the_first_explanation_that_says_something_is_the_label(start: Start) -> None:
    start({f"{ID}/7": explains("", "second", "third", index=7)})
    assert published_labels(card(), [7]) == {7: "second"}


def test_a_label_is_one_printable_line(start: Start, tmp_path: Path) -> None:
    text = "  two\nlines \x1b[31mred\x1b[0m\u200b\t" + "é" * 400
    start({f"{ID}/7": explains(text)})
    expected = ("two lines [31mred [0m " + "é" * 400)[:300]
    assert published_labels(card(), [7]) == {7: expected}
    edited = tmp_path / "edited.jsonl"
    edited.write_text(json.dumps({"key": f"{ID}/7", "reply": "a\x1b[2Jb"}) + "\n", "utf-8")
    assert published_labels(card(), [7], cache=edited) == {7: "a [2Jb"}


def test_a_slow_site_is_left_after_the_timeout_and_what_came_before_is_kept(
    start: Start, user: Path
) -> None:
    server = start({f"{ID}/1": explains("vendors"), f"{ID}/2": explains("time", after=8)})
    begin = time.monotonic()
    assert published_labels(card(), [1, 2, 3], timeout=1.0) == {1: "vendors"}
    assert time.monotonic() - begin < 4
    assert server.asked == [f"{ID}/1", f"{ID}/2"]
    assert published_labels(card(), [2], timeout=0.2) == {}
    assert published_labels(card(), [2, 3], timeout=5.0) == {}
    # the second time nothing was answered: the site is left alone
    assert server.asked == [f"{ID}/1", f"{ID}/2", f"{ID}/2"]
    assert cached(user / "fusion_lens" / "neuronpedia.jsonl") == {f"{ID}/1": "vendors"}


def test_the_timeout_is_for_all_features_together(start: Start) -> None:
    server = start({f"{ID}/{n}": explains("time", after=0.5) for n in range(50)})
    labels = published_labels(card(), range(50), timeout=1.4)
    assert 0 < len(labels) <= len(server.asked) <= 3
    # a site that answers is asked again, from where it was left
    assert len(published_labels(card(), range(50), timeout=1.4)) > len(labels)


@pytest.mark.parametrize(
    "act",
    [
        says("<html>not JSON"),
        says('{"index": "1"'),
        says("<html>blocked", 403),
        fails(401),
        fails(429),
    ],
)
def test_after_garbage_or_a_refusal_the_site_is_left_alone_for_a_minute(
    start: Start, act: Act, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start({f"{ID}/1": act, f"{ID}/2": explains("time")})
    assert published_labels(card(), [1, 2]) == {}
    assert published_labels(card(), [2]) == {}
    assert server.asked == [f"{ID}/1"]
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 61)
    assert published_labels(card(), [2]) == {2: "time"}


def test_a_site_that_says_it_was_asked_too_often_is_not_asked_further(start: Start) -> None:
    server = start({f"{ID}/1": explains("vendors"), f"{ID}/2": fails(429)})
    assert published_labels(card(), [1, 2, 3]) == {1: "vendors"}
    assert published_labels(card(), [1, 3]) == {1: "vendors"}
    assert server.asked == [f"{ID}/1", f"{ID}/2"]


def test_without_a_site_there_are_no_labels_but_those_that_were_kept(
    start: Start,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    cache = tmp_path / "labels.jsonl"
    start({f"{ID}/1": explains("vendors")})
    published_labels(card(), [1], cache=cache)
    with serving({}) as gone:
        nowhere = gone.base_url
    from neuronpedia.requests.base_request import NPRequest

    monkeypatch.setattr(NPRequest, "BASE_URL", nowhere)
    with caplog.at_level(logging.DEBUG, logger="fusion_lens"):
        assert published_labels(card(), [1, 2], cache=cache) == {1: "vendors"}
    assert caplog.messages == ["no labels: Neuronpedia gave ConnectionError"]


def test_without_the_client_there_are_no_labels_but_those_that_were_kept(
    no_client: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, logger="fusion_lens"):
        assert published_labels(card(), [1, 2]) == {}
    assert caplog.messages == [
        "no labels: pip install 'fusion-lens[neuronpedia]' brings the client"
    ]
    assert {record.levelno for record in caplog.records} == {logging.DEBUG}
    cache = tmp_path / "labels.jsonl"
    cache.write_text(json.dumps({"key": f"{ID}/2", "reply": "time"}) + "\n", "utf-8")
    assert published_labels(card(), [1, 2], cache=cache) == {2: "time"}


def test_nothing_is_asked_for_in_no_time(start: Start) -> None:
    server = start({f"{ID}/1": explains("vendors")})
    assert published_labels(card(), [1], timeout=0.0) == {}
    assert server.asked == []
    assert published_labels(card(), [1]) == {1: "vendors"}


@pytest.mark.parametrize("neuronpedia_id", [None, "", "not an id", "../api/user"])
def test_a_dictionary_that_is_not_published_has_no_labels(
    start: Start, neuronpedia_id: str | None
) -> None:
    server = start({})
    assert published_labels(card(neuronpedia_id), [1]) == {}
    assert published_labels(card(), []) == {}
    assert server.asked == []


def test_features_the_dictionary_does_not_have_are_refused() -> None:
    with pytest.raises(DictionaryError, match="of res-jb must be 0 to 99, but got 3 to 100"):
        published_labels(card(), [100, 3])
    with pytest.raises(DictionaryError, match="must be 0 to 99, but got -1 to -1"):
        published_labels(card(None), [-1])


def test_the_key_goes_to_the_site_and_nowhere_else(
    start: Start,
    user: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server = start({f"{ID}/1": explains("vendors"), f"{ID}/2": fails(401)})
    assert published_labels(card(), [1]) == {1: "vendors"}
    monkeypatch.setenv("NEURONPEDIA_API_KEY", KEY)
    with caplog.at_level(logging.DEBUG):
        published_labels(card(), [0, 2])
    assert server.keys == [None, KEY, KEY]
    assert "NPUnauthorizedError" in caplog.messages[-1]
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "")
    written = "".join(path.read_text("utf-8") for path in user.rglob("*") if path.is_file())
    assert KEY not in written + caplog.text


def test_a_key_that_cannot_be_sent_is_not_shown(
    start: Start, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    server = start({f"{ID}/1": explains("vendors")})
    monkeypatch.setenv("NEURONPEDIA_API_KEY", KEY + "\nX: y")
    with caplog.at_level(logging.DEBUG):
        assert published_labels(card(), [1]) == {}
    assert server.asked == []
    assert "InvalidHeader" in caplog.text
    assert KEY not in caplog.text


def test_a_cache_of_another_kind_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    notes = tmp_path / "notes.jsonl"
    notes.write_text('{"question": "who?"}\n', "utf-8")
    with pytest.raises(InputFileError, match=r"notes.jsonl, line 1: must be a line of a cache"):
        published_labels(card(), [1], cache=notes)
    assert notes.read_text("utf-8") == '{"question": "who?"}\n'


def test_a_cache_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="must be writable"):
        published_labels(card(), [1], cache=tmp_path)


@pytest.mark.parametrize("content", [None, "not a cache\n"])
def test_a_fault_of_the_user_s_own_cache_costs_no_label(
    start: Start, user: Path, content: str | None
) -> None:
    server = start({f"{ID}/1": explains("vendors")})
    path = user / "fusion_lens" / "neuronpedia.jsonl"
    path.parent.mkdir(parents=True)
    if content is None:
        path.mkdir()
    else:
        path.write_text(content, "utf-8")
    assert published_labels(card(), [1]) == {1: "vendors"}
    assert published_labels(card(), [1]) == {1: "vendors"}
    assert len(server.asked) == 2
    assert content is None or path.read_text("utf-8") == content


@pytest.mark.parametrize("named", ["", "relative/folder"])
def test_without_a_usable_cache_home_the_user_s_own_folder_is_taken(
    named: str, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start({f"{ID}/1": explains("vendors")})
    monkeypatch.setenv("XDG_CACHE_HOME", named)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    published_labels(card(), [1])
    kept = cached(tmp_path / "home" / ".cache" / "fusion_lens" / "neuronpedia.jsonl")
    assert kept == {f"{ID}/1": "vendors"}


def test_a_user_without_a_home_gets_labels_too(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    start({f"{ID}/1": explains("vendors")})
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", homeless)
    assert published_labels(card(), [1]) == {1: "vendors"}
