"""Random starts of which each rank keeps its part, and files of which it reads its part."""

import pytest

import launch


@pytest.mark.parametrize("world", [1, 2, pytest.param(4, marks=pytest.mark.long)])
def test_models_made_in_parts_are_those_made_whole(world):
    """Bit for bit, of families that initialize weights in other ways; tests/zero/made.py says what it looks at."""
    launch.ranks(world, [launch.ROOT / "tests" / "zero" / "made.py"])


@pytest.mark.parametrize("world", [1, 2, pytest.param(4, marks=pytest.mark.long)])
def test_models_loaded_in_parts_are_those_loaded_whole(world, tmp_path):
    """Bit for bit, of files in other dtypes than the run's and of experts; what is looked at stands in loaded.py."""
    launch.ranks(world, [launch.ROOT / "tests" / "zero" / "loaded.py", tmp_path])
