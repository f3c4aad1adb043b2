"""The classes that vitkern.patch serves, as the tables of its libraries have them: the rows of docs/models.md."""

import importlib

from vitkern.patch import LIBRARIES


def served() -> list[tuple[str, str, str]]:
    """(library, class with its module, op) of every class, sorted."""
    found = []
    for library in LIBRARIES:
        table = importlib.import_module(f"vitkern.patch.{library}").TABLE
        found += [(library, kind, op) for kind, (_, op) in sorted(table.items())]
    return found


def markdown() -> str:
    """The page docs/models.md."""
    lines = [
        "# Models that `vitkern.patch` serves",
        "",
        "`vitkern.patch(model)` looks at the class of every module. A model is served where it holds one of these classes,",
        "whatever its name; a subclass is not, and the report says so. `python -m benchmarks.tables` makes this page from the",
        "tables of `patch`.",
        "",
        "| library | class | op |",
        "|---|---|---|",
    ]
    for library, kind, op in served():
        lines.append(f"| {library} | `{kind.removeprefix(library + '.').removeprefix('models.')}` | {op} |")
    return "\n".join(lines) + "\n"
