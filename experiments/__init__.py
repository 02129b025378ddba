"""The experiments behind the README: each file asks one question.

Imports and traces make many objects and little garbage: looking for it as often as
Python does by itself takes a tenth of the main job.
"""

import gc
import os
import signal
import sys

gc.set_threshold(100_000)


def _leave(number: int, _: object) -> None:
    print("Interrupted.", file=sys.stderr, flush=True)
    os._exit(128 + number)


# While python -m imports one of these, until command.main takes over.
if sys.argv[:1] == ["-m"] and any("experiments." in word for word in sys.orig_argv):
    for _number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(_number) is not signal.SIG_IGN:
            signal.signal(_number, _leave)
