from __future__ import annotations

import os
import signal
import threading

import pytest

from fusion_lens.stopping import stopping


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_the_second_interrupts(
    number: int, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(number)
    with stopping("in a moment") as stop:
        assert not stop()
        os.kill(os.getpid(), number)
        assert stop()
        assert capsys.readouterr().err == "\nin a moment\n"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before


def test_handlers_are_as_before_after_an_error() -> None:
    with pytest.raises(ValueError, match="no"), stopping("in a moment"):
        raise ValueError("no")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_in_another_thread_signals_go_where_they_did() -> None:
    found = []

    def work() -> None:
        with stopping("never") as stop:
            found.append((signal.getsignal(signal.SIGINT), stop()))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [(signal.default_int_handler, False)]
