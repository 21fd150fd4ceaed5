"""Orthogonal matrices by Newton and Schulz's iteration: its readable spec, and many at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

# What is worked on at once: as much as stays in the cache of each core, or one matrix.
SLICE_BYTES, ON_DEVICE = 1 << 19, 4

# So many steps are made of products of the short side alone, where the long side is so many times
# as long. Small singular values lose digits with each; with these, less than one of float32's.
STEPS_AT_ONCE = 3
LONG_ENOUGH = 1.5

# A single matrix is made orthogonal by halves from here on: with less memory, and in many small
# products.
HALVES_FROM_BYTES = 1 << 19

# What torch takes besides, for tensors of the numbers that an operator is given: in bytes.
NUMBERS = 16

Coefficients = tuple[float, float, float]


class Iteration(NamedTuple):
    """What torch.optim.Muon calls ns_coefficients, ns_steps and eps."""

    coefficients: Coefficients
    steps: int
    eps: float

    @classmethod
    def of(cls, group: dict[str, Any]) -> Iteration:
        """Return that of a param group."""
        return cls(tuple(group["ns_coefficients"]), group["ns_steps"], group["eps"])

    def check(self) -> None:
        """Raise torch's errors, which come with the step."""
        if self.steps >= 100:
            raise ValueError("Number of steps must be less than 100 for computational efficiency")
        if len(self.coefficients) != 3:
            raise ValueError("Coefficients must be a tuple of exactly 3 values")


def orthogonalized(x: Any, iteration: Iteration) -> Any:
    """Return the matrices nearly orthogonal, their singular vectors as they were: the spec.

    Each step takes a singular value s to ``a s + b s**3 + c s**5``, from what is 1 at most to
    about 1. The products are those of the shorter side.

    Args:
        x: arrays of numpy, or tensors, of two dimensions or more; the last two are the matrix.
        iteration: coefficients a, b, c, the number of steps, and the least norm to divide by.
    """
    a, b, c = iteration.coefficients
    is_tall = x.shape[-2] > x.shape[-1]
    x = x.swapaxes(-1, -2) if is_tall else x
    norm = (x * x).sum(axis=(-2, -1), keepdims=True) ** 0.5
    x = x / norm.clip(iteration.eps, None)
    for _ in range(iteration.steps):
        gram = x @ x.swapaxes(-1, -2)
        x = x * a + (gram * b + (gram @ gram) * c) @ x
    return x.swapaxes(-1, -2) if is_tall else x


