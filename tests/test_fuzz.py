"""The fuzzer itself: the same cases for a seed, and each kind of fault is found, made smaller and survived."""

import pytest
from util import ROOT, fresh_process

pytestmark = pytest.mark.skipif(
    not (ROOT / "csrc/cpu/tuning.h").exists(), reason="the sizes that are drawn come from the constants of the sources"
)

SETUP = """
    import ctypes, os, time
    import torch
    import regfast
    from tests.fuzz import check, ops, processes, shrink

    def first_wrong(fault, name="softmax"):
        '''The first problem that a fault of one op makes, and the case that is left of it.'''
        kept, ops.OPS[name].ours = ops.OPS[name].ours, fault
        try:
            for seed in range(2000):
                case = check.draw_case(seed)
                if case["op"] == name and (report := check.check_case(case)).wrong:
                    runner = processes.Runner()
                    small, problem = shrink.shrink(case, report.wrong[0], runner, 5.0)
                    runner.close()
                    exec(shrink.script(small), {})
                    return problem, small
        finally:
            ops.OPS[name].ours = kept
"""


def test_the_same_seed_gives_the_same_cases():
    script = "from tests.fuzz.check import draw_case\nprint([draw_case(n) for n in range(60)])"
    assert fresh_process(script) == fresh_process(script)


def test_every_op_and_every_tuning_constant_is_drawn():
    fresh_process(
        SETUP
        + """
    from tests.fuzz.draw import tuning_constants, sizes_of_interest
    names = {check.draw_case(n)["op"] for n in range(3000)}
    from tests.fuzz import direct
    assert names == set(ops.OPS) | {f"torch.ops.regfast.{n}" for n in direct.names()}
    constants = tuning_constants()
    for name in ("kBlockK", "kBlockKInPlace", "kGemmChain", "kFewColumns", "kTileAvx2.rows"):
        assert constants[name] > 1 and {constants[name] - 1, constants[name] + 1} <= set(sizes_of_interest(5000)), name
    """
    )


def test_wrong_values_bits_and_inputs_are_found():
    fresh_process(
        SETUP
        + """
    right = ops.OPS["softmax"].ours
    problem, case = first_wrong(lambda t, c: right(t, c) * 1.001)
    assert "output: at" in problem or "gradient" in problem, problem
    assert set(case["sizes"]["shape"]) <= {1, 2} and case["tensors"]["input"]["layout"] == "contiguous", case

    problem, _ = first_wrong(lambda t, c: right(t, c) * (1.01 if torch.get_num_threads() == 3 else 1))
    assert problem.startswith("3 threads"), problem

    def changes(t, c):
        out = right(t, c)
        if c["tensors"]["input"]["layout"] in ("padded", "offset", "strided"):
            t["input"].detach().untyped_storage()[0] = 1  # beside its elements
        return out
    problem, _ = first_wrong(changes)
    assert problem == "input: was changed", problem

    def refuses(t, c):
        raise ValueError("no")
    problem, _ = first_wrong(refuses)
    assert "raised" in problem, problem
    """
    )


def test_a_crash_costs_one_case():
    out = fresh_process(
        SETUP
        + """
    right = ops.OPS["softmax"].ours
    def faulty(t, c):
        if c["sizes"]["shape"] and c["sizes"]["shape"][0] == 1:
            ctypes.string_at(0)
        return right(t, c)
    ops.OPS["softmax"].ours = faulty
    results = list(processes.run_cases(0, 300, 2, ("softmax",), time.monotonic() + 60))
    crashed = [r for r in results if any("SIGSEGV" in p for p in r.wrong)]
    assert len({r.seed for r in results}) == len(results) and len(results) > 15 and crashed
    for r in crashed:
        assert check.draw_case(r.seed)["sizes"]["shape"][0] == 1
    print("survived")
    """
    )
    assert out.strip() == "survived"
