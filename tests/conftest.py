"""Several processes of one job on this machine, for every test that needs them."""

import os
import socket
import subprocess
import sys
import tempfile
from contextlib import contextmanager, suppress

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
        files = [tempfile.TemporaryFile("w+") for _ in range(2)]  # noqa: SIM115 (a pipe that nobody reads stops its rank)
        ranks = [
            subprocess.Popen(
                [sys.executable, *arguments],
                env={**os.environ, **world, "RANK": str(rank), "LOCAL_RANK": str(rank), **environment},
                stdout=files[rank],
                stderr=subprocess.STDOUT,
            )
            for rank in range(2)
        ]
        outputs = []
        try:
            yield outputs
            with suppress(subprocess.TimeoutExpired):
                for rank in ranks:
                    rank.wait(timeout=300)
            for file in files:
                file.seek(0)
                outputs.append(file.read())
            assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(outputs)
        finally:
            for rank, file in zip(ranks, files, strict=True):
                rank.kill()
                file.close()

    return ranks_of
