"""The suite as pytest sees it: one parametrised function, one test a case."""

from shardproof.conformance.api import load_adapter
from shardproof.conformance.checks import CHECKS
from shardproof.conformance.plugin import selected_cases


def pytest_generate_tests(metafunc):
    """One test a case of the chosen bridge, families, plans and checks."""
    config = metafunc.config
    cases = selected_cases(load_adapter(config.getoption("bridge")), config)
    metafunc.parametrize("case", cases, ids=[c.id for c in cases])


def test_case(case, lab, snapshot):
    """Run one case; the law is the check's docstring."""
    lab.snapshot, lab.error = snapshot, None
    CHECKS[case.check].run(lab, case)
