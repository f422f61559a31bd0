"""From a classifier's labels to the categories of the moderations API, by a table. Knows no HTTP.

The table is a YAML or JSON file:

    model: my-classifier          # whose labels these are; without it the one classifier served
    threshold: 0.5                # at and above it a category is flagged; 0.5 by default
    thresholds: {hate: 0.7}       # for single ones
    categories:
      harassment: [toxic, insult] # a category's score is the highest of its labels
      hate: [identity_hate]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from penstock.protos.settings import ConfigError, read_yaml

CATEGORIES = (
    "harassment",
    "harassment/threatening",
    "hate",
    "hate/threatening",
    "illicit",
    "illicit/violent",
    "self-harm",
    "self-harm/instructions",
    "self-harm/intent",
    "sexual",
    "sexual/minors",
    "violence",
    "violence/graphic",
)
DEFAULT_THRESHOLD = 0.5
_KEYS = {"model", "threshold", "thresholds", "categories"}


@dataclass(frozen=True, slots=True)
class ModerationMap:
    """labels: of each category, None: labels are called as the categories are. model: whose they are, "": of
    the only classifier."""

    labels: Mapping[str, tuple[str, ...]] | None = None
    model: str = ""
    threshold: float = DEFAULT_THRESHOLD
    thresholds: Mapping[str, float] = field(default_factory=dict)

    def known(self, labels: Sequence[str]) -> dict[str, list[int]]:
        """The places of each category's labels among a classifier's; {} when it has none of them. Raises
        ValueError for a label of the table that it does not have."""
        places = {label.strip().lower(): place for place, label in enumerate(labels)}
        if self.labels is None:
            return {name: [places[name]] for name in CATEGORIES if name in places}
        found: dict[str, list[int]] = {}
        for category, names in self.labels.items():
            for name in names:
                if name.lower() not in places:
                    raise ValueError(f"the classifier has no label {name!r}; it has {', '.join(labels)}")
            found[category] = [places[name.lower()] for name in names]
        return found

    def result(self, places: Mapping[str, Sequence[int]], values: Sequence[float]) -> dict[str, Any]:
        """One result of the API. places: from `known`. values: a probability for each label."""
        scores = {
            name: max((values[place] for place in places.get(name, ())), default=0.0) for name in CATEGORIES
        }
        flags = {
            name: bool(places.get(name)) and score >= self.thresholds.get(name, self.threshold)
            for name, score in scores.items()
        }
        return {
            "flagged": any(flags.values()),
            "categories": flags,
            "category_scores": scores,
            "category_applied_input_types": {
                name: ["text"] if places.get(name) else [] for name in CATEGORIES
            },
        }


def read_map(path: str) -> ModerationMap:
    """The table of a file; "": labels are called as the categories are. Raises ValueError."""
    if not path:
        return ModerationMap()
    where = "--moderation-map"
    try:
        value = read_yaml(path)
    except ConfigError as error:
        raise ValueError(f"{where}: {error}") from error
    if not {"categories"} <= set(value) <= _KEYS:
        raise ValueError(f"{where}: needs categories, and may have model, threshold and thresholds")
    categories, thresholds = value["categories"], value.get("thresholds", {})
    threshold, model = value.get("threshold", DEFAULT_THRESHOLD), value.get("model", "")
    if not isinstance(categories, Mapping) or not isinstance(thresholds, Mapping) or not categories:
        raise ValueError(f"{where}: categories and thresholds must be tables")
    for name in (*categories, *thresholds):
        if name not in CATEGORIES:
            raise ValueError(f"{where}: {name!r} is no category; they are {', '.join(CATEGORIES)}")
    for labels in categories.values():
        if not isinstance(labels, list) or not labels or not all(isinstance(label, str) for label in labels):
            raise ValueError(f"{where}: each category needs a list of labels")
    for number in (threshold, *thresholds.values()):
        if isinstance(number, bool) or not isinstance(number, int | float) or not 0 <= number <= 1:
            raise ValueError(f"{where}: a threshold must be a number from 0 to 1")
    if not isinstance(model, str):
        raise ValueError(f"{where}: model must be a text")
    return ModerationMap(
        {name: tuple(labels) for name, labels in categories.items()}, model, threshold, dict(thresholds)
    )
