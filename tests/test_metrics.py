"""The metric folders: each loads with `evaluate`, and does what its README says."""

import ast
import json
import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from internvl_mpo.benchmarks.metric import REFERENCE_FIELDS, build_demo, compute_metric
from internvl_mpo.errors import BadInputError

METRICS = Path(__file__).parents[1] / "metrics"


def test_every_rule_scored_benchmark_has_a_folder():
    assert {path.name for path in METRICS.iterdir() if path.is_dir()} == set(REFERENCE_FIELDS)
    for name in REFERENCE_FIELDS:
        assert {f"{name}.py", "README.md", "app.py", "requirements.txt"} <= {p.name for p in (METRICS / name).iterdir()}


@pytest.fixture(scope="module")
def module_cache(tmp_path_factory) -> Iterator[None]:
    """Metric code is copied into one package per process: a folder of the test run's, not the user's cache."""
    evaluate = pytest.importorskip("evaluate", reason="the extra 'eval' is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate.config, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield


@pytest.mark.parametrize("name", REFERENCE_FIELDS)
def test_readme_example_holds(name, tmp_path, module_cache):
    import evaluate

    metric = evaluate.load(str(METRICS / name), cache_dir=str(tmp_path), experiment_id=f"test-{name}")
    block = re.search(r"```python\n(.*?)```", (METRICS / name / "README.md").read_text(encoding="utf-8"), re.DOTALL)[1]
    key, value = re.search(r'result\["(\w+)"\]  # ([\d.]+)', block).groups()
    calls = [node for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Call) and node.keywords]
    arguments = {keyword.arg: ast.literal_eval(keyword.value) for keyword in calls[0].keywords}
    result = metric.compute(**arguments)
    assert result[key] == float(value)
    assert result == compute_metric(name, **arguments)


def test_reference_without_a_field_is_named():
    with pytest.raises(BadInputError, match="reference 0 of pope has no field 'label'"):
        compute_metric("pope", ["Yes"], [{"question_id": "1", "category": "random"}])


def test_rule_and_length_are_checked():
    reference = {"id": "1", "choices": ["a", "b"], "answer": "A"}
    with pytest.raises(BadInputError, match="vlmevalkit"):
        compute_metric("m3cot", ["A"], [reference], rule="vlmevalkit")
    with pytest.raises(BadInputError, match="2 predictions for 1 references"):
        compute_metric("m3cot", ["A", "B"], [reference])


def test_crpe_rotations_are_joined_in_order():
    rows = [{"question_id": str(i), "text": "?", "category": "subject", "correct_option": "ABCD"[i]} for i in range(4)]
    assert compute_metric("crpe", ["A", "B", "C", "D"], rows)["circular"] == 100.0
    assert compute_metric("crpe", ["A", "B", "C", "A"], rows)["circular"] == 0.0


@pytest.mark.parametrize("name", REFERENCE_FIELDS)
def test_space_computes_what_the_metric_does(name):
    pytest.importorskip("gradio", reason="the extra 'demo' is not installed")
    block = re.search(r"```python\n(.*?)```", (METRICS / name / "README.md").read_text(encoding="utf-8"), re.DOTALL)[1]
    call = next(node for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Call) and node.keywords)
    given = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    lines = ["\n".join(json.dumps(row) for row in given[key]) for key in ("predictions", "references")]
    demo = build_demo(name)
    assert demo.fn(*lines, "ours") == compute_metric(name, given["predictions"], given["references"])


def test_a_line_separator_inside_an_answer_of_a_space_ends_no_line():
    pytest.importorskip("gradio", reason="the extra 'demo' is not installed")
    name, rows = "crpe", [{"question_id": "1", "text": "?", "category": "subject", "correct_option": "A"}]
    answers = ["The answer is\u2028A"]
    lines = (json.dumps(values, ensure_ascii=False)[1:-1] for values in (answers, rows))
    assert build_demo(name).fn(*lines, "ours") == compute_metric(name, answers, rows)


@pytest.mark.slow
def test_space_starts_and_answers_over_http():
    gradio = pytest.importorskip("gradio", reason="the extra 'demo' is not installed")
    demo = build_demo("pope")
    _, url, _ = demo.launch(prevent_thread_lock=True, quiet=True, server_name="127.0.0.1")
    try:
        with urllib.request.urlopen(url, timeout=20) as page:
            assert page.status == 200 and b"gradio" in page.read().lower()
    finally:
        demo.close()
        gradio.close_all()
