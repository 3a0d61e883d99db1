"""The solver feedback in float64: converter/native/refit_group.h, feedback.h and refit.h."""

from dataclasses import dataclass

import torch
from torch import Tensor

from formats.packing import PACKINGS, Packing
from formats.tiles import QuantizedMatrix

ROOM = 1.06  # kRoom of converter/native/refit.h

RANGES = {
    2: (1.0, 0.9, 0.8, 0.7, 0.6, 0.5),
    3: (1.0, 0.94, 0.88, 0.82, 0.75, 0.68),
    4: (1.0, 0.96, 0.92, 0.87, 0.82, 0.76),
}


@dataclass
class Group:
    """Rows of one group, w [rows, count], with importance h [count].

    A line (a, b) stands for w ~ a * q - b.
    """

    w: Tensor
    h: Tensor
    limit: int
    unsigned: bool

    def code(self, a: Tensor, b: Tensor) -> dict[str, Tensor]:
        usable_a = torch.where(a > 0, a, 1.0)
        q = ((self.w + b[:, None]) / usable_a[:, None]).round().clamp(0, self.limit)
        q = torch.where(a[:, None] > 0, q, 0.0)
        error = (self.w - a[:, None] * q + b[:, None]).square() @ self.h
        mean = q @ self.h / self.h.sum()
        spread = (q.square() @ self.h) - mean.square() * self.h.sum()
        return {
            "a": a,
            "b": b,
            "error": error,
            "mean": mean,
            "spread": spread,
            "qq": q.square() @ self.h,
            "qw": (q * self.w) @ self.h,
        }

    def fit_codes(self, coded: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        w_sum = self.w @ self.h
        slope = (coded["qw"] - coded["mean"] * w_sum) / coded["spread"]
        a = torch.where((coded["spread"] > 1e-5 * coded["qq"]) & (slope > 0), slope, 0.0)
        b = a * coded["mean"] - w_sum / self.h.sum()
        if self.unsigned:
            through_origin = torch.nan_to_num(coded["qw"] / coded["qq"]).clamp(min=0)
            a, b = torch.where(b < 0, through_origin, a), b.clamp(min=0)
        return a, b

    def fit(self, nbits: int) -> dict[str, Tensor]:
        high, low = self.w.amax(1), self.w.amin(1)
        if self.unsigned:
            low = low.clamp(max=0)
        best: dict[str, Tensor] = {}

        def keep(coded: dict[str, Tensor]) -> None:
            better = (
                coded["error"] < best["error"]
                if best
                else torch.ones(len(self.w), dtype=torch.bool)
            )
            for key, value in coded.items():
                best[key] = torch.where(better, value, best.get(key, value))

        for part in RANGES[nbits]:
            b = part * (high - low) / 2 - (high + low) / 2
            coded = self.code(
                (high - low) / self.limit * part, b.clamp(min=0) if self.unsigned else b
            )
            keep(coded)
            keep(self.code(*self.fit_codes(coded)))
        for _ in range(2):
            keep(self.code(*self.fit_codes(self.code(best["a"], best["b"]))))
        return best

    def choose(
        self, fitted: dict[str, Tensor], ds: Tensor, dm: Tensor, packing: Packing
    ) -> tuple[Tensor, Tensor]:
        nearest = (fitted["a"] / torch.where(ds > 0, ds, 1.0)).round().clamp(0, packing.max_s)
        nearest = torch.where(ds > 0, nearest, 0.0)
        best_s = best_m = least = None
        for step in (0, -1, 1):
            s = (nearest + step).clamp(0, packing.max_s)
            mean = fitted["mean"]
            for _ in range(2):
                b = ds * s * mean - self.w @ self.h / self.h.sum()
                m = (
                    (b / torch.where(dm > 0, dm, torch.inf))
                    .round()
                    .clamp(packing.min_m, packing.max_m)
                )
                coded = self.code(ds * s, dm * m)
                mean = coded["mean"]
                if least is None:
                    best_s, best_m, least = s, m, coded["error"]
                better = coded["error"] < least
                best_s, best_m = torch.where(better, s, best_s), torch.where(better, m, best_m)
                least = torch.where(better, coded["error"], least)
        assert best_s is not None and best_m is not None
        return best_s, best_m


def search_super_scale(
    values: Tensor, weight: Tensor, least: int, most: int, start: Tensor
) -> Tensor:
    """Return the scale with the smallest weighted rounding error of values [rows, groups]."""
    count, first, step = (48, 1.02, 1 / 96) if most < 16 else (9, 1.0, 1 / 64)
    best = torch.zeros_like(start)
    best_error = torch.full_like(start, torch.inf)
    for i in range(count):
        scale = (start * (first - i * step)).half().double()
        rounded = (
            (values / torch.where(scale > 0, scale, torch.inf)[:, None]).round().clamp(least, most)
        )
        error = ((values - scale[:, None] * rounded).square() * weight).sum(1)
        best = torch.where(error < best_error, scale, best)
        best_error = torch.minimum(best_error, error)
    return best


def reference(weight: Tensor, name: str, metric: Tensor, damping: float) -> QuantizedMatrix:
    """Return `weight` quantized with feedback, by the damped `metric`."""
    p, w = PACKINGS[name], weight.double()
    columns = w.shape[1]
    damped = metric.double() + damping * metric.diagonal().double().mean() * torch.eye(
        columns, dtype=torch.float64
    )
    v = torch.linalg.cholesky(damped.flip(0, 1)).flip(0, 1)
    h = v.diagonal().square() / v.diagonal().square().mean()
    starts = range(0, columns, p.group_size)

    def group_at(begin: int, x: Tensor) -> Group:
        end = min(begin + p.group_size, columns)
        return Group(x[:, begin:end], h[begin:end], p.max_code, p.min_m == 0)

    fits = [group_at(begin, w).fit(p.nbits) for begin in starts]
    a, b, mean, spread = (
        torch.stack([fit[key] for fit in fits], 1) for key in ("a", "b", "mean", "spread")
    )
    ds = search_super_scale(a, spread, 0, p.max_s, a.amax(1) / p.max_s)
    rounded = ds[:, None] * (a / torch.where(ds > 0, ds, torch.inf)[:, None]).round().clamp(
        0, p.max_s
    )
    total = torch.stack([group_at(begin, w).h.sum() for begin in starts])
    dm = search_super_scale(
        b + (rounded - a) * mean, total, p.min_m, p.max_m, b.abs().amax(1) / p.max_m
    )
    ds, dm = ((scale.float() * ROOM).half().to(scale) for scale in (ds, dm))
    s, m = torch.zeros_like(a), torch.zeros_like(a)
    codes, error = torch.zeros_like(w), torch.zeros_like(w)
    normal = v / v.diagonal()
    for k in range(columns):
        g = k // p.group_size
        if k % p.group_size == 0:
            moved, end = w.clone(), k + p.group_size
            moved[:, k:end] += error[:, :k] @ normal[:k, k:end]
            group = group_at(k, moved)
            s[:, g], m[:, g] = group.choose(group.fit(p.nbits), ds, dm, p)
        step, offset = ds * s[:, g], dm * m[:, g]
        x = w[:, k] + error[:, :k] @ normal[:k, k]
        q = ((x + offset) / torch.where(step > 0, step, torch.inf)).round().clamp(0, p.max_code)
        codes[:, k], error[:, k] = q, w[:, k] - step * q + offset
    energy = ((w @ damped) * w).sum(1)
    gain = energy / ((w @ damped) * (w - error)).sum(1)
    return QuantizedMatrix(
        codes.to(torch.uint8),
        s.to(torch.int16),
        m.to(torch.int16),
        (ds * gain).half(),
        (dm * gain).half(),
    )
