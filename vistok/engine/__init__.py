"""The engine: one function over many cells, on the cores of this machine or on a Ray cluster.

    engine = LocalEngine(workers=2)                     # or RayEngine(address="auto")
    for outcome in engine.map(cells, measure, setup=load_model, folder=results, done=written):
        print(outcome.key, outcome.status)

``cells`` are picklable, each with a ``key`` (the hash of its content). ``setup()`` runs once in each worker and its
result is the first argument of ``measure(state, cell)``. Every cell has one outcome: its value or its error, or why it
was left alone. The two engines give the same outcomes: one loop (``schedule``) hands out the cells, and an engine says
how a worker is started, spoken to and ended. ``claim`` keeps drivers that share a folder from doing a cell twice.

Importing this package imports neither torch nor ray.
"""

from vistok.engine.cells import Cell, Outcome, Resources, SetupError, Status
from vistok.engine.claims import Claim, claim, owner_of
from vistok.engine.cluster import RayEngine
from vistok.engine.local import LocalEngine
from vistok.engine.schedule import Engine

__all__ = [
    "Cell",
    "Claim",
    "Engine",
    "LocalEngine",
    "Outcome",
    "RayEngine",
    "Resources",
    "SetupError",
    "Status",
    "claim",
    "owner_of",
]
