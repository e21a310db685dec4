"""How the package is cited, and its changelog, are those of the version that is here."""

import re
from typing import Any

import yaml  # type: ignore[import-untyped]

import nfnet_flax
from tests import documents


def citation() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(documents.text_of("docs/CITATION.cff"))
    return found


def test_the_software_is_cited_as_this_version() -> None:
    found = citation()
    assert found["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= set(found)  # what the format demands
    assert found["type"] == "software"
    assert str(found["version"]) == nfnet_flax.__version__
    assert found["license"] == "Apache-2.0"
    assert found["authors"] == [{"name": "The nfnet_flax authors"}]
    allowed = "cff-version message type title version license authors keywords preferred-citation references"
    assert set(found) <= set(allowed.split())


def test_both_papers_are_cited() -> None:
    found = citation()
    (second,) = found["references"]
    for paper, number in ((found["preferred-citation"], "2102.06171"), (second, "2101.08692")):
        assert {"type", "title", "authors", "year", "journal", "url", "identifiers"} == set(paper)
        assert paper["year"] == 2021
        assert paper["url"] == f"https://arxiv.org/abs/{number}"
        assert paper["identifiers"] == [{"type": "other", "value": f"arXiv:{number}"}]
        assert all(set(author) == {"family-names", "given-names"} for author in paper["authors"])
        assert paper["authors"][0] == {"family-names": "Brock", "given-names": "Andrew"}
    assert [author["family-names"] for author in found["preferred-citation"]["authors"]][-1] == "Simonyan"
    assert found["preferred-citation"]["title"] in documents.text_of("README.md").replace("\n", " ")


def test_the_newest_version_of_the_changelog_is_this_one() -> None:
    headings = re.findall(r"^## (.+)$", documents.text_of("docs/changelog.md"), re.MULTILINE)
    versions = [heading.partition(" ")[0] for heading in headings if heading[0].isdigit()]
    assert versions[0] == nfnet_flax.__version__
    assert len(set(versions)) == len(versions)