def orthogonalize_(x: Tensor, iteration: Iteration) -> None:
    """Do that in place, to a contiguous tensor [matrices, rows, columns].

    Takes as much memory as x again, at most: twice as much for a single matrix that is nearly
    square, if it is in bfloat16 or smaller than HALVES_FROM_BYTES. Rounds where torch.optim.Muon
    does, if x is in bfloat16.
    """
    make, memory_of_each = _way(x)
    if memory_of_each > x.numel() and _may_be_halved(x):
        _by_halves_(x, iteration)
        return
    cores = torch.get_num_threads() if x.device.type == "cpu" else ON_DEVICE
    room = x.numel() - NUMBERS // x.itemsize
    most = min(SLICE_BYTES * cores * len(x) // x.nbytes, room // memory_of_each)
    parts = torch.split(x, max(1, most))
    memory = x.new_empty(len(parts[0]) * memory_of_each)
    for part in parts:
        make(part, iteration, memory[: len(part) * memory_of_each])


def _way(x: Tensor) -> tuple[Callable[[Tensor, Iteration, Tensor], None], int]:
    """Return how to make matrices orthogonal, and the elements of memory for that of each.

    The fastest for which x is as large as this memory is, or else the least.
    """
    short, long = sorted(x.shape[1:])
    square = short * short
    ways = [(_to_and_fro_, square + short * long), (_in_place_, 2 * square)]
    if long >= LONG_ENOUGH * short and x.dtype != torch.bfloat16:
        ways.insert(0, (_some_at_once_, 4 * square))
    return next((way for way in ways if way[1] <= x.numel()), None) or min(ways, key=itemgetter(1))


def _may_be_halved(x: Tensor) -> bool:
    return x.dtype != torch.bfloat16 and x.nbytes >= HALVES_FROM_BYTES


# ---- a step, with A = x x^T: x becomes P x, where P = a + b A + c A^2 ----------------------------
# (With out=, torch.autocast leaves products in their precision.)


def _to_and_fro_(x: Tensor, iteration: Iteration, memory: Tensor) -> None:
    """Make each step from one tensor to another, where A has been before, and the last to x."""
    own = iteration.coefficients[0]
    (polynomial,) = _squares(x, memory, 1)
    other = memory[polynomial.numel() :].view(x.shape)
    now, then = (other, x) if iteration.steps % 2 else (x, other)
    torch.div(x, _norms(x, iteration, memory), out=now)
    for _ in range(iteration.steps):
        (gram,) = _squares(x, then.view(-1), 1)
        _set_to_polynomial(polynomial, gram, now, iteration)
        factors = (now, polynomial) if _is_tall(x) else (polynomial, now)
        torch.baddbmm(now, *factors, beta=own, out=then)
        now, then = then, now


def _in_place_(x: Tensor, iteration: Iteration, memory: Tensor) -> None:
    polynomial, gram = _squares(x, memory, 2)
    x.div_(_norms(x, iteration, memory))
    for _ in range(iteration.steps):
        _set_to_polynomial(polynomial, gram, x, iteration)
        _multiply_(x, polynomial, gram.view(-1), own=iteration.coefficients[0])


def _some_at_once_(x: Tensor, iteration: Iteration, memory: Tensor) -> None:
    """After each step, A is P A P, and x is the product of all P times what it was."""
    a, b, c = iteration.coefficients
    x.div_(_norms(x, iteration, memory))
    for done in range(0, iteration.steps, STEPS_AT_ONCE):
        gram, place, product, other = _squares(x, memory, 4)
        torch.bmm(*_short_sides(x), out=gram)
        polynomial = product
        for step in range(min(STEPS_AT_ONCE, iteration.steps - done)):
            if step:
                torch.bmm(gram, polynomial, out=other)
                torch.bmm(other, polynomial, out=gram)
                polynomial = place
            torch.baddbmm(gram, gram, gram, beta=b, alpha=c, out=polynomial)
            polynomial.diagonal(dim1=1, dim2=2).add_(a)
            if step:
                torch.bmm(polynomial, product, out=other)
                product, other = other, product
        _multiply_(x, product, memory[: 2 * gram.numel()])


def _norms(x: Tensor, iteration: Iteration, memory: Tensor) -> Tensor:
    """Return by what to divide at first, in this memory."""
    norms = memory[: len(x)].view(-1, 1, 1)
    torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, out=norms)
    return norms.clamp_(min=iteration.eps)


def _set_to_polynomial(out: Tensor, gram: Tensor, x: Tensor, iteration: Iteration) -> None:
    """Set out to P without a, and gram to A."""
    _, b, c = iteration.coefficients
    torch.bmm(*_short_sides(x), out=gram)
    torch.baddbmm(gram, gram, gram, beta=b, alpha=c, out=out)


def _squares(x: Tensor, memory: Tensor, count: int) -> list[Tensor]:
    """Return so many parts of memory, for matrices that have the short side alone."""
    short = min(x.shape[1:])
    size = len(x) * short * short
    return [memory[i * size :][:size].view(len(x), short, short) for i in range(count)]


def _is_tall(x: Tensor) -> bool:
    return x.shape[1] > x.shape[2]


