"""The settings of runs: what differs between them, by name."""

import itertools
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from kimijax.errors import UserError

Settings = dict[str, Any]  # JSON values
LONGEST = 200  # characters of a run's name, which is the name of its directory


class Done(NamedTuple):
    """A run that has ended well."""

    settings: Settings
    result: dict[str, Any]


def product(*parts: Iterable[Settings], **axes: Sequence) -> list[Settings]:
    """Every combination: of settings already made, and of the values of named axes.

    `product(together(layers=[2, 4], width=[64, 32]), seed=[0, 1])` has 4.
    """
    named = [[{name: value} for value in values] for name, values in axes.items()]
    return [
        {k: v for part in combined for k, v in part.items()}
        for combined in itertools.product(*map(list, parts), *named)
    ]


def together(**axes: Sequence) -> list[Settings]:
    """The first values of all axes, then the second ones, ...; ValueError: unequal numbers."""
    return [dict(zip(axes, values, strict=True)) for values in zip(*axes.values(), strict=True)]


def name_of(settings: Settings) -> str:
    """The name of a run: its settings in order, fit for a directory; UserError: too long."""
    parts = []
    for key, value in settings.items():
        text = value if isinstance(value, str) else json.dumps(value)
        parts.append(f"{key}={re.sub(r'[^A-Za-z0-9._+-]+', '_', text)}")
    name = ",".join(parts) or "run"
    if len(name) > LONGEST:
        raise UserError(f"the run {name[:60]!r}... has a name of {len(name)} characters, above "
                        f"{LONGEST}; give its settings shorter names")
    return name


def by_name(all_settings: Iterable[Settings]) -> dict[str, Settings]:
    """Name -> settings; UserError: two different runs have one name."""
    found: dict[str, Settings] = {}
    for settings in all_settings:
        name = name_of(settings)
        if found.setdefault(name, settings) != settings:
            raise UserError(f"two runs are both called {name!r}: {found[name]} and {settings}")
    return found
