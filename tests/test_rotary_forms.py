"""Which functions that rotate are known, and that nothing else is taken for one: ``rope_dist/hf/forms.py``."""

import ast
import dataclasses
import functools
import inspect
import json
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from helpers.stock import assert_stock, classes
from helpers.stock_copies import SOURCE, stock_copy, tiny
from torch import nn

import rope_dist
import tools.norm_forms
from rope_dist.hf import forms, norm_forms
from rope_dist.hf.enabled import EnabledAttention
from rope_dist.hf.forms import FILE, Form, Unsupported, digest, known_forms
from tools import rotary_forms

NORMS = norm_forms.FILE
IDS = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(1))
HALF = "def rotate_half(x):"
CAT = "return torch.cat((-x2, x1), dim=-1)"
HEAD = "def apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1):"
CALL = "query_states, key_states = apply_rotary_pos_emb(query_states, key_states, cos, sin)"
TURN = "def turn(q, k, cos, sin):\n    return apply_rotary_pos_emb(q, k, cos, sin)"
SUM = "q_embed = (q * cos) + (rotate_half(q) * sin)"

pytestmark = pytest.mark.usefixtures("stock_again", "one_thread")


@pytest.fixture
def make_copy(tmp_path):
    """A changed copy of transformers' llama file: ``make_copy(*changes)``."""
    made = []

    def make(*changes):
        made.append(stock_copy(tmp_path, *changes))
        return made[-1]

    yield make
    rope_dist.disable()
    for module in made:
        del sys.modules[module.__name__]


def assert_enabled_equals_stock(model):
    with torch.no_grad():
        expected = model(IDS).logits
        with rope_dist.enable(model) as enabled:
            assert enabled.layers == 2
            assert torch.equal(model(IDS).logits, expected)


def assert_refused(model, *texts):
    before = classes(model)
    with pytest.raises(Unsupported) as refused:
        rope_dist.enable(model)
    assert all(text in str(refused.value) for text in texts), refused.value
    assert classes(model) == before
    assert_stock(model, model)


APPLY = """
def rotate_half(x):
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((-x2, x1), dim=-1)

def apply_rotary(q, k, cos, sin, unsqueeze_dim=1):
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    q_embed = (q * cos) + (rotate_half(q) * sin)
    k_embed = (k * cos) + (rotate_half(k) * sin)
    return q_embed, k_embed
"""


def digest_of(source, *changes):
    for old, new in changes:
        assert old in source, old
        source = source.replace(old, new)
    functions = {f.name: f for f in ast.parse(source).body if isinstance(f, ast.FunctionDef)}
    return digest("apply_rotary", functions)


