"""Softmax and losses of labelled arrays: xarray keeps the names and coordinates, pylogits computes."""

from pathlib import Path

import numpy as np
import xarray as xr

import pylogits

folder = Path(__file__).parent
logits = xr.DataArray(
    np.load(folder / "digits_logits.npy").T,  # whichever dimension the classes are on: they are named, not numbered
    dims=("digit", "image"),
    coords={"digit": list("0123456789")},
)
targets = xr.DataArray(np.load(folder / "digits_targets.npy"), dims="image", name="target")

probabilities = xr.apply_ufunc(
    pylogits.softmax,
    logits,
    input_core_dims=[["digit"]],
    output_core_dims=[["digit"]],
    kwargs={"temperature": 2.0},
)
losses = xr.apply_ufunc(
    pylogits.cross_entropy,
    logits,
    targets,
    input_core_dims=[["digit"], []],
    kwargs={"reduction": "none"},
)

print(f"probabilities {dict(probabilities.sizes)}, of the first image:")
print(probabilities.isel(image=0).round(4).to_series().to_string())
print("\nmean loss of the images of each digit:")
print(losses.groupby(targets).mean().round(4).to_series().to_string())
