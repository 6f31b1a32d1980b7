"""Does a small model find 100 pass keys in 2,097,152 tokens of real text, on two cores?

Ask     Exact match of 100 needles at once, each the other's distractor, in one prefill.
Run     python -m experiments.needle_2m [--context N] [--seed S] [--out DIR]
Cost    about two minutes and 1.3 GiB on 2 cores.
Answer  see the README's results.
"""

from kimijax.cli import run_module
from kimijax.evals.needle_cli import add_arguments, main

if __name__ == "__main__":
    run_module(add_arguments, main, __doc__)
