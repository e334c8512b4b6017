"""The text format of Prometheus, version 0.0.4."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Exposition:
    """Collects metrics; ``str()`` of it is the page."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def family(self, name: str, kind: str, text: str) -> None:
        """Begin a metric: ``counter``, ``gauge`` or ``histogram``."""
        self._lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]

    def sample(self, name: str, value: float, **labels: object) -> None:
        """One value."""
        inside = ",".join(f'{label}="{_escaped(str(item))}"' for label, item in labels.items())
        number = str(int(value)) if float(value).is_integer() else repr(float(value))
        self._lines.append(f"{name}{{{inside}}} {number}" if inside else f"{name} {number}")

    def histogram(
        self, name: str, bounds: Sequence[float], counts: Mapping[int, float], total: float, **labels: object
    ) -> None:
        """The samples of one histogram. ``counts`` are by the index of the bound, not yet summed up."""
        running = 0.0
        for index, bound in enumerate([*bounds, "+Inf"]):
            running += counts.get(index, 0)
            self.sample(f"{name}_bucket", running, **labels, le=bound)
        self.sample(f"{name}_sum", total, **labels)
        self.sample(f"{name}_count", running, **labels)

    def __str__(self) -> str:
        return "\n".join(self._lines) + "\n"


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
