"""What pytest is told of the benchmarks."""

from side_by_side import versions


def pytest_configure(config):
    config.addinivalue_line("markers", "peer: another library, or pylogits without what the case is about")


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["libraries"] = list(versions())
