# SPDX-License-Identifier: Apache-2.0
"""Fixtures shared by all tests; eight fake CPU devices are set up before jax is imported.

Programs are compiled without XLA's costly optimisations, which halves the time of the suite: most
of it is compilation. `JAX_DISABLE_MOST_OPTIMIZATIONS=0` compiles as users do; slow tests run so.
What one test compiled, the others find in a folder that lasts as long as the tests run.
"""

import gc
import os
import tempfile
from collections import Counter
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")  # a twentieth of the time
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _PROGRAMS = tempfile.TemporaryDirectory(prefix="sqzjax-programs-")
    os.environ |= {  # for the other workers and for commands, too
        "JAX_COMPILATION_CACHE_DIR": _PROGRAMS.name,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
_FLAG = "--xla_force_host_platform_device_count=8"
if "host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAG}".strip()

import pytest  # noqa: E402

from tests.default_settings import DEFAULT_SETTINGS, GRIDS, SLOW  # noqa: E402

TESTS = Path(__file__).resolve().parent
MOST_MAPS = 20_000
"""Memory maps of a process (one or more per compiled program); Linux allows 65,530."""


@pytest.hookimpl(tryfirst=True)  # before pytest deselects by marker
def pytest_collection_modifyitems(items):
    """Mark what `default_settings` leaves out as slow; refuse names of no test."""
    named, found = {*DEFAULT_SETTINGS, *GRIDS, *SLOW}, {}
    for item in items:
        if (test := _test_of(item)) in named:
            found.setdefault(test, []).append(item)
    chosen_by_hand = any("::" in str(arg) for arg in items[0].config.args) if items else False
    for test, settings in found.items():
        kept = _kept(test, settings)
        left_out = [item for item in settings if test in SLOW or item.callspec.id not in kept]
        for item in left_out:
            item.add_marker(pytest.mark.slow)
        if len(settings) - len(left_out) < len(kept) and not chosen_by_hand:
            raise pytest.UsageError(f"DEFAULT_SETTINGS: {test} lacks some of {sorted(kept)}")
    files = {test.partition("::")[0] for test in map(_test_of, items)}
    unknown = {test for test in named - found.keys() if test.partition("::")[0] in files}
    if unknown and not chosen_by_hand:
        raise pytest.UsageError(f"tests/default_settings.py: no such test: {sorted(unknown)}")


def _kept(test, settings) -> set[str]:
    """Return which settings of a test run by default."""
    if test in SLOW:
        return set()
    quick = [item for item in settings if not item.get_closest_marker("slow")]
    return set(DEFAULT_SETTINGS.get(test) or (item.callspec.id for item in _every_value(quick)))


def pytest_collection_finish(session):
    """Collect garbage less often: tracing leaves many objects, and what was imported stays."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


def _test_of(item) -> str:
    """Return `folder/file.py::name`, with its class if it has one."""
    path = Path(item.path)
    if TESTS not in path.parents:
        return ""
    names = [item.cls.__name__] if getattr(item, "cls", None) else []
    names.append(getattr(item, "originalname", item.name))
    return "::".join([path.relative_to(TESTS).as_posix(), *names])


def _every_value(items):
    """Return few of the settings of a test, in which every value of every parameter occurs."""
    values = {item: set(enumerate(item.callspec._idlist)) for item in items}
    todo, used, kept = set().union(*values.values()), Counter(), []
    while todo:
        best = max(items, key=lambda i: (len(values[i] & todo), -sum(used[v] for v in values[i])))
        todo -= values[best]
        used.update(values[best])
        kept.append(best)
    return kept


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
