"""The experiments behind the README: each file asks one question.

Imports and traces make many objects and little garbage: looking for it as often as
Python does by itself takes a tenth of the main job.
"""

import gc

gc.set_threshold(100_000)
