# SPDX-License-Identifier: Apache-2.0
"""Open the files of an archive with xarray, lazily. Nothing here imports jax."""

import os
import warnings
import weakref
from pathlib import Path
from typing import Any

from sqzjax.errors import DataError

DEFAULT_NAME = "weather.zarr"
"""What a run of `kind: simulate` calls its archive; a folder that holds one stands for it."""
_NETCDF = (".nc", ".nc4", ".nc3", ".cdf", ".netcdf", ".h5", ".hdf5")
_GRIB = (".grib", ".grib1", ".grib2", ".grb", ".grb1", ".grb2")


def find(path: str | Path) -> str:
    """Return the path or URL of the archive that `path` stands for; DataError if there is none."""
    text = os.fspath(path)
    if "://" in text:
        return text
    place = Path(text)
    if (place / DEFAULT_NAME).is_dir():
        return str(place / DEFAULT_NAME)
    inside = place.is_dir() and any(child.suffix in _NETCDF for child in place.iterdir())
    if inside or "*" in text:
        files = f"{text}/*.nc" if inside else text
        # Without dask, xarray reads all of the values when it joins files.
        raise DataError(
            f"{text} stands for several files; join them into one archive first: `cdo mergetime "
            f"{files} all.nc`, or xarray.open_mfdataset({files!r}).to_zarr('all.zarr')"
        )
    if text.lower().endswith(_GRIB):
        raise DataError(f"{text} is a GRIB file; convert it first: `cdo -f nc4 copy {text} all.nc`")
    if not place.exists():
        raise DataError(f"{text} does not exist; give a Zarr folder, a NetCDF file or a URL")
    return text


def open_dataset(path: str, options: dict[str, Any]) -> Any:
    """Return an xarray dataset whose values are read when asked for."""
    try:
        import xarray
    except ImportError as error:
        raise DataError(f"reading {path} needs xarray: install sqzjax[weather]") from error
    common = {"chunks": None, "decode_timedelta": False}
    try:
        with warnings.catch_warnings():
            # Files in the wild have fill values of another type, which xarray rightly ignores.
            warnings.simplefilter("ignore", xarray.SerializationWarning)
            if not path.lower().endswith(_NETCDF):
                options = {"storage_options": options} if options else {}
                return xarray.open_dataset(path, engine="zarr", **common, **options)
            if "://" in path:
                import fsspec

                opener: Any = fsspec.open(path, **options)
                file = opener.open()
                dataset = xarray.open_dataset(file, **common)
                weakref.finalize(dataset, file.close)
                return dataset
            return xarray.open_dataset(path, **common)
    except (ImportError, OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"cannot read the archive {path}: {error}") from error
