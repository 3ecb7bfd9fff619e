"""How a thread of PyTorch's waits for the others. Scripts import this first: OpenMP looks once, when PyTorch is loaded.

By default GNU's OpenMP waits in a loop, some milliseconds long, before it sleeps. Where something else wants the same cores it
takes them from the very threads that it waits for: two trainings at once on two cores then take four times as long as one, twice
as long as one after the other. Waiting shortly costs a run that has the machine for itself nothing.
"""

import os

VARIABLES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")  # what decides it; the second, where somebody set it, decides alone
SPINS = "1000"  # instead of 300,000; what GNU's OpenMP takes itself where it sees more threads of its own than cores

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
