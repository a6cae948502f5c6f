"""`moltron prepare`: sequences to a folder that training reads."""

from moltron.data.prepare.run import prepare

__all__ = ["prepare"]
