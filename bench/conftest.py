"""Puts the measured machine into pytest-benchmark's JSON."""

import machine


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["regfast"] = machine.measure()
