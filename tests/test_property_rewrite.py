"""Random graphs: the rewritten graph computes what the definition says, with the passes in any order."""

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lynx_compile import passes

from .agreement import check, rewritten, run
from .strategies import random_graph

SLOW_IS_FINE = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}


@settings(max_examples=150, **SLOW_IS_FINE)
@given(st.randoms(use_true_random=False))
def test_rewritten_equals_the_definition(draw):
    check(random_graph(draw))


@settings(max_examples=75, **SLOW_IS_FINE)
@given(st.randoms(use_true_random=False), st.permutations(passes.FUSIONS))
def test_in_any_order_of_passes(draw, fusions):
    check(random_graph(draw), fusions)


@settings(max_examples=50, **SLOW_IS_FINE)
@given(st.randoms(use_true_random=False))
def test_a_second_run_of_the_passes_changes_nothing_that_matters(draw):
    drawn = random_graph(draw)
    graph = rewritten(drawn)
    want = run(graph, drawn.fresh_inputs())
    for fuse in passes.FUSIONS:
        fuse(graph)
    graph.lint()
    for a, b in zip(run(graph, drawn.fresh_inputs()), want, strict=True):
        assert a.equal(b)


@settings(max_examples=50, **SLOW_IS_FINE)
@given(st.randoms(use_true_random=False))
def test_nothing_chosen_is_the_dense_graph(draw):
    drawn = random_graph(draw)
    drawn.chosen = set()
    check(drawn)
