"""What a score of a distribution gives."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Score:
    """Numbers by name, why others were left out, and what else the protocol must say.

    A score that the images at hand cannot support is left out with the reason, never replaced."""

    values: dict[str, float] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    protocol: dict[str, Any] = field(default_factory=dict)
