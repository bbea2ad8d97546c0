"""Step 5 of HALO: fit the `a` of s_t = ln(t+a)/ln(a) by the loss on long held-out documents."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from hypenet_jax.errors import HypenetError
from hypenet_jax.evals.token_nll import padded_rows, project_nll
from hypenet_jax.model import LanguageModel
from hypenet_jax.parallel.activations import mesh_of
from hypenet_jax.parallel.processes import on_host

# An a so large that ln(t + a) / ln(a) is 1 in float32 at every t: the unscaled network by the same compiled program.
UNSCALED = 1e30
# How far a grid is followed whose best point is its first or last: from s_t that grows fast to s_t that hardly does.
WIDEST = (2.0, 1e6)


def fit_scale(
    model: LanguageModel,
    params: dict,
    windows: np.ndarray,
    grid: Sequence[float],
    batch_size: int = 1,
    between: Callable[[], None] = lambda: None,
    tolerance: float = 0.0,
) -> dict:
    """Mean next-token loss over windows int32 [N, T+1] for every a of the grid, and without scaling.

    Returns {"a", "best", "tolerance", "grid", "loss", "loss_unscaled", "length", "documents"}. "best" is the grid's
    best, refined by the vertex of the parabola through it and its two neighbours in ln(a); "a" is that, or with a
    tolerance (nats a token) the smallest a that loses no more than it against the grid's best (`sharpest`). A grid
    whose best is at its end is followed further (`widened`); the grid returned is all that was tried. a is traced: one
    compilation serves the grid.
    `between` is called before each a, where a run may be stopped. Raises HypenetError for a loss that is not finite.
    """
    # The training-time network, whatever scaling the config carries.
    plain = model.with_logits_scaling(None)

    @jax.jit
    def total_nll(params, tokens_BT, targets_BT, ids_BT, a):
        hidden = plain.hidden(params, tokens_BT, ids_BT, hype_a=a)
        nll_BT, _ = project_nll(hidden, plain.head(params), targets_BT, ids_BT)
        return jnp.sum(nll_BT, axis=1)

    def loss(a: float) -> float:
        between()
        total = 0.0
        for start in range(0, len(windows), batch_size):
            rows = padded_rows(windows, start, batch_size)
            real = len(windows[start : start + batch_size])
            ids_BT = np.where(np.arange(batch_size)[:, None] < real, 0, -1) * np.ones_like(rows[:, :-1])
            with mesh_of(params):
                nll_B = total_nll(params, rows[:, :-1], rows[:, 1:], ids_BT, jnp.float32(a))
            total += float(np.sum(on_host(nll_B).astype(np.float64)))
        return total / (len(windows) * (windows.shape[1] - 1))

    grid, losses = widened(grid, loss)
    unscaled = _finite(loss(UNSCALED), "without scaling")
    # Four digits: the loss is flat around its minimum, and configs and checkpoints show the number.
    best, sharp = (float(f"{a:.4g}") for a in (vertex(grid, losses), sharpest(grid, losses, tolerance)))
    return {
        "a": min(best, sharp) if tolerance else best,
        "best": best,
        "tolerance": tolerance,
        "grid": grid,
        "loss": losses,
        "loss_unscaled": unscaled,
        "length": int(windows.shape[1] - 1),
        "documents": len(windows),
    }


def widened(grid: Sequence[float], loss: Callable[[float], float]) -> tuple[list[float], list[float]]:
    """The grid, sorted, and its losses; where the best is the first or the last, halved or doubled until it is not.

    A student that was finetuned at the fit's own length needs little scaling: its best a lies far beyond the grid that
    serves one that was not. It ends at WIDEST. Raises HypenetError for a loss that is not finite.
    """

    def tried(a: float) -> float:
        return _finite(loss(a), f"with a = {a:g}")

    grid = sorted({float(a) for a in grid})
    losses = [tried(a) for a in grid]
    while losses[-1] < min(losses[:-1]) and 2 * grid[-1] <= WIDEST[1]:
        grid.append(2 * grid[-1])
        losses.append(tried(grid[-1]))
    while losses[0] < min(losses[1:]) and grid[0] / 2 >= WIDEST[0]:
        grid.insert(0, grid[0] / 2)
        losses.insert(0, tried(grid[0]))
    return grid, losses


def _finite(loss: float, words: str) -> float:
    """The loss; HypenetError where it is not finite: nan would pass for the least of any grid."""
    if not math.isfinite(loss):
        raise HypenetError(
            f"the loss {words} is {loss} on the held-out documents, so that there is no fit; look at the student's "
            "last losses, or change fit_scale.grid"
        )
    return loss


def sharpest(grid: Sequence[float], losses: Sequence[float], tolerance: float) -> float:
    """The smallest a up to which, from the best of a sorted grid downwards, the loss stays within tolerance of it.

    Between two grid points the loss is taken as linear in ln(a). It ends at the grid's first point.
    """
    point = int(np.argmin(losses))
    bound = losses[point] + tolerance
    while point > 0 and losses[point - 1] <= bound:
        point -= 1
    if point == 0:
        return float(grid[0])
    share = (bound - losses[point]) / (losses[point - 1] - losses[point])
    return float(grid[point] * (grid[point - 1] / grid[point]) ** share)


def vertex(grid: Sequence[float], losses: Sequence[float]) -> float:
    """The minimum of the parabola through the best grid point and its neighbours, in ln(a); an edge stays itself."""
    best = int(np.argmin(losses))
    if best in (0, len(grid) - 1):
        return float(grid[best])
    x = np.log(np.asarray(grid[best - 1 : best + 2], np.float64))
    y = np.asarray(losses[best - 1 : best + 2], np.float64)
    curvature, slope, _ = np.polyfit(x - x[1], y, 2)
    return float(grid[best]) if curvature <= 0 else float(np.exp(x[1] - slope / (2 * curvature)))
