"""Random starts of which each rank keeps its part."""

import pytest

import launch


@pytest.mark.parametrize("world", [1, 2, pytest.param(4, marks=pytest.mark.long)])
def test_models_made_in_parts_are_those_made_whole(world):
    """Bit for bit, of families that initialize weights in other ways; tests/zero/made.py says what it looks at."""
    launch.ranks(world, [launch.ROOT / "tests" / "zero" / "made.py"])
