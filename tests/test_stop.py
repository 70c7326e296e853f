"""When a signal ends a run, and how."""

import os
import signal

import pytest

from rto_fast.command_line import exit_code
from rto_fast.errors import Interrupted
from rto_fast.training.stop import StopRequest


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 0), (signal.SIGINT, 130)], ids=["SIGTERM", "Ctrl-C"])
def test_where_nothing_would_be_lost_the_run_ends_at_once(number, code):
    before = signal.getsignal(number)
    with pytest.raises(Interrupted) as stopped, StopRequest() as stop:
        stop.folder = "runs/a"
        os.kill(os.getpid(), number)
    assert str(stopped.value) == "stopped; go on with: python -m rto_fast.train --resume runs/a"
    assert exit_code(stopped.value) == code and not stopped.value.together
    assert signal.getsignal(number) is before


def test_before_there_is_a_run_it_says_so():
    with pytest.raises(Interrupted, match="stopped before the first step; start it again"), StopRequest():
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_stage_takes_notice_and_only_a_later_second_ctrl_c_ends_it():
    with StopRequest() as stop:
        stop.waits = True
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # the launcher's echo
        assert stop.signal == signal.SIGINT
        stop.since -= 3
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