class TestDigest:
    @pytest.mark.parametrize(
        "changes",
        [
            [("q_embed", "rotated"), ("x1", "first"), ("x2", "second")],
            [("q_embed", "k_"), ("k_embed", "q_embed")],
            [("rotate_half", "turn")],
            [("def rotate_half(x):", "def rotate_half(x: torch.Tensor) -> torch.Tensor:")],
            [("q, k, cos, sin, unsqueeze_dim=1", "q: torch.Tensor, k, cos, sin, unsqueeze_dim: int = 1")],
            [("    q_embed =", "    q_embed: torch.Tensor =")],
            [("    cos, sin =", '    """What it does."""\n    cos, sin =')],
            [("    cos, sin =", "    # why\n    cos, sin =")],
            [("def apply", '@use_kernel_forward_from_hub("rotary_pos_emb")\ndef apply')],
            [("(q * cos) + (rotate_half(q) * sin)", "q * cos + rotate_half(q) * sin")],
            [("def rotate_half", "def rotate_other(x):\n    return x\n\ndef rotate_half")],
        ],
        ids=lambda changes: changes[0][1].splitlines()[0],
    )
    def test_is_the_same(self, changes):
        assert digest_of(APPLY, *changes) == digest_of(APPLY)

    @pytest.mark.parametrize(
        "change",
        [
            ("-x2", "x2"),
            ("(-x2, x1)", "(x1, -x2)"),
            ("x1, x2 =", "x2, x1 ="),
            ("(q * cos) +", "(q * cos) -"),
            ("return q_embed, k_embed", "return k_embed, q_embed"),
            ("chunk(2", "chunk(4"),
            ("dim=-1", "dim=1"),
            ("dim=-1", "axis=-1"),
            ("x.chunk", "x.split"),
            ("unsqueeze_dim=1", "unsqueeze_dim=2"),
            ("unsqueeze_dim=1", "unsqueeze_dim=True"),
            ("unsqueeze_dim=1", "unsqueeze_dim"),
            (", unsqueeze_dim=1", ", *, unsqueeze_dim=1"),
            ("unsqueeze_dim", "dim"),
            ("apply_rotary(q, k", "apply_rotary(k, q"),
            ("cos, sin, u", "sin, cos, u"),
            ("(q * cos)", "(q * cos.to(q.dtype))"),
            ("torch.cat", "torch.stack"),
            ("rotate_half(k)", "k"),
            ("(rotate_half(k) * sin)", "(rotate_half(q) * sin)"),
        ],
        ids=" to ".join,
    )  # fmt: skip
    def test_is_another(self, change):
        assert digest_of(APPLY, change) != digest_of(APPLY)

    def test_has_the_functions_that_are_handed_on(self):
        handed_on = digest_of(
            APPLY, ("rotate_half(q)", "torch.func.vmap(rotate_half)(q)"), ("rotate_half(k)", "k")
        )
        other = digest_of(
            APPLY,
            ("rotate_half(q)", "torch.func.vmap(rotate_half)(q)"),
            ("rotate_half(k)", "k"),
            ("-x2", "x2"),
        )
        assert handed_on != other

    def test_of_llama_is_in_the_table(self):
        functions = {f.name: f for f in ast.parse(SOURCE).body if isinstance(f, ast.FunctionDef)}
        assert known_forms()[digest("apply_rotary_pos_emb", functions)] == Form()

    @pytest.mark.parametrize("version", ["3.10", "3.11", "3.12", "3.13"])
    def test_is_the_same_in_every_python(self, version, tmp_path):
        python = _python(version)
        if python is None:
            pytest.skip(f"python{version} is not installed")
        (tmp_path / "torch").mkdir()
        (tmp_path / "torch/__init__.py").write_text("")
        (tmp_path / "torch/nn.py").write_text("class Module: pass\n")
        script = """
import ast, importlib.util, sys
spec = importlib.util.spec_from_file_location("forms", sys.argv[1])
sys.modules["forms"] = forms = importlib.util.module_from_spec(spec)
spec.loader.exec_module(forms)
for file in sys.argv[2:]:
    source = open(file, encoding="utf-8").read()
    functions = {f.name: f for f in ast.parse(source).body if isinstance(f, ast.FunctionDef)}
    print(*(forms.digest(name, functions) for name in functions if "rotary" in name))
"""
        models = Path(sys.modules["transformers"].__file__).parent / "models"
        files = [
            str(models / name / f"modeling_{name}.py")
            for name in ("llama", "glm", "gpt_oss", "deepseek_v3", "llama4")
        ]
        done = subprocess.run(
            [python, "-c", script, forms.__file__, *files],
            env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, check=True,
        )  # fmt: skip
        expected = []
        for file in files:
            source = Path(file).read_text(encoding="utf-8")
            functions = {f.name: f for f in ast.parse(source).body if isinstance(f, ast.FunctionDef)}
            expected.append(" ".join(digest(name, functions) for name in functions if "rotary" in name))
        assert done.stdout.splitlines() == expected


def _python(version):
    """A Python of that version without torch needs no environment of ours."""
    beside = Path(sys.base_prefix).parent.glob(f"*/bin/python{version}")  # as version managers lay them out
    for python in filter(None, [shutil.which(f"python{version}"), *map(str, beside)]):
        if not subprocess.run([python, "-c", ""], capture_output=True, check=False).returncode:
            return python
    return None


MUTATIONS = {
    "a sign": [(CAT, CAT.replace("-x2", "x2"))],
    "the other direction": [("cos) + (rotate", "cos) - (rotate")],
    "an order": [(CAT, CAT.replace("-x2, x1", "x1, -x2"))],
    "a constant": [("x.shape[-1] // 2", "x.shape[-1] // 4")],
    "a default": [(HEAD, HEAD.replace("=1", "=2"))],
    "a parameter's name": [
        (HEAD, HEAD.replace("k,", "x,")), ("(k * cos) + (rotate_half(k)", "(x * cos) + (rotate_half(x)")
    ],
    "a factor": [(SUM, f"{SUM} * 2")],
    "a factor of the file": [(SUM, f"{SUM} * FACTOR"), (HALF, f"FACTOR = 2\n\n\n{HALF}")],
    "interleaved": [("x[..., : x.shape[-1] // 2]", "x[..., ::2]"), ("x[..., x.shape[-1] // 2 :]", "x[..., 1::2]")],
}  # fmt: skip


