"""One world for the tests of all commands; a refused command leaves nothing behind in it."""

import pytest


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    from command_helpers import world_of_teachers

    return world_of_teachers(tmp_path_factory.mktemp("world"))
