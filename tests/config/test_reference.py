"""The documented options are the options there are."""

from pathlib import Path

from megamoe.config.load import load_config
from megamoe.config.reference import markdown, option_rows

REPOSITORY = Path(__file__).parents[2]


def test_page_is_up_to_date():
    page = (REPOSITORY / "docs/configuration.md").read_text(encoding="utf-8")
    assert page == markdown(), "run: megamoe config --reference > docs/configuration.md"


def test_documented_defaults_are_accepted_as_overrides():
    rows = [row for row in option_rows() if row.kind != "table"]
    overrides = [f"{row.name}={'' if row.default == chr(34) * 2 else row.default}" for row in rows]
    assert load_config(overrides=overrides) == load_config()
    assert all(row.help for row in rows)
