"""Signals: noted where state changes, acted on at once where it does not."""

import os
import signal

import pytest

from halfbyte.training.interrupts import Abandoned, Interrupts


def test_a_signal_is_noted_and_handlers_come_back():
    before = signal.getsignal(signal.SIGTERM)
    with Interrupts() as interrupts:
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupts.signal == signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # a second one ends the process
    assert signal.getsignal(signal.SIGTERM) == before


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
