"""Controllers: one a file; each decides on a step, and the session carries the decision out.

None is shipped yet. Write one by deriving from ``redline.Controller``; its docstring states the laws.
"""

from redline.controller import Controller

__all__ = ["Controller"]
