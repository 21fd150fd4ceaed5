"""Param groups of a model: what not to decay, and what is a matrix to Muon."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn

Groups = list[dict[str, Any]]
Choose = Callable[[str, Tensor], bool | None]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
# Names of what is at the end of a model, and of tables that have no module of their own.
_HEAD = re.compile(r"(^|\.|_)(head|heads|classifier|score|logits|output_layer|embed_out)(\.|$)")
_TABLE = re.compile(r"embed|(^|[._])(pos|token|tok|cls|query_pos)([._]|$)")


class _Place(NamedTuple):
    """A parameter, and a module that has it."""

    name: str
    param: Tensor
    module: nn.Module


def _places(model: nn.Module) -> Iterator[_Place]:
    """Yield every parameter at each of its places, in the order of the model."""
    for prefix, module in model.named_modules():
        for name, p in module.named_parameters(recurse=False, remove_duplicate=False):
            yield _Place(f"{prefix}.{name}" if prefix else name, p, module)


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


def _decays(places: list[_Place]) -> bool:
    """Return whether a parameter is decayed: it has two dimensions or more, and is of no norm."""
    return places[0].param.ndim >= 2 and not any(_is_norm(at.module) for at in places)


def _by_parameter(model: nn.Module) -> dict[Tensor, list[_Place]]:
    """Return where each parameter is; tied ones are in several places."""
    found: dict[Tensor, list[_Place]] = {}
    for place in _places(model):
        found.setdefault(place.param, []).append(place)
    return found


def _named(places: list[list[_Place]], **options: Any) -> Groups:
    """Return a param group with these options, or none if nothing is in it."""
    params = [(each[0].name, each[0].param) for each in places]
    return [{"params": params, **options}] if params else []


def decay_groups(model: nn.Module) -> Groups:
    """Split the parameters of a model so that biases and norms are not decayed.

    Decay is for weights that multiply inputs. Of no use where a parameter has fewer than two
    dimensions, or belongs to a module with "norm" in the name of its class.

    Args:
        model: its named parameters are split, frozen ones, too.

    Returns:
        Up to two param groups, for any optimizer: one that takes its ``weight_decay``, and one with
        ``weight_decay=0.0``. They have the names of the parameters.
    """
    found = list(_by_parameter(model).values())
    return [
        *_named([each for each in found if _decays(each)]),
        *_named([each for each in found if not _decays(each)], weight_decay=0.0),
    ]


def muon_groups(
    model: nn.Module,
    *,
    choose: Choose | None = None,
    muon: dict[str, Any] | None = None,
    adamw: dict[str, Any] | None = None,
) -> Groups:
    """Split the parameters of a model for `MuonWithAuxAdam`: hidden matrices, and all others.

    Muon steps weights of two dimensions, and kernels of convolutions, as matrices with a row for
    each output channel. AdamW steps what is none, or would be the worse for it:

    - what has fewer than two dimensions, and what is of a norm; without decay;
    - embeddings, tables whose name says so (``embed``, ``pos``, ``token``), what is tied to one;
    - the head: a matrix whose name says so (``head``, ``classifier``, ...), and the last linear
      layer of the model, if there is none such and no other layer has its shape;
    - the first convolution, which reads the input, and convolutions with one channel a kernel;
    - other parameters of three dimensions or more, of which nobody can tell what is a matrix.

    Each group has the names of its parameters, so ``print(groups)`` shows what went where.

    Args:
        model: its named parameters are split, frozen ones, too.
        choose: asked first, with the name of a parameter and the parameter: true for Muon, false
            for AdamW, None for the rules above. What is no convolution's, and has three dimensions
            or more, is a stack of matrices then, such as those of experts.
        muon: further options of the groups that Muon steps, such as ``lr``.
        adamw: those of the others.

    Returns:
        Param groups with ``use_muon``.

    Raises:
        ValueError: choose wants Muon for what has fewer than two dimensions.
    """
    of_muon: dict[int | None, list[list[_Place]]] = {}
    decayed: list[list[_Place]] = []
    rest: list[list[_Place]] = []
    found = _by_parameter(model).values()
    ends = _ends(model, found)
    for places in found:
        name, p, _ = places[0]
        chosen = choose(name, p) if choose else None
        if chosen is None:
            chosen = _is_hidden_matrix(places, ends)
        elif chosen and p.ndim < 2:
            raise ValueError(
                f"choose wants Muon for {name} of shape {tuple(p.shape)}, expected two dimensions "
                "or more; return False or None"
            )
        if chosen:
            of_muon.setdefault(_batch_dims(places[0]), []).append(places)
        else:
            (decayed if _decays(places) else rest).append(places)
    muon, adamw = muon or {}, adamw or {}
    return [
        *(
            group
            for batch_dims, some in of_muon.items()
            for group in _named(some, use_muon=True, **muon, **_unless_none(batch_dims))
        ),
        *_named(decayed, use_muon=False, **adamw),
        *_named(rest, use_muon=False, **{**adamw, "weight_decay": 0.0}),
    ]


def _batch_dims(at: _Place) -> int | None:
    """Return how many dimensions count matrices, where `Muon` would not know it by itself."""
    if isinstance(at.module, _CONVOLUTIONS + _TRANSPOSED):
        return 0 if at.param.ndim == 3 else None
    return at.param.ndim - 2 or None


def _unless_none(batch_dims: int | None) -> dict[str, int]:
    return {} if batch_dims is None else {"batch_dims": batch_dims}


def _ends(model: nn.Module, found: Iterable[list[_Place]]) -> set[nn.Module]:
    """Return the first convolution, and the last linear layer where no other seems to be the head.

    One of several with one shape is none.
    """
    modules = list(model.modules())
    ends: set[nn.Module] = set()
    ends.update([each for each in modules if isinstance(each, _CONVOLUTIONS)][:1])
    linear = [each for each in modules if isinstance(each, nn.Linear)]
    shapes = [each.weight.shape for each in linear]
    if linear and shapes.count(shapes[-1]) == 1 and not any(map(_has_head, found)):
        ends.add(linear[-1])
    return ends


def _has_head(places: list[_Place]) -> bool:
    """Return whether a matrix is of a head by its name, or by what it is tied to."""
    is_linear = [isinstance(at.module, nn.Linear) for at in places]
    is_table = [isinstance(at.module, _EMBEDDINGS) for at in places]
    named = any(_HEAD.search(at.name) for at in places) and places[0].param.ndim >= 2
    return named or (any(is_linear) and any(is_table))


def _is_hidden_matrix(places: list[_Place], ends: set[nn.Module]) -> bool:
    p, module = places[0].param, places[0].module
    if not _decays(places) or any(_is_at_an_end(at, ends) for at in places):
        return False
    if isinstance(module, _CONVOLUTIONS + _TRANSPOSED):
        return p.shape[1] > 1
    return p.ndim == 2


def _is_at_an_end(at: _Place, ends: set[nn.Module]) -> bool:
    if at.module in ends or isinstance(at.module, _EMBEDDINGS):
        return True
    is_own = not isinstance(at.module, (nn.Linear, *_CONVOLUTIONS, *_TRANSPOSED))
    return bool(_HEAD.search(at.name) or (is_own and _TABLE.search(at.name)))
