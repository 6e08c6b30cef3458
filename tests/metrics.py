"""Reading what `/metrics` shows."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client.parser import text_string_to_metric_families

PREFIX = "external_agents_"


class Figures(dict[str | tuple[str, ...], float]):
    """
    The values by name, or by name and the values of the labels in the order of the labels' names (`le`, of a bucket,
    among them); the prefix that all names have is left out. The labels `status` and `error_code` of invocations stand
    in that order.
    """

    def total(self, name: str) -> float:
        return sum(value for key, value in self.items() if key == name or key[0] == name)

    def by(self, name: str) -> Mapping[str | tuple[str, ...], float]:
        """The values of one metric by those of its labels: a tuple, or a text where there is one label."""
        found = {key[1:]: value for key, value in self.items() if isinstance(key, tuple) and key[0] == name}
        return {key[0] if len(key) == 1 else key: value for key, value in found.items()}


def figures_of(text: bytes | str) -> Figures:
    """As Prometheus would read it. No series may be there twice."""
    figures = Figures()
    decoded = text.decode() if isinstance(text, bytes) else text
    for family in text_string_to_metric_families(decoded):
        for sample in family.samples:
            name = sample.name.removeprefix(PREFIX)
            labels = [sample.labels[label] for label in sorted(sample.labels, key=_place)]
            key = (name, *labels) if labels else name
            assert key not in figures, f"{key} is there twice"
            figures[key] = sample.value
    return figures


def _place(label: str) -> tuple[bool, str]:
    return label == "error_code", label