class TestChangedFile:
    """A model file of a future transformers."""

    @pytest.mark.parametrize("name", MUTATIONS)
    def test_another_function_is_refused_by_name(self, name, make_copy):
        module = make_copy(*MUTATIONS[name])
        reason = "FACTOR" if "of the file" in name else FILE.name
        assert_refused(tiny(module), f"apply_rotary_pos_emb of {module.__name__}", reason)

    @pytest.mark.parametrize(
        "changes",
        [
            [],
            [("x1", "first"), ("x2", "second"), ("rotate_half", "turned"), ("q_embed", "rotated")],
            [(HEAD, HEAD.replace("q, k", "q: torch.Tensor, k: torch.Tensor"))],
            [(CAT, CAT.replace("-x2, x1", "x2, -x1"))],
        ],
        ids=["unchanged", "renamed", "annotated", "as another model rotates"],
    )
    def test_a_known_function_is_applied(self, changes, make_copy):
        assert_enabled_equals_stock(tiny(make_copy(*changes)))

    def test_a_decorator_of_the_file_is_refused(self, make_copy):
        decorator = """
def negated(function):
    @functools.wraps(function)
    def wrapper(*args):
        return [-x for x in function(*args)]
    return wrapper
"""
        decorator = f"{decorator}\n\n@negated\n{HEAD}"
        module = make_copy((HEAD, decorator), ("import torch\n", "import functools\nimport torch\n"))
        assert_refused(tiny(module), f"apply_rotary_pos_emb of {module.__name__} has been replaced")

    @pytest.mark.parametrize(
        "line",
        ["apply_rotary_pos_emb = other", "rotate_half = other", "apply_rotary_pos_emb = torch.nn.Identity()"],
    )
    def test_a_name_bound_again_is_refused(self, line, make_copy):
        other = f"def other(q, k, cos, sin, unsqueeze_dim=1):\n    return q, k\n\n\n{line}\n\n\n"
        module = make_copy(("class LlamaMLP(nn.Module):", f"{other}class LlamaMLP(nn.Module):"))
        assert_refused(tiny(module), f"{line.split()[0]} of {module.__name__} has been replaced")

    @pytest.mark.parametrize(
        ("changes", "name"),
        [
            (
                [
                    (
                        CALL,
                        "query_states = query_states * cos[:, None] + rotate_half(query_states) * sin[:, None]",
                    )
                ],
                "rotate_half",
            ),
            ([(CALL, CALL.replace("apply_rotary_pos_emb", "turn")), (HALF, f"{TURN}\n\n\n{HALF}")], "turn"),
            ([("apply_rotary_pos_emb", "apply_rope"), ("q_embed = (q", "q_embed = -(q")], "apply_rope"),
        ],
        ids=["in the method", "by another function", "under another name"],
    )
    def test_a_rotation_elsewhere_is_refused(self, changes, name, make_copy):
        module = make_copy(*changes)
        assert_refused(tiny(module), f"{name} of {module.__name__}")

    def test_what_a_function_takes_from_other_files_is_refused(self, make_copy, monkeypatch):
        """Even where somebody has put it into the table: its source is not seen."""
        module = make_copy(*MUTATIONS["a factor of the file"])
        functions = forms.stock_file(module.__name__).functions
        known = {**known_forms(), digest("apply_rotary_pos_emb", functions): Form()}
        monkeypatch.setattr(forms, "known_forms", lambda: known)
        assert_refused(tiny(module), f"apply_rotary_pos_emb of {module.__name__}", "FACTOR")

    def test_the_tool_names_it(self, make_copy, monkeypatch, capsys):
        known, scaled = make_copy(), make_copy(*MUTATIONS["a factor"])
        turned = make_copy(*MUTATIONS["the other direction"])
        files = [forms.stock_file(module.__name__) for module in (known, scaled, turned)]
        monkeypatch.setattr(rotary_forms, "stock_files", lambda: iter(files))
        monkeypatch.setattr(sys, "argv", ["rotary_forms"])
        before = FILE.read_bytes()
        assert rotary_forms.main() == 1
        lines = capsys.readouterr().out.splitlines()[1:]
        assert [line.partition(", ")[0] for line in lines] == [
            f"{module.__name__.rpartition('_')[2]}.apply_rotary_pos_emb: new" for module in (scaled, turned)
        ]
        assert "no form" in lines[0]
        assert "negative=True" in lines[1]
        assert FILE.read_bytes() == before

    def test_the_tool_adds_what_it_knows_to_be_a_form(self, make_copy, monkeypatch, tmp_path):
        scaled, turned = make_copy(*MUTATIONS["a factor"]), make_copy(*MUTATIONS["the other direction"])
        table = tmp_path / FILE.name
        table.write_bytes(FILE.read_bytes())
        for module in (forms, rotary_forms):
            monkeypatch.setattr(module, "FILE", table)
        monkeypatch.setattr(norm_forms, "FILE", tmp_path / norm_forms.FILE.name)
        norm_forms.FILE.write_bytes(NORMS.read_bytes())
        monkeypatch.setattr(sys, "argv", ["rotary_forms", "--write"])
        files = [forms.stock_file(turned.__name__)]
        monkeypatch.setattr(rotary_forms, "stock_files", lambda: iter(files))
        before = json.loads(table.read_text(encoding="utf-8"))
        known_forms.cache_clear()
        try:
            assert rotary_forms.main() == 0
            after = json.loads(table.read_text(encoding="utf-8"))
            (entry,) = [after[key] for key in after.keys() - before.keys()]
            assert before.items() <= after.items()
            assert (entry["layout"], entry["tables"], entry["negative"]) == ("half", "twice", True)
            assert_enabled_equals_stock(tiny(turned))
            files.append(forms.stock_file(scaled.__name__))
            assert rotary_forms.main() == 1
            assert json.loads(table.read_text(encoding="utf-8")) == after
        finally:
            norm_forms.known_norms.cache_clear()
            known_forms.cache_clear()

    def test_the_tool_names_a_wrong_entry(self, make_copy, monkeypatch):
        module = make_copy(*MUTATIONS["the other direction"])
        file = forms.stock_file(module.__name__)
        monkeypatch.setattr(rotary_forms, "stock_files", lambda: iter([file]))
        key = digest("apply_rotary_pos_emb", file.functions)
        monkeypatch.setattr(rotary_forms, "known_forms", lambda: {key: Form()})
        found, (line,) = rotary_forms.compare()
        assert "WRONG" in line
        assert not found


