# SPDX-License-Identifier: Apache-2.0
"""Every reference emulator of `SQZJAX_GOLDEN`: output of the original code, and the way back."""

import json
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sqzjax.io import swin
from sqzjax.models import Execution, SwinEmulator
from tests import arrays
from tests.conftest import golden_root
from tests.tolerances import GOLDEN_FIELDS_REL


def _folders() -> list[Path]:
    root = golden_root()
    found = sorted(root.glob("*/config.json")) if root.is_dir() else []
    return [path.parent for path in found if json.loads(path.read_text()).get("arch") == "swin"]


FOLDERS = _folders()
if not FOLDERS:
    pytest.skip(
        f"no reference emulators in {golden_root()}: set SQZJAX_GOLDEN", allow_module_level=True
    )


@pytest.fixture(params=FOLDERS, ids=lambda folder: folder.name)
def folder(request):
    return request.param


@cache
def _load(folder: Path, scan: bool, remat: str):
    execution = Execution(scan_layers=scan, remat=remat)
    config, params = swin.load(folder, execution=execution)
    return SwinEmulator(config, execution), params, arrays.load(folder / "expected.npz")


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "stacked"])
def test_output(folder, scan):
    model, params, expected = _load(folder, scan, "none")
    coordinates = jnp.asarray(expected["coords"]) if "coords" in expected else None
    found = jax.jit(model.forward)(params, jnp.asarray(expected["x"]), coordinates)
    wanted = expected["y"][:, -1]
    scale = np.abs(wanted).max()
    np.testing.assert_allclose(found / scale, wanted / scale, rtol=0, atol=GOLDEN_FIELDS_REL)


def test_export_is_byte_identical(folder, tmp_path):
    """Tensors written by `swin.save` equal the originals, name by name, bit by bit."""
    safetensors = pytest.importorskip("safetensors.numpy")
    model, params, _ = _load(folder, True, "none")
    swin.save(tmp_path / "out", model.config, params)
    original = safetensors.load_file(folder / "model.safetensors")
    written = safetensors.load_file(tmp_path / "out" / "model.safetensors")
    assert set(written) == set(original)
    for name, tensor in original.items():
        np.testing.assert_array_equal(written[name].view(np.uint8), tensor.view(np.uint8), name)
    config, again = swin.load(tmp_path / "out", execution=model.execution)
    assert config == model.config
    jax.tree.map(np.testing.assert_array_equal, params, again)
