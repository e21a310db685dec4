"""docs/claims.md: its tables are those that the claims make of their evidence in docs/claims/."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from nfnet_flax.claims import agc_shown, cost, cuts_shown, exact, latency_shown
from nfnet_flax.claims.evidence import Evidence, read_evidence
from tests import documents
from tests.runs import ROOT

PAGE = "docs/claims.md"
TABLES: Mapping[str, Callable[[Evidence], dict[str, str]]] = MappingProxyType(
    {
        "agc": agc_shown.tables,
        "exact": exact.tables,
        "cost": cost.tables,
        "cuts": cuts_shown.tables,
        "latency": latency_shown.tables,
    }
)
"""Name of a claim -> makes its tables, by name, of the evidence in `docs/claims/NAME.json`."""


def test_tables_are_those_of_the_evidence() -> None:
    for table in documents.tables(PAGE):
        claim = table.file.removeprefix("docs/claims/").removesuffix(".json")
        made = TABLES[claim](read_evidence(ROOT / table.file, claim))
        wanted = made[table.name] if table.name else next(iter(made.values()))
        assert table.text == f"{wanted}\n", (
            f"{PAGE}: <!-- table: {table.file} {table.name} -->: make it anew:\n{wanted}"
        )


def test_all_evidence_is_shown() -> None:
    shown = {(table.file, table.name) for table in documents.tables(PAGE)}
    for path in sorted((ROOT / "docs" / "claims").glob("*.json")):
        for name in TABLES[path.stem](read_evidence(path, path.stem)):
            assert (f"docs/claims/{path.name}", name) in shown, f"{PAGE} does not show the table {name} of {path.name}"
