"""Tiles for this very GPU: other ones than the kernels ship with are tried, on request, and the fastest are kept.

Kernels say what they could take (``triton_kernels/tiles.py``). One value at a time is changed, and the change stays if
the whole linear gets faster by it.
"""

from collections.abc import Callable, Iterator

from torch import Tensor
from tqdm import tqdm

from ..triton_kernels import tiles
from . import backends
from .implementations import Implementation
from .linear import QuantizedLinear

WORTH = 0.98  # of the time before: less of a difference may be chance


def tune(
    implementation: Implementation,
    layer: QuantizedLinear,
    run: Callable[[], Tensor],
    milliseconds: Callable[[], float],
) -> tuple[dict[str, dict[str, int]], float, float]:
    """Tiles for the kernels that ``run`` launches, by :func:`.backends.tiles_key`, and its time without and with them.

    ``run`` is ``implementation`` on an input of ``layer``, and ``milliseconds`` times it. Tiles that do not compile,
    do not fit, or give another result than the shipped ones are passed over.
    """
    with tiles.listening() as asked:
        wanted = run()
    before = best = milliseconds()
    n, k = layer.shape
    for place, name, value in progress(f"{implementation.name}, {k} × {n}", asked):
        kept = tiles.MEASURED.get(place, ())
        tiles.MEASURED[place] = tuple((dict(kept) | {name: value}).items())
        ms = time_if_right(run, milliseconds, wanted, implementation.tolerance_db)
        if ms is not None and ms < WORTH * best:
            best = ms
        else:
            tiles.MEASURED[place] = kept
    kept_at = {place: dict(tiles.MEASURED.get(place, ())) for place in asked}
    return {backends.tiles_key(*place[1:]): values for place, values in kept_at.items() if values}, before, best


def progress(what: str, asked: dict) -> Iterator[tuple]:
    """Every value to try, with a bar that says when it will be done."""
    tries = [(place, name, v) for place, choices in asked.items() for name, values in choices.items() for v in values]
    yield from tqdm(tries, what, leave=False, dynamic_ncols=True)


def time_if_right(
    run: Callable[[], Tensor], milliseconds: Callable[[], float], wanted: Tensor, tolerance_db: float
) -> float | None:
    """Milliseconds; None if it fails or is wrong."""
    try:
        return milliseconds() if backends.compare(run(), wanted, tolerance_db) is None else None
    except Exception as error:  # too large, or not to be compiled
        if isinstance(error, RuntimeError) and backends.is_fatal(error):
            raise
        return None