def _short_sides(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return what A is the product of."""
    return (x.mT, x) if _is_tall(x) else (x, x.mT)


def _multiply_(x: Tensor, factor: Tensor, memory: Tensor, own: float = 0.0) -> None:
    """Multiply by ``own + factor``, as much of the long side at a time as there is memory for."""
    is_tall = _is_tall(x)
    most = memory.numel() // (len(x) * factor.shape[1])
    for block in torch.split(x, most, dim=1 if is_tall else 2):
        copy = memory[: block.numel()].view(block.shape)
        if own:
            copy.copy_(block)
            factors = (copy, factor) if is_tall else (factor, copy)
            torch.baddbmm(block, *factors, beta=own, out=block)
        else:
            factors = (block, factor) if is_tall else (factor, block)
            torch.bmm(*factors, out=copy)
            block.copy_(copy)


# ---- a single matrix, in as little memory as that takes ------------------------------------------


def _by_halves_(x: Tensor, iteration: Iteration) -> None:
    """Make a single matrix orthogonal.

    P x is a x + A w, with w = b x + c A x. Of that, each column needs A and itself alone, so some
    columns at a time are replaced where they are.
    """
    a, b, c = iteration.coefficients
    rows = min(x.shape[1:])
    memory = x.new_empty(max(x.numel(), _Halves.size(rows) + rows))
    x.div_(_norms(x, iteration, memory))
    (matrix,) = x.mT if _is_tall(x) else x
    gram = _Halves.of(memory, rows)
    memory = memory[_Halves.size(rows) :]
    for _ in range(iteration.steps):
        gram.set_to_square_of(matrix)
        for columns in torch.split(matrix, len(memory) // rows, dim=1):
            w = memory[: columns.numel()].view(columns.shape)
            gram.add_product(columns, to=columns, factors=(b, c), out=w)
            gram.add_product(w, to=columns, factors=(a, 1.0), out=columns)


class _Halves(NamedTuple):
    """A symmetric matrix: what is between its halves is there once."""

    upper: Tensor
    between: Tensor
    lower: Tensor

    @classmethod
    def of(cls, memory: Tensor, rows: int) -> _Halves:
        """Return one in this memory."""
        shapes = cls._shapes(rows)
        sizes = [math.prod(shape) for shape in shapes]
        parts = torch.split(memory[: sum(sizes)], sizes)
        return cls(*(part.view(shape) for part, shape in zip(parts, shapes, strict=True)))

    @classmethod
    def size(cls, rows: int) -> int:
        """Return how many elements it has."""
        return sum(math.prod(shape) for shape in cls._shapes(rows))

    @staticmethod
    def _shapes(rows: int) -> list[tuple[int, int]]:
        more, less = (rows + 1) // 2, rows // 2
        return [(more, more), (less, more), (less, less)]

    def set_to_square_of(self, x: Tensor) -> None:
        """Become x x^T."""
        first, second = self._halves_of(x)
        torch.mm(first, first.mT, out=self.upper)
        torch.mm(second, first.mT, out=self.between)
        torch.mm(second, second.mT, out=self.lower)

    def add_product(self, x: Tensor, to: Tensor, factors: tuple[float, float], out: Tensor) -> None:
        """Set out, which may be what is added to, to ``beta to + alpha self x``."""
        beta, alpha = factors
        (x1, x2), (to1, to2), (out1, out2) = map(self._halves_of, (x, to, out))
        torch.addmm(to1, self.upper, x1, beta=beta, alpha=alpha, out=out1)
        torch.addmm(out1, self.between.mT, x2, alpha=alpha, out=out1)
        torch.addmm(to2, self.between, x1, beta=beta, alpha=alpha, out=out2)
        torch.addmm(out2, self.lower, x2, alpha=alpha, out=out2)

    def _halves_of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x[: len(self.upper)], x[len(self.upper) :]


def step_ratio(adjust_lr_fn: str | None, rows: int, columns: int) -> float:
    """Return by what the shape of a matrix multiplies the learning rate."""
    if adjust_lr_fn in (None, "original"):
        return float(max(1.0, rows / columns) ** 0.5)
    if adjust_lr_fn == "match_rms_adamw":
        return float(0.2 * max(rows, columns) ** 0.5)
    if adjust_lr_fn == "spectral_unclamped":
        return float((rows / columns) ** 0.5)
    return 1.0  # as torch has it
