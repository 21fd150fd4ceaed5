"""Train one small GPT twice, with torch's optimizer and with fusedopt's, and compare.

The text is one that every machine with Python has: the source of Python's own standard
library, read as bytes, with whole files held out for testing. Two copies of one model
start from the same weights and see the same batches; the optimizer is the only thing
that differs. Gradients are clipped to norm 1: by torch's function before torch's step, by
`max_grad_norm` inside fusedopt's. At the end the script prints both losses, both held-out
losses, both gradient norms and the time of clipping and stepping side by side, lets the
model write a few lines, and draws a picture. If the held-out losses differ by more than
rounding, it exits with an error.

With `--memory MODE`, torch still trains in float32, and fusedopt in one of the memory modes
(docs/memory.md): fewer bytes a weight, and a training of its own, whose loss is printed
beside torch's.

    python examples/train_gpt.py                      # AdamW
    python examples/train_gpt.py --optimizer Lion     # or SGD, Adam, RMSprop
    python examples/train_gpt.py --memory exact-mxfp8 # a bfloat16 model, exact masters
"""

from __future__ import annotations

import argparse
import copy
import functools
import statistics
import sysconfig
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR
from tqdm import tqdm

import fusedopt

VOCAB, CONTEXT, WIDTH, HEADS, LAYERS = 256, 128, 128, 4, 4  # a byte is a token
BATCH = 8
CLIP = 1.0  # gradient norm
MAX_BYTES = 4_000_000
TOLERANCE = 1e-3  # how far apart rounding may carry the two held-out losses
OTHER_TRAINING = 0.1  # the same where a memory mode rounds weights or moments otherwise

# Starting values. Lion moves every weight by the whole learning rate at every step, so it
# gets a fraction of AdamW's, and a multiple of its decay, which acts through that rate.
# Adam, AdamW and Lion would all train a little faster here at a larger one, but then the
# training is chaotic enough for mere rounding to part the two runs by TOLERANCE. (Lion's
# sign() even turns a rounding difference next to zero into a whole step the other way.)
RECIPES: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.2, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-4},
    "Adam": {"lr": 2e-3, "betas": (0.9, 0.99), "weight_decay": 1e-5},
    "AdamW": {"lr": 2e-3, "betas": (0.9, 0.99), "weight_decay": 0.1},
    "RMSprop": {"lr": 1e-3, "alpha": 0.99, "weight_decay": 1e-5},
    "Lion": {"lr": 3e-4, "betas": (0.9, 0.99), "weight_decay": 1.0},
}


class Memory(NamedTuple):
    """A memory mode: how the model is stored, and what the optimizer keeps beside it."""

    dtype: torch.dtype
    options: dict[str, Any]
    kept: str


MEMORY = {
    "float32": Memory(torch.float32, {}, "float32 weights and moments"),
    "float32-mxfp8": Memory(
        torch.float32, {"state_dtype": "mxfp8"}, "float32 weights, 8-bit moments"
    ),
    "bfloat16": Memory(
        torch.bfloat16, {}, "bfloat16 weights and moments, and no mode: what others avoid"
    ),
    "exact": Memory(
        torch.bfloat16,
        {"master_weights": True, "state_dtype": torch.float32},
        "bfloat16 weights, the 16 bits that they lack of float32, float32 moments",
    ),
    "exact-bfloat16": Memory(
        torch.bfloat16,
        {"master_weights": True},
        "bfloat16 weights, the 16 bits that they lack of float32, bfloat16 moments",
    ),
    "exact-mxfp8": Memory(
        torch.bfloat16,
        {"master_weights": True, "state_dtype": "mxfp8"},
        "bfloat16 weights, the 16 bits that they lack of float32, 8-bit moments",
    ),
    "random": Memory(
        torch.bfloat16,
        {"stochastic_rounding": True},
        "bfloat16 weights, rounded up or down at random, bfloat16 moments",
    ),
    "random-mxfp8": Memory(
        torch.bfloat16,
        {"stochastic_rounding": True, "state_dtype": "mxfp8"},
        "bfloat16 weights, rounded up or down at random, 8-bit moments",
    ),
}

Bytes = npt.NDArray[np.uint8]


