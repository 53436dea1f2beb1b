import contextlib
import os
import signal

import pytest

from helios.launch.signals import SIGNALS, Stopped, signals_ignored, stopped_by_signals


@pytest.fixture(autouse=True)
def handlers_are_restored():
    before = [signal.getsignal(sig) for sig in SIGNALS]
    yield
    assert [signal.getsignal(sig) for sig in SIGNALS] == before


@pytest.mark.parametrize(("sig", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_unwinds_and_gives_the_exit_code(sig, code):
    unwound = []

    def unwind():
        os.kill(os.getpid(), signal.SIGINT)  # a second one must not cut the unwinding short
        unwound.append(True)

    def run():
        with stopped_by_signals(), contextlib.ExitStack() as stack:
            stack.callback(unwind)
            os.kill(os.getpid(), sig)

    with pytest.raises(Stopped) as caught:
        run()
    assert unwound == [True]
    assert caught.value.code == code


def test_nothing_interrupts_the_end():
    with stopped_by_signals(), signals_ignored():
        os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Stopped), stopped_by_signals():
        os.kill(os.getpid(), signal.SIGTERM)
