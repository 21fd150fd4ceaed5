"""The options that every fused optimizer adds to torch's arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeVar, overload
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.optim import Optimizer

from fusedopt._engine import valid_max_norm
from fusedopt._spikes import Spikes, asked
from fusedopt._stored import check_seed, check_state_dtype

T = TypeVar("T")

_Stored = torch.dtype | str | None
StateDType = _Stored | Callable[[Tensor], _Stored]

# Those of which an option was set, by their id: what `refuse_groups_of_another` looks through.
_with_options: WeakValueDictionary[int, Optimizer] = WeakValueDictionary()


class Option(Generic[T]):
    """An attribute kept in the optimizer's ``defaults``, while it is not what it is by default.

    There, copies and pickles have it, and whoever makes an optimizer anew from ``defaults`` takes
    it along: with a class of torch, that is an error instead of a loss. A wrapper that takes on the
    class and passes on attributes, as Lightning's does, has that of the optimizer inside.
    """

    def __init__(self, default: T, check: Callable[[Any], object] | None = None) -> None:
        self.default = default
        self._check = check

    def check(self, value: Any) -> None:
        """Raise an error for what this cannot be: of the constructor, and where it is set."""
        if self._check is not None:
            self._check(value)

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, optimizer: None, owner: type) -> Option[T]: ...
    @overload
    def __get__(self, optimizer: Optimizer, owner: type) -> T: ...

    def __get__(self, optimizer: Optimizer | None, owner: type) -> T | Option[T]:
        if optimizer is None:
            return self
        value: T = optimizer.defaults.get(self.name, self.default)
        return value

    def __set__(self, optimizer: Optimizer, value: T) -> None:
        self.check(value)
        if value == self.default:
            optimizer.defaults.pop(self.name, None)
        else:
            optimizer.defaults[self.name] = value
            _with_options[id(optimizer)] = optimizer


def _check_max_grad_norm(value: Any) -> None:
    if value is not None:
        valid_max_norm(value, "max_grad_norm")


def _check_state_dtype(value: Any) -> None:
    if not callable(value):  # whose answers are looked at as they come
        check_state_dtype(value)


def _check_track_statistics(value: Any) -> None:
    if not isinstance(value, int) or value < 0:
        raise ValueError(f"Invalid track_statistics: {value!r}, expected a bool, or an integer n")


class HasOptions(Optimizer):
    """The options, for `fusedopt._base.Fused`.

    They are of all parameters together, and no keys of param groups: libraries that flatten
    checkpoints fail on keys they do not know.
    """

    max_grad_norm = Option[float | None](None, _check_max_grad_norm)
    skip_nonfinite = Option[bool](False)
    skip_spikes = Option[bool | Spikes](False, asked)
    amp_scaling = Option[bool](False)
    state_dtype = Option[StateDType](None, _check_state_dtype)
    master_weights = Option[bool](False)
    stochastic_rounding = Option[bool](False)
    seed = Option[int](0, check_seed)
    track_statistics = Option[bool | int](False, _check_track_statistics)

    _asked: dict[str, Any] | None = None  # options, while the constructor makes the groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group, as torch does.

        Raises:
            ValueError: it has an option that is the optimizer's.
        """
        self._refuse_options_in(param_group)
        super().add_param_group(param_group)
        for name in OPTIONS:
            param_group.pop(name, None)  # of the defaults

    def __repr__(self) -> str:
        given = _given(self)
        if not given:
            return super().__repr__()
        lines = "".join(f"    {name}: {value}\n" for name, value in given.items())
        return f"{super().__repr__().removesuffix(')')}All groups\n{lines})"

    def _refuse_options_in(self, group: dict[str, Any]) -> None:
        """Raise an error if a param group has an option of its own, which nothing would heed."""
        if _NAMES.isdisjoint(group):
            return
        for name in OPTIONS:
            if name not in group:
                continue
            if group[name] != (self._asked[name] if self._asked else getattr(self, name)):
                raise ValueError(
                    f"a param group has {name}={group[name]!r}, expected that on the optimizer: it "
                    f"is of all groups together; pass {name}= to the constructor, or set "
                    f"optimizer.{name}, and delete it from the group"
                )


OPTIONS = {name: value for name, value in vars(HasOptions).items() if isinstance(value, Option)}

_NAMES = frozenset(OPTIONS)


def check_options(options: dict[str, Any]) -> None:
    """Raise ValueError or TypeError for an option that is out of its range."""
    for name, value in options.items():
        OPTIONS[name].check(value)


def refuse_groups_of_another(params: Any, options: dict[str, Any]) -> None:
    """Raise an error if params are the groups of an optimizer with options that are not in these.

    The groups do not have them, so an optimizer made of those groups would do without.
    """
    if not _with_options or not isinstance(params, (list, tuple)):
        return
    lists = {id(group.get("params")) for group in params if isinstance(group, dict)}
    for reference in _with_options.valuerefs():
        other = reference()
        if other is None or lists.isdisjoint(_ids_of_lists(other.param_groups)):
            continue
        for name, value in _given(other).items():
            if options[name] == OPTIONS[name].default:
                raise ValueError(
                    f"these are param groups of a {type(other).__name__} with {name}={value!r}, "
                    f"which groups do not have, so that it would be lost; pass {name}= here, too, "
                    "or give it to this optimizer alone, by attribute where a library calls the "
                    "constructor"
                )


def _ids_of_lists(groups: Iterable[dict[str, Any]]) -> set[int]:
    return {id(group["params"]) for group in groups}


def _given(optimizer: Optimizer) -> dict[str, Any]:
    """Return the options that are not at their defaults."""
    return {name: optimizer.defaults[name] for name in OPTIONS if name in optimizer.defaults}
