"""What a result holds, as the tables and the pictures take it: rows, heat maps, curves over V."""

import statistics
from dataclasses import dataclass

MODES = {"fwd": "forward", "bwd": "backward", "fwd_bwd": "forward + backward", "step": "training step"}
DTYPES = {"float32": "", "bfloat16": "bf16", "float16": "fp16"}
ENVIRONMENTS = {
    "avx512_no_bf16": "oneDNN held to plain AVX-512",
    "avx2": "all held to AVX2",
}
PROVIDERS = {"eager": "PyTorch", "chunked": "PyTorch's chunks", "regfast": "regfast"}
BUSY = 0.1  # CPUs that others may use before a result is called disturbed


@dataclass
class Row:
    label: str
    regfast: float  # seconds
    eager: float
    vs_eager: float  # how many times longer the other takes
    headline: bool
    vs_huge_pages: float | None = None
    vs_chunked: float | None = None
    vs_compile: float | None = None
    vs_jax: float | None = None
    share: float | None = None
    bound: str = ""


def compact(raw: dict) -> dict:
    """The machine and each case's stored facts, without the raw samples and without the host's name."""
    cases = [entry["extra_info"] for entry in raw["benchmarks"]]
    return {"machine": raw["machine_info"]["regfast"], "date": raw["datetime"][:10], "cases": rounded(cases)}


def combined(results: list[dict]) -> dict:
    """The cases of all these results of one machine, each as it was measured last; its ceilings are the first ones."""
    slugs = {result["machine"]["slug"] for result in results}
    if len(slugs) > 1:
        raise SystemExit(f"results of several machines: {', '.join(sorted(slugs))}")
    cases = {(case["name"], case["grid"]): case for result in results for case in result["cases"]}
    return results[0] | {"date": results[-1]["date"], "cases": list(cases.values())}


def rounded(value):
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list) else value


def describe(case: dict) -> str:
    shape = " x ".join(map(str, case["shape"]))
    extra = [case["label"], DTYPES[case["dtype"]], "cold caches" if case["cold"] else ""]
    return ", ".join([f"{case['op']} {shape}", MODES[case["mode"]], *filter(None, extra)])


def rows(result: dict) -> list[Row]:
    """One row per case, and one more for each environment that stands for another CPU."""
    found = []
    for case in result["cases"]:
        if case.get("grid") or "eager" not in case["median_s"]:
            continue
        label, headline, others = describe(case), case["headline"], case["environments"]
        times, ratio = case["median_s"], case["ratio"]
        row = Row(label, times["regfast"], times["eager"], ratio["eager"], headline)
        if "huge_pages" in others:
            row.vs_huge_pages = others["huge_pages"]["ratio"]["eager"]
        row.vs_chunked, row.vs_compile, row.vs_jax = map(ratio.get, ("chunked", "compile", "jax"))
        row.share, row.bound = case.get("share"), case.get("bound", "")
        found.append(row)
        for name, text in ENVIRONMENTS.items():
            if name in others:
                times, ratio = others[name]["median_s"], others[name]["ratio"]
                found.append(Row(f"{label}; {text}", times["regfast"], times["eager"], ratio["eager"], headline))
    return found


def machine_line(result: dict) -> str:
    machine = result["machine"]
    memory = machine["bandwidth_gb_s"][-1]
    peak = machine["fma_gflop_s"]
    return (
        f"{machine['cpu']}, {machine['threads']} threads, regfast on {machine['isa']}, torch {machine['torch']}, "
        f"transparent huge pages: {machine['huge_pages']}; measured: memory read {memory['read']:.0f} and copy "
        f"{memory['copy']:.0f} GB/s, float32 FMA {peak['all']:.0f} GFLOP/s"
    )


def disturbed(result: dict) -> list[str]:
    """The measurements during which other processes took CPU time away."""
    found = [describe(case) for case in result["cases"] if case["others_cpus"] > BUSY]
    if result["machine"]["others_cpus"] > BUSY:
        found.insert(0, "the ceilings themselves (so every share is too high)")
    return found


@dataclass
class Grid:
    """One heat map: how many times longer `other` takes, by rows and layer."""

    title: str
    ratio: dict[tuple[int, int, int], float]  # (N, D, V)
    share: dict[tuple[int, int, int], float]  # of the float32 FMA peak

    def geometric_mean(self) -> float:
        return statistics.geometric_mean(self.ratio.values())


def grids(result: dict) -> list[Grid]:
    peak = result["machine"]["fma_gflop_s"]["all"] * 1e9
    found: dict[str, Grid] = {}
    for case in result["cases"]:
        if not case.get("grid"):
            continue
        kind = ", ".join(filter(None, [MODES[case["mode"]], case["label"], DTYPES[case["dtype"]] or "float32"]))
        others = {"PyTorch": case}
        if "openblas" in case["environments"]:
            others["NumPy's OpenBLAS"] = case["environments"]["openblas"]
        for other, timing in others.items():
            grid = found.setdefault(f"{kind}, against {other}", Grid(f"{kind}, against {other}", {}, {}))
            shape = tuple(case["shape"])
            grid.ratio[shape] = timing["ratio"]["eager" if other == "PyTorch" else "numpy"]
            grid.share[shape] = case["flops"] / timing["median_s"]["regfast"] / peak
    return list(found.values())


def vocabularies(result: dict) -> dict[int, dict]:
    """The cases of the curves over V, by V."""
    found = (case for case in result["cases"] if case["op"] == "linear_cross_entropy" and "peak_bytes" in case)
    return {case["shape"][2]: case for case in found}


def further_facts(result: dict) -> list[str]:
    """A sentence for whatever else was measured of a case: memory, parts of its work, errors."""
    found = []
    for case in result["cases"]:
        said = []
        if "extra_memory" in case:
            names = {"eager": "PyTorch", "regfast": "regfast", "in_place": "regfast in place"}
            used = [f"{name} {case['extra_memory'][key]:.2f}" for key, name in names.items()]
            said.append(f"extra memory in buffers of the logits' size: {', '.join(used)}")
        if "peak_bytes" in case:
            used = [f"{PROVIDERS[name]} {size / 2**20:.0f}" for name, size in case["peak_bytes"].items()]
            said.append(f"peak memory in MiB over inputs and gradients: {', '.join(used)}")
        if "eager" not in case["median_s"]:
            parts = [f"{name} {ratio:.0%}" for name, ratio in case["ratio"].items()]
            said.append(f"share of the whole call's time: {', '.join(parts)}")
        if "errors" in case:
            errors = [f"{name} {error:.1e}" for name, error in case["errors"].items()]
            said.append(f"relative error of the weight's gradient against float64: {', '.join(errors)}")
        found += [f"{describe(case)}: {text}" for text in said]
    return found
