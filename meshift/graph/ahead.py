"""A step's graph in two: the calls that draw completions, which may run before their step, and those that learn.

It knows nothing of how long before, nor of who runs them.
"""

from __future__ import annotations

from dataclasses import dataclass

from meshift.graph.calls import Call, Graph, GraphError, LoopCall, ModelCall


@dataclass(frozen=True, kw_only=True)
class Halves:
    """`drawing` gives a step's batch its completions, `learning` goes on with that batch."""

    drawing: Graph
    learning: Graph


def halves_of(graph: Graph) -> Halves:
    """The graph with the calls that generate, and loops around such, apart from the others.

    Raises `GraphError` where these do not come first: where one reads what a call between them writes, or a role
    that learning changes for another reason than to be drawn with.
    """
    drawing = tuple(call for call in graph.calls if generators(call))
    learning = tuple(call for call in graph.calls if not generators(call))
    if not drawing:
        raise GraphError("no call of the step draws completions, so none can be drawn ahead")
    first = Graph(drawing, graph.inputs)
    written = frozenset(key for call in drawing for key in call.writes)
    second = Graph(learning, graph.inputs | written)
    drawn_with = frozenset(role for call in drawing for role in generators(call))
    read = frozenset(role for call in drawing for role in call.weights_read) - drawn_with
    for role in sorted(read & frozenset(role for call in learning for role in call.weights_written)):
        raise GraphError(f"the {role} is read while completions are drawn, and the step changes it")
    return Halves(drawing=first, learning=second)


def generators(call: Call) -> frozenset[str]:
    """The roles that a call draws completions with; within a loop too."""
    if isinstance(call, LoopCall):
        return frozenset(role for inner in call.graph.calls for role in generators(inner))
    return frozenset((call.role,)) if isinstance(call, ModelCall) and call.kind == "generate" else frozenset()
