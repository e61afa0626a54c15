"""What /metrics says, read by Prometheus' own parser for Python."""

from collections import Counter
from collections.abc import Iterator

from prometheus_client.parser import text_string_to_metric_families

Series = dict[str, str]


class Scrape:
    def __init__(self, samples: list[tuple[str, Series, float]]) -> None:
        self.samples = samples
        series = Counter((name, *sorted(labels.items())) for name, labels, _ in samples)
        twice = [it for it, count in series.items() if count > 1]
        assert not twice, f"series that are told twice: {twice}"

    def of(self, name: str, **labels: str) -> Iterator[tuple[Series, float]]:
        """Series of that name that have these labels, perhaps beside others."""
        return ((its, value) for it, its, value in self.samples if it == name and labels.items() <= its.items())

    def one(self, name: str, **labels: str) -> float:
        """The value of the only one."""
        ((_, value),) = self.of(name, **labels)
        return value

    def sum(self, name: str, **labels: str) -> float:
        return sum(value for _, value in self.of(name, **labels))

    def values(self, name: str, label: str) -> set[str]:
        return {labels[label] for labels, _ in self.of(name)}


def scraped(text: str) -> Scrape:
    families = list(text_string_to_metric_families(text))
    names = [family.name for family in families]
    assert len(set(names)) == len(names) and all(it.documentation and it.type != "unknown" for it in families)
    return Scrape([(it.name, it.labels, it.value) for family in families for it in family.samples])
