"""When a step has to be made of torch's operators, because someone is to see them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

_modes = torch._C._len_torch_dispatch_stack
_is_included = torch._C._dispatch_tls_is_dispatch_key_included
_PRE_DISPATCH = torch._C.DispatchKey.PreDispatch  # has a stack of modes of its own


def must_be_seen(tensors: Sequence[Tensor]) -> bool:
    """Return whether the engine must leave these tensors to torch's operators.

    While a dispatch mode is active (one that traces, counts, or records memory), or of tensors
    without memory: on the meta device, or fake.
    """
    return is_active() or (len(tensors) > 0 and has_no_values(tensors[0]))


def is_active() -> bool:
    """Return whether some dispatch mode is."""
    return _modes() > 0 or _is_included(_PRE_DISPATCH)


def has_no_values(tensor: Tensor) -> bool:
    """Return whether nobody can ask what the numbers are."""
    return tensor.is_meta or type(tensor).__name__ == "FakeTensor"


def is_traced() -> bool:
    """Return whether what happens goes into a graph, in which nothing can depend on numbers."""
    if not is_active():
        return False
    if _is_included(_PRE_DISPATCH):
        return True
    from torch.fx.experimental.proxy_tensor import (  # noqa: PLC0415  (slow, and seldom needed)
        get_proxy_mode,
    )

    return get_proxy_mode() is not None


@contextmanager
def without_autocast(device: str) -> Iterator[None]:
    """Let operators keep the precision of their arguments, inside torch.autocast, too."""
    if device in ("cpu", "cuda") and torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            yield
    else:
        yield
