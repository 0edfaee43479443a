"""A generated world in which every truth is known: pictures, words about them, masks, order, relations.

`kinds()` names the kinds of world there are, `kind(name)` brings one. See `kinds.py` for how to add one.
"""

from __future__ import annotations

from clipworks.data.world.kinds import Kind, kind, kinds, stream

__all__ = ["Kind", "kind", "kinds", "stream"]
