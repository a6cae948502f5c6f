"""How ProtT5 is cut: globs over module names."""

from dataclasses import replace

from moltron.models import encoder_decoder

TABLES = ("encoder.relative_bias", "decoder.relative_bias")  # of t5
PLAN = replace(
    encoder_decoder.PLAN,
    tensor={**encoder_decoder.PLAN.tensor, **dict.fromkeys(TABLES, "column of whole")},
    copied={
        "embed": "head",
        "encoder.relative_bias": "encoder.layers.*",
        "decoder.relative_bias": "decoder.layers.*",
    },
)
