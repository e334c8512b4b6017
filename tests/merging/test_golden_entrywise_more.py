"""The further entry-wise methods against the outputs of the reference implementations."""

from __future__ import annotations

import pytest
import torch
from golden import Golden, assert_close, both, run
from test_golden_entrywise import as_stack, injected

from merging.updates import UpdateStack

LAYERS = ("q", "v")
SETS = ("hom4", "het246")
WEIGHTS = {"w111": [1.0, 1.0, 1.0], "wmix": [0.7, 0.3, -0.2]}


mergekit_file = both("mergekit")


dare_tall_file = both("dare_tall")


breadcrumbs_file = both("breadcrumbs")


sce_file = both("sce_varm")


def scaled_stack(file: Golden) -> UpdateStack:
    """The adapters ``in.<t>`` with their scales."""
    scales = file.tensors["in.scales"]
    B = tuple((file.tensors[f"in.{t}.lora_B"] * scales[t]).to(file.dtype).unsqueeze(0) for t in range(3))
    A = tuple(file.tensors[f"in.{t}.lora_A"].to(file.dtype).unsqueeze(0) for t in range(3))
    return UpdateStack(("layer",), (0, 1, 2), B, A)


@pytest.mark.parametrize("tag", WEIGHTS)
@pytest.mark.parametrize(("density", "gamma"), [(0.5, 0.01), (0.9, 0.2)])
@pytest.mark.parametrize("method", ["breadcrumbs", "breadcrumbs_ties"])
def test_breadcrumbs_is_mergekit(
    mergekit_file: Golden, method: str, density: float, gamma: float, tag: str
) -> None:
    checked = 0
    for name in SETS:
        for layer in LAYERS:
            key = f"out.{name}.{layer}.{method}.d{density}.g{gamma}.{tag}"
            if key not in mergekit_file.tensors:
                continue
            parameters = {"compat": "mergekit", "density": density, "gamma": gamma}
            stack = mergekit_file.stack(name, layer)
            [merged] = run(method, [stack], parameters, weights=WEIGHTS[tag])
            assert_close(merged, mergekit_file.tensors[key], 1e-10)
            checked += 1
    assert checked == (0 if method == "breadcrumbs_ties" and density == 0.9 else 4)


@pytest.mark.parametrize("tag", WEIGHTS)
@pytest.mark.parametrize("method", ["della", "della_linear"])
def test_della_is_mergekit_given_its_masks(
    mergekit_file: Golden, monkeypatch: pytest.MonkeyPatch, method: str, tag: str
) -> None:
    for name in SETS:
        for layer in LAYERS:
            key = f"{name}.{layer}.{method}.d0.5.{tag}"
            masks = [mergekit_file.tensors[f"aux.{key}.mask.t{t}"] for t in range(3)]
            injected(monkeypatch, {layer: torch.stack(masks)})
            stack = mergekit_file.stack(name, layer)
            parameters = {"compat": "mergekit", "density": 0.5}
            [merged] = run(method, [stack], parameters, weights=WEIGHTS[tag])
            # The reference masks and rescales in float32.
            assert_close(merged, mergekit_file.tensors[f"out.{key}"], 5e-7)


