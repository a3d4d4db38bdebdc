"""docs/recipes.md is what the schema says."""

from pathlib import Path

from longtrain.recipe.reference import reference


def test_the_page_is_generated_from_the_schema() -> None:
    page = Path(__file__).parents[2] / "docs" / "recipes.md"
    assert page.read_text() == reference(), "write it anew: python -m longtrain.recipe.reference > docs/recipes.md"
