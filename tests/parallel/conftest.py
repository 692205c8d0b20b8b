from __future__ import annotations

import pytest

from parallel.pool import Pool


@pytest.fixture(scope="session")
def pools(tmp_path_factory):
    """Pools by their number of processes."""
    folder = tmp_path_factory.mktemp("pools")
    made = {size: Pool(size, folder) for size in (2, 4)}
    yield made
    for pool in made.values():
        pool.close()
