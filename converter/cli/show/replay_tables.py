"""Report of a replay as tables."""

from collections.abc import Iterator, Sequence
from typing import Any

from converter.cli.show.tables import table


def tables_of(report: dict[str, Any], speeds: Sequence[str], *, by_layer: bool) -> str:
    """Return a report of `replay_trace` as text: hit ratios, recall, and bytes read.

    speeds: names of the given speeds, a column of tokens per second for each. by_layer: also a row
    per layer.
    """
    parts = [
        f"{report['model']}: {report['decoded_tokens']} decoded tokens,"
        f" {report['prompt_tokens']} prompt tokens, {report['layers']} layers,"
        f" {report['chosen']} of {report['experts']} experts",
        *_hit_ratios(report, by_layer),
        *_recall(report, by_layer),
        _reads(report, speeds),
    ]
    return "\n\n".join(parts)


def _hit_ratios(report: dict[str, Any], by_layer: bool) -> Iterator[str]:
    policies: dict[str, list[dict[str, Any]]] = {}
    for run in report["runs"]:
        policies.setdefault(run["policy"], []).append(run)
    numbers = [str(run["slots"]) for run in next(iter(policies.values()))]
    rows = [(name, *(f"{run['hit_ratio']:.3f}" for run in runs)) for name, runs in policies.items()]
    yield _titled("hit ratio, by slots a layer", ("policy", *numbers), rows)
    if by_layer:
        for name, runs in policies.items():
            layers = zip(*(run["layers"] for run in runs), strict=True)
            rows = [
                (str(number), *(f"{layer['hit_ratio']:.3f} of {layer['slots']}" for layer in row))
                for number, row in enumerate(layers)
            ]
            yield _titled(
                f"{name}: hit ratio of each layer, by slots a layer", ("layer", *numbers), rows
            )


def _recall(report: dict[str, Any], by_layer: bool) -> Iterator[str]:
    for norm, layers in report["recall"].items():
        if not layers:
            continue  # With a single layer nothing can be predicted.
        rows = (
            [(f"{i} → {i + 1}", *_shares(layer)) for i, layer in enumerate(layers)]
            if by_layer
            else []
        )
        rows.append(
            ("mean", *_shares([sum(column) / len(layers) for column in zip(*layers, strict=True)]))
        )
        numbers = [str(number + 1) for number in range(len(layers[0]))]
        yield _titled(
            f"recall by guesses, with {norm.replace('_', ' ')}", ("layers", *numbers), rows
        )


def _reads(report: dict[str, Any], speeds: Sequence[str]) -> str:
    rows = []
    for run in report["runs"]:
        for reads in run["reads"]:
            kinds = [
                reads[f"{kind}_bytes_per_token"] / 1e6 for kind in ("total", "useful", "wasted")
            ]
            rates = [reads["tokens_per_s"][name] for name in speeds]
            rows.append(
                (
                    run["policy"],
                    str(run["slots"]),
                    str(reads["guesses"]),
                    *_shares([*kinds, reads["covered"]]),
                    *("-" if rate is None else f"{rate:.2f}" for rate in rates),
                )
            )
    heading = ("policy", "slots", "guesses", "MB/token", "useful", "wasted", "covered")
    return _titled("reads", (*heading, *(f"tok/s {name}" for name in speeds)), rows)


def _shares(values: Sequence[float]) -> list[str]:
    return [f"{value:.3f}" for value in values]


def _titled(title: str, heading: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    return f"{title}\n{table([heading, *rows])}"
