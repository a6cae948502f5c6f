"""Several processes of one job on this machine, for every test that needs them."""

import os
import socket
import subprocess
import sys
from contextlib import contextmanager

import pytest


@pytest.fixture(scope="session")
def ranks_of():
    """(arguments of python, …) → a block beside which two gloo ranks run; at its end the list has what each printed."""

    @contextmanager
    def ranks_of(*arguments, **environment):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        ranks = [
            subprocess.Popen(
                [sys.executable, *arguments],
                env={**os.environ, **world, "RANK": str(rank), "LOCAL_RANK": str(rank), **environment},
                **pipes,
            )
            for rank in range(2)
        ]
        outputs = []
        try:
            yield outputs
            outputs += [rank.communicate(timeout=300)[0] for rank in ranks]
            assert [rank.returncode for rank in ranks] == [0, 0], outputs
        finally:
            for rank in ranks:
                rank.kill()

    return ranks_of
