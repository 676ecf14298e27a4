"""Puts the measured machine into pytest-benchmark's JSON."""

import machine


def pytest_addoption(parser):
    parser.addoption(
        "--slow-peers",
        action="store_true",
        help=f"PyTorch's chunked cross-entropy also where it takes more than {machine.PATIENCE} s",
    )


def pytest_configure(config):
    if config.getoption("--slow-peers"):
        machine.PATIENCE = None


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["regfast"] = machine.measure()