# --- The text --------------------------------------------------------------------------


@functools.cache
def load_text() -> tuple[Bytes, Bytes]:
    """Training and held-out text: every 20th file of the standard library is held out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    size = 0
    for number, path in enumerate(sorted(root.rglob("*.py"))):
        if size < MAX_BYTES and skip.isdisjoint(path.relative_to(root).parts):
            source = path.read_bytes()
            parts[number % 20 == 19].append(source)
            size += len(source)
    train, held_out = (np.frombuffer(b"".join(part), dtype=np.uint8) for part in parts)
    return train, held_out


def windows(
    text: Bytes, starts: npt.NDArray[np.int64], context: int = CONTEXT
) -> tuple[Tensor, Tensor]:
    """The stretches of text at `starts`, and the byte that follows each of their bytes."""
    both = torch.from_numpy(text[starts[:, None] + np.arange(context + 1)].astype(np.int64))
    return both[:, :-1], both[:, 1:]


# --- The model -------------------------------------------------------------------------


class Block(nn.Module):
    """Causal self-attention, then a two-layer perceptron, each added to its input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        # No bias here: softmax cancels a key's bias, so its gradient is nothing but
        # rounding, which Adam and its kin would scale up to steps of full size.
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, length, 3, HEADS, width // HEADS)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each: batch, head, position, feature
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(batch, length, width))
        hidden: Tensor = self.down(F.gelu(self.up(self.norm2(x))))
        return x + hidden


class GPT(nn.Module):
    def __init__(self, width: int = WIDTH, layers: int = LAYERS) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(VOCAB, width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCAB, bias=False)
        for name, p in self.named_parameters():
            if p.ndim == 2:  # as in GPT-2, what is added to the residual stream starts smaller
                added = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(p, std=0.06 / (2 * layers if added else 1) ** 0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.position.weight[: tokens.shape[1]]
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits

    def logits(self, tokens: Tensor) -> Tensor:
        """Products in float32, however the weights are stored.

        So nothing but the optimizer differs between memory modes; and many processors have
        no fast products of bfloat16.
        """
        weights = {name: p.float() for name, p in self.named_parameters()}
        logits: Tensor = functional_call(self, weights, (tokens,))
        return logits

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(inputs).flatten(0, 1), targets.flatten())


def parameter_groups(model: GPT, weight_decay: float) -> list[dict[str, Any]]:
    """Decay pulls the matrices towards zero, and leaves biases, norms and embeddings be."""
    matrices = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
    chosen = set(matrices)
    rest = [p for p in model.parameters() if p not in chosen]
    return [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]


# --- The optimizers --------------------------------------------------------------------


