#!/usr/bin/env python3
"""A walk through the latent space of a MegaMolBART: out from one molecule, and across to another.

    python examples/molecule/megamolbart/latent_space.py MODEL [SMILES SMILES]

MODEL: a run folder or any other model that `moltron` reads. Prints what hidden states at growing distances decode to,
and what lies between the two molecules; the distance between two molecules is that of their mean hidden states.
"""

from __future__ import annotations

import sys

import numpy as np

from moltron import load_model


def main(what: str, first: str, second: str) -> None:
    model = load_model(what)
    a, b = model.hiddens([first, second])  # (tokens, width) each
    print(f"{first} → {a.shape}, {second} → {b.shape}, distance {np.linalg.norm(a.mean(0) - b.mean(0)):.2f}")

    print("\nout from the first, by the radius of the noise:")
    for radius in (0.0, 0.5, 1.0):
        (found,) = model.sample([first], "greedy-perturbate", num_samples=3, scaled_radius=radius, seed=1)
        print(f"  {radius:.1f}  " + "   ".join(found))

    print("\nfrom the first to the second:")
    for smiles in model.interpolate(first, second, 5):
        print("  " + smiles)

    rng = np.random.default_rng(0)  # hidden states are numpy arrays: whatever moves them is a search
    moved = [a + rng.normal(scale=0.2, size=a.shape).astype(np.float32) for _ in range(3)]
    print("\nby hand:", *model.decode(moved, beams=3), sep="\n  ")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 4):
        raise SystemExit(__doc__)
    main(sys.argv[1], *(sys.argv[2:] or ["CC(=O)Oc1ccccc1C(=O)O", "Cn1cnc2c1c(=O)n(C)c(=O)n2C"]))
