"""ProtT5."""

from moltron.models.prott5.convert import CONVERSION
from moltron.models.prott5.model import ProtT5, ProtT5Config
from moltron.models.prott5.plan import PLAN
from moltron.models.spec import ModelSpec

SPEC = ModelSpec(
    name="prott5",
    config=ProtT5Config,
    model=ProtT5,
    plan=PLAN,
    objectives=("span_corruption",),
    convert=CONVERSION,
)
