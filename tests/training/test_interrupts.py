"""Signals: noted where state changes, acted on at once where it does not."""

import os
import signal

import pytest

from halfbyte.training.interrupts import SIGNALS, Abandoned, Interrupts


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_noted_and_handlers_come_back(number: int):
    def handler(number: int, frame: object) -> None:
        raise AssertionError("the handler of before")

    before = signal.signal(number, handler)  # not what these tests may be run under: nohup
    try:
        with Interrupts() as interrupts:
            os.kill(os.getpid(), number)
            assert interrupts.signal == number
            assert signal.getsignal(number) == signal.SIG_DFL  # a second one ends the process
        assert signal.getsignal(number) == handler
    finally:
        signal.signal(number, before)


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="a signal of POSIX")
@pytest.mark.parametrize("number", SIGNALS)
def test_what_is_ignored_stays_so(number: int):
    """As under nohup, and of a script's commands in the background (horovod 1821)."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with Interrupts() as interrupts:
            os.kill(os.getpid(), number)
            assert signal.getsignal(number) == signal.SIG_IGN and not interrupts.signal
    finally:
        signal.signal(number, before)


def test_where_nothing_is_half_done_it_acts_at_once():
    with (
        Interrupts() as interrupts,
        pytest.raises(Abandoned, match="nothing is lost") as caught,
        interrupts.immediate("nothing is lost"),
    ):
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("not reached")
    assert caught.value.exit_code == 128 + signal.SIGINT


def test_what_changes_state_inside_is_finished_first():
    done = []
    with Interrupts() as interrupts, pytest.raises(Abandoned), interrupts.immediate("x"):
        with interrupts.noted():
            os.kill(os.getpid(), signal.SIGTERM)
            done.append("finished")
        done.append("not reached")
    assert done == ["finished"]


def test_one_that_came_before_counts():
    with Interrupts() as interrupts:
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Abandoned), interrupts.immediate("x"):
            raise AssertionError("not reached")
