"""The sweep itself: the same cases for a number, what is slow is printed as such, with a number that repeats it."""

import pytest
from util import ROOT, fresh_process

pytestmark = pytest.mark.skipif(
    not (ROOT / "bench/sweep.py").exists(), reason="there are no benchmarks beside these tests"
)

SETUP = """
    import contextlib, io, json, sys, time
    sys.path.insert(0, "bench")
    import torch
    import regfast
    import sweep, sweep_cases

    SMALL = "--threads 1 --largest 4096 --seconds 100 --seed 3 --cases 40".split()

    def slowed(fn):
        def slow(*args, **options):
            time.sleep(0.002)
            return fn(*args, **options)
        return slow

    def run(*arguments):
        '''The exit status and what was printed.'''
        with contextlib.redirect_stdout(io.StringIO()) as out:
            status = sweep.main([*SMALL, *arguments])
        return status, out.getvalue()
"""


def test_the_same_number_gives_the_same_case():
    script = SETUP + "    print([sweep_cases.draw_case(n) for n in range(60)])"
    assert fresh_process(script) == fresh_process(script)


def test_every_kind_is_drawn_within_the_limits_and_builds():
    fresh_process(
        SETUP
        + """
    cases = [sweep_cases.draw_case(n) for n in range(5000)]
    assert {(c.op, c.kind) for c in cases} == {(op, kind) for op, kinds in sweep_cases.SHAPES.items() for kind in kinds}
    assert {c.dtype for c in cases} == set(sweep_cases.DTYPES)
    assert {c.layout for c in cases} == set(sweep_cases.IMAGE_LAYOUTS)
    assert all(min(c.shape) > 0 and c.largest <= sweep_cases.LARGEST for c in cases)
    assert max(c.largest for c in cases) > sweep_cases.LARGEST / 2
    for case in cases:
        if case.largest < 3000:
            work = sweep_cases.build(case)
            theirs, ours = work.eager(*work.inputs), work.regfast(*work.inputs)
            assert (theirs.shape, theirs.dtype) == (ours.shape, ours.dtype), case
            assert not case.layout == "channels_last" or work.inputs[0].is_contiguous(memory_format=torch.channels_last)
            half = case.dtype in ("bfloat16", "float16")  # in which PyTorch rounds logits that regfast does not
            assert half or torch.allclose(theirs, ours, rtol=1e-3, atol=1e-5), case
    """
    )


def test_what_is_slow_is_the_worst_and_its_number_repeats_it(tmp_path):
    file = tmp_path / "sweep.json"
    fresh_process(
        SETUP
        + f"""
    right, regfast.softmax = regfast.softmax, slowed(regfast.softmax)
    status, out = run("--worst", "1", "--json", {str(file)!r})
    assert status == 1, out
    row = next(line.split() for line in out.split("ratio")[1].splitlines() if "softmax" in line)
    assert row[3] == "softmax" and float(row[-2][:-1]) < 0.5, out

    found = json.load(open({str(file)!r}))
    assert found["seed"] == 3 and found["machine"]["threads"] == 1
    results = found["results"]
    assert {{r["mode"] for r in results}} == {{"fwd", "fwd_bwd"}} and all(r["path"] for r in results)
    worst = min(results, key=lambda r: r["ratio"])
    assert worst["op"] == "softmax" and worst["number"] == int(row[1]) and worst["again"]
    assert worst["theirs"] / worst["ours"] < 0.5 and worst["ours"] > 0.002

    status, out = run("--case", row[1], "--json", {str(file)!r})
    again = json.load(open({str(file)!r}))["results"]
    assert status == 1 and [r["number"] for r in again] == 2 * [worst["number"]], out
    keys = ("op", "kind", "shape", "dtype", "layout", "options", "path")
    assert all(r[key] == worst[key] for r in again for key in keys)
    """
    )


def test_only_slower_calls_fail_and_only_the_asked_ops_run():
    fresh_process(
        SETUP
        + """
    torch.softmax = slowed(torch.softmax)
    status, out = run("--ops", "softmax")
    assert status == 0 and "Kinds" not in out and "logsumexp" not in out, out
    assert run("--seconds", "0") == (0, "\\n".join(out.splitlines()[:2]) + "\\nno calls\\n")
    try:
        run("--ops", "softmaxx")
    except SystemExit as stop:
        assert stop.code == 2
    else:
        raise AssertionError("an unknown op was accepted")
    """
    )
