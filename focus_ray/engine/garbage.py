"""What the garbage collector need not look at while an engine runs."""

from __future__ import annotations

import gc
import weakref


def settle(owner: object) -> None:
    """Take all objects there are out of the collector's sight, as long as ``owner`` lives.

    These are hundreds of thousands, of the libraries most, which it else looks through again and
    again: at 512 sequences that was a third of the host's time per step, and single steps of 90 ms.
    What is no longer needed goes all the same, unless it is part of a cycle. Of those that are in
    here now, some may hold memory of a GPU, so that they go first; an engine is in none.
    """
    gc.collect()
    gc.freeze()
    weakref.finalize(owner, gc.unfreeze)
