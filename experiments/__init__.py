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


module = next((word for word in sys.orig_argv if f"{__name__}." in word), None)
if module and sys.argv[:1] == ["-m"]:  # until command.main takes over
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _leave)