@pytest.mark.parametrize("topk", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("budget", [1 << 28, 40_000], ids=["one-block", "row-blocks"])
def test_sce_is_mergekit(mergekit_file: Golden, topk: float, budget: int) -> None:
    for name in SETS:
        for layer in LAYERS:
            parameters = {"compat": "mergekit", "select_topk": topk}
            [merged] = run("sce", [mergekit_file.stack(name, layer)], parameters, budget=budget)
            assert_close(merged, mergekit_file.tensors[f"out.{name}.{layer}.sce.k{topk}"], 1e-10)


def test_sce_is_mergekit_on_ties_and_zeros(mergekit_file: Golden) -> None:
    stack = as_stack("edge", mergekit_file.tensors["in.edge"].to(mergekit_file.dtype).unsqueeze(1))
    [merged] = run("sce", [stack], {"compat": "mergekit", "select_topk": 1.0})
    assert_close(merged.flatten(), mergekit_file.tensors["out.edge.sce.k1.0"], 1e-12)


@pytest.mark.parametrize("topk", [0.3, 1.0])
def test_sce_is_the_paper(sce_file: Golden, topk: float) -> None:
    [merged] = run("sce", [scaled_stack(sce_file)], {"select_topk": topk})
    assert_close(merged, sce_file.tensors[f"out.topk{topk}.paper.delta"], 1e-10)


def test_breadcrumbs_by_rows_is_the_authors_code(breadcrumbs_file: Golden) -> None:
    parameters = {"compat": "paper", "density": 0.5, "gamma": 0.1}
    [merged] = run("breadcrumbs", [scaled_stack(breadcrumbs_file)], parameters)
    assert_close(0.3 * merged, breadcrumbs_file.tensors["out.rows.merged"], 1e-12)


def test_breadcrumbs_by_tensors_is_the_public_function(breadcrumbs_file: Golden) -> None:
    parameters = {"density": 0.6, "gamma": 0.05}
    [merged] = run("breadcrumbs", [scaled_stack(breadcrumbs_file)], parameters)
    assert_close(0.3 * merged, breadcrumbs_file.tensors["out.flat.merged_sum"], 1e-12)


@pytest.mark.parametrize("strictness", [0.2, 0.4, 0.6, 1.0])
@pytest.mark.parametrize("needed", [1, 2, 3])
def test_consensus_is_the_reference(dare_tall_file: Golden, strictness: float, needed: int) -> None:
    stacks = [dare_tall_file.stack("hom4", layer) for layer in LAYERS]
    parameters = {"compat": "paper", "mask_lambda": strictness, "min_agree": needed}
    merged = run("consensus", stacks, parameters)
    expected = dare_tall_file.tensors[f"out.hom4.consensus_ta.lam{strictness}.k{needed}"]
    assert_close(torch.cat([part.flatten() for part in merged]), expected, 1e-12)


@pytest.mark.parametrize("dropped", [0.2, 0.9])
def test_magnitude_pruning_counts_as_mergelm_does(dare_tall_file: Golden, dropped: float) -> None:
    for layer in LAYERS:
        whole = dare_tall_file.stack("hom4", layer)
        for t in range(3):
            stack = UpdateStack((layer,), (0,), whole.B[t : t + 1], whole.A[t : t + 1])
            [merged] = run("magnitude_prune", [stack], {"compat": "paper", "density": 1.0 - dropped})
            expected = dare_tall_file.tensors[f"out.hom4.{layer}.magnitude.p{dropped}.t{t}"]
            assert_close(merged, expected, 1e-12)


@pytest.mark.parametrize("dropped", [0.2, 0.9])
@pytest.mark.parametrize("rescale", [True, False])
def test_dare_is_mergelm_given_its_masks(
    dare_tall_file: Golden, monkeypatch: pytest.MonkeyPatch, dropped: float, rescale: bool
) -> None:
    for layer in LAYERS:
        whole = dare_tall_file.stack("hom4", layer)
        for t in range(3):
            drop = dare_tall_file.tensors[f"aux.hom4.{layer}.drop_mask.p{dropped}.t{t}"]
            injected(monkeypatch, {layer: (1 - drop).unsqueeze(0)})
            stack = UpdateStack((layer,), (0,), whole.B[t : t + 1], whole.A[t : t + 1])
            parameters = {"density": 1.0 - dropped, "rescale": rescale}
            [merged] = run("dare_linear", [stack], parameters)
            expected = dare_tall_file.tensors[
                f"out.hom4.{layer}.random.p{dropped}.rescale{int(rescale)}.t{t}"
            ]
            assert_close(merged, expected, 1e-12)
