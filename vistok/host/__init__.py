"""How a method gets into somebody else's model, and out again."""

from vistok.host.attention import AttentionCall, AttentionMethod
from vistok.host.hosts import UnsupportedModel
from vistok.host.pictures import Picture
from vistok.host.reducer import Evidence, Reducer, Reduction, Schedule
from vistok.host.session import Session, apply

__all__ = [
    "AttentionCall",
    "AttentionMethod",
    "Evidence",
    "Picture",
    "Reducer",
    "Reduction",
    "Schedule",
    "Session",
    "UnsupportedModel",
    "apply",
]
