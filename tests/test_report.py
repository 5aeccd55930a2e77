import json
import threading

import pytest
import torch

import lynx_compile
from lynx_compile.report import GraphReport, Row, record

SPARSE = Row("blocks.0.up", 100, 256, 64, "sparse", "chosen by default", "layer_norm → linear")
DENSE = Row("proj_out", 100, 64, 256, "dense", "safe default: final projection", "linear")
UNMATCHED = Row("x_embedder", 50, 256, 16, "dense", "K = 16 is not a multiple of 64", symbol="s0")


@pytest.fixture(autouse=True)
def _fresh():
    lynx_compile.clear_report()
    yield
    lynx_compile.clear_report()


def test_a_compilation_that_starts_over_counts_once():
    for compile_id in (1, 1, 2, 2):
        record(GraphReport((SPARSE, DENSE)), compile_id)
    record(GraphReport((UNMATCHED,)), 2)  # another graph of one compilation, behind a break
    record(GraphReport((UNMATCHED,)))
    record(GraphReport((UNMATCHED,)))
    assert [len(graph.rows) for graph in lynx_compile.report().graphs] == [2, 2, 1, 1, 1]


def test_totals_over_several_graphs():
    record(GraphReport((SPARSE, DENSE)))
    record(GraphReport((UNMATCHED,), note="gradients are on"))
    report = lynx_compile.report()
    flops = [2 * 100 * 256 * 64, 2 * 100 * 256 * 64, 2 * 50 * 256 * 16]
    assert report.flops == sum(flops)
    assert report.sparse_share == flops[0] / sum(flops)
    assert report.matched_share == sum(flops[:2]) / sum(flops)
    assert report.notes == ["gradients are on"]
    assert report.totals()["linears"] == 3
    assert report.by_pattern()["unmatched"] == {"linears": 1, "sparse": 0, "flops": flops[2]}


def test_json_round_trip():
    record(GraphReport((SPARSE,)))
    loaded = json.loads(lynx_compile.report().to_json())
    assert loaded["graphs"][0]["rows"][0]["name"] == "blocks.0.up"
    assert loaded["totals"]["sparse_share"] == 1.0


def test_table_tells_every_layer_and_its_reason():
    record(GraphReport((SPARSE, UNMATCHED), note="a note"))
    text = str(lynx_compile.report())
    for word in (
        "blocks.0.up",
        "100 × 256 × 64",
        "s0 (50) × 256 × 16",
        "K = 16",
        "a note",
        "1 of 2 linear layers",
    ):
        assert word in text


def test_an_empty_report_has_no_shares():
    assert lynx_compile.report().sparse_share == 0.0
    assert "0 of 0 linear layers" in str(lynx_compile.report())


def test_recording_from_threads():
    threads = [threading.Thread(target=lambda: record(GraphReport((SPARSE,)))) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(lynx_compile.report().graphs) == 16


def test_globs_that_match_nothing_are_named():
    record(GraphReport((SPARSE,), globs=("skip='blocks.*'", "skip='atn.*'", "only='up'")))
    record(GraphReport((DENSE,), globs=("skip='proj_out'",)))
    report = lynx_compile.report()
    assert report.idle_globs == ["skip='atn.*'"]
    assert "skip='atn.*' matches no layer" in str(report)


def test_the_backend_tells_the_globs_it_was_given():
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
    options = {"rest": "eager", "emulate": True, "strict": True, "skip": ["0", "to_out"], "only": "1"}
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend="rt_lynx", options=options)(torch.randn(2, 8, 64))
    assert lynx_compile.report().idle_globs == ["skip='to_out'"]


def test_globs_of_a_whole_model_that_match_nothing_are_named(caplog):
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.up = torch.nn.Linear(64, 64)

        def forward(self, x):
            return self.up(x)

    def warned(layers, *skip):
        torch._dynamo.reset()
        caplog.clear()
        blocks = torch.nn.Sequential(*(Block() for _ in range(layers)))
        model = torch.nn.Sequential(blocks).requires_grad_(False)
        torch.compile(model, backend="rt_lynx", options={"rest": "eager", "skip": skip})(torch.ones(2, 9, 64))
        return [record.getMessage() for record in caplog.records if "matches" in record.getMessage()]

    assert warned(2, "0.1", "*.up") == [
        "skip='0.1' matches no linear layer of this graph, whose names are as '0.1.up'"
    ]
    assert warned(2, "0.1") == []  # said once
    assert warned(1, "0.2") == []  # of one block nothing is known


@pytest.mark.parametrize("gradients", [True, False])
def test_an_exported_graph_whose_weights_want_gradients_is_left_alone(gradients):
    module = torch.nn.Sequential(torch.nn.Linear(64, 64)).requires_grad_(gradients)
    graph = torch.export.export(module, (torch.ones(2, 9, 64),)).module()
    graph.requires_grad_(gradients)
    found = lynx_compile.rewrite(graph, {"emulate": True, "strict": True})
    assert [row.decision for row in found.rows] == ["dense" if gradients else "sparse"]
    assert (found.note is not None) == gradients
