"""Settings of every test; they must be made before anything imports jax.

Owns: eight CPU devices, shape and type checks on all of occ_jax, strict rank promotion, repeatable
property tests. Subprocesses that a test starts inherit the environment set here, not the checks.
"""

import importlib
import importlib.util
import os
import typing

# Appended, as the last flag of a name wins: every test can count on eight devices.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
).strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "Agg")

import hypothesis
import jax
import pytest

# No persistent compilation cache: tests of bit-identity must compare what was compiled here and
# now. For quick repeats of other tests, set JAX_COMPILATION_CACHE_DIR=.cache/jax yourself.

# [D] + [B, D] must be written out: a silent broadcast of ranks is the usual way to a wrong loss.
jax.config.update("jax_numpy_rank_promotion", "raise")

# Every jaxtyping annotation in occ_jax is checked at call time, dimensions and dtypes. `make core`
# runs the tests of the calibration where jaxtyping is not installed.
if importlib.util.find_spec("jaxtyping"):
    import jaxtyping

    jaxtyping.install_import_hook(["occ_jax"], "beartype.beartype")
    # The calibration imports jaxtyping for type checkers only; a test run is one of them. Modules
    # for which that would be wrong are imported before.
    for module in ("beartype", "optax", "occ_jax"):
        importlib.import_module(module)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(typing, "TYPE_CHECKING", True)
        importlib.import_module("occ_jax.calibration")

# The same examples on every machine; no deadline, as the first example includes compilation.
hypothesis.settings.register_profile("occ_jax", derandomize=True, deadline=None, max_examples=30)
hypothesis.settings.load_profile("occ_jax")


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Every compiled program takes maps of memory, of which Linux gives a process 65,530."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="module")
def quick_compilation():
    """No effort on fast code: tests of whole runs compile far longer than they compute."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def pytest_terminal_summary(terminalreporter):
    """Prints what tests measured, recorded as property "figures", from every worker."""
    for reports in list(terminalreporter.stats.values()):
        for report in reports:
            for name, value in getattr(report, "user_properties", ()):
                if name == "figures" and report.when == "call":
                    terminalreporter.write_line(value)
