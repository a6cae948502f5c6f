"""ESM-1."""

from moltron.models.esm1.convert import CONVERSION
from moltron.models.esm1.model import Esm1, Esm1Config
from moltron.models.esm1.plan import PLAN
from moltron.models.spec import ModelSpec

SPEC = ModelSpec(name="esm1", config=Esm1Config, model=Esm1, plan=PLAN, objectives=("masked_lm",), convert=CONVERSION)