def test_every_form_of_the_installed_transformers_is_known():
    found, lines = rotary_forms.compare()
    assert lines == []
    assert found.keys() <= known_forms().keys()
    assert len(found) > 20


def test_every_norm_of_the_installed_transformers_is_known():
    found, lines = tools.norm_forms.compare(rotary_forms.stock_files())
    assert lines == []
    assert found.keys() <= norm_forms.known_norms().keys()
    assert len(found) > 5


class TestNorms:
    """What the tool says of norms: a file with those of llama, changed."""

    @pytest.fixture
    def compare(self, make_copy, monkeypatch):
        attention = "class LlamaAttention(nn.Module):"
        made = ("self.o_proj = nn.Linear(", "self.q_norm = LlamaRMSNorm(8)\n        self.o_proj = nn.Linear(")

        def compare(*changes):
            assert attention in SOURCE
            return tools.norm_forms.compare(iter([forms.stock_file(make_copy(made, *changes).__name__)]))

        return compare

    def test_a_known_one(self, compare):
        found, lines = compare()
        assert lines == []
        ((_, entry),) = found.items()
        assert entry["eps"] == "variance_epsilon"
        assert entry["promotes"]

    def test_a_new_one(self, compare):
        found, (line,) = compare(
            ("return self.weight * hidden_states.to(input_dtype)",
             "return ((1 + self.weight) * hidden_states).to(input_dtype)")
        )  # fmt: skip
        assert "LlamaRMSNorm: new" in line
        ((key, entry),) = found.items()
        assert key not in norm_forms.known_norms()
        assert entry.pop("example").endswith("LlamaRMSNorm")
        assert entry == {"eps": "variance_epsilon", "weight": "weight", "offset": 1.0}

    @pytest.mark.parametrize(
        "change",
        [
            ("hidden_states.pow(2).mean", "hidden_states.pow(2).sum"),
            ("variance + self.variance_epsilon", "variance"),
            ("variance + self.variance_epsilon", "variance + self.variance_epsilon ** 2"),
            ("hidden_states.pow(2)", "(hidden_states - hidden_states.mean(-1, keepdim=True)).pow(2)"),
            ("return self.weight *", "return (self.weight + 0.01) *"),
        ],
    )
    def test_what_is_no_rms_norm(self, change, compare):
        assert compare(change) == ({}, [])

    def test_a_wrong_entry(self, compare, monkeypatch):
        known = {key: dataclasses.replace(form, offset=1.0) for key, form in norm_forms.known_norms().items()}
        monkeypatch.setattr(tools.norm_forms, "known_norms", lambda: known)
        found, (line,) = compare()
        assert "WRONG" in line
        assert not found


