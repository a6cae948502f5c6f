"""How ProtT5 is cut: globs over module names."""

from dataclasses import replace

from moltron.models import encoder_decoder

CUT = dict.fromkeys(("encoder.relative_bias", "decoder.relative_bias"), "column of whole")
COPIED = {"embed": "head", "encoder.relative_bias": "encoder.layers.*", "decoder.relative_bias": "decoder.layers.*"}
PLAN = replace(encoder_decoder.PLAN, tensor={**encoder_decoder.PLAN.tensor, **CUT}, copied=COPIED)