class PlainLion(torch.optim.Optimizer):
    """Lion (arXiv:2302.06675) as a plain loop over the parameters, since torch has none."""

    def __init__(
        self,
        params: list[dict[str, Any]],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # nothing here needs a closure
        for group in self.param_groups:
            lr, (beta1, beta2) = group["lr"], group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["exp_avg"] = torch.zeros_like(p)
                m = state["exp_avg"]
                p.mul_(1 - lr * group["weight_decay"])
                p.add_(torch.sign(m * beta1 + p.grad * (1 - beta1)), alpha=-lr)
                m.mul_(beta2).add_(p.grad, alpha=1 - beta2)


def torch_side(name: str, groups: list[dict[str, Any]]) -> tuple[torch.optim.Optimizer, str]:
    """The other contestant, at its best: torch's fused CPU kernel where the class has one."""
    if name == "Lion":
        return PlainLion(groups, **RECIPES[name]), "plain torch Lion"
    cls: Any = getattr(torch.optim, name)
    if name == "RMSprop":
        return cls(groups, **RECIPES[name]), "torch RMSprop, default"
    return cls(groups, **RECIPES[name], fused=True), f"torch {name}, fused=True"


def fused_side(name: str, model: GPT, start: GPT, memory: Memory, seed: int) -> Any:
    """Ours, of `model`; its masters, if it keeps them, are the weights of `start`."""
    groups = parameter_groups(model, RECIPES[name]["weight_decay"])
    cls: Any = getattr(fusedopt, name)
    optimizer: Any = cls(groups, **RECIPES[name], **memory.options, max_grad_norm=CLIP, seed=seed)
    if optimizer.master_weights:
        optimizer.load_master_state_dict(model, start.state_dict())
    return optimizer


def kept(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    """Bytes of weights, gradients and states for each weight."""
    tensors = [x for p in model.parameters() for x in (p, p.grad) if x is not None]
    for state in optimizer.state.values():
        tensors += [x for x in state.values() if isinstance(x, Tensor)]
    return sum(x.nbytes for x in tensors) / sum(p.numel() for p in model.parameters())


# --- Training --------------------------------------------------------------------------


@dataclass
class Contestant:
    """A model, the optimizer that trains it, and what was measured on the way."""

    label: str
    model: GPT
    optimizer: torch.optim.Optimizer
    schedule: SequentialLR
    losses: list[float] = field(default_factory=list)
    held_out: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)

    def train_on(self, inputs: Tensor, targets: Tensor) -> None:
        loss = self.model.loss(inputs, targets)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        optimizer: Any = self.optimizer
        start = time.perf_counter()
        if hasattr(optimizer, "max_grad_norm"):  # it clips by itself
            optimizer.step()
            norm = optimizer.grad_norm
        else:
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
            optimizer.step()
        self.step_ms.append(1e3 * (time.perf_counter() - start))
        self.norms.append(norm.item())
        self.schedule.step()
        self.losses.append(loss.item())

    @torch.no_grad()
    def test_on(self, inputs: Tensor, targets: Tensor) -> None:
        self.held_out.append(self.model.loss(inputs, targets).item())


def schedule_for(optimizer: torch.optim.Optimizer, steps: int) -> SequentialLR:
    """A linear warm-up over the first tenth of the steps, then a cosine down to zero."""
    warmup = max(1, steps // 10)
    up = LinearLR(optimizer, start_factor=0.01, total_iters=warmup)
    down = CosineAnnealingLR(optimizer, T_max=max(1, steps - warmup))
    return SequentialLR(optimizer, [up, down], milestones=[warmup])


@torch.no_grad()
def generate(model: GPT, prompt: str, length: int, seed: int) -> str:
    """`prompt` and the next `length` bytes, drawn a little colder than the model's odds."""
    random = torch.Generator().manual_seed(seed)
    tokens = torch.tensor([list(prompt.encode())])
    for _ in range(length):
        odds = torch.softmax(model.logits(tokens[:, -CONTEXT:])[:, -1] / 0.8, dim=-1)
        tokens = torch.cat([tokens, torch.multinomial(odds, 1, generator=random)], dim=1)
    return bytes(tokens[0].tolist()).decode(errors="replace")


# --- The report ------------------------------------------------------------------------


def print_table(a: Contestant, b: Contestant) -> None:
    def row(title: str, *cells: str) -> None:
        print(f"{title:<28}" + "".join(f"{cell:>26}" for cell in cells))

    print()
    row("", a.label, b.label)
    both = (a, b)
    row("loss, mean of last 10 steps", *(f"{statistics.fmean(c.losses[-10:]):.5f}" for c in both))
    row("held-out loss", *(f"{c.held_out[-1]:.5f}" for c in both))
    row("gradient norm, median", *(f"{statistics.median(c.norms):.5f}" for c in both))
    row("bytes kept a weight", *(f"{kept(c.model, c.optimizer):.2f}" for c in both))
    row("clip and step, first", *(f"{c.step_ms[0]:.2f} ms" for c in both))
    row("clip and step, median", *(f"{statistics.median(c.step_ms):.2f} ms" for c in both))
    row("clip and step, total", *(f"{sum(c.step_ms) / 1e3:.2f} s" for c in both))


def draw(a: Contestant, b: Contestant, tested: list[int], path: Path) -> None:
    """Loss on the left, step time on the right; torch broad and light, fusedopt thin on top."""
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps = range(1, len(a.losses) + 1)
    top = 3 * max(statistics.median(c.step_ms) for c in (a, b))
    for c, colour, wide, dot in ((a, "#f5ad62", 4.0, 12.0), (b, "#1b3a6b", 0.8, 6.0)):
        left.plot(steps, c.losses, color=colour, lw=wide, label=f"{c.label}: training")
        held = {"color": colour, "ms": dot, "mec": "white", "zorder": 3}
        left.plot(tested, c.held_out, "o", label=f"{c.label}: held out", **held)
        median = statistics.median(c.step_ms)
        right.plot(steps, np.minimum(c.step_ms, top), ".", color=colour, ms=4, alpha=0.6)
        right.axhline(median, color=colour, lw=2, label=f"{c.label}: median {median:.2f} ms")
    # The first steps fall from ln 256 so fast that they would flatten all the rest.
    left.set_ylim(top=max(a.losses[len(a.losses) // 20 :]) * 1.2)
    left.set(title="Loss", xlabel="training step", ylabel="cross-entropy (nats per byte)")
    right.set(title="Time of clipping and optimizer.step()", xlabel="training step")
    right.set(ylabel="time (ms; longer ones on the upper edge)", ylim=(0, top * 1.02))
    for axes, corner in ((left, "upper right"), (right, "lower right")):
        axes.legend(loc=corner)
        axes.grid(alpha=0.3)
    figure.suptitle("A small GPT on the Python standard library: the same run, two optimizers")
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--optimizer", choices=RECIPES, default="AdamW")
    parser.add_argument("--memory", choices=MEMORY, default="float32")
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="threads for torch (default: its own choice)")
    parser.add_argument("--out", type=Path, default=Path("train_gpt.png"))
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)

    train_text, held_text = load_text()
    # The same few windows every time, spread evenly over the held-out files.
    spread = np.linspace(0, len(held_text) - CONTEXT - 1, num=64, dtype=np.int64)
    held_batch = windows(held_text, spread)
    print(f"text: {len(train_text):,} bytes to train on, {len(held_text):,} held out")

    torch.manual_seed(args.seed)
    memory = MEMORY[args.memory]
    model, twin = (first := GPT()), copy.deepcopy(first).to(memory.dtype)
    print(f"model: {sum(p.numel() for p in model.parameters()):,} weights")
    print(f"memory: fusedopt keeps {memory.kept} (torch: {MEMORY['float32'].kept})")
    recipe = RECIPES[args.optimizer]
    theirs, label = torch_side(args.optimizer, parameter_groups(model, recipe["weight_decay"]))
    ours = fused_side(args.optimizer, twin, first, memory, args.seed)
    a = Contestant(label, model, theirs, schedule_for(theirs, args.steps))
    b = Contestant(f"fusedopt {args.optimizer}", twin, ours, schedule_for(ours, args.steps))

    # In lockstep rather than one after the other: whatever else slows this machine down
    # then slows both alike.
    random = np.random.default_rng(args.seed)
    tested: list[int] = []
    progress = tqdm(range(1, args.steps + 1), unit="step")
    for step in progress:
        starts = random.integers(0, len(train_text) - CONTEXT, size=BATCH)
        inputs, targets = windows(train_text, starts)
        for c in (a, b):
            c.train_on(inputs, targets)
        if step == args.steps or step % max(1, args.steps // 10) == 0:
            tested.append(step)
            for c in (a, b):
                c.test_on(*held_batch)
        progress.set_postfix_str(f"loss {a.losses[-1]:.4f} / {b.losses[-1]:.4f}")

    print_table(a, b)
    delta = max(abs(x - y) for x, y in zip(a.losses[-10:], b.losses[-10:], strict=True))
    held_delta = abs(a.held_out[-1] - b.held_out[-1])
    print(f"\nmax |Δ loss|: {delta:.1e} over the last 10 steps, {held_delta:.1e} held out")

    draw(a, b, tested, args.out)
    print(f"picture: {args.out}")
    tolerance = TOLERANCE if args.memory == "float32" else OTHER_TRAINING
    if not held_delta <= tolerance:  # so put, a loss that is not a number fails too
        raise SystemExit(
            f"error: the held-out losses differ by {held_delta:.1e}, more than {tolerance:.0e}: "
            f"{b.label} did not follow {a.label}"
        )
    print(f"\n--- written by the model that {b.label} trained ---")
    print(generate(twin, "def ", 300, args.seed))


if __name__ == "__main__":
    main()