def other_rotation(q, k, cos, sin, unsqueeze_dim=1):
    return q, k


class TestReplacedAtRunTime:
    """As Liger and others do: by assigning to the names of a model's file."""

    @pytest.mark.parametrize("enabled_before", [False, True])
    @pytest.mark.parametrize("name", ["apply_rotary_pos_emb", "rotate_half"])
    def test_a_function(self, name, enabled_before, make_copy, monkeypatch):
        module = make_copy()
        model = tiny(module)
        if enabled_before:
            assert_enabled_equals_stock(model)
        with monkeypatch.context() as patch:
            patch.setattr(module, name, other_rotation)
            assert_refused(model, f"{name} of {module.__name__} has been replaced")
        assert_enabled_equals_stock(model)

    def test_a_function_that_names_the_one_it_replaces(self, make_copy, monkeypatch):
        module = make_copy()
        other = functools.wraps(module.apply_rotary_pos_emb)(lambda *args: (args[0], args[1]))
        assert other.__module__ == module.__name__
        monkeypatch.setattr(module, "apply_rotary_pos_emb", other)
        assert_refused(tiny(module), f"apply_rotary_pos_emb of {module.__name__} has been replaced")

    @pytest.mark.parametrize("enabled_before", [False, True])
    def test_a_method(self, enabled_before, make_copy, monkeypatch):
        module = make_copy()
        model = tiny(module)
        if enabled_before:
            assert_enabled_equals_stock(model)

        def forward(self, hidden_states, **kwargs):
            return hidden_states, None

        with monkeypatch.context() as patch:
            patch.setattr(module.LlamaAttention, "forward", forward)
            assert_refused(model, f"LlamaAttention.forward of {module.__name__} has been replaced")
        assert_enabled_equals_stock(model)

    def test_another_function_of_the_file_is_called(self, make_copy, monkeypatch):
        """Which has nothing to do with the rotation: before enable(), and after one that was undone."""
        module = make_copy()
        model = tiny(module)
        model.set_attn_implementation("eager")
        assert_enabled_equals_stock(model)
        stock, calls = module.eager_attention_forward, []

        def counted(*args, **kwargs):
            calls.append(type(args[0]))
            return stock(*args, **kwargs)

        monkeypatch.setattr(module, "eager_attention_forward", counted)
        assert_enabled_equals_stock(model)
        assert len(calls) == 2 * 2
        assert [issubclass(cls, EnabledAttention) for cls in calls] == [False] * 2 + [True] * 2

    def test_a_method_that_is_wrapped_stays_wrapped(self, make_copy, monkeypatch):
        module = make_copy()
        inner, calls = module.LlamaAttention.forward, []

        @functools.wraps(inner)
        def counted(*args, **kwargs):
            calls.append(args[0])
            return inner(*args, **kwargs)

        monkeypatch.setattr(module.LlamaAttention, "forward", counted)
        model = tiny(module)
        assert_enabled_equals_stock(model)
        assert len(calls) == 2 * 2


def test_a_file_without_source_is_refused(make_copy, monkeypatch):
    module = make_copy()
    model = tiny(module)
    monkeypatch.setattr(inspect, "getsource", Mock(side_effect=OSError("could not get source code")))
    assert_refused(model, f"the source of {module.__name__} is not installed")


class TestKernelsLibrary:
    """``use_kernel_forward_from_hub`` makes a module of a function where the kernels library is installed."""

    def test_its_module_is_opened(self, make_copy):
        module = make_copy()
        function = module.apply_rotary_pos_emb

        class Func(nn.Module):  # as kernels.layer.layer._create_func_module
            __module__ = "kernels.layer.layer"

            def forward(self, *args, **kwargs):
                return function(*args, **kwargs)

        module.apply_rotary_pos_emb = Func()
        assert forms.stock_file(module.__name__).function("apply_rotary_pos_emb") is function
        assert_enabled_equals_stock(tiny(module))
        # One around another function is still another function.
        function = other_rotation
        assert_refused(tiny(module), f"apply_rotary_pos_emb of {module.__name__} has been replaced")

    def test_another_module_is_refused(self, make_copy):
        module = make_copy()
        function = module.apply_rotary_pos_emb

        class Doubled(nn.Module):
            def forward(self, *args):
                return [2 * x for x in function(*args)]

        module.apply_rotary_pos_emb = Doubled()
        assert_refused(tiny(module), f"apply_rotary_pos_emb of {module.__name__} has been replaced")
