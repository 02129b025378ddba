"""How fast, against whom, and how near to the machine's limit.

python -m experiments.benchmark dense     softmax, logsumexp, cross-entropy on logits
python -m experiments.benchmark linear    the loss of a large vocabulary
python -m experiments.benchmark chips     both, by the compilers for a TPU and a GPU
python -m experiments.benchmark train     an epoch of the main job, and its parts
python -m experiments.benchmark job       the whole main job, process and all

python -m experiments.benchmark NAME --help     its flags
"""

import sys
from types import ModuleType

from experiments import (
    benchmark_chips,
    benchmark_dense,
    benchmark_job,
    benchmark_linear,
    benchmark_train,
)
from experiments.command import BAD_INPUT, main

BENCHMARKS: dict[str, ModuleType] = {
    "dense": benchmark_dense,
    "linear": benchmark_linear,
    "chips": benchmark_chips,
    "train": benchmark_train,
    "job": benchmark_job,
}


def command_line(arguments: list[str]) -> None:
    """Run the benchmark that the first word names."""
    name, *rest = arguments or [""]
    if name in ("-h", "--help"):
        print(__doc__)
        return
    if name not in BENCHMARKS:
        got = name or "nothing"
        known = ", ".join(BENCHMARKS)
        print(f"Name a benchmark: {known}; got {got}. See --help.", file=sys.stderr)
        sys.exit(BAD_INPUT)
    benchmark = BENCHMARKS[name]
    main(benchmark.run, benchmark.Settings, rest, program=f"benchmark {name}")


if __name__ == "__main__":
    command_line(sys.argv[1:])
