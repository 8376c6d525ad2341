# SPDX-License-Identifier: Apache-2.0
"""Fixtures shared by all tests; eight fake CPU devices are set up before jax is imported.

Programs are compiled without XLA's costly optimisations, which halves the time of the suite: most
of it is compilation. `JAX_DISABLE_MOST_OPTIMIZATIONS=0` compiles as users do; slow tests run so.
"""

import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
_FLAG = "--xla_force_host_platform_device_count=8"
if "host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAG}".strip()

import pytest  # noqa: E402

from tests.default_settings import DEFAULT_SETTINGS  # noqa: E402

TESTS = Path(__file__).resolve().parent
MOST_MAPS = 20_000
"""Memory maps of a process (one or more per compiled program); Linux allows 65,530."""


@pytest.hookimpl(tryfirst=True)  # before pytest deselects by marker
def pytest_collection_modifyitems(items):
    """Mark the settings that `DEFAULT_SETTINGS` leaves out as slow; refuse names of no test."""
    found: dict[str, set[str]] = {}
    for item in items:
        path = Path(item.path)
        name = getattr(item, "originalname", item.name)
        test = f"{path.relative_to(TESTS).as_posix()}::{name}" if TESTS in path.parents else ""
        if test in DEFAULT_SETTINGS:
            setting = item.callspec.id
            found.setdefault(test, set()).add(setting)
            if setting not in DEFAULT_SETTINGS[test]:
                item.add_marker(pytest.mark.slow)
    for test, settings in found.items():
        if missing := set(DEFAULT_SETTINGS[test]) - settings:
            selected = any("[" in str(arg) for arg in items[0].config.args)
            if not selected:
                raise pytest.UsageError(f"DEFAULT_SETTINGS: {test} has no {sorted(missing)}")


@pytest.fixture(autouse=True, scope="module")
def compiling(request):
    """Compile a module that sets `OPTIMIZED = True` as users do; drop programs when there are many.

    Too many make compiling crash.
    """
    if getattr(request.module, "OPTIMIZED", False):
        import jax

        jax.config.update("jax_disable_most_optimizations", False)
        yield
        before = os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"]
        jax.config.update("jax_disable_most_optimizations", before not in ("0", "false"))
    else:
        yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MOST_MAPS:
        import jax

        jax.clear_caches()


SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real data that lies beside a development checkout."""
    folder = SHARED / "data"
    if not folder.is_dir():
        pytest.skip(f"no folder {folder}: reference data is not part of the project")
    return folder


def golden_root() -> Path:
    """Folder of reference checkpoints and outputs; `SQZJAX_GOLDEN` overrides the default."""
    return Path(os.environ.get("SQZJAX_GOLDEN", SHARED / "golden"))
