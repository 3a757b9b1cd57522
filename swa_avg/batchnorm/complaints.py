"""What Keras says when something does not work, on one line."""

from __future__ import annotations

import re

from swa_avg.errors import first_line

__all__ = ["keras_reason", "unknown_class"]

_STYLE = re.compile(r"\x1b\[[0-9;]*m")
_CALLING = re.compile(r"Exception encountered when calling .+?\.\s*\n")
_AFTER = re.compile(r"Exception encountered: |Example error message for object .+?:\s*\n", re.DOTALL)
_BEFORE = re.compile(
    r"\s*(?:Arguments received by |(?:Full object |using )?config\s*[:=]|List of objects that |, value=\[|"
    r"Make sure custom classes|Please ensure )"
)
_IN_GRAPH = re.compile(r"\n([^\n]+)\n\s*\[\[\{\{node")
"""TensorFlow tells where a node was made before it says what was wrong with it."""
_CLASS = re.compile(r"(?:Could not locate (?:class|function)|Unknown [a-z ]+:) ?'?(\w+)")
_MOST = 300


def keras_reason(error: BaseException) -> str:
    """Return the line of Keras's message that says what is wrong.

    Keras wraps an error in what it was doing, once for each level of the model: "Exception encountered when
    calling X.call().", then the reason, then the arguments; or configurations of any length, and at the end
    "Exception encountered:" and the reason.
    """
    text = _STYLE.sub("", str(error))
    if (in_graph := _IN_GRAPH.search(text)) is not None:
        text = in_graph[1]
    for wrapper in (_AFTER, _CALLING):
        text = wrapper.split(text)[-1]
    text = _BEFORE.split(text)[0]
    reason = next((line.strip() for line in text.splitlines() if line.strip()), "") or first_line(error)
    reason = reason.rstrip(".")
    if isinstance(error, LookupError | AttributeError | AssertionError):  # which say little by themselves
        reason = f"{type(error).__name__}: {reason}"
    return reason if len(reason) <= _MOST else f"{reason[: _MOST - 3]}..."


def unknown_class(reason: str) -> str | None:
    """Return the name of the class, or function, that Keras does not know, if that is the reason."""
    match = _CLASS.search(reason)
    return match and match[1]
